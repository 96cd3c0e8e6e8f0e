"""Images and labels: published sets, .npz files and folders, read, checked and split.

Files hold images as uint8 [N, H, W] or [N, H, W, 3], tensors as uint8 [N, C, H, W].
"""

import gzip
import http.client
import os
import socket
import sys
import tempfile
import textwrap
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from support.files import REPOSITORY
from support.folders import read_folder
from support.messages import (
    FileError,
    InputError,
    MissingFileError,
    explained,
    one_line,
    say,
)

IDX_SETS = ("MNIST", "FashionMNIST", "KMNIST")  # published in MNIST's file format, called idx
MAX_LABEL = 9999  # every label up to the largest has a row in the network
HELD_OUT_SHARE = 20  # one image in so many is held out, where there is no published split
NUM_HELD_OUT = 2000  # images at most that the held-out loss looks at

Split = tuple[Tensor, Tensor | None]  # images, uint8 [N, C, H, W], and labels, int64 [N]


class Data(NamedTuple):
    """What a run trains on and is measured by, on its device."""

    images: Tensor  # uint8 [N, C, H, W]
    labels: Tensor | None  # int64 [N]; None for a plain model
    held_out_images: Tensor  # NUM_HELD_OUT at most
    held_out_labels: Tensor | None
    class_names: list[str] | None  # of a folder's classes
    check_sums: list[int]  # by which a resumed run knows its images and labels
    summary: str  # a line: what was read

    def batch(self, which: Tensor) -> Split:
        """The images and labels with these numbers, int64 [B]."""
        return self.images[which], None if self.labels is None else self.labels[which]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else int(self.labels.max()) + 1


def load_data(
    dataset: str,
    data_dir: str | Path | None,
    image_size: int | None,
    device: torch.device,
    labeled: bool,
) -> Data:
    """The images of a run, with their labels if it is labeled and there are any."""
    splits, names = read_dataset(dataset, data_dir, image_size)
    place = f"{dataset} in {data_dir}" if data_dir and dataset in IDX_SETS else dataset
    summary = what_was_read(place, splits, names)
    (images, labels), (test_images, test_labels) = splits
    check_sums = [check_sum(x) for x in (images, labels) if x is not None]
    images, test_images = images.to(device), test_images[:NUM_HELD_OUT].to(device)
    if labels is None or test_labels is None or not labeled:
        return Data(images, None, test_images, None, None, check_sums, summary)
    labels, test_labels = labels.to(device), test_labels[:NUM_HELD_OUT].to(device)
    return Data(images, labels, test_images, test_labels, names, check_sums, summary)


def what_was_read(place: str, splits: list[Split], names: list[str] | None) -> str:
    """A line: how many images of which size, how many classes, how many held out."""
    (images, labels), (held_out, _) = splits
    count, channels, height, width = images.shape
    classes = "no labels"
    if labels is not None:
        classes = f"{int(labels.max()) + 1} classes"
        few = [*names[:10], "..."] if names and len(names) > 10 else names
        classes += f" ({', '.join(few)})" if few else ""
    color = "gray" if channels == 1 else "color"
    size = f"{count} images of {height}x{width} in {color}"
    return f"read {place}: {size}, {classes}; {len(held_out)} more are held out"


def check_sum(tensor: Tensor) -> int:
    """In pieces, since a view of colored images is copied to be read in the order of its axes."""
    value = 0
    for piece in tensor.split(1000):
        value = zlib.crc32(piece.contiguous().numpy().data, value)
    return value


def load_images(
    dataset: str = "MNIST", data_dir: str | Path | None = None, image_size: int | None = None
) -> list[Split]:
    """The training split and the held-out split: images, uint8 [N, C, H, W], and labels, int64 [N].

    Args:
        dataset: MNIST, FashionMNIST or KMNIST; or a folder with pictures, or with a subfolder of
            them for every class; or an .npz file with an array `images`, uint8 [N, H, W] or
            [N, H, W, 3], and perhaps `labels` (else None), whole numbers from 0, or with the names
            of MedMNIST (train_images, test_images, ...) or Keras (x_train, ...).
        data_dir: where the published sets are; this repository's data if not given. What is
            missing is downloaded.
        image_size: height and width that a folder's pictures are brought to, a multiple of 4.
    """
    return read_dataset(dataset, data_dir, image_size)[0]


def read_dataset(
    dataset: str, data_dir: str | Path | None, image_size: int | None
) -> tuple[list[Split], list[str] | None]:
    """What `load_images` returns, and the names of the classes if they have some."""
    path = Path(dataset).expanduser()
    folder = dataset not in IDX_SETS and path.suffix != ".npz" and path.is_dir()
    if folder != (image_size is not None):
        goes = "a folder of pictures needs --image-size" if folder else "it is for a folder alone"
        raise InputError(f"argument --image-size: {goes}")
    if image_size is not None:
        if image_size < 4 or image_size % 4:
            raise InputError(f"argument --image-size: must be a multiple of 4, not {image_size}")
        images, labels, names = read_folder(path, image_size)
        return hold_out(path, images, labels), names
    return read_idx_set(dataset, data_dir) if dataset in IDX_SETS else read_npz(path), None


def read_idx_set(dataset: str, data_dir: str | Path | None) -> list[Split]:
    """Both splits of a published set."""
    data_dir = Path(data_dir or REPOSITORY / "data").expanduser()
    published, folder = getattr(datasets, dataset), data_dir / dataset / "raw"
    arrays = []
    for filename, md5 in published.resources:  # images and labels, then those of the held-out split
        path, unpacked = folder / filename, folder / Path(filename).stem
        if not path.exists() and not unpacked.exists():
            download(published.mirrors, path, md5)
        arrays.append(read_idx(path if path.exists() else unpacked))
    return matching(folder, [to_tensors(folder, *arrays[:2]), to_tensors(folder, *arrays[2:])])


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file, packed or not: 0, 0, 8 (for uint8), how many axes, their sizes, the data."""
    remedy = "Put the published file in its place, or delete it and run again with a network"
    with explained(path, "is damaged", remedy, (ValueError, EOFError, zlib.error)):
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            content = bytearray(file.read())
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an idx file")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        pixels = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    return pixels


def download(mirrors: list[str], path: Path, md5: str) -> None:
    """Fetch a file from the first of the published addresses that gives the right one."""
    remedy = "Put the published file there, or name another --data-dir"
    with explained(path, "is missing, and its folder cannot be written to", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent)  # nobody shall meet half a file
    causes = []
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds; else it waits for a silent server for ever
    try:
        with folder:
            for address in (mirror + path.name for mirror in mirrors):
                try:
                    datasets.utils.download_url(address, folder.name, path.name, md5)
                    return os.replace(Path(folder.name) / path.name, path)
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    causes.append(f"{address}: {one_line(error)}")
    finally:
        socket.setdefaulttimeout(before)
    raise FileError(
        f"{path} is missing, and no address gave it ({'; '.join(causes)}). Put the published file "
        "there, run again with a network, or name another --data-dir"
    )


def read_npz(path: Path) -> list[Split]:
    """Both splits of an .npz file."""
    if not path.is_file():
        raise MissingFileError(f"argument --dataset: there is no file {path}")
    broken = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, KeyError, zlib.error)
    with explained(path, "cannot be read", "Write it with numpy.savez, from plain arrays", broken):
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("images", "train_images", "x_train") if name in file][:1]
            names += [name for name in ("test_images", "x_test") if names and name in file][:1]
            labels = [name.replace("images", "labels").replace("x_", "y_") for name in names]
            arrays = [(file[x], file[y] if y in file else None) for x, y in zip(names, labels)]
            likely = [x for x in file.files if "label" in x or x in ("y", "target", "targets")]
    if not arrays:
        raise InputError(f"{path}: there is no array called images (or train_images, x_train)")
    if arrays[0][1] is None and likely:
        problem = f"the array {likely[0]} is not used. Call labels {labels[0]}"
        say(f"warning: {path}: {problem}", sys.stderr)
    if len(arrays) == 1:
        return hold_out(path, *arrays[0])
    return matching(path, [to_tensors(path, *pair) for pair in arrays])


def hold_out(
    path: Path, images: NDArray[np.uint8], labels: NDArray[np.generic] | None
) -> list[Split]:
    """Two splits of one: of each class one image in twenty is held out, and at least one.

    Of a class with a single image none is. Which ones is drawn by a fixed seed, so that it is the
    same in every run, and in no order, since the held-out loss gives image i the timestep i T / N.
    """
    everything, all_labels = to_tensors(path, images, labels)
    classes = torch.zeros(len(images), dtype=torch.int64) if all_labels is None else all_labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    chosen = []
    for label in classes.unique():
        of_class = order[classes[order] == label]
        if len(of_class) > 1:
            chosen.append(of_class[: max(1, len(of_class) // HELD_OUT_SHARE)])
    if not chosen:
        raise InputError(f"{path}: there must be at least two images, one of them to hold out")
    held_out = order[torch.isin(order, torch.cat(chosen))]
    rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, held_out, False).nonzero()[:, 0]
    test = everything[held_out], None if all_labels is None else all_labels[held_out]
    for i in range(0, len(rest), 1000):  # moved up in place: the images are not held twice
        part = rest[i : i + 1000].numpy()
        images[i : i + len(part)] = images[part]
    train = everything[: len(rest)], None if all_labels is None else all_labels[rest]
    return matching(path, [train, test])


def matching(path: Path, splits: list[Split]) -> list[Split]:
    """Both splits, if images to train on and held-out ones are of a kind."""
    (images, labels), (test_images, test_labels) = splits
    if images.shape[1:] != test_images.shape[1:] or (labels is None) != (test_labels is None):
        raise InputError(f"{path}: one split has other shapes, or labels where the other has not")
    if labels is not None and test_labels is not None:
        if not torch.isin(test_labels, labels).all():
            raise InputError(f"{path}: only held-out images have some label. Shuffle the images")
        if unused := set(range(int(labels.max()))) - set(labels.tolist()):
            without = f"no image has the label {min(unused)}, so drawing it will give nonsense"
            say(f"warning: {path}: {without}. Number labels from 0, without gaps", sys.stderr)
    return splits


def to_tensors(path: Path, images: NDArray[np.uint8], labels: NDArray[np.generic] | None) -> Split:
    """Images, checked, as a view uint8 [N, C, H, W] of the same memory; labels as int64 [N]."""
    found = f"not {images.dtype} {list(images.shape)}"
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise InputError(f"{path}: images must be uint8 [N, H, W] or [N, H, W, 1 or 3], {found}")
    if not images.size or images.shape[1] % 4 or images.shape[2] % 4:
        problem = "there must be images, and 4 must divide their height and width"
        raise InputError(f"{path}: {problem}, {found}. Pad or resize them")
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    if labels is None:
        return tensor, None
    labels = labels.reshape(-1) if labels.shape[1:] == (1,) else labels
    good = labels.dtype.kind in "iuf" and labels.shape == (len(images),)
    if not good or not np.isin(labels, np.arange(MAX_LABEL + 1)).all():
        raise InputError(
            f"{path}: labels must be whole numbers from 0 to {MAX_LABEL}, one for each image"
        )
    return tensor, torch.from_numpy(labels.astype(np.int64))


def to_arrays(images: Tensor) -> NDArray[np.uint8]:
    """The way back, as files hold images: uint8 [N, C, H, W] -> [N, H, W] or [N, H, W, 3]."""
    array: NDArray[np.uint8] = images.permute(0, 2, 3, 1).cpu().numpy()
    return array[..., 0] if array.shape[3] == 1 else array


# --- What to draw ---------------------------------------------------------------------------------


def labels_to_draw(
    num_samples: int | None,
    labels: Sequence[int | str] | Tensor | None,
    default: int,
    num_classes: int | None,
    class_names: list[str] | None = None,
) -> tuple[int, Tensor | None]:
    """How many images are asked for, and their labels, int64 [N], or None if there are no classes.

    A word is the name of a class, else a number; an int is always a number. Without labels, classes
    come in turn: 0, 1, 2, ... over and over. Without a number of images either, there are as many
    as `default`.
    """
    if num_samples is not None and num_samples < 1:
        raise InputError(f"num_samples (--num-samples) must be 1 or more, not {num_samples}")
    if labels is None:
        num_samples = num_samples or default
        return num_samples, torch.arange(num_samples) % num_classes if num_classes else None
    if num_classes is None:
        raise InputError("labels (--labels): this model was trained without labels")
    if isinstance(labels, (list, tuple)):
        labels = [number_of(label, class_names) for label in labels]
    array = labels.numpy(force=True) if isinstance(labels, Tensor) else np.array(labels)
    array = array.reshape(-1)
    good = len(array) and array.dtype.kind in "iu"  # whole numbers, with a sign or without
    if not good or not np.isin(array, np.arange(num_classes)).all():
        known = f" or of {', '.join(class_names)}" if class_names else ""
        problem = f"must be whole numbers from 0 to {num_classes - 1}{known}"
        raise InputError(f"labels (--labels) {problem}, not {textwrap.shorten(str(labels), 80)}")
    if num_samples not in (None, len(array)):
        raise InputError(f"num_samples (--num-samples) is {num_samples} for {len(array)} labels")
    return len(array), torch.from_numpy(array.astype(np.int64))


def number_of(label: int | str, class_names: list[str] | None) -> int | str:
    """The number of a class by its name, else the number that a word is, else the word itself."""
    if isinstance(label, str) and class_names and label in class_names:
        return class_names.index(label)
    return int(label) if isinstance(label, str) and label.isdecimal() else label
