"""The ported host's schedules, wrapper, objectives and methods, against numbers of the original."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tests import DATA
from tests.published import tiny
from third_party.analytic_dpm import criterions as analytic
from third_party.common.criterion_base import Criterion
from third_party.common.schedule import NamedSchedule, Schedule
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.criterions import DTDSDM, DTDSM, OCM, DTDSDMErr
from third_party.extended_analytic_dpm.methods import METHODS, build_criterion, load_trunk

CRITERIA = json.loads((DATA / "criteria.json").read_text())
KINDS = {
    "dsm": (DTDSM, "eps", ["dsm"]),
    "sn": (DTDSDM, "eps_eps2", ["dsm", "ddm"]),
    "npr": (DTDSDMErr, "eps_epsc", ["dsm", "ddm"]),
}


def make_schedule(name):
    kind, N = name.split("_")
    return NamedSchedule(kind, int(N))


# ---------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    "name", ["linear_1000", "linear_100", "linear_50", "cosine_1000", "vpsde_1000"]
)
def test_schedule_equals_the_original(name):
    golden = np.load(DATA / "schedules.npz")
    schedule = make_schedule(name)
    s, t = golden[f"{name}/st"].T
    close = {"rtol": 1e-12, "atol": 0}
    np.testing.assert_allclose(schedule.betas, golden[f"{name}/betas"], **close)
    np.testing.assert_allclose(schedule.cum_alphas, golden[f"{name}/cum_alphas"], **close)
    np.testing.assert_allclose(schedule.cum_betas, 1 - golden[f"{name}/cum_alphas"], **close)
    for table in ("skip_alphas", "skip_betas"):
        np.testing.assert_allclose(
            getattr(schedule, table)[s, t], golden[f"{name}/{table}"], **close
        )
    np.testing.assert_allclose(schedule.tilde_beta(s, t), golden[f"{name}/tilde_beta"], **close)
    assert schedule.N == int(name.split("_")[1]) == len(schedule.betas) - 1


def test_sample_is_uniform_over_the_steps_and_noises_as_the_tables_say():
    schedule = NamedSchedule("linear", 25)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    x0 = torch.rand(50_000, 2, dtype=torch.float64) * 2 - 1
    n, eps, xn = schedule.sample(x0)
    counts = np.bincount(n, minlength=26)
    assert counts[0] == 0
    assert counts.size == 26
    # 24 degrees of freedom: the chi-squared statistic exceeds 61 once in 40,000 draws
    assert ((counts[1:] - 2000) ** 2 / 2000).sum() < 61
    a = torch.from_numpy(schedule.cum_alphas[n])[:, None]
    torch.testing.assert_close(xn, a.sqrt() * x0 + (1 - a).sqrt() * eps)
    assert abs(eps.mean()) < 0.02
    assert abs(eps.var() - 1) < 0.02


def test_input_perturbation_is_drawn_after_eps_and_enters_x_n_alone():
    x0, gamma = torch.rand(64, 1, 2, 2, dtype=torch.float64), 0.3
    drawn = []
    for schedule in (NamedSchedule("linear", 25), NamedSchedule("linear", 25, False, gamma)):
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        drawn.append(schedule.sample(x0))
        if len(drawn) == 1:
            xi = torch.randn_like(x0)
    (n, eps, plain), (again, same, perturbed) = drawn
    assert (n == again).all()
    assert torch.equal(eps, same)
    b = torch.from_numpy(schedule.cum_betas[n]).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(perturbed - plain, gamma * b.sqrt() * xi)


def test_a_second_output_refuses_perturbed_inputs():
    schedule = NamedSchedule("linear", 25, input_perturbation=0.1)
    with pytest.raises(ValueError, match=r"input_perturbation=0\.1: must be 0 for DTDSDMErr"):
        DTDSDMErr(schedule, 1.0, DTWrapper(nn.Identity(), "eps_epsc"), {"m": nn.Identity()}, {}, {})


def test_sample_is_governed_by_the_global_random_states():
    schedule, x0 = NamedSchedule("cosine", 1000), torch.zeros(64, 1, 2, 2)
    draws = []
    for _ in range(2):
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)
        draws.append(schedule.sample(x0))
    assert (draws[0][0] == draws[1][0]).all()
    assert torch.equal(draws[0][1], draws[1][1])
    assert draws[0][2].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NamedSchedule("sqrt", 10), "name='sqrt'.*cosine, linear, vpsde"),
        (lambda: NamedSchedule("linear", 0), "N=0"),
        (lambda: NamedSchedule("linear", 20), "N=20: schedule 'linear'.* from 21 on"),
        (lambda: Schedule([0.0, 0.5, 1.0]), r"betas\[2\]=1.0.*\[0, 1\)"),
        (lambda: Schedule([0.1, 0.2]), r"betas\[0\]=0.1"),
        (lambda: Schedule([0.0, 0.1], False, -0.1), "input_perturbation=-0.1"),
        (lambda: Schedule([0.0, float("nan")]), r"betas\[1\]=nan"),
        (lambda: NamedSchedule("cosine", 10).tilde_beta(3, 2), "s=3, t=2"),
        (lambda: NamedSchedule("cosine", 10).tilde_beta(-1, 2), "s=-1"),
        (lambda: NamedSchedule("cosine", 10).sample(torch.zeros(2, 1).byte()), "uint8"),
    ],
)
def test_schedule_refuses_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ----------------------------------------------------------------------------------- wrapper


def receive(n, x=None, **options):
    """What the network is called with for step n."""
    seen = []
    x = torch.zeros(3, 2, 1, 1) if x is None else x
    DTWrapper(lambda x, t: seen.append(t) or x, "eps", **options)(x, n)
    return seen[0]


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"N": 1000}, [1, 37, 1000]),
        ({"N": 1000, "shift1": True}, [0, 36, 999]),
        ({"N": 4000}, [0.25, 9.25, 250]),
        ({"N": 4000, "shift1": True}, [0, 9, 249.75]),
        ({"N": 4000, "rescale_timesteps": False}, [1, 37, 1000]),
        ({"N": 4000, "rescale_timesteps": False, "shift1": True}, [0, 36, 999]),
    ],
)
def test_the_network_receives_the_host_s_times(options, times):
    n = np.array([1, 37, 1000])
    assert receive(n, **options).tolist() == times
    assert receive(torch.from_numpy(n), **options).tolist() == times
    for one, time in zip(n, times, strict=True):
        assert receive(int(one), **options).tolist() == [time] * 3
        assert receive(torch.tensor(int(one)), **options).tolist() == [time] * 3


def test_times_stay_exact_in_half_precision():
    t = receive(np.array([998, 999, 1000]), torch.zeros(3, 2, 1, 1, dtype=torch.bfloat16))
    assert t.tolist() == [998, 999, 1000]


def test_two_predictions_are_the_channel_halves():
    out = torch.arange(12.0).reshape(1, 4, 3, 1)
    first, second = DTWrapper(lambda x, t: out, "eps_eps2")(torch.zeros(1, 2, 3, 1), 5)
    assert torch.equal(first, out[:, :2])
    assert torch.equal(second, out[:, 2:])
    for typ in ("eps", "x0"):
        assert DTWrapper(lambda x, t: out, typ)(torch.zeros(1, 2, 3, 1), 5) is out


def test_wrapper_refuses_bad_input():
    with pytest.raises(ValueError, match=r"typ='v'.*eps_epsc"):
        DTWrapper(lambda x, t: x, "v")
    with pytest.raises(ValueError, match=r"n has shape \(2,\)"):
        receive(np.array([1, 2]))
    with pytest.raises(ValueError, match="3 output channels"):
        DTWrapper(lambda x, t: x, "eps_epsc")(torch.zeros(1, 3, 1, 1), 1)


# ---------------------------------------------------------------------------------- criteria


class Toy(nn.Module):
    """The golden data's network, its two outputs times trainable scales."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))
        self.scale2 = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, x, t):
        t = t.reshape(-1, 1, 1, 1)
        eps = 0.8 * torch.sin(1.7 * x + 0.003 * t) + 0.1 * x
        if self.kind == "dsm":
            return self.scale * eps
        base = eps**2 + 0.3 if self.kind == "sn" else 0.25
        return torch.cat(
            [self.scale * eps, self.scale2 * (base + 0.2 * torch.cos(x + 0.002 * t))], dim=1
        )


def golden_criterion(case, golden, ratio=1.0):
    schedule = make_schedule(case["schedule"])
    n, eps = np.array(case["n"]), torch.from_numpy(golden["eps"])

    def sample(x0):
        a = torch.from_numpy(schedule.cum_alphas[n]).reshape(-1, 1, 1, 1)
        return n, eps, a.sqrt() * x0 + (1 - a).sqrt() * eps

    schedule.sample = sample
    cls, typ, _ = KINDS[case["kind"]]
    toy = Toy(case["kind"])
    wrapper = DTWrapper(toy, typ, case["rescale_timesteps"], case["shift1"], schedule.N)
    ratios = [] if cls is DTDSM else [ratio]
    return toy, cls(schedule, *ratios, wrapper, {"model": toy}, {}, {})


def golden_cases():
    return [(i, case) for i, case in enumerate(CRITERIA) if case["kind"] in KINDS]


@pytest.mark.parametrize(("i", "case"), golden_cases())
def test_objective_equals_the_original(i, case):
    golden = np.load(DATA / "criteria.npz")
    toy, criterion = golden_criterion(case, golden)
    names = KINDS[case["kind"]][2]
    objective = criterion.objective(torch.from_numpy(golden["x0"]))
    expected = [golden[f"obj_{i}_{j}"] for j in range(case["parts"])]
    terms = criterion.terms(torch.from_numpy(golden["x0"]))
    assert list(terms) == names
    for name, values in zip(names, expected, strict=True):
        np.testing.assert_allclose(terms[name].detach(), values, rtol=1e-9)
        statistic = criterion.statistics[name]
        assert statistic.ndim == 0
        assert not statistic.requires_grad
        np.testing.assert_allclose(statistic, values.mean(), rtol=1e-9)
    np.testing.assert_allclose(objective.detach(), sum(expected), rtol=1e-9)
    objective.mean().backward()
    np.testing.assert_allclose(toy.scale.grad, case["grad_scale"], rtol=1e-9)
    grad2 = 0.0 if toy.scale2.grad is None else toy.scale2.grad
    np.testing.assert_allclose(grad2, case["grad_scale2"], rtol=1e-9)


@pytest.mark.parametrize(("i", "case"), [c for c in golden_cases() if c[1]["parts"] == 2])
def test_ratio_weights_the_second_part(i, case):
    golden = np.load(DATA / "criteria.npz")
    x0 = torch.from_numpy(golden["x0"])
    dsm, ddm = golden[f"obj_{i}_0"], golden[f"obj_{i}_1"]
    for ratio, weight in [(0.3, 0.3), ("adaptive", dsm.mean() / ddm.mean())]:
        toy, criterion = golden_criterion(case, golden, ratio)
        objective = criterion.objective(x0)
        np.testing.assert_allclose(objective.detach(), dsm + weight * ddm, rtol=1e-9)
        objective.mean().backward()
        # the ratio is a constant, also where it is measured
        np.testing.assert_allclose(toy.scale2.grad, weight * case["grad_scale2"], rtol=1e-9)


def test_criteria_refuse_bad_input():
    schedule, toy = NamedSchedule("linear", 1000), Toy("sn")
    wrapper = DTWrapper(toy, "eps_eps2")
    for ratio in (-1.0, float("nan"), "adaptiv"):
        with pytest.raises(ValueError, match="ratio="):
            DTDSDM(schedule, ratio, wrapper, {"model": toy}, {}, {})
    with pytest.raises(ValueError, match=r"typ='eps_eps2'.*needs 'eps_epsc'"):
        DTDSDMErr(schedule, 1, wrapper, {"model": toy}, {}, {})
    with pytest.raises(ValueError, match="models is empty"):
        DTDSDM(schedule, 1, wrapper, {}, {}, {})


class Quadratic(Criterion):
    """|w - v|^2 with a single weight w = 1: every step can be done by hand."""

    def __init__(self, lr=0.1):
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        model = nn.Module()
        model.w = self.w
        optimizer = torch.optim.SGD([self.w], lr=lr)
        rates = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        super().__init__({"model": model}, {"all": optimizer}, {"all": rates})

    def objective(self, v):
        return (self.w - v).square().sum(1)


def test_update_is_one_step_of_optimiser_and_learning_rate():
    criterion = Quadratic()
    batches = iter([torch.zeros(4, 2)] * 3)
    criterion.update(batches)
    torch.testing.assert_close(criterion.w.data, torch.tensor([0.8, -1.6]))
    assert criterion.statistics["loss"] == 5
    torch.testing.assert_close(criterion.statistics["grad_norm"], torch.tensor(20.0).sqrt())
    assert not criterion.statistics["loss"].requires_grad
    criterion.update(batches)  # half the rate, and no gradient left over from the first
    torch.testing.assert_close(criterion.w.data, torch.tensor([0.72, -1.44]))


def test_update_clips_the_gradient_where_asked():
    criterion = Quadratic(lr=1.0)
    criterion.grad_clip = 0.5
    criterion.update(iter([torch.zeros(4, 2)]))
    moved = criterion.w.data - torch.tensor([1.0, -2.0])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5))
    torch.testing.assert_close(criterion.statistics["grad_norm"], torch.tensor(20.0).sqrt())


def test_update_honours_hooks_on_the_instance():
    schedule, toy = NamedSchedule("linear", 1000), Toy("dsm")
    criterion = build_criterion("pred_eps", schedule, toy)
    calls = []
    objective, wrapper = criterion.objective, criterion.wrapper
    criterion.objective = lambda v: calls.append("objective") or 0 * objective(v) + 7
    criterion.wrapper = lambda xn, n: calls.append("wrapper") or wrapper(xn, n)
    criterion.update(iter([torch.zeros(4, 2, 3, 3, dtype=torch.float64)]))
    assert calls == ["objective", "wrapper"]
    assert criterion.statistics["loss"] == 7


# ----------------------------------------------------------------------------------- methods


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def features(self, x, t):
        return torch.tanh(self.body(x) + t.reshape(-1, 1, 1, 1) / 1000)

    def forward(self, x, t):
        return self.out(self.features(x, t))


class TrunkAndHead(Trunk):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        self.out2 = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, t):
        h = self.features(x, t)
        return torch.cat([self.out(h), self.out2(h)], dim=1)


def test_methods_are_the_host_s():
    table = {
        name: (m.typ, m.criterion, m.trunk_channels(3), m.head_channels(3))
        for name, m in METHODS.items()
    }
    assert table == {
        "pred_eps": ("eps", DTDSM, 3, 0),
        "pred_eps_eps2": ("eps_eps2", DTDSDM, 6, 0),
        "pred_eps_epsc": ("eps_epsc", DTDSDMErr, 6, 0),
        "pred_eps_eps2_pretrained": ("eps_eps2", DTDSDM, 3, 3),
        "pred_eps_epsc_pretrained": ("eps_epsc", DTDSDMErr, 3, 3),
        "pred_eps_ocm_pretrained": ("eps_ocm", OCM, 3, 3),  # ours
    }


PRETRAINED = [name for name, method in METHODS.items() if method.pretrained]


@pytest.mark.parametrize("method", PRETRAINED)
def test_a_pretrained_trunk_is_loaded_and_never_moves(tmp_path, method):
    torch.manual_seed(0)
    trunk, model = Trunk(), TrunkAndHead()
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    criterion = build_criterion(
        method, NamedSchedule("linear", 1000), model, trunk=tmp_path / "trunk.pth", lr=1e-2
    )
    head = {name: p.clone() for name, p in model.out2.named_parameters()}
    trained = {id(p) for g in criterion.optimizers["all"].param_groups for p in g["params"]}
    assert trained == {id(p) for p in model.out2.parameters()}
    batches = iter(torch.rand(5, 8, 1, 4, 4) * 2 - 1)
    for _ in range(5):
        criterion.update(batches)
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, before in head.items():
        assert not torch.equal(dict(model.out2.named_parameters())[name], before), name


FAMILIES = pytest.mark.parametrize(
    ("family", "of"), [("UNetModel", "out_channels"), ("Model", "out_ch")]
)


@pytest.mark.parametrize("method", PRETRAINED)
@FAMILIES
def test_the_host_s_networks_train_only_their_head(family, of, method):
    torch.manual_seed(0)
    options = {"in_channels": 1, of: 1, "dropout": 0.3}
    trunk, model = (
        tiny(family, **options),
        tiny(f"{family}4Pretrained", **options, **{f"head_{of}": 1}),
    )
    criterion = build_criterion(
        method,
        NamedSchedule("linear", 1000),
        model,
        trunk=trunk.state_dict(),
        lr=1e-2,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())
    batches = iter(torch.rand(2, 2, 1, 8, 8) * 2 - 1)
    criterion.update(batches)
    criterion.update(batches)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved
    assert not moved & set(trunk.state_dict())


@FAMILIES
def test_eps_can_be_derived_by_x_but_the_head_learns_nothing_of_x(family, of):
    torch.manual_seed(0)
    network = tiny(f"{family}4Pretrained", in_channels=1, **{of: 1, f"head_{of}": 1}).double()
    x, v = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    times = torch.tensor([3.0, 700.0], dtype=torch.float64)
    plain = network(x, times)
    x.requires_grad_()
    eps, head = network(x, times).chunk(2, dim=1)
    assert torch.equal(torch.cat((eps, head), dim=1), plain)
    (of_eps,) = torch.autograd.grad(eps, x, v, retain_graph=True)
    (of_both,) = torch.autograd.grad(eps + head, x, v)
    assert torch.equal(of_eps, of_both)  # nothing through the head
    with torch.no_grad():
        ahead, behind = (network(x + h * of_eps, times)[:, :1] for h in (1e-4, -1e-4))
    torch.testing.assert_close(
        (v * (ahead - behind)).flatten(1).sum(1) / 2e-4, of_eps.flatten(1).square().sum(1)
    )


class Linear(nn.Module):
    """eps = J x for each image, and a second output that is a parameter."""

    def __init__(self, J):
        super().__init__()
        self.register_buffer("J", J)
        self.h = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x, t):
        eps = x.detach().flatten(1) @ self.J.T if not x.requires_grad else x.flatten(1) @ self.J.T
        return torch.cat((eps, self.h.expand(len(x), 4)), dim=1).view(len(x), 2, 2, 2)


def test_ocm_s_target_is_the_probe_of_each_image_and_its_mean_the_diagonal():
    schedule, (seed,) = NamedSchedule("linear", 1000), (5,)
    J = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model = Linear(J)
    criterion = OCM(schedule, 1.0, DTWrapper(model, "eps_ocm"), {"model": model}, {}, {})
    n = np.arange(1, 1001)
    torch.manual_seed(seed)
    x = torch.randn(1000, 1, 2, 2, dtype=torch.float64)
    target = criterion.second_target(x, x, x, n, {}).flatten(1)
    b = torch.from_numpy(schedule.cum_betas[n])[:, None]
    # Every sign vector by enumeration: an image's target is one of the 16 probes.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    probes = signs * (signs - b.sqrt()[..., None] * (signs @ J))
    distance = (probes - target[:, None]).abs().amax(2)
    assert distance.amin(1).max() < 1e-12
    counts = torch.bincount(distance.argmin(1) % 8, minlength=8)  # r and -r give the same
    assert counts.min() > 0
    exact = 1 - b.sqrt() * J.diagonal()
    torch.testing.assert_close(probes.mean(1), exact)
    error = (target - exact).mean(0)
    off = b.sqrt() * (J.square().sum(0) - J.diagonal().square()).sqrt()
    assert (error.abs() < 4 * off.square().mean(0).sqrt() / 1000**0.5).all()
    loss = criterion.objective(x)
    loss.mean().backward()
    assert torch.isfinite(model.h.grad).all()


def test_a_trunk_that_does_not_fit_is_refused(tmp_path):
    state = Trunk().state_dict()
    model = TrunkAndHead()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lacking = {name: value for name, value in state.items() if name != "body.weight"}
    for network, trunk, said in (
        (model, lacking, r"lacks body\.weight$"),
        (model, state | {"module.body.weight": torch.zeros(1)}, r"unknown module\.body\.weight$"),
        (model, state | {"out.bias": torch.zeros(2)}, r"other shapes for out\.bias$"),
        (model, tmp_path / "none.pth", f"no checkpoint at {tmp_path}/none.pth"),
        (Trunk(), state, "frozen trunk and a trainable head"),
    ):
        with pytest.raises(ValueError, match=said):
            load_trunk(network, trunk)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), "a refused trunk was partly loaded"


class Surprise:
    def __reduce__(self):
        return (print, ("code from a checkpoint has run",))


def test_a_trunk_file_cannot_run_code(tmp_path, capsys):
    torch.save({"model_dict": Surprise()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"more than weights.*convert it: python -c"):
        load_trunk(TrunkAndHead(), tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""
    torch.save({"model": Trunk().state_dict(), "step": 3}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"\['model', 'step'\].*plain state dict"):
        load_trunk(TrunkAndHead(), tmp_path / "nested.pth")


def test_build_criterion_passes_its_options_on():
    schedule = NamedSchedule("cosine", 50)
    model = nn.Conv2d(1, 2, 1)
    criterion = build_criterion(
        "pred_eps_eps2",
        schedule,
        model,
        ratio="adaptive",
        lr=3e-4,
        grad_clip=1.0,
        rescale_timesteps=False,
        shift1=True,
        lr_warmup=0,
    )
    assert (criterion.ratio, criterion.grad_clip) == ("adaptive", 1.0)
    wrapper = criterion.wrapper
    assert (wrapper.rescale_timesteps, wrapper.shift1, wrapper.N) == (False, True, 50)
    assert criterion.models == {"model": model}
    optimizer = criterion.optimizers["all"]
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 3e-4
    for _ in range(3):
        criterion.optimizers["all"].step()
        criterion.lr_schedulers["all"].step()
    assert optimizer.param_groups[0]["lr"] == 3e-4


@pytest.mark.parametrize("build", [partial(build_criterion, "pred_eps"), analytic.build_criterion])
def test_the_rate_rises_over_the_first_steps(build):
    criterion = build(NamedSchedule("linear", 50), nn.Conv2d(1, 1, 1), lr=0.5, lr_warmup=4)
    rates = []
    for _ in range(6):
        rates.append(criterion.optimizers["all"].param_groups[0]["lr"])
        criterion.optimizers["all"].step()
        criterion.lr_schedulers["all"].step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    # as in a checkpoint of the hosts, so that these can be continued
    assert criterion.lr_schedulers["all"].state_dict()["lr_lambdas"] == [None]


@pytest.mark.parametrize("build", [partial(build_criterion, "pred_eps"), analytic.build_criterion])
def test_the_rate_falls_over_the_last_steps(build):
    criterion = build(NamedSchedule("linear", 50), nn.Conv2d(1, 1, 1), lr=0.5, lr_fall=(2, 6))
    rates = []
    for _ in range(7):
        rates.append(criterion.optimizers["all"].param_groups[0]["lr"])
        criterion.optimizers["all"].step()
        criterion.lr_schedulers["all"].step()
    assert rates == [0.5, 0.5, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert criterion.lr_schedulers["all"].state_dict()["lr_lambdas"] == [None]


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("pred_v", {}, "method='pred_v'.*pred_eps_epsc_pretrained"),
        ("pred_eps", {"lr": 0.0}, "lr=0.0"),
        ("pred_eps", {"grad_clip": 0.0}, "grad_clip=0.0"),
        ("pred_eps", {"lr_warmup": -1}, "lr_warmup=-1: must be >= 0"),
        ("pred_eps", {"lr_fall": (3, 3)}, r"lr_fall=\(3, 3\): must be two steps"),
        ("pred_eps", {"trunk": {}}, "pred_eps trains the whole network"),
        ("pred_eps_eps2_pretrained", {}, "trunk=None: pred_eps_eps2_pretrained needs"),
    ],
)
def test_build_criterion_refuses_bad_input(method, options, words):
    with pytest.raises(ValueError, match=words):
        build_criterion(method, NamedSchedule("linear", 1000), TrunkAndHead(), **options)
