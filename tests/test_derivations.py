"""What docs/derivations.md derives, by numbers. Its other tests are in test_scheduler.py."""

import math
import re

import pytest
import torch
from conftest import ROOT
from test_scheduler import (
    ALPHA_BAR,
    EVERY_T,
    NOISE,
    X_0,
    X_T,
    T,
    Z,
    assert_same,
    float64_scheduler,
    reference_tables,
)
from torch import Tensor

from forward_reverse_process import NoiseScheduler

PAGE = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scheduler() -> NoiseScheduler:
    return float64_scheduler(T)


def test_a_step_leaves_out_the_variance_of_the_predicted_x_0(scheduler):
    """x_0 ~ N(0, v): then x_{t-1} and x_t are Gaussian too, and Var(x_{t-1} | x_t) is known.

    It is the posterior's variance plus c^2 Var(x_0 | x_t), at every t > 0.
    """
    v, t = 0.3, EVERY_T[1:]
    now, prev, alpha = ALPHA_BAR[t], ALPHA_BAR[t - 1], ALPHA_BAR[t] / ALPHA_BAR[t - 1]
    total, total_prev = now * v + 1 - now, prev * v + 1 - prev  # variances of x_t and x_{t-1}
    covariance = alpha.sqrt() * total_prev  # of x_{t-1} and x_t
    expected = total_prev - covariance**2 / total
    variance_of_x_0 = v - now * v**2 / total
    _, variance = scheduler.posterior(X_T[t], t, X_0[t])
    zero, one = torch.zeros_like(X_0[t]), torch.ones_like(X_0[t])
    c = (scheduler.posterior(zero, t, one)[0] - scheduler.posterior(zero, t, zero)[0])[:, :, :1, :1]
    assert_same(variance + c**2 * variance_of_x_0, expected)
    bound = (1 - alpha) ** 2 / (alpha * (1 - now))
    assert (c**2 * variance_of_x_0 <= bound + 1e-12).all()
    best_x_0 = now.sqrt() * v / total * X_T[t]  # the mean of x_0 given x_t
    mean, _ = scheduler.posterior(X_T[t], t, best_x_0)
    assert_same(mean, covariance / total * X_T[t])


def bound_weight(schedule: str) -> Tensor:
    """beta / (2 alpha (1 - alpha-bar_{t-1})), [T - 1], for t = 1 ... T - 1."""
    table = reference_tables(T, schedule)
    return (table["betas"] / (2 * table["alphas"] * (1 - table["alphas_cumprod_prev"])))[1:]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_bounds_weight_is_that_of_the_posteriors_means(schedule):
    """KL divergence of two posteriors, one with the predicted x_0, over the noise's error."""
    scheduler, t = float64_scheduler(T, schedule), EVERY_T[1:]
    x_t, noise = scheduler.add_noise(X_0[t], t, NOISE[t])
    noise_pred = noise + 0.1 * Z[t]
    mean, variance = scheduler.posterior(x_t, t, X_0[t])
    mean_pred, _ = scheduler.posterior(x_t, t, scheduler.predict_x0(x_t, t, noise_pred))
    divergence = (mean - mean_pred) ** 2 / (2 * variance)
    expected = bound_weight(schedule).reshape(-1, 1, 1, 1) * (noise - noise_pred) ** 2
    torch.testing.assert_close(divergence, expected, rtol=1e-6, atol=0)
    (row,) = re.findall(rf"\| {schedule} schedule \| (.*) \|", PAGE)
    shown = [1, 10, 100, 500, 900, 990, 999]
    assert f"| t | {' | '.join(map(str, shown))} |" in PAGE
    weights = [float(f"{bound_weight(schedule)[t - 1].item():.2g}") for t in shown]
    assert [float(cell) for cell in row.split(" | ")] == weights


def test_the_mean_noise_is_the_score(scheduler):
    """x_0 is one of three numbers: log q(x_t) by its formula, its gradient by autograd."""
    numbers, chances = torch.tensor([-0.8, 0.1, 0.6]).double(), torch.tensor([0.5, 0.2, 0.3])
    x_t = X_T.flatten(1).clone().requires_grad_()  # [T, 4]
    alpha_bar = ALPHA_BAR.reshape(T, 1, 1)
    normal = torch.distributions.Normal(alpha_bar.sqrt() * numbers, (1 - alpha_bar).sqrt())
    logs = normal.log_prob(x_t[:, :, None]) + chances.double().log()  # of q(x_t, x_0), [T, 4, 3]
    (score,) = torch.autograd.grad(logs.logsumexp(dim=2).sum(), x_t)
    mean_x_0 = (logs.softmax(dim=2) * numbers).sum(dim=2).detach()
    mean_noise = scheduler.predict_noise(X_T, EVERY_T, mean_x_0.view_as(X_T))
    expected = -(1 - ALPHA_BAR).sqrt() * score.view_as(X_T)
    torch.testing.assert_close(mean_noise, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("back", [lambda t: t - 1, lambda t: t // 3, lambda t: 0 * t])
def test_true_noise_leaves_every_jump_with_the_right_amount_of_noise(scheduler, eta, back):
    """x_s is sqrt(alpha-bar_s) x_0 + a eps + b z with a^2 + b^2 = 1 - alpha-bar_s, for all eta."""
    t, x_0 = EVERY_T[1:], torch.zeros(T - 1, 1, 2, 2, dtype=torch.float64)

    def jump(x_0: Tensor, noise: Tensor, z: Tensor) -> Tensor:
        x_t, _ = scheduler.add_noise(x_0, t, noise)
        return scheduler.step(x_t, t, noise, back(t), eta, z)

    one, zero = x_0 + 1, x_0
    image, old, fresh = jump(one, zero, zero), jump(zero, one, zero), jump(zero, zero, one)
    target = ALPHA_BAR[back(t)].expand_as(x_0)
    assert_same(image, target.sqrt())
    assert_same(old**2 + fresh**2, 1 - target)
    assert (fresh > 0).all() if eta else (fresh == 0).all()


@pytest.mark.parametrize("t, t_prev", [(999, 959), (700, 300), (40, 39), (20, -1)])
def test_a_step_without_fresh_noise_is_a_rotation_and_flow_matchings_euler_step(
    scheduler, t, t_prev
):
    x_t, v = X_T[:8], NOISE[:8]
    now, prev = (math.acos(math.sqrt(ALPHA_BAR[i].item())) if i >= 0 else 0.0 for i in (t, t_prev))
    noise_pred = math.sin(now) * x_t + math.cos(now) * v
    result = scheduler.step(x_t, t, noise_pred, t_prev, eta=0, clamp=False)
    assert_same(result, math.cos(prev - now) * x_t + math.sin(prev - now) * v, atol=1e-10)

    def to_flow(angle: float) -> tuple[float, float]:
        """The factor of x, and how far along the straight path from image to noise."""
        length = math.cos(angle) + math.sin(angle)
        return 1 / length, math.sin(angle) / length

    (factor, r), (factor_prev, r_prev) = to_flow(now), to_flow(prev)
    x_0_pred = scheduler.predict_x0(x_t, t, noise_pred)
    euler = factor * x_t + (r_prev - r) * (noise_pred - x_0_pred)
    assert_same(factor_prev * result, euler, atol=1e-10)


def test_every_derivation_names_tests_that_are_there():
    """Each of the eight sections ends with them."""
    there = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section.split(".")[0] for section in sections] == [str(i) for i in range(1, 9)]
    for section in sections:
        *_, last = section.strip().split("\n\n")
        assert last.startswith("*Test"), section[:40]
        for name in re.findall(r"`(test_\w+)`", last):
            assert f"def {name}(" in there, name
