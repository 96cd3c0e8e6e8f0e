"""Pictures show what they are handed, whatever the user's matplotlib is like."""

import math
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import (
    STEPS_PER_EPOCH,
    checkpoint,
    parsed,
    run_main,
)
from PIL import Image
from test_sampling import Grays
from test_scheduler import reference_tables

import train_diffusion as program
from forward_reverse_process import NoiseScheduler
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


def test_a_grid_has_full_rows_of_about_as_many_as_are_asked_for():
    for about, classes, count in ((100, None, 100), (100, 10, 100), (100, 7, 98), (40, 7, 35),
                                  (100, 150, 150), (5, 10, 10)):  # fmt: skip
        assert pictures.full_rows(about, classes) == count


def test_pictures_and_logs_that_cannot_be_written_never_end_a_run(resume, tmp_path, capsys):
    names = ["train_log.csv", "loss_curve.png", "samples_epoch_1.png", "denoising.gif"]
    for name in names:
        (tmp_path / name / "in the way").mkdir(parents=True)
    # One figure is enough, and takes half a second.
    with mock.patch.object(pictures, "draw_images"):
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


# --- what the pictures show -----------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn."""
    drawn, figure = [], pictures.Figure

    def kept(**options):
        drawn.append(figure(**options))
        return drawn[-1]

    monkeypatch.setattr(pictures, "Figure", kept)
    return drawn


def curves(axes) -> dict[str, list[float]]:
    """The heights of a panel's curves, by their labels."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_the_loss_curve_has_each_loss_under_its_name(figures, tmp_path):
    rows = [{"epoch": i, "train_loss": 1 / i, "val_loss": 2 / i} for i in (1, 2, 4)]
    t, losses = torch.tensor([3, 1, 2]), torch.tensor([0.1, 0.2, 0.3])
    pictures.draw_loss_curve(tmp_path / "a.png", rows, t, losses)
    by_epoch, by_timestep = figures[0].axes
    assert curves(by_epoch) == {
        "training": [1, 0.5, 0.25],
        "held-out, averaged weights": [2, 1, 0.5],
    }
    assert list(by_epoch.lines[0].get_xdata()) == [1, 2, 4]
    dots = by_timestep.collections[0].get_offsets()
    assert np.allclose(dots, [[3, 0.1], [1, 0.2], [2, 0.3]])
    assert by_epoch.get_xlabel() == "epoch" and by_timestep.get_xlabel() == "timestep t"


def test_the_noise_schedules_are_drawn_under_their_names(figures, tmp_path):
    program.draw_noise_schedule(tmp_path / "a.png", 50)
    panels = [curves(axes) for axes in figures[0].axes]
    assert len(panels) == 3
    for schedule in ("cosine", "linear"):
        tables = reference_tables(50, schedule)
        alpha_bar = tables["alphas_cumprod"]
        expected = (alpha_bar, tables["betas"], (alpha_bar / (1 - alpha_bar)).log10())
        for panel, curve in zip(panels, expected):
            assert np.allclose(panel[schedule], curve, rtol=1e-3, atol=1e-6)
    assert "alpha-bar" in figures[0].axes[0].get_title()
    assert "beta" in figures[0].axes[1].get_title()


def test_the_forward_process_shows_add_noise_with_its_signal_to_noise_ratio(tmp_path, mnist):
    scheduler, images = NoiseScheduler(), mnist[1][0][:2]
    with mock.patch.object(pictures, "draw_images") as draw_images:
        program.draw_forward_process(tmp_path / "a.png", scheduler, images, seed=0)
    path, shown, _, labels, _ = draw_images.call_args.args
    assert path == tmp_path / "a.png" and shown.shape == (2, 11, 1, 28, 28)
    assert labels[0] == "x_0" and torch.equal(shown[:, 0], images)
    noise = torch.randn(images.shape, generator=program.generator_for("forward process", 0))
    for i, t in enumerate((0, 111, 222, 333, 444, 555, 666, 777, 888, 999), start=1):
        alpha_bar = reference_tables(1000)["alphas_cumprod"][t].item()
        assert labels[i] == f"t = {t}\nSNR {alpha_bar / (1 - alpha_bar):.2g}"
        x_t, _ = scheduler.add_noise(program.to_model(images), t, noise)
        assert torch.equal(shown[:, i], program.to_uint8(x_t))


def test_the_reverse_process_shows_x_t_above_the_x_0_that_is_predicted_from_it(tmp_path):
    """By a network that knows one gray for each label, so that x_0 is known from the start."""
    network, args = Grays(10), parsed("--sample-steps", 20, "--timesteps", 20, "--guidance", 0)
    with (
        mock.patch.object(pictures, "draw_images") as draw_images,
        mock.patch.object(pictures, "draw_gif") as draw_gif,
    ):
        program.draw_denoising(tmp_path, network, network.scheduler, args)
    _, frames, classes = draw_gif.call_args.args
    _, shown, rows, columns, _ = draw_images.call_args.args
    assert len(frames) == 21 and classes == 10 and frames[0].shape == (40, 1, 4, 4)
    for column, frame in zip(range(11), frames[::2]):  # four of the twenty are in both pictures
        assert torch.equal(frame[:4], shown[::2, column])
        assert torch.equal(frame[20:24], shown[1::2, column])
    assert shown.shape == (8, 11, 1, 4, 4) and rows == ["x_t", "predicted x_0"] * 4
    assert list(columns) == [f"t = {t}" for t in range(19, 0, -2)] + ["result"]
    grays = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1, 1)
    assert (shown[1::2] == grays).all()
    assert torch.equal(shown[::2, -1:], grays.expand(4, 1, 1, 4, 4))
    noise = program.to_model(shown[::2, 0])  # cut to [-1, 1], as pictures are
    assert noise.std() > 0.5 and abs(noise.mean()) < 0.3
    distances = (shown[::2].float() - grays).abs().mean(dim=(0, 2, 3, 4))
    assert distances.argmax() == 0 and distances[-2] < distances[0] / 2


def test_the_gif_goes_from_noise_to_images_in_fifty_frames_at_most(tmp_path):
    """Each grid has its number for its gray level, of which the file keeps sixteen."""
    for count, kept in ((3, 3), (120, 40)):
        grays = [255 * i // (count - 1) for i in range(count)]
        grids = [torch.full((4, 1, 8, 8), gray, dtype=torch.uint8) for gray in grays]
        pictures.draw_gif(tmp_path / "a.gif", grids, None)
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.n_frames <= kept
            levels, times = [], []
            for i in range(gif.n_frames):
                gif.seek(i)
                levels.append(gif.convert("L").getpixel((10, 10)))
                times.append(gif.info["duration"])
        assert levels == sorted(levels) and levels[-1] == 255
        assert min(times) >= 80 and times[-1] >= 2500  # equal frames become one
