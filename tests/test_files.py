"""Files are written whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import (
    DRAW,
    TINY,
    posix,
    run_main,
    same_run,
)

from support import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Into a folder that is made again if it has vanished, and under any name."""
    names = ["a/b/file", "x" * 255, "é" * 127, "a b'c$d"]
    names += ['e"f\ng'] if os.name == "posix" else []
    for name in names:
        files.write_file(tmp_path / name, lambda file: file.write(b"first"))
        assert (tmp_path / name).read_bytes() == b"first"
    path = tmp_path / "a" / "b" / "file"
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="file cannot be written .No space left"):
        files.write_file(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_no_two_processes_and_no_file_of_the_user_share_a_temporary_name(tmp_path, monkeypatch):
    (tmp_path / "file.tmp").write_text("the user's own")
    replace = mock.Mock(wraps=os.replace)
    monkeypatch.setattr("os.replace", replace)
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        files.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert len({call.args[0] for call in replace.call_args_list}) == 2
    assert (tmp_path / "file.tmp").read_text() == "the user's own"


@posix
def test_a_link_stays_a_link_and_a_mode_stays_a_mode(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.write_bytes(b"first")
    real.chmod(0o664)
    link.symlink_to(Path("disk", "real"))
    before = os.umask(0o077)
    try:
        files.write_file(link, lambda file: file.write(b"second"))
        files.write_file(tmp_path / "new", lambda file: file.write(b"of a private person"))
    finally:
        os.umask(before)
    assert link.is_symlink() and real.read_bytes() == b"second"
    assert real.stat().st_mode & 0o777 == 0o664
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_a_folder_that_cannot_flush_keeps_files_all_the_same(tmp_path, monkeypatch):
    for code in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
        monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(code, "no such call")))
        files.write_file(tmp_path / str(code), lambda file: file.write(b"content"))
        assert (tmp_path / str(code)).read_bytes() == b"content"


@posix
def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = [f"checkpoint.pt.{files.MACHINE}-{number}.tmp" for number in (dead.pid, os.getpid())]
    running = f"checkpoint.pt.{files.MACHINE}-{os.getppid()}.tmp"
    others = [running, f"checkpoint.pt.0badcafe-{dead.pid}.tmp", "a.tmp", "checkpoint.pt"]
    for name in ours + others:
        (tmp_path / name).touch()
    files.clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


@posix
def test_a_link_that_is_put_aside_still_leads_where_it_led(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real.pt").write_bytes(b"content")
    (tmp_path / "checkpoint.pt").symlink_to(Path("disk", "real.pt"))
    files.put_aside(tmp_path, ["checkpoint.pt", "*.png"])
    assert (tmp_path / "earlier_1" / "checkpoint.pt").read_bytes() == b"content"
    assert not os.path.lexists(tmp_path / "checkpoint.pt")


def test_a_file_that_is_held_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As virus scanners do on Windows."""
    held = [PermissionError(13, "in use")] * 3
    with monkeypatch.context() as patch:
        replace = mock.Mock(side_effect=[*held, mock.DEFAULT], wraps=os.replace)
        patch.setattr("os.replace", replace)
        patch.setattr("os.name", "nt")
        patch.setattr("time.sleep", mock.Mock())
        files.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == ["file"]


@posix
def test_a_full_disk_leaves_the_last_good_checkpoint(resume, stopped, tmp_path):
    """Files may not grow beyond 300 kB: pictures fit, the checkpoint does not."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        code, message = run_main(*resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "checkpoint.pt cannot be written (File too large)" in message
    assert same_run(tmp_path, stopped[0]) and not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_named(small_data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "gone")
    training = [*TINY, "--data-dir", small_data, "--output-dir"]
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / "nowhere"):
        for options in ([*training, folder], [*DRAW, "--output", folder / "digits.png"]):
            code, message = run_main(*options)
            assert code == 2 and f"{folder} " in message and "--output-dir" in message
            assert "\n" not in message
