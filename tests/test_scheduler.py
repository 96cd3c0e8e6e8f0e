"""The scheduler's mathematics, elementwise, against references that share no code with it."""

import math

import numpy as np
import pytest
import torch

from forward_reverse_process import NoiseScheduler
from train_diffusion import denoise, predict_guided, sampling_timesteps

T = 1000
EDGES = [0, 1, 2, 17, T // 2, T - 2, T - 1]


def reference_tables(num_timesteps: int, schedule: str) -> dict[str, list[float]]:
    """Every table from its definition, one number at a time, in Python's own float64."""
    alpha_bar, tables = (
        1.0,
        {"betas": [], "alphas": [], "alphas_cumprod": [], "alphas_cumprod_prev": [], "posterior_variance": []},
    )
    for i in range(num_timesteps):
        if schedule == "cosine":
            curve = [math.cos((j / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for j in (i, i + 1)]
            beta = 1 - curve[1] / curve[0]
        else:
            first, last = 0.1 / num_timesteps, 20 / num_timesteps
            beta = first + (last - first) * i / (num_timesteps - 1)
        beta = min(beta, 0.999)
        tables["betas"].append(beta)
        tables["alphas"].append(1 - beta)
        tables["alphas_cumprod_prev"].append(alpha_bar)
        tables["posterior_variance"].append(beta * (1 - alpha_bar) / (1 - alpha_bar * (1 - beta)))
        alpha_bar *= 1 - beta
        tables["alphas_cumprod"].append(alpha_bar)
    return tables


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


# --- tables --------------------------------------------------------------------------------------------------------------


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
    assert scheduler.alphas_cumprod[-2].item() == pytest.approx(2.43e-6, rel=1e-2)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(2.43e-9, rel=1e-2)
    assert (scheduler.betas == torch.tensor(0.999)).sum() == 1


def test_cosine_curve_is_not_the_squareless_or_the_t_point_one():
    alpha_bar = NoiseScheduler(1000).alphas_cumprod
    half_way = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert alpha_bar[499].item() == pytest.approx(half_way, rel=1e-6)  # t = 499 ends the 500th step


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_timesteps", [2, 10, 50, 200, 1000, 4000])
def test_no_signal_is_left_at_the_end(schedule, num_timesteps):
    alpha_bar = NoiseScheduler(num_timesteps, schedule).alphas_cumprod.double()
    assert (alpha_bar[-1] / (1 - alpha_bar[-1])).item() < 2e-3
    assert (alpha_bar.diff() < 0).all() and (alpha_bar > 0).all() and (alpha_bar < 1).all()


def test_tables_move_with_the_module_and_stay_out_of_state_dicts():
    scheduler = NoiseScheduler(10).to("meta")
    assert {name for name, _ in scheduler.named_buffers()} >= {"betas", "alphas", "alphas_cumprod", "posterior_variance"}
    assert all(table.device.type == "meta" for table in scheduler.buffers())
    assert scheduler.state_dict() == {}


@pytest.mark.parametrize("arguments", [(1,), (0,), (-5,), (1000, "quadratic"), (1000, "")])
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="num_timesteps|schedule"):
        NoiseScheduler(*arguments)


# --- forward: q(x_t | x_0) -----------------------------------------------------------------------------------------------


def test_add_noise_is_the_formula_for_every_image_and_timestep():
    scheduler, alpha_bar = NoiseScheduler(T), reference_tables(T, "cosine")["alphas_cumprod"]
    x_0, t = images(len(EDGES)).float(), torch.tensor(EDGES)
    noise = noise_like(x_0, 1)
    x_t, returned = scheduler.add_noise(x_0, t, noise)
    for i, step in enumerate(EDGES):
        expected = math.sqrt(alpha_bar[step]) * x_0[i].double() + math.sqrt(1 - alpha_bar[step]) * noise[i].double()
        torch.testing.assert_close(x_t[i].double(), expected, rtol=0, atol=1e-6)
    assert returned is noise


@pytest.mark.parametrize("t", [0, 300, T - 1])
def test_add_noise_has_the_moments_of_q(t):
    torch.manual_seed(0)
    alpha_bar = reference_tables(T, "cosine")["alphas_cumprod"][t]
    x_t, noise = NoiseScheduler(T).add_noise(torch.full((200_000, 1, 1, 1), 0.7), t)
    standard_error = math.sqrt((1 - alpha_bar) / 200_000)
    assert abs(x_t.mean().item() - 0.7 * math.sqrt(alpha_bar)) < 4 * standard_error
    assert x_t.var().item() == pytest.approx(1 - alpha_bar, rel=4 * math.sqrt(2 / 200_000))
    assert noise.shape == x_t.shape and abs(noise.var().item() - 1) < 0.02


def test_one_jump_equals_many_small_steps():
    """Iterate q(x_t | x_{t-1}) (DDPM, eq. 2) on mean and variance; each must land on the table at every t."""
    scheduler = NoiseScheduler(T)
    mean_factor, variance = 1.0, 0.0
    for t, beta in enumerate(reference_tables(T, "cosine")["betas"]):
        mean_factor, variance = math.sqrt(1 - beta) * mean_factor, (1 - beta) * variance + beta
        assert scheduler.sqrt_alphas_cumprod[t].item() == pytest.approx(mean_factor, rel=1e-6)
        assert scheduler.sqrt_one_minus_alphas_cumprod[t].item() == pytest.approx(math.sqrt(variance), rel=1e-6)


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


# --- posterior: q(x_{t-1} | x_t, x_0) ------------------------------------------------------------------------------------


def bayes(alpha_bar_t: float, alpha_bar_prev: float, x_0: torch.Tensor, x_t: torch.Tensor):
    """q(x_prev | x_t, x_0) from Bayes' rule: prior q(x_prev | x_0) times likelihood q(x_t | x_prev), both Gaussian."""
    alpha = alpha_bar_t / alpha_bar_prev  # of the whole way from prev to t
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (math.sqrt(alpha_bar_prev) * x_0 / (1 - alpha_bar_prev) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", EDGES[1:])
def test_posterior_is_bayes_rule(scheduler, t):
    alpha_bar = reference_tables(T, "cosine")["alphas_cumprod"]
    x_0, x_t = images(seed=3), noise_like(images(), 4)
    mean, variance = scheduler.posterior(x_0, x_t, t)
    expected_mean, expected_variance = bayes(alpha_bar[t], alpha_bar[t - 1], x_0, x_t)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-9)
    assert variance.shape == (1, 1, 1, 1) and variance.item() == pytest.approx(expected_variance, rel=1e-9)


def test_posterior_at_the_first_timestep_is_x_0_itself(scheduler):
    x_0 = images()
    mean, variance = scheduler.posterior(x_0, noise_like(x_0, 5), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(mean, x_0, rtol=0, atol=1e-12)
    assert variance.shape == (3, 1, 1, 1) and (variance == 0).all()


# --- reverse: one step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", EDGES)
def test_ancestral_step_without_clamp_is_algorithm_2(scheduler, t):
    table = {name: values[t] for name, values in reference_tables(T, "cosine").items()}
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (6, 7, 8))
    mean = (x_t - table["betas"] / math.sqrt(1 - table["alphas_cumprod"]) * noise_pred) / math.sqrt(table["alphas"])
    expected = mean + math.sqrt(table["posterior_variance"]) * z
    result = scheduler.step(noise_pred, t, x_t, noise=z, clamp=False)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", EDGES)
def test_ancestral_step_draws_from_the_posterior_of_the_clamped_x_0(scheduler, t):
    x_t, noise_pred, z = noise_like(images(), 9), 3 * noise_like(images(), 10), noise_like(images(), 11)
    x_0_pred = scheduler.predict_x0(x_t, t, noise_pred)
    assert t < 17 or (x_0_pred.abs() > 1).any(), "the clamp must have something to do"
    mean, variance = scheduler.posterior(x_0_pred.clamp(-1, 1), x_t, t)
    torch.testing.assert_close(scheduler.step(noise_pred, t, x_t, noise=z), mean + variance.sqrt() * z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_last_step_adds_no_noise_and_returns_the_clamped_x_0(scheduler, eta):
    x_t, noise_pred = noise_like(images(), 12), noise_like(images(), 13)
    for t in (0, 19, T - 1):
        expected = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
        for seed in (14, 15):
            result = scheduler.step(noise_pred, t, x_t, t_prev=-1, eta=eta, noise=noise_like(x_t, seed))
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("t, t_prev", [(T - 1, 900), (500, 480), (20, 0), (1, 0), (999, 0)])
def test_skipping_steps_at_eta_1_is_bayes_rule_over_the_whole_jump(scheduler, t, t_prev):
    alpha_bar = reference_tables(T, "cosine")["alphas_cumprod"]
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (16, 17, 18))
    x_0 = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
    mean, variance = bayes(alpha_bar[t], alpha_bar[t_prev], x_0, x_t)
    result = scheduler.step(noise_pred, t, x_t, t_prev, noise=z)
    torch.testing.assert_close(result, mean + math.sqrt(variance) * z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("t, t_prev", [(T - 1, 900), (500, 480), (20, 0), (1, 0)])
def test_eta_0_moves_along_the_line_from_noise_to_image(scheduler, t, t_prev):
    """DDIM eq. 12 with sigma = 0: the same x_0 and the same noise, mixed anew; the fresh noise has no say."""
    alpha_bar = reference_tables(T, "cosine")["alphas_cumprod"]
    x_0 = images(scale=0.9)
    x_t, noise = scheduler.add_noise(x_0, t, noise_like(x_0, 19))
    expected = math.sqrt(alpha_bar[t_prev]) * x_0 + math.sqrt(1 - alpha_bar[t_prev]) * noise
    for seed in (20, 21):
        result = scheduler.step(noise, t, x_t, t_prev, eta=0.0, noise=noise_like(x_t, seed))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_eta_scales_the_fresh_noise(scheduler):
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (22, 23, 24))

    def spread(eta: float) -> torch.Tensor:
        return scheduler.step(noise_pred, 500, x_t, 480, eta, z) - scheduler.step(noise_pred, 500, x_t, 480, eta, 0 * z)

    torch.testing.assert_close(spread(0.25), 0.25 * spread(1.0), rtol=0, atol=1e-12)
    assert spread(1.0).abs().min() > 0


def test_every_image_of_a_batch_may_be_at_its_own_timestep(scheduler):
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (25, 26, 27))
    t, t_prev = torch.tensor([0, 400, T - 1]), torch.tensor([-1, 399, 17])
    together = scheduler.step(noise_pred, t, x_t, t_prev, 0.5, z)
    for i in range(3):
        one = slice(i, i + 1)
        alone = scheduler.step(noise_pred[one], t[i].item(), x_t[one], t_prev[i].item(), 0.5, z[one])
        torch.testing.assert_close(together[one], alone, rtol=0, atol=0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(scheduler, eta):
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(images(), 5, images(), eta=eta)


@pytest.mark.parametrize("t, t_prev", [(5, 5), (5, 6), (5, -2), (torch.tensor([5, 5, 5]), torch.tensor([4, 5, 4]))])
def test_a_step_that_does_not_go_back_is_refused(scheduler, t, t_prev):
    with pytest.raises(ValueError, match="t_prev"):
        scheduler.step(images(), t, images(), t_prev)


def test_a_float32_step_is_as_good_as_a_float64_one(scheduler):
    """Everything above holds in the precision that is really used, at the edges too: to a twentieth of a grey level."""
    x_t, noise_pred, z = (noise_like(images(), seed) for seed in (28, 29, 30))
    for t in EDGES:
        exact = scheduler.step(noise_pred, t, x_t, noise=z)
        rounded = NoiseScheduler(T).step(noise_pred.float(), t, x_t.float(), noise=z.float())
        torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=0.05 / 127.5)


# --- reverse: the whole way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_timesteps", [2, 7, 50, 1000])
def test_sampling_timesteps_for_every_number_of_steps(num_timesteps):
    for num_steps in range(1, num_timesteps + 1):
        timesteps = sampling_timesteps(num_timesteps, num_steps)
        assert len(timesteps) == num_steps and timesteps[0] == num_timesteps - 1 and timesteps[-1] >= 0
        assert all(later > earlier for later, earlier in zip(timesteps, timesteps[1:]))
    assert timesteps == list(range(num_timesteps - 1, -1, -1))


class FakeNetwork:
    """Says that the noise is a fixed function of x_t and t, and counts its calls."""

    def __init__(self):
        self.visited = []

    def __call__(self, x_t, t):
        self.visited.append(t[0].item())
        assert t.shape == (len(x_t),) and (t == t[0]).all()
        return torch.sin(3 * x_t) + t[0] / 1000


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 49, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_without_guidance_calls_the_network_once_per_step_and_ends_on_its_x_0(num_steps, eta):
    network, scheduler, x_T = FakeNetwork(), NoiseScheduler(50), noise_like(images(), 31).float()
    timesteps = sampling_timesteps(50, num_steps)
    path = list(denoise(network, scheduler, x_T, timesteps, eta, 0.0, torch.Generator().manual_seed(0)))
    assert network.visited == timesteps
    assert [t for t, _, _ in path] == timesteps + [-1]
    torch.testing.assert_close(path[0][1], x_T, rtol=0, atol=0)
    torch.testing.assert_close(path[-1][1], path[-2][2], rtol=0, atol=0)  # the last image is the last prediction


@pytest.mark.parametrize(
    "schedule, t, guided",
    [
        ("cosine", 0, True),
        ("cosine", 743, True),
        ("cosine", 744, False),
        ("cosine", T - 1, False),
        ("linear", 400, True),
        ("linear", 500, False),  # alpha-bar is 0.078
    ],
)
def test_guidance_takes_back_an_error_that_the_worse_network_makes_twice(schedule, t, guided):
    """If the network is off by e and without its middle block by 2 e, guidance = 1 finds the noise, guidance = 0.5 half."""
    scheduler, x_t = NoiseScheduler(T, schedule), noise_like(images(), 35).float()
    truth, e = noise_like(images(), 36).float(), noise_like(images(), 37).float()
    calls = []

    def network(x, timesteps, skip_middle=False):
        assert torch.equal(x, x_t) and timesteps.tolist() == [t] * len(x_t)
        calls.append(skip_middle)
        return truth + 2 * e if skip_middle else truth + e

    for guidance, error in ((0.0, e), (0.5, e / 2 if guided else e), (1.0, 0 * e if guided else e)):
        noise_pred = predict_guided(network, scheduler, x_t, t, guidance)
        torch.testing.assert_close(noise_pred, truth + error, rtol=0, atol=1e-5)
    assert calls == ([False, False, True, False, True] if guided else [False] * 3)


def test_guided_sampling_asks_the_worse_network_below_the_limit_alone():
    """A worse network that is off by a constant shifts every guided prediction: the path leaves the plain one there."""
    worse_at, timesteps, x_T = [], sampling_timesteps(T, 32), noise_like(images(), 38).float()

    def network(x_t, t, skip_middle=False):
        if skip_middle:
            worse_at.append(t[0].item())
        return torch.sin(3 * x_t) + (0.1 if skip_middle else 0.0)

    paths = [
        list(denoise(network, NoiseScheduler(T), x_T, timesteps, 0.0, guidance, torch.Generator()))
        for guidance in (0.0, 2.0)
    ]
    assert worse_at == [t for t in timesteps if t <= 743]
    for (t, x_t, _), (_, guided, _) in zip(*paths, strict=True):
        assert torch.equal(x_t, guided) == (t >= 717)  # the first guided jump starts there


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    """Against DDPM written out on its own (clamped x_0, posterior mean, posterior variance), the same noise, every x_t."""
    num_timesteps, tables = 50, reference_tables(50, "cosine")
    x_T, generator = noise_like(images(), 32), torch.Generator().manual_seed(33)
    noises = [torch.randn(x_T.shape, generator=generator).double() for _ in range(num_timesteps)]

    expected, x = [], x_T.clone()
    for t, z in zip(reversed(range(num_timesteps)), noises):
        alpha_bar, prev, beta = (tables[name][t] for name in ("alphas_cumprod", "alphas_cumprod_prev", "betas"))
        noise_pred = torch.sin(3 * x) + t / 1000
        x_0 = ((x - math.sqrt(1 - alpha_bar) * noise_pred) / math.sqrt(alpha_bar)).clamp(-1, 1)
        mean = (math.sqrt(prev) * beta * x_0 + math.sqrt(1 - beta) * (1 - prev) * x) / (1 - alpha_bar)
        x = mean + math.sqrt(tables["posterior_variance"][t]) * z
        expected.append(x)

    path = denoise(
        FakeNetwork(), float64_scheduler(50), x_T, sampling_timesteps(50, 50), 1.0, 0.0, torch.Generator().manual_seed(33)
    )
    for (_, x_t, _), reference in zip(list(path)[1:], expected, strict=True):
        torch.testing.assert_close(x_t, reference, rtol=0, atol=1e-6)  # float32 noise: denoise draws it in torch's default


def moments_of_gaussian_sampling(
    alpha_bar: list[float], timesteps: list[int], eta: float, mu: float, s: float, second_order: bool = True
):
    """Mean and standard deviation that sampling must end with for data N(mu, s^2) and the optimal network.

    Everything is linear and Gaussian: the guess is E[x_0 | x_t] = k x_t + c, and (x_prev, guess) is a matrix times
    (x_t, guess before) plus a vector plus (sigma z, 0).
    """
    mean, covariance = np.array([0.0, 0.0]), np.diag([1.0, 0.0])
    for i, (t, t_prev) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
        now, prev = alpha_bar[t], alpha_bar[t_prev] if t_prev >= 0 else 1.0
        k = math.sqrt(now) * s**2 / (now * s**2 + 1 - now)
        c = mu - k * math.sqrt(now) * mu
        sigma2 = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
        keep = math.sqrt(max(0.0, 1 - prev - sigma2) / (1 - now))  # how much of x_t - sqrt(now) x_0 stays
        gain = math.sqrt(prev) - keep * math.sqrt(now)
        ahead = 0.5 if second_order and i > 0 and t_prev >= 0 and t - t_prev > 1 else 0.0
        matrix = np.array([[gain * (1 + ahead) * k + keep, -gain * ahead], [k, 0.0]])
        mean = matrix @ mean + np.array([gain * (1 + ahead) * c, c])
        covariance = matrix @ covariance @ matrix.T + np.diag([sigma2, 0.0])
    return mean[0], math.sqrt(covariance[0, 0])


def draw_gaussian_data(schedule: str, num_steps: int, eta: float, mu: float, s: float, count: int) -> torch.Tensor:
    """What the program's sampler draws if x_0 ~ N(mu, s^2) and the network is the best one, E[eps | x_t]."""
    scheduler = NoiseScheduler(T, schedule)

    def optimal_network(x_t, t):
        a = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mu) / (a * s**2 + 1 - a)

    generator = torch.Generator().manual_seed(34)
    x_T = torch.randn(count, 1, 1, 1, generator=generator)
    *_, (_, x_0, _) = denoise(optimal_network, scheduler, x_T, sampling_timesteps(T, num_steps), eta, 0.0, generator)
    return x_0


@pytest.mark.parametrize("num_steps", [32, 100])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_looking_half_a_jump_ahead_brings_the_deviation_closer_to_the_data(num_steps, eta):
    """The sampler's deviation beside that of first-order steps, which is known in closed form."""
    mu, s, timesteps = 0.1, 0.2, sampling_timesteps(T, num_steps)
    alpha_bar = reference_tables(T, "cosine")["alphas_cumprod"]
    first = abs(moments_of_gaussian_sampling(alpha_bar, timesteps, eta, mu, s, second_order=False)[1] - s)
    second = abs(draw_gaussian_data("cosine", num_steps, eta, mu, s, count=100_000).std().item() - s)
    assert second < 0.5 * first


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 32, 50, T])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_comes_back_from_the_optimal_network(schedule, num_steps, eta):
    """For x_0 ~ N(mu, s^2) the best noise prediction is known, E[eps | x_t]; the real sampler runs with it.

    Whatever the number of steps, mean and deviation are those of the linear recursion; with all steps, those of the data.
    """
    mu, s, count = 0.1, 0.2, 10_000
    x_0 = draw_gaussian_data(schedule, num_steps, eta, mu, s, count)
    alpha_bar = reference_tables(T, schedule)["alphas_cumprod"]
    mean, std = moments_of_gaussian_sampling(alpha_bar, sampling_timesteps(T, num_steps), eta, mu, s)
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * s / math.sqrt(count))
    assert x_0.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count), abs=1e-3)
    if num_steps == T:
        assert mean == pytest.approx(mu, abs=1e-3) and std == pytest.approx(s, rel=0.02)
