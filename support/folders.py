"""A folder of pictures as a data set: found, decoded, brought to one size."""

import os
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from support.messages import InputError, progress_bar, say

# What Pillow raises at a picture that is cut short, damaged, too large or of no kind that it reads.
BROKEN: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, struct.error)
BROKEN += (zlib.error, MemoryError, Image.DecompressionBombError)


def read_folder(
    folder: Path, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None, list[str] | None]:
    """Images [N, size, size, 1 or 3], their labels [N] and the names of the classes.

    A subfolder is a class, in natural order: 2 before 10. Pictures alone have no labels. All are
    gray if every picture is.
    """
    paths, classes = find_pictures(folder)
    pixels = np.empty((len(paths), size, size, 1), np.uint8)
    kept: list[int] = []
    broken: list[str] = []
    for i, path in enumerate(progress_bar(paths, f"reading {folder.name}")):
        try:
            picture = square(decode(path, size), size)
        except BROKEN as error:
            broken.append(f"{path} ({error})")
            continue
        if picture.shape[2] > pixels.shape[3]:  # the first in color
            pixels = np.repeat(pixels, 3, axis=3)
        pixels[len(kept)] = picture
        kept.append(i)
    if not kept:
        cause = f": {broken[0]}" if broken else ""
        raise InputError(f"argument --dataset: {folder} holds no picture that can be read{cause}")
    say_left_out(broken, "Pillow cannot read")
    if classes is None:
        return pixels[: len(kept)], None, None
    used = [classes[i] for i in kept]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(used))}
    return pixels[: len(kept)], np.array([numbers[name] for name in used]), list(numbers)


def find_pictures(folder: Path) -> tuple[list[Path], list[str] | None]:
    """The pictures in a folder, in natural order, and of which class each is (None: no classes)."""
    walk = os.walk(folder, followlinks=True)
    paths = [Path(place, name).relative_to(folder) for place, _, names in walk for name in names]
    paths.sort(key=lambda path: natural_order(str(path)))
    hidden = [path for path in paths if any(map(is_hidden, path.parts))]
    seen = [path for path in paths if not any(map(is_hidden, path.parts))]
    known = Image.registered_extensions()
    pictures = [path for path in seen if path.suffix.lower() in known]
    others = [path for path in seen if path.suffix.lower() not in known]
    say_left_out(hidden, "systems hide")
    say_left_out(others, "have no suffix of a picture")
    in_classes = [path for path in pictures if len(path.parts) > 1]
    if not in_classes:
        return [folder / path for path in pictures], None
    loose = [path for path in pictures if len(path.parts) == 1]
    say_left_out(loose, "lie beside the subfolders, which are the classes")
    return [folder / path for path in in_classes], [path.parts[0] for path in in_classes]


def natural_order(text: str) -> list[str | int]:
    """A key to sort by, in which 2 comes before 10."""
    parts = re.split(r"(\d+)", text.casefold())  # text and digits in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def is_hidden(name: str) -> bool:
    """What systems and notebooks put beside one's own files."""
    return name.startswith((".", "__MACOSX", "@eaDir")) or name in ("Thumbs.db", "desktop.ini")


def decode(path: Path, size: int) -> Image.Image:
    """A picture as every viewer shows it: upright, on white, gray (L) or RGB with 8 bits."""
    with warnings.catch_warnings(), Image.open(path) as file:
        warnings.simplefilter("ignore")  # of what Pillow reads all the same
        file.draft(None, (2 * size, 2 * size))  # a JPEG is decoded at about the size it is used in
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # 16 bits, or numbers: microscopes, scanners, depth
            sixteen = image.mode.startswith("I;16") or (image.mode, file.format) == ("I", "PNG")
            return Image.fromarray(to_8_bits(np.asarray(image, np.float64), 65535 * sixteen))
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
        return image.convert("L" if image.mode in ("1", "L") else "RGB")


def to_8_bits(values: NDArray[np.float64], full: float) -> NDArray[np.uint8]:
    """Scaled, not cut, from 0 ... full; if that is 0, from 0 ... 1, 255, 65535 or the largest."""
    largest = float(values.max())
    full = full or next((full for full in (1, 255, 65535) if largest <= full), largest)
    return np.asarray((values / full * 255).round().clip(0, 255), np.uint8)


def square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The middle of it, antialiased, [size, size, 1] or, if it has any color, [size, size, 3]."""
    array = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    gray = array.reshape(size, size, -1)
    return gray[..., :1] if (gray == gray[..., :1]).all() else gray


def say_left_out(what: list[Path] | list[str], why: str) -> None:
    if what:
        some = ", ".join(map(str, what[:2])) + ", ..." * (len(what) > 2)
        say(f"warning: left out {len(what)} of the files, which {why}: {some}", sys.stderr)
