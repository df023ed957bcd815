"""The ways to compute a training step: layout, precision, parts of a batch, kept activations."""

from functools import partial

import pytest
import torch
from torch import nn

from sa_plugin import NoiseSchedule, SALoss, attach
from third_party.analytic_dpm import criterions as analytic
from third_party.common.ema import EMA
from third_party.common.nets import UNetModel
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.extended_analytic_dpm.methods import build_criterion

LINEAR = NoiseSchedule.from_betas(NamedSchedule("linear", 1000).betas[1:])


def network(**options):
    """A UNet whose last layer is not zero, so that every weight has a gradient."""
    torch.manual_seed(0)
    settings = {"model_channels": 8, "num_res_blocks": 1, "attention_resolutions": (2,)}
    settings |= {"channel_mult": (1, 2), "num_groups": 4, "use_scale_shift_norm": True}
    model = UNetModel(in_channels=1, out_channels=1, **settings | options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def images(batch=8):
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1


class Fixed:
    """A schedule whose draws belong to the images, so that any part of a batch draws the same."""

    def __init__(self, v):
        self._schedule, self._v = NamedSchedule("linear", 1000), v
        generator = torch.Generator().manual_seed(1)
        self._n = torch.randint(1, 1001, (len(v),), generator=generator)
        self._eps = torch.randn(v.shape, generator=generator)

    def __getattr__(self, name):
        return getattr(self._schedule, name)

    def sample(self, x0):
        where = [int((self._v == image).flatten(1).all(1).nonzero()) for image in x0]
        n, eps = self._n[where], self._eps[where]
        a = torch.tensor(self.cum_alphas)[n].to(x0).reshape(-1, 1, 1, 1)
        eps = eps.to(x0)
        return n.numpy(), eps, a.sqrt() * x0 + (1 - a).sqrt() * eps


def criterion_for(model, v, options=None, K=None, **sa):
    criterion = build_criterion("pred_eps", Fixed(v), model, lr=1e-3)
    if options is not None:
        criterion.configure(options)
    if K is None:
        return criterion
    loss = SALoss(LINEAR, K=K, **sa)
    if loss.backprop == "one":  # the position, too, belongs to the image
        own = loss._window
        loss._window = lambda n, anchor, generator: own(n, n + n % K, generator)
    return attach(criterion, loss)


def gradients(criterion, v):
    torch.manual_seed(3)
    (model,) = criterion.models.values()
    criterion.optimizers = {"all": torch.optim.SGD(model.parameters(), lr=0.0)}
    criterion.lr_schedulers = {}
    criterion.update(iter([v]))
    return [p.grad.clone() for p in model.parameters()]


def assert_close(got, expected, tolerance):
    scale = max(float(g.norm()) for g in expected)
    for one, other in zip(got, expected, strict=True):
        assert float((one - other).norm()) <= tolerance * scale


SHARED = {"K": 3, "noise": "shared"}  # no draws but those of L_simple


@pytest.mark.parametrize(
    ("parts", "sa"),
    [(2, {}), (4, {}), (8, {}), (4, SHARED)]
    + [(4, SHARED | more) for more in ({"reuse": True}, {"backprop": "one"})],
)
def test_parts_of_a_batch_add_up_to_the_whole(parts, sa):
    v = images()
    whole = criterion_for(network(), v, **sa)
    cut = criterion_for(network(), v, StepOptions(accumulate=parts), **sa)
    assert_close(gradients(cut, v), gradients(whole, v), 1e-6)
    for name, value in whole.statistics.items():
        torch.testing.assert_close(cut.statistics[name], value)


@pytest.mark.parametrize("backprop", ["all", "one"])
def test_channels_last_is_the_same_to_rounding(backprop):
    v = images()
    plain, other = network(), network()
    expected = gradients(criterion_for(plain, v, K=2, backprop=backprop), v)
    criterion = criterion_for(other, v, StepOptions(channels_last=True), K=2, backprop=backprop)
    got = gradients(criterion, v)
    assert_close(got, expected, 1e-5)
    assert other.out[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert {k: p.shape for k, p in other.state_dict().items()} == {
        k: p.shape for k, p in plain.state_dict().items()
    }
    EMA(criterion.models).update()


@pytest.mark.parametrize("backprop", ["all", "one"])
@pytest.mark.parametrize("stack", [True, False])
def test_kept_activations_or_not_is_the_same(backprop, stack):
    v = images()
    options = {"K": 3, "backprop": backprop, "stack": stack}
    expected = gradients(criterion_for(network(), v, **options), v)
    got = gradients(criterion_for(network(use_checkpoint=True), v, **options), v)
    assert_close(got, expected, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("backprop", ["all", "one"])
def test_half_precision_is_near_single(precision, backprop):
    v = images()
    options = {"K": 2, "backprop": backprop, "stack": False}
    expected = gradients(criterion_for(network(), v, **options), v)
    criterion = criterion_for(network(), v, StepOptions(precision=precision), **options)
    if criterion.scaler is not None:
        criterion.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)  # no search for it here
    got = gradients(criterion, v)
    assert all(p.dtype == torch.float32 for p in criterion.models["model"].parameters())
    assert criterion.statistics["loss"].dtype == torch.float32
    assert_close(got, expected, 0.1)


def test_an_overflow_is_the_scaler_s_business():
    v = images()
    criterion = criterion_for(network(), v, StepOptions(precision="fp16"))
    criterion.grad_clip = 1.0
    criterion.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in criterion.models["model"].parameters()]
    criterion.update(iter([v]))
    assert all(map(torch.equal, criterion.models["model"].parameters(), before))
    assert criterion.scaler.get_scale() == 2.0**39
    for _ in range(40):
        criterion.update(iter([v]))
    after = list(criterion.models["model"].parameters())
    assert not any(map(torch.equal, after, before))
    assert all(bool(p.isfinite().all()) for p in after)


def test_compiled_networks_keep_their_names_and_averages():
    v, model = images(), network()
    names = list(model.state_dict())
    criterion = criterion_for(model, v, StepOptions(compile=True), K=2)
    average = EMA(criterion.models).models["model"]
    assert list(model.state_dict()) == list(average.state_dict()) == names
    assert model._compiled_call_impl is not None
    assert average._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("backprop", ["all", "one"])
def test_compiled_steps_have_the_same_gradients(backprop, monkeypatch):
    """Traced and differentiated ahead of time ("aot_eager"); the kernels are PyTorch's own."""
    v = images()
    expected = gradients(criterion_for(network(), v, K=2, backprop=backprop), v)
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))
    criterion = criterion_for(network(), v, StepOptions(compile=True), K=2, backprop=backprop)
    assert_close(gradients(criterion, v), expected, 1e-5)


@pytest.mark.parametrize(
    "build",
    [analytic.build_criterion, partial(build_criterion, "pred_eps")],
    ids=["analytic", "sn"],
)
def test_networks_can_be_replaced_in_what_the_objective_calls(build):
    model, calls = network(), []
    criterion = build(NamedSchedule("linear", 1000), model)

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, t):
            calls.append(len(x))
            return self.inner(x, t)

    criterion.replace_networks(Counted)
    attach(criterion, SALoss(LINEAR, K=2, stack=False))
    criterion.update(iter([images()]))
    assert len(calls) == 2
    assert criterion.models == {"model": model}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "half"}, "precision='half': must be one of float32"),
        ({"accumulate": 0}, "=0"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        StepOptions(**options)


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match="accumulate=3: must divide the batch of a process, 8"):
        StepOptions(accumulate=3).check_batch(8)
