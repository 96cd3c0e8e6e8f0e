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


@contextlib.contextmanager
def explained(
    path: Path, problem: str, remedy: str, kind: type[Exception] = OSError
) -> Iterator[None]:
    """Whatever goes wrong in this block becomes one sentence that names file, cause and remedy."""
    try:
        yield
    except PermissionError as error:
        raise kind(f"{path} is not yours to use ({error.strerror}). {remedy}") from None
    except MemoryError as error:
        raise OSError(f"there is too little memory for {path} ({one_line(error)})") from None
    except Exception as error:  # libraries raise anything from KeyError to zlib.error
        raise kind(f"{path} {problem} ({one_line(error)}). {remedy}") from None


@contextlib.contextmanager
def not_vital(path: Path) -> Iterator[Path]:
    """Pictures and logs never end a run: if one cannot be made or written, one line says so."""
    try:
        yield path
    except Exception as error:
        say(f"warning: no {path.name}: {one_line(error)}", sys.stderr)


@contextlib.contextmanager
def memory_explained(may_shrink: bool) -> Iterator[None]:
    """Too little memory, on whatever device, becomes one sentence; other errors stay.

    The remedy depends on whether the job may still take smaller sizes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = one_line(error)
        known = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(words in text for words in known):
            raise
        remedy = "Try --device cpu, or close other programs"
        if may_shrink:
            remedy = "Try a lower --batch-size or --base-channels, or smaller images"
        raise OSError(f"there is too little memory ({text}). {remedy}") from None


@contextlib.contextmanager
def exit_status(program: str) -> Iterator[None]:
    """End the program as a shell expects it: an error is one line, and its kind is the status.

    2 for what was typed, 1 for what broke, 128 + the signal's number for an interruption.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    except (ValueError, OSError, ArithmeticError) as error:
        say(f"{program}: error: {error}", sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
