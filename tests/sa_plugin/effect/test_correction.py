"""The corrections against exact networks of inflated data, in float64; what they leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sa_plugin.effect.chains import best_strength
from sa_plugin.effect.correction import (
    EpsilonScaling,
    NormMatching,
    ShiftedNoise,
    SpectralShrinkage,
    linear_factors,
)
from sa_plugin.effect.spectrum import Spectrum
from sa_plugin.hooks.wrappers import EpsModel
from sa_plugin.sampling.reverse import ReverseCoefficients, reverse_moments
from sa_plugin.sampling.sampler import Sampler
from sa_plugin.schedule import NoiseSchedule
from tests.gaussian import GaussianData, Mixture
from tests.refusals import refuses
from tests.toys import Toy, images, normal, over

N = 60
SCHEDULE = NoiseSchedule.linear(N)
SHAPE = (2, 2, 3)
D = 12
STEPS = torch.tensor([1, 2, 5, 20, 31, 60])
X = normal(1, len(STEPS), *SHAPE)
Q = 1 / 3
MEAN = 0.3 * images(3, *SHAPE)
DATA = GaussianData(MEAN, 0.05 + images(4, *SHAPE) ** 2, SCHEDULE)


MIXTURE = Mixture(images(5, 3, *SHAPE), 0.02 + 0.1 * images(6, 3, *SHAPE) ** 2, SCHEDULE)


def correlated(schedule=SCHEDULE) -> tuple[Spectrum, GaussianData]:
    """A correlated Gaussian by its spectrum, and the same in the spectrum's coordinates."""
    directions = np.linalg.qr(normal(7, D, D).numpy())[0]
    variances = np.geomspace(2, 1e-3, D)
    spectrum = Spectrum(MEAN.numpy(), variances, directions, "pca", 100)
    centre = spectrum.coordinates(MEAN[None])[0]
    return spectrum, GaussianData(centre, variances, schedule)


def rotated(spectrum: Spectrum, data: GaussianData):
    """The network of ``data`` for images."""
    return lambda x, n: spectrum.from_coordinates(data.eps(spectrum.coordinates(x), n))


def noisy(data: GaussianData, n: Tensor) -> Tensor:
    mean, variance = data.marginal(n)
    return mean + variance.sqrt() * normal(8, len(n), *data.mu.shape)


class TestShiftedNoise:
    @pytest.mark.parametrize("q", [0.05, Q, 2.0])
    def test_fractional_is_the_network_of_the_inflated_mixture(self, q):
        shifted = ShiftedNoise(MIXTURE, SCHEDULE, q, MIXTURE.mean, fractional=True)
        n = torch.arange(1, N + 1)
        n = n[torch.from_numpy(shifted.steps[1:]) > 1]
        assert len(n) > N - 15
        np.testing.assert_array_equal(shifted.reached[n.numpy()], q)
        x = normal(9, len(n), *SHAPE)
        exact = MIXTURE.inflated(q)(x, n)
        torch.testing.assert_close(shifted(x, n), exact, rtol=0, atol=1e-10)
        assert (MIXTURE(x, n) - exact).abs().max() > 0.01

    @pytest.mark.parametrize("fractional", [False, True])
    def test_each_step_is_exact_for_the_q_that_it_reaches(self, fractional):
        """Also in the early steps, where that is less than what was asked."""
        shifted = ShiftedNoise(MIXTURE, SCHEDULE, Q, MIXTURE.mean, fractional=fractional)
        assert shifted.reached[1] == 0
        for n in range(1, N + 1):
            q, at, x = shifted.reached[n], torch.tensor([n]), X[:1]
            exact = MIXTURE.inflated(q)(x, at)
            torch.testing.assert_close(shifted(x, at), exact, rtol=0, atol=1e-10)

    def test_whole_steps_are_the_nearest(self):
        shifted = ShiftedNoise(MIXTURE, SCHEDULE, Q)
        snr = SCHEDULE.cum_alphas[1:] / SCHEDULE.cum_betas[1:]
        for n in range(1, N + 1):
            away = np.abs(np.log(snr) - np.log(snr[n - 1] * (1 + Q)))
            assert shifted.steps[n] == 1 + np.argmin(away)
        assert shifted.steps.dtype == np.int64

    @pytest.mark.parametrize("mean", [MEAN, 0.2, 0.0])
    def test_whole_steps_approach_the_inflated_gaussian(self, mean):
        """The relative error is at most the half distance of neighbouring steps in log SNR."""
        worst = []
        for steps in (50, 200, 800):
            schedule = NoiseSchedule.linear(steps)
            data = GaussianData(torch.zeros(SHAPE).double() + mean, DATA.S, schedule)
            n = torch.arange(steps // 5, steps + 1)
            x = noisy(data, n)
            shifted = ShiftedNoise(data.network(), schedule, Q, mean)(x, n)
            exact = GaussianData(data.mu, (1 + Q) * data.S, schedule).eps(x, n)
            log_snr = np.log(schedule.cum_alphas[1:] / schedule.cum_betas[1:])
            half = -np.diff(log_snr)[steps // 10 :].max() / 2
            worst.append(float((shifted / exact - 1).abs().max()))
            assert worst[-1] < math.expm1(half)
        assert worst[0] > worst[1] > worst[2] > 0
        assert worst[0] > 5 * worst[2]

    def test_the_shifted_second_output_is_that_of_the_inflated_data(self):
        """In the units of the sampler: Var[eps | x_n]."""
        shifted = ShiftedNoise(
            DATA.network("sn"), SCHEDULE, Q, MEAN, second="shifted", second_is="eps2"
        )
        eps, second = shifted(X[3:4], torch.tensor([20]))
        inflated = GaussianData(MEAN, (1 + shifted.reached[20]) * DATA.S, SCHEDULE)
        torch.testing.assert_close(second - eps**2, inflated.npr_second(X[3:4], 20))

    def test_the_mean_may_be_an_array_of_either_library(self):
        found = [ShiftedNoise(MIXTURE, SCHEDULE, Q, m)(X, STEPS) for m in (MEAN, MEAN.numpy())]
        torch.testing.assert_close(*found, rtol=0, atol=0)
        constant = ShiftedNoise(MIXTURE, SCHEDULE, Q, torch.full(SHAPE, 0.2).double())
        number = ShiftedNoise(MIXTURE, SCHEDULE, Q, 0.2)
        torch.testing.assert_close(constant(X, STEPS), number(X, STEPS))


class TestSpectralShrinkage:
    @pytest.mark.parametrize("q", [0.05, Q, 2.0])
    def test_it_is_the_network_of_the_inflated_gaussian(self, q):
        spectrum, data = correlated()
        n = torch.arange(1, N + 1)
        x = spectrum.from_coordinates(noisy(data, n))
        inflated = GaussianData(data.mu, (1 + q) * data.S, SCHEDULE)
        found = SpectralShrinkage(rotated(spectrum, data), SCHEDULE, spectrum, q)(x, n)
        torch.testing.assert_close(found, rotated(spectrum, inflated)(x, n), rtol=0, atol=1e-12)

    def test_it_agrees_with_the_shifted_noise(self):
        spectrum, data = correlated(NoiseSchedule.linear(1000))
        net, n = rotated(spectrum, data), torch.arange(100, 1001, 50)
        x = spectrum.from_coordinates(noisy(data, n))
        shifted = ShiftedNoise(net, data.schedule, Q, spectrum.mean)
        shrunk = SpectralShrinkage(net, data.schedule, spectrum, shifted.reached)
        torch.testing.assert_close(shrunk(x, n), shifted(x, n), rtol=0, atol=1e-12)

    def test_in_the_dct_basis_too(self):
        variances = np.geomspace(1, 0.01, D)
        spectrum = Spectrum(MEAN.numpy(), variances, np.eye(2), "dct", 100)
        data = GaussianData(spectrum.coordinates(MEAN[None])[0], variances, SCHEDULE)
        inflated = GaussianData(data.mu, (1 + Q) * data.S, SCHEDULE)
        found = SpectralShrinkage(rotated(spectrum, data), SCHEDULE, spectrum, Q)(X, STEPS)
        torch.testing.assert_close(found, rotated(spectrum, inflated)(X, STEPS))

    def test_a_direction_without_variance_is_left_alone(self):
        spectrum = Spectrum(MEAN.numpy(), np.zeros(D), np.eye(D), "pca", 100)
        found = SpectralShrinkage(DATA.network(), SCHEDULE, spectrum, Q)(X, STEPS)
        assert torch.equal(found, DATA.eps(X, STEPS))


def halved(x, _):
    """A network within autocast: it answers in half precision."""
    return (0.5 * x).bfloat16()


def both(model, q=Q, **options):
    """Each correction of a network, by name."""
    spectrum = correlated()[0]
    return {
        "shrinkage": SpectralShrinkage(model, SCHEDULE, spectrum, q, **options),
        "shifted": ShiftedNoise(model, SCHEDULE, q, MEAN, **options),
    }


EACH = pytest.mark.parametrize("name", ["shrinkage", "shifted"])


@EACH
class TestBest:
    @pytest.mark.parametrize("second", ["own", "shifted"])
    @pytest.mark.parametrize("steps", [5, 20])
    def test_it_is_the_best_strength_of_the_chain(self, name, second, steps):
        chain = {"steps": steps, "forward": "ddim", "variance": "analytic"}
        spectrum = correlated()[0]
        if name == "shrinkage":
            wrapped = SpectralShrinkage(
                DATA.eps, SCHEDULE, spectrum, "best", second=second, **chain
            )
        else:
            wrapped = ShiftedNoise(DATA.eps, SCHEDULE, "best", spectrum, second=second, **chain)
        rests_on = {"own": "exact", "shifted": "own"}[second]
        q = best_strength(SCHEDULE, spectrum.variances, rests_on=rests_on, **chain)
        assert (wrapped.q[1:] == q).all()
        number = both(DATA.eps, q, second=second)[name]
        assert torch.equal(wrapped(X, STEPS), number(X, STEPS))


@EACH
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    @pytest.mark.parametrize("q", [0, 0.0, np.zeros(N + 1)])
    def test_q_0_is_the_network(self, name, dtype, q):
        x = X.to(dtype)
        assert torch.equal(both(DATA.eps, q)[name](x, STEPS), DATA.eps(x, STEPS))

    def test_steps_with_q_0_are_the_network_s(self, name):
        q = np.zeros(N + 1)
        q[20:] = Q
        found, own = both(DATA.eps, q)[name](X, STEPS), DATA.eps(X, STEPS)
        assert torch.equal(found[:3], own[:3])
        assert not (found[3:] == own[3:]).any()
        torch.testing.assert_close(found[3:], both(DATA.eps)[name](X, STEPS)[3:])

    def test_mixed_steps_are_each_image_s_own(self, name):
        wrapped = both(MIXTURE)[name]
        together = wrapped(X, STEPS)
        for i in range(len(STEPS)):
            torch.testing.assert_close(wrapped(X[i : i + 1], STEPS[i : i + 1])[0], together[i])

    def test_the_covariance_stays_the_network_s_own(self, name):
        """Of a pair as the sampler reads it; the mean is the corrected network's."""
        for kind, variance, second_is in (("sn", "sn", "eps2"), ("npr", "npr", "epsc")):
            own = DATA.network(kind)
            eps, second = both(own, second_is=second_is)[name](X[3:], STEPS[3:])
            assert torch.equal(eps, both(DATA.eps)[name](X[3:], STEPS[3:]))
            for i, t in enumerate(STEPS[3:].tolist()):
                c = ReverseCoefficients.unstack(
                    ReverseCoefficients.build(SCHEDULE, [t]).stack()[:, 0].tolist()
                )
                options = {"variance": variance, "clip_x0": False}
                x, at = X[3 + i : 4 + i], torch.tensor([t])
                ours = reverse_moments(c, x, eps[i : i + 1], second[i : i + 1], **options)
                theirs = reverse_moments(c, x, *own(x, at), **options)
                plain = reverse_moments(c, x, eps[i : i + 1], variance="small", clip_x0=False)
                torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-12, atol=1e-12)
                assert torch.equal(ours.mean, plain.mean)

    def test_half_precision_keeps_the_covariance_of_its_numbers(self, name):
        def net(x, n):
            return tuple(part.half() for part in DATA.network("sn")(x, n))

        eps, second = both(net, second_is="eps2")[name](X, STEPS)
        own = [part.double() for part in net(X, STEPS)]
        assert (eps.dtype, second.dtype) == (X.dtype, X.dtype)
        torch.testing.assert_close(second - eps**2, own[1] - own[0] ** 2, rtol=0, atol=1e-12)

    def test_a_shifted_second_output_is_that_of_the_corrected_call(self, name):
        calls = []

        def net(x, n):
            calls.append(n)
            return DATA.network("npr")(x, n)

        wrapped = both(net, second="shifted")[name]
        eps, second = wrapped(X, STEPS)
        assert torch.equal(eps, both(DATA.eps)[name](X, STEPS))
        asked = torch.from_numpy(wrapped.steps)[STEPS] if name == "shifted" else STEPS
        assert torch.equal(second, DATA.npr_second(X, asked))
        assert len(calls) == 1

    def test_calls_and_arguments(self, name):
        seen = []

        def net(x, n, y):
            assert n.dtype == torch.int64
            seen.append(y)
            return DATA.network("sn")(x, n)

        both(net, second_is="eps2")[name](X, STEPS, y="label")
        assert seen == ["label"] * (2 if name == "shifted" else 1)

    def test_dtypes_are_kept_and_gradients_may_be_off(self, name):
        exact = both(DATA.eps)[name](X, STEPS)
        with torch.no_grad():
            for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 0.02)):
                found = both(DATA.eps)[name](X.to(dtype), STEPS)
                assert found.dtype == dtype
                torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=rtol)

    def test_the_sampler_finds_the_module_behind_it(self, name):
        toy = Toy()
        for net in (toy, toy.forward, both(toy)["shrinkage"]):
            wrapped = both(net)[name]
            assert wrapped.model is toy
            drawn = Sampler(wrapped, SCHEDULE, steps=3).sample((2, *SHAPE))
            assert drawn.dtype == torch.float64
        pair = EpsModel(Toy(outputs=2), SCHEDULE, output="pair")
        assert both(pair.with_second)[name].model is pair

    @refuses(
        ({"q": -0.1}, r"q must be finite and >= 0, got -0\.1$"),
        ({"q": math.nan}, "q must be finite and >= 0, got nan"),
        ({"q": math.inf}, "q must be finite and >= 0, got inf"),
        ({"q": np.zeros(N)}, r"table of shape \(61,\) \(entry 0 unused\), got \(60,\)"),
        ({"q": [0.1] * N + [-1.0]}, r"got q\[60\] = -1"),
        ({"q": "most"}, "q must be one of"),
        ({"q": 0.1, "steps": 5}, "steps belong to q='best', got q=0.1"),
        ({"second": "mine"}, "second must be one of"),
        ({"second_is": "eps"}, "second_is must be one of"),
        ({"schedule": SCHEDULE.betas}, "schedule must be a NoiseSchedule, got ndarray"),
        ({"n": STEPS - 1}, r"n must lie in 1\.\.60, got 0\.\.59"),
        ({"n": STEPS + 1}, r"n must lie in 1\.\.60, got 2\.\.61"),
        ({"n": STEPS.float()}, "n must be integers"),
        ({"x": X[:, :1]}, r"must .*2, 3.*, got .*2, 3\)"),
        ({"net": DATA.network("sn")}, "the network returned 2 outputs; .* say which by second_is"),
        ({"second_is": "epsc"}, "needs a network that returns the pair"),
        ({"net": lambda x, n: (x, x, x), "second": "shifted"}, "the network returned 3 outputs"),
    )
    def test_refused(self, bad, name):
        values = {"net": DATA.eps, "schedule": SCHEDULE, "q": Q, "x": X, "n": STEPS} | bad
        x, n = values.pop("x"), values.pop("n")
        first = values.pop("net"), values.pop("schedule")
        q, spectrum = values.pop("q"), correlated()[0]
        if name == "shrinkage":
            wrapped = SpectralShrinkage(*first, spectrum, q, **values)
        else:
            wrapped = ShiftedNoise(*first, q, MEAN, **values)
        wrapped(x, n)

    def test_a_sampler_of_another_schedule_is_refused(self, name):
        sampler = Sampler(both(DATA.eps)[name], NoiseSchedule.linear(N + 1), steps=3)
        with pytest.raises(ValueError, match=r"n must lie in 1\.\.60, got 61\.\.61"):
            sampler.sample((2, *SHAPE))


@refuses(
    (MEAN[0], r"mean must be a number or \[C, H, W\]"),
    (math.nan, "and finite"),
    (MEAN[:, :, :2], r"mean must have the images' shape \(2, 2, 3\), got \(2, 2, 2\)"),
)
def test_means_that_are_refused(bad):
    ShiftedNoise(DATA.eps, SCHEDULE, Q, bad)(X, STEPS)


def test_a_spectrum_is_needed():
    with pytest.raises(ValueError, match="spectrum must be a Spectrum, got list"):
        SpectralShrinkage(DATA.eps, SCHEDULE, [1.0], Q)


def test_a_mean_alone_does_not_tell_the_best_strength():
    with pytest.raises(ValueError, match=r"q='best' needs the data's Spectrum .*, got Tensor"):
        ShiftedNoise(DATA.eps, SCHEDULE, "best", MEAN, steps=5)


class TestEpsilonScaling:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_eps_is_multiplied_by_step(self, dtype):
        factors = np.linspace(0.5, 1, N + 1)
        x = X.to(dtype)
        found, own = EpsilonScaling(DATA.eps, SCHEDULE, factors)(x, STEPS), DATA.eps(x, STEPS)
        assert found.dtype == own.dtype
        wanted = own.double() * over(torch.from_numpy(factors)[STEPS], x)
        torch.testing.assert_close(found, wanted.to(own.dtype))

    def test_linear_factors_divide_by_a_line(self):
        factors = linear_factors(SCHEDULE, 2e-3, 0.95)
        found = EpsilonScaling(DATA.eps, SCHEDULE, factors)(X, STEPS)
        torch.testing.assert_close(found, DATA.eps(X, STEPS) / over(2e-3 * STEPS + 0.95, X))

    def test_the_covariance_stays_the_networks_own(self):
        net = DATA.network("sn")
        eps, second = EpsilonScaling(net, SCHEDULE, 0.9, second_is="eps2")(X, STEPS)
        own = net(X, STEPS)
        torch.testing.assert_close(second - eps**2, own[1] - own[0] ** 2, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("make", [EpsilonScaling, SpectralShrinkage])
    def test_a_shifted_second_output_is_returned_as_it_is(self, make):
        how = [0.9] if make is EpsilonScaling else [correlated()[0], 0.5]
        net = DATA.network("sn")
        eps, second = make(net, SCHEDULE, *how, second="shifted", second_is="eps2")(X, STEPS)
        assert torch.equal(second, net(X, STEPS)[1])
        assert not torch.equal(eps, net(X, STEPS)[0])

    def test_matched_norms_on_a_chain_are_those_of_training(self):
        """With another seed, and a network whose chain has too long an eps."""
        steps, count = 6, 4000

        def net(x, n):
            return 1.1 * DATA.eps(x, n)

        data = DATA.draw(count, seed=11)
        fit = NormMatching(net, SCHEDULE, data, seed=3)
        drawn = {}
        sampler = Sampler(fit, SCHEDULE, steps=steps, clip_x0=False)
        sampler.sample((count, *SHAPE), seed=1)

        def watched(x, n):
            eps = net(x, n)
            drawn[int(n[0])] = eps.square().mean()
            return eps

        again = EpsilonScaling(watched, SCHEDULE, fit.factors)
        Sampler(again, SCHEDULE, steps=steps, clip_x0=False).sample((count, *SHAPE), seed=2)
        visited = sorted(drawn)
        assert len(visited) == steps
        assert (fit.factors[visited] != 1).all()
        assert (np.delete(fit.factors, [0, *visited]) == 1).all()
        for t in visited:
            n = torch.full((count,), t)
            trained = net(noisy(DATA, n), n).square().mean()
            assert float(drawn[t] * fit.factors[t] ** 2) == pytest.approx(float(trained), rel=0.03)
        assert fit.factors[visited[0]] < 0.97

    @refuses(
        (0.0, "factors must be finite and > 0, got 0"),
        ([1.0] * N + [-1.0], r"got factors\[60\] = -1"),
        ([1.0], r"factors must be a number or a table of shape \(61,\)"),
    )
    def test_refused(self, bad):
        EpsilonScaling(DATA.eps, SCHEDULE, bad)

    @pytest.mark.parametrize("factor", [0.999, 1.0015])
    def test_a_factor_near_1_acts_within_autocast(self, factor):
        x = X.float()
        found = EpsilonScaling(halved, SCHEDULE, factor)(x, STEPS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, halved(x, STEPS).float() * factor, rtol=1e-6, atol=0)

    def test_norms_are_matched_in_the_precision_of_the_chain(self):
        asked = []

        def watched(x, n):
            asked.append(x)
            return halved(x, n)

        fit = NormMatching(watched, SCHEDULE, X)
        fit(X.float(), torch.full((len(X),), 30))
        chain, noised = (halved(x, None).double().square().mean() for x in asked)
        assert [x.dtype for x in asked] == [torch.float32] * 2
        assert fit.factors[30] == pytest.approx(float((noised / chain) ** 0.5), rel=1e-6)

    def test_factors_are_found_one_step_at_a_time(self):
        with pytest.raises(ValueError, match="all images must be at one step"):
            NormMatching(DATA.eps, SCHEDULE, X)(X, STEPS)
