"""What the tests share: a small piece of the real MNIST, and the program run as a user runs it."""

import argparse
import contextlib
import csv
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small networks gain nothing from more

import pytest
import torch

import train_diffusion
from support.checkpoints import load_checkpoint
from support.messages import UserError
from support.options import parse_options
from support.processes import this_process

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN, NUM_TEST, BATCH_SIZE = 64, 16, 8
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE
# A network and a run so small that a step takes milliseconds. 8 channels are the fewest.
TINY = ["--base-channels", "8", "--batch-size", str(BATCH_SIZE), "--timesteps", "20"]
TINY += ["--sample-steps", "2", "--num-samples", "4"]
LONG = [*TINY, "--epochs", "1000", "--sample-every", "1000"]  # longer than any test lasts
THREE_EPOCHS = [*TINY, "--epochs", 3, "--sample-every", 2]
DRAW = ["--sample-only", "--sample-steps", 2]
# What a run of three epochs draws, and what of it without matplotlib.
PICTURES = {"samples_epoch_2.png", "samples_epoch_3.png", "denoising.png", "denoising.gif"}
PICTURES |= {"loss_curve.png", "noise_schedule.png", "forward_process.png"}
SAMPLED = ("samples_epoch_2.png", "samples_epoch_3.png", "denoising.gif")

posix = pytest.mark.skipif(os.name != "posix", reason="these signals and limits are POSIX's")


@pytest.fixture(scope="session")
def mnist() -> list[tuple]:
    """The repository's own MNIST: images, uint8 [N, 1, 28, 28], and labels, of both splits."""
    return train_diffusion.load_images("MNIST", ROOT / "data")


def idx(array: torch.Tensor) -> bytes:
    """A uint8 array in MNIST's own file format."""
    head = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    return head + array.to(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="session")
def small_data(mnist, tmp_path_factory) -> Path:
    """A --data-dir with the first images of MNIST alone, so that an epoch is short."""
    data_dir = tmp_path_factory.mktemp("data")
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    splits = zip(("train", "t10k"), mnist, (NUM_TRAIN, NUM_TEST))
    for split, (images, labels), count in splits:
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(images[:count, 0]))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels[:count]))
    return data_dir


def run_main(*options, pictures: bool = False) -> tuple[int, str]:
    """The program in this process, without what takes long: figures, and waiting for the disk.

    Returns the exit status that a user gets, and the sentence of the error if there is one.
    """
    figures = [] if pictures else ["draw_images", "draw_loss_curve", "draw_noise_schedule"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("os.fsync"))
        for name in figures:
            stack.enter_context(mock.patch(f"support.pictures.{name}"))
        try:
            train_diffusion.main([str(option) for option in options])
            return 0, ""
        except KeyboardInterrupt as interrupt:
            return 128 + interrupt.args[0], ""
        except UserError as error:
            return error.status, str(error)


@pytest.fixture
def as_process(monkeypatch):
    """As if this were one of several processes: a function of what torchrun tells them."""

    def pretend(rank: int, local_rank: int, world_size: int) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, local_rank, world_size, "localhost", 1)
        for name, value in zip(names, values):
            monkeypatch.setenv(name, str(value))
        this_process.cache_clear()  # the environment is read once

    yield pretend
    this_process.cache_clear()


def parsed(*options) -> argparse.Namespace:
    return parse_options(train_diffusion.make_parser(), [str(option) for option in options])


def run_program(*options, launcher=()) -> subprocess.CompletedProcess:
    """`python LAUNCHER train_diffusion.py OPTIONS` in a process of its own.

    As from a notebook whose backend is not installed: a program that only writes files needs none.
    """
    words = [sys.executable, *launcher, ROOT / "train_diffusion.py", *options]
    settings = {"env": {**os.environ, "MPLBACKEND": "module://not_installed"}, "timeout": 100}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, **settings)


def checkpoint(folder: Path) -> dict:
    return load_checkpoint(folder / "checkpoint.pt")


def same_state(first, second) -> bool:
    """Whether two checkpoints, or parts of them, hold the same bits, timings aside."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        keys = first.keys() - {"seconds"}
        return first.keys() == second.keys() and all(same_state(first[k], second[k]) for k in keys)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


def same_run(first: Path, second: Path) -> bool:
    """The same for the checkpoint.pt in two folders, but for settings that do not matter to it."""
    states = [checkpoint(folder) for folder in (first, second)]
    for state in states:
        del state["settings"]
    return same_state(*states)


# --- runs that several tests start from -----------------------------------------------------------


@pytest.fixture(scope="session")
def stopped(small_data, tmp_path_factory):
    """The folders of two long runs: one stopped after six steps, one after an epoch, eight."""
    folders = [tmp_path_factory.mktemp(name) for name in ("six", "eight")]
    for folder, steps in zip(folders, (6, STEPS_PER_EPOCH)):
        options = ["--data-dir", small_data, "--output-dir", folder, "--max-steps", steps]
        assert run_main(*LONG, *options) == (0, "")
    return folders


@pytest.fixture
def resume(stopped, tmp_path):
    """The options that complete the epoch of the run that stopped after six steps."""
    shutil.copy(stopped[0] / "checkpoint.pt", tmp_path)
    return ["--resume", "--output-dir", tmp_path, "--max-steps", STEPS_PER_EPOCH]


@pytest.fixture
def set_device(monkeypatch):
    """As if there were NVIDIA GPUs: the call, with its number, for one that was tried."""
    ones, call = torch.ones, mock.Mock()
    monkeypatch.setattr("torch.ones", lambda *sizes, device: ones(*sizes))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", call)
    return call


@pytest.fixture(scope="session")
def finished(small_data, tmp_path_factory):
    """The folder of a finished run of three epochs in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_program(*THREE_EPOCHS, "--data-dir", small_data, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def resume_finished(finished, tmp_path):
    """The options that go on with a copy of the finished run."""
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    return ["--resume", "--output-dir", tmp_path]


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return list(csv.DictReader(file))


def look_like(images: torch.Tensor, mnist: list[tuple]) -> list[int]:
    """Which digit each image [N, 1, 28, 28] is: that of the nearest of 4,000 real ones."""
    known, labels = (part[:4000] for part in mnist[0])
    distances = torch.cdist(images.flatten(1).float(), known.flatten(1).float())
    return labels[distances.argmin(dim=1)].tolist()


def right(found: list[int], expected: list[int]) -> float:
    return sum(x == y for x, y in zip(found, expected, strict=True)) / len(found)
