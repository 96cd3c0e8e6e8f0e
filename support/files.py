"""How files are written: whole or not at all, so that no crash and no full disk loses one."""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from support.messages import InputError, explained, not_vital

REPOSITORY = Path(__file__).resolve().parents[1]  # the folder of data and pretrained.pt


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all (atomically): beside it, out to the disk, into its place."""
    # Of this process alone; and cut short, since the name may be as long as names can be.
    temporary = path.with_name(f"{path.name[:50]}.{os.getpid()}.tmp")
    remedy = "Make room or name another folder; what was there is untouched"
    with explained(path, "cannot be written", remedy):
        content = io.BytesIO()
        write(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            for _ in range(10 if os.name == "nt" else 0):  # a virus scanner may hold the file
                with contextlib.suppress(PermissionError):
                    return os.replace(temporary, path)
                time.sleep(0.1)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """A table with commas, as spreadsheets read it."""
    with not_vital(path.name):
        names = list(rows[-1])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        write_file(path, lambda file: file.write("".join(x + "\n" for x in lines).encode()))


def make_writable(folder: Path) -> None:
    """Make the folder that a run writes to, and try it before any work is done."""
    remedy = "Choose another --output-dir or --output"
    with explained(folder, "cannot be written to", remedy, kind=InputError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
