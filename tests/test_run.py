"""Runs that are resumed, killed or diverge: nothing is lost."""

import math
import multiprocessing
import os
import random
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    SAMPLED,
    STEPS_PER_EPOCH,
    THREE_EPOCHS,
    checkpoint,
    posix,
    read_log,
    run_main,
    same_run,
    same_state,
)

import train_diffusion as program
from support.run import Run

# --- resumed --------------------------------------------------------------------------------------


def test_resume_alone_goes_on_as_the_run_was_and_ends_in_the_same_bits(
    finished, small_data, tmp_path, monkeypatch
):
    """Stopped in the middle of the first epoch, which draws, and of the third."""
    monkeypatch.chdir(small_data)  # a relative --data-dir is found again from elsewhere
    options = ["--data-dir", ".", "--output-dir", tmp_path, "--max-steps", 3]
    assert run_main(*THREE_EPOCHS, *options) == (0, "")
    assert checkpoint(tmp_path)["step"] == 3 and read_log(tmp_path)[0]["step"] == "3"
    assert (tmp_path / "samples_epoch_1.png").exists()
    monkeypatch.chdir(tmp_path)
    assert run_main("--resume", "--max-steps", 2 * STEPS_PER_EPOCH + 1) == (0, "")
    assert run_main("--resume") == (0, "") and same_run(tmp_path, finished[0])
    for row, expected in zip(read_log(tmp_path), read_log(finished[0]), strict=True):
        assert list(row.items())[:4] == list(expected.items())[:4]
    for name in SAMPLED:
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_resuming_a_finished_run_says_that_nothing_is_left_and_draws_what_is_missing(
    resume_finished, finished, tmp_path, capsys
):
    assert run_main(*resume_finished) == (0, "")
    assert "nothing left to train" in capsys.readouterr().out
    assert (tmp_path / "denoising.gif").exists() and same_run(tmp_path, finished[0])


def test_a_run_goes_on_with_the_same_images_wherever_they_lie(
    resume_finished, small_data, tmp_path, capfd
):
    (images, labels), (test_images, test_labels) = program.load_images("MNIST", small_data)
    arrays = {"x_train": images[:, 0].numpy(), "y_train": labels.numpy()}
    arrays |= {"x_test": test_images[:, 0].numpy(), "y_test": test_labels.numpy()}
    np.savez(tmp_path / "moved.npz", **arrays)
    assert run_main(*resume_finished, "--dataset", tmp_path / "moved.npz") == (0, "")
    assert "(was MNIST)" in capfd.readouterr().out
    others = [["--data-dir", ROOT / "data"]]
    for name, place in (("x_train", (5, 5, 5)), ("y_train", 5)):
        changed = arrays[name].copy()
        changed[place] = (changed[place] + 1) % 10
        np.savez(tmp_path / f"{name}.npz", **{**arrays, name: changed})
        others.append(["--dataset", tmp_path / f"{name}.npz"])
    for other in others:
        code, message = run_main(*resume_finished, *other)
        assert code == 2 and "not what" in message and "\n" not in message
        assert "--dataset or --data-dir" in message


# --- killed, or diverged --------------------------------------------------------------------------


def save_always(*options) -> None:
    """A run that saves at every step, to be killed: for a process of its own."""
    program.SAVE_EVERY, program.CHECK_EVERY = 0, 1
    run_main(*options)


def kill_loop(folder, data_dir, kills: int) -> None:
    """Kill a run that saves at every step at random moments; it must end as one never killed."""
    # A copy of this process has torch imported already. Where there is a GPU it would not work.
    copies = sys.platform == "linux" and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if copies else "spawn")
    dice, steps, killed = random.Random(0), [0], folder / "killed"
    resume = ["--resume", "--output-dir", killed]
    for _ in range(kills):
        start = [*LONG, "--data-dir", data_dir, *resume[1:]] if steps == [0] else resume
        process = context.Process(target=save_always, args=start)
        process.start()
        while not (killed / "checkpoint.pt").exists() or checkpoint(killed)["step"] <= steps[-1]:
            assert process.is_alive()
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.join()
        steps.append(checkpoint(killed)["step"])  # ends the test if it does not load
        assert len(list(killed.glob("*.tmp"))) < len(steps)  # one for each kill at most
    assert steps == sorted(set(steps))
    end = ["--max-steps", steps[-1] + 2]
    assert run_main(*resume, *end) == (0, "")
    whole = [*LONG, "--data-dir", data_dir, "--output-dir", folder / "whole"]
    assert run_main(*whole, *end) == (0, "")
    assert same_run(killed, folder / "whole")
    print(f"{kills} kills, the last after step {steps[-1]}: the run ended as one never killed")


def test_a_killed_run_always_goes_on(small_data, tmp_path):
    kill_loop(tmp_path, small_data, kills=1)


@pytest.mark.slow
def test_a_run_killed_fifty_times_goes_on(small_data, tmp_path):
    kill_loop(tmp_path, small_data, kills=50)


@pytest.mark.slow
@posix
def test_memory_does_not_grow(small_data, tmp_path):
    peaks = {}
    for steps in (500, 2000):
        options = [*LONG, "--data-dir", small_data, "--output-dir", tmp_path / str(steps)]
        command = [sys.executable, str(ROOT / "train_diffusion.py"), *map(str, options)]
        process = subprocess.Popen([*command, "--max-steps", str(steps)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks[steps] = usage.ru_maxrss / 1024
    print(f"peak memory after 500 steps {peaks[500]:.0f}, after 2000 steps {peaks[2000]:.0f} MiB")
    assert peaks[2000] < 1.05 * peaks[500]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverging_run_leaves_the_last_good_checkpoint(what, resume, tmp_path, monkeypatch):
    """Also if the loss itself is finite: the weights that its gradient spoils are never saved."""
    before, loss = (tmp_path / "checkpoint.pt").read_bytes(), program.training_loss

    def spoiled(*arguments):
        error = loss(*arguments)
        # The root of 0 is 0, and its slope infinite.
        return error / 0 if what == "loss" else error + (error - error.detach()).sqrt()

    monkeypatch.setattr(program, "training_loss", spoiled)
    code, message = run_main(*resume)
    assert code == 1 and "not finite at step 7" in message and "--lr" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_long_epoch_is_saved_now_and_then(resume, tmp_path, monkeypatch):
    """Killed in its eighth step, a run that saves at every step has its seventh."""
    step = mock.Mock(side_effect=[program.training_loss, SystemExit])
    monkeypatch.setattr(program, "training_loss", lambda *arguments: step()(*arguments))
    monkeypatch.setattr(program, "SAVE_EVERY", 0)
    monkeypatch.setattr(program, "CHECK_EVERY", 1)
    with pytest.raises(SystemExit):
        run_main(*resume)
    assert checkpoint(tmp_path)["step"] == 7


# --- what is said of a run ------------------------------------------------------------------------


def test_a_notebook_that_turned_gradients_off_still_trains(resume, stopped, tmp_path):
    with torch.no_grad():
        assert run_main(*resume) == (0, "")
    assert same_run(tmp_path, stopped[1])


def test_a_loss_above_that_of_silence_is_a_warning(resume, capsys, monkeypatch):
    loss = program.training_loss
    monkeypatch.setattr(program, "training_loss", lambda *arguments: loss(*arguments) + 4)
    assert run_main(*resume) == (0, "")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the loss is 1.") and "--lr" in line


def test_an_evaluation_that_lacks_memory_is_a_warning_and_training_goes_on(
    resume, stopped, tmp_path, capsys, monkeypatch
):
    """And so are pictures: a run that can train goes on."""
    for name in ("held_out_loss", "sample", "draw_denoising"):
        error = MemoryError() if name == "sample" else RuntimeError("CUDA out of memory")
        monkeypatch.setattr(program, name, mock.Mock(side_effect=error))
    assert run_main(*resume) == (0, "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: no ") for line in lines)
    state, whole = checkpoint(tmp_path), checkpoint(stopped[1])
    assert same_state(state["model"], whole["model"])
    assert math.isnan(state["history"][0]["val_loss"])


def test_a_figure_that_nobody_sees_is_not_fetched(tmp_path):
    run = Run(tmp_path, {}, torch.full((5,), 0.5), 5, step=2)
    for hidden in (True, False):
        bar = mock.Mock(disable=hidden)
        run.show_loss(bar)
        assert bar.set_postfix.called != hidden


def test_seconds_are_those_of_training_and_not_of_looking(tmp_path, monkeypatch):
    run, now = Run(tmp_path, {}, torch.zeros(1), 2), mock.Mock(return_value=10.0)
    monkeypatch.setattr("time.monotonic", now)
    for began, ended in ((10, 12), (100, 103)):
        now.return_value = began
        run.start_clock()
        now.return_value = ended
        run.count(torch.tensor(1.0))
        run.end_epoch({})
    assert run.seconds == 2 + 3 and run.step == 2


def test_a_longer_run_is_told_what_becomes_of_its_learning_rate(resume_finished, capsys):
    assert run_main(*resume_finished, "--epochs", 4) == (0, "")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("resuming with --epochs 4 (was 3); the learning rate goes on as in a ")
