"""Nothing lost: runs that are interrupted, killed, out of disk space, diverging or many at once.

And wherever a reader has a computer: its notebooks, terminals, environments and devices.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from conftest import (
    LONG,
    ROOT,
    STEPS_PER_EPOCH,
    TINY,
    checkpoint,
    run_main,
    same_run,
    same_state,
)

import train_diffusion as program

posix = pytest.mark.skipif(os.name != "posix", reason="these signals and limits are POSIX's")


@pytest.fixture(scope="module")
def three_steps(small_data, tmp_path_factory):
    """The folder of a long run that stopped after three steps."""
    folder = tmp_path_factory.mktemp("three")
    options = [*LONG, "--data-dir", small_data, "--output-dir", folder, "--max-steps", 3]
    assert run_main(*options) == (0, "")
    return folder


# --- signals --------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_never_stopped(
    name, code, small_data, tmp_path, capsys, monkeypatch
):
    """It comes in the middle of step 4, which is finished and saved. Handlers are put back."""
    loss, calls = program.training_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(getattr(signal, name))
        return loss(*arguments)

    options, before = [*LONG, "--data-dir", small_data], signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        patch.setattr(program, "training_loss", interrupted)
        assert run_main(*options, "--output-dir", tmp_path / "a") == (code, "")
    assert signal.getsignal(getattr(signal, name)) == before
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and sys.executable in error, error
    assert checkpoint(tmp_path / "a")["step"] == 4
    assert run_main("--resume", "--output-dir", tmp_path / "a", "--max-steps", 6) == (0, "")
    assert run_main(*options, "--output-dir", tmp_path / "b", "--max-steps", 6) == (0, "")
    assert same_run(tmp_path / "a", tmp_path / "b")


@posix
@pytest.mark.parametrize("where", ["held_out_loss", "sample", "draw_denoising"])
def test_a_signal_while_looking_ends_at_once_and_loses_nothing(
    where, small_data, tmp_path, capsys, monkeypatch
):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(program, where, interrupted)
    options = [*TINY, "--epochs", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options) == (143, "") and "--resume" in capsys.readouterr().err
    assert checkpoint(tmp_path)["step"] == STEPS_PER_EPOCH


@posix
def test_a_second_signal_ends_at_once_and_nohup_stays_in_force():
    with program.heard_signals() as signals:
        signals.deferred = True
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with program.heard_signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == []
    signal.signal(signal.SIGHUP, before)


def test_in_another_thread_there_are_no_handlers(small_data, tmp_path):
    results = []
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    thread = threading.Thread(target=lambda: results.append(run_main(*options)))
    thread.start()
    thread.join()
    assert results == [(0, "")]


# --- killed, full disk, diverged ------------------------------------------------------------------

SAVE_ALWAYS = (
    "import sys, train_diffusion as p; p.SAVE_EVERY, p.CHECK_EVERY = 0, 1; p.main(sys.argv[1:])"
)


def kill_loop(folder, data_dir, kills: int) -> None:
    """Kill a run that saves at every step at random moments; it must end as one never killed."""
    dice, steps = random.Random(0), [0]
    options = [*LONG, "--data-dir", data_dir, "--output-dir", folder / "killed"]
    for _ in range(kills):
        start = options if not steps[1:] else ["--resume", "--output-dir", folder / "killed"]
        command = [sys.executable, "-c", SAVE_ALWAYS, *map(str, start)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        path = folder / "killed" / "checkpoint.pt"
        while not path.exists() or checkpoint(path.parent)["step"] <= steps[-1]:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.communicate()
        steps.append(checkpoint(path.parent)["step"])  # ends the test if it does not load
        assert len(list(path.parent.glob("*.tmp"))) <= 1
    assert steps == sorted(set(steps))
    end = ["--max-steps", steps[-1] + 2]
    assert run_main("--resume", "--output-dir", folder / "killed", *end) == (0, "")
    options = [*LONG, "--data-dir", data_dir, "--output-dir", folder / "whole", *end]
    assert run_main(*options) == (0, "")
    assert same_run(folder / "killed", folder / "whole")
    assert not list((folder / "killed").glob("*.tmp"))
    print(f"{kills} kills, the last after step {steps[-1]}: the run ended as one never killed")


def test_a_killed_run_always_goes_on(small_data, tmp_path):
    kill_loop(tmp_path, small_data, kills=1)


@pytest.mark.slow
def test_a_run_killed_fifty_times_goes_on(small_data, tmp_path):
    kill_loop(tmp_path, small_data, kills=50)


@pytest.mark.slow
@posix
def test_memory_does_not_grow(small_data, tmp_path):
    peaks = {}
    for steps in (500, 2000):
        options = [*LONG, "--data-dir", small_data, "--output-dir", tmp_path / str(steps)]
        command = [sys.executable, str(ROOT / "train_diffusion.py"), *map(str, options)]
        process = subprocess.Popen([*command, "--max-steps", str(steps)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks[steps] = usage.ru_maxrss / 1024
    print(f"peak memory after 500 steps {peaks[500]:.0f}, after 2000 steps {peaks[2000]:.0f} MiB")
    assert peaks[2000] < 1.05 * peaks[500]


@posix
def test_a_full_disk_leaves_the_last_good_checkpoint(three_steps, tmp_path):
    """Files may not grow beyond 300 kB: pictures fit, the checkpoint does not."""
    import resource

    shutil.copy(three_steps / "checkpoint.pt", tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        code, message = run_main("--resume", "--output-dir", tmp_path, "--max-steps", 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "checkpoint.pt cannot be written (File too large)" in message
    assert same_run(tmp_path, three_steps) and not list(tmp_path.glob("*.tmp"))


def test_a_diverging_run_stops_and_leaves_the_last_good_checkpoint(three_steps, tmp_path):
    state = checkpoint(three_steps)
    for value in state["model"].values():
        value.fill_(1e30)
    del state["format"]
    program.save_checkpoint(tmp_path / "checkpoint.pt", state)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code, message = run_main("--resume", "--output-dir", tmp_path, "--max-steps", 40)
    assert code == 1 and "not finite at step 4" in message and "--lr" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_an_infinite_gradient_is_found_though_its_loss_is_finite(
    three_steps, tmp_path, monkeypatch
):
    """So the weights that it spoils are never saved."""
    shutil.copy(three_steps / "checkpoint.pt", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loss = program.training_loss

    def steep(*arguments):  # the root of 0 is 0, and its slope infinite
        error = loss(*arguments)
        return error + (error - error.detach()).sqrt()

    monkeypatch.setattr(program, "training_loss", steep)
    code, message = run_main("--resume", "--output-dir", tmp_path, "--max-steps", 5)
    assert code == 1 and "not finite at step 4" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "file"
    program.write_file(path, lambda file: file.write(b"first"))
    monkeypatch.setattr(program.os, "fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="file cannot be written .No space left"):
        program.write_file(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_a_folder_that_vanishes_comes_back_and_any_name_will_do(tmp_path):
    for name in ("a/b/file", "x" * 255, "é" * 127, "a b'c\"d$e\nf"):
        program.write_file(tmp_path / name, lambda file: file.write(b"content"))
        assert (tmp_path / name).read_bytes() == b"content"


def test_a_file_that_is_held_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As virus scanners do on Windows."""
    replace, refusals = os.replace, [PermissionError(13, "in use")] * 3

    def held(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", held)
    monkeypatch.setattr(program.os, "name", "nt")
    monkeypatch.setattr(program.time, "sleep", lambda seconds: None)
    program.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == ["file"]


def test_pictures_and_logs_that_cannot_be_written_never_end_a_run(small_data, tmp_path, capsys):
    names = ["train_log.csv", "loss_curve.png", "samples_epoch_1.png", "denoising.gif"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "in the way").touch()
    options = [*TINY, "--epochs", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options) == (0, "") and checkpoint(tmp_path)["step"] == STEPS_PER_EPOCH
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("warning: no ") for line in lines)
    assert all(any(name in line for line in lines) for name in names)


# --- notebooks, terminals, environments -----------------------------------------------------------


class Stream(io.StringIO):
    """A standard output that cannot print everything, or nothing at all."""

    def __init__(self, encoding=None, error=None):
        super().__init__()
        self.codec, self.error = encoding, error

    @property
    def encoding(self):
        return self.codec

    def write(self, text):
        if self.error:
            raise self.error
        return super().write(text.encode(self.codec or "utf-8").decode(self.codec or "utf-8"))


@pytest.mark.parametrize(
    "stream, expected",
    [
        (Stream(), "\u0141ukasz\n"),  # a notebook's, without an encoding
        (Stream("cp1252"), "\\u0141ukasz\n"),
        (Stream("ascii"), "\\u0141ukasz\n"),
        (Stream("utf-8", OSError(28, "No space left on device")), ""),
        (Stream("utf-8", ValueError("I/O operation on closed file")), ""),
        (None, None),
    ],
)
def test_printing_never_ends_a_run(stream, expected, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    program.say("\u0141ukasz")
    program.say("undecodable \udcff", stream)
    if stream:
        assert stream.getvalue().startswith(expected)


@posix
@pytest.mark.parametrize("redirect", ["> /dev/full 2>&-"])
def test_a_run_with_nowhere_to_print_ends_well(redirect, small_data, tmp_path):
    options = [*TINY, "--max-steps", "1", "--data-dir", str(small_data), "--output-dir", "out"]
    command = subprocess.list2cmdline([sys.executable, str(ROOT / "train_diffusion.py"), *options])
    assert subprocess.run(f"{command} {redirect}", shell=True, cwd=tmp_path).returncode == 0
    assert checkpoint(tmp_path / "out")["step"] == 1


def test_the_users_matplotlib_settings_have_no_say(tmp_path):
    """Neither TeX that is not installed nor a size; and they stay as they are."""
    import matplotlib

    rows = [{"epoch": 1, "train_loss": 0.1, "val_loss": 0.2}]
    t, losses = torch.arange(20), torch.rand(20)
    program.draw_loss_curve(tmp_path / "a.png", rows, t, losses, 20)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red", "font.size": 50}):
        before = dict(matplotlib.rcParams)
        program.draw_loss_curve(tmp_path / "b.png", rows, t, losses, 20)
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_home_folder_is_meant_by_a_tilde(small_data, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_data, tmp_path / "home" / "data")
    options = [*TINY, "--max-steps", 1, "--data-dir=~/data", "--output-dir=~/runs/x"]
    assert run_main(*options) == (0, "")
    drawing = ["--sample-only", "--sample-steps", 2, "--checkpoint=~/runs/x/weights.pt"]
    assert run_main(*drawing, "--num-samples", 2, "--output=~/x.npz") == (0, "")
    shutil.copy(tmp_path / "home" / "x.npz", tmp_path / "home" / "y.npz")
    assert program.load_model("~/runs/x/weights.pt")[0].num_classes == 10
    assert len(program.load_images("~/y.npz")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(
    "left_over",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"},
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "many"},
    ],
)
def test_variables_of_torchrun_mean_nothing_alone(left_over, monkeypatch):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert program.torchrun_variables() == (0, 0, 1)
    assert program.parse_options([]).batch_size == 64


def test_main_takes_its_options_from_python(small_data, tmp_path, monkeypatch):
    """In a notebook the command line is the kernel's."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/tmp/kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    options = [*TINY, "--max-steps", "1", "--data-dir", str(small_data)]
    assert program.main([*options, "--output-dir", str(tmp_path)]) is None
    assert "train_diffusion.py --sample-only" in sys.stdout.getvalue()
    assert program.main(["--sample-only", "--num-samples", "1", "--sample-steps", "1",
                         "--output-dir", str(tmp_path)]) is None  # fmt: skip


# --- devices --------------------------------------------------------------------------------------


def on_cpu(make):
    return lambda *sizes, **options: make(*sizes, **{**options, "device": "cpu"})


@contextlib.contextmanager
def a_gpu(works=True):
    """As if there were one NVIDIA GPU."""

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError("Expected a torch.device with a specified index")
        if torch.device(device).index > 0 or not works:
            raise RuntimeError("CUDA error: no kernel image is available")

    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.set_device", side_effect=set_device),
        mock.patch("torch.ones", on_cpu(torch.ones)),
    ):
        yield


def test_a_gpu_gets_its_number(capsys):
    with a_gpu():
        for name in ("auto", "cuda", "cuda:0"):
            assert program.choose_device(name) == torch.device("cuda", 0)
        with pytest.raises(ValueError, match="--device: cuda:1 cannot be used .*--device cpu"):
            program.choose_device("cuda:1")
    assert capsys.readouterr() == ("", "")


def test_a_gpu_that_cannot_work_is_left_aside_unless_it_is_named(capsys):
    with a_gpu(works=False):
        assert program.choose_device("auto").type in ("cpu", "mps")
        assert "cuda cannot be used (CUDA error" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no kernel image"):
            program.choose_device("cuda")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_real_gpu_trains_and_draws(name, small_data, tmp_path):
    backend = torch.cuda if name == "cuda" else torch.backends.mps
    if not backend.is_available():
        pytest.skip(f"no {name} here")
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--device", name]
    assert run_main(*options, "--epochs", 2) == (0, "")
    history = checkpoint(tmp_path)["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


# --- several processes ----------------------------------------------------------------------------


def torchrun(*options, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += [str(ROOT / "train_diffusion.py"), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {"capture_output": True, "text": True, "timeout": 100, **settings}
    return subprocess.run(command, env=environment, check=False, **settings)


def test_two_processes_learn_what_one_does_and_either_resumes_the_other(small_data, tmp_path):
    options = [*TINY, "--data-dir", small_data, "--device", "cpu"]
    result = torchrun(*options, "--output-dir", tmp_path / "two", "--max-steps", 10)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.count("done: 10 steps") == 1
    assert run_main(*options, "--output-dir", tmp_path / "one", "--max-steps", 10) == (0, "")
    two, one = checkpoint(tmp_path / "two"), checkpoint(tmp_path / "one")
    torch.testing.assert_close(two["losses"][:2], one["losses"][:2], rtol=0, atol=1e-5)
    assert two["history"][0]["train_loss"] == pytest.approx(
        one["history"][0]["train_loss"], abs=1e-5
    )
    assert two["model"].keys() == one["model"].keys()
    names = [{path.name for path in (tmp_path / folder).iterdir()} for folder in ("one", "two")]
    assert names[0] == names[1]
    for folder in ("one", "two"):
        resume = ["--resume", "--output-dir", tmp_path / folder, "--max-steps", 14]
        assert run_main(*resume) == (0, "")
    losses = [checkpoint(tmp_path / folder)["losses"][:6] for folder in ("one", "two")]
    assert (losses[0] > 0).all() and not same_state(losses[0], losses[0][:5])
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(monkeypatch):
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()
    for name in names:
        monkeypatch.setenv(name, "2")
    assert program.torchrun_variables() == (2, 2, 2)
    with pytest.raises(ValueError, match="--batch-size: must divide among 2 processes"):
        program.parse_options(["--batch-size", "15"])


def test_the_means_over_processes_go_back_to_where_the_tensors_were(monkeypatch):
    """As if the other of two processes had the same and one more."""
    monkeypatch.setattr(program, "torchrun_variables", lambda: (0, 0, 2))
    monkeypatch.setattr(program.dist, "all_reduce", lambda flat: flat.add_(flat + 1))
    loss, kernel = torch.tensor(3.0), torch.arange(24.0).reshape(2, 3, 2, 2)
    kernel = kernel.to(memory_format=torch.channels_last)
    program.average_over_processes([loss, kernel])
    assert loss == 3.5 and torch.equal(kernel, torch.arange(24.0).reshape(2, 3, 2, 2) + 0.5)
    assert len(program.sum_over_processes.kept) == 25  # no thread may be the last to hold it


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--resume" in text.split("options:")[0]
    assert all(action.help for action in program.make_parser()._actions)
