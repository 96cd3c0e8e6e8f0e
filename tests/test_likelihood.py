"""What benchmarks/likelihood.py measures, where the answer is known."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from test_scheduler import reference_tables

from forward_reverse_process import NoiseScheduler

sys.path.insert(0, str(ROOT / "benchmarks"))
import likelihood

VARIANCE = 0.3**2
TABLE = reference_tables(1000)
WEIGHTS = TABLE["betas"] / (2 * TABLE["alphas"] * (1 - TABLE["alphas_cumprod_prev"]))


def gaussian_images(count: int) -> torch.Tensor:
    """Pixels from N(0, 0.3^2), rounded to gray levels: uint8 [N, 1, 28, 28]."""
    pixels = 0.3 * torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


class GaussianNetwork:
    """The best network for such pixels, and how many bits they take by it."""

    image_shape = 1, 28, 28
    last_deviation = 0.0064  # of x_0, if x_t at t = 0 is known: there its noise is so strong
    scheduler = NoiseScheduler()

    def __call__(self, x_t, t, labels=None):
        alpha_bar = TABLE["alphas_cumprod"][t].reshape(-1, 1, 1, 1)
        share = (1 - alpha_bar).sqrt() / (alpha_bar * VARIANCE + 1 - alpha_bar)
        return (share * x_t).float()

    @staticmethod
    def entropy(deviation=VARIANCE**0.5):
        """Bits of a Gaussian in bins of 2 / 255."""
        return math.log2(math.sqrt(2 * math.pi * math.e) * deviation / (2 / 255))

    def bits(self):
        alpha_bar = TABLE["alphas_cumprod"]
        errors = alpha_bar * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)
        return {
            "steps": (WEIGHTS * errors)[1:].sum().item() / math.log(2),
            "last": self.entropy(self.last_deviation),
            "start": alpha_bar[-1].item() * VARIANCE / 2 / math.log(2),
        }


def test_the_weights_are_those_of_the_bound():
    weights = likelihood.step_weights(NoiseScheduler())
    torch.testing.assert_close(weights[1:], WEIGHTS[1:], rtol=2e-3, atol=0)
    assert weights[0] == 0


def test_the_bits_of_gaussian_pixels_are_a_bound_on_their_entropy():
    """Above it by the variance that steps leave out at small t."""
    torch.manual_seed(0)
    network, images = GaussianNetwork(), gaussian_images(1100)  # not as many for each t
    data = images, torch.zeros(len(images), dtype=torch.int64)
    network_and_data = network, network.scheduler, *data
    figures, by_t = likelihood.count_bits(*network_and_data, 2, network.last_deviation)
    expected = network.bits()
    assert figures["steps"] == pytest.approx(expected["steps"], rel=0.02)
    assert figures["steps_low"] <= figures["steps"] <= figures["steps_high"]
    assert figures["last"] == pytest.approx(expected["last"], abs=0.05)
    assert figures["start"] == pytest.approx(expected["start"], rel=0.1)
    assert figures["total"] == sum(figures[name] for name in ("steps", "last", "start"))
    assert network.entropy() < figures["total"] < network.entropy() + 0.7
    assert by_t[0] == figures["last"]
    assert by_t[1:].sum().item() == pytest.approx(figures["steps"])


def test_a_network_that_knows_which_label_fits_reads():
    """Its noise is right for the label that is the image's gray level."""

    class Reader(GaussianNetwork):
        def __call__(self, x_t, t, labels=None):
            gray = (labels.reshape(-1, 1, 1, 1) * 20 / 127.5 - 1).expand(x_t.shape)
            return self.scheduler.predict_noise(x_t, t, gray)

    labels = torch.arange(40) % 10
    images = (labels * 20).to(torch.uint8).reshape(-1, 1, 1, 1).repeat(1, 1, 28, 28)
    right = likelihood.read(Reader(), NoiseScheduler(), images, labels)
    assert right == {1: 1, 3: 1, 7: 1, 16: 1}
    shifted = likelihood.read(Reader(), NoiseScheduler(), images, (labels + 1) % 10)
    assert shifted == {1: 0, 3: 0, 7: 0, 16: 0}


def test_the_command_prints_both_and_draws(monkeypatch, tmp_path, capsys, mnist):
    few = [tuple(part[:60] for part in split) for split in mnist]
    monkeypatch.setattr(likelihood, "mnist", lambda: few)
    monkeypatch.setattr(likelihood, "READ_AT", {1: [500], 16: [400, 500]})
    picture = tmp_path / "bits.png"
    options = ["likelihood.py", "--rounds", "1", "--read", "10", "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", options)
    likelihood.main()
    bits, read = map(json.loads, capsys.readouterr().out.splitlines())
    assert bits["total"] > 0.5 and bits["deviation"] in likelihood.DEVIATIONS
    alone = likelihood.last_step(*likelihood.load_model(), *few[0], bits["deviation"])
    for other in likelihood.DEVIATIONS:  # the best for training images
        assert alone < likelihood.last_step(*likelihood.load_model(), *few[0], other) + 0.01
    assert 0 < bits["up to t = 0"] < bits["up to t = 10"] <= bits["up to t = 100"] <= 1
    assert read["images"] == 10 and set(read["read"]) == {"1", "16"}
    assert picture.stat().st_size > 5000
