"""The recipes' lines, run in stand-ins for the hosts: the SA term, the calls made, few lines."""

import jax.numpy as jnp
import pytest
import torch

from sa_plugin import NoiseSchedule, SALoss
from tests.code_blocks import ROOT, Block, blocks, run
from tests.stand_ins import EDM, SHAPE, DDIMFork, GuidedDiffusion, Network
from tests.toys import images, normal, over

RECIPES = ROOT / "docs" / "recipes"
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def recipe(name: str) -> list[Block]:
    return blocks(RECIPES / f"{name}.md")


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter)[0]


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


def test_ddim():
    fork = DDIMFork()
    variables = fork.iteration()
    plain, options, sampling = recipe("ddim")
    torch.manual_seed(0)
    run(plain, variables)
    torch.manual_seed(0)
    expected = DDIMFork.published_loss(**_renamed(variables))
    torch.testing.assert_close(variables["loss"], expected, **CLOSE)
    slopes = [gradient(loss, fork.model.scale) for loss in (variables["loss"], expected)]
    torch.testing.assert_close(*slopes, **CLOSE)

    fork.model.times.clear()
    torch.manual_seed(0)
    run(options, variables)
    assert fork.model.times[-1].tolist() == variables["t"].tolist()  # as the host counts
    schedule = NoiseSchedule.from_betas(fork.b)
    torch.manual_seed(0)
    ours = SALoss(schedule, K=2, backprop="one")(
        lambda x, n: fork.model(x, n - 1), variables["x"], n=variables["t"] + 1
    )
    torch.testing.assert_close(variables["loss"], ours.total, **CLOSE)

    fork.model.times.clear()
    run(sampling, variables)
    assert variables["images"].isfinite().all()
    visited = [int(t[0]) for t in fork.model.times]
    assert visited[:50] == list(range(50))  # Gamma's
    assert visited[50:] == [n - 1 for n in variables["sampler"].timesteps][::-1]


def _renamed(variables):
    return {"x0" if k == "x" else k: variables[k] for k in ("model", "x", "t", "e", "b")}


@pytest.mark.parametrize("K", [2, 3])
def test_sa_dpm(K):
    fork = DDIMFork()
    variables = fork.iteration()
    (block,) = recipe("sa_dpm")
    run(block, variables)
    losses, counts = [], []
    for function in (variables["sequence_aware_loss"], DDIMFork.published_loss):
        torch.manual_seed(0)
        fork.model.times.clear()
        losses.append(function(**_renamed(variables), num_consecutive_steps=K, lamda=0.3))
        counts.append(len(fork.model.times))
    torch.testing.assert_close(*losses, **CLOSE)
    torch.testing.assert_close(*(gradient(loss, fork.model.scale) for loss in losses), **CLOSE)
    assert counts == [1, K]


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
    network = Network(2 if diffusion.learned else 1)
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
    expected = _mean_sa2(diffusion, network, x, rate)
    added = terms["loss"] - terms["host"]
    torch.testing.assert_close(added, expected, **CLOSE)
    slopes = [gradient(term.mean(), network.scale) for term in (added, expected)]
    torch.testing.assert_close(*slopes, **CLOSE)


def _mean_sa2(diffusion, network, x, rate):
    """[B], the two errors of each window by themselves."""
    errors = []
    for t, eps in ((STEPS, NOISE), ((STEPS - 1).clamp(min=0), DRAWN)):
        a = over(torch.tensor(diffusion.alphas_cumprod)[t], x)
        time = torch.tensor(diffusion.timestep_map)[t] * rate
        output = network(a.sqrt() * x + (1 - a).sqrt() * eps, time, LABELS)
        errors.append(output[:, :2] - eps)
    inside = over((STEPS >= 1).long(), x)
    return ((errors[0] + inside * errors[1]) / 2).square().mean((1, 2, 3))


def test_improved_diffusion_sampling_with_respaced_steps():
    network = Network(2)
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
    """The added term by the window's two errors; the network sees its own kind of input."""
    host, variables, _, before = edm()
    ladder, n, y = variables["ladder"].double(), variables["n"], variables["y"]
    window = torch.zeros_like(y)
    for k, eps in enumerate((variables["noise"] / variables["sigma"], DRAWN)):
        sigma = over(ladder[(n - 1 - k).clamp(min=0)], y)
        guess = host.net(y + sigma * eps, sigma, variables["labels"])
        window += over((n - k >= 1).long(), y) * ((y + sigma * eps - guess) / sigma - eps) / 2
    factor = variables["weight"] * variables["sigma"] ** 2
    expected = factor * window.square().mean((1, 2, 3), keepdim=True)
    added = variables["loss"] - before
    torch.testing.assert_close(added, expected.expand_as(added), rtol=1e-6, atol=1e-8)
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
    ours = SALoss(NoiseSchedule.linear(1000))(namespace["model"], x0, n=n, noise=noise)
    assert float(namespace["loss"]) == pytest.approx(ours.total.item(), rel=1e-5)
