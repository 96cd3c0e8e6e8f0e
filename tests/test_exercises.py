"""The exercises of docs/exercises.md, checked: whoever wrote a function again learns what is wrong.

    python -m pytest tests/test_exercises.py -k exercise_2

An exercise needs no later one. The references are those of test_scheduler.py.
"""

import importlib.util
import math
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from test_scheduler import (
    ALPHA_BAR,
    EVERY_T,
    NOISE,
    NOISE_PRED,
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


def compare(name: str, actual: object, expected: Tensor, hint: str) -> None:
    """Fail with a sentence for a learner unless both are the same; the first index is t."""
    problem = ""
    if not isinstance(actual, Tensor):
        problem = f"is {actual}, not a tensor. Is there a return?"
    elif actual.shape != expected.shape:
        problem = f"has the shape {list(actual.shape)}, and should have {list(expected.shape)}."
    else:
        wrong = ~torch.isclose(actual.to(expected.dtype), expected, rtol=1e-5, atol=1e-7)
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            values = f"{actual[first].item():.6g}, and should be {expected[first].item():.6g}"
            share = f"{wrong.double().mean():.0%} of all values are wrong"
            problem = f"is {values}, at t = {first[0]} ({share})."
    if problem:
        pytest.fail(f"{name} {problem}\nHint: {hint}", pytrace=False)


def two(name: str, result: object) -> tuple[object, object]:
    if not isinstance(result, tuple) or len(result) != 2:
        pytest.fail(f"{name} should return two tensors, not {result}.", pytrace=False)
    return result


def test_exercise_1_cosine_betas() -> None:
    betas = forward_reverse_process.cosine_betas(T)
    hint = "alpha-bar at the two ends of step t is that at u = t / T and at u = (t + 1) / T."
    expected = reference_tables(T)["betas"]
    compare("cosine_betas(1000)[:-1]", betas if betas is None else betas[:-1], expected[:-1], hint)
    hint = "the curve ends at 0, so the last beta would be 1: MAX_BETA caps it."
    compare("cosine_betas(1000)", betas, expected, hint)


def test_exercise_2_add_noise() -> None:
    result = float64_scheduler(T).add_noise(X_0, EVERY_T, NOISE)
    x_t, noise = two("add_noise", result)
    hint = "sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps, each image with its own t (look_up)."
    compare("x_t", x_t, ALPHA_BAR.sqrt() * X_0 + (1 - ALPHA_BAR).sqrt() * NOISE, hint)
    compare("the second result", noise, NOISE, "it is the noise in x_t.")
    x_t, noise = two("add_noise without noise", float64_scheduler(T).add_noise(X_0, 500))
    alpha_bar = ALPHA_BAR[500]
    hint = "without noise, draw it, and return what was drawn."
    compare("x_t", x_t, alpha_bar.sqrt() * X_0 + (1 - alpha_bar).sqrt() * noise, hint)


def test_exercise_3_predict_x0() -> None:
    x_0_pred = float64_scheduler(T).predict_x0(X_T, EVERY_T, NOISE_PRED)
    expected = (X_T - (1 - ALPHA_BAR).sqrt() * NOISE_PRED) / ALPHA_BAR.sqrt()
    compare("predict_x0", x_0_pred, expected, "solve add_noise's equation for x_0; no clamp.")


def test_exercise_4_posterior() -> None:
    mean, variance = two("posterior", float64_scheduler(T).posterior(X_T, EVERY_T, X_0))
    expected_mean, expected_variance = bayes(EVERY_T[1:], EVERY_T[:-1], X_0[1:])
    hint = "at t = 0 it is x_0 itself. The tables have both factors ready."
    compare("the mean", mean, torch.cat([X_0[:1], expected_mean]), hint)
    hint = "beta-tilde_t, shaped [B, 1, 1, 1] (look_up); 0 at t = 0."
    expected = torch.cat([torch.zeros_like(expected_variance[:1]), expected_variance])
    compare("the variance", variance, expected, hint)


def test_exercise_5_step() -> None:
    scheduler, t = float64_scheduler(T), EVERY_T[1:]
    x_t, noise_pred, z = X_T[t], NOISE_PRED[t], Z[t]
    x_0 = ((x_t - (1 - ALPHA_BAR[t]).sqrt() * noise_pred) / ALPHA_BAR[t].sqrt()).clamp(-1, 1)

    def compare_step(name: str, t_prev: Tensor, eta: float, hint: str) -> None:
        result = scheduler.step(x_t, t, noise_pred, t_prev, eta, z)
        expected = ddim_step(ALPHA_BAR[t], ALPHA_BAR[t_prev], x_t, x_0, eta, z)
        if isinstance(result, Tensor):  # its first image is at t = 1
            result, expected = (torch.cat([zero[:1] * 0, zero]) for zero in (result, expected))
        compare(name, result, expected, hint)

    hint = "clamp x_0_pred, then take the noise that makes up x_t together with it."
    compare_step("a step to t - 1 at eta = 0", t - 1, 0.0, hint)
    hint = "t_prev may be any earlier timestep; the tables _prev are at t_prev + 1."
    compare_step("a jump to t // 2 at eta = 0", t // 2, 0.0, hint)
    hint = "sigma^2 is taken from the old noise: its factor is sqrt(1 - alpha-bar_prev - sigma^2)."
    compare_step("a jump to t // 2 at eta = 0.5", t // 2, 0.5, hint)
    compare_step("a step to t - 1 at eta = 1", t - 1, 1.0, hint)
    result = scheduler.step(X_T, EVERY_T, NOISE_PRED, 0 * EVERY_T - 1, 1.0, Z)
    x_0 = ((X_T - (1 - ALPHA_BAR).sqrt() * NOISE_PRED) / ALPHA_BAR.sqrt()).clamp(-1, 1)
    compare("a jump to t_prev = -1", result, x_0, "alpha-bar is 1 there, and sigma is 0.")


def test_exercise_6_training_loss() -> None:
    def model(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * x_t + (t / T + 0.1 * labels).reshape(-1, 1, 1, 1)

    scheduler, labels = float64_scheduler(T), LABELS
    losses = train_diffusion.training_loss(model, scheduler, X_0, labels, EVERY_T, NOISE)
    x_t = ALPHA_BAR.sqrt() * X_0 + (1 - ALPHA_BAR).sqrt() * NOISE
    expected = (NOISE - model(x_t, EVERY_T, labels)).square().mean(dim=(1, 2, 3))
    hint = "add_noise, then the model, then the squared error of the noise: a mean for each image."
    compare("training_loss", losses, expected, hint)


class Labeled(torch.nn.Module):
    """A network whose answer says which label it was given."""

    no_label = 10

    def forward(self, x_t: Tensor, t: int, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            labels = torch.full((len(x_t),), self.no_label)
        return x_t.sin() + labels.double().reshape(-1, 1, 1, 1).square()


def test_exercise_7_guided_noise() -> None:
    model = Labeled()
    labeled, unlabeled = model(X_T, 5, LABELS), model(X_T, 5)
    hint = "with guidance 0 or without labels it is the model's own answer."
    compare("guided_noise with w = 0", train_diffusion.guided_noise(model, X_T, 5, LABELS, 0),
            labeled, hint)  # fmt: skip
    compare("guided_noise without labels", train_diffusion.guided_noise(model, X_T, 5, None, 2),
            unlabeled, hint)  # fmt: skip
    hint = "(1 + w) times the answer with the label, less w times that with model.no_label."
    compare("guided_noise with w = 2", train_diffusion.guided_noise(model, X_T, 5, LABELS, 2),
            3 * labeled - 2 * unlabeled, hint)  # fmt: skip


HEUN = ROOT / "heun.py"


def check_heun(heun_step: Callable[..., Tensor]) -> None:
    """Half the step, a quarter of the error: pixels from N(0, 0.3^2), whose path is known."""

    def variance(phi: float) -> float:
        return 0.3**2 * math.cos(phi) ** 2 + math.sin(phi) ** 2

    def velocity(x: Tensor, phi: float) -> Tensor:
        """The best v: cos(phi) E[eps | x] - sin(phi) E[x_0 | x]."""
        return math.cos(phi) * math.sin(phi) * (1 - 0.3**2) / variance(phi) * x

    start, errors = torch.linspace(-2, 2, 9, dtype=torch.float64), []
    for num_steps in (40, 80):
        x = start
        for i in range(num_steps, 0, -1):
            phi, phi_prev = (math.pi / 2 * j / num_steps for j in (i, i - 1))
            x = heun_step(x, phi, phi_prev, velocity)
        errors.append((x - 0.3 * start).abs().max().item())
    ratio = errors[0] / max(errors[1], 1e-300)
    if not 3.5 < ratio < 4.5:
        message = f"With twice the steps the error is divided by {ratio:.2g}, and should be by 4."
        hint = "Euler's step comes to 2. Heun's takes the mean of the velocities at both ends."
        pytest.fail(f"{message}\nHint: {hint}", pytrace=False)


def test_exercise_8_heun_step() -> None:
    if not HEUN.exists():
        pytest.skip("the last exercise of docs/exercises.md: there is no heun.py yet")
    spec = importlib.util.spec_from_file_location("heun", HEUN)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_heun(module.heun_step)


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
    monkeypatch.setattr(home, name, lambda *args, **kwargs: None)
    for earlier, _, _ in EXERCISES[: number - 1]:
        earlier()
    with pytest.raises(Failed, match="None"):
        check()


def wrong_add_noise(scheduler, x_0, t, noise=None):
    noise = torch.randn_like(x_0) if noise is None else noise
    alpha_bar = scheduler.alphas_cumprod[torch.as_tensor(t)].reshape(-1, 1, 1, 1)
    return alpha_bar * x_0 + (1 - alpha_bar) * noise, noise


def wrong_step(scheduler, x_t, t, noise_pred, t_prev=None, eta=1.0, noise=None, clamp=True):
    right = forward_reverse_process.look_up
    x_0 = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
    factor = right(scheduler.sqrt_alphas_cumprod_prev, t_prev + 1)
    return factor * x_0 + right(scheduler.sqrt_one_minus_alphas_cumprod_prev, t_prev + 1) * noise


@pytest.mark.parametrize(
    "number, wrong, said",
    [
        (1, lambda T: (1 - reference_tables(T)["alphas"]).clamp(max=0.5), "is 0.5, and should"),
        (2, wrong_add_noise, "x_t is .* at t = 0 .*\nHint: sqrt"),
        (2, lambda *args: args[1], "should return two tensors"),
        (3, lambda self, x_t, t, noise: (x_t - noise).clamp(-1, 1), "no clamp"),
        (5, wrong_step, "at eta = 0 is .*\nHint: clamp"),
        (6, lambda *args: torch.zeros(()), r"has the shape \[\], and should have \[1000\]"),
        (7, lambda model, x_t, t, labels, w: model(x_t, t, labels), "with w = 2 is"),
    ],
)
def test_a_mistake_is_named(number, wrong, said, monkeypatch):
    check, home, name = EXERCISES[number - 1]
    monkeypatch.setattr(home, name, wrong)
    with pytest.raises(Failed, match=said):
        check()


def test_heuns_step_as_the_page_has_it_passes_and_eulers_does_not():
    (answer,) = re.findall(r"```python\n(def heun_step.*?)```", PAGE, re.DOTALL)
    variables: dict = {}
    exec(answer, variables)
    check_heun(variables["heun_step"])
    with pytest.raises(Failed, match="divided by 2"):
        check_heun(lambda x, phi, phi_prev, velocity: x + (phi_prev - phi) * velocity(x, phi))


def test_the_page_has_a_command_for_each_exercise():
    commands = re.findall(r"python -m pytest tests/test_exercises.py -k exercise_(\d)", PAGE)
    assert commands == [str(i) for i in range(1, 9)]
    assert all(f"`{name}`" in PAGE for _, _, name in EXERCISES)
