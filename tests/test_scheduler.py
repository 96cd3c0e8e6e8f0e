"""The scheduler's mathematics, elementwise, against references that share no code with it."""

import math

import numpy as np
import pytest
import torch

from forward_reverse_process import NoiseScheduler

T = 1000
EDGES = [0, 1, 2, 17, T // 2, T - 2, T - 1]


def reference_tables(num_timesteps: int, schedule: str = "cosine") -> dict[str, list[float]]:
    """Every table from its definition, one number at a time, in Python's own float64."""
    names = ("betas", "alphas", "alphas_cumprod", "alphas_cumprod_prev", "posterior_variance")
    rows, alpha_bar = [], 1.0
    for i in range(num_timesteps):
        if schedule == "cosine":
            u = [(j / num_timesteps + 0.008) / 1.008 for j in (i, i + 1)]
            beta = 1 - math.cos(u[1] * math.pi / 2) ** 2 / math.cos(u[0] * math.pi / 2) ** 2
        else:
            first, last = 0.1 / num_timesteps, 20 / num_timesteps
            beta = first + (last - first) * i / (num_timesteps - 1)
        beta, prev = min(beta, 0.999), alpha_bar
        alpha_bar *= 1 - beta
        rows.append((beta, 1 - beta, alpha_bar, prev, beta * (1 - prev) / (1 - alpha_bar)))
    return dict(zip(names, map(list, zip(*rows))))


def images(batch: int = 3, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * (2 * torch.rand(batch, 1, 4, 4, generator=generator, dtype=torch.float64) - 1)


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


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


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [2, 10, 200, 1000])
def test_every_table_matches_its_definition(schedule, num_timesteps):
    scheduler = NoiseScheduler(num_timesteps, schedule)
    for name, expected in reference_tables(num_timesteps, schedule).items():
        table = getattr(scheduler, name)
        assert table.dtype == torch.float32 and table.shape == (num_timesteps,)
        np.testing.assert_allclose(table.numpy(), expected, rtol=2e-6, err_msg=name)


def test_cosine_schedule_has_the_known_values():
    scheduler = NoiseScheduler(1000)
    assert scheduler.betas[0].item() == pytest.approx(4.128e-5, rel=1e-3)
    assert scheduler.alphas_cumprod[499].item() == pytest.approx(0.4938, rel=1e-4)
    assert scheduler.alphas_cumprod[-2].item() == pytest.approx(2.43e-6, rel=1e-2)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(2.43e-9, rel=1e-2)
    assert (scheduler.betas == torch.tensor(0.999)).sum() == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [2, 10, 50, 200, 1000, 4000])
def test_no_signal_is_left_at_the_end(schedule, num_timesteps):
    alpha_bar = NoiseScheduler(num_timesteps, schedule).alphas_cumprod.double()
    assert (alpha_bar[-1] / (1 - alpha_bar[-1])).item() < 2e-3
    assert (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all() and (alpha_bar < 1).all()


def test_tables_move_with_the_module_and_stay_out_of_state_dicts():
    scheduler = NoiseScheduler(10).to("meta")
    assert {name for name, _ in scheduler.named_buffers()} >= set(reference_tables(10))
    assert all(table.device.type == "meta" for table in scheduler.buffers())
    assert scheduler.state_dict() == {}


@pytest.mark.parametrize("arguments", [(1,), (0,), (-5,), (1000, "quadratic"), (1000, "")])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="num_timesteps|schedule"):
        NoiseScheduler(*arguments)


# --- forward: q(x_t | x_0) ------------------------------------------------------------------------


def test_add_noise_is_the_formula_for_every_image_and_timestep():
    scheduler, alpha_bar = NoiseScheduler(T), reference_tables(T)["alphas_cumprod"]
    x_0 = images(len(EDGES)).float()
    noise = noise_like(x_0, 1)
    x_t, returned = scheduler.add_noise(x_0, torch.tensor(EDGES), noise)
    for i, t in enumerate(EDGES):
        expected = math.sqrt(alpha_bar[t]) * x_0[i] + math.sqrt(1 - alpha_bar[t]) * noise[i]
        torch.testing.assert_close(x_t[i], expected, rtol=0, atol=1e-6)
    assert returned is noise


@pytest.mark.parametrize("t", [0, 300, T - 1])
def test_add_noise_has_the_moments_of_q(t):
    torch.manual_seed(0)
    alpha_bar, count = reference_tables(T)["alphas_cumprod"][t], 200_000
    x_t, noise = NoiseScheduler(T).add_noise(torch.full((count, 1, 1, 1), 0.7), t)
    standard_error = math.sqrt((1 - alpha_bar) / count)
    assert abs(x_t.mean().item() - 0.7 * math.sqrt(alpha_bar)) < 4 * standard_error
    assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=4 * math.sqrt(2 / count))
    assert noise.shape == x_t.shape and abs(noise.var().item() - 1) < 0.02


def test_one_jump_equals_many_small_steps():
    """Mean and variance of q(x_t | x_{t-1}) (DDPM, eq. 2), iterated, are the table's at every t."""
    scheduler = NoiseScheduler(T)
    mean_factor, variance = 1.0, 0.0
    for t, beta in enumerate(reference_tables(T)["betas"]):
        mean_factor, variance = math.sqrt(1 - beta) * mean_factor, (1 - beta) * variance + beta
        signal, noise_std = scheduler.sqrt_alphas_cumprod, scheduler.sqrt_one_minus_alphas_cumprod
        assert signal[t].item() == pytest.approx(mean_factor, rel=1e-6)
        assert noise_std[t].item() == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("t", EDGES)
def test_predict_x0_and_predict_noise_undo_add_noise(scheduler, t):
    x_0 = images()
    x_t, noise = scheduler.add_noise(x_0, t, noise_like(x_0, 2))
    torch.testing.assert_close(scheduler.predict_x0(x_t, t, noise), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(scheduler.predict_noise(x_t, t, x_0), noise, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [-1, T, torch.tensor([0, -1, 3]), torch.tensor([0, T, 3])])
def test_a_timestep_outside_the_schedule_is_an_error_and_does_not_wrap(scheduler, t):
    with pytest.raises((IndexError, RuntimeError)):
        scheduler.add_noise(images(), t)


# --- posterior: q(x_{t-1} | x_t, x_0) -------------------------------------------------------------


def bayes(t: int, t_prev: int, x_t: torch.Tensor, x_0: torch.Tensor) -> tuple[torch.Tensor, float]:
    """q(x_prev | x_t, x_0) by Bayes' rule: prior q(x_prev | x_0), likelihood q(x_t | x_prev).

    Both are Gaussian: precisions add up, and weigh what each of the two says about x_prev.
    """
    alpha_bar = reference_tables(T)["alphas_cumprod"]
    prev, alpha = alpha_bar[t_prev], alpha_bar[t] / alpha_bar[t_prev]  # of the way from prev to t
    precision = 1 / (1 - prev) + alpha / (1 - alpha)
    mean = math.sqrt(prev) * x_0 / (1 - prev) + math.sqrt(alpha) * x_t / (1 - alpha)
    return mean / precision, 1 / precision


@pytest.mark.parametrize("t", EDGES[1:])
def test_posterior_is_bayes_rule(scheduler, t):
    x_0, x_t = images(seed=3), noise_like(images(), 4)
    mean, variance = scheduler.posterior(x_t, t, x_0)
    expected_mean, expected_variance = bayes(t, t - 1, x_t, x_0)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-9)
    assert variance.shape == (1, 1, 1, 1)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-9)


def test_posterior_at_the_first_timestep_is_x_0_itself(scheduler):
    x_0 = images()
    mean, variance = scheduler.posterior(noise_like(x_0, 5), torch.zeros(3, dtype=torch.int64), x_0)
    torch.testing.assert_close(mean, x_0, rtol=0, atol=1e-12)
    assert variance.shape == (3, 1, 1, 1) and (variance == 0).all()


# --- reverse: one step ----------------------------------------------------------------------------


@pytest.mark.parametrize("t", EDGES)
def test_ancestral_step_without_clamp_is_algorithm_2(scheduler, t):
    table = {name: values[t] for name, values in reference_tables(T).items()}
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (6, 7, 8))
    mean = x_t - table["betas"] / math.sqrt(1 - table["alphas_cumprod"]) * noise_pred
    expected = mean / math.sqrt(table["alphas"]) + math.sqrt(table["posterior_variance"]) * z
    result = scheduler.step(x_t, t, noise_pred, noise=z, clamp=False)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", EDGES)
def test_ancestral_step_draws_from_the_posterior_of_the_clamped_x_0(scheduler, t):
    x_t, z, noise_pred = (noise_like(images(), seed) for seed in (9, 11, 10))
    x_0_pred = scheduler.predict_x0(x_t, t, 3 * noise_pred)
    assert t < 17 or (x_0_pred.abs() > 1).any(), "the clamp must have something to do"
    mean, variance = scheduler.posterior(x_t, t, x_0_pred.clamp(-1, 1))
    result = scheduler.step(x_t, t, 3 * noise_pred, noise=z)
    torch.testing.assert_close(result, mean + variance.sqrt() * z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_last_step_adds_no_noise_and_returns_the_clamped_x_0(scheduler, eta):
    x_t, noise_pred = noise_like(images(), 12), noise_like(images(), 13)
    for t in (0, 19, T - 1):
        expected = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
        for z in (noise_like(x_t, 14), noise_like(x_t, 15)):
            result = scheduler.step(x_t, t, noise_pred, t_prev=-1, eta=eta, noise=z)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("t, t_prev", [(T - 1, 900), (500, 480), (20, 0), (1, 0), (999, 0)])
def test_skipping_steps_at_eta_1_is_bayes_rule_over_the_whole_jump(scheduler, t, t_prev):
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (16, 17, 18))
    x_0 = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
    mean, variance = bayes(t, t_prev, x_t, x_0)
    result = scheduler.step(x_t, t, noise_pred, t_prev, noise=z)
    torch.testing.assert_close(result, mean + math.sqrt(variance) * z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t, t_prev", [(T - 1, 900), (500, 480), (20, 0), (1, 0)])
def test_eta_0_moves_along_the_line_from_noise_to_image(scheduler, t, t_prev):
    """DDIM, eq. 12 with sigma = 0: the same x_0 and noise, mixed anew; fresh noise has no say."""
    alpha_bar = reference_tables(T)["alphas_cumprod"][t_prev]
    x_0 = images(scale=0.9)
    x_t, noise = scheduler.add_noise(x_0, t, noise_like(x_0, 19))
    expected = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise
    for z in (noise_like(x_t, 20), noise_like(x_t, 21)):
        result = scheduler.step(x_t, t, noise, t_prev, eta=0.0, noise=z)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_eta_scales_the_fresh_noise(scheduler):
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (22, 23, 24))

    def spread(eta: float) -> torch.Tensor:
        ends = [scheduler.step(x_t, 500, noise_pred, 480, eta, noise) for noise in (z, 0 * z)]
        return ends[0] - ends[1]

    torch.testing.assert_close(spread(0.25), 0.25 * spread(1.0), rtol=0, atol=1e-12)
    assert spread(1.0).abs().min() > 0


def test_fresh_noise_that_is_not_given_is_drawn(scheduler):
    x_t, noise_pred = noise_like(images(), 22), noise_like(images(), 23)
    torch.manual_seed(24)
    z = torch.randn(x_t.shape, dtype=x_t.dtype)
    torch.manual_seed(24)
    drawn = scheduler.step(x_t, 500, noise_pred)
    torch.testing.assert_close(drawn, scheduler.step(x_t, 500, noise_pred, noise=z), rtol=0, atol=0)


def test_every_image_of_a_batch_may_be_at_its_own_timestep(scheduler):
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (25, 26, 27))
    t, t_prev = torch.tensor([0, 400, T - 1]), torch.tensor([-1, 399, 17])
    together = scheduler.step(x_t, t, noise_pred, t_prev, 0.5, z)
    for i, (now, prev) in enumerate(zip(t.tolist(), t_prev.tolist())):
        alone = scheduler.step(x_t[[i]], now, noise_pred[[i]], prev, 0.5, z[[i]])
        torch.testing.assert_close(together[[i]], alone, rtol=0, atol=0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(scheduler, eta):
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(images(), 5, images(), eta=eta)


@pytest.mark.parametrize(
    "t, t_prev",
    [(5, 5), (5, 6), (5, -2), (torch.tensor([5, 5, 5]), torch.tensor([4, 5, 4]))],
)
def test_a_step_that_does_not_go_back_is_refused(scheduler, t, t_prev):
    with pytest.raises(ValueError, match="t_prev"):
        scheduler.step(images(), t, images(), t_prev)


def test_a_float32_step_is_as_good_as_a_float64_one(scheduler):
    """What holds above holds in the precision that is used, to a twentieth of a gray level."""
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (28, 29, 30))
    for t in EDGES:
        exact = scheduler.step(x_t, t, noise_pred, noise=z)
        rounded = NoiseScheduler(T).step(x_t.float(), t, noise_pred.float(), noise=z.float())
        torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=0.05 / 127.5)
