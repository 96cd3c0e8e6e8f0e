"""Pictures: tensors in, a file out. What they show is computed elsewhere."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

# matplotlib's import fails over a backend that is not installed, such as a notebook's that another
# environment inherits. Files need no backend.
MPLBACKEND = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import make_grid

from support.datasets import to_arrays
from support.files import write_file
from support.messages import not_vital

if MPLBACKEND is not None:
    os.environ["MPLBACKEND"] = MPLBACKEND
    with contextlib.suppress(ValueError):  # matplotlib looks but once; a notebook needs it later
        matplotlib.rcParams["backend"] = MPLBACKEND


# --- Grids ----------------------------------------------------------------------------------------


def columns_for(num_classes: int | None) -> int:
    """Columns of a grid, about ten or more: each shows one class if labels are in turn."""
    classes = num_classes or 1
    return classes * max(1, 10 // classes)


def full_rows(about: int, num_classes: int | None) -> int:
    """How many images fill the rows of a grid: about as many as that."""
    columns = columns_for(num_classes)
    return columns * max(1, about // columns)


def grid_image(images: Tensor, num_classes: int | None) -> Image.Image:
    """uint8 images [N, C, H, W] as one picture, each column of one class."""
    grid = make_grid(images.cpu(), nrow=columns_for(num_classes), padding=2)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def draw_grid(path: Path, images: Tensor, num_classes: int | None) -> None:
    """The same as a PNG."""
    write_file(path, lambda file: grid_image(images, num_classes).save(file, "PNG"))


def write_images(
    path: Path, images: Tensor, labels: Tensor | None, num_classes: int | None
) -> None:
    """uint8 images [N, C, H, W]: a grid (.png) or an array (.npy), with the labels too (.npz)."""

    def write(file: BinaryIO) -> None:
        array, kind = to_arrays(images), path.suffix.lower()
        if kind == ".png":
            grid_image(images, num_classes).save(file, "PNG")
        elif kind == ".npy":
            np.save(file, array)
        elif labels is None:
            np.savez_compressed(file, images=array)
        else:
            np.savez_compressed(file, images=array, labels=labels.numpy())

    write_file(path, write)


def draw_gif(path: Path, grids: Sequence[Tensor], num_classes: int | None) -> None:
    """Grids of uint8 images [N, C, H, W], one after the other; the last stays for a while."""
    with not_vital(path.name):
        frames = []
        for images in grids:
            frame = grid_image(images // 16 * 17, num_classes)  # 16 grays, for a smaller file
            frames.append(ImageOps.scale(frame, 2, Image.Resampling.NEAREST))
        times = [160] * (len(frames) - 1) + [2500]  # milliseconds
        gif = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        write_file(path, lambda file: frames[0].save(file, "GIF", **gif))


# --- Figures --------------------------------------------------------------------------------------


@contextlib.contextmanager
def figure_at(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, with matplotlib's own settings; a PNG in the end."""
    with not_vital(path.name), matplotlib.style.context("default"):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        # "tight": without empty margins.
        write_file(
            path, lambda file: figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
        )


def draw_images(
    path: Path, images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Draw uint8 images [rows, columns, C, H, W] with a label for every row and column."""
    height, width = images.shape[-2:]
    grid = make_grid(images.flatten(0, 1), nrow=len(columns), padding=2)
    with figure_at(path, 1.5 + 0.85 * len(columns), 1.2 + 0.85 * len(rows)) as figure:
        axes = figure.subplots()
        axes.imshow(grid.permute(1, 2, 0).cpu().numpy())
        axes.set_xticks([2 + width / 2 + i * (width + 2) for i in range(len(columns))], columns)
        axes.set_yticks([2 + height / 2 + i * (height + 2) for i in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)


def draw_loss_curve(path: Path, rows: list[dict[str, float]], t: Tensor, losses: Tensor) -> None:
    """Loss by epoch, from the log, and by timestep: a dot for each held-out image's t and loss."""
    with figure_at(path, 11, 4) as figure:
        by_epoch, by_timestep = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in rows]
        for key, label in (("train_loss", "training"), ("val_loss", "held-out, averaged weights")):
            by_epoch.plot(epochs, [row[key] for row in rows], marker="o", label=label)
        by_epoch.set(xlabel="epoch", title="Loss")
        by_epoch.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        by_epoch.legend()
        by_timestep.scatter(t.cpu(), losses.cpu(), s=4)
        by_timestep.set(xlabel="timestep t", title=f"Held-out loss by t, after epoch {epochs[-1]}")
        for axes in (by_epoch, by_timestep):
            axes.set(ylabel="mean squared error of the predicted noise", yscale="log")


def draw_noise_schedule(path: Path, curves: dict[str, Sequence[Tensor]]) -> None:
    """Three panels over t. For each schedule: alpha-bar, beta, log10 of the signal-to-noise ratio.

    All are [T].
    """
    with figure_at(path, 13, 3.6) as figure:
        panels = figure.subplots(1, 3)
        for schedule, of_schedule in curves.items():
            for axes, curve in zip(panels, of_schedule, strict=True):
                axes.plot(curve.numpy(), label=schedule)
                axes.set_xlabel("timestep t")
        panels[0].set(title="signal left: alpha-bar", ylabel="weight of x_0 in x_t, squared")
        panels[1].set(title="noise per step: beta", ylabel="variance added", yscale="log")
        panels[2].set(title="signal-to-noise ratio", ylabel="log10(alpha-bar / (1 - alpha-bar))")
        panels[0].legend()
