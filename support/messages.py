"""What the program says: lines that never end a run, progress bars, errors as one sentence.

It imports no other module of this repository.
"""

import contextlib
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def say(message: str, stream: TextIO | None = None, aloud: bool = True) -> None:
    """Print a line at once, to the standard output by default; nothing unless `aloud`.

    A full disk, a closed pipe or a letter that the terminal lacks never ends a run.
    """
    if not aloud:
        return
    stream = stream or sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        message = message.encode(encoding, "backslashreplace").decode(encoding)
        print(message, file=stream, flush=True)
    except Exception:  # of many kinds: a notebook or a logger may have put anything in its place
        # Else what is left in the stream would fail again at exit.
        with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def progress_bar(items: Sequence[Item], title: str, shown: bool = True) -> "tqdm[Item]":
    """The items, with a bar if it shall be shown and there is a terminal."""
    # None leaves it to tqdm, which looks for a terminal. Started by pythonw there is no stderr.
    hidden = None if shown and sys.stderr else True
    return tqdm(items, desc=title, leave=False, disable=hidden)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line that is not too long."""
    text = getattr(error, "strerror", None) or str(error)
    return textwrap.shorten(text, 300).rstrip(".:") or type(error).__name__


class UserError(Exception):
    """Something that a user can mend, told in a sentence for the user. All else is a bug."""

    status = 1  # the program's exit status: 1 for what broke, 2 for what was asked


class InputError(UserError, ValueError):
    """What was typed or given makes no sense."""

    status = 2


class MissingFileError(UserError, FileNotFoundError):
    """There is no file of the name that was given."""

    status = 2


class FileError(UserError, OSError):
    """A file cannot be read or written."""


class DivergedError(UserError, ArithmeticError):
    """Nothing is learned any more."""


@contextlib.contextmanager
def explained(
    path: Path,
    problem: str,
    remedy: str,
    causes: tuple[type[Exception], ...] = (),
    kind: type[UserError] = FileError,
) -> Iterator[None]:
    """A file's trouble in this block becomes one sentence that names file, cause and remedy.

    That is an OSError, or one of the other causes that the library in the block raises.
    """
    caught: tuple[type[Exception], ...] = (OSError, *causes)
    try:
        yield
    except PermissionError as error:
        raise kind(f"{path} is not yours to use ({error.strerror}). {remedy}") from None
    except MemoryError as error:
        raise FileError(f"there is too little memory for {path} ({one_line(error)})") from None
    except caught as error:
        raise kind(f"{path} {problem} ({one_line(error)}). {remedy}") from None


def lacks_memory(error: Exception) -> bool:
    """Whether Python, PyTorch's CPU allocator or a GPU ran out of memory."""
    known = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in known)


@contextlib.contextmanager
def not_vital(what: str) -> Iterator[None]:
    """Pictures and logs never end a run: without room or memory for one, a line says so."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, OSError) and not lacks_memory(error):
            raise
        say(f"warning: no {what}: {one_line(error)}", sys.stderr)


@contextlib.contextmanager
def memory_explained(may_shrink: bool) -> Iterator[None]:
    """Too little memory, on whatever device, becomes one sentence.

    The remedy depends on whether the job may still take smaller sizes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        remedy = "Try --device cpu, or close other programs"
        if may_shrink:
            remedy = "Try a lower --batch-size or --base-channels, or smaller images"
        raise UserError(f"there is too little memory ({one_line(error)}). {remedy}") from None


@contextlib.contextmanager
def exit_status(program: str) -> Iterator[None]:
    """End the program as a shell expects it: what a user can mend is one line and its status.

    An interruption gives 128 + the signal's number. A bug keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    except UserError as error:
        say(f"{program}: error: {error}", sys.stderr)
        sys.exit(error.status)
