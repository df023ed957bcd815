"""benchmarks.cost: counts that can be made by hand."""

import pytest
import torch

from benchmarks.cost import main, measure_network, parts_of, sampling
from configs import digits
from tests.commands import one_line
from third_party.common.datasets import IMAGE_SHAPES, get_dataset

FILE = "--config=configs/digits_sn_sa.py"


def parts(**sa):
    from adapters.hosts import SN_DPM

    config = digits.get_config("sn")
    config.sa.update(sa)
    return {part.name: part for part in parts_of(config, SN_DPM)}


def test_training_counts_calls_and_backward_passes():
    config = digits.get_config("sn")
    net = measure_network(config, "pred_eps")
    images = config.base.iterations * config.base.batch_size
    for sa, K, graded in (
        ({"lam": 0.0}, 1, 1),
        ({"K": 3}, 3, 3),
        ({"K": 3, "backprop": "one"}, 3, 1),
    ):
        base = parts(**sa)["base"]
        assert base.calls == K * images
        assert base.flop == images * (graded * net.step + (K - graded) * net.forward)
        assert base.stored == 2 * 16 * net.numbers
        assert parts(**sa)["head"].calls == config.head.iterations * config.head.batch_size


def test_a_backward_pass_is_counted_as_by_hand():
    """A backward pass makes two products for one, but for the first layer's: its input is data."""
    net = measure_network(digits.get_config("sn"), "pred_eps")
    first = 2 * 9 * 1 * 16 * 64  # 3x3 convolution from 1 to 16 channels on 8x8 pixels
    embedding = 2 * 16 * 64  # the linear layer that takes the embedded time
    assert net.step == 3 * net.forward - first - embedding


def test_the_head_s_trunk_has_no_backward_pass():
    head = measure_network(digits.get_config("sn"), "pred_eps_eps2_pretrained")
    plain = measure_network(digits.get_config("sn"), "pred_eps")
    assert plain.forward < head.forward < head.step < 3 * head.forward - plain.forward
    assert 0 < head.trained < head.numbers
    assert head.numbers > plain.numbers == plain.trained


def test_rows_and_bytes_of_the_samples():
    config = digits.get_config("sn")
    found = parts()
    assert [name for name in found if name.startswith("sample")] == [
        f"sample {name}" for name in config.sample.processes
    ]
    for name in ("ddim", "sn_ddim"):
        assert found[f"sample {name}"].calls == 1000 * (5 + 10 + 25 + 50)
        assert found[f"sample {name}"].stored == 4 * 1000 * 64
    assert found["sample sn_ddim"].flop > found["sample ddim"].flop


def test_derivatives_and_guidance_are_calls():
    config = digits.get_config("sn")
    config.sample.update(processes=("probes_ddim",), steps=(5,), guidance=2.0)
    net = measure_network(config, "pred_eps")
    assert [part.calls for part in sampling(config, net, net)] == [1000 * 2 * (5 + 4)]


def test_the_shapes_are_the_datasets():
    assert get_dataset("digits", "data").image_shape == IMAGE_SHAPES["digits"]


def test_hours(capsys):
    assert main(["cost", FILE, "--tflops=1", "--efficiency=0.5", "--gpus=1,4", "--pair=0.9"]) == 0
    said = capsys.readouterr().out
    row = [cell.strip() for cell in said.splitlines()[-1].strip("|").split("|")]
    assert row[0] == "total"
    assert float(row[5]) == pytest.approx(float(row[2]) / 0.5e12 / 3600, rel=0.01)
    assert float(row[5]) / float(row[6]) == pytest.approx(4 * 0.9**2, rel=0.01)
    assert "0.9 of the speed is left at each doubling" in said


@pytest.mark.parametrize("method", ["analytic", "npr", "sn"])
def test_every_host_without_hours_without_a_speed(method, capsys):
    assert main(["cost", f"--config=configs/cifar10.py:{method}"]) == 0
    said = capsys.readouterr().out
    assert "16.77 GFLOP an image and call, 50.29 with" in said
    assert "52.5 million parameters" in said
    assert "hours on" not in said
    assert ("| gamma |" in said) == (method == "analytic")
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tflops=0"], "argument --tflops: must be > 0, got 0"),
        (["--efficiency=2"], "argument --efficiency: must be > 0 and at most 1, got 2"),
        (["--tflops=1", "--images_per_second=3"], "give one of them"),
        (["--gpus=0"], "--gpus: must be whole numbers >= 1, got 0"),
        (["--config.data.name=none"], "data.name must be one of"),
    ],
    ids=str,
)
def test_bad_input(more, said, capsys):
    assert main(["cost", FILE, *more]) == 2
    one_line(capsys, said)
