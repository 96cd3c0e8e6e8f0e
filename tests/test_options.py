"""Options: what may be typed, what a resumed run keeps."""

import inspect
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import (
    DRAW,
    NUM_TRAIN,
    TINY,
    parsed,
    run_main,
)
from PIL import Image

import train_diffusion as program
from support import optimizers


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epochs 0", ["--epochs", "whole number from 1"]),
        ("--batch-size -1", ["--batch-size"]),
        ("--num-samples many", ["--num-samples", "many"]),
        ("--lr 0", ["--lr"]),
        ("--lr fast", ["--lr", "number", "fast"]),
        ("--lr nan", ["--lr"]),
        ("--guidance -1", ["--guidance", "0", "-1"]),
        ("--guidance inf", ["--guidance"]),
        ("--eta 1.5", ["--eta", "from 0 to 1"]),
        ("--timesteps 1", ["--timesteps", "2"]),
        ("--base-channels 12", ["--base-channels", "8"]),
        ("--label-dropout 0", ["--label-dropout"]),
        ("--dataset CIFAR10", ["--dataset", "FashionMNIST", ".npz"]),
        ("--dataset missing.npz", ["--dataset", "missing.npz"]),
        ("--schedule sigmoid", ["--schedule", "cosine"]),
        ("--sample-only --output digits.jpg", ["--output", ".png"]),
        ("--sample-only --output .", ["--output", ".png"]),
        ("--output digits.png", ["--output", "--sample-only"]),
        ("--labels 3", ["--labels", "--sample-only"]),
        ("--sample-only --labels three", ["--labels", "three"]),
        ("--sample-only --labels 3 10", ["--labels", "0 to 9"]),
        ("--sample-only --labels -1", ["--labels"]),
        ("--sample-only --labels 3 --num-samples 2", ["--num-samples"]),
        (f"--sample-only --labels {10**20}", ["--labels", "0 to 9"]),
        ("--sample-only --output ~nobody-of-this-name/x.png", ["--output", "~nobody"]),
        ("--sample-only --resume", ["--sample-only", "--resume"]),
        (f"--seed {2**64}", ["--seed"]),
        ("--device abacus", ["--device", "abacus", "cpu"]),
        ("--device cuda:99", ["--device", "cuda:99", "cpu"]),
        ("--no-such-option", ["--no-such-option"]),
        ("--resume", ["checkpoint.pt", "Train first"]),
        ("--sample-only --checkpoint missing.pt", ["missing.pt"]),
        (f"--batch-size {NUM_TRAIN + 1}", ["--batch-size", str(NUM_TRAIN)]),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2(options, words, small_data, tmp_path, capsys):
    # One step: it fails soon if it is accepted.
    always = ["--data-dir", small_data, "--output-dir", tmp_path, "--max-steps", 1]
    code, message = run_main(*always, *options.split())
    assert code == 2 and "\n" not in message and all(word in message for word in words), message
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    text = capsys.readouterr().out
    about = text.split("options:")[0]
    assert end.value.code == 0 and "--resume" in about and "read that first" not in about
    assert all(action.help for action in program.make_parser()._actions)


def test_the_defaults_of_options_and_functions_are_the_same(monkeypatch):
    monkeypatch.setattr(program, "__doc__", None)  # as by python -OO
    args = parsed()
    args.num_steps = args.sample_steps
    for function, names in (
        (program.sample, "num_steps eta guidance seed"),
        (program.denoise, "num_steps eta guidance"),
        (program.NoiseScheduler, "num_timesteps schedule"),
        (program.UNet, "base_channels"),
        (program.load_images, "dataset data_dir"),
    ):
        for name in names.split():
            default = inspect.signature(function).parameters[name].default
            assert default == getattr(args, name.replace("num_timesteps", "timesteps")), name


def test_options_reach_the_sampler_the_schedule_and_the_network(small_data, tmp_path, monkeypatch):
    asked, sample = [], program.sample

    def spied_sample(model, scheduler, num_samples, labels=None, **options):
        asked.append((num_samples, labels if labels is None else labels.tolist(), options))
        return sample(model, scheduler, num_samples, labels, **options)

    monkeypatch.setattr(program, "sample", spied_sample)
    options = ["--output-dir", tmp_path, "--eta", 0.5, "--guidance", 2, "--seed", 3]
    plan = [*TINY, "--max-steps", 1, "--data-dir", small_data]
    assert run_main(*options, *plan, "--schedule", "linear", "--base-channels", 16) == (0, "")
    assert run_main(*options, *DRAW, "--labels", 7, 8) == (0, "")
    sampler = {"num_steps": 2, "eta": 0.5, "guidance": 2, "seed": 3}
    assert asked == [(4, None, sampler), (2, [7, 8], sampler)]
    model, scheduler = program.load_model(tmp_path / "weights.pt")
    assert model.stem.out_channels == 16 and scheduler.schedule == "linear"
    assert parsed("--data-dir", "MNIST").data_dir == str(Path.cwd() / "MNIST")


def test_what_may_not_change_on_resume_is_refused(resume_finished, tmp_path):
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for option, value, old in (
        ("--seed", 7, 0), ("--batch-size", 16, 8), ("--timesteps", 50, 20), ("--epochs", 2, 3),
        ("--optimizer", "adam", "muon"), ("--label-dropout", 0.5, 0.1),
        ("--schedule", "linear", "cosine"), ("--base-channels", 16, 8),
    ):  # fmt: skip
        code, message = run_main(*resume_finished, option, value)
        assert code == 2 and all(str(word) in message for word in (option, value, old)), message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_what_may_change_on_resume_is_said(resume_finished, tmp_path, capfd, monkeypatch):
    """Grids of another size, and more epochs, whose learning rate is that of the longer run."""
    rates, step = [], optimizers.Muon.step

    def spied_step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(optimizers.Muon, "step", spied_step)
    changes = ["--epochs", 4, "--lr", 0.01, "--guidance", 1, "--num-samples", 9]
    assert run_main(*resume_finished, *changes) == (0, "")
    output, error = capfd.readouterr()
    assert "--epochs 4 (was 3)" in output and "--guidance 1.0 (was 0.5)" in output and error == ""
    assert rates == pytest.approx([0.01 * (i + 1) / 200 * (1 - i / 32) for i in range(24, 32)])
    with Image.open(tmp_path / "samples_epoch_4.png") as grid:
        assert grid.size == (2 + 9 * 30, 2 + 30)


def test_the_home_folder_is_meant_by_a_tilde(small_data, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_data, tmp_path / "home" / "data")
    options = [*TINY, "--max-steps", 1, "--data-dir=~/data", "--output-dir=~/runs/x"]
    assert run_main(*options) == (0, "")
    drawing = ["--sample-only", "--sample-steps", 2, "--checkpoint=~/runs/x/weights.pt"]
    assert run_main(*drawing, "--labels", 1, 1, "--output=~/x.npz") == (0, "")
    assert program.load_model("~/runs/x/weights.pt")[0].num_classes == 10
    assert len(program.load_images("~/x.npz")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_advice_can_be_typed_for_a_folder_that_looks_like_an_option(
    small_data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data]
    assert run_main(*options, "--output-dir=-x") == (0, "")
    advice = capsys.readouterr().out.splitlines()[-1].removeprefix("draw more: ")
    options = shlex.split(advice)[2:]
    assert run_main(*options, "--sample-steps", 1, "--output=-x/a.png") == (0, "")
    assert (tmp_path / "-x" / "a.png").is_file()
