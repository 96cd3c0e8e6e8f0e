"""The program as a user runs it: what it writes, what it says, and what it says to bad input."""

import csv
import inspect
import os
import pickle
import runpy
import shlex
import shutil
import subprocess
import sys

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

import train_diffusion as program

PICTURES = {"samples_epoch_2.png", "samples_epoch_3.png", "samples_progress.png"}
PICTURES |= {"loss_curve.png", "noise_schedule.png", "forward_process.png"}
PICTURES |= {"denoising.png", "denoising.gif"}


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """A finished run of three epochs with grids every second one, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data]
    result = run_program(*options, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the main job ---------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_no_warnings(finished):
    folder, result = finished
    others = {"train_log.csv", "checkpoint.pt", "weights.pt"}
    assert {path.name for path in folder.iterdir()} == PICTURES | others
    assert all((folder / name).stat().st_size > 500 for name in PICTURES)
    assert "epoch 3/3" in result.stdout and result.stdout.splitlines()[-1].startswith("draw more:")
    assert result.stderr == ""  # no bars where there is no terminal


def test_the_command_that_a_run_ends_with_can_be_typed(finished, tmp_path):
    python, script, *options = shlex.split(finished[1].stdout.splitlines()[-1])[2:]
    assert (python, script) == (sys.executable, str(ROOT / "train_diffusion.py"))
    more = ["--sample-steps", 2, "--num-samples", 4, "--output", tmp_path / "more.png"]
    assert run_main(*options, *more) == (0, "")
    assert (tmp_path / "more.png").read_bytes() == (
        finished[0] / "samples_epoch_3.png"
    ).read_bytes()


def test_the_log_has_a_row_for_every_epoch(finished):
    rows = read_log(finished[0])
    names = ["epoch", "step", "train_loss", "val_loss", "seconds", "images_per_second"]
    assert list(rows[0]) == names
    steps = [(int(row["epoch"]), int(row["step"])) for row in rows]
    assert steps == [(i, i * STEPS_PER_EPOCH) for i in (1, 2, 3)]
    assert all(0 < float(value) < 1e6 for row in rows for value in row.values())
    for row in rows:
        assert float(row["images_per_second"]) * float(row["seconds"]) >= NUM_TRAIN * 0.99
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_grid_has_a_column_for_every_class(finished, tmp_path):
    """The same noise each time, so column i of a grid is what asking for i alone draws."""
    model, scheduler = program.load_model(finished[0] / "weights.pt")
    images = program.sample(model, scheduler, num_samples=20, num_steps=2)
    grid = program.grid_image(images, model.num_classes)
    assert grid.size == (2 + 10 * 30, 2 + 2 * 30)
    cell = np.asarray(grid)[32:60, 2 + 3 * 30 : 2 + 3 * 30 + 28, 0]  # second row, column of the 3s
    assert np.array_equal(cell, images[13, 0].numpy())
    asked = program.sample(model, scheduler, labels=[i % 10 for i in range(20)], num_steps=2)
    assert torch.equal(asked, images)


def test_the_same_seed_gives_the_same_files_and_another_seed_others(finished, small_data, tmp_path):
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data]
    assert run_main(*options, "--output-dir", tmp_path / "0") == (0, "")
    assert run_main(*options, "--output-dir", tmp_path / "1", "--seed", 1, "--max-steps", 9) == (
        0,
        "",
    )
    for name in ("samples_epoch_2.png", "samples_epoch_3.png", "denoising.gif"):
        assert (tmp_path / "0" / name).read_bytes() == (finished[0] / name).read_bytes()
    assert same_run(tmp_path / "0", finished[0])
    first, other = (
        checkpoint(tmp_path / "0")["history"][0],
        checkpoint(tmp_path / "1")["history"][0],
    )
    assert first["train_loss"] != other["train_loss"] and first["val_loss"] != other["val_loss"]
    expected = (finished[0] / "samples_epoch_2.png").read_bytes()
    assert (tmp_path / "1" / "samples_epoch_2.png").read_bytes() != expected


def test_how_often_one_samples_does_not_change_training(finished, small_data, tmp_path):
    options = [*TINY, "--epochs", 3, "--data-dir", small_data, "--output-dir", tmp_path]
    drawing = ["--sample-every", 1, "--num-samples", 7, "--eta", 0, "--guidance", 2]
    assert run_main(*options, *drawing) == (0, "")
    for key in ("model", "ema", "optimizers", "losses", "history"):
        assert same_state(checkpoint(tmp_path)[key], checkpoint(finished[0])[key]), key


def test_max_steps_stops_in_the_middle_and_draws(small_data, tmp_path):
    options = [*TINY, "--max-steps", 3, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options) == (0, "")
    assert (tmp_path / "samples_epoch_1.png").exists() and read_log(tmp_path)[0]["step"] == "3"
    assert checkpoint(tmp_path)["step"] == 3


def test_a_new_run_keeps_earlier_checkpoints_under_numbers(finished, small_data, tmp_path, capsys):
    before = (finished[0] / "checkpoint.pt").read_bytes()
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    assert run_main(*options) == (0, "") == run_main(*options)
    assert (tmp_path / "checkpoint_1.pt").read_bytes() == before
    assert checkpoint(tmp_path)["step"] == 1 and (tmp_path / "checkpoint_2.pt").exists()
    assert "kept as checkpoint_2.pt" in capsys.readouterr().out


# --- resume ---------------------------------------------------------------------------------------


def test_resume_alone_goes_on_as_the_run_was_and_ends_in_the_same_bits(
    finished, small_data, tmp_path, monkeypatch
):
    """From the middle of the first epoch and of the third; every tensor, the log, the pictures."""
    monkeypatch.chdir(small_data)  # a relative --data-dir is found again from elsewhere
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", "."]
    folder = ["--output-dir", tmp_path]
    assert run_main(*options, *folder, "--max-steps", 3) == (0, "")
    monkeypatch.chdir(tmp_path)
    assert run_main("--resume", "--max-steps", 2 * STEPS_PER_EPOCH + 1) == (0, "")
    assert run_main("--resume", *folder) == (0, "")
    assert same_run(tmp_path, finished[0])
    for row, expected in zip(read_log(tmp_path), read_log(finished[0]), strict=True):
        assert list(row.items())[:4] == list(expected.items())[:4]
    for name in PICTURES - {"loss_curve.png", "noise_schedule.png"}:
        if name.startswith("samples_epoch") or name.endswith("gif"):
            assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_resuming_a_finished_run_says_that_nothing_is_left_and_draws_what_is_missing(
    finished, tmp_path, capsys
):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    assert run_main("--resume", "--output-dir", tmp_path) == (0, "")
    assert "nothing left to train" in capsys.readouterr().out
    assert (tmp_path / "denoising.gif").exists() and same_run(tmp_path, finished[0])


def test_a_run_killed_before_it_could_look_looks_when_resumed(
    finished, small_data, tmp_path, monkeypatch
):
    """Killed right after an epoch is saved: its row, its grid and all that follows are the same."""
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data]

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "held_out_loss", killed)
        run_main(*options, "--output-dir", tmp_path)
    state = checkpoint(tmp_path)
    assert (state["step"], state["history"]) == (STEPS_PER_EPOCH, [])
    assert run_main("--resume", "--output-dir", tmp_path) == (0, "")
    assert same_run(tmp_path, finished[0]) and len(read_log(tmp_path)) == 3


def test_what_may_change_on_resume_is_said_and_what_may_not_is_refused(finished, tmp_path, capsys):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    resume = ["--resume", "--output-dir", tmp_path]
    for option, value, old in (
        ("--lr", 0.5, 0.005), ("--seed", 7, 0), ("--batch-size", 16, 32), ("--timesteps", 50, 20),
        ("--optimizer", "adam", "muon"), ("--dataset", "KMNIST", "MNIST"), ("--epochs", 2, 3),
        ("--label-dropout", 0.5, 0.1), ("--schedule", "linear", "cosine"),
    ):  # fmt: skip
        code, message = run_main(*resume, option, value)
        assert code == 2 and option in message and str(old) in message and str(value) in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    capsys.readouterr()
    assert run_main(*resume, "--epochs", 4, "--guidance", 1, "--max-steps", 26) == (0, "")
    output = capsys.readouterr().out
    assert "--epochs 4 (was 3)" in output and "--guidance 1.0 (was 0.2)" in output
    assert checkpoint(tmp_path)["step"] == 26


def test_a_run_may_go_on_with_grids_of_another_size(finished, tmp_path, capfd):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    resume = ["--resume", "--output-dir", tmp_path, "--epochs", 4, "--num-samples", 9]
    assert run_main(*resume) == (0, "") and capfd.readouterr().err == ""
    assert [strip.shape[0] for _, strip in checkpoint(tmp_path)["strips"]] == [9]


def test_an_extended_run_takes_the_learning_rate_of_the_longer_run(finished, tmp_path, monkeypatch):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    rates, step = [], program.Muon.step
    monkeypatch.setattr(
        program.Muon, "step", lambda o: (rates.append(o.param_groups[0]["lr"]), step(o))
    )
    resume = ["--resume", "--output-dir", tmp_path, "--epochs", 100, "--max-steps", 26]
    assert run_main(*resume) == (0, "")
    assert rates == pytest.approx([0.005 * (i + 1) / 200 * (1 - i / 800) for i in (24, 25)])


def test_a_data_set_that_has_changed_is_refused(finished, tmp_path):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    code, message = run_main("--resume", "--output-dir", tmp_path, "--data-dir", ROOT / "data")
    assert code == 2 and "not what" in message and "\n" not in message


# --- drawing --------------------------------------------------------------------------------------

DRAW = ["--sample-only", "--sample-steps", 2]


def test_sample_only_draws_what_training_drew(finished, tmp_path, capfd):
    options = [*DRAW, "--checkpoint", finished[0] / "checkpoint.pt", "--num-samples", 4]
    assert run_main(*options, "--output", tmp_path / "new" / "grid.png") == (0, "")
    output, error = capfd.readouterr()
    assert "4 images" in output and error == ""
    expected = (finished[0] / "samples_epoch_3.png").read_bytes()
    assert (tmp_path / "new" / "grid.png").read_bytes() == expected


def test_the_weights_alone_draw_the_same_and_cannot_be_resumed(finished, tmp_path):
    shutil.copy(finished[0] / "weights.pt", tmp_path / "checkpoint.pt")
    assert run_main(*DRAW, "--output-dir", tmp_path, "--num-samples", 4) == (0, "")
    expected = (finished[0] / "samples_epoch_3.png").read_bytes()
    assert (tmp_path / "samples.png").read_bytes() == expected
    code, message = run_main("--output-dir", tmp_path, "--resume")
    assert code == 2 and "weights to draw with" in message


def test_labels_are_drawn_as_asked_and_written_with_the_images(finished, tmp_path):
    model, scheduler = program.load_model(finished[0] / "weights.pt")
    expected = program.sample(model, scheduler, labels=[3, 1, 4, 1, 5], num_steps=2)
    options = [*DRAW, "--output-dir", finished[0], "--labels", 3, 1, 4, 1, 5]
    assert run_main(*options, "--output", tmp_path / "pi.npz") == (0, "")
    with np.load(tmp_path / "pi.npz") as file:
        assert file["labels"].tolist() == [3, 1, 4, 1, 5]
        assert np.array_equal(file["images"], expected[:, 0].numpy())
    assert run_main(*options, "--output", tmp_path / "pi.npy") == (0, "")
    assert np.array_equal(np.load(tmp_path / "pi.npy"), expected[:, 0].numpy())


def test_the_repository_holds_a_labeled_network_of_the_default_settings():
    model, scheduler = program.load_model()
    defaults = program.parse_options([])
    assert (scheduler.num_timesteps, scheduler.schedule) == (defaults.timesteps, defaults.schedule)
    assert model.stem.out_channels == defaults.base_channels and model.num_classes == 10
    assert (ROOT / "pretrained.pt").stat().st_size <= 4_000_000
    digits = program.sample(model, scheduler, num_steps=10)
    ink = (digits > 127).float().mean(dim=(1, 2, 3))  # of MNIST's own, 99 % have 3 to 24 % white
    assert ((ink > 0.02) & (ink < 0.3)).all()
    assert (digits[:, :, 0] < 64).float().mean() > 0.99  # strokes inside, black at the edge


def test_the_defaults_of_options_and_functions_are_the_same():
    def default(function, name):
        return inspect.signature(function).parameters[name].default

    args = program.parse_options([])
    for function in (program.sample, program.denoise):
        assert args.sample_steps == default(function, "num_steps")
        assert (args.eta, args.guidance) == (
            default(function, "eta"),
            default(function, "guidance"),
        )
    assert args.seed == default(program.sample, "seed")
    assert args.timesteps == default(program.NoiseScheduler, "num_timesteps")
    assert args.schedule == default(program.NoiseScheduler, "schedule")
    assert args.base_channels == default(program.UNet, "base_channels")
    assert args.dataset == default(program.load_images, "dataset")
    assert args.data_dir is None and default(program.load_images, "data_dir") == ROOT / "data"


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--epochs", "0"], ["--epochs", "whole number from 1"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--num-samples", "many"], ["--num-samples", "many"]),
        (["--lr", "0"], ["--lr"]),
        (["--lr", "fast"], ["--lr", "number", "fast"]),
        (["--lr", "nan"], ["--lr"]),
        (["--guidance", "-1"], ["--guidance", "0", "-1"]),
        (["--guidance", "inf"], ["--guidance"]),
        (["--eta", "1.5"], ["--eta", "from 0 to 1"]),
        (["--timesteps", "1"], ["--timesteps", "2"]),
        (["--timesteps", "20"], ["--sample-steps", "--timesteps"]),
        (["--base-channels", "16"], ["--base-channels", "24"]),
        (["--label-dropout", "0"], ["--label-dropout", "guidance"]),
        (["--dataset", "CIFAR10"], ["--dataset", "FashionMNIST", ".npz"]),
        (["--dataset", "missing.npz"], ["--dataset", "missing.npz"]),
        (["--schedule", "sigmoid"], ["--schedule", "cosine"]),
        (["--sample-only", "--output", "digits.jpg"], ["--output", ".png"]),
        (["--sample-only", "--output", "."], ["--output", ".png"]),
        (["--output", "digits.png"], ["--output", "--sample-only"]),
        (["--labels", "3"], ["--labels", "--sample-only"]),
        (["--sample-only", "--labels", "three"], ["--labels", "three"]),
        (["--sample-only", "--labels", "3", "10"], ["--labels", "0 to 9"]),
        (["--sample-only", "--labels", "-1"], ["--labels"]),
        (["--sample-only", "--labels", "3", "--num-samples", "2"], ["--num-samples"]),
        (["--sample-only", "--sample-steps", "1001"], ["--sample-steps", "1000", "1001"]),
        (["--sample-only", "--resume"], ["--sample-only", "--resume"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--resume"], ["checkpoint.pt", "Train first"]),
        (["--sample-only", "--checkpoint", "missing.pt"], ["missing.pt"]),
        (["--batch-size", "1000", "--data-dir", "SMALL"], ["--batch-size", "256"]),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2(options, words, small_data, tmp_path, capsys):
    options = [small_data if option == "SMALL" else option for option in options]
    # One step: it fails soon if it is accepted.
    code, message = run_main("--output-dir", tmp_path, "--max-steps", 1, *options)
    assert code == 2 and "\n" not in message and all(word in message for word in words), message
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_an_error_is_one_line_for_a_user(tmp_path, monkeypatch, capsys):
    """What stands under __main__, run in this process."""
    for options, status in ((["--device", "cuda:99"], 2), (["--data-dir", str(ROOT / "docs")], 1)):
        argv = ["train_diffusion.py", *options, "--output-dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr("signal.signal", lambda signum, handler: None)  # pytest keeps its own
        monkeypatch.setattr(program.datasets.MNIST, "mirrors", [])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "train_diffusion.py"), run_name="__main__")
        output = capsys.readouterr()
        assert end.value.code == status and output.out == "" and output.err.count("\n") == 1
        assert output.err.startswith("train_diffusion.py: error: ")


def test_labels_for_a_network_without_classes_are_refused(small_data, tmp_path):
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--label-dropout", 1]
    assert run_main(*options, "--max-steps", 1) == (0, "")
    code, message = run_main(*DRAW, "--output-dir", tmp_path, "--labels", 3)
    assert code == 2 and "--labels" in message and "without labels" in message
    assert run_main(*DRAW, "--output-dir", tmp_path, "--guidance", 2) == (0, "")


def test_a_folder_that_cannot_be_made_is_named(small_data, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "gone")
    for name in ("file", "file/folder", "nowhere"):
        code, message = run_main(*TINY, "--data-dir", small_data, "--output-dir", tmp_path / name)
        assert code == 2 and "--output-dir" in message and str(tmp_path / name) in message
        code, message = run_main(*DRAW, "--output", tmp_path / name / "digits.png")
        assert code == 2 and str(tmp_path / name) in message and "\n" not in message


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


BROKEN = ["empty", "half", "flipped", "text", "pickle", "foreign", "older", "evil", "a list"]


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("option", ["--sample-only", "--resume"])
def test_broken_checkpoints_get_one_line_and_stay(kind, option, finished, tmp_path, monkeypatch):
    path, good = tmp_path / "checkpoint.pt", (finished[0] / "checkpoint.pt").read_bytes()
    states = {
        "foreign": {"weights": torch.zeros(3)},
        "older": {**checkpoint(finished[0]), "format": "diffusion-mnist 3"},
        "evil": {"format": program.CHECKPOINT_FORMAT, "settings": Evil()},
        "a list": [1, 2, 3],
    }
    contents = {
        "empty": b"",
        "half": good[: len(good) // 2],
        "flipped": good[:9999] + bytes([good[9999] ^ 1]) + good[10000:],
        "text": b"hello\n",
        "pickle": pickle.dumps(Evil()),
    }  # fmt: skip
    if kind in states:
        torch.save(states[kind], path)
    else:
        path.write_bytes(contents[kind])
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    code, message = run_main(option, "--output-dir", tmp_path)
    assert code == 1 and "checkpoint.pt is damaged" in message and "\n" not in message
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_every_flipped_bit_is_harmless_or_found(finished, tmp_path):
    """The checkpoint is refused or loads as it was: never silently other weights."""
    good, expected = (finished[0] / "weights.pt").read_bytes(), None
    expected = program.load_checkpoint(finished[0] / "weights.pt")
    path, found = tmp_path / "weights.pt", 0
    for position in range(11, len(good), len(good) // 100):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            assert same_state(program.load_checkpoint(path), expected), position
        except OSError:
            found += 1
    assert found > 60


def test_weights_of_another_network_get_one_line(finished, tmp_path):
    state = program.load_checkpoint(finished[0] / "weights.pt")
    state["ema"]["stem.weight"] = state["ema"]["stem.weight"][:5]
    program.save_checkpoint(tmp_path / "odd.pt", state)
    options = [*DRAW, "--checkpoint", tmp_path / "odd.pt", "--output-dir", tmp_path]
    code, message = run_main(*options)
    assert code == 1 and "odd.pt holds another network" in message and "\n" not in message


# --- called from Python ---------------------------------------------------------------------------


def test_every_function_can_be_called_with_its_defaults(mnist):
    model, scheduler = program.load_model(str(ROOT / "pretrained.pt"))
    images, labels = mnist[0]
    loss = program.training_loss(model, scheduler, program.to_model(images[:2]))
    assert loss.shape == (2,) and loss.requires_grad
    assert program.sample(model, scheduler, 2).shape == (2, 1, 28, 28)
    t, x_t, x_0_pred = next(program.denoise(model, scheduler, torch.randn(2, 1, 28, 28)))
    assert t == 999 and x_t.shape == x_0_pred.shape == (2, 1, 28, 28)
    assert program.choose_device().type in ("cpu", "cuda", "mps")


def test_importing_changes_nothing(tmp_path):
    """No file, no variable of the environment, no signal handler, no random state."""
    code = (
        "import os, signal, sys, torch; os.environ['MPLBACKEND'] = 'module://nowhere.to_be_found'; "
        "sys.path.insert(0, sys.argv[1]); environment = dict(os.environ); "
        "handlers = [signal.getsignal(s) for s in (2, 15)]; state = torch.get_rng_state(); "
        "import train_diffusion; assert dict(os.environ) == environment; "
        "assert handlers == [signal.getsignal(s) for s in (2, 15)]; "
        "assert torch.equal(torch.get_rng_state(), state)"
    )
    command = [sys.executable, "-c", code, str(ROOT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stderr == "" and not list(tmp_path.iterdir())
