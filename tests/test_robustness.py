"""Nothing lost: a run that is interrupted, killed, out of disk space, diverging or spread over processes."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, run_main, same_checkpoint, same_state

import train_diffusion as program

LONG = [*TINY, "--epochs", "1000", "--sample-every", "1000"]  # longer than any test lasts
SAVE_ALWAYS = ["--save-every-minutes", "1e-9"]


def start(*options) -> subprocess.Popen:
    """The program in the background."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_diffusion.py"), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder, step: int, process: subprocess.Popen) -> None:
    """Until the run has saved that step."""
    path = folder / "checkpoint.pt"
    while not path.exists() or program.load_checkpoint(path)["step"] < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_never_stopped(
    signum, code, small_data, tmp_path, capsys, monkeypatch
):
    """The signal comes in the middle of step 4, which is finished and saved."""
    train_step = program.train_step

    def interrupted_step(run, images):
        if run.step == 3:
            signal.raise_signal(signum)
        return train_step(run, images)

    options = [*LONG, "--data-dir", small_data, "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(program, "train_step", interrupted_step)
        assert run_main(*options, "--output-dir", tmp_path / "a") == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "after step 4" in error, error
    assert "train_diffusion.py" in error and error.rstrip().endswith("--resume")
    assert program.load_checkpoint(tmp_path / "a" / "checkpoint.pt")["step"] == 4
    assert run_main(*options, "--output-dir", tmp_path / "a", "--resume", "--max-steps", 7) == 0
    assert run_main(*options, "--output-dir", tmp_path / "b", "--max-steps", 7) == 0
    assert same_checkpoint(tmp_path / "a", tmp_path / "b")


def kill_loop(folder, data_dir, kills: int) -> list[int]:
    """Kill a run that saves at every step, again and again at random moments; the step that each kill leaves."""
    dice, steps = random.Random(0), [0]
    options = [*LONG, "--data-dir", data_dir, "--output-dir", folder, *SAVE_ALWAYS, "--quiet"]
    for _ in range(kills):
        process = start(*options, *(["--resume"] if steps[-1] else []))
        wait_for_step(folder, steps[-1] + 1, process)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.communicate()
        steps.append(program.load_checkpoint(folder / "checkpoint.pt")["step"])  # ends the test if it does not load
        assert len(list(folder.glob("*.tmp"))) <= 1
    return steps[1:]


def check_kill_loop(folder, data_dir, kills: int) -> None:
    steps = kill_loop(folder / "killed", data_dir, kills)
    assert steps == sorted(steps) and len(set(steps)) == kills, steps
    options = [*LONG, "--data-dir", data_dir, "--quiet", "--max-steps", steps[-1] + 2]
    assert run_main(*options, "--output-dir", folder / "killed", "--resume") == 0
    assert run_main(*options, "--output-dir", folder / "whole") == 0
    assert same_checkpoint(folder / "killed", folder / "whole")
    assert not list((folder / "killed").glob("*.tmp"))
    print(f"{kills} kills, last after step {steps[-1]}: every checkpoint loaded, and the run ended like one never killed")


def test_a_killed_run_always_goes_on(small_data, tmp_path):
    check_kill_loop(tmp_path, small_data, kills=2)


@pytest.mark.slow
def test_a_run_killed_fifty_times_goes_on(small_data, tmp_path):
    check_kill_loop(tmp_path, small_data, kills=50)


@pytest.mark.slow
def test_memory_does_not_grow(small_data, tmp_path):
    peaks = {}
    for steps in (500, 2000):
        options = [*LONG, "--data-dir", small_data, "--output-dir", tmp_path / str(steps), "--max-steps", steps, "--quiet"]
        process = start(*options)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks[steps] = usage.ru_maxrss / 1024
    print(f"peak memory after 500 steps {peaks[500]:.0f} MiB, after 2000 steps {peaks[2000]:.0f} MiB")
    assert peaks[2000] < 1.05 * peaks[500]


@pytest.fixture(scope="module")
def three_steps(small_data, tmp_path_factory):
    """The folder of a run that stopped after three steps."""
    folder = tmp_path_factory.mktemp("three")
    assert run_main(*LONG, "--data-dir", small_data, "--output-dir", folder, "--max-steps", 3, "--quiet") == 0
    return folder


def test_a_full_disk_leaves_the_last_good_checkpoint(three_steps, small_data, tmp_path, capsys):
    """Files may not grow beyond 300 kB: every picture still fits, the checkpoint does not."""
    shutil.copy(three_steps / "checkpoint.pt", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        options = [*LONG, "--data-dir", small_data, "--output-dir", tmp_path, "--resume", "--max-steps", 5, "--quiet"]
        assert run_main(*options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "checkpoint.pt" in error and "File too large" in error and error.count("\n") == 1
    assert same_checkpoint(tmp_path, three_steps) and not list(tmp_path.glob("*.tmp"))


def test_a_diverging_run_stops_and_leaves_the_last_good_checkpoint(three_steps, small_data, tmp_path, capsys):
    shutil.copy(three_steps / "checkpoint.pt", tmp_path)
    state = program.load_checkpoint(tmp_path / "checkpoint.pt")
    for value in state["model"].values():
        value.fill_(1e30)
    program.save_checkpoint(tmp_path / "checkpoint.pt", state)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    options = [*LONG, "--data-dir", small_data, "--output-dir", tmp_path, "--quiet", "--resume", "--max-steps", 40]
    assert run_main(*options) == 1
    error = capsys.readouterr().err
    assert "not finite at step 4" in error and "learning rate" in error and "--lr" in error and error.count("\n") == 1
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_vanishes_comes_back(three_steps, small_data, tmp_path):
    """An output folder that somebody deletes while the run goes on is made again."""
    program.write_file(tmp_path / "gone" / "checkpoint.pt", (three_steps / "checkpoint.pt").read_bytes())
    shutil.rmtree(tmp_path / "gone")
    program.write_file(tmp_path / "gone" / "checkpoint.pt", (three_steps / "checkpoint.pt").read_bytes())
    assert same_checkpoint(tmp_path / "gone", three_steps)


def test_how_often_one_samples_does_not_change_training(small_data, tmp_path):
    states = []
    for sampling in (["--sample-every", 1, "--num-samples", 9, "--eta", 0], ["--sample-every", 100]):
        folder = tmp_path / str(len(states))
        options = [*TINY, *sampling, "--data-dir", small_data, "--output-dir", folder, "--quiet", "--epochs", 2]
        assert run_main(*options) == 0
        states.append(program.load_checkpoint(folder / "checkpoint.pt"))
    assert (tmp_path / "0" / "samples_epoch_1.png").exists() and not (tmp_path / "1" / "samples_epoch_1.png").exists()
    for key in ("model", "ema", "optimizers", "step_losses", "history"):
        assert same_state(states[0][key], states[1][key]), key


def torchrun(*options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    command += [str(ROOT / "train_diffusion.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_two_processes_learn_what_one_does_and_either_resumes_the_other(small_data, tmp_path):
    options = [*TINY, "--batch-size", 16, "--data-dir", small_data, "--device", "cpu", "--quiet"]
    result = torchrun(*options, "--output-dir", tmp_path / "two", "--max-steps", 20)
    assert result.returncode == 0, result.stderr
    assert run_main(*options, "--output-dir", tmp_path / "one", "--max-steps", 20) == 0
    two, one = (program.load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    torch.testing.assert_close(two["step_losses"][:20], one["step_losses"][:20], rtol=0, atol=1e-5)
    assert two["model"].keys() == one["model"].keys()  # no "module." in front
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}

    shutil.copytree(tmp_path / "one", tmp_path / "one then two")
    assert run_main(*options, "--output-dir", tmp_path / "two", "--max-steps", 25, "--resume") == 0
    result = torchrun(*options, "--output-dir", tmp_path / "one then two", "--max-steps", 25, "--resume")
    assert result.returncode == 0, result.stderr
    assert run_main(*options, "--output-dir", tmp_path / "one", "--max-steps", 25, "--resume") == 0
    losses = [
        program.load_checkpoint(tmp_path / name / "checkpoint.pt")["step_losses"] for name in ("one", "two", "one then two")
    ]
    assert (losses[0][:25] > 0).all()
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=1e-5)


def test_processes_that_fail_end_together_with_a_clear_line(tmp_path):
    result = torchrun("--batch-size", 15, "--output-dir", tmp_path)
    assert result.returncode != 0 and "--batch-size: 15 images do not divide among 2 processes" in result.stderr
