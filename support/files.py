"""How files are written: whole or not at all, so that no crash and no full disk loses one."""

import contextlib
import errno
import io
import itertools
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from support.messages import InputError, explained, not_vital, say

REMEDY = "Choose another --output-dir or --output"
REPOSITORY = Path(__file__).resolve().parents[1]  # the folder of data and pretrained.pt


MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # tells its temporary files from others'


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all (atomically): beside it, out to the disk, into its place."""
    place = path.resolve()  # a link stays a link, to a larger disk for example
    # Of this process alone; and cut short, since the name may be as long as names can be.
    temporary = place.with_name(f"{place.name[:50]}.{MACHINE}-{os.getpid()}.tmp")
    remedy = "Make room or name another folder; what was there is untouched"
    with explained(path, "cannot be written", remedy):
        content = io.BytesIO()
        write(content)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                flush_to_disk(file)
            if place.exists():  # a group that shares it shall still be able to
                with contextlib.suppress(OSError):
                    shutil.copymode(place, temporary)
            for _ in range(10 if os.name == "nt" else 0):  # a virus scanner may hold the file
                with contextlib.suppress(PermissionError):
                    return os.replace(temporary, place)
                time.sleep(0.1)
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)


def flush_to_disk(file: BinaryIO) -> None:
    """Some mounted folders know no such call, and keep files all the same."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def clear_leftovers(folder: Path) -> None:
    """Remove what writing left behind in processes of this machine that were killed."""
    for path in folder.glob(f"*.{MACHINE}-*.tmp"):
        number = path.stem.rpartition("-")[2]
        if number.isdecimal() and not is_running(int(number)):
            with contextlib.suppress(OSError):
                path.unlink()


def is_running(process: int) -> bool:
    """Whether another process of this number runs here. (Windows offers no harmless question.)"""
    if process == os.getpid():
        return False
    try:
        if os.name == "posix":
            os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True


def put_aside(folder: Path, names: Sequence[str]) -> None:
    """Move an earlier run's files, of these names or patterns, into a folder of their own."""
    found = [path for name in names for path in sorted(folder.glob(name))]
    found = [path for path in found if path.is_file() or path.is_symlink()]
    if not found:
        return
    numbers = (folder / f"earlier_{i}" for i in itertools.count(1))
    aside = next(path for path in numbers if not path.exists())
    with explained(folder, "holds an earlier run's files, which cannot be moved", REMEDY):
        aside.mkdir()
        for path in found:
            if path.is_symlink():  # whose target may be given from where it lies
                (aside / path.name).symlink_to(path.resolve())
                path.unlink()
            else:
                path.rename(aside / path.name)
    say(f"{folder} holds an earlier run's files: moved to {aside}")


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """A table with commas, as spreadsheets read it."""
    with not_vital(path.name):
        names = list(rows[-1])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        write_file(path, lambda file: file.write("".join(x + "\n" for x in lines).encode()))


def make_writable(folder: Path) -> None:
    """Make the folder that a run writes to, and try it before any work is done."""
    with explained(folder, "cannot be written to", REMEDY, kind=InputError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
