"""The program as a user runs it, in a process of its own: what it writes, and what it says to bad input."""

import csv
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    assert_one_line_error,
    run_main,
    run_program,
    same_checkpoint,
    same_state,
)
from matplotlib.image import imread

import train_diffusion as program


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    """The folder of a finished run of three epochs with samples every second one, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_program(*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder, result


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- the main job --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == {
        "samples_epoch_2.png",
        "samples_epoch_3.png",
        "samples_progress.png",
        "loss_curve.png",
        "noise_schedule.png",
        "forward_process.png",
        "denoising.png",
        "denoising.gif",
        "train_log.csv",
        "checkpoint.pt",
        "weights.pt",
    }
    assert imread(folder / "samples_epoch_3.png").shape == (62, 62, 3)
    assert "epoch 3/3" in result.stdout and "--sample-only" in result.stdout
    assert result.stderr == ""  # no bars where there is no terminal, and no warnings


def test_the_log_has_a_row_for_every_epoch(finished):
    rows = read_log(finished[0])
    assert list(rows[0]) == ["epoch", "step", "train_loss", "val_loss", "seconds", "images_per_second"]
    assert [(int(row["epoch"]), int(row["step"])) for row in rows] == [(i, i * STEPS_PER_EPOCH) for i in (1, 2, 3)]
    assert all(0 < float(value) < 1e6 for row in rows for value in row.values())
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_the_same_seed_gives_the_same_files_and_another_seed_others(finished, small_data, tmp_path):
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data, "--quiet"]
    for seed in (0, 1):
        assert run_main(*options, "--output-dir", tmp_path / str(seed), "--seed", seed) == 0
    for name in ("samples_epoch_2.png", "samples_epoch_3.png"):
        assert (tmp_path / "0" / name).read_bytes() == (finished[0] / name).read_bytes()
        assert (tmp_path / "1" / name).read_bytes() != (finished[0] / name).read_bytes()
    assert same_checkpoint(tmp_path / "0", finished[0])
    assert not same_checkpoint(tmp_path / "1", finished[0])


def test_max_steps_stops_in_the_middle_and_samples(small_data, tmp_path, capfd):
    assert run_main(*TINY, "--max-steps", 3, "--data-dir", small_data, "--output-dir", tmp_path, "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "samples_epoch_1.png").exists() and read_log(tmp_path)[0]["step"] == "3"
    assert program.load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


def test_a_new_run_keeps_the_earlier_checkpoint(finished, small_data, tmp_path, capsys):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    assert run_main(*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path) == 0
    assert "checkpoint_1.pt" in capsys.readouterr().out
    assert (tmp_path / "checkpoint_1.pt").read_bytes() == (finished[0] / "checkpoint.pt").read_bytes()


def test_resuming_anywhere_gives_the_run_that_never_stopped(finished, small_data, tmp_path):
    """Stopped in the middle of the first epoch and in the third; every tensor, the log and the pictures."""
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data, "--output-dir", tmp_path]
    for extra in (["--max-steps", 3], ["--resume", "--max-steps", 2 * STEPS_PER_EPOCH + 1], ["--resume"]):
        assert run_main(*options, *extra) == 0
    assert same_checkpoint(tmp_path, finished[0])
    for row, expected in zip(read_log(tmp_path), read_log(finished[0]), strict=True):
        assert list(row.items())[:4] == list(expected.items())[:4]
    for name in ("samples_epoch_2.png", "samples_epoch_3.png"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


# --- drawing with a checkpoint -------------------------------------------------------------------------------------------


def test_sample_only_draws_what_training_drew(finished, tmp_path, capfd):
    folder, _ = finished
    options = ["--sample-only", "--checkpoint", folder / "checkpoint.pt", "--num-samples", 4, "--sample-steps", 2]
    assert run_main(*options, "--output", tmp_path / "new" / "grid.png") == 0
    output, error = capfd.readouterr()
    assert "4 images" in output and error == ""
    assert (tmp_path / "new" / "grid.png").read_bytes() == (folder / "samples_epoch_3.png").read_bytes()


def test_the_weights_alone_draw_the_same_and_cannot_be_resumed(finished, tmp_path, capsys):
    shutil.copy(finished[0] / "weights.pt", tmp_path / "checkpoint.pt")
    assert run_main("--sample-only", "--output-dir", tmp_path, "--num-samples", 4, "--sample-steps", 2, "--quiet") == 0
    assert (tmp_path / "samples.png").read_bytes() == (finished[0] / "samples_epoch_3.png").read_bytes()
    assert run_main(*TINY, "--output-dir", tmp_path, "--resume") == 2
    assert "weights to sample with" in capsys.readouterr().err


def test_the_repository_holds_weights_of_the_default_run_to_draw_with(tmp_path):
    state, defaults = program.load_checkpoint(ROOT / "pretrained.pt"), program.parse_options([])
    assert state["settings"] == {name: getattr(defaults, name) for name in program.SETTINGS}
    assert (ROOT / "pretrained.pt").stat().st_size <= 4_000_000
    options = ["--sample-only", "--output-dir", tmp_path, "--num-samples", 16, "--sample-steps", 10, "--quiet"]
    assert run_main(*options, "--output", tmp_path / "digits.npy") == 0
    digits = np.load(tmp_path / "digits.npy")
    ink = (digits > 127).mean(axis=(1, 2))  # of MNIST's own images, 99 % have 3 to 24 % white pixels
    assert ((ink > 0.02) & (ink < 0.3)).all() and (digits[:, 0] < 64).mean() > 0.99  # strokes inside, black at the edge


def test_resuming_a_finished_run_draws_what_a_crash_may_have_left_out(finished, small_data, tmp_path):
    shutil.copy(finished[0] / "checkpoint.pt", tmp_path)
    options = [*TINY, "--epochs", 3, "--sample-every", 2, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options, "--resume") == 0
    assert (tmp_path / "denoising.gif").exists() and same_checkpoint(tmp_path, finished[0])


def test_sample_only_writes_an_array(finished, tmp_path):
    options = ["--sample-only", "--output-dir", finished[0], "--num-samples", 5, "--sample-steps", 3, "--eta", 0]
    assert run_main(*options, "--output", tmp_path / "digits.npy") == 0
    digits = np.load(tmp_path / "digits.npy")
    assert digits.shape == (5, 28, 28) and digits.dtype == np.uint8 and digits.std() > 0


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (["--epochs", "0"], ["--epochs"]),
        (["--batch-size", "-1"], ["--batch-size"]),
        (["--num-samples", "many"], ["--num-samples", "many"]),
        (["--lr", "0"], ["--lr"]),
        (["--lr", "fast"], ["--lr", "number", "fast"]),
        (["--lr", "nan"], ["--lr"]),
        (["--guidance", "-1"], ["--guidance", "0", "-1"]),
        (["--guidance", "inf"], ["--guidance"]),
        (["--guidance", "much"], ["--guidance", "number", "much"]),
        (["--eta", "1.5"], ["--eta", "between 0 and 1"]),
        (["--timesteps", "1"], ["--timesteps", "2"]),
        (["--timesteps", "20"], ["--sample-steps", "32", "--timesteps 20"]),
        (["--base-channels", "16"], ["--base-channels", "24"]),
        (["--dataset", "CIFAR10"], ["--dataset", "FashionMNIST"]),
        (["--schedule", "sigmoid"], ["--schedule", "cosine"]),
        (["--sample-only", "--output", "digits.jpg"], ["--output", ".png"]),
        (["--output", "digits.png"], ["--output", "--sample-only"]),
        (["--sample-only", "--resume"], ["--sample-only", "--resume"]),
        (["--seed", str(2**64)], ["--seed"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--resume"], ["checkpoint.pt", "without --resume"]),
        (["--sample-only", "--checkpoint", "missing.pt"], ["missing.pt"]),
        (["--batch-size", "1000", "--data-dir", "SMALL"], ["--batch-size", "512"]),
    ],
)
def test_bad_options_get_one_line_and_exit_code_2(options, words, small_data, tmp_path, capsys):
    options = [small_data if option == "SMALL" else option for option in options]
    assert run_main("--output-dir", tmp_path, "--max-steps", 1, *options) == 2  # one step: fails soon if it is accepted
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and all(word in output.err for word in words), output.err
    assert not list(tmp_path.iterdir())


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """The same as above, once as a user sees it, for an option that torch itself would trip over."""
    assert_one_line_error(run_program("--device", "cuda:99", "--output-dir", tmp_path), 2, "--device")


def test_a_folder_that_cannot_be_made_is_named(small_data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run_main(*TINY, "--data-dir", small_data, "--output-dir", tmp_path / "file" / "folder") == 2
    message = capsys.readouterr().err
    assert "--output-dir" in message and str(tmp_path / "file" / "folder") in message and message.count("\n") == 1
    assert run_main("--sample-only", "--output", tmp_path / "file" / "digits.png") == 2


def test_resuming_with_other_settings_names_each(finished, small_data, capsys):
    options = [*TINY, "--sample-every", 2, "--data-dir", small_data, "--output-dir", finished[0]]
    before = (finished[0] / "checkpoint.pt").read_bytes()
    assert run_main(*options, "--resume", "--epochs", 4, "--lr", 0.5, "--seed", 7) == 2
    message = capsys.readouterr().err
    assert "--lr 0.005 (now 0.5)" in message and "--seed 0 (now 7)" in message
    assert "--epochs" not in message and "--batch-size" not in message
    assert (finished[0] / "checkpoint.pt").read_bytes() == before


def test_more_sample_steps_than_the_checkpoint_has_timesteps(finished, capsys):
    assert run_main("--sample-only", "--output-dir", finished[0]) == 2
    assert "--sample-steps: 32 is more than the 20" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def damaged_checkpoints(good: bytes):
    """Name and content of files that are no checkpoints."""
    yield "empty", b""
    yield "truncated", good[: len(good) // 2]
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 1
    yield "bit-flipped", bytes(flipped)
    yield "text", b"hello\n"
    yield "pickle", pickle.dumps(Evil())


@pytest.mark.parametrize("kind", ["empty", "truncated", "bit-flipped", "text", "pickle", "foreign", "older", "evil"])
@pytest.mark.parametrize("option", ["--sample-only", "--resume"])
def test_broken_checkpoints_get_one_line_and_stay(kind, option, finished, tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    if kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "older":
        torch.save({**program.load_checkpoint(finished[0] / "checkpoint.pt"), "format": "diffusion-mnist 0"}, path)
    elif kind == "evil":
        torch.save({"format": program.CHECKPOINT_FORMAT, "settings": Evil()}, path)
    else:
        path.write_bytes(dict(damaged_checkpoints((finished[0] / "checkpoint.pt").read_bytes()))[kind])
    before = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert run_main(option, "--output-dir", tmp_path) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "checkpoint.pt is damaged" in message
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_every_flipped_byte_is_harmless_or_found(finished, tmp_path, capsys):
    """Wherever a bit flips, the checkpoint is refused or loads as it was: never silently other weights."""
    good = (finished[0] / "checkpoint.pt").read_bytes()
    expected = program.load_checkpoint(finished[0] / "checkpoint.pt")
    path, found = tmp_path / "checkpoint.pt", 0
    for position in range(11, len(good), len(good) // 150):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            assert same_state(program.load_checkpoint(path), expected), position
        except SystemExit:
            found += 1
    assert found > 100
    assert zipfile.is_zipfile(finished[0] / "checkpoint.pt")


# --- broken data ---------------------------------------------------------------------------------------------------------


def test_weights_of_another_network_get_one_line(finished, tmp_path, capsys):
    state = program.load_checkpoint(finished[0] / "weights.pt")
    state["ema"]["stem.weight"] = state["ema"]["stem.weight"][:5]
    program.save_checkpoint(tmp_path / "odd.pt", state)
    options = ["--sample-only", "--checkpoint", tmp_path / "odd.pt", "--output-dir", tmp_path, "--sample-steps", 2]
    assert run_main(*options) == 1
    message = capsys.readouterr().err
    assert "odd.pt holds the weights of another network" in message and message.count("\n") == 1


@pytest.fixture()
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise program.datasets.utils.URLError("no network")

    monkeypatch.setattr(program.datasets.utils.urllib.request, "urlopen", refuse)


def load_and_fail(data_dir, capsys, dataset="MNIST") -> str:
    with pytest.raises(SystemExit) as error:
        program.load_images(dataset, data_dir, train=True)
    output = capsys.readouterr()
    assert error.value.code == 1 and output.err.count("\n") == 1, output.err
    return output.err


def test_missing_data_without_network_names_file_folder_and_remedy(no_network, tmp_path, capsys):
    for dataset in ("MNIST", "FashionMNIST", "KMNIST"):
        message = load_and_fail(tmp_path, capsys, dataset)
        assert (
            "train-images-idx3-ubyte.gz" in message and str(tmp_path / dataset / "raw") in message and "network" in message
        )


@pytest.mark.parametrize("content", [b"", b"not gzip", "half"])
def test_a_broken_archive_is_named(no_network, tmp_path, capsys, content):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    broken = raw / "t10k-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:800_000] if content == "half" else content)
    message = load_and_fail(tmp_path, capsys)
    assert "t10k-images-idx3-ubyte.gz" in message and str(raw) in message


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", "half"])
def test_a_broken_unpacked_file_is_named(small_data, tmp_path, capsys, content):
    shutil.copytree(small_data, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    broken.write_bytes(broken.read_bytes()[:1000] if content == "half" else content)
    message = load_and_fail(tmp_path, capsys)
    assert "train-images-idx3-ubyte in" in message and "Delete it" in message
