"""Classes: where they come from, whose label is dropped, and what guidance does to a network."""

import itertools

import pytest
import torch

from adapters.sampling.pipeline import in_slices
from sa_plugin import NoiseSchedule, SALoss
from sa_plugin.hooks.hook import attach
from sa_plugin.sampling.gamma import estimate_gamma
from sa_plugin.sampling.sampler import Sampler
from tests.third_party.test_datasets import get, noise, one_line_error, save
from third_party.analytic_dpm import criterions as analytic
from third_party.common.classes import Classes, Guided, LabelledBatches
from third_party.common.data import BatchStream, Images
from third_party.common.schedule import NamedSchedule
from third_party.common.step_options import StepOptions
from third_party.common.wrapper import DTWrapper
from third_party.extended_analytic_dpm.methods import build_criterion

SCHEDULE = NoiseSchedule.linear(30)
# Class c is normal with this mean and variance; the null class is the mixture's moments.
MEANS, VARIANCE = torch.tensor([-0.6, 0.4, 0.1], dtype=torch.float64), 0.04


# ----------------------------------------------------------------------------------- data sets


def test_the_sub_folders_of_a_folder_are_its_classes(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/deep/3.png", "B/4.png", "b/5.png"):
        save(tmp_path / name, noise(4, 4, 3))
    (tmp_path / "empty").mkdir()
    classes = Classes.of("folder", get("folder", tmp_path, labels=True))
    assert classes.names == ("B", "a", "b")
    assert classes.labels.tolist() == [0, 1, 1, 2, 2]
    assert str(classes) == "3: B (1), a (2), b (2)"


def test_an_image_outside_and_one_class_are_refused(tmp_path):
    for name in ("a/1.png", "a/2.png"):
        save(tmp_path / name, noise(4, 4, 3))
    dataset = get("folder", tmp_path, labels=True)
    one_line_error(lambda: Classes.of("folder", dataset), "data.labels", "two classes", "got a")
    save(tmp_path / "stray.png", noise(4, 4, 3))
    one_line_error(
        lambda: get("folder", tmp_path, labels=True), tmp_path, "stray.png", "sub-folders"
    )
    unlabelled = get("folder", tmp_path)
    one_line_error(lambda: Classes.of("folder", unlabelled), "data.labels", "'folder'")


@pytest.mark.parametrize("labels", [[0, 2, 2], [1, 2, 1], [0.0, 1.0, 0.0]])
def test_labels_with_a_gap_are_refused(labels):
    images = Images(torch.zeros(3, 1, 2, 2), torch.tensor(labels))
    with pytest.raises(ValueError, match=r"data\.labels.*0\.\.C-1"):
        Classes.of("npz", images)


def test_the_digits_have_ten_classes():
    classes = Classes.of("digits", get("digits", ""))
    assert classes.names == tuple("0123456789")
    assert str(classes).startswith("10: 0 (178), 1 (182), ")


# ------------------------------------------------------------------------------- classes drawn


def of_samples(which, first, count, seed=3):
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    return Classes(("x", "y", "z"), labels).of_samples(which, seed, first, count)


@pytest.mark.parametrize(
    ("which", "counts"), [("data", [60, 30, 10]), ("even", [34, 33, 33]), ("y", [0, 100, 0])]
)
def test_a_samples_class_depends_on_its_number_alone(which, counts):
    whole = of_samples(which, 0, 100)
    assert torch.bincount(whole, minlength=3).tolist() == counts
    parts = [of_samples(which, 0, 37), of_samples(which, 37, 63)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_classes_of_the_data_come_in_the_order_of_the_seed():
    assert not torch.equal(of_samples("data", 0, 100), of_samples("data", 0, 100, seed=4))


# ------------------------------------------------------------------------------------ training


def labelled(**options):
    """60 images that hold their label / 10 in every pixel, and their batches."""
    labels = torch.arange(60) % 3
    images = Images((labels / 10).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2), labels)
    drop = options.pop("drop", 0.0)
    return LabelledBatches(
        BatchStream(images, 12, 5, **options), Classes(("x", "y", "z"), labels), drop
    )


def test_a_label_belongs_to_its_image_and_is_dropped_at_the_rate():
    batches = list(itertools.islice(labelled(drop=0.25), 200))
    y = torch.cat([y for _, y in batches])
    true = torch.cat([(v[:, 0, 0, 0] * 10).round().long() for v, _ in batches])
    is_null = y == 3
    assert torch.equal(y[~is_null], true[~is_null])
    # 2400 draws: the standard error is 0.0088.
    assert abs(is_null.double().mean().item() - 0.25) < 0.03
    assert torch.bincount(true[is_null]).min() > 150
    assert sum((y == 3).sum().item() for _, y in itertools.islice(labelled(), 20)) == 0


def test_dropped_labels_depend_on_seed_and_position_alone():
    stream = labelled(drop=0.5)
    batches = list(itertools.islice(stream, 9))
    continued = labelled(drop=0.5)
    continued.position = 6
    assert stream.position == 9
    assert torch.equal(next(continued)[1], batches[6][1])
    parts = zip(*(labelled(drop=0.5, part=(rank, 2)) for rank in range(2)), strict=True)
    for (_, whole), part in zip(batches, parts, strict=False):
        assert torch.equal(torch.cat([y for _, y in part]), whole)
    epochs = [torch.cat([y for _, y in batches[i : i + 4]]) for i in (0, 4)]
    assert (epochs[0] == 3).tolist() != (epochs[1] == 3).tolist()


class Noted(torch.nn.Module):
    """(x, t, y) -> channels that depend on the label; notes its calls."""

    def __init__(self, channels=1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((channels,), 0.1))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((x.detach(), y))
        return (self.scale * y[:, None])[:, :, None, None] + 0 * x


def criterion_of(method, accumulate=1):
    schedule, options = NamedSchedule("linear", 30), {"rescale_timesteps": False}
    if method == "analytic":
        criterion = analytic.build_criterion(schedule, Noted(), **options)
    else:
        criterion = build_criterion(
            method, schedule, Noted(2 if "_e" in method[5:] else 1), **options
        )
    criterion.configure(StepOptions(accumulate=accumulate))
    return attach(criterion, SALoss(SCHEDULE, 3))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["analytic", "pred_eps", "pred_eps_eps2", "pred_eps_epsc"])
def test_an_image_has_its_label_in_all_rows_of_its_window(method, accumulate):
    criterion = criterion_of(method, accumulate)
    _, expected = next(labelled(drop=0.3))
    criterion.update(labelled(drop=0.3))
    calls = criterion.models["model"].calls
    rows = [y.reshape(3, -1) for _, y in calls]  # one stacked call for three rows
    assert len(calls) == accumulate
    assert len({*expected.tolist()}) == 4
    for row in torch.cat(rows, dim=1):
        assert torch.equal(row, expected)
    assert len(calls[0][0].flatten(1).unique(dim=0)) == len(calls[0][0])  # other x_n in each row


# ------------------------------------------------------------------------------------ guidance


class Gaussians:
    """The exact network of normal classes; the last mean is the null class's."""

    model = torch.nn.Linear(1, 1, dtype=torch.float64)  # the dtype that a sampler reads

    def __init__(self, means, second=None):
        self.means, self.second = means, second

    def __call__(self, x, n, *, y):
        a = torch.tensor(SCHEDULE.cum_alphas)[n][:, None]
        noise = (1 - a) / (a * VARIANCE + 1 - a)  # the share of the noise in Var x_n
        eps = noise / (1 - a) ** 0.5 * (x - a**0.5 * self.means[y][:, None])
        if self.second is None:
            return eps
        residual = 1 - noise + 0 * eps
        return eps, residual + (eps**2 if self.second == "eps_eps2" else 0)


NETWORK = Gaussians(torch.cat([MEANS, MEANS.mean(0, keepdim=True)]))


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_guidance_draws_normal_classes_at_means_moved_from_the_null_class(weight):
    """With one variance for all, (1 + w) and -w act on the means alone: the answer is exact."""
    moved = (1 + weight) * MEANS - weight * MEANS.mean()
    y = torch.arange(3000) % 3
    guided, known = (
        Sampler(network, SCHEDULE, forward="ddim", steps=30, clip_x0=False).sample((3000, 1), y=y)
        for network in (Guided(NETWORK, "eps", weight, null=3), Gaussians(moved))
    )
    torch.testing.assert_close(guided, known, rtol=1e-9, atol=1e-9)
    # 1,000 samples a class, with a standard error of 0.006; DDIM itself errs by its steps.
    torch.testing.assert_close(guided.reshape(-1, 3).mean(0), moved, rtol=0, atol=0.05)


@pytest.mark.parametrize(("typ", "variance"), [("eps_eps2", "sn"), ("eps_epsc", "npr")])
def test_guidance_keeps_the_covariance_of_the_conditional_network(typ, variance):
    y = torch.tensor([0, 1, 2])
    means = MEANS + 3 * (MEANS - MEANS.mean())
    guided, known = (
        Sampler(network, SCHEDULE, variance=variance, steps=10, clip_x0=False).sample((3, 1), y=y)
        for network in (
            Guided(Gaussians(NETWORK.means, typ), typ, 3.0, null=3),
            Gaussians(means, typ),
        )
    )
    torch.testing.assert_close(guided, known, rtol=1e-9, atol=1e-9)


def test_slices_and_hosts_times_pass_labels_on():
    net = Noted()
    x, n, y = torch.zeros(6, 1, 2, 2), torch.arange(1, 7), torch.tensor([0, 1, 2, 0, 1, 3])
    wrapper = DTWrapper(net, "eps", False, False, 30)
    whole, sliced = wrapper(x, n, y=y), in_slices(wrapper, 2)(x, n, y=y)
    assert torch.equal(whole, sliced)
    assert [call[1].tolist() for call in net.calls[1:]] == [[0, 1], [2, 0], [1, 3]]


def test_gamma_takes_each_images_label_also_where_it_continues(tmp_path):
    x0, y = torch.zeros(7, 1, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 3])

    class Labels:
        model = torch.nn.Linear(1, 1, dtype=torch.float64)

        def __call__(self, x, n, *, y):
            return y[:, None].to(x) + 0 * x

    stops = itertools.chain([False] * 25, [True], itertools.repeat(False))
    options = {
        "n_images": 7,
        "checkpoint": tmp_path / "state.pth",
        "stop": lambda: next(stops),
        "y": y,
    }
    with pytest.raises(KeyboardInterrupt):
        estimate_gamma(Labels(), SCHEDULE, x0.split(3), **options)
    gamma = estimate_gamma(Labels(), SCHEDULE, x0.split(4), **options)
    assert gamma.values[1:] == pytest.approx(y.double().square().mean().item(), rel=1e-12)
