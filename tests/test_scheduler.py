"""The scheduler's mathematics, elementwise, against references that share no code with it.

Most tests hold a batch of T images, the i-th at timestep i: so a formula is compared at every t.
"""

import math

import pytest
import torch
from torch import Tensor

from forward_reverse_process import NoiseScheduler

T = 1000
EVERY_T = torch.arange(T)


def reference_tables(num_timesteps: int, schedule: str = "cosine") -> dict[str, Tensor]:
    """Every table from its definition, one number at a time, in Python's own float64."""
    names = ("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance")
    rows, alpha_bar = [], 1.0
    for i in range(num_timesteps):
        if schedule == "cosine":
            u = [(j / num_timesteps + 0.008) / 1.008 for j in (i, i + 1)]
            beta = 1 - math.cos(u[1] * math.pi / 2) ** 2 / math.cos(u[0] * math.pi / 2) ** 2
        else:
            beta = (0.1 + 19.9 * i / (num_timesteps - 1)) / num_timesteps
        beta = min(beta, 0.999)
        prev, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        rows.append((beta, 1 - beta, alpha_bar, prev, beta * (1 - prev) / (1 - alpha_bar)))
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).T))


# One row for each image of a batch [T, 1, 2, 2].
BETA, ALPHA, ALPHA_BAR, _, POSTERIOR_VARIANCE = (
    table.reshape(T, 1, 1, 1) for table in reference_tables(T).values()
)
X_T, NOISE, NOISE_PRED, Z = torch.randn(
    4, T, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
X_0 = torch.linspace(-1, 1, 4 * T, dtype=torch.float64).reshape(T, 1, 2, 2)


def float64_scheduler(*arguments) -> NoiseScheduler:
    """With float64 tables, so that tolerances judge the formulas and not float32."""
    torch.set_default_dtype(torch.float64)
    try:
        return NoiseScheduler(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def scheduler() -> NoiseScheduler:
    return float64_scheduler(T)


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-9, rtol: float = 0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [2, 10, 50, 200, 1000, 4000])
def test_every_table_is_its_definition_and_no_signal_is_left_at_the_end(schedule, num_timesteps):
    scheduler = NoiseScheduler(num_timesteps, schedule)
    for name, expected in reference_tables(num_timesteps, schedule).items():
        assert_same(getattr(scheduler, name), expected.float(), rtol=2e-6, atol=0)
    alpha_bar = scheduler.alphas_cumprod
    assert (alpha_bar > 0).all() and (alpha_bar.diff() < 0).all() and alpha_bar[-1] < 2e-3


def test_tables_move_with_the_module_and_stay_out_of_state_dicts():
    scheduler = NoiseScheduler(10).to("meta")
    assert {name for name, _ in scheduler.named_buffers()} >= set(reference_tables(10))
    assert all(table.device.type == "meta" for table in scheduler.buffers())
    assert scheduler.state_dict() == {}


# --- forward: q(x_t | x_0) ------------------------------------------------------------------------


def test_add_noise_is_equation_4_and_predict_x0_and_predict_noise_undo_it(scheduler):
    x_t, noise = scheduler.add_noise(X_0, EVERY_T, NOISE)
    assert_same(x_t, ALPHA_BAR.sqrt() * X_0 + (1 - ALPHA_BAR).sqrt() * NOISE)
    assert noise is NOISE
    assert_same(scheduler.predict_x0(x_t, EVERY_T, NOISE), X_0)
    assert_same(scheduler.predict_noise(x_t, EVERY_T, X_0), NOISE)


def test_noise_that_is_not_given_is_drawn_and_a_step_goes_to_t_minus_1(scheduler):
    torch.manual_seed(0)
    x_t, noise = scheduler.add_noise(X_0, 300)
    x_prev = scheduler.step(X_T, 500, NOISE_PRED)
    torch.manual_seed(0)
    assert_same(noise, torch.randn(X_0.shape, dtype=torch.float64), atol=0)
    assert_same(x_t, scheduler.add_noise(X_0, 300, noise)[0], atol=0)
    z = torch.randn(X_T.shape, dtype=torch.float64)
    assert_same(x_prev, scheduler.step(X_T, 500, NOISE_PRED, 499, noise=z), atol=0)


def test_one_jump_equals_many_small_steps(scheduler):
    """Mean and variance of q(x_t | x_{t-1}) (DDPM, eq. 2), iterated, are the tables' at every t."""
    factor, variance, small_steps = 1.0, 0.0, []
    for beta in BETA.flatten().tolist():
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        small_steps.append((factor, math.sqrt(variance)))
    jumps = scheduler.sqrt_alphas_cumprod, scheduler.sqrt_one_minus_alphas_cumprod
    assert_same(torch.stack(jumps, dim=1), torch.tensor(small_steps, dtype=torch.float64))


# --- posterior: q(x_{t-1} | x_t, x_0) -------------------------------------------------------------


def bayes(t: Tensor, t_prev: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """q(x_prev | x_t, x_0) by Bayes' rule: prior q(x_prev | x_0), likelihood q(x_t | x_prev).

    Both are Gaussian: precisions add up, and weigh what each of the two says about x_prev.
    """
    prev = ALPHA_BAR[t_prev]
    alpha = ALPHA_BAR[t] / prev  # of the way from prev to t
    precision = 1 / (1 - prev) + alpha / (1 - alpha)
    mean = prev.sqrt() * x_0 / (1 - prev) + alpha.sqrt() * X_T[t] / (1 - alpha)
    return mean / precision, 1 / precision


def test_the_posterior_is_bayes_rule_and_at_the_first_timestep_x_0_itself(scheduler):
    mean, variance = scheduler.posterior(X_T, EVERY_T, X_0)
    expected_mean, expected_variance = bayes(EVERY_T[1:], EVERY_T[:-1], X_0[1:])
    assert_same(mean[1:], expected_mean)
    assert_same(variance[1:], expected_variance, rtol=1e-9, atol=0)
    assert_same(mean[0], X_0[0])
    assert variance.shape == (T, 1, 1, 1) and variance[0] == 0


# --- reverse: one step ----------------------------------------------------------------------------


def test_an_ancestral_step_without_clamp_is_algorithm_2(scheduler):
    mean = (X_T - BETA / (1 - ALPHA_BAR).sqrt() * NOISE_PRED) / ALPHA.sqrt()
    result = scheduler.step(X_T, EVERY_T, NOISE_PRED, noise=Z, clamp=False)
    assert_same(result, mean + POSTERIOR_VARIANCE.sqrt() * Z)


def ddim_step(now: Tensor, prev: Tensor, x_t: Tensor, x_0: Tensor, eta: float, z: Tensor) -> Tensor:
    """DDIM, eq. 12 and 16, from where alpha-bar is `now` to where it is `prev`."""
    noise = (x_t - now.sqrt() * x_0) / (1 - now).sqrt()  # so that it makes up x_t together with x_0
    sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)).sqrt()
    return prev.sqrt() * x_0 + (1 - prev - sigma**2).sqrt() * noise + sigma * z


@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("back", [lambda t: t - 1, lambda t: t // 2, lambda t: 0 * t])
def test_a_step_is_ddims_with_a_clamped_x_0_and_at_eta_1_ddpms(scheduler, eta, back):
    """Over any jump. DDPM draws from the posterior, with the predicted x_0 in it."""
    t = EVERY_T[1:]
    x_t, noise_pred, z, t_prev = X_T[t], NOISE_PRED[t], Z[t], back(t)
    x_0 = (x_t - (1 - ALPHA_BAR[t]).sqrt() * noise_pred) / ALPHA_BAR[t].sqrt()
    assert (x_0.abs() > 1).any(), "the clamp must have something to do"
    result = scheduler.step(x_t, t, noise_pred, t_prev, eta, z)
    x_0 = x_0.clamp(-1, 1)
    assert_same(result, ddim_step(ALPHA_BAR[t], ALPHA_BAR[t_prev], x_t, x_0, eta, z))
    if eta == 1:
        mean, variance = bayes(t, t_prev, x_0)
        assert_same(result, mean + variance.sqrt() * z)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_to_the_clean_image_adds_no_noise_and_returns_the_clamped_x_0(scheduler, eta):
    x_0 = scheduler.predict_x0(X_T, EVERY_T, NOISE_PRED).clamp(-1, 1)
    assert_same(scheduler.step(X_T, EVERY_T, NOISE_PRED, 0 * EVERY_T - 1, eta, Z), x_0, atol=0)
    assert_same(scheduler.step(X_T, 0, NOISE_PRED, eta=eta)[0], x_0[0], atol=0)


def test_an_int_is_that_timestep_for_every_image(scheduler):
    """Whether a batch is at one timestep or each image at its own, an image gets the same."""
    t, t_prev = torch.tensor([0, 400, T - 1]), torch.tensor([-1, 399, 17])
    x_t, noise_pred, z = X_T[:3], NOISE_PRED[:3], Z[:3]
    together = scheduler.step(x_t, t, noise_pred, t_prev, 0.5, z)
    for i in range(3):
        alone = scheduler.step(x_t, t[i].item(), noise_pred, t_prev[i].item(), 0.5, z)
        assert_same(alone[i], together[i], atol=0)


def test_a_float32_step_is_as_good_as_a_float64_one(scheduler):
    """What holds above holds in the precision that is used, to a twentieth of a gray level."""
    exact = scheduler.step(X_T, EVERY_T, NOISE_PRED, noise=Z)
    rounded = NoiseScheduler(T).step(X_T.float(), EVERY_T, NOISE_PRED.float(), noise=Z.float())
    assert_same(rounded.double(), exact, atol=0.05 / 127.5)


def test_what_makes_no_sense_is_refused(scheduler):
    for arguments in ((1,), (0,), (-5,), (T, "quadratic"), (T, "")):
        with pytest.raises(ValueError, match="^(num_timesteps|schedule) must"):
            NoiseScheduler(*arguments)
    for t in (-1, T, torch.tensor([0, -1, 3]), torch.tensor([0, T, 3])):
        with pytest.raises((IndexError, RuntimeError)):  # -1 is not the last timestep
            scheduler.add_noise(X_0[:3], t)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="^eta must"):
            scheduler.step(X_T, 5, NOISE_PRED, eta=eta)
    for t_prev in (5, 6, -2, torch.tensor([4, 5, 4])):
        for t in (5, torch.tensor([5, 5, 5])):
            with pytest.raises(ValueError, match="^t_prev must"):
                scheduler.step(X_T[:3], t, NOISE_PRED[:3], t_prev)
