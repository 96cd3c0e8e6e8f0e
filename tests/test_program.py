"""The program as a user runs it: what it writes, what it says, and what it says to bad input."""

import csv
import inspect
import math
import os
import pickle
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    NUM_TRAIN,
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    checkpoint,
    run_main,
    run_program,
    same_run,
    same_state,
)
from PIL import Image

import train_diffusion as program

PICTURES = {"samples_epoch_2.png", "samples_epoch_3.png", "denoising.png", "denoising.gif"}
PICTURES |= {"loss_curve.png", "noise_schedule.png", "forward_process.png"}
SAMPLED = ("samples_epoch_2.png", "samples_epoch_3.png", "denoising.gif")  # drawn without figures
THREE_EPOCHS = [*TINY, "--epochs", 3, "--sample-every", 2]
DRAW = ["--sample-only", "--sample-steps", 2]


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """The folder of a finished run of three epochs in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_program(*THREE_EPOCHS, "--data-dir", small_data, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def resume(finished, tmp_path):
    """The options that go on with a copy of the finished run."""
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    return ["--resume", "--output-dir", tmp_path]


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the main job ---------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_no_warnings(finished):
    folder, result = finished
    others = {"train_log.csv", "checkpoint.pt", "weights.pt"}
    assert {path.name for path in folder.iterdir()} == PICTURES | others
    assert all((folder / name).stat().st_size > 500 for name in PICTURES)
    assert result.stdout.startswith("training on cpu, from step 0 to ")
    assert "epoch 3/3" in result.stdout and result.stdout.splitlines()[-1].startswith("draw more:")
    assert result.stderr == ""  # no bars where there is no terminal


def test_the_command_that_a_run_ends_with_draws_what_training_drew(finished, tmp_path, capfd):
    python, script, *options = shlex.split(finished[1].stdout.splitlines()[-1])[2:]
    assert (python, script) == (sys.executable, str(ROOT / "train_diffusion.py"))
    path = tmp_path / "new" / "more.png"
    more = ["--sample-steps", 2, "--num-samples", 4, "--output", path]
    assert run_main(*options, *more) == (0, "")
    output, error = capfd.readouterr()
    assert "4 images" in output and error == ""
    drawn = path.read_bytes()
    assert drawn == (finished[0] / "samples_epoch_3.png").read_bytes()
    assert run_main(*options, *more, "--seed", 1) == (0, "") and path.read_bytes() != drawn
    assert run_main(*options, *more[2:]) == (0, "")  # in 25 steps, or as many as there are: 20


def test_the_log_has_a_row_for_every_epoch(finished):
    rows = read_log(finished[0])
    assert list(rows[0]) == ["epoch", "step", "train_loss", "val_loss", "seconds"]
    steps = [(int(row["epoch"]), int(row["step"])) for row in rows]
    assert steps == [(i, i * STEPS_PER_EPOCH) for i in (1, 2, 3)]
    assert all(0 < float(value) < 1e6 for row in rows for value in row.values())
    for key, order in (("val_loss", -1), ("seconds", 1)):
        values = [float(row[key]) for row in rows]
        assert values == sorted(set(values))[::order], key


def test_every_column_of_a_grid_is_of_one_class():
    """About ten columns, so that each class has as many as any other."""
    images = torch.randint(0, 256, (24, 3, 28, 28), dtype=torch.uint8)
    for classes, columns in ((None, 10), (1, 10), (2, 10), (4, 8), (7, 7), (12, 12)):
        grid = np.asarray(program.grid_image(images, classes))
        rows = math.ceil(24 / columns)
        assert grid.shape == (2 + rows * 30, 2 + columns * 30, 3)
        left = 2 + 3 * 30  # the second row's image in the fourth column
        cell = grid[32:60, left : left + 28]
        assert np.array_equal(cell, images[columns + 3].permute(1, 2, 0))


def test_a_seed_changes_training_and_how_often_one_samples_does_not(finished, small_data, tmp_path):
    options = [*THREE_EPOCHS, "--data-dir", small_data, "--output-dir", tmp_path]
    drawing = ["--sample-every", 1, "--num-samples", 7, "--eta", 0, "--guidance", 2]
    expected = checkpoint(finished[0])["history"]
    assert run_main(*options, *drawing, "--max-steps", 2 * STEPS_PER_EPOCH) == (0, "")
    assert same_state(checkpoint(tmp_path)["history"], expected[:2])
    assert run_main(*options, "--seed", 1, "--max-steps", STEPS_PER_EPOCH) == (0, "")
    other = checkpoint(tmp_path)["history"][0]
    assert all(other[key] != expected[0][key] for key in ("train_loss", "val_loss"))


def test_a_new_run_keeps_earlier_checkpoints_under_numbers(resume, small_data, tmp_path, capsys):
    before = (tmp_path / "checkpoint.pt").read_bytes()
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options) == (0, "") == run_main(*options)
    assert (tmp_path / "checkpoint_1.pt").read_bytes() == before
    assert checkpoint(tmp_path)["step"] == 1 and (tmp_path / "checkpoint_2.pt").exists()
    assert "kept as checkpoint_2.pt" in capsys.readouterr().out


# --- resume ---------------------------------------------------------------------------------------


def test_resume_alone_goes_on_as_the_run_was_and_ends_in_the_same_bits(
    finished, small_data, tmp_path, monkeypatch
):
    """Stopped in the middle of the first epoch, which draws, and of the third."""
    monkeypatch.chdir(small_data)  # a relative --data-dir is found again from elsewhere
    options = ["--data-dir", ".", "--output-dir", tmp_path, "--max-steps", 3]
    assert run_main(*THREE_EPOCHS, *options) == (0, "")
    assert checkpoint(tmp_path)["step"] == 3 and read_log(tmp_path)[0]["step"] == "3"
    assert (tmp_path / "samples_epoch_1.png").exists()
    monkeypatch.chdir(tmp_path)
    assert run_main("--resume", "--max-steps", 2 * STEPS_PER_EPOCH + 1) == (0, "")
    assert run_main("--resume") == (0, "") and same_run(tmp_path, finished[0])
    for row, expected in zip(read_log(tmp_path), read_log(finished[0]), strict=True):
        assert list(row.items())[:4] == list(expected.items())[:4]
    for name in SAMPLED:
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_resuming_a_finished_run_says_that_nothing_is_left_and_draws_what_is_missing(
    resume, finished, tmp_path, capsys
):
    assert run_main(*resume) == (0, "")
    assert "nothing left to train" in capsys.readouterr().out
    assert (tmp_path / "denoising.gif").exists() and same_run(tmp_path, finished[0])


def test_what_may_not_change_on_resume_is_refused(resume, tmp_path):
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for option, value, old in (
        ("--seed", 7, 0), ("--batch-size", 16, 8), ("--timesteps", 50, 20), ("--epochs", 2, 3),
        ("--optimizer", "adam", "muon"), ("--label-dropout", 0.5, 0.1),
        ("--schedule", "linear", "cosine"), ("--base-channels", 16, 8),
    ):  # fmt: skip
        code, message = run_main(*resume, option, value)
        assert code == 2 and all(str(word) in message for word in (option, value, old)), message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_run_goes_on_with_the_same_images_wherever_they_lie(resume, small_data, tmp_path, capfd):
    (images, labels), (test_images, test_labels) = program.load_images("MNIST", small_data)
    arrays = {"x_train": images[:, 0].numpy(), "y_train": labels.numpy()}
    arrays |= {"x_test": test_images[:, 0].numpy(), "y_test": test_labels.numpy()}
    np.savez(tmp_path / "moved.npz", **arrays)
    assert run_main(*resume, "--dataset", tmp_path / "moved.npz") == (0, "")
    assert "(was MNIST)" in capfd.readouterr().out
    others = [["--data-dir", ROOT / "data"]]
    for name, place in (("x_train", (5, 5, 5)), ("y_train", 5)):
        changed = arrays[name].copy()
        changed[place] = (changed[place] + 1) % 10
        np.savez(tmp_path / f"{name}.npz", **{**arrays, name: changed})
        others.append(["--dataset", tmp_path / f"{name}.npz"])
    for other in others:
        code, message = run_main(*resume, *other)
        assert code == 2 and "not what" in message and "\n" not in message
        assert "--dataset or --data-dir" in message


def test_what_may_change_on_resume_is_said(resume, tmp_path, capfd, monkeypatch):
    """Grids of another size, and more epochs, whose learning rate is that of the longer run."""
    rates, step = [], program.Muon.step

    def spied_step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(program.Muon, "step", spied_step)
    changes = ["--epochs", 4, "--lr", 0.01, "--guidance", 1, "--num-samples", 9]
    assert run_main(*resume, *changes) == (0, "")
    output, error = capfd.readouterr()
    assert "--epochs 4 (was 3)" in output and "--guidance 1.0 (was 0.1)" in output and error == ""
    assert rates == pytest.approx([0.01 * (i + 1) / 200 * (1 - i / 32) for i in range(24, 32)])
    with Image.open(tmp_path / "samples_epoch_4.png") as grid:
        assert grid.size == (2 + 9 * 30, 2 + 30)


# --- drawing, and from Python ---------------------------------------------------------------------


def test_weights_alone_draw_the_same_and_those_of_another_network_do_not(finished, tmp_path):
    shutil.copy(finished[0] / "weights.pt", tmp_path / "checkpoint.pt")
    assert run_main(*DRAW, "--output-dir", tmp_path, "--num-samples", 4) == (0, "")
    drawn, expected = tmp_path / "samples.png", finished[0] / "samples_epoch_3.png"
    assert drawn.read_bytes() == expected.read_bytes()
    code, message = run_main("--output-dir", tmp_path, "--resume")
    assert code == 2 and "weights to draw with" in message
    state = checkpoint(tmp_path)
    state["ema"]["stem.weight"] = state["ema"]["stem.weight"][:5]
    program.save_checkpoint(tmp_path / "odd.pt", state)
    code, message = run_main(*DRAW, "--output-dir", tmp_path, "--checkpoint", tmp_path / "odd.pt")
    assert code == 1 and "odd.pt holds another network" in message and "\n" not in message


def test_labels_are_drawn_as_asked_and_written_with_the_images(finished, tmp_path):
    model, scheduler = program.load_model(finished[0] / "weights.pt")
    expected = program.sample(model, scheduler, labels=[3, 1, 4, 1, 5], num_steps=2)[:, 0].numpy()
    for name in ("pi.npz", "pi.NPY"):
        options = ["--output-dir", finished[0], "--output", tmp_path / name]
        assert run_main(*DRAW, *options, "--labels", 3, 1, 4, 1, 5) == (0, "")
    with np.load(tmp_path / "pi.npz") as file:
        assert file["labels"].tolist() == [3, 1, 4, 1, 5]
        assert np.array_equal(file["images"], expected)
    assert np.array_equal(np.load(tmp_path / "pi.NPY"), expected)


def test_options_reach_the_sampler_the_schedule_and_the_network(small_data, tmp_path, monkeypatch):
    asked, sample = [], program.sample

    def spied_sample(model, scheduler, *args, **options):
        asked.append((*args, options))
        return sample(model, scheduler, *args, **options)

    monkeypatch.setattr(program, "sample", spied_sample)
    options = ["--output-dir", tmp_path, "--eta", 0.5, "--guidance", 2, "--seed", 3]
    plan = [*TINY, "--max-steps", 1, "--data-dir", small_data]
    assert run_main(*options, *plan, "--schedule", "linear", "--base-channels", 16) == (0, "")
    assert run_main(*options, *DRAW, "--labels", 7, 8) == (0, "")
    sampler = {"eta": 0.5, "guidance": 2, "seed": 3}
    assert asked == [(4, None, 2, sampler), (None, [7, 8], 2, sampler)]
    model, scheduler = program.load_model(tmp_path / "weights.pt")
    assert model.stem.out_channels == 16 and scheduler.schedule == "linear"
    assert program.parse_options(["--data-dir", "MNIST"]).data_dir == str(Path.cwd() / "MNIST")


def test_the_repository_holds_a_labeled_network_of_the_default_settings():
    """With which every function can be called with its defaults."""
    model, scheduler = program.load_model()
    defaults = program.parse_options([])
    assert (scheduler.num_timesteps, scheduler.schedule) == (defaults.timesteps, defaults.schedule)
    assert model.stem.out_channels == defaults.base_channels and model.num_classes == 10
    assert (ROOT / "pretrained.pt").stat().st_size <= 4_000_000
    digits = program.sample(model, scheduler, 10)
    ink = (digits > 127).float().mean(dim=(1, 2, 3))  # of MNIST's own, 99 % have 3 to 24 % white
    assert digits.shape == (10, 1, 28, 28) and ((ink > 0.02) & (ink < 0.3)).all()
    assert (digits[:, :, 0] < 64).float().mean() > 0.99  # strokes inside, black at the edge
    loss = program.training_loss(model, scheduler, program.to_model(digits))
    assert loss.shape == (10,) and loss.requires_grad
    t, x_t, x_0_pred = next(program.denoise(model, scheduler, torch.randn(2, 1, 28, 28)))
    assert t == 999 and x_t.shape == x_0_pred.shape == (2, 1, 28, 28)
    assert program.choose_device().type in ("cpu", "cuda", "mps")


def test_the_defaults_of_options_and_functions_are_the_same(monkeypatch):
    monkeypatch.setattr(program, "__doc__", None)  # as by python -OO
    args = program.parse_options([])
    assert args.data_dir is None
    args.data_dir, args.num_steps = ROOT / "data", args.sample_steps
    for function, names in (
        (program.sample, "num_steps eta guidance seed"),
        (program.denoise, "num_steps eta guidance"),
        (program.NoiseScheduler, "num_timesteps schedule"),
        (program.UNet, "base_channels"),
        (program.load_images, "dataset data_dir"),
    ):
        for name in names.split():
            default = inspect.signature(function).parameters[name].default
            assert default == getattr(args, name.replace("num_timesteps", "timesteps")), name


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epochs 0", ["--epochs", "whole number from 1"]),
        ("--batch-size -1", ["--batch-size"]),
        ("--num-samples many", ["--num-samples", "many"]),
        ("--lr 0", ["--lr"]),
        ("--lr fast", ["--lr", "number", "fast"]),
        ("--lr nan", ["--lr"]),
        ("--guidance -1", ["--guidance", "0", "-1"]),
        ("--guidance inf", ["--guidance"]),
        ("--eta 1.5", ["--eta", "from 0 to 1"]),
        ("--timesteps 1", ["--timesteps", "2"]),
        ("--base-channels 12", ["--base-channels", "8"]),
        ("--label-dropout 0", ["--label-dropout"]),
        ("--dataset CIFAR10", ["--dataset", "FashionMNIST", ".npz"]),
        ("--dataset missing.npz", ["--dataset", "missing.npz"]),
        ("--schedule sigmoid", ["--schedule", "cosine"]),
        ("--sample-only --output digits.jpg", ["--output", ".png"]),
        ("--sample-only --output .", ["--output", ".png"]),
        ("--output digits.png", ["--output", "--sample-only"]),
        ("--labels 3", ["--labels", "--sample-only"]),
        ("--sample-only --labels three", ["--labels", "three"]),
        ("--sample-only --labels 3 10", ["--labels", "0 to 9"]),
        ("--sample-only --labels -1", ["--labels"]),
        ("--sample-only --labels 3 --num-samples 2", ["--num-samples"]),
        (f"--sample-only --labels {10**20}", ["--labels", "9999"]),
        ("--sample-only --output ~nobody-of-this-name/x.png", ["--output", "~nobody"]),
        ("--sample-only --resume", ["--sample-only", "--resume"]),
        (f"--seed {2**64}", ["--seed"]),
        ("--device abacus", ["--device", "abacus", "cpu"]),
        ("--device cuda:99", ["--device", "cuda:99", "cpu"]),
        ("--no-such-option", ["--no-such-option"]),
        ("--resume", ["checkpoint.pt", "Train first"]),
        ("--sample-only --checkpoint missing.pt", ["missing.pt"]),
        (f"--batch-size {NUM_TRAIN + 1}", ["--batch-size", str(NUM_TRAIN)]),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2(options, words, small_data, tmp_path, capsys):
    # One step: it fails soon if it is accepted.
    always = ["--data-dir", small_data, "--output-dir", tmp_path, "--max-steps", 1]
    code, message = run_main(*always, *options.split())
    assert code == 2 and "\n" not in message and all(word in message for word in words), message
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options, status", [(["--device", "x"], 2), (["--data-dir", "docs"], 1)])
def test_an_error_is_one_line_for_a_user(options, status, tmp_path, monkeypatch, capsys):
    """What stands under __main__, run in this process."""
    monkeypatch.setattr(
        sys, "argv", ["train_diffusion.py", *options, "--output-dir", str(tmp_path)]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda signum, handler: None)  # pytest keeps its own
    monkeypatch.setattr("socket.setdefaulttimeout", lambda seconds: None)
    monkeypatch.setattr(program.datasets.MNIST, "mirrors", [])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train_diffusion.py"), run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code == status and output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("train_diffusion.py: error: ")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--resume" in text.split("options:")[0]
    assert all(action.help for action in program.make_parser()._actions)


def test_a_folder_that_cannot_be_made_is_named(small_data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "gone")
    training = [*TINY, "--data-dir", small_data, "--output-dir"]
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", tmp_path / "nowhere"):
        for options in ([*training, folder], [*DRAW, "--output", folder / "digits.png"]):
            code, message = run_main(*options)
            assert code == 2 and f"{folder} " in message and "--output-dir" in message
            assert "\n" not in message


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def flipped(content: bytes, position: int) -> bytes:
    """With one bit turned over."""
    return content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]


@pytest.mark.parametrize("kind", ["bytes", "states"])
def test_broken_checkpoints_get_one_line_and_stay(kind, resume, tmp_path, monkeypatch):
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
        for options in (resume, ["--sample-only", "--output-dir", tmp_path]):
            code, message = run_main(*options)
            assert code == 1 and "checkpoint.pt is damaged" in message and "\n" not in message
            assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_checkpoint_of_another_program_gets_one_line_when_resumed(resume, tmp_path):
    state = checkpoint(tmp_path)
    del state["format"]
    small = {**state["model"], "stem.weight": state["model"]["stem.weight"][:5]}
    without_step = {name: value for name, value in state.items() if name != "step"}
    for other in (state | {"model": small}, state | {"optimizers": []}, without_step):
        program.save_checkpoint(tmp_path / "checkpoint.pt", other)
        code, message = run_main(*resume)
        assert code == 1 and "checkpoint.pt does not fit this program" in message, message
        assert "\n" not in message


def test_every_flipped_bit_is_harmless_or_found(finished, tmp_path):
    """The checkpoint is refused or loads as it was: never silently other weights."""
    path, found = tmp_path / "weights.pt", 0
    good = (finished[0] / "weights.pt").read_bytes()
    expected = program.load_checkpoint(finished[0] / "weights.pt")
    for position in range(11, len(good), len(good) // 100):
        path.write_bytes(flipped(good, position))
        try:
            assert same_state(program.load_checkpoint(path), expected), position
        except OSError:
            found += 1
    assert found > 60
