"""What is said: printing never ends a run, and an error is one line."""

import io
import runpy
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    run_main,
)
from torchvision import datasets as published

import train_diffusion as program
from support import files, messages


def text_stream(encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")


def test_printing_never_ends_a_run_and_spells_out_what_a_terminal_lacks(tmp_path, monkeypatch):
    file, closed, narrow = open(tmp_path / "full", "wb"), text_stream(), text_stream("cp1252")
    full = mock.Mock(encoding="utf-8", fileno=file.fileno)
    full.write.side_effect = OSError(28, "No space left on device")
    closed.close()
    logger, odd = SimpleNamespace(write=len), mock.Mock(encoding="no such")
    for stream in (closed, full, None, logger, odd, narrow, text_stream()):
        monkeypatch.setattr(sys, "stdout", stream)
        messages.say("Łukasz")
        messages.say("undecodable \udcff")
        messages.say("not to be heard", aloud=False)
    assert narrow.buffer.getvalue().startswith(b"\\u0141ukasz\n")
    assert sys.stdout.buffer.getvalue() == "Łukasz\nundecodable \\udcff\n".encode()
    file.write(b"what was left in the stream")  # as Python does at its end: it goes nowhere
    file.close()
    assert (tmp_path / "full").read_bytes() == b""


ALLOCATOR = "[enforce fail at alloc.cpp] err == 0. DefaultCPUAllocator:\ncan't allocate memory"
CUDA = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 8 GiB,\nof which"


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError(CUDA), MemoryError(), RuntimeError(ALLOCATOR)]
)
def test_too_little_memory_gets_one_line(error):
    """As a GPU's allocator, Python and a CPU's allocator say it; other errors are no user's."""
    for may_shrink, remedy in ((True, "Try a lower --batch-size"), (False, "Try --device cpu")):
        with pytest.raises(messages.UserError, match="^there is too little memory .*") as explained:
            with messages.memory_explained(may_shrink):
                raise error
        assert remedy in str(explained.value) and "\n" not in str(explained.value)
    with pytest.raises(RuntimeError, match="unsupported"), messages.memory_explained(True):
        raise RuntimeError("unsupported memory format option")


@pytest.mark.parametrize(
    "where",
    ["train_diffusion.training_loss", "support.pictures.draw_gif", "support.files.write_log"],
)
def test_a_readers_own_mistake_keeps_its_traceback(where, resume, monkeypatch):
    """Of the kinds that files and options raise too."""
    for kind in (ValueError, TypeError, ZeroDivisionError, KeyError):
        monkeypatch.setattr(where, mock.Mock(side_effect=kind("too many values to unpack")))
        with pytest.raises(kind, match="too many values to unpack") as bug:
            run_main(*resume)
        assert not isinstance(bug.value, messages.UserError)


def test_a_mistake_inside_a_picture_or_a_file_is_no_warning(tmp_path):
    def write(file):
        raise ValueError("too many values to unpack")

    with pytest.raises(ValueError, match="unpack"):
        files.write_file(tmp_path / "file", write)
    with pytest.raises(ValueError, match="unpack"), messages.not_vital("picture"):
        write(None)
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_that_lacks_memory_is_not_told_to_change_its_sizes(
    small_data, tmp_path, resume, monkeypatch
):
    monkeypatch.setattr(program, "training_loss", mock.Mock(side_effect=MemoryError))
    code, message = run_main(*resume)
    assert code == 1 and "--device cpu" in message and "--batch-size" not in message
    new_run = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path / "new"]
    assert "Try a lower --batch-size" in run_main(*new_run)[1]


@pytest.mark.parametrize("options, status", [(["--device", "x"], 2), (["--data-dir", "docs"], 1)])
def test_an_error_is_one_line_for_a_user(options, status, tmp_path, monkeypatch, capsys):
    """What stands under __main__, run in this process."""
    monkeypatch.setattr(
        sys, "argv", ["train_diffusion.py", *options, "--output-dir", str(tmp_path)]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda signum, handler: None)  # pytest keeps its own
    monkeypatch.setattr("socket.setdefaulttimeout", lambda seconds: None)
    monkeypatch.setattr(published.MNIST, "mirrors", [])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_diffusion.py"), run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code == status and output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("train_diffusion.py: error: ")
