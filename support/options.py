"""What may be typed: types of options, checks of one against another, what a resumed run keeps.

The options themselves stand in train_diffusion.py, where their defaults are.
"""

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from support.checkpoints import load_checkpoint
from support.datasets import IDX_SETS
from support.messages import FileError, InputError, say
from support.optimizers import LEARNING_RATES
from support.processes import this_process

# What a resumed run takes from its checkpoint. KEPT settings may not change (nor may the images: a
# changed --dataset is another path to them).
KEPT = "image_size batch_size optimizer timesteps schedule base_channels label_dropout seed".split()
CHANGEABLE = "dataset data_dir epochs lr sample_every num_samples sample_steps eta guidance".split()


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an exception and no exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help explains every option)")


# --- Types of options -----------------------------------------------------------------------------


def number(kind: type, low: float, high: float, step: int = 1) -> Callable[[str], float]:
    """A number from low to high, a whole one if kind is int, and then a multiple of step."""
    noun = "number" if kind is float else f"multiple of {step}" if step > 1 else "whole number"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value: float = kind(text)
            if low <= value <= high and (kind is float or value % step == 0):
                return value
        raise argparse.ArgumentTypeError(f"must be a {noun} from {low:g} to {high:g}, not {text}")

    return parse


def home_path(text: str) -> Path:
    """A path, in which ~ stands for the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}") from None


def absolute_path(text: str) -> str:
    """A path that stays right in another folder."""
    return os.path.abspath(home_path(text))


def source(text: str) -> str:
    """A published set, or the path of a file or folder."""
    return text if text in IDX_SETS else absolute_path(text)


# --- All of them together -------------------------------------------------------------------------


def parse_options(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against each other. A resumed run has its checkpoint's for defaults."""
    args = parser.parse_args(argv)
    if args.resume and args.sample_only:
        parser.error("--sample-only and --resume exclude each other")
    if args.resume:
        args = resumed_options(parser, argv, args.output_dir / "checkpoint.pt")

    args.lr = args.lr or LEARNING_RATES[args.optimizer]
    args.settings = {name: getattr(args, name) for name in CHANGEABLE + KEPT}
    args.sampler = {"num_steps": min(args.sample_steps, args.timesteps), "eta": args.eta}
    args.sampler |= {"guidance": args.guidance, "seed": args.seed}
    num_processes = this_process().world_size
    known = args.dataset in IDX_SETS or args.dataset.endswith(".npz")
    if not known and not os.path.isdir(args.dataset):
        sets = ", ".join(IDX_SETS)
        parser.error(f"argument --dataset: must be {sets}, a folder of pictures or an .npz file")
    if args.batch_size % num_processes:
        parser.error(f"argument --batch-size: must divide among {num_processes} processes")
    if not args.sample_only and (args.labels or args.checkpoint or args.output):
        parser.error("--labels, --checkpoint and --output need --sample-only")
    args.output = args.output or args.output_dir / "samples.png"
    directory = args.sample_only and args.output.is_dir()
    if args.output.suffix.lower() not in (".png", ".npy", ".npz") or directory:
        parser.error(f"argument --output: must be a .png, .npy or .npz file, not {args.output}")
    return args


def resumed_options(parser: Parser, argv: Sequence[str] | None, path: Path) -> argparse.Namespace:
    """The options of the run in this checkpoint. What is typed wins, where it may."""
    saved = load_checkpoint(path)
    if "settings" not in saved:
        raise InputError(f"--resume: {path} holds weights to draw with, not a run")
    settings = checked_settings(parser, saved["settings"], path)
    parser.set_defaults(saved=saved, **settings)
    args = parser.parse_args(argv)
    for name, old in settings.items():
        new, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if name in KEPT and new != old:
            parser.error(f"argument {option}: the run in {path} has {old}, not {new}")
        if name == "epochs" and new < old:
            parser.error(f"argument --epochs: the run in {path} has {old}; {new} are fewer")
        if new != old:
            rate = "; the learning rate goes on as in a run of that length" * (name == "epochs")
            say(f"resuming with {option} {new} (was {old}){rate}", aloud=this_process().rank == 0)
    return args


def checked_settings(parser: Parser, settings: dict[str, object], path: Path) -> dict[str, object]:
    """Those that a run keeps, each by its option's own type and range; others are dropped.

    A checkpoint may come from a stranger: nothing in it decides where a file is written.
    """
    checked: dict[str, object] = {}
    for action in parser._actions:
        if action.dest in KEPT + CHANGEABLE and action.dest in settings:
            value = settings[action.dest]
            if value is not None:
                text = [f"{action.option_strings[0]}={value}"]
                try:
                    value = getattr(parser.parse_args(text), action.dest)
                except InputError as error:
                    raise FileError(f"{path} is damaged ({error})") from None
            checked[action.dest] = value
    return checked


def resume_command(script: str, args: argparse.Namespace) -> str:
    """What to type to go on with a run that was interrupted."""
    words = ["--resume", f"--output-dir={args.output_dir}", f"--device={args.device}"]
    words += [f"--max-steps={args.max_steps}"] if args.max_steps else []
    return command_line(script, *words)


def command_line(script: str, *options: object) -> str:
    """What to type to call this program again, as this system's shell reads it."""
    num_processes = this_process().world_size
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher += [f"--nproc-per-node={num_processes}"]
    words = [sys.executable, *(launcher if num_processes > 1 else []), script, *map(str, options)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
