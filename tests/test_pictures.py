"""Pictures show what they are handed, whatever the user's matplotlib is like."""

import math
import os
import subprocess
import sys
from unittest import mock

import matplotlib
import numpy as np
import torch
from conftest import (
    ROOT,
    STEPS_PER_EPOCH,
    checkpoint,
    run_main,
)

from support import pictures


def test_every_column_of_a_grid_is_of_one_class():
    """About ten columns, so that each class has as many as any other."""
    images = torch.randint(0, 256, (24, 3, 28, 28), dtype=torch.uint8)
    for classes, columns in ((None, 10), (1, 10), (2, 10), (4, 8), (7, 7), (12, 12)):
        grid = np.asarray(pictures.grid_image(images, classes))
        rows = math.ceil(24 / columns)
        assert grid.shape == (2 + rows * 30, 2 + columns * 30, 3)
        left = 2 + 3 * 30  # the second row's image in the fourth column
        cell = grid[32:60, left : left + 28]
        assert np.array_equal(cell, images[columns + 3].permute(1, 2, 0))


def test_pictures_and_logs_that_cannot_be_written_never_end_a_run(resume, tmp_path, capsys):
    names = ["train_log.csv", "loss_curve.png", "samples_epoch_1.png", "denoising.gif"]
    for name in names:
        (tmp_path / name / "in the way").mkdir(parents=True)
    with mock.patch.object(
        pictures, "draw_images"
    ):  # one figure is enough, and takes half a second
        assert run_main(*resume, pictures=True) == (0, "")
    assert checkpoint(tmp_path)["step"] == STEPS_PER_EPOCH
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("warning: no ") for line in lines)
    assert all(any(name in line for line in lines) for name in names)


def test_the_users_matplotlib_settings_have_no_say(tmp_path):
    """Neither TeX that is not installed nor a size; and they stay as they are."""
    rows = [{"epoch": 1, "train_loss": 0.1, "val_loss": 0.2}]
    t, losses = torch.arange(20), torch.rand(20)
    pictures.draw_loss_curve(tmp_path / "a.png", rows, t, losses)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red", "font.size": 50}):
        before = dict(matplotlib.rcParams)
        pictures.draw_loss_curve(tmp_path / "b.png", rows, t, losses)
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_notebook_that_imports_the_program_first_still_shows_its_pictures():
    """matplotlib looks at the variable but once."""
    code = "import train_diffusion, matplotlib; print(matplotlib.get_backend())"
    settings = {"cwd": ROOT, "env": {**os.environ, "MPLBACKEND": "svg"}}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, **settings)
    assert (result.returncode, result.stdout, result.stderr) == (0, "svg\n", "")
