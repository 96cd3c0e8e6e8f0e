"""Checkpoints: what is in one, how it is written and read, and how an earlier one is kept."""

import pickle
import zipfile
import zlib
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

from support.files import write_file
from support.messages import FileError, MissingFileError, explained

CHECKPOINT_FORMAT = "diffusion 5"  # changes when earlier files no longer fit
# What zipfile and torch.load raise at a file that is not whole, or that wants to run code.
BROKEN: tuple[type[Exception], ...] = (zipfile.BadZipFile, NotImplementedError, EOFError)
BROKEN += (ValueError, RuntimeError, pickle.UnpicklingError, zlib.error)


class Schedule(TypedDict):
    """What makes the noise scheduler."""

    num_timesteps: int
    schedule: str


class NetworkShape(TypedDict):
    """What makes the network, besides the scheduler."""

    image_shape: tuple[int, int, int]
    base_channels: int
    num_classes: int | None


class Checkpoint(TypedDict, total=False):
    """What a file holds, in tensors and plain values. weights.pt ends after `ema`."""

    format: str
    scheduler: Schedule
    unet: NetworkShape
    class_names: list[str] | None  # if the data set names its classes
    ema: dict[str, Tensor]  # the averaged weights, to draw with
    settings: dict[str, object]  # options that a resumed run takes over
    model: dict[str, Tensor]
    optimizers: list[dict[str, object]]
    step: int  # training steps done
    seconds: float  # of training
    losses: Tensor  # of the current epoch's steps
    check_sums: list[int]  # of images and labels: a run keeps to its own
    history: list[dict[str, float]]  # a row for every epoch that was looked at


def save_checkpoint(path: Path, state: Checkpoint) -> None:
    """Write a dict of tensors and plain values."""
    write_file(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote. A file from a stranger cannot run code."""
    remedy = "Train first, or name another by --checkpoint or, to resume, --output-dir"
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}. {remedy}")
    problem = "is damaged or no checkpoint"
    with explained(path, problem, remedy, BROKEN):
        with zipfile.ZipFile(path) as file:  # as which a checkpoint is written, with check sums
            if sum(part.file_size for part in file.infolist()) > 100 * path.stat().st_size:
                raise zipfile.BadZipFile("it would unpack to a hundred times its size")
            if file.testzip():
                raise zipfile.BadZipFile("a check sum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    ours = isinstance(state, dict) and state.get("format") == CHECKPOINT_FORMAT
    if not ours or not {"scheduler", "unet", "ema"} <= state.keys():
        raise FileError(f"{path} {problem} (it is of another program or version). {remedy}")
    return cast(Checkpoint, state)
