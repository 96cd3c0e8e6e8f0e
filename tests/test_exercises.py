"""The exercises of docs/exercises.md, checked: whoever wrote a function again learns what is wrong.

    python -m pytest tests/test_exercises.py -k exercise_2

An exercise needs no later one. The references are those of test_scheduler.py.
"""

import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from conftest import ROOT
from test_scheduler import (
    ALPHA_BAR,
    EVERY_T,
    NOISE,
    NOISE_PRED,
    POSTERIOR_VARIANCE,
    X_0,
    X_T,
    T,
    Z,
    bayes,
    ddim_step,
    float64_scheduler,
    reference_tables,
)
from torch import Tensor

import forward_reverse_process
import train_diffusion
from forward_reverse_process import NoiseScheduler

PAGE = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
LABELS = EVERY_T % 10


def fail(sentence: str, hint: str) -> NoReturn:
    pytest.fail(f"{sentence}\nHint: {hint}", pytrace=False)


def call(function: Callable[..., Any], *arguments: Any, hint: str, **named: Any) -> Any:
    """What the function returns. If it raises, one sentence says what and where."""
    try:
        return function(*arguments, **named)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if Path(frame.filename).parent == ROOT]
        where = f" ({Path(ours[-1].filename).name}, line {ours[-1].lineno})" if ours else ""
        fail(f"{function.__name__} raises {type(error).__name__}: {error}{where}.", hint)


def compare(name: str, actual: object, expected: Tensor, hint: str) -> None:
    """Fail with a sentence for a learner unless both are the same. Most have image i at t = i."""
    if not isinstance(actual, Tensor):
        fail(f"{name} is of type {type(actual).__name__}, not a tensor.", "is there a return?")
    if actual.shape != expected.shape:
        shapes = f"{list(actual.shape)}, and should have {list(expected.shape)}"
        fail(f"{name} has the shape {shapes}.", hint)
    wrong = ~torch.isclose(actual.to(expected.dtype), expected, rtol=1e-5, atol=1e-7)
    if wrong.any():
        differences = torch.where(wrong, (actual - expected).abs().nan_to_num(math.inf), -1.0)
        at = tuple(int(i) for i in torch.unravel_index(differences.argmax(), wrong.shape))
        values = f"{actual[at].item():.6g}, and should be {expected[at].item():.6g}"
        share = f"{int(wrong.sum())} of {wrong.numel()} values are wrong"
        fail(f"{name} is {values}, for image {at[0]} ({share}).", hint)


def two(name: str, result: object) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        fail(f"{name} returns a {type(result).__name__}.", "it should return two tensors.")
    return result


def compare_with_normal(name: str, noise: object) -> None:
    """Whether a tensor of thousands of numbers looks like draws from N(0, 1)."""
    if not isinstance(noise, Tensor):
        fail(f"{name} is of type {type(noise).__name__}.", "draw it if it is not given.")
    mean, deviation, fourth = (x.item() for x in (noise.mean(), noise.std(), (noise**4).mean()))
    if not (abs(mean) < 0.1 and abs(deviation - 1) < 0.1 and abs(fourth - 3) < 0.8):
        values = f"the mean {mean:.2f} and the deviation {deviation:.2f}"
        fail(f"{name} is not from N(0, I): it has {values}.", "torch.randn draws from it.")


def test_exercise_1_cosine_betas() -> None:
    expected = reference_tables(T)["betas"]
    hint = "T betas need the curve at T + 1 points, from u = 0 to u = 1."
    betas = call(forward_reverse_process.cosine_betas, T, hint=hint)
    if isinstance(betas, Tensor):
        compare("cosine_betas(1000)", 0 * betas, 0 * expected, hint)  # their shapes first
        if betas.dtype != torch.float64:
            fail(
                f"cosine_betas(1000) is {betas.dtype}.", "it should be float64, see the docstring."
            )
        hint = "beta_t is 1 - alpha-bar_t / alpha-bar_{t-1}, and alpha-bar a *squared* cosine."
        compare("cosine_betas(1000)[:-1]", betas[:-1], expected[:-1], hint)
    hint = "the curve ends at 0, so the last beta would be 1: MAX_BETA caps it."
    compare("cosine_betas(1000)", betas, expected, hint)


def test_exercise_2_add_noise() -> None:
    add_noise = float64_scheduler(T).add_noise
    hint = "sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps, each image with its own t (look_up)."
    x_t, noise = two("add_noise", call(add_noise, X_0, EVERY_T, NOISE, hint=hint))
    compare("x_t", x_t, ALPHA_BAR.sqrt() * X_0 + (1 - ALPHA_BAR).sqrt() * NOISE, hint)
    compare("the second result", noise, NOISE, "it is the noise in x_t.")
    hint = "without noise, draw it, and return what was drawn."
    x_t, noise = two("add_noise without noise", call(add_noise, X_0, 500, hint=hint))
    compare_with_normal("the noise that add_noise draws", noise)
    alpha_bar = ALPHA_BAR[500]
    compare("x_t", x_t, alpha_bar.sqrt() * X_0 + (1 - alpha_bar).sqrt() * noise, hint)


def test_exercise_3_predict_x0() -> None:
    hint = "solve add_noise's equation for x_0; no clamp."
    x_0_pred = call(float64_scheduler(T).predict_x0, X_T, EVERY_T, NOISE_PRED, hint=hint)
    expected = (X_T - (1 - ALPHA_BAR).sqrt() * NOISE_PRED) / ALPHA_BAR.sqrt()
    compare("predict_x0", x_0_pred, expected, hint)


def test_exercise_4_posterior() -> None:
    hint = "the tables have both factors ready. (alpha-bar_{t-1} is alphas_cumprod_prev at t.)"
    result = call(float64_scheduler(T).posterior, X_T, EVERY_T, X_0, hint=hint)
    mean, variance = two("posterior", result)
    expected_mean, expected_variance = bayes(EVERY_T[1:], EVERY_T[:-1], X_0[1:])
    compare("the mean", mean, torch.cat([X_0[:1], expected_mean]), hint)
    hint = "beta-tilde_t, shaped [B, 1, 1, 1] (look_up); 0 at t = 0."
    expected = torch.cat([torch.zeros_like(expected_variance[:1]), expected_variance])
    compare("the variance", variance, expected, hint)


def test_exercise_5_step() -> None:
    step, t = float64_scheduler(T).step, EVERY_T[1:]
    x_t, noise_pred, z = X_T[t], NOISE_PRED[t], Z[t]
    x_0_pred = (x_t - (1 - ALPHA_BAR[t]).sqrt() * noise_pred) / ALPHA_BAR[t].sqrt()

    def compare_step(name: str, t_prev: Tensor, eta: float, hint: str, clamp: bool = True) -> None:
        arguments = x_t, t, noise_pred, t_prev, eta, z, clamp
        result = call(step, *arguments, hint=hint)
        x_0 = x_0_pred.clamp(-1, 1) if clamp else x_0_pred
        expected = ddim_step(ALPHA_BAR[t], ALPHA_BAR[t_prev], x_t, x_0, eta, z)
        if isinstance(result, Tensor):  # whose first image is at t = 1
            zero = torch.zeros_like(expected[:1])
            result, expected = torch.cat([zero, result]), torch.cat([zero, expected])
        compare(name, result, expected, hint)

    hint = "tables that end in _prev, at t_prev + 1, say how much of both is in x_{t_prev}."
    compare_step("a step to t - 1, eta = 0 and no clamp,", t - 1, 0.0, hint, clamp=False)
    compare_step("a jump to t // 2, eta = 0 and no clamp,", t // 2, 0.0, hint, clamp=False)
    hint = "after the clamp of x_0_pred take the noise that makes up x_t with it: predict_noise."
    compare_step("a step to t - 1 at eta = 0", t - 1, 0.0, hint)
    hint = "sigma^2 is taken from the old noise: its factor is sqrt(1 - alpha-bar_prev - sigma^2)."
    compare_step("a jump to t // 2 at eta = 0.5", t // 2, 0.5, hint)
    compare_step("a step to t - 1 at eta = 1", t - 1, 1.0, hint)
    hint = "tables that end in _prev, at t_prev + 1, know alpha-bar of the clean image: 1."
    result = call(step, X_T, EVERY_T, NOISE_PRED, 0 * EVERY_T - 1, 1.0, Z, hint=hint)
    x_0 = ((X_T - (1 - ALPHA_BAR).sqrt() * NOISE_PRED) / ALPHA_BAR.sqrt()).clamp(-1, 1)
    compare("a jump to t_prev = -1", result, x_0, hint)

    hint = "without t_prev it goes to t - 1, and without noise it draws its own."
    result = call(step, X_T, 500, 0 * X_T, hint=hint)
    without = call(step, X_T, 500, 0 * X_T, 499, noise=0 * X_T, hint=hint)
    if not isinstance(result, Tensor):
        fail(f"step returns a {type(result).__name__}.", "is there a return?")
    noise = (result - without) / POSTERIOR_VARIANCE[500].sqrt()
    compare_with_normal("the noise that step draws", noise)
    jump = NoiseScheduler(T).step
    hint = "rounding may leave -1e-8 under a root: clamp it to 0."
    result = call(jump, X_T.float(), 999, NOISE_PRED.float(), 665, noise=Z.float(), hint=hint)
    if not result.isfinite().all():
        fail("a jump from 999 to 665 in float32 has values that are not finite.", hint)


def test_exercise_6_training_loss() -> None:
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model(x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        shift = t / T if labels is None else t / T + 0.1 * labels
        return factor * x_t + shift.reshape(-1, 1, 1, 1)

    scheduler, training_loss = float64_scheduler(T), train_diffusion.training_loss
    hint = "add_noise, then the model with labels, then the squared error: a mean for each image."
    losses = call(training_loss, model, scheduler, X_0, LABELS, EVERY_T, NOISE, hint=hint)
    x_t = ALPHA_BAR.sqrt() * X_0 + (1 - ALPHA_BAR).sqrt() * NOISE
    expected = (NOISE - model(x_t, EVERY_T, LABELS)).square().mean(dim=(1, 2, 3)).detach()
    compare("training_loss", losses, expected, hint)
    if not losses.requires_grad:
        fail("the loss has no gradient.", "the network must learn from it: no torch.no_grad().")
    hint = "t that is not given comes from draw_timesteps, noise from add_noise."
    torch.manual_seed(0)
    losses = call(training_loss, model, scheduler, X_0, hint=hint)
    torch.manual_seed(0)
    t = train_diffusion.draw_timesteps(scheduler, X_0)
    x_t, noise = scheduler.add_noise(X_0, t)
    expected = (noise - model(x_t, t, None)).square().mean(dim=(1, 2, 3)).detach()
    compare("training_loss without labels, t and noise", losses, expected, hint)


class Labeled(torch.nn.Module):
    """A network whose answer says which label it was given."""

    no_label = 10

    def forward(self, x_t: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x_t),), self.no_label)
        return x_t.sin() + labels.double().reshape(-1, 1, 1, 1).square()


def test_exercise_7_guided_noise() -> None:
    model, guided_noise = Labeled(), train_diffusion.guided_noise
    labeled, unlabeled = model(X_T, 5, LABELS), model(X_T, 5)
    for labels, w, expected in ((LABELS, 0, labeled), (None, 2, unlabeled)):
        hint = "with guidance 0 or without labels it is the model's own answer."
        result = call(guided_noise, model, X_T, 5, labels, w, hint=hint)
        name = f"guided_noise with w = {w}" + ("" if labels is not None else ", without labels,")
        compare(name, result, expected, hint)
    hint = "(1 + w) times the answer with the label, less w times that with model.no_label."
    result = call(guided_noise, model, X_T, 5, LABELS, 2, hint=hint)
    compare("guided_noise with w = 2", result, 3 * labeled - 2 * unlabeled, hint)


HEUN = ROOT / "heun.py"


def check_heun(heun_step: Callable[..., Tensor]) -> None:
    """Half the step, a quarter of the error: pixels from N(0, 0.3^2), whose path is known."""

    def variance(phi: float) -> float:
        return 0.3**2 * math.cos(phi) ** 2 + math.sin(phi) ** 2

    def velocity(x: Tensor, phi: float) -> Tensor:
        """The best v: cos(phi) E[eps | x] - sin(phi) E[x_0 | x]."""
        return math.cos(phi) * math.sin(phi) * (1 - 0.3**2) / variance(phi) * x

    # To phi = 0.3 and not to 0: there the velocity is 0, and a slip at the end would not be seen.
    start, last, errors = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.3, []
    hint = "Euler's step comes to 2. Heun's goes by the mean of the velocities at phi and phi_prev."
    for num_steps in (40, 80):
        x = start
        for i in range(num_steps, 0, -1):
            ends = (last + (math.pi / 2 - last) * j / num_steps for j in (i, i - 1))
            x = call(heun_step, x, *ends, velocity, hint="heun_step(x, phi, phi_prev, velocity)")
            if not isinstance(x, Tensor):
                fail(f"heun_step returns a {type(x).__name__}.", "is there a return?")
        errors.append((x - variance(last) ** 0.5 * start).abs().max().item())
    ratio = errors[0] / max(errors[1], 1e-300)
    if errors[1] > 0.1:
        fail(f"After 80 steps x is {errors[1]:.2g} off.", "a step goes by phi_prev - phi, below 0.")
    if not 3.5 < ratio < 4.5:
        message = f"With twice the steps the error is divided by {ratio:.2g}, and should be by 4."
        fail(message, hint)


def test_exercise_8_heun_step() -> None:
    if not HEUN.exists():
        pytest.skip("the last exercise of docs/exercises.md: there is no heun.py yet")
    variables: dict[str, Any] = {}
    exec(compile(HEUN.read_text(encoding="utf-8"), HEUN, "exec"), variables)
    if "heun_step" not in variables:
        fail("heun.py has no function of that name.", "def heun_step(x, phi, phi_prev, velocity)")
    check_heun(variables["heun_step"])


# --- tests of these tests -------------------------------------------------------------------------

EXERCISES: list[tuple[Callable[[], None], ModuleType | type, str]] = [
    (test_exercise_1_cosine_betas, forward_reverse_process, "cosine_betas"),
    (test_exercise_2_add_noise, NoiseScheduler, "add_noise"),
    (test_exercise_3_predict_x0, NoiseScheduler, "predict_x0"),
    (test_exercise_4_posterior, NoiseScheduler, "posterior"),
    (test_exercise_5_step, NoiseScheduler, "step"),
    (test_exercise_6_training_loss, train_diffusion, "training_loss"),
    (test_exercise_7_guided_noise, train_diffusion, "guided_noise"),
]
Failed = pytest.fail.Exception


@pytest.mark.parametrize("number", range(1, 8))
def test_an_emptied_function_fails_its_own_exercise_and_none_before(number, monkeypatch):
    check, home, name = EXERCISES[number - 1]
    assert check.__name__ == f"test_exercise_{number}_{name}"
    for body in (lambda *args, **kwargs: None, not_implemented):
        monkeypatch.setattr(home, name, body)
        for earlier, _, _ in EXERCISES[: number - 1]:
            earlier()
        with pytest.raises(Failed, match="NoneType|NotImplementedError: write me"):
            check()


def not_implemented(*args, **kwargs):
    raise NotImplementedError("write me")


def wrong_add_noise(scheduler, x_0, t, noise=None):
    noise = torch.randn_like(x_0) if noise is None else noise
    alpha_bar = scheduler.alphas_cumprod[torch.as_tensor(t)].reshape(-1, 1, 1, 1)
    return alpha_bar * x_0 + (1 - alpha_bar) * noise, noise


def wrong_step(scheduler, x_t, t, noise_pred, t_prev=None, eta=1.0, noise=None, clamp=True):
    right = forward_reverse_process.look_up
    x_0 = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
    factor = right(scheduler.sqrt_alphas_cumprod_prev, t_prev + 1)
    return factor * x_0 + right(scheduler.sqrt_one_minus_alphas_cumprod_prev, t_prev + 1) * noise


def step_without_its_own_noise(scheduler, x_t, t, noise_pred, t_prev=None, eta=1.0, noise=None,
                               clamp=True):  # fmt: skip
    """As the formula says, but the noise does not go with the clamped image."""
    look_up, t_prev = forward_reverse_process.look_up, t - 1 if t_prev is None else t_prev
    x_0 = scheduler.predict_x0(x_t, t, noise_pred)
    x_0 = x_0.clamp(-1, 1) if clamp else x_0
    prev = look_up(scheduler.alphas_cumprod_prev, t_prev + 1)
    now = look_up(scheduler.alphas_cumprod, t)
    sigma = eta * ((1 - prev) / (1 - now) * (1 - now / prev)).sqrt()
    return prev.sqrt() * x_0 + (1 - prev - sigma**2).sqrt() * noise_pred + sigma * noise


@pytest.mark.parametrize(
    "number, wrong, said",
    [
        (1, lambda T: reference_tables(T)["betas"][1:], r"shape \[999\].*\nHint: T betas"),
        (1, lambda T: reference_tables(T)["betas"].float(), "should be float64"),
        (1, lambda T: reference_tables(T)["betas"].clamp(min=1e-3), r"\[:-1\] is 0.001, and"),
        (1, lambda T: reference_tables(T)["betas"].clamp(max=0.9), "MAX_BETA caps it"),
        (2, wrong_add_noise, "x_t is .*\nHint: sqrt"),
        (2, lambda *args: args[1], "returns a Tensor.\nHint: it should return two tensors"),
        (2, lambda self, x_0, t, noise=None: self.sqrt_alphas_cumprod[t] * x_0, "raises Runtime"),
        (3, lambda self, x_t, t, noise: (x_t - noise).clamp(-1, 1), "no clamp"),
        (4, lambda self, x_t, t, x_0: (x_t, self.posterior_variance), "the mean is"),
        (5, wrong_step, "eta = 0 and no clamp, is .*\nHint: tables that end in _prev"),
        (5, step_without_its_own_noise, "at eta = 0 is .*\nHint: after the clamp"),
        (6, lambda *args: torch.zeros(()), r"has the shape \[\], and should have \[1000\]"),
        (7, lambda model, x_t, t, labels, w: model(x_t, t, labels), "with w = 2 is"),
    ],
)
def test_a_mistake_is_named(number, wrong, said, monkeypatch):
    check, home, name = EXERCISES[number - 1]
    monkeypatch.setattr(home, name, wrong)
    with pytest.raises(Failed, match=said):
        check()


def uniform(image):
    return (2 * torch.rand_like(image) - 1) * math.sqrt(3)


@pytest.mark.parametrize("draw", [torch.rand_like, torch.zeros_like, uniform, lambda x: x / 0])
def test_noise_from_another_distribution_is_noticed(draw, monkeypatch):
    add_noise, step = NoiseScheduler.add_noise, NoiseScheduler.step

    def other_add_noise(scheduler, x_0, t, noise=None):
        return add_noise(scheduler, x_0, t, draw(x_0) if noise is None else noise)

    def other_step(scheduler, x_t, t, noise_pred, t_prev=None, eta=1.0, noise=None, clamp=True):
        noise = draw(x_t) if noise is None else noise
        return step(scheduler, x_t, t, noise_pred, t_prev, eta, noise, clamp)

    monkeypatch.setattr(NoiseScheduler, "step", other_step)
    with pytest.raises(Failed, match="not from N"):
        test_exercise_5_step()
    monkeypatch.setattr(NoiseScheduler, "add_noise", other_add_noise)
    with pytest.raises(Failed, match="not from N"):
        test_exercise_2_add_noise()


def test_heuns_step_as_the_page_has_it_passes_and_others_do_not():
    (answer,) = re.findall(r"```python\n(def heun_step.*?)```", PAGE, re.DOTALL)
    variables: dict = {}
    exec(answer, variables)
    check_heun(variables["heun_step"])

    def euler(x, phi, phi_prev, velocity):
        return x + (phi_prev - phi) * velocity(x, phi)

    def slip(x, phi, phi_prev, velocity):
        both = velocity(x, phi) + velocity(euler(x, phi, phi_prev, velocity), phi)
        return x + (phi_prev - phi) * both / 2

    def backwards(x, phi, phi_prev, velocity):
        return x - (phi_prev - phi) * velocity(x, phi)

    for wrong, said in ((euler, "divided by 2"), (slip, "divided by 2"), (backwards, "off")):
        with pytest.raises(Failed, match=said):
            check_heun(wrong)


def test_the_page_has_a_command_for_each_exercise():
    commands = re.findall(r"python -m pytest tests/test_exercises.py -k exercise_(\d)", PAGE)
    assert commands == [str(i) for i in range(1, 9)]
    assert all(f"`{name}`" in PAGE for _, _, name in EXERCISES)
