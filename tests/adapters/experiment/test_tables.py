"""Tables of one run, and of B against SA."""

import copy

import pytest
import torch

from adapters.experiment.checks import noise_like
from adapters.experiment.tables import against

B = {
    process: {
        steps: {
            "n_images": 100.0,
            "frechet_pixels": 4.0,
            "is_digit_classifier": 6.0,
            "sample_variance": 10.0,
            "reference_variance": 12.0,
        }
        for steps in ("5", "10")
    }
    for process in ("ddpm_small", "ddim")
}


def test_b_against_sa_is_one_table_with_differences_and_a_verdict_of_each_metric():
    sa = copy.deepcopy(B)
    sa["ddim"]["10"]["frechet_pixels"] = 2.5
    sa["ddim"]["5"]["frechet_pixels"] = 4.25
    sa["ddpm_small"]["5"]["is_digit_classifier"] = 5.0
    sa["ddpm_small"]["10"]["sample_variance"] = 11.0
    text = against(B, sa, line="SA-3")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[word.strip() for word in row] for row in rows]
    assert cells[0] == ["B = baseline → SA-3 (difference)", "steps", "5", "10"]
    assert len(cells) == 2 + 3 * 2
    assert cells[2][:2] == ["Fréchet distance, pixels (lower is better)", "DDPM small"]
    assert cells[3] == ["", "DDIM", "4.00 → 4.25 (+0.25)", "4.00 → 2.50 (-1.50)"]
    assert cells[6][0] == "Variance of the samples (data: 12)"
    few = "one seed: nothing is told apart from chance alone."
    distance, score, variance = (line for line in text.splitlines() if line.startswith("- "))
    ahead = "SA-3 is ahead of B in {} of 4 cells, behind in 1; " + few
    assert distance == f"- Fréchet distance, pixels: {ahead.format(1)}"
    assert score == f"- Inception Score, digit classifier: {ahead.format(0)}"
    assert (
        variance == f"- Variance of the samples: SA-3 is above B in 1 of 4 cells, below in 0; {few}"
    )
    assert "another seed can turn the order round" in text.splitlines()[-1]


def test_runs_with_other_steps_are_not_compared():
    sa = copy.deepcopy(B)
    del sa["ddim"]["10"]
    with pytest.raises(ValueError, match="a run has no frechet_pixels of 'ddim' at 10 steps"):
        against(B, sa)


def test_samples_that_vary_as_noise_are_told_with_their_share():
    """The least that is told: 1.5 times the data, and not less than noise does."""
    noise = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).var()
    assert list(noise_like("B", B, 1)) == []
    wide = copy.deepcopy(B)
    wide["ddim"]["10"]["sample_variance"] = 18.0
    (told,) = noise_like("B", wide, n_values=int(17.9 / noise))
    assert told.startswith("B: in 1 of 4 cells the samples vary as much as pure noise, up to 1.5 ")
    assert list(noise_like("B", wide, n_values=int(18.2 / noise) + 1)) == []
    wide["ddim"]["10"]["sample_variance"] = 17.9
    assert list(noise_like("B", wide, n_values=1)) == []
