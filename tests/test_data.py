"""Images: published sets where they lie, images of one's own, what is said of broken ones."""

import gzip
import re
import shutil
import ssl
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, checkpoint, idx, run_main, same_run
from PIL import Image

import train_diffusion as program

FILES = [f"{split}-{kind}-ubyte.gz" for split in ("train", "t10k") for kind in
         ("images-idx3", "labels-idx1")]  # fmt: skip


def make_set(folder, packed=True, count=70):
    """A data set in MNIST's layout, four files, of `count` training images and 20 others."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for split, n in (("train", count), ("t10k", 20)):
        images = torch.randint(0, 256, (n, 28, 28), generator=generator)
        for kind, array in (("images-idx3", images), ("labels-idx1", torch.arange(n) % 10)):
            name = f"{split}-{kind}-ubyte" + ".gz" * packed
            (folder / name).write_bytes(gzip.compress(idx(array)) if packed else idx(array))


@pytest.fixture()
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("certificate has expired"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# --- into the model and back ----------------------------------------------------------------------


def test_the_repository_holds_all_of_mnist(mnist):
    (images, labels), (test_images, test_labels) = mnist
    assert images.shape == (60_000, 1, 28, 28) and test_images.shape == (10_000, 1, 28, 28)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    mean = images.float().mean().item()
    assert mean == pytest.approx(33.3184, abs=1e-3)  # MNIST's known mean, 0.13066 of 255
    assert labels.bincount().tolist()[:3] == [5923, 6742, 5958]  # as published
    assert test_labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_pixels_go_into_the_model_and_back_unchanged():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x_0 = program.to_model(pixels)
    assert x_0.min() == -1 and x_0.max() == 1 and torch.equal(program.to_uint8(x_0), pixels)
    assert program.to_uint8(torch.tensor([-1.5, 0.0, 1.5])).tolist() == [0, 128, 255]


@pytest.mark.parametrize("shape", [(2, 8, 12), (2, 8, 12, 3)])
def test_files_hold_images_as_numpy_people_expect(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images, labels = program.to_tensors(ROOT, array, None)
    assert images.shape == (2, len(shape) == 4 and 3 or 1, 8, 12) and labels is None
    assert images[1, 0, 3, 5] == array[1, 3, 5].reshape(-1)[0]
    assert np.array_equal(program.to_arrays(images), array)


# --- published sets -------------------------------------------------------------------------------


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


def break_file(path, how):
    content = path.read_bytes()
    broken = {
        "empty": b"",
        "no archive": b"<html>not found</html>",
        "half": content[: len(content) // 2],
        "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "another file": gzip.compress(b"\0\0\x0d\x03" + bytes(16)),
        "too long": gzip.compress(gzip.decompress(content) + b"\0"),
        "too short": gzip.compress(gzip.decompress(content)[:-1]),
        "header alone": gzip.compress(gzip.decompress(content)[:6]),
    }
    path.write_bytes(broken[how])


BREAKS = ["empty", "no archive", "half", "flipped", "another file", "too long", "too short"]


@pytest.mark.parametrize("how", [*BREAKS, "header alone"])
@pytest.mark.parametrize("name", [FILES[0], FILES[3]])
def test_a_damaged_file_is_named_with_a_remedy(how, name, tmp_path):
    make_set(tmp_path / "MNIST" / "raw")
    break_file(tmp_path / "MNIST" / "raw" / name, how)
    with pytest.raises(OSError, match="is damaged .*published file") as error:
        program.load_images("MNIST", tmp_path)
    assert str(tmp_path / "MNIST" / "raw" / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_unpacked_file_is_named(tmp_path):
    make_set(tmp_path / "MNIST" / "raw", packed=False)
    path = tmp_path / "MNIST" / "raw" / FILES[0][:-3]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match=f"{path.name} is damaged"):
        program.load_images("MNIST", tmp_path)


def test_labels_and_images_of_different_number_are_refused(tmp_path):
    make_set(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / FILES[1]).write_bytes(gzip.compress(idx(torch.zeros(69))))
    with pytest.raises(ValueError, match="one for each image"):
        program.load_images("MNIST", tmp_path)


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    make_set(tmp_path / "MNIST" / "raw")

    def denied(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(program.gzip, "open", denied)
    with pytest.raises(OSError, match="is not yours to use") as error:
        program.load_images("MNIST", tmp_path)
    assert FILES[0] in str(error.value) and "damaged" not in str(error.value)


def test_a_missing_file_without_network_names_every_address_and_its_cause(no_network, tmp_path):
    make_set(tmp_path / "MNIST" / "raw")
    (tmp_path / "MNIST" / "raw" / FILES[2]).unlink()
    with pytest.raises(OSError, match="is missing") as error:
        program.load_images("MNIST", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "MNIST" / "raw" / FILES[2]) in message and "Put" in message
    mirrors = program.datasets.MNIST.mirrors
    assert all(mirror + FILES[2] in message for mirror in mirrors)
    assert message.count("certificate has expired") == len(mirrors)
    assert sorted(path.name for path in (tmp_path / "MNIST" / "raw").iterdir()) == sorted(
        set(FILES) - {FILES[2]}
    )


def test_a_missing_file_in_a_folder_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "MNIST").write_text("a file, no folder")
    with pytest.raises(OSError, match="its folder cannot be written to"):
        program.load_images("MNIST", tmp_path)


def test_missing_files_are_downloaded_whole_by_several_at_once(tmp_path, monkeypatch):
    """Three first runs at the same time, and an address that gives the wrong file."""
    make_set(tmp_path / "source")
    asked = []

    def fake_download(url, root, filename, md5):
        asked.append(url)
        if url.startswith(program.datasets.KMNIST.mirrors[0]) and len(asked) == 1:
            raise RuntimeError("File not found or corrupted.")
        shutil.copy(tmp_path / "source" / filename, root)

    monkeypatch.setattr(program.datasets.utils, "download_url", fake_download)
    monkeypatch.setattr(program.datasets.KMNIST, "mirrors", ["https://a/", "https://b/"])
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(program.load_images("KMNIST", tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(train[0]) for train, _ in results] == [70] * 3
    assert sorted(p.name for p in (tmp_path / "KMNIST" / "raw").iterdir()) == sorted(FILES)


# --- images of one's own --------------------------------------------------------------------------

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (100, 16, 16), dtype=np.uint8)
COLOR = RANDOM.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(100) % 3


def save(tmp_path, **arrays):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "arrays, sizes, labeled",
    [
        ({"images": GREY}, (95, 5), False),
        ({"images": GREY[..., None], "labels": LABELS[:, None].astype(np.uint8)}, (95, 5), True),
        ({"images": COLOR, "labels": LABELS.astype(float)}, (95, 5), True),
        (
            {"train_images": COLOR, "train_labels": LABELS, "val_images": COLOR[:3]}
            | {"test_images": COLOR[:7], "test_labels": LABELS[:7]},
            (100, 7),
            True,
        ),
        (
            {"x_train": GREY, "y_train": LABELS, "x_test": GREY[:9], "y_test": LABELS[:9]},
            (100, 9),
            True,
        ),
    ],
)
def test_npz_files_as_many_publish_them(arrays, sizes, labeled, tmp_path):
    (images, labels), (test_images, test_labels) = program.load_images(save(tmp_path, **arrays))
    first = next(iter(arrays.values()))
    assert (len(images), len(test_images)) == sizes
    plain = first[..., 0] if first.shape[3:] == (1,) else first  # as `to_arrays` writes them
    assert np.array_equal(program.to_arrays(images[:7]), plain[:7])
    assert (labels is not None) == labeled == (test_labels is not None)
    if labeled:
        assert torch.equal(labels, torch.arange(sizes[0]) % 3) and labels.dtype == torch.int64
    if sizes == (95, 5):
        assert np.array_equal(program.to_arrays(test_images), plain[95:])


def test_a_data_set_takes_its_own_size_once(tmp_path):
    images, _ = program.load_images(save(tmp_path, images=COLOR))[0]
    assert images.untyped_storage().nbytes() == COLOR.nbytes  # held-out images are a part of it


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"pictures": GREY}, "called images"),
        ({"test_images": GREY}, "called images"),
        ({"images": GREY / 255}, "uint8.*float64"),
        ({"images": COLOR.transpose(0, 3, 1, 2)}, r"\[100, 3, 32, 32\]"),
        ({"images": np.zeros((9, 8, 8, 4), np.uint8)}, r"\[9, 8, 8, 4\]"),
        ({"images": np.zeros((9, 64), np.uint8)}, r"\[9, 64\]"),
        ({"images": GREY[:0]}, "there must be images"),
        ({"images": GREY[:, :15]}, "4 must divide.*15, 16.*Pad or resize"),
        ({"images": GREY, "labels": LABELS[:99]}, "one for each"),
        ({"images": GREY, "labels": LABELS - 1}, "from 0 to 9999"),
        ({"images": GREY, "labels": LABELS + 0.5}, "whole numbers"),
        ({"images": GREY, "labels": LABELS * np.nan}, "whole numbers"),
        ({"images": GREY, "labels": np.eye(100, dtype=int)}, "one for each"),
        ({"images": GREY, "labels": np.array(["cat"] * 100)}, "whole numbers"),
        ({"images": GREY, "labels": LABELS + 10**9}, "from 0 to 9999"),
        ({"images": GREY, "test_images": COLOR}, "other shapes"),
        ({"images": GREY, "labels": LABELS, "test_images": GREY}, "labels where"),
        ({"images": GREY[:10]}, "--batch-size: there are only 9 images"),
    ],
)
def test_an_unfit_npz_file_gets_one_line(arrays, words, tmp_path, capsys):
    options = ["--dataset", save(tmp_path, **arrays), "--output-dir", tmp_path / "out", *TINY]
    code, message = run_main(*options, "--max-steps", 1)
    assert code == 2 and "\n" not in message
    assert re.search(words, message), message
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "half", "pickled", "a folder"])
def test_a_broken_npz_file_gets_one_line(kind, tmp_path):
    path = save(tmp_path, images=GREY)
    if kind == "pickled":
        np.savez(path, images=np.array([{}, {}], dtype=object))
    elif kind in ("missing", "a folder"):
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    else:
        content = path.read_bytes()
        broken = {"empty": b"", "text": b"hello\n", "half": content[: len(content) // 2]}
        path.write_bytes(broken[kind])
    code, message = run_main("--dataset", path, "--output-dir", tmp_path / "out")
    assert code == (2 if kind in ("missing", "a folder") else 1)
    assert str(path) in message and "\n" not in message


@pytest.mark.parametrize(
    "images, labels",
    [
        (COLOR, LABELS),
        (GREY[..., None], None),
        (RANDOM.integers(0, 256, (100, 28, 28), np.uint8), None),
    ],
)
def test_own_images_through_training_resume_and_drawing(images, labels, tmp_path):
    """Channels, size and classes come from the data; what is drawn can be trained on again."""
    path = save(tmp_path, images=images, **({} if labels is None else {"labels": labels}))
    options = [*TINY, "--dataset", path, "--batch-size", 10, "--epochs", 1, "--num-samples", 12]
    assert run_main(*options, "--output-dir", tmp_path / "a") == (0, "")
    assert run_main(*options, "--output-dir", tmp_path / "b", "--max-steps", 4) == (0, "")
    resumed = ["--resume", "--output-dir", tmp_path / "b"]
    assert run_main(*resumed) == (0, "") and same_run(tmp_path / "a", tmp_path / "b")
    for name in ("samples_epoch_1.png", "denoising.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    size, classes = images.shape[1], 3 if labels is not None else 10
    with Image.open(tmp_path / "a" / "samples_epoch_1.png") as grid:  # 12 images, rows of `classes`
        assert grid.size == (2 + classes * (size + 2), 2 + -(-12 // classes) * (size + 2))
    out = tmp_path / "drawn.npz"
    drawing = ["--sample-only", "--output-dir", tmp_path / "a", "--num-samples", 30]
    assert run_main(*drawing, "--sample-steps", 2, "--output", out) == (0, "")
    (again, labels_again), _ = program.load_images(out)
    assert again.shape[1:] == (images.shape[3] if images.ndim == 4 else 1, size, size)
    if labels is not None:
        assert torch.equal(labels_again, torch.arange(28) % 3)
    assert checkpoint(tmp_path / "a")["unet"]["num_classes"] == (None if labels is None else 3)
