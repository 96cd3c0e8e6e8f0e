"""The README's commands and options are those of the program."""

import re
import shlex

from conftest import ROOT, TINY, run_main

import train_diffusion as program

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_install_commands_start_from_nothing():
    """The first two are complete on a fresh machine; .ci/run types them."""
    train, test = COMMANDS[:2]
    install = "python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt && .venv/bin/python "
    assert train == install + "train_diffusion.py" and test == install + "-m pytest"


def test_every_other_command_of_the_program_works(small_data, tmp_path, monkeypatch):
    """In the README's order, made small: what is resumed or drawn with has been trained before."""
    small = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--quiet"]
    assert run_main(*small, "--max-steps", 2) == 0
    torchrun = "torchrun --nproc-per-node=2 train_diffusion.py"  # test_robustness.py runs it
    commands = [command for command in COMMANDS[2:] if command != torchrun]
    assert len(commands) == len(COMMANDS) - 3 and all(
        command.startswith("python train_diffusion.py") for command in commands
    )
    monkeypatch.chdir(tmp_path)
    for steps, command in enumerate(commands, start=3):
        options = shlex.split(command)[2:]
        limit = ["--epochs", 1, "--max-steps", steps] if "--sample-only" not in options else []
        assert run_main(*options, *small, *limit) == 0, command


def test_every_option_stands_in_the_readme_with_its_default():
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \| ([^|]*) \|", README, re.MULTILINE))
    options = {action.option_strings[0]: action for action in program.make_parser()._actions if action.dest != "help"}
    assert rows.keys() == options.keys()
    for name, action in options.items():
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool):
            assert rows[name].strip() == str(action.default), name


def test_every_picture_and_file_that_the_readme_names_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir()) < 3_000_000
