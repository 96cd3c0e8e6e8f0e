"""Checkpoints: kept, refused if they are broken or another program's."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
from conftest import (
    DRAW,
    TINY,
    checkpoint,
    parsed,
    run_main,
    same_state,
)

from support import checkpoints


def test_a_new_run_puts_an_earlier_ones_files_aside_together(
    finished, small_data, tmp_path, capsys
):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "my notes.txt").write_text("are not the run's")
    before = {path.name: path.read_bytes() for path in finished[0].iterdir()}
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options) == (0, "") == run_main(*options)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "earlier_1").iterdir()}
    assert kept == before and (tmp_path / "my notes.txt").exists()
    assert checkpoint(tmp_path)["step"] == checkpoint(tmp_path / "earlier_2")["step"] == 1
    assert not (tmp_path / "samples_epoch_3.png").exists()
    assert f"moved to {tmp_path / 'earlier_2'}" in capsys.readouterr().out


def test_a_checkpoint_that_would_unpack_to_a_hundred_times_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(OSError, match="bomb.pt is damaged .*a hundred times its size"):
        checkpoints.load_checkpoint(tmp_path / "bomb.pt")


def test_a_strangers_settings_are_checked_and_decide_nothing_else(resume_finished, tmp_path):
    state = checkpoint(tmp_path)
    good = dict(state["settings"])
    more = {"output_dir": str(tmp_path / "elsewhere"), "output": "x.png", "device": "abacus"}
    state["settings"] = {**good, **more, "no_such_option": 1}
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", state)
    args = parsed(*resume_finished)
    assert args.output_dir == tmp_path and args.device == "auto" and not hasattr(args, "no_such")
    for name, bad in (("lr", -1.0), ("eta", "much"), ("sample_steps", 10**9), ("schedule", "x")):
        state["settings"] = {**good, name: bad}
        checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", state)
        code, message = run_main(*resume_finished)
        assert code == 1 and "checkpoint.pt is damaged" in message and "\n" not in message


def test_weights_alone_draw_the_same_and_those_of_another_network_do_not(finished, tmp_path):
    shutil.copy(finished[0] / "weights.pt", tmp_path / "checkpoint.pt")
    assert run_main(*DRAW, "--output-dir", tmp_path, "--num-samples", 4) == (0, "")
    drawn, expected = tmp_path / "samples.png", finished[0] / "samples_epoch_3.png"
    assert drawn.read_bytes() == expected.read_bytes()
    code, message = run_main("--output-dir", tmp_path, "--resume")
    assert code == 2 and "weights to draw with" in message
    state = checkpoint(tmp_path)
    state["ema"]["stem.weight"] = state["ema"]["stem.weight"][:5]
    checkpoints.save_checkpoint(tmp_path / "odd.pt", state)
    code, message = run_main(*DRAW, "--output-dir", tmp_path, "--checkpoint", tmp_path / "odd.pt")
    assert code == 1 and "odd.pt holds another network" in message and "\n" not in message


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def flipped(content: bytes, position: int) -> bytes:
    """With one bit turned over."""
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


@pytest.mark.parametrize("kind", ["bytes", "states"])
def test_broken_checkpoints_get_one_line_and_stay(kind, resume_finished, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    good, state = path.read_bytes(), checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    half, evil = good[: len(good) // 2], pickle.dumps(Evil())
    contents = [b"", half, flipped(good, 9999), b"hello\n", evil]
    states = [{"weights": torch.zeros(3)}, {**state, "format": "diffusion-mnist 3"}, [1, 2, 3]]
    states += [{**state, "settings": Evil()}]
    for broken in contents if kind == "bytes" else states:
        if kind == "bytes":
            path.write_bytes(broken)
        else:
            torch.save(broken, path)
        before = path.read_bytes()
        for options in (resume_finished, ["--sample-only", "--output-dir", tmp_path]):
            code, message = run_main(*options)
            assert code == 1 and "checkpoint.pt is damaged" in message and "\n" not in message
            assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_checkpoint_of_another_program_gets_one_line_when_resumed(resume_finished, tmp_path):
    state = checkpoint(tmp_path)
    del state["format"]
    small = {**state["model"], "stem.weight": state["model"]["stem.weight"][:5]}
    without_step = {name: value for name, value in state.items() if name != "step"}
    for other in (state | {"model": small}, state | {"optimizers": []}, without_step):
        checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", other)
        code, message = run_main(*resume_finished)
        assert code == 1 and "checkpoint.pt does not fit this program" in message, message
        assert "\n" not in message


def test_every_flipped_bit_is_harmless_or_found(finished, tmp_path):
    """The checkpoint is refused or loads as it was: never silently other weights."""
    path, found = tmp_path / "weights.pt", 0
    good = (finished[0] / "weights.pt").read_bytes()
    expected = checkpoints.load_checkpoint(finished[0] / "weights.pt")
    for position in range(11, len(good), len(good) // 100):
        path.write_bytes(flipped(good, position))
        try:
            assert same_state(checkpoints.load_checkpoint(path), expected), position
        except OSError:
            found += 1
    assert found > 60
