"""The program as a user runs it: what it writes and says, in terminals and notebooks."""

import io
import os
import shlex
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import (
    DRAW,
    PICTURES,
    ROOT,
    STEPS_PER_EPOCH,
    THREE_EPOCHS,
    TINY,
    checkpoint,
    parsed,
    read_log,
    run_main,
    same_run,
    same_state,
)
from PIL import Image
from test_datasets import COLOR, GRAY, LABELS, save

import train_diffusion as program
from support import devices

# --- the main job ---------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_no_warnings(finished):
    folder, result = finished
    others = {"train_log.csv", "checkpoint.pt", "weights.pt"}
    assert {path.name for path in folder.iterdir()} == PICTURES | others
    assert all((folder / name).stat().st_size > 500 for name in PICTURES)
    assert result.stdout.startswith("read MNIST in ")
    assert ": 64 images of 28x28 in gray, 10 classes; 16 more are held out\n" in result.stdout
    assert "training on cpu, from step 0 to " in result.stdout
    assert "epoch 3/3" in result.stdout and result.stdout.splitlines()[-1].startswith("draw more:")
    assert result.stderr == ""  # no bars where there is no terminal


def test_the_command_that_a_run_ends_with_draws_what_training_drew(finished, tmp_path, capfd):
    python, script, *options = shlex.split(finished[1].stdout.splitlines()[-1])[2:]
    called = map(os.path.abspath, (python, script))
    assert list(called) == [os.path.abspath(sys.executable), str(ROOT / "train_diffusion.py")]
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


def test_a_seed_changes_training_and_how_often_one_samples_does_not(finished, small_data, tmp_path):
    options = [*THREE_EPOCHS, "--data-dir", small_data, "--output-dir", tmp_path]
    drawing = ["--sample-every", 1, "--num-samples", 7, "--eta", 0, "--guidance", 2]
    expected = checkpoint(finished[0])["history"]
    assert run_main(*options, *drawing, "--max-steps", 2 * STEPS_PER_EPOCH) == (0, "")
    assert same_state(checkpoint(tmp_path)["history"], expected[:2])
    assert run_main(*options, "--seed", 1, "--max-steps", STEPS_PER_EPOCH) == (0, "")
    other = checkpoint(tmp_path)["history"][0]
    assert all(other[key] != expected[0][key] for key in ("train_loss", "val_loss"))


# --- drawing, and images of one's own -------------------------------------------------------------


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


def test_the_repository_holds_a_labeled_network_of_the_default_settings():
    """With which every function can be called with its defaults."""
    model, scheduler = program.load_model()
    defaults = parsed()
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
    assert devices.choose_device().type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("images, labels", [(COLOR, LABELS), (GRAY[..., None], None)])
def test_own_images_through_training_resume_and_drawing(images, labels, tmp_path):
    """Channels, size and classes come from the data; what is drawn can be trained on again."""
    path = save(tmp_path, images=images, **({} if labels is None else {"labels": labels}))
    options = [*TINY, "--dataset", path, "--batch-size", 20, "--epochs", 1, "--num-samples", 12]
    whole, stopped, drawn = tmp_path / "whole", tmp_path / "stopped", tmp_path / "drawn.npz"
    assert run_main(*options, "--output-dir", whole) == (0, "")
    assert run_main(*options, "--output-dir", stopped, "--max-steps", 2) == (0, "")
    assert run_main("--resume", "--output-dir", stopped) == (0, "") and same_run(whole, stopped)
    for name in ("samples_epoch_1.png", "denoising.gif"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    height, width, channels = images.shape[1:]
    classes = None if labels is None else 3
    columns = 9 if classes else 10
    with Image.open(whole / "samples_epoch_1.png") as grid:  # 12 images, rows of `columns`
        assert grid.size == (2 + columns * (width + 2), 2 + -(-12 // columns) * (height + 2))
    drawing = ["--sample-only", "--output-dir", whole, "--sample-steps", 2, "--guidance", 2]
    assert run_main(*drawing, "--num-samples", 30, "--output", drawn) == (0, "")
    (again, labels_again), _ = program.load_images(drawn)
    assert again.shape == (29 if labels is None else 27, channels, height, width)
    assert checkpoint(whole)["unet"]["num_classes"] == classes
    if classes:
        assert labels_again.bincount().tolist() == [9] * 3
    else:
        code, message = run_main(*drawing, "--labels", 3)
        assert code == 2 and "--labels" in message and "without labels" in message


# --- notebooks and environments -------------------------------------------------------------------


FRESH = """
import os, signal, sys, torch
os.environ["MPLBACKEND"] = "svg"

def state():
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), os.listdir(), handlers, torch.get_rng_state().tolist()

before = state()
import train_diffusion, matplotlib
assert state() == before and matplotlib.get_backend() == "svg"
if os.path.exists("/dev/full"):
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stdout.fileno())
    os.close(sys.stderr.fileno())
    sys.stderr = None  # as Python finds it with 2>&-
    train_diffusion.main(sys.argv[1:])
"""


def test_importing_changes_nothing_and_a_run_with_nowhere_to_print_ends_well(small_data, tmp_path):
    """No file, variable of the environment, signal handler or random state; and a notebook, whose
    backend matplotlib looks for but once, still shows its pictures.

    Both in one new interpreter, since its imports take seconds.
    """
    options = [*TINY, "--max-steps", "1", "--data-dir", str(small_data), "--output-dir", "out"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    command = [sys.executable, "-c", FRESH, *options]
    result = subprocess.run(command, capture_output=True, text=True, **settings)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    if os.path.exists("/dev/full"):
        assert checkpoint(tmp_path / "out")["step"] == 1


def test_a_notebook_calls_main_from_a_thread_and_with_its_own_options(
    small_data, tmp_path, monkeypatch
):
    """There the command line is the kernel's, the output has no encoding, and no handler is set."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/tmp/kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    results = []
    thread = threading.Thread(target=lambda: results.append(run_main(*options)))
    thread.start()
    thread.join()
    assert results == [(0, "")] and "train_diffusion.py --sample-only" in sys.stdout.getvalue()
