"""What the tests share: a small piece of the real MNIST, and the program run as a user runs it."""

import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # such small networks gain nothing from more

import pytest
import torch

import train_diffusion

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN, NUM_TEST, BATCH_SIZE = 64, 16, 8
STEPS_PER_EPOCH = NUM_TRAIN // BATCH_SIZE
# A network and a run so small that a step takes milliseconds. 8 channels are the fewest.
TINY = ["--base-channels", "8", "--batch-size", str(BATCH_SIZE), "--timesteps", "20"]
TINY += ["--sample-steps", "2", "--num-samples", "4"]
LONG = [*TINY, "--epochs", "1000", "--sample-every", "1000"]  # longer than any test lasts


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
            stack.enter_context(mock.patch.object(train_diffusion, name))
        try:
            train_diffusion.main([str(option) for option in options])
            return 0, ""
        except KeyboardInterrupt as interrupt:
            return 128 + interrupt.args[0], ""
        except (ValueError, FileNotFoundError) as error:
            return 2, str(error)
        except (OSError, ArithmeticError) as error:
            return 1, str(error)


def run_program(*options, launcher=()) -> subprocess.CompletedProcess:
    """`python LAUNCHER train_diffusion.py OPTIONS` in a process of its own."""
    words = [sys.executable, *launcher, ROOT / "train_diffusion.py", *options]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=100)


def checkpoint(folder: Path) -> dict:
    return train_diffusion.load_checkpoint(folder / "checkpoint.pt")


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
