"""Images: published sets where they lie, images of one's own, what is said of broken ones."""

import gzip
import re
import shutil
import ssl
import threading
import time
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    TINY,
    idx,
    run_main,
)
from torchvision import datasets as published

import train_diffusion as program
from support import datasets

KINDS = ("images-idx3", "labels-idx1")


FILES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in KINDS]


def make_set(folder, packed=True):
    """A data set in MNIST's layout, four files, of 70 training images and 20 others."""
    folder.mkdir(parents=True)
    for name in FILES:
        count = 70 if name.startswith("train") else 20
        images, labels = torch.randint(0, 256, (count, 28, 28)), torch.arange(count) % 10
        content = idx(labels if "labels" in name else images)
        path = folder / (name if packed else name.removesuffix(".gz"))
        path.write_bytes(gzip.compress(content) if packed else content)


@pytest.fixture
def raw(tmp_path):
    """A folder with such a set, as a part of the --data-dir tmp_path."""
    make_set(tmp_path / "MNIST" / "raw")
    return tmp_path / "MNIST" / "raw"


@pytest.fixture
def no_network(monkeypatch):
    cause = ssl.SSLCertVerificationError("certificate has expired")
    refuse = mock.Mock(side_effect=urllib.error.URLError(cause))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


# --- published sets -------------------------------------------------------------------------------


def test_the_repository_holds_all_of_mnist(mnist):
    (images, labels), (test_images, test_labels) = mnist
    assert images.shape == (60_000, 1, 28, 28) and test_images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    mean = images.float().mean().item()
    assert mean == pytest.approx(33.3184, abs=1e-3)  # MNIST's known mean, 0.13066 of 255
    assert labels.bincount().tolist()[:3] == [5923, 6742, 5958]  # as published
    assert test_labels[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
def test_a_published_set_is_read_where_it_lies(dataset, packed, tmp_path, no_network):
    """With no network, and without writing anything: the folder may be read-only."""
    folder = tmp_path / dataset / "raw"
    make_set(folder, packed)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (images, labels), (test_images, test_labels) = program.load_images(dataset, str(tmp_path))
    assert images.shape == (70, 1, 28, 28) and test_images.shape == (20, 1, 28, 28)
    assert torch.equal(labels, torch.arange(70) % 10) and len(test_labels) == 20
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


BREAKS = {
    "empty": lambda content: b"",
    "no archive": lambda content: b"<html>not found</html>",
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "of floats": lambda content: gzip.compress(b"\0\0\x0d" + gzip.decompress(content)[3:]),
    "too long": lambda content: gzip.compress(gzip.decompress(content) + b"\0"),
    "too short": lambda content: gzip.compress(gzip.decompress(content)[:-1]),
    "header alone": lambda content: gzip.compress(gzip.decompress(content)[:6]),
    "unpacked": lambda content: None,
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("name", [FILES[0], FILES[3]])
def test_a_damaged_file_is_named_with_a_remedy(how, name, raw, tmp_path):
    content, path = (raw / name).read_bytes(), raw / name
    if how == "unpacked":
        path.unlink()
        path = path.with_suffix("")
        path.write_bytes(gzip.decompress(content)[:-1])
    else:
        path.write_bytes(BREAKS[how](content))
    with pytest.raises(OSError, match="is damaged .*published file") as error:
        program.load_images("MNIST", tmp_path)
    assert f"{path} " in str(error.value) and "\n" not in str(error.value)


def test_files_that_do_not_fit_together_and_one_that_may_not_be_read(raw, tmp_path, monkeypatch):
    (raw / FILES[1]).write_bytes(gzip.compress(idx(torch.zeros(69))))
    with pytest.raises(ValueError, match="one for each image"):
        program.load_images("MNIST", tmp_path)
    for name, content, words in (
        (FILES[3], torch.full((20,), 22), "only held-out images have some label"),
        (FILES[2], torch.zeros(20, 32, 32), "one split has other shapes"),
    ):
        shutil.rmtree(raw)
        make_set(raw)
        (raw / name).write_bytes(gzip.compress(idx(content)))
        with pytest.raises(ValueError, match=words):
            program.load_images("MNIST", tmp_path)
    denied = mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("gzip.open", denied)
    with pytest.raises(OSError, match=f"{FILES[0]} is not yours to use .* published file"):
        program.load_images("MNIST", tmp_path)
    monkeypatch.setattr("gzip.open", mock.Mock(side_effect=MemoryError))
    with pytest.raises(OSError, match=f"too little memory for .*{FILES[0]}"):  # not: delete it
        program.load_images("MNIST", tmp_path)


def test_a_missing_file_names_every_address_and_its_cause(no_network, raw, tmp_path):
    (raw / FILES[2]).unlink()
    with pytest.raises(OSError, match="is missing") as error:
        program.load_images("MNIST", tmp_path)
    message, mirrors = str(error.value), published.MNIST.mirrors
    assert str(raw / FILES[2]) in message and "Put" in message and "--data-dir" in message
    assert all(mirror + FILES[2] in message for mirror in mirrors)
    assert message.count("certificate has expired") == len(mirrors)
    assert {path.name for path in raw.iterdir()} == {*FILES} - {FILES[2]}
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="its folder cannot be written to"):
        program.load_images("MNIST", tmp_path / "file")


def test_missing_files_are_downloaded_whole_by_several_at_once(tmp_path, monkeypatch):
    """Three first runs at the same time, and an address that gives the wrong file."""
    make_set(tmp_path / "source")
    results = []

    def fake_download(url, root, filename, md5):
        if url.startswith("https://wrong/"):
            raise RuntimeError("File not found or corrupted.")
        content, path = (tmp_path / "source" / filename).read_bytes(), Path(root, filename)
        path.write_bytes(content[:50])
        time.sleep(0.05)  # in which nobody may take the half for the whole
        path.write_bytes(content)

    def first_run():
        results.append(program.load_images("KMNIST", tmp_path))

    monkeypatch.setattr(published.utils, "download_url", fake_download)
    monkeypatch.setattr(published.KMNIST, "mirrors", ["https://wrong/", "https://right/"])
    threads = [threading.Thread(target=first_run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(train[0]) for train, _ in results] == [70] * 3
    assert {path.name for path in (tmp_path / "KMNIST" / "raw").iterdir()} == {*FILES}


# --- images of one's own --------------------------------------------------------------------------


RANDOM = np.random.default_rng(0)


GRAY = RANDOM.integers(0, 256, (100, 16, 12), dtype=np.uint8)


COLOR = RANDOM.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)


LABELS = np.arange(100) % 3


def save(tmp_path, **arrays):
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz"


TWO_SPLITS = [
    {"train_images": COLOR, "train_labels": LABELS, "val_images": COLOR[:3]}
    | {"test_images": COLOR[:7], "test_labels": LABELS[:7]},
    {"x_train": GRAY, "y_train": LABELS} | {"x_test": GRAY[:9], "y_test": LABELS[:9]},
]


@pytest.mark.parametrize("arrays", TWO_SPLITS)
def test_npz_files_with_two_splits_as_many_publish_them(arrays, tmp_path):
    (images, labels), (held_out, held_out_labels) = program.load_images(save(tmp_path, **arrays))
    train, test = (x for name, x in arrays.items() if name in ("x_train", "x_test") or "_im" in name
                   and "val" not in name)  # fmt: skip
    for tensor, array in ((images, train), (held_out, test)):
        assert np.array_equal(datasets.to_arrays(tensor), array)
        assert np.array_equal(tensor[2, 0, 3], array[2, 3].reshape(array.shape[2], -1)[:, 0])
    assert torch.equal(labels, torch.arange(100) % 3) and labels.dtype == torch.int64
    assert torch.equal(held_out_labels, torch.arange(len(held_out)) % 3)


@pytest.mark.parametrize("images", [GRAY, GRAY[..., None], COLOR])
@pytest.mark.parametrize("kind", [None, float, np.uint8])
def test_of_one_split_a_twentieth_is_held_out_by_a_fixed_draw(images, kind, tmp_path):
    """Every image is in one of the splits, with its label; those to train on in their order."""
    labels = {} if kind is None else {"labels": LABELS[:, None].astype(kind)}
    path = save(tmp_path, images=images, **labels)
    splits, again = program.load_images(path), program.load_images(path)
    assert len(splits[0][0]) == (95 if kind is None else 97)
    plain = [image.tobytes() for image in images]  # all of them are different
    found = []
    for (tensor, tensor_labels), (same, _) in zip(splits, again):
        which = [plain.index(image.tobytes()) for image in datasets.to_arrays(tensor)]
        assert torch.equal(tensor, same)
        assert (
            (tensor_labels is None)
            if kind is None
            else tensor_labels.tolist() == [LABELS[i] for i in which]
        )
        found.append(which)
    train, held_out = found
    assert sorted(train + held_out) == list(range(100)) and train == sorted(train)
    assert splits[0][0].untyped_storage().nbytes() == images.nbytes  # and no copy of them


def test_held_out_images_are_of_every_class_that_can_spare_one_and_in_no_order(tmp_path):
    """Of 10, 200, 1, 2 and 40 images, in the order of their classes, as people join them."""
    counts = [10, 200, 1, 2, 40]
    labels = np.repeat(np.arange(5), counts)
    images = np.arange(253, dtype=np.uint8).repeat(16).reshape(253, 4, 4)
    path = save(tmp_path, images=images, labels=labels)
    (_, train_labels), (held_out, held_out_labels) = program.load_images(path)
    assert held_out_labels.bincount(minlength=5).tolist() == [1, 10, 0, 1, 2]
    assert train_labels.tolist() == sorted(train_labels.tolist())
    assert held_out_labels.tolist() != sorted(held_out_labels.tolist())
    which = held_out[:, 0, 0, 0].int()
    assert labels[which].tolist() == held_out_labels.tolist()
    spread = which[held_out_labels == 1].aminmax()  # not the first or last of a class
    assert spread.max - spread.min > 100
    path = save(tmp_path, images=images[:3], labels=np.arange(3))
    with pytest.raises(ValueError, match="at least two images"):
        program.load_images(path)


@pytest.mark.parametrize("name", ["label", "y", "targets"])
def test_labels_by_another_name_are_not_passed_over_in_silence(name, tmp_path, capsys):
    path = save(tmp_path, images=GRAY, **{name: LABELS})
    assert program.load_images(path)[0][1] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"the array {name} is not used. Call labels labels" in line
    datasets.load_data(str(path), None, None, torch.device("cpu"), True)


def test_a_run_is_measured_by_the_first_two_thousand_held_out_images(mnist, monkeypatch):
    monkeypatch.setattr(datasets, "read_dataset", lambda *source: (mnist, None))
    data = datasets.load_data("MNIST", None, None, torch.device("cpu"), labeled=True)
    assert torch.equal(data.held_out_images, mnist[1][0][:2000])
    assert torch.equal(data.held_out_labels, mnist[1][1][:2000])
    assert data.num_classes == 10 and data.image_shape == (1, 28, 28) and data.images is mnist[0][0]
    plain = datasets.load_data("MNIST", None, None, torch.device("cpu"), labeled=False)
    assert plain.labels is plain.held_out_labels is plain.num_classes is None
    assert plain.check_sums == data.check_sums


def test_what_was_read_is_said_in_a_line():
    images, labels = torch.zeros(12, 3, 8, 16), torch.arange(12)
    names = [f"kind {i}" for i in range(12)]
    line = datasets.what_was_read("a.npz", [(images, labels), (images[:2], labels[:2])], names)
    assert line == (
        "read a.npz: 12 images of 8x16 in color, 12 classes (kind 0, kind 1, kind 2, kind 3, "
        "kind 4, kind 5, kind 6, kind 7, kind 8, kind 9, ...); 2 more are held out"
    )
    plain = datasets.what_was_read("x", [(images[:, :1], None), (images[:2], None)], None)
    assert plain == "read x: 12 images of 8x16 in gray, no labels; 2 more are held out"


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"pictures": GRAY}, "called images"),
        ({"test_images": GRAY}, "called images"),
        ({"images": GRAY / 255}, "uint8.*float64"),
        ({"images": COLOR.transpose(0, 3, 1, 2)}, r"\[100, 3, 32, 32\]"),
        ({"images": np.zeros((9, 8, 8, 4), np.uint8)}, r"\[9, 8, 8, 4\]"),
        ({"images": np.zeros((9, 64), np.uint8)}, r"\[9, 64\]"),
        ({"images": GRAY[:0]}, "there must be images"),
        ({"images": GRAY[:, :15]}, "4 must divide.*15, 12.*Pad or resize"),
        ({"images": GRAY, "labels": LABELS[:99]}, "one for each"),
        ({"images": GRAY, "labels": LABELS - 1}, "from 0 to 9999"),
        ({"images": GRAY, "labels": LABELS + 0.5}, "whole numbers"),
        ({"images": GRAY, "labels": LABELS * np.nan}, "whole numbers"),
        ({"images": GRAY, "labels": np.eye(100, dtype=int)}, "one for each"),
        ({"images": GRAY, "labels": np.array(["cat"] * 100)}, "whole numbers"),
        ({"images": GRAY, "labels": LABELS + 10**9}, "from 0 to 9999"),
        ({"images": GRAY, "test_images": COLOR}, "other shapes"),
        ({"images": GRAY, "labels": LABELS, "test_images": GRAY}, "labels where"),
        ({"images": GRAY[:8]}, "--batch-size: only 7 images"),
        ({"images": GRAY[:1]}, "at least two images"),
    ],
)
def test_an_unfit_npz_file_gets_one_line(arrays, words, tmp_path):
    options = ["--dataset", save(tmp_path, **arrays), "--output-dir", tmp_path / "out", *TINY]
    code, message = run_main(*options, "--max-steps", 1)
    assert code == 2 and "\n" not in message and re.search(words, message), message
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_labels_with_gaps_are_taken_with_a_warning(tmp_path, capsys):
    """Such as EMNIST's letters, which count from 1: every label below the largest has a column."""
    program.load_images(save(tmp_path, images=GRAY, labels=LABELS))
    assert capsys.readouterr().err == ""
    path = save(tmp_path, images=GRAY, labels=LABELS + 1)
    assert program.load_images(path)[0][1].unique().tolist() == [1, 2, 3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: no image has the label 0, ")


def test_a_broken_npz_file_gets_one_line(tmp_path):
    pickled = save(tmp_path, images=np.array([{}, {}], object)).read_bytes()
    good = save(tmp_path, images=GRAY).read_bytes()
    for number, content in enumerate((b"", b"hello\n", good[: len(good) // 2], pickled, None)):
        path = tmp_path / f"{number}.npz"
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
        code, message = run_main("--dataset", path, "--output-dir", tmp_path / "out")
        assert code == (2 if content is None else 1), message
        assert str(path) in message and "\n" not in message
