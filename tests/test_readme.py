"""The README's commands, code and pictures are those of the program."""

import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, run_main
from PIL import Image

import train_diffusion as program

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
# What each block of Python shows, by the picture that it saves.
CODE = {name: text for kind, text in BLOCKS if kind == "python"
        for name in re.findall(r'"(\w+)\.(?:png|npz)"', text)}  # fmt: skip


def test_the_install_commands_start_from_nothing():
    """The first two are complete on a fresh machine; .ci/run types them."""
    python = ".venv/bin/python "
    install = f"python3 -m venv .venv && {python}-m pip install -q -r requirements.txt && {python}"
    assert COMMANDS[:2] == [install + "train_diffusion.py", install + "-m pytest"]


def test_every_other_command_of_the_program_works(small_data, tmp_path, monkeypatch):
    """In the README's order, made small: what is resumed has been trained before."""
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*small, "--max-steps", 2) == (0, "")
    shutil.copy(ROOT / "pretrained.pt", tmp_path)
    for i, name in enumerate(("cat", "dog") * 8):
        (tmp_path / "my_pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (200 * (i % 2), i, 9)).save(f"my_pictures/{name}/{i}.png")
    commands = [shlex.split(command, comments=True) for command in COMMANDS[2:]]
    ours = [command[2:] for command in commands if command[1] == "train_diffusion.py"]
    assert len(ours) == 7
    assert [" ".join(command) for command in commands if command[2:] not in ours] == [
        # test_processes.py runs it
        "torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 train_diffusion.py",
    ]
    for options in ours:
        if "--sample-only" in options:
            labels = "--labels" in options
            few = ["--sample-steps", 2, *([] if labels else ["--num-samples", 4])]
        else:
            own = options if "--output-dir" in options else []  # a later one has the last word
            few = ["--max-steps", 3, *([] if "--resume" in options else [*small, *own])]
        assert run_main(*options, *few) == (0, ""), options


def test_readme_and_help_name_the_same_options():
    """And the defaults that the README states are the program's."""
    parser = program.make_parser()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - {"--nproc-per-node", "--standalone", "--local-addr"} <= set(
        parser._option_string_actions
    )
    assert all(action.help for action in parser._actions)
    default, text = parser.get_default, " ".join(README.split())
    low, high = program.GUIDANCE_INTERVAL
    assert f"Without an option the strength is {default('guidance')}, and only in" in text
    assert f"lies between {low} and {high}:" in text
    assert f"{default('sample_steps')} do, as" in text and f"$T = {default('timesteps')}$" in text


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Runs a block as it stands. Returns the images of its picture, [rows, columns, 28, 28]."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        torch.manual_seed(0)  # not every block has its own seed
        exec(CODE[name], {})
        pixels = np.asarray(Image.open(f"{name}.png").convert("L")).astype(int)
        rows, columns = pixels.shape[0] // 30, pixels.shape[1] // 30
        cells = pixels[2:, 2:].reshape(rows, 30, columns, 30).swapaxes(1, 2)
        return cells[:, :, :28, :28]  # without the gaps

    return run


@pytest.fixture(scope="module")
def look_like(mnist):
    """Which digit each image is: that of the nearest of 4,000 real ones."""
    images, labels = (part[:4000] for part in mnist[0])

    def nearest(cells):
        points = torch.tensor(cells.reshape(-1, 784)).float()
        return labels[torch.cdist(points, images.flatten(1).float()).argmin(dim=1)].tolist()

    return nearest


def right(found, expected):
    return sum(x == y for x, y in zip(found, expected, strict=True)) / len(found)


def test_a_number_is_drawn(shown, look_like):
    assert right(look_like(shown("number")), [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]) >= 0.8


def test_one_noise_gives_ten_digits_and_another_others(shown, look_like):
    cells = shown("ten_labels")
    assert right(look_like(cells), list(range(10)) * 3) >= 0.8
    assert np.abs(cells[0] - cells[1]).mean(axis=(1, 2)).min() > 5


def test_the_way_leads_from_noise_over_the_average_seven_to_a_seven(shown, look_like, mnist):
    x_t, x_0 = shown("way")
    images, labels = mnist[0]
    average = images[labels == 7].float().mean(dim=0)[0].numpy()
    assert np.corrcoef(x_0[0].ravel(), average.ravel())[0, 1] > 0.8
    assert abs(np.corrcoef(x_t[0].ravel(), average.ravel())[0, 1]) < 0.2
    assert np.array_equal(x_t[-1], x_0[-1]) and look_like(x_0[-1]) == [7]


def test_a_walk_changes_a_little_at_every_stop(shown, look_like):
    (cells,) = shown("walk")
    assert right(look_like(cells), [2] * 10) >= 0.7
    steps = np.abs(np.diff(cells, axis=0)).mean(axis=(1, 2))
    assert steps.max() < np.abs(cells[0] - cells[-1]).mean()


def test_a_filled_in_digit_keeps_its_known_half(shown, look_like, mnist):
    real, filled = shown("filled_in")
    images, labels = (part[:10] for part in mnist[1])
    assert np.array_equal(real, images[:, 0]) and np.array_equal(filled[:, :14], real[:, :14])
    assert np.abs(filled[:, 14:] - real[:, 14:]).mean() > 5
    assert right(look_like(filled), labels.tolist()) >= 0.8


def test_more_noise_brings_back_less_of_a_digit(shown, look_like, mnist):
    real, *rows = shown("halfway")
    assert np.array_equal(real, mnist[1][0][:10, 0])
    changes = [np.abs(row - real).mean() for row in rows]
    assert changes == sorted(changes) and changes[-1] > 2 * changes[0]
    assert right(look_like(np.stack(rows)), mnist[1][1][:10].tolist() * 3) >= 0.8


def test_every_block_has_its_test_and_twelve_lines_at_most():
    tested = {"number", "ten_labels", "way", "walk", "filled_in", "halfway"}
    assert set(CODE) == tested
    assert len(CODE) == sum(kind == "python" for kind, _ in BLOCKS)
    assert all(len(text.split("\n\n", 1)[-1].splitlines()) <= 12 for text in CODE.values())


def test_every_picture_and_file_that_the_readme_names_is_there():
    for target in re.findall(r"(?:\]\(|^\[\w+\]: )(?!http)([^)#\s]+)", README, re.MULTILINE):
        assert (ROOT / target).is_file(), target
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir()) < 3_000_000
