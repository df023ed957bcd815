"""The recipes' lines, run in stand-ins for the hosts: the SA term, the calls made, few lines."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sa_plugin import NoiseSchedule, SALoss
from tests.code_blocks import ROOT, Block, blocks, run
from tests.reference import sa_terms
from tests.stand_ins import EDM, SHAPE, DDIMFork, GuidedDiffusion
from tests.toys import Toy, images, normal

RECIPES = ROOT / "docs" / "recipes"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def recipe(name: str) -> list[Block]:
    return blocks(RECIPES / f"{name}.md")


@pytest.mark.parametrize("name", ["ddim", "sa_dpm", "improved_diffusion", "edm"])
def test_at_most_ten_lines_change(name):
    """In each section by itself: a reader takes one."""
    lines = (RECIPES / f"{name}.md").read_text().splitlines()
    count = {}
    for block in recipe(name):
        title = [line for line in lines[: block.line] if line.startswith("## ")][-1]
        count[title] = count.get(title, 0) + len(block.changed_lines)
    assert count
    assert max(count.values()) <= 10, count


def assert_equal_losses(scale, *losses):
    """Values and gradients."""
    torch.testing.assert_close(*losses, **CLOSE)
    slopes = [torch.autograd.grad(loss.mean(), scale)[0] for loss in losses]
    torch.testing.assert_close(*slopes, **CLOSE)


def test_ddim():
    fork = DDIMFork()
    variables = fork.iteration()
    x, t, e = (variables[name] for name in "xte")
    plain, options, sampling = recipe("ddim")
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


LABELS, NOISE, DRAWN = torch.arange(8) % 3, normal(1, *SHAPE), normal(4, *SHAPE)
STEPS = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9])
KEPT = [0, 3, 7, 12, 20, 28, 33, 40, 45, 49]
OPTION = 'output="channels"'


@pytest.fixture
def known_draws(monkeypatch):
    """The noise of the window's other step, which the recipes leave to be drawn."""
    monkeypatch.setattr("sa_plugin.loss.draw", lambda rest, *_: DRAWN[None].expand(rest, *SHAPE))


@pytest.mark.usefixtures("known_draws")
@pytest.mark.parametrize(
    ("host", "changes"),
    [
        ({}, {}),
        ({"rescale": True}, {OPTION: f"rescale_to=1000, {OPTION}"}),
        ({"learned": False}, {f", {OPTION}": ""}),
        ({"kept": KEPT}, {}),
        ({"kept": KEPT, "rescale": True}, {}),
    ],
)
def test_improved_diffusion(host, changes):
    """The host's loss plus the mean SA-2 term, by one call more, at the host's own times."""
    diffusion = GuidedDiffusion(**host)
    network = Toy(2 if diffusion.learned else 1)
    once, each, _ = recipe("improved_diffusion")
    namespace = {"diffusion": diffusion}
    run(once, namespace)

    def changed(variables):
        variables["terms"]["host"] = variables["terms"]["loss"]
        namespace.update(variables)
        run(each, namespace, changes)

    x = images(0, *SHAPE)
    terms = diffusion.training_losses(network, x, STEPS, {"y": LABELS}, NOISE, changed)
    rate = 20.0 if diffusion.rescale else 1
    original = torch.tensor(diffusion.timestep_map)
    neighbours = (STEPS - 1).clamp(min=0)  # below the first step: the first, without weight
    assert network.times[0].tolist() == (original[STEPS] * rate).tolist()
    assert network.times[1].tolist() == (original[neighbours] * rate).tolist()
    _, expected = sa_terms(
        lambda x, n, y: network(x, original[n - 1] * rate, y)[:, :2],
        x,
        STEPS + 1,
        torch.stack([NOISE, DRAWN]),
        np.append(1.0, diffusion.alphas_cumprod),
        reduction="mean",
        y=LABELS,
    )
    assert_equal_losses(network.scale, terms["loss"] - terms["host"], expected)


def test_improved_diffusion_sampling_with_respaced_steps():
    network = Toy(2)
    diffusion = GuidedDiffusion(KEPT)
    *_, sampling = recipe("improved_diffusion")
    namespace = {"diffusion": diffusion, "model": network, "shape": SHAPE, "labels": LABELS}
    run(sampling, namespace)
    visited = [KEPT[n - 1] for n in namespace["sampler"].timesteps][::-1]
    assert [int(t[0]) for t in network.times] == visited
    assert namespace["images"].isfinite().all()


def edm(K=2):
    """The variables after the recipe, with the loss that the host had before it."""
    host = EDM()
    once, rounded, each = recipe("edm")
    variables = host.draw()
    run(once, variables, {"K=2": f"K={K}"})
    drawn = variables["sigma"]
    run(rounded, variables)
    host.evaluate(variables)
    before = variables["loss"]
    run(each, variables)
    return host, variables, drawn, before


def test_edm_rounds_sigma_to_the_ladder():
    _, variables, drawn, _ = edm()
    ladder, n = variables["ladder"], variables["n"]
    sigma = variables["sigma"].flatten()
    assert sigma.tolist() == ladder.double()[n - 1].tolist()
    inside = (drawn.flatten() > ladder[0]) & (drawn.flatten() < ladder[-1])
    assert inside.tolist() == [False, False, *[True] * 6]
    factor = (sigma / drawn.flatten())[inside]
    assert ((factor >= 1) & (factor < 10 ** (4.6 / 999) + 1e-6)).all()
    assert n[:2].tolist() == [1, 1000]


def test_edm_with_a_window_of_one_is_twice_the_hosts_loss():
    """Whatever sigma, both terms weigh alike."""
    _, variables, _, before = edm(K=1)
    totals = [value.sum((1, 2, 3)) for value in (variables["loss"], 2 * before)]
    torch.testing.assert_close(*totals, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("known_draws")
def test_edm():
    """The added term at x_s = sqrt(a) (x_0 + sigma eps); the network sees its own kind of input."""
    host, variables, _, before = edm()
    ladder, n, y = variables["ladder"].double(), variables["n"], variables["y"]
    a = 1 / (1 + torch.cat([torch.zeros(1), ladder]) ** 2)

    def eps_model(x, n, labels):
        x, sigma = x / a[n].sqrt(), ladder[n - 1]
        return (x - host.net(x, sigma, labels)) / sigma

    noise = torch.stack([variables["noise"] / variables["sigma"], DRAWN])
    labels = variables["labels"]
    _, expected = sa_terms(eps_model, y, n, noise, a, reduction="mean", labels=labels)
    factor = variables["weight"] * variables["sigma"] ** 2
    added = variables["loss"] - before
    expected = (factor * expected.reshape(factor.shape)).expand_as(added)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-8)
    assert added.requires_grad
    assert host.sigmas[1].tolist() == pytest.approx(ladder[(n - 2).clamp(min=0)].tolist(), rel=1e-6)


def test_denoising_diffusion_pytorch():
    """It runs; its numbers have tests of their own."""
    generator = torch.Generator().manual_seed(0)
    namespace = {"images": torch.rand(2, 1, 8, 8, generator=generator)}
    first, second = recipe("denoising_diffusion_pytorch")
    run(first, namespace, {"timesteps=1000": "timesteps=20"})
    run(second, namespace, {"steps=10": "steps=2"})
    assert set(namespace["diffusion"].statistics) == {"simple_loss", "sa_loss"}
    assert namespace["samples"].shape == (2, 1, 8, 8)


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
