"""sequence_aware_loss(): the published code's function, by its own arguments."""

import pytest
import torch

from sa_plugin.loss import _loss_of, _losses, sequence_aware_loss
from sa_plugin.schedule import NoiseSchedule
from tests.refusals import refuses
from tests.toys import Toy, normal, read_json, read_npz

OFFICIAL = read_json("sa_official")
X0 = torch.from_numpy(read_npz("sa_official")["x0"])
E, NOISES, T = normal(1, *X0.shape), normal(2, 1, *X0.shape), torch.arange(len(X0))


def betas(last=0.02):
    return torch.linspace(1e-4, last, 50)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: f"SA-{c['K']}")
def test_equals_the_published_code(case):
    model, noise, K = Toy(), normal(7, case["K"], *X0.shape), case["K"]
    t, b = torch.tensor(case["t_index"]), torch.tensor(NoiseSchedule.linear(1000).betas[1:])
    total = sequence_aware_loss(model, X0, t, noise[0], b, K, case["lam"], noises=noise[1:])
    total.backward()
    assert total.item() == pytest.approx(case["loss"], rel=1e-9)
    assert model.scale.grad.item() == pytest.approx(case["grad_scale"], rel=1e-9)


def test_the_network_gets_floats_as_from_the_published_code():
    model = Toy()
    sequence_aware_loss(model, X0, T, E, betas())
    (times,) = model.times
    assert times.dtype == torch.float32
    assert times.tolist() == [*range(8), 0, *range(7)]


@refuses((0, r"x0 must hold at least 1 .*got torch.float32 \(0, "))
def test_an_empty_batch_is_refused(count):
    sequence_aware_loss(Toy(), X0[:count].float(), T[:count], E[:count].float(), betas())


@pytest.mark.parametrize("lamda", [1.0, 0.0])
@refuses(*[(rows, r"noises must have shape \(1, 8") for rows in (0, 2)])
def test_noises_of_another_number_are_refused(rows, lamda):
    sequence_aware_loss(Toy(), X0, T, E, betas(), 2, lamda, noises=normal(7, rows, *X0.shape))


# -- the loss that is kept for a tensor of betas


def test_betas_changed_in_place_are_seen():
    def total(b):
        return sequence_aware_loss(Toy(), X0, T, E, b, 1, 0.0)

    b = betas()
    before = total(b)
    b.mul_(0.5)
    assert total(b) == total(b.clone()) != before


def test_one_loss_serves_a_warm_up_of_lambda():
    b = betas()
    kept, values = {id(_loss_of(b, 2))}, []
    for lamda in (0.25, 0.5, 1.0):
        values.append(sequence_aware_loss(Toy(), X0, T, E, b, 2, lamda, noises=NOISES))
        kept.add(id(_loss_of(b, 2)))
    assert len(kept) == 1
    torch.testing.assert_close(values[2] - values[1], 2 * (values[1] - values[0]))


def test_no_loss_is_kept_of_betas_that_are_gone():
    before = len(_losses)
    for _ in range(3):
        b = betas()
        assert _loss_of(b, 2) is _loss_of(b, 2)
        assert _loss_of(b, 3).K == 3
        assert len(_losses) == before + 1
    other = betas(0.03)  # of the same version
    assert _loss_of(other, 3).schedule.betas[50] == pytest.approx(0.03)
    assert _loss_of(b, 3).schedule.betas[50] == pytest.approx(0.02)
