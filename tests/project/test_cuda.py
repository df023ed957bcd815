"""On a GPU: python -m pytest -m cuda. Nothing waits for the device, and numbers are the CPU's.

Left out elsewhere: the default run hides GPUs (conftest.py), so that it is the same everywhere.
"""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from sa_plugin import NoiseSchedule, SALoss, attach
from sa_plugin.metrics.moments import Moments
from sa_plugin.sampling.sampler import Sampler
from tests.adapters.test_sn_dpm import read_log, sn_dpm
from tests.sa_plugin.sampling.test_execution import network as convolutions
from tests.sa_plugin.sampling.test_sampler import ARRAYS, GOLDEN, golden_sampler
from tests.third_party.test_step_options import (
    LINEAR,
    assert_close,
    criterion_for,
    gradients,
    network,
)
from tests.toys import images, normal, toy_eps
from third_party.common.ema import EMA
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.extended_analytic_dpm.methods import build_criterion

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    # of torch.compile: what it imports, advice, and the graph of a shape that it only warms up for
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning"),
]
SHORT = NoiseSchedule.linear(100)
TERMS = [
    {"K": 3, "window": window, "noise": noise, "backprop": backprop, "stack": stack}
    for window in ("down", "paper")
    for noise in ("independent", "shared", "chain")
    for backprop in ("all", "one")
    for stack in (True, False)
]
MORE = [{"antithetic": True}, {"stratified": True}, {"reuse": True}]


@pytest.fixture
def never_waits():
    """Within, what makes the processor wait for the GPU is an error."""

    def within(work):
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            return work()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return within


@pytest.fixture
def exact(monkeypatch):
    """float32 products as they are on a CPU, not TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def test_the_fixture_finds_a_wait(never_waits):
    with pytest.raises(RuntimeError, match="synchroniz"):
        never_waits(torch.ones(3, device="cuda").sum().item)


# ------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("options", [*TERMS, *MORE], ids=str)
def test_the_loss_never_waits(options, never_waits):
    loss = SALoss(SHORT, **options)
    scale = torch.ones(1, device="cuda", requires_grad=True)
    x0 = images(0, 8, 1, 4, 4).float().cuda()

    def step():
        loss(lambda x, n: scale * toy_eps(x, n), x0).total.backward()

    step()  # tables are moved, and the range of x0 is looked at once
    never_waits(step)
    assert bool(scale.grad.isfinite())


@pytest.mark.parametrize("options", TERMS, ids=str)
def test_loss_and_gradient_are_those_of_the_cpu(options):
    loss = SALoss(SHORT, **options)
    x0, n = images(0, 6, 1, 4, 4), torch.tensor([1, 2, 3, 50, 99, 100])
    noise = normal(1, 1 if options["noise"] == "shared" else 3, *x0.shape)
    anchor = n
    got = {}
    for device in ("cpu", "cuda"):
        scale = torch.tensor(1.1, dtype=torch.float64, device=device, requires_grad=True)
        out = loss(
            lambda x, s, scale=scale: scale * toy_eps(x, s),
            x0.to(device),
            n=n,
            noise=noise.to(device),
            anchor=anchor,
        )
        out.total.backward()
        got[device] = [
            v.cpu() for v in (out.total.detach(), out.sa_per_sample.detach(), scale.grad)
        ]
    for here, there in zip(got["cpu"], got["cuda"], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ training steps


def ready(options=None, K=None, **sa):
    """A criterion on the GPU with its average, three steps old, and a batch."""
    criterion = build_criterion("pred_eps", NamedSchedule("linear", 1000), network().cuda())
    criterion.configure(options or StepOptions())
    criterion.grad_clip = 1.0
    if K is not None:
        attach(criterion, SALoss(LINEAR, K=K, **sa))
    average, v = EMA(criterion.models), torch.rand(8, 1, 8, 8, device="cuda") * 2 - 1

    def step():
        criterion.update(iter([v]))
        average.update()

    for _ in range(3):
        step()
    return criterion, step


@pytest.mark.parametrize(
    "options",
    [{}, {"channels_last": True}, {"precision": "bf16"}, {"accumulate": 2}, {"compile": True}],
    ids=str,
)
@pytest.mark.parametrize(
    "sa",
    [
        {},
        {"K": 3},
        {"K": 3, "reuse": True, "stratified": True},
        {"K": 3, "backprop": "one"},
        {"K": 3, "backprop": "one", "stack": False, "extra_precision": "bf16"},
    ],
    ids=str,
)
def test_a_step_never_waits(options, sa, never_waits):
    torch.compiler.reset()
    criterion, step = ready(StepOptions(**options), **sa)
    never_waits(step)
    assert all(bool(value.isfinite()) for value in criterion.statistics.values())


@pytest.fixture
def batch():
    """Images on the GPU."""
    return (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1).cuda()


KINDS = pytest.mark.parametrize("sa", [{}, {"K": 2}, {"K": 2, "backprop": "one"}], ids=str)


@KINDS
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_single(precision, sa, batch):
    expected = gradients(criterion_for(network().cuda(), batch, **sa), batch)
    criterion = criterion_for(network().cuda(), batch, StepOptions(precision=precision), **sa)
    if criterion.scaler is not None:
        criterion.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**4)  # no search for it here
    assert_close(gradients(criterion, batch), expected, 0.1)


def test_an_overflow_is_the_scaler_s_business(batch):
    criterion = criterion_for(network().cuda(), batch, StepOptions(precision="fp16"), K=2)
    criterion.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [p.clone() for p in criterion.models["model"].parameters()]
    criterion.update(iter([batch]))
    assert all(map(torch.equal, criterion.models["model"].parameters(), before))
    for _ in range(40):
        criterion.update(iter([batch]))
    assert not any(map(torch.equal, criterion.models["model"].parameters(), before))


@KINDS
def test_compiled_gradients_are_the_same(sa, batch, exact):
    torch.compiler.reset()
    expected = gradients(criterion_for(network().cuda(), batch, **sa), batch)
    criterion = criterion_for(network().cuda(), batch, StepOptions(compile=True), **sa)
    assert_close(gradients(criterion, batch), expected, 1e-5)


def test_masked_steps_compile_no_further_graph():
    torch.compiler.reset()
    criterion = build_criterion("pred_eps", NamedSchedule("linear", 21), network().cuda())
    criterion.configure(StepOptions(compile=True))
    attach(criterion, SALoss(NoiseSchedule.from_betas(NamedSchedule("linear", 21).betas[1:]), K=3))
    counters.clear()
    for _ in range(8):  # with 21 steps most batches have other steps outside
        criterion.update(iter([torch.rand(8, 1, 8, 8, device="cuda") * 2 - 1]))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("attached", [False, True])
def test_one_backward_pass_takes_the_memory_of_the_plain_loss(K, attached):
    """The window's calls leave nothing behind; made before the graph is, they need no room."""
    model = network(model_channels=32).cuda()
    x0 = torch.rand(64, 1, 32, 32, device="cuda") * 2 - 1

    def peak(loss):
        if attached:
            criterion = build_criterion("pred_eps", NamedSchedule("linear", 1000), model)
            objective = attach(criterion, loss).objective
        else:
            objective = lambda v: loss(model, v).total  # noqa: E731
        for _ in range(3):  # the gradients are there from the second time on
            torch.cuda.reset_peak_memory_stats()
            objective(x0).mean().backward()
        return torch.cuda.max_memory_allocated()

    assert peak(SALoss(LINEAR, K=K, backprop="one")) <= 1.15 * peak(SALoss(LINEAR, lam=0))


# ------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("i", range(len(GOLDEN)))
def test_golden_samples(i, dtype):
    noise = normal(1, GOLDEN[i]["steps"], 4, 2, 3, 3).to("cuda", dtype)
    x_init = torch.from_numpy(ARRAYS["x_init"]).to("cuda", dtype)
    x0 = golden_sampler(GOLDEN[i], device="cuda").sample(
        x_init.shape, x_init=x_init, noise=lambda k: noise[k]
    )
    assert x0.device.type == "cuda"
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(x0.cpu(), ARRAYS[f"x0_{i}"], rtol=tolerance, atol=tolerance)


class Eps(torch.nn.Module):
    """A network of images and steps."""

    def __init__(self):
        super().__init__()
        self.inner = convolutions()

    def forward(self, x, n):
        return self.inner(x) + 0.001 * n.to(x.dtype).reshape(-1, 1, 1, 1)


def sampler(**options):
    torch.compiler.reset()
    return Sampler(Eps().cuda().eval(), SHORT, steps=6, **options)


@pytest.mark.parametrize("forward", ["ddpm", "ddim"])
def test_cuda_graphs_draw_the_same_images(forward, exact):
    def drawn(**options):
        return sampler(forward=forward, **options).sample((5, 3, 8, 8), seed=3)

    expected = drawn()
    assert expected.device.type == "cuda"
    torch.testing.assert_close(drawn(compile=True), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(channels_last=True), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(autocast="bf16"), expected, rtol=0, atol=0.1)


def test_steps_of_a_cuda_graph_are_not_overwritten(exact):
    graph, eager = sampler(compile=True), sampler()
    start = torch.randn(4, 3, 8, 8, device="cuda")
    noise = torch.randn(6, 4, 3, 8, 8, device="cuda")
    chains = []
    for one in (graph, eager):
        one.sample(start.shape, x_init=start, noise=lambda k: noise[k])  # warm, then captured
        chains.append(list(one.iterate(start.shape, x_init=start, noise=lambda k: noise[k])))
    for got, expected in zip(*chains, strict=True):
        torch.testing.assert_close(got.eps, expected.eps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got.x_s, expected.x_s, rtol=1e-4, atol=1e-4)


def test_a_chain_never_waits_before_its_end(never_waits):
    one = sampler()
    start, noise = torch.randn(4, 3, 8, 8, device="cuda"), torch.randn(4, 3, 8, 8, device="cuda")

    def all_but_the_end():
        chain = one.iterate(start.shape, x_init=start, noise=lambda k: noise)
        return [next(chain).t for _ in range(6)]

    expected = all_but_the_end()
    assert never_waits(all_but_the_end) == expected


def test_batches_stream_to_the_cpu():
    one = sampler()
    there = torch.cat(list(one.stream(40, (3, 8, 8), batch_size=16, seed=1)))
    here = list(one.stream(40, (3, 8, 8), batch_size=16, seed=1, to_cpu=True))
    assert all(batch.device.type == "cpu" for batch in here)
    assert torch.equal(torch.cat(here), there.cpu())


def test_moments_of_features_on_the_gpu():
    features = normal(0, 50, 7)
    there, here = Moments(), Moments()
    there.update(features.cuda())
    here.update(features)
    np.testing.assert_array_equal(there.sigma, here.sigma)


# --------------------------------------------------------------------------------- the command


@pytest.mark.filterwarnings("ignore:.*singular.*:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_the_main_job(tmp_path, precision):
    options = [f"--config.{stage}.precision={precision}" for stage in ("base", "head")]
    assert sn_dpm(tmp_path, "--device=cuda", "--config.sa.backprop=one", *options) == 0
    for stage, term in (("base", "sa_loss"), ("head", "ddm")):
        rows = read_log(tmp_path / stage)
        assert np.isfinite([float(row[term]) for row in rows]).all()
    assert (tmp_path / "metrics.json").exists()
