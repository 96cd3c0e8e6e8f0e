"""The way from noise to images, with networks whose answers are known in closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scheduler import assert_same, ddim_step, float64_scheduler, reference_tables
from torch import Tensor

from forward_reverse_process import NoiseScheduler, UNet
from train_diffusion import denoise, guided_noise, sample, sampling_timesteps

T = 50
ALPHA_BAR = torch.cat([reference_tables(T)["alphas_cumprod"], torch.ones(1)])  # [-1] is that of x_0
X_T = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 2, 1])


@pytest.mark.parametrize("num_timesteps", [2, 7, 50, 1000])
def test_timesteps_decrease_evenly_from_the_noisiest_one_in_1_to_T_steps(num_timesteps):
    for num_steps in range(1, num_timesteps + 1):
        timesteps = sampling_timesteps(num_timesteps, num_steps)
        gaps = -np.diff([*timesteps, -1])
        assert len(timesteps) == num_steps and timesteps[0] == num_timesteps - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert timesteps == list(range(num_timesteps - 1, -1, -1))
    for num_steps in (0, -1, num_timesteps + 1):
        with pytest.raises(ValueError, match=f"num_steps.*1 to {num_timesteps}"):
            next(denoise(None, NoiseScheduler(num_timesteps), X_T, num_steps=num_steps))


# --- guidance and the path, for a network that is a formula ---------------------------------------


class Waves:
    """Says that the noise is a fixed function of x_t, t and the labels, and counts its calls."""

    num_classes, no_label, image_shape = 3, 3, (1, 4, 4)

    def __init__(self) -> None:
        self.visited, self.batch_sizes = [], []

    def __call__(self, x_t, t, labels=None):
        self.visited.append(t)
        self.batch_sizes.append(len(x_t))
        labels = torch.full((len(x_t),), self.no_label) if labels is None else labels
        return torch.sin(3 * x_t) + t / 1000 + labels.reshape(-1, 1, 1, 1) / 10


def reference_guided_noise(x_t: Tensor, t: int, w: float) -> Tensor:
    return (1 + w) * Waves()(x_t, t, LABELS) - w * Waves()(x_t, t)


@pytest.mark.parametrize("w", [0.0, 0.1, 3.0])
def test_guidance_is_equation_6_in_one_call_and_on_a_doubled_batch_only_if_it_has_to(w):
    network = Waves()
    assert_same(guided_noise(network, X_T, 5, LABELS, w), reference_guided_noise(X_T, 5, w))
    assert_same(guided_noise(network, X_T, 5, None, w), Waves()(X_T, 5), atol=0)
    assert network.batch_sizes == [6 if w else 3, 3]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("num_steps", [1, 2, 7, T - 1, T])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("w", [0.0, 0.5])
def test_every_step_of_denoise_is_ddims_and_it_ends_on_the_predicted_x_0(num_steps, eta, w):
    network, generator, expected_x_t = Waves(), seeded(), X_T
    path = denoise(network, float64_scheduler(T), X_T, LABELS, num_steps, eta, w, seeded())
    path = list(path)
    guided = 0
    for (t, x_t, x_0), (t_prev, *_) in pairwise(path):
        assert_same(x_t, expected_x_t)
        now = ALPHA_BAR[t]
        in_the_middle = 0.2 <= now <= 0.8
        noise = reference_guided_noise(x_t, t, w if in_the_middle else 0)
        guided += in_the_middle
        assert_same(x_0, ((x_t - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1))
        z = torch.randn(X_T.shape, generator=generator).double()
        expected_x_t = ddim_step(now, ALPHA_BAR[t_prev], x_t, x_0, eta, z)
    assert torch.equal(path[-1][1], path[-2][2]) and torch.equal(path[-1][2], path[-2][2])
    assert network.visited == sampling_timesteps(T, num_steps)
    assert [t for t, _, _ in path] == [*network.visited, -1]
    assert network.batch_sizes.count(6) == (guided if w else 0)


@pytest.mark.parametrize("interval, guided", [((0, 1), T), ((0.5, 0.5), 0), ((0.99, 1), None)])
def test_where_guidance_is_used_can_be_chosen(interval, guided):
    """Everywhere, nowhere, or with hardly any noise: by alpha-bar, at its lowest timesteps."""
    network = Waves()
    list(denoise(network, NoiseScheduler(T), X_T, LABELS, T, 1, 0.5, None, interval))
    if guided is None:
        guided = int((ALPHA_BAR[:-1] >= 0.99).sum())
        assert 0 < guided < T / 4
    assert network.batch_sizes == [3] * (T - guided) + [6] * guided


def test_denoise_records_no_gradients_and_leaves_them_on_for_its_consumer():
    weight = torch.ones(1, requires_grad=True)
    for _, x_t, x_0 in denoise(lambda x_t, t, _: weight * x_t, NoiseScheduler(T), X_T):
        assert torch.is_grad_enabled() and not x_t.requires_grad and not x_0.requires_grad


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_best_network_draws_a_label_from_its_class_and_no_label_from_all(schedule, eta):
    """x_0 ~ N(-0.4, 0.1^2) with label 0 and N(0.3, 0.1^2) with label 1.

    The network says what one that has learned all there is would say, E[eps | x_t]. Without a label
    it weighs the classes with their probabilities given x_t.
    """
    means, s = torch.tensor([-0.4, 0.3]), 0.1
    alpha_bar = reference_tables(200, schedule)["alphas_cumprod"]

    def network(x_t, t, labels):
        x_t, a = x_t.reshape(-1, 1), alpha_bar[t]
        variance = a * s**2 + 1 - a  # of x_t in one class
        likelihoods = (-((x_t - a.sqrt() * means) ** 2) / (2 * variance)).exp()
        weights = likelihoods if labels is None else F.one_hot(labels, 2)
        noise = (1 - a).sqrt() * (x_t - a.sqrt() * means) / variance  # [B, 2], for each class
        return ((weights * noise).sum(dim=1) / weights.sum(dim=1)).reshape(-1, 1, 1, 1)

    generator, labels = seeded(), torch.arange(8000) % 2
    x_T = torch.randn(8000, 1, 1, 1, generator=generator)
    for given in (labels, None):
        scheduler = NoiseScheduler(200, schedule)
        path = denoise(network, scheduler, x_T, given, 200, eta, 0.0, generator)
        *_, (_, x_0, _) = path
        second = labels == 1 if given is not None else x_0.flatten() > -0.05
        assert second.float().mean().item() == pytest.approx(0.5, abs=0.025)
        for ours, mean in ((x_0[~second], -0.4), (x_0[second], 0.3)):
            assert ours.mean().item() == pytest.approx(mean, abs=0.01)
            assert ours.std().item() == pytest.approx(s, rel=0.15)  # 200 steps lose some of it


# --- sample ---------------------------------------------------------------------------------------


class Grays:
    """A network that knows one image for each label: its gray level is the label, 0 without one."""

    image_shape, class_names = (1, 4, 4), None

    def __init__(self, num_classes: int | None = 10) -> None:
        self.num_classes = self.no_label = num_classes
        self.scheduler, self.batches = NoiseScheduler(20), []

    def __call__(self, x_t, t, labels=None):
        self.batches.append(None if labels is None else labels.tolist())
        gray = torch.zeros(len(x_t)) if labels is None else labels % self.no_label
        assert labels is None or labels.dtype == torch.int64
        x_0 = (gray.reshape(-1, 1, 1, 1) / 127.5 - 1).expand_as(x_t)
        return self.scheduler.predict_noise(x_t, t, x_0)

    def draw(self, *arguments, guidance: float = 0.0) -> list[int]:
        """The gray levels of the images that `sample` draws in 3 steps."""
        how = {"num_steps": 3, "guidance": guidance, "guidance_interval": (0, 1)}
        images = sample(self, self.scheduler, *arguments, **how)
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 4, 4)
        assert (images == images[:, :1, :1, :1]).all()
        return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("classes", [10, 7, 1, 150, None])
def test_classes_are_drawn_in_turn_a_hundred_if_no_number_is_asked_for(classes):
    network = Grays(classes)
    assert network.draw() == [i % (classes or 1) for i in range(100)]
    assert network.draw(5) == [i % (classes or 1) for i in range(5)]
    assert classes or network.batches == [None] * 6


def backwards(labels: list[int]) -> np.ndarray:
    """A view with a negative stride, which PyTorch does not take."""
    return np.array(labels[::-1], np.uint16)[::-1]


@pytest.mark.parametrize("kind", [list, tuple, np.array, backwards, torch.tensor, torch.ByteTensor])
@pytest.mark.parametrize("guidance", [0, 2])
def test_labels_are_drawn_in_their_order_and_guided_in_chunks(monkeypatch, guidance, kind):
    monkeypatch.setattr("support.devices.PIECE", 4 * 16)
    network, chunks = Grays(), [[3, 1, 4, 1], [5, 2, 6, 5], [3, 5]]
    labels, unlabeled = sum(chunks, []), [10] if guidance else []
    expected = [(1 + guidance) * label for label in labels]  # (1 + w) label - w 0
    assert network.draw(None, kind(labels), guidance=guidance) == expected
    assert network.batches == [part + unlabeled * len(part) for part in chunks for _ in range(3)]
    assert network.draw(2, kind([4, 5])) == [4, 5]


@pytest.mark.parametrize(
    "classes, num_samples, labels, message",
    [(10, None, bad, "labels.* 0 to 9") for bad in ([0, 10], [-1], [0.5], [1.0], [math.nan], [])]
    + [(10, None, bad, "labels.* 0 to 9") for bad in ("12", ["one"], [None], [True], {1}, [2**70])]
    + [(None, None, [0], "labels.*without labels")]
    + [(10, count, [0, 1, 2], f"num_samples.* {count} .*3 labels") for count in (1, 4)]
    + [(classes, 0, None, "num_samples.* 1 or more") for classes in (None, 10)],
)
def test_what_cannot_be_drawn_is_refused(classes, num_samples, labels, message):
    with pytest.raises(ValueError, match=message):
        Grays(classes).draw(num_samples, labels)


@pytest.mark.parametrize("num_classes, eta", [(None, 0.0), (3, 1.0)])
def test_images_depend_on_the_seed_alone_and_leave_other_draws(monkeypatch, num_classes, eta):
    monkeypatch.setattr("support.devices.PIECE", 4 * 64)
    scheduler, options = NoiseScheduler(20), {"num_steps": 3, "eta": eta}
    model = UNet(scheduler, (3, 8, 8), base_channels=24, num_classes=num_classes)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, other = (sample(model, scheduler, 6, seed=seed, **options) for seed in (5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample(model, scheduler, 6, seed=5, **options), first)
    assert first.shape == (6, 3, 8, 8) and first.dtype == torch.uint8
    assert len(torch.cat([first, other]).unique(dim=0)) == 12  # in every chunk and for every seed
