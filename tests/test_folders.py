"""A folder of pictures is read as a viewer shows them; what cannot be read is named."""

import numpy as np
import pytest
import torch
from conftest import TINY, checkpoint, run_main
from PIL import Image

import train_diffusion as program
from support import folders
from support.messages import InputError

RED, BLUE, GRAY = (255, 0, 0), (0, 0, 255), (99, 99, 99)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Saves pictures in my_pictures, in which the test runs."""
    monkeypatch.chdir(tmp_path)

    def save(name, image, **options):
        path = tmp_path / "my_pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(image, Image.Image):
            image = Image.new("RGB", (40, 40), image)
        image.save(path, **options)
        return path

    return save


def read(size=32):
    """Images, uint8 [N, H, W, C], labels and class names of my_pictures."""
    return folders.read_folder(program.Path("my_pictures"), size)


def one(folder, name, image, size=32, **options):
    folder(name, image, **options)
    ((picture,), _, _) = read(size)
    return picture.astype(int)


# --- as a viewer shows it -------------------------------------------------------------------------


def test_a_photograph_that_lies_on_its_side_stands_up(folder):
    upright = Image.new("RGB", (64, 64), BLUE)
    upright.paste(RED, (0, 0, 64, 32))
    tags = Image.Exif()
    tags[0x0112] = 6
    picture = one(folder, "a.jpg", upright.rotate(90), exif=tags, quality=95)
    assert picture[2, 16, 0] > 200 > 60 > picture[29, 16, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_paper(folder, mode):
    ink = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (8, 8, 24, 24))
    picture = one(folder, "a.png", ink.convert(mode))
    assert picture.shape == (32, 32, 1)
    assert picture[16, 16, 0] == 0 and picture[2, 2, 0] == 255


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut(folder, suffix):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    picture = one(folder, f"a.{suffix}", Image.fromarray(ramp))
    assert np.abs(picture[..., 0] - ramp / 65535 * 255).max() < 1
    dark = one(folder, f"a.{suffix}", Image.fromarray(ramp // 1000))
    assert dark.max() == 0  # and not stretched


@pytest.mark.parametrize("full", [1, 255, 65535, 10**6])
def test_numbers_are_scaled_from_the_range_that_they_fit(folder, full):
    ramp = np.linspace(0, full, 32 * 32).reshape(32, 32).astype(np.float32)
    picture = one(folder, "a.tiff", Image.fromarray(ramp))
    assert np.abs(picture[..., 0] - ramp / full * 255).max() < 1


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.bmp", "a.PNG", "a.jpeg", "a.ppm", "a.tga"])
def test_every_format_that_pillow_reads(folder, name):
    assert np.abs(one(folder, name, RED) - RED).max() < 5


def test_the_shorter_side_is_resized_and_the_middle_kept(folder):
    wide = Image.new("RGB", (400, 100), RED)
    wide.paste(BLUE, (150, 0, 250, 100))
    assert (one(folder, "a.png", wide, size=8)[:, 2:-2] == BLUE).all()
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    picture = one(folder, "a.png", Image.fromarray(stripes), size=8)
    assert np.abs(picture - 127.5).max() < 5  # antialiased: their mean, and not every eighth


def test_gray_stays_gray_unless_one_is_in_color(folder):
    folder("0.png", Image.new("L", (8, 8), 50))
    folder("1.png", GRAY)
    folder("2.png", Image.new("P", (8, 8)))
    assert read(8)[0].shape == (3, 8, 8, 1)
    folder("10.png", RED)
    images, labels, names = read(8)
    assert images.shape == (4, 8, 8, 3) and labels is None and names is None
    assert images[:, 0, 0].tolist() == [[50] * 3, list(GRAY), [0] * 3, list(RED)]


# --- what is found --------------------------------------------------------------------------------


def test_subfolders_are_classes_in_natural_order(folder):
    for name in ("10/a.png", "2/b.png", "2/deep/c.png", "1/d.png"):
        folder(name, RED)
    _, labels, names = read()
    assert names == ["1", "2", "10"] and labels.tolist() == [0, 1, 1, 2]


def test_what_is_left_out_is_said(folder, capsys):
    folder("a/0.png", RED)
    folder("b/0.png", RED)
    assert read() and capsys.readouterr().err == ""
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/a/._0.png", "a/.hidden.png", "loose.png"):
        folder(name, RED)
    (program.Path("my_pictures") / "a" / "notes.txt").write_text("notes")
    images, labels, names = read()
    assert len(images) == 2 and names == ["a", "b"]
    error = capsys.readouterr().err
    assert "left out 3 of the files, which systems hide" in error and "__MACOSX" in error
    assert "notes.txt" in error and "loose.png" in error and error.count("\n") == 3


def test_a_broken_picture_is_named_and_left_out_unless_nothing_is_left(folder, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in ("a/0.jpg", "b/broken.jpg", "c/1.png"):
        folder(name, Image.fromarray(noise))
    path = program.Path("my_pictures") / "b" / "broken.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (path.parent / "empty.png").touch()
    images, labels, names = read()
    assert len(images) == 2 and labels.tolist() == [0, 1] and names == ["a", "c"]
    assert "left out 2 of the files" in (error := capsys.readouterr().err) and "broken.jpg" in error
    for other in ("a/0.jpg", "c/1.png"):
        (program.Path("my_pictures") / other).unlink()
    with pytest.raises(InputError, match="my_pictures holds no picture that can be read.*broken"):
        read()


def test_a_huge_picture_is_named_and_left_out(folder, capsys, monkeypatch):
    folder("0.png", RED)
    folder("huge.png", Image.new("L", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert len(read()[0]) == 1 and "huge.png" in capsys.readouterr().err


# --- a whole run ----------------------------------------------------------------------------------


def test_a_folder_trains_in_color_and_is_drawn_by_name(folder, tmp_path, capsys):
    for i in range(20):
        for name, color in (("cat", RED), ("dog 10", BLUE), ("dog 9", GRAY)):
            folder(f"{name}/{i}.png", color)
    options = [*TINY, "--dataset", "my_pictures", "--output-dir", "run", "--epochs", 1]
    code, message = run_main(*options)
    assert code == 2 and "--image-size" in message
    assert run_main(*options, "--image-size", 8) == (0, "")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith("my_pictures: 57 images of 8x8 in color, 3 classes (cat, dog 9, dog 10); "
                          "3 more are held out")  # fmt: skip
    assert checkpoint(tmp_path / "run")["class_names"] == ["cat", "dog 9", "dog 10"]
    drawing = ["--sample-only", "--output-dir", "run", "--output", "a.npz", "--sample-steps", 2]
    assert run_main(*drawing, "--labels", "dog 10", "cat", "1") == (0, "")
    with np.load("a.npz") as file:
        assert file["images"].shape == (3, 8, 8, 3) and file["labels"].tolist() == [2, 0, 1]
    code, message = run_main(*drawing, "--labels", "cow")
    assert code == 2 and "cow" in message and "dog 9" in message
    model, scheduler = program.load_model("run/weights.pt")
    by_name = program.sample(model, scheduler, labels=["dog 9", "cat"], num_steps=2)
    assert torch.equal(by_name, program.sample(model, scheduler, labels=[1, 0], num_steps=2))
    assert run_main("--resume", "--output-dir", "run", "--epochs", 2) == (0, "")


def test_names_that_are_numbers_are_names_for_words_and_never_for_ints(folder):
    """Folders called 1 and 2 hold the labels 0 and 1."""
    for name in ("1", "2"):
        for i in range(2):
            folder(f"{name}/{i}.png", RED)
    from support.datasets import labels_to_draw

    assert labels_to_draw(None, ["2", "1", "0"], 9, 2, ["1", "2"])[1].tolist() == [1, 0, 0]
    assert labels_to_draw(None, [1, 0], 9, 2, ["1", "2"])[1].tolist() == [1, 0]
    with pytest.raises(InputError, match="from 0 to 1 or of 1, 2"):
        labels_to_draw(None, [2], 9, 2, ["1", "2"])


def test_an_image_size_is_for_folders_and_a_multiple_of_4(folder, tmp_path):
    folder("0.png", RED)
    folder("1.png", BLUE)
    with pytest.raises(InputError, match="--image-size: it is for a folder alone"):
        program.load_images("MNIST", image_size=32)
    with pytest.raises(InputError, match="--image-size: must be a multiple of 4, not 30"):
        program.load_images("my_pictures", image_size=30)
    (images, labels), (held_out, _) = program.load_images("my_pictures", image_size=32)
    assert images.shape == held_out.shape == (1, 3, 32, 32) and labels is None
