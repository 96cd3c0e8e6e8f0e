"""Ctrl-C, SIGTERM, a closed terminal: a run saves, and goes on as if nothing had been."""

import signal
import sys
from unittest import mock

import pytest
from conftest import (
    STEPS_PER_EPOCH,
    checkpoint,
    posix,
    run_main,
    same_run,
)

import support.run
import train_diffusion as program
from support.interruption import heard_interruptions


@posix
@pytest.mark.parametrize(
    "name, where, step",
    [
        ("SIGINT", "training_loss", 7),
        ("SIGTERM", "training_loss", 7),
        ("SIGHUP", "training_loss", 7),
        ("SIGTERM", "save_checkpoint", 8),
        ("SIGTERM", "held_out_loss", 8),
        ("SIGTERM", "sample", 8),
        ("SIGTERM", "draw_denoising", 8),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_never_stopped(
    name, where, step, resume, stopped, tmp_path, capsys, monkeypatch
):
    """A step and its save are finished first. Whatever else is going on ends at once, and is done
    again when the run is resumed. Handlers are put back.
    """
    module = support.run if where == "save_checkpoint" else program
    signum, interrupted = getattr(signal, name), getattr(module, where)

    def interrupt(*arguments, **options):
        patch.setattr(module, where, interrupted)
        signal.raise_signal(signum)
        assert where in ("training_loss", "save_checkpoint"), "it went on"
        return interrupted(*arguments, **options)

    before = signal.signal(signum, signal.SIG_DFL)  # nohup ignores SIGHUP
    with monkeypatch.context() as patch:
        patch.setattr(module, where, interrupt)
        assert run_main(*resume) == (128 + signum, "")
    assert signal.signal(signum, before) == signal.SIG_DFL
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and sys.executable in error, error
    assert f"--max-steps={STEPS_PER_EPOCH}" in error  # what is pasted does what was asked
    assert checkpoint(tmp_path)["step"] == step
    assert (tmp_path / "weights.pt").exists() == (where == "draw_denoising")
    assert run_main(*resume) == (0, "") and same_run(tmp_path, stopped[1])


def defer_the_first_alone(first, second) -> None:
    with heard_interruptions() as signals:
        signals.deferred = True
        signal.raise_signal(first)
        assert signals.received == [first]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


@posix
def test_a_second_signal_ends_at_once_and_nohup_stays_in_force():
    defer_the_first_alone(signal.SIGTERM, signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with heard_interruptions() as signals:
        signals.deferred = True
        for _ in range(2):  # a terminal that is closed sends it twice
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == [signal.SIGHUP] * 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with heard_interruptions() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == []
    signal.signal(signal.SIGHUP, before)


@posix
def test_windows_has_a_ctrl_break_in_place_of_a_hangup(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGURG, raising=False)
    monkeypatch.delattr(signal, "SIGHUP")
    defer_the_first_alone(signal.SIGBREAK, signal.SIGBREAK)


@posix
def test_a_run_that_ends_before_it_saved_says_nothing_of_the_earlier_one(
    resume, tmp_path, capsys, monkeypatch
):
    interrupted = mock.Mock(side_effect=lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr("support.datasets.read_dataset", interrupted)
    for options, advised in ((["--output-dir", tmp_path], False), (resume, True)):
        assert run_main(*options) == (128 + signal.SIGTERM, "")
        assert ("--resume" in capsys.readouterr().err) == advised
