"""The README's commands, code and pictures are those of the program."""

import re
import shlex

import numpy as np
from conftest import ROOT, TINY, run_main
from PIL import Image

import train_diffusion as program

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
CODE = [text for kind, text in BLOCKS if kind == "python"]


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
    elsewhere = [
        "torchrun --nproc-per-node=2 train_diffusion.py",  # test_robustness.py runs it
        "python -m pip install -q -r benchmarks/requirements.txt",
        "python benchmarks/quality.py pretrained.pt",  # takes minutes
    ]
    commands = [shlex.split(command) for command in COMMANDS[2:] if command not in elsewhere]
    assert len(commands) == len(COMMANDS) - 5
    assert all(command[:2] == ["python", "train_diffusion.py"] for command in commands)
    for options in (command[2:] for command in commands):
        if "--sample-only" in options:
            labels = "--labels" in options
            few = ["--sample-steps", 2, *([] if labels else ["--num-samples", 4])]
        else:
            few = ["--max-steps", 3, *([] if "--resume" in options else small)]
        assert run_main(*options, *few) == (0, ""), options


def test_every_block_of_python_runs(tmp_path, monkeypatch):
    """A folder of pictures becomes a file that can be trained on."""
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        (tmp_path / "my_pictures" / name).mkdir(parents=True)
        for i in range(20):
            array = np.full((40 + i, 50, 3), 200 if name == "dogs" else 50, np.uint8)
            Image.fromarray(array).save(tmp_path / "my_pictures" / name / f"{i}.png")
    scope = {}
    for text in CODE:
        exec(text, scope)
    assert scope["digits"].shape == (5, 1, 28, 28)
    with Image.open("guidance.png") as guidance:  # four rows of ten digits
        assert guidance.size == (2 + 10 * 30, 2 + 4 * 30)
    (images, labels), _ = program.load_images("my_pictures.npz")
    assert images.shape == (38, 3, 32, 32)
    assert [200 if label else 50 for label in labels] == images[:, 0, 16, 16].tolist()


def test_every_picture_and_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir()) < 3_000_000
