"""What the tests share: a small piece of the real MNIST, and the program run as a user runs it."""

import signal
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import train_diffusion

ROOT = Path(__file__).resolve().parents[1]
NUM_TRAIN, NUM_TEST = 512, 64
# A network and a run so small that a step takes milliseconds; 8 steps make an epoch of the small data set.
TINY = ["--base-channels", "24", "--batch-size", "64", "--timesteps", "20", "--num-samples", "4", "--sample-steps", "2"]
STEPS_PER_EPOCH = NUM_TRAIN // 64


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """The training images of the repository's own MNIST, uint8 [60000, 28, 28]."""
    return train_diffusion.load_images("MNIST", ROOT / "data", train=True)


@pytest.fixture(scope="session")
def small_data(images, tmp_path_factory) -> Path:
    """A --data-dir with the first images of MNIST alone, in MNIST's own file format, so that an epoch is short."""
    data_dir = tmp_path_factory.mktemp("data")
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        pixels, labels = images[:count].numpy().tobytes(), bytes(count)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return data_dir


def run_main(*options) -> int:
    """The same program in this process, with its figures left empty, which saves seconds: its exit code."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            mock.patch("sys.argv", ["train_diffusion.py", *map(str, options)]),
            mock.patch("train_diffusion.save_figure", lambda path, figure: path.touch()),
        ):
            train_diffusion.main()
        return 0
    except SystemExit as end:
        return end.code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def same_state(first, second) -> bool:
    """Whether two loaded checkpoints hold the same bits, timings aside."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        timings = {"seconds", "images_per_second"}
        return first.keys() == second.keys() and all(same_state(first[k], second[k]) for k in first.keys() - timings)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return first == second


def same_checkpoint(first: Path, second: Path) -> bool:
    """The same for the checkpoint.pt in two folders."""
    return same_state(*(train_diffusion.load_checkpoint(folder / "checkpoint.pt") for folder in (first, second)))


def run_program(*options, timeout: int = 100, **settings) -> subprocess.CompletedProcess:
    """`python train_diffusion.py OPTIONS` in a process of its own."""
    command = [sys.executable, str(ROOT / "train_diffusion.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **settings)


def assert_one_line_error(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line on standard error that holds `words`, nothing on standard output, and the exit code."""
    assert result.returncode == code, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert str(word) in result.stderr, result.stderr
