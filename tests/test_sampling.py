"""The way from noise to images, with networks whose answers are known in closed form."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_scheduler import T, float64_scheduler, images, noise_like, reference_tables

import train_diffusion
from forward_reverse_process import NoiseScheduler, UNet
from train_diffusion import denoise, guided_noise, sample, sampling_timesteps


@pytest.mark.parametrize("num_timesteps", [2, 7, 50, 1000])
def test_sampling_timesteps_for_every_number_of_steps(num_timesteps):
    for num_steps in range(1, num_timesteps + 1):
        timesteps = sampling_timesteps(num_timesteps, num_steps)
        gaps = -np.diff([*timesteps, -1])
        assert len(timesteps) == num_steps and timesteps[0] == num_timesteps - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1  # they decrease, and evenly
    assert timesteps == list(range(num_timesteps - 1, -1, -1))


# --- guidance -------------------------------------------------------------------------------------


class TwoAnswers:
    """A network with one fixed prediction for labeled images and one for unlabeled ones."""

    num_classes = no_label = 3

    def __init__(self, labeled: torch.Tensor, unlabeled: torch.Tensor) -> None:
        self.labeled, self.unlabeled, self.calls = labeled, unlabeled, []

    def __call__(self, x_t, t, labels=None):
        self.calls.append((x_t, t, labels))
        has_label = torch.zeros(len(x_t)) if labels is None else labels != self.no_label
        copies = (len(x_t) // len(self.labeled), 1, 1, 1)
        answers = self.labeled.repeat(copies), self.unlabeled.repeat(copies)
        return torch.where(has_label.bool().reshape(-1, 1, 1, 1), *answers)


@pytest.mark.parametrize("w", [0.0, 0.1, 1.0, 3.0])
def test_guidance_w_weighs_the_labeled_prediction_with_1_plus_w(w):
    network = TwoAnswers(torch.ones(3, 1, 4, 4), torch.zeros(3, 1, 4, 4))
    guided = guided_noise(network, images().float(), 5, torch.tensor([0, 2, 1]), w)
    torch.testing.assert_close(guided, torch.full((3, 1, 4, 4), 1 + w), rtol=0, atol=0)


@pytest.mark.parametrize("w", [0.0, 0.1, 1.0, 3.0])
def test_guidance_is_equation_6_for_every_image(w):
    labeled, unlabeled = noise_like(images(), 1), noise_like(images(), 2)
    network, labels = TwoAnswers(labeled, unlabeled), torch.tensor([0, 2, 1])
    guided = guided_noise(network, images(), 5, labels, w)
    torch.testing.assert_close(guided, (1 + w) * labeled - w * unlabeled, rtol=0, atol=1e-12)
    unguided = guided_noise(network, images(), 5, None, w)
    torch.testing.assert_close(unguided, unlabeled, rtol=0, atol=0)


def test_guidance_calls_the_network_once_and_on_a_doubled_batch_if_it_has_to():
    x_t, labels = images(), torch.tensor([0, 2, 1])
    network = TwoAnswers(x_t, x_t)
    for given, w in ((labels, 0.5), (labels, 0.0), (None, 0.5)):
        guided_noise(network, x_t, 5, given, w)
    (doubled, t, both), (plain, _, same), (unlabeled, _, nothing) = network.calls
    assert torch.equal(doubled, torch.cat([x_t, x_t])) and t == 5
    assert both.tolist() == [0, 2, 1, 3, 3, 3]
    assert plain is x_t and same is labels and unlabeled is x_t and nothing is None


# --- denoise --------------------------------------------------------------------------------------


class Waves:
    """Says that the noise is a fixed function of x_t, t and the labels, and counts its calls."""

    num_classes, no_label, image_shape = 3, 3, (1, 4, 4)

    def __init__(self) -> None:
        self.visited = []

    def __call__(self, x_t, t, labels=None):
        self.visited.append(t)
        shift = 0 if labels is None else labels.reshape(-1, 1, 1, 1) / 10
        return torch.sin(3 * x_t) + t / 1000 + shift


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 49, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_denoise_calls_the_network_once_per_step_and_ends_on_its_x_0(num_steps, eta, guidance):
    network, x_T, labels = Waves(), noise_like(images(), 31).float(), torch.tensor([0, 2, 1])
    scheduler, timesteps = NoiseScheduler(50), sampling_timesteps(50, num_steps)
    path = list(denoise(network, scheduler, x_T, labels, num_steps, eta, guidance))
    assert network.visited == timesteps
    assert [t for t, _, _ in path] == timesteps + [-1]
    assert torch.equal(path[0][1], x_T)
    assert torch.equal(path[-1][1], path[-2][2]) and torch.equal(path[-1][2], path[-1][1])


def test_denoise_gives_the_labels_and_the_guidance_to_every_step():
    """The path from first step to last, with DDIM's step written out (eq. 12, sigma = 0)."""
    alpha_bar, labels, w = [*reference_tables(50)["alphas_cumprod"], 1.0], torch.arange(3), 0.5
    x, network = noise_like(images(), 31), Waves()
    path = list(denoise(Waves(), float64_scheduler(50), x, labels, 5, 0.0, w))
    for (t, x_t, x_0), (t_prev, *_) in pairwise(path):
        torch.testing.assert_close(x_t, x, rtol=0, atol=1e-9)
        noise = (1 + w) * network(x, t, labels) - w * network(x, t, torch.tensor([3, 3, 3]))
        expected = ((x - math.sqrt(1 - alpha_bar[t]) * noise) / math.sqrt(alpha_bar[t])).clamp(
            -1, 1
        )
        torch.testing.assert_close(x_0, expected, rtol=0, atol=1e-9)
        noise = (x - math.sqrt(alpha_bar[t]) * expected) / math.sqrt(1 - alpha_bar[t])
        x = math.sqrt(alpha_bar[t_prev]) * expected + math.sqrt(1 - alpha_bar[t_prev]) * noise


@pytest.mark.parametrize("num_steps", [0, -1, 51])
def test_denoise_refuses_more_steps_than_there_are_and_fewer_than_one(num_steps):
    with pytest.raises(ValueError, match="num_steps.*1 to 50"):
        next(denoise(Waves(), NoiseScheduler(50), images().float(), num_steps=num_steps))


def test_denoise_records_no_gradients_and_leaves_them_on_for_its_consumer():
    weight = torch.ones(1, requires_grad=True)
    path = denoise(lambda x_t, t, _: weight * x_t, NoiseScheduler(50), images().float())
    for _, x_t, x_0 in path:
        assert torch.is_grad_enabled() and not x_t.requires_grad and not x_0.requires_grad


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    """DDPM written out (clamped x_0, posterior mean and variance), the same noise, every x_t."""
    num_timesteps, tables = 50, reference_tables(50)
    x_T, generator = noise_like(images(), 32), torch.Generator().manual_seed(33)
    noises = [torch.randn(x_T.shape, generator=generator).double() for _ in range(num_timesteps)]

    expected, x = [], x_T
    for t, z in zip(reversed(range(num_timesteps)), noises):
        beta, _, alpha_bar, prev, variance = (table[t] for table in tables.values())
        noise_pred = torch.sin(3 * x) + t / 1000
        x_0 = (x - math.sqrt(1 - alpha_bar) * noise_pred) / math.sqrt(alpha_bar)
        mean = math.sqrt(prev) * beta * x_0.clamp(-1, 1) + math.sqrt(1 - beta) * (1 - prev) * x
        x = mean / (1 - alpha_bar) + math.sqrt(variance) * z
        expected.append(x)

    generator.manual_seed(33)
    path = denoise(Waves(), float64_scheduler(50), x_T, num_steps=50, generator=generator)
    for (_, x_t, _), reference in zip(list(path)[1:], expected, strict=True):
        torch.testing.assert_close(x_t, reference, rtol=0, atol=1e-9)


# --- denoise, for data whose best network is known ------------------------------------------------


def best_noise(x_t, alpha_bar: float, mu, s):
    """E[eps | x_t] if x_0 ~ N(mu, s^2): what a network that has learned all there is would say."""
    variance = alpha_bar * s**2 + 1 - alpha_bar
    return math.sqrt(1 - alpha_bar) * (x_t - math.sqrt(alpha_bar) * mu) / variance


def moments_of_sampling(noise, alpha_bar: list[float], timesteps: list[int], eta: float):
    """Mean and standard deviation that sampling ends with if the predicted noise is a line in x_t.

    Then all is linear and Gaussian: every x_{t_prev} is gain x_t + constant + sigma z.
    """
    mean, variance = 0.0, 1.0
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        now, prev = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else 1.0
        sigma2 = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
        keep = math.sqrt(prev / now)
        push = math.sqrt(max(0, 1 - prev - sigma2)) - keep * math.sqrt(1 - now)
        gain = keep + push * (noise(1.0, now) - noise(0.0, now))
        mean = keep * mean + push * noise(mean, now)
        variance = gain**2 * variance + sigma2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "num_steps, w",
    [(1, 0.0), (2, 0.0), (7, 0.0), (25, 0.0), (50, 0.0), (T, 0.0), (2, 1.0), (25, 1.0)],
)
def test_gaussian_data_come_back_from_the_best_network(schedule, eta, num_steps, w):
    """x_0 ~ N(0.1, 0.2^2) with the label 0, and N(0, 0.3^2) without a label, which is 1 here.

    Mean and deviation are those of the linear recursion, and with all steps those of the data.
    """
    alpha_bar, count = reference_tables(T, schedule)["alphas_cumprod"], 10_000

    def network(x_t, t, labels):
        label = labels.reshape(-1, 1, 1, 1)
        return best_noise(x_t, alpha_bar[t], 0.1 - 0.1 * label, 0.2 + 0.1 * label)

    def guided(x_t, a):
        return (1 + w) * best_noise(x_t, a, 0.1, 0.2) - w * best_noise(x_t, a, 0.0, 0.3)

    network.no_label, labels = 1, torch.zeros(count, dtype=torch.int64)
    scheduler, generator = NoiseScheduler(T, schedule), torch.Generator().manual_seed(34)
    x_T = torch.randn(count, 1, 1, 1, generator=generator)
    *_, (_, x_0, _) = denoise(network, scheduler, x_T, labels, num_steps, eta, w, generator)
    mean, std = moments_of_sampling(guided, alpha_bar, sampling_timesteps(T, num_steps), eta)
    assert x_0.mean().item() == pytest.approx(mean, abs=max(4 * std / math.sqrt(count), 1e-3))
    assert x_0.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count), abs=1e-3)
    if num_steps == T:
        assert mean == pytest.approx(0.1, abs=1e-3) and std == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_label_draws_from_its_class_and_no_label_from_the_mixture(eta):
    """Classes N(-0.4, 0.1^2) and N(0.3, 0.1^2), and the network that is the best for each and both.

    Without a label, E[eps | x_t] weighs the classes with their probabilities given x_t.
    """
    means, s, count = torch.tensor([-0.4, 0.3]).reshape(1, 2, 1, 1), 0.1, 4000
    alpha_bar = reference_tables(T)["alphas_cumprod"]

    def network(x_t, t, labels=None):
        a = alpha_bar[t]
        fit = -((x_t - math.sqrt(a) * means) ** 2) / (2 * (a * s**2 + 1 - a))
        weights = fit.softmax(dim=1)  # [N, 2, 1, 1]
        if labels is not None:
            weights = F.one_hot(labels, 2).reshape(-1, 2, 1, 1)
        return (weights * best_noise(x_t, a, means, s)).sum(dim=1, keepdim=True)

    generator = torch.Generator().manual_seed(35)
    x_T = torch.randn(2 * count, 1, 1, 1, generator=generator)
    options = {"num_steps": T, "eta": eta, "guidance": 0.0, "generator": generator}
    labels = torch.arange(2 * count) % 2
    *_, (_, x_0, _) = denoise(network, NoiseScheduler(T), x_T, labels, **options)
    for label, mean in enumerate((-0.4, 0.3)):
        ours = x_0[labels == label]
        assert ours.mean().item() == pytest.approx(mean, abs=4 * s / math.sqrt(count) + 1e-3)
        assert ours.std().item() == pytest.approx(s, rel=4 / math.sqrt(2 * count) + 0.02)

    *_, (_, x_0, _) = denoise(network, NoiseScheduler(T), x_T, **options)
    std = math.sqrt(s**2 + 0.35**2)
    assert x_0.mean().item() == pytest.approx(-0.05, abs=4 * std / math.sqrt(2 * count) + 1e-3)
    assert x_0.std().item() == pytest.approx(std, rel=0.02)
    share = (x_0 < -0.05).float().mean().item()  # of the first class, half of them
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2 * count))
    assert x_0[x_0 < -0.05].std().item() == pytest.approx(s, rel=4 / math.sqrt(2 * count) + 0.02)


# --- sample ---------------------------------------------------------------------------------------


class Grays:
    """A network that knows one image for each label: its gray level is the label, 0 without one."""

    image_shape = (1, 4, 4)

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
        images = sample(self, self.scheduler, *arguments, num_steps=3, guidance=guidance)
        assert images.dtype == torch.uint8 and images.shape[1:] == (1, 4, 4)
        assert (images == images[:, :1, :1, :1]).all()
        return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("classes, count", [(10, 100), (7, 98), (1, 100), (150, 150), (None, 100)])
def test_sample_draws_full_rows_of_all_classes_in_turn_if_nothing_is_asked_for(classes, count):
    assert Grays(classes).draw() == [i % (classes or 1) for i in range(count)]


def test_sample_draws_the_classes_in_turn_for_any_number_of_images():
    assert Grays(3).draw(5) == [0, 1, 2, 0, 1]
    network = Grays(None)
    assert network.draw(5) == [0] * 5 and network.batches == [None] * 3


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, torch.ByteTensor])
def test_sample_draws_the_labels_that_are_asked_for_in_their_order(kind):
    network = Grays()
    assert network.draw(None, kind([7, 0, 9, 9])) == [7, 0, 9, 9]
    assert network.batches == [[7, 0, 9, 9]] * 3
    assert network.draw(2, kind([4, 5])) == [4, 5]


@pytest.mark.parametrize("guidance", [0, 2])
def test_sample_draws_and_guides_all_images_in_chunks(monkeypatch, guidance):
    monkeypatch.setattr(train_diffusion, "CHUNK", 4)
    network, labels, none = Grays(), [3, 1, 4, 1, 5, 2, 6, 5, 3, 5], [10]
    drawn = network.draw(None, labels, guidance=guidance)
    assert drawn == [(1 + guidance) * label for label in labels]
    chunks = [
        part + none * len(part) * bool(guidance) for part in (labels[:4], labels[4:8], labels[8:])
    ]
    assert network.batches == [chunk for chunk in chunks for _ in range(3)]


@pytest.mark.parametrize("labels", [[0, 10], [-1], [0.5], [1.0], [float("nan")], []])
def test_sample_refuses_labels_that_the_model_does_not_have(labels):
    with pytest.raises(ValueError, match="labels.* 0 to 9"):
        Grays().draw(None, labels)


def test_sample_refuses_labels_for_a_model_without_classes():
    with pytest.raises(ValueError, match="labels.*without labels"):
        Grays(None).draw(None, [0])


@pytest.mark.parametrize("num_samples", [1, 4])
def test_sample_refuses_a_number_of_images_that_is_not_that_of_the_labels(num_samples):
    with pytest.raises(ValueError, match=f"num_samples.* {num_samples} .*3 labels"):
        Grays().draw(num_samples, [0, 1, 2])


@pytest.mark.parametrize("num_classes, eta", [(None, 0.0), (3, 1.0)])
def test_sample_depends_on_its_seed_alone_and_leaves_other_draws_as_they_were(
    monkeypatch, num_classes, eta
):
    monkeypatch.setattr(train_diffusion, "CHUNK", 4)
    scheduler, options = NoiseScheduler(20), {"num_steps": 3, "eta": eta}
    model = UNet(scheduler, (3, 8, 8), base_channels=24, num_classes=num_classes)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample(model, scheduler, 6, seed=5, **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(sample(model, scheduler, 6, seed=5, **options), first)
    other = sample(model, scheduler, 6, seed=6, **options)
    assert first.shape == (6, 3, 8, 8) and first.dtype == torch.uint8
    every = torch.cat([first, other])
    assert len(every.unique(dim=0)) == 12  # other images for another seed, and in every chunk
