"""The recipes' lines, run in stand-ins for the hosts: the SA term, the calls made, few lines."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from azula.denoise import GaussianDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.noise import VPSchedule

from sa_plugin import NoiseSchedule, SALoss, attach, detach
from tests.code_blocks import ROOT, Block, blocks, run
from tests.reference import sa_terms
from tests.refusals import refuses
from tests.stand_ins import EDM, SHAPE, DDIMFork, GuidedDiffusion, KDiffusion, Mapping
from tests.toys import Toy, images, normal

RECIPES = ROOT / "docs" / "recipes"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def recipe(name: str) -> list[Block]:
    return blocks(RECIPES / f"{name}.md")


@pytest.mark.parametrize(
    ("name", "most"), [("ddim", 5), ("sa_dpm", 1), ("improved_diffusion", 5), ("edm", 6)]
)
def test_few_lines_change(name, most):
    """In each section by itself, with those before the first: a reader takes one."""
    lines = (RECIPES / f"{name}.md").read_text().splitlines()
    count = {}
    for block in recipe(name):
        titles = ["", *(line for line in lines[: block.line] if line.startswith("## "))]
        count[titles[-1]] = count.get(titles[-1], 0) + len(block.changed_lines)
    always = count.pop("", 0)
    assert count
    assert always + max(count.values()) == most, count


def assert_equal_losses(scale, *losses):
    """Values and gradients."""
    torch.testing.assert_close(*losses, **CLOSE)
    slopes = [torch.autograd.grad(loss.mean(), scale)[0] for loss in losses]
    torch.testing.assert_close(*slopes, **CLOSE)


def test_ddim():
    fork = DDIMFork()
    variables = fork.iteration()
    x, t, e = (variables[name] for name in "xte")
    plain, options, sampling, steps = recipe("ddim")
    torch.manual_seed(0)
    run(plain, variables)
    torch.manual_seed(0)
    assert_equal_losses(fork.model.scale, variables["loss"], fork.published_loss(x, t, e))

    fork.model.times.clear()
    torch.manual_seed(0)
    run(options, variables)
    assert fork.model.times[-1].tolist() == t.tolist()  # as the host counts
    torch.manual_seed(0)
    ours = SALoss(NoiseSchedule.from_betas(fork.b), K=2, backprop="one")(
        lambda x, n: fork.model(x, n - 1), x, n=t + 1
    )
    torch.testing.assert_close(variables["loss"], ours.total, **CLOSE)

    fork.model.times.clear()
    run(sampling, variables)
    assert variables["images"].isfinite().all()
    visited = [int(t[0]) for t in fork.model.times]
    assert visited[:50] == list(range(50))  # Gamma's
    assert visited[50:] == [n - 1 for n in variables["sampler"].timesteps][::-1]

    run(steps, variables)
    assert variables["theirs"][:6] == [1, 1, 2, 3, 6, 9]
    assert variables["ours"][:6] == [1, 2, 3, 4, 6, 9]


@pytest.mark.parametrize("K", [2, 3])
def test_sa_dpm(K):
    fork = DDIMFork()
    variables = fork.iteration()
    model, x, t, e, b = (variables[name] for name in ("model", "x", "t", "e", "b"))
    (block,) = recipe("sa_dpm")
    run(block, variables)
    torch.manual_seed(0)
    named = {"num_consecutive_steps": K, "lamda": 0.3}
    loss = variables["sequence_aware_loss"](model, x0=x, t=t, e=e, b=b, **named)
    assert len(model.times) == 1
    torch.manual_seed(0)
    assert_equal_losses(model.scale, loss, fork.published_loss(x, t, e, K, 0.3))


LABELS, NOISE = torch.arange(8) % 3, normal(1, *SHAPE)
STEPS = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9])
KEPT = [0, 3, 7, 12, 20, 28, 33, 40, 45, 49]


def train(parameter, loss_of, brute_force_of, iterations=20):
    """With Adam; at each iteration value and gradient of the loss are those of the brute force.

    Both take the number of the iteration and begin at the same state of torch's generator.
    """
    optimizer = torch.optim.Adam([parameter], 0.02)
    for i in range(iterations):
        losses = []
        for evaluate in (loss_of, brute_force_of):
            torch.manual_seed(i)
            losses.append(evaluate(i))
        slopes = [torch.autograd.grad(loss.mean(), parameter)[0] for loss in losses]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)
        parameter.grad = slopes[0]
        optimizer.step()


def brute_eps_of(diffusion, network):
    """(x, n, y) -> eps by the host's own conversion to x_0, for one image."""

    def eps_model(x, n, y):
        output = network(x, diffusion.times()[n - 1], y)[:, : x.shape[1]]
        a, *_ = diffusion.tables(n - 1, x)
        return (x - a.sqrt() * diffusion.x_start_of(output, x, n - 1)) / (1 - a).sqrt()

    return eps_model


def attached(**options):
    """A diffusion after the recipe, and its network."""
    diffusion = GuidedDiffusion(**options)
    run(recipe("improved_diffusion")[0], {"diffusion": diffusion})
    return diffusion, Toy(2 if diffusion.learned else 1)


@pytest.mark.parametrize(
    "options",
    [
        {},  # guided-diffusion's own
        {"rescale": True, "loss": "RESCALED_MSE"},  # improved-diffusion's
        {"learned": True, "kept": KEPT, "rescale": True, "loss": "RESCALED_MSE"},
        {"kept": KEPT, "loss": "KL"},
        *({"learned": sigma, "loss": "RESCALED_KL"} for sigma in (False, True)),
        {"mean": "START_X"},
        {"mean": "START_X", "learned": True, "loss": "KL"},
        {"mean": "PREVIOUS_X", "kept": KEPT},
        {"mean": "PREVIOUS_X", "learned": True, "loss": "RESCALED_KL"},
    ],
    ids=str,
)
def test_improved_diffusion(options):
    """The host's loss plus the mean SA-2 term, by the host's own call, at the host's own times."""
    diffusion, network = attached(**options)
    plain, last = GuidedDiffusion(**options), len(diffusion.betas)
    a = np.append(1.0, diffusion.alphas_cumprod)

    def draws(i):
        t = torch.from_numpy(np.random.RandomState(i).permutation(last)[:8])
        return (
            images(i, *SHAPE),
            torch.cat([torch.zeros(1, dtype=t.dtype), t[1:]]),
            normal(i, *SHAPE),
        )

    def hooked(i):
        x, t, noise = draws(i)
        network.times.clear()
        terms = diffusion.training_losses(network, x, t, {"y": LABELS}, noise)
        rows = torch.cat([t, (t - 1).clamp(min=0)])
        assert [times.tolist() for times in network.times] == [diffusion.times()[rows].tolist()]
        assert terms.keys() - {"sa_loss"} == plain.training_losses(network, x, t).keys()
        return terms["loss"]

    def brute(i):
        x, t, noise = draws(i)
        other = torch.randn(1, *SHAPE, dtype=x.dtype)
        noises = torch.cat([noise[None], other])
        eps_model = brute_eps_of(diffusion, network)
        _, sa = sa_terms(eps_model, x, t + 1, noises, a, reduction="mean", y=LABELS)
        return plain.training_losses(network, x, t, {"y": LABELS}, noise)["loss"] + sa

    default = options in ({}, {"rescale": True, "loss": "RESCALED_MSE"})
    train(network.scale, hooked, brute, 20 if default else 3)


def test_improved_diffusion_of_a_network_that_its_caller_has_wrapped():
    diffusion, network = attached(kept=KEPT, rescale=True)
    given = [network, Mapping(network, diffusion.times())]
    losses = []
    for model in given:
        torch.manual_seed(0)
        losses.append(
            diffusion.training_losses(model, images(0, *SHAPE), STEPS, noise=NOISE)["loss"]
        )
    assert torch.equal(*losses)
    detach(diffusion)
    assert "training_losses" not in vars(diffusion)


@refuses(
    ({"mean": "VELOCITY"}, "model_mean_type must be one of .*'PREVIOUS_X'.*got 'VELOCITY'"),
    ({"reduction": "sum"}, "reduction must be the host's, 'mean', got 'sum'"),
    ({"reuse": True}, "reuse must be False"),
    ({"input_perturbation": 0.1}, "input_perturbation must be 0"),
)
def test_improved_diffusion_that_cannot_be_served(options):
    diffusion = GuidedDiffusion(mean=options.pop("mean", "EPSILON"))
    options = {"reduction": "mean", **options}
    attach(diffusion, SALoss(NoiseSchedule.from_betas(diffusion.betas), **options))


def test_improved_diffusion_with_other_channels_is_refused():
    diffusion, _ = attached()
    with pytest.raises(ValueError, match="the network must return 2 or 4 channels, got 6"):
        diffusion.training_losses(Toy(3), images(0, *SHAPE), STEPS)


def test_improved_diffusion_sampling_with_respaced_steps():
    network = Toy(2)
    diffusion = GuidedDiffusion(KEPT)
    *_, sampling = recipe("improved_diffusion")
    namespace = {"diffusion": diffusion, "model": network, "shape": SHAPE, "labels": LABELS}
    run(sampling, namespace)
    visited = [KEPT[n - 1] for n in namespace["sampler"].timesteps][::-1]
    assert [int(t[0]) for t in network.times] == visited
    assert namespace["images"].isfinite().all()


def sigma_term(D, y, noise, sigma):
    """sigma^2 L_sa [B, 1, 1, 1], image by image: the window is sigma and sigma / 1.01.

    D takes the number of an image, its noisy version and its sigma.
    """
    terms = []
    for b in range(len(y)):
        own = sigma[b].reshape(())
        e = [(y[b] - D(b, y[b] + s * noise[k][b], s)) / s for k, s in enumerate((own, own / 1.01))]
        terms.append(own**2 * ((e[0] + e[1]) / 2).square().mean())
    return torch.stack(terms).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("law", ["edm", "vp", "ve"])
def test_edm(law):
    """Labels, and augmentation labels as by default; sigma from far below to far above 1."""
    host = EDM(law)
    once, each, _ = recipe("edm")
    state = {}
    run(once, state)

    def changed(i):
        host.net.calls.clear()
        namespace = host.variables(i) | state
        run(each, namespace)
        assert host.net.calls == [2 * SHAPE[0]]  # in the host's own call
        return namespace["loss"]

    def brute(i):
        v = host.variables(i)
        y, sigma, labels = v["y"], v["sigma"], (v["labels"], v["augment_labels"])

        def D(b, x, s):
            return host.net(x[None], s, *(rows[b : b + 1] for rows in labels))[0]

        noise = [v["n"] / sigma, torch.randn(1, *SHAPE, dtype=y.dtype)[0]]
        D_yn = host.net(y + v["n"], sigma, *labels)
        return v["weight"] * ((D_yn - y) ** 2 + sigma_term(D, y, noise, sigma))

    train(host.net.scale, changed, brute)


def test_k_diffusion():
    model = KDiffusion()
    once, _, each = recipe("edm")
    state = {"model": model}
    run(once, state)

    def variables(i):
        v = EDM().variables(i)
        conditions = {"aug_cond": v["augment_labels"], "class_cond": v["labels"]}
        return v["y"], v["n"] / v["sigma"], v["sigma"].flatten(), conditions

    def changed(i):
        reals, noise, sigma, extra_args = variables(i)
        aug_cond = extra_args.pop("aug_cond")
        given = {"reals": reals, "noise": noise, "sigma": sigma, "extra_args": extra_args}
        namespace = state | given | {"aug_cond": aug_cond}
        run(each, namespace)
        return namespace["losses"]

    def brute(i):
        reals, noise, sigma, conditions = variables(i)
        other = torch.randn(1, *SHAPE, dtype=reals.dtype)[0]

        def D(b, x, s):
            rows = {name: rows[b : b + 1] for name, rows in conditions.items()}
            return model(x[None], s[None], **rows)[0]

        sa = sigma_term(D, reals, [noise, other], sigma).flatten()
        return model.loss(reals, noise, sigma, **conditions) + sa * (1 + 1 / sigma**2)

    train(model.inner_model.scale, changed, brute)


def test_denoising_diffusion_pytorch():
    """It runs; its numbers have tests of their own."""
    generator = torch.Generator().manual_seed(0)
    namespace = {"images": torch.rand(2, 1, 8, 8, generator=generator)}
    first, second = recipe("denoising_diffusion_pytorch")
    run(first, namespace, {"timesteps=1000": "timesteps=20"})
    run(second, namespace, {"steps=10": "steps=2"})
    assert set(namespace["diffusion"].statistics) == {"simple_loss", "sa_loss"}
    assert namespace["samples"].shape == (2, 1, 8, 8)


def test_azula():
    """Its exact denoiser has the Gamma of Gaussian data, and samples get the data's variance."""
    mean, variance = torch.full((1, 2, 2), 0.1, dtype=torch.float64), 0.04
    covariance = IsotropicCovariance(torch.tensor(variance).to(mean))
    namespace = {"images": mean + variance**0.5 * normal(0, 1000, 1, 2, 2)}
    namespace["denoiser"] = GaussianDenoiser(mean, covariance, VPSchedule())
    run(recipe("azula")[0], namespace, {"1001": "101"})
    schedule = namespace["schedule"]
    gamma = schedule.cum_betas / (variance * schedule.cum_alphas + schedule.cum_betas)
    np.testing.assert_allclose(namespace["gamma"].values[1:], gamma[1:], rtol=0.1)
    assert namespace["samples"].var().item() == pytest.approx(variance, rel=0.1)


def test_jax():
    x0, n = images(0, 8, 4), torch.tensor([1, 2, 3, 4, 100, 500, 999, 1000])
    noise = normal(1, 2, 8, 4)
    namespace = {"model": lambda x, n: 0.9 * x + 0.1}
    namespace |= {k: jnp.asarray(v.numpy()) for k, v in (("x0", x0), ("n", n))}
    namespace["noise"] = jnp.asarray(noise.numpy())
    (block,) = recipe("jax")
    run(block, namespace)
    a = NoiseSchedule.linear(1000).cum_alphas
    simple, sa = sa_terms(namespace["model"], x0, n, noise, a)
    assert float(namespace["loss"]) == pytest.approx((simple + sa).mean().item(), rel=1e-5)
