"""Nothing lost: runs that are interrupted, killed, out of disk space, diverging or many at once.

And wherever a reader has a computer: its notebooks, terminals, environments and devices.
"""

import contextlib
import datetime
import io
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import matplotlib
import pytest
import torch
from conftest import LONG, ROOT, STEPS_PER_EPOCH, TINY, checkpoint, run_main, run_program, same_run

import train_diffusion as program

posix = pytest.mark.skipif(os.name != "posix", reason="these signals and limits are POSIX's")


@pytest.fixture(scope="module")
def stopped(small_data, tmp_path_factory):
    """The folders of two long runs: one stopped after six steps, one after an epoch, eight."""
    folders = [tmp_path_factory.mktemp(name) for name in ("six", "eight")]
    for folder, steps in zip(folders, (6, STEPS_PER_EPOCH)):
        options = ["--data-dir", small_data, "--output-dir", folder, "--max-steps", steps]
        assert run_main(*LONG, *options) == (0, "")
    return folders


@pytest.fixture
def resume(stopped, tmp_path):
    """The options that complete the epoch of the run that stopped after six steps."""
    shutil.copy(stopped[0] / "checkpoint.pt", tmp_path)
    return ["--resume", "--output-dir", tmp_path, "--max-steps", STEPS_PER_EPOCH]


# --- signals --------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    "name, where, step",
    [
        ("SIGINT", "training_loss", 7),
        ("SIGTERM", "training_loss", 7),
        ("SIGHUP", "training_loss", 7),
        ("SIGTERM", "save_checkpoint", 8),
        ("SIGTERM", "held_out_loss", 8),
        ("SIGTERM", "sample", 8),
        ("SIGTERM", "draw_denoising", 8),
    ],
)
def test_a_signal_saves_and_the_resumed_run_is_the_one_that_never_stopped(
    name, where, step, resume, stopped, tmp_path, capsys, monkeypatch
):
    """A step and its save are finished first. Whatever else is going on ends at once, and is done
    again when the run is resumed. Handlers are put back.
    """
    signum, interrupted = getattr(signal, name), getattr(program, where)

    def interrupt(*arguments, **options):
        patch.setattr(program, where, interrupted)
        signal.raise_signal(signum)
        assert where in ("training_loss", "save_checkpoint"), "it went on"
        return interrupted(*arguments, **options)

    before = signal.signal(signum, signal.SIG_DFL)  # nohup ignores SIGHUP
    with monkeypatch.context() as patch:
        patch.setattr(program, where, interrupt)
        assert run_main(*resume) == (128 + signum, "")
    assert signal.signal(signum, before) == signal.SIG_DFL
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and sys.executable in error, error
    assert f"--max-steps={STEPS_PER_EPOCH}" in error  # what is pasted does what was asked
    assert checkpoint(tmp_path)["step"] == step
    assert (tmp_path / "weights.pt").exists() == (where == "draw_denoising")
    assert run_main(*resume) == (0, "") and same_run(tmp_path, stopped[1])


def defer_the_first_alone(first, second) -> None:
    with program.heard_signals() as signals:
        signals.deferred = True
        signal.raise_signal(first)
        assert signals.received == [first]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)


@posix
def test_a_second_signal_ends_at_once_and_nohup_stays_in_force():
    defer_the_first_alone(signal.SIGTERM, signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with program.heard_signals() as signals:
        signals.deferred = True
        for _ in range(2):  # a terminal that is closed sends it twice
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == [signal.SIGHUP] * 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with program.heard_signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == []
    signal.signal(signal.SIGHUP, before)


@posix
def test_windows_has_a_ctrl_break_in_place_of_a_hangup(monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGURG, raising=False)
    monkeypatch.delattr(signal, "SIGHUP")
    defer_the_first_alone(signal.SIGBREAK, signal.SIGBREAK)


@posix
def test_a_run_that_ends_before_it_saved_says_nothing_of_the_earlier_one(
    resume, tmp_path, capsys, monkeypatch
):
    interrupted = mock.Mock(side_effect=lambda *_: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(program, "load_images", interrupted)
    for options, advised in ((["--output-dir", tmp_path], False), (resume, True)):
        assert run_main(*options) == (128 + signal.SIGTERM, "")
        assert ("--resume" in capsys.readouterr().err) == advised


# --- killed, full disk, diverged ------------------------------------------------------------------


def save_always(*options) -> None:
    """A run that saves at every step, to be killed: for a process of its own."""
    program.SAVE_EVERY, program.CHECK_EVERY = 0, 1
    run_main(*options)


def kill_loop(folder, data_dir, kills: int) -> None:
    """Kill a run that saves at every step at random moments; it must end as one never killed."""
    # A copy of this process has torch imported already. Where there is a GPU it would not work.
    copies = sys.platform == "linux" and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if copies else "spawn")
    dice, steps, killed = random.Random(0), [0], folder / "killed"
    resume = ["--resume", "--output-dir", killed]
    for _ in range(kills):
        start = [*LONG, "--data-dir", data_dir, *resume[1:]] if steps == [0] else resume
        process = context.Process(target=save_always, args=start)
        process.start()
        while not (killed / "checkpoint.pt").exists() or checkpoint(killed)["step"] <= steps[-1]:
            assert process.is_alive()
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.join()
        steps.append(checkpoint(killed)["step"])  # ends the test if it does not load
        assert len(list(killed.glob("*.tmp"))) < len(steps)  # one for each kill at most
    assert steps == sorted(set(steps))
    end = ["--max-steps", steps[-1] + 2]
    assert run_main(*resume, *end) == (0, "")
    whole = [*LONG, "--data-dir", data_dir, "--output-dir", folder / "whole"]
    assert run_main(*whole, *end) == (0, "")
    assert same_run(killed, folder / "whole")
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
def test_a_full_disk_leaves_the_last_good_checkpoint(resume, stopped, tmp_path):
    """Files may not grow beyond 300 kB: pictures fit, the checkpoint does not."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        code, message = run_main(*resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "checkpoint.pt cannot be written (File too large)" in message
    assert same_run(tmp_path, stopped[0]) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_diverging_run_leaves_the_last_good_checkpoint(what, resume, tmp_path, monkeypatch):
    """Also if the loss itself is finite: the weights that its gradient spoils are never saved."""
    before, loss = (tmp_path / "checkpoint.pt").read_bytes(), program.training_loss

    def spoiled(*arguments):
        error = loss(*arguments)
        # The root of 0 is 0, and its slope infinite.
        return error / 0 if what == "loss" else error + (error - error.detach()).sqrt()

    monkeypatch.setattr(program, "training_loss", spoiled)
    code, message = run_main(*resume)
    assert code == 1 and "not finite at step 7" in message and "--lr" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_long_epoch_is_saved_now_and_then(resume, tmp_path, monkeypatch):
    """Killed in its eighth step, a run that saves at every step has its seventh."""
    step = mock.Mock(side_effect=[program.training_loss, SystemExit])
    monkeypatch.setattr(program, "training_loss", lambda *arguments: step()(*arguments))
    monkeypatch.setattr(program, "SAVE_EVERY", 0)
    monkeypatch.setattr(program, "CHECK_EVERY", 1)
    with pytest.raises(SystemExit):
        run_main(*resume)
    assert checkpoint(tmp_path)["step"] == 7


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Into a folder that is made again if it has vanished, and under any name."""
    names = ["a/b/file", "x" * 255, "é" * 127, "a b'c$d"]
    names += ['e"f\ng'] if os.name == "posix" else []
    for name in names:
        program.write_file(tmp_path / name, lambda file: file.write(b"first"))
        assert (tmp_path / name).read_bytes() == b"first"
    path = tmp_path / "a" / "b" / "file"
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="file cannot be written .No space left"):
        program.write_file(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_no_two_processes_and_no_file_of_the_user_share_a_temporary_name(tmp_path, monkeypatch):
    (tmp_path / "file.tmp").write_text("the user's own")
    replace = mock.Mock(wraps=os.replace)
    monkeypatch.setattr("os.replace", replace)
    for pid in (1, 2):
        monkeypatch.setattr("os.getpid", lambda pid=pid: pid)
        program.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert len({call.args[0] for call in replace.call_args_list}) == 2
    assert (tmp_path / "file.tmp").read_text() == "the user's own"


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


def test_a_file_that_is_held_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """As virus scanners do on Windows."""
    held = [PermissionError(13, "in use")] * 3
    with monkeypatch.context() as patch:
        replace = mock.Mock(side_effect=[*held, mock.DEFAULT], wraps=os.replace)
        patch.setattr("os.replace", replace)
        patch.setattr("os.name", "nt")
        patch.setattr("time.sleep", mock.Mock())
        program.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == ["file"]


def test_pictures_and_logs_that_cannot_be_written_never_end_a_run(resume, tmp_path, capsys):
    names = ["train_log.csv", "loss_curve.png", "samples_epoch_1.png", "denoising.gif"]
    for name in names:
        (tmp_path / name / "in the way").mkdir(parents=True)
    with mock.patch.object(program, "draw_images"):  # one figure is enough, and takes half a second
        assert run_main(*resume, pictures=True) == (0, "")
    assert checkpoint(tmp_path)["step"] == STEPS_PER_EPOCH
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("warning: no ") for line in lines)
    assert all(any(name in line for line in lines) for name in names)


# --- notebooks, terminals, environments -----------------------------------------------------------

FRESH = """
import os, signal, sys, torch
os.environ["MPLBACKEND"] = "not installed"

def state():
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), os.listdir(), handlers, torch.get_rng_state().tolist()

before = state()
import train_diffusion
assert state() == before
if os.path.exists("/dev/full"):
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stdout.fileno())
    os.close(sys.stderr.fileno())
    sys.stderr = None  # as Python finds it with 2>&-
    train_diffusion.main(sys.argv[1:])
"""


def test_importing_changes_nothing_and_a_run_with_nowhere_to_print_ends_well(small_data, tmp_path):
    """No file, variable of the environment, signal handler or random state.

    Both in one new interpreter, since its imports take seconds.
    """
    options = [*TINY, "--max-steps", "1", "--data-dir", str(small_data), "--output-dir", "out"]
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    command = [sys.executable, "-c", FRESH, *options]
    result = subprocess.run(command, capture_output=True, text=True, **settings)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    if os.path.exists("/dev/full"):
        assert checkpoint(tmp_path / "out")["step"] == 1


def test_a_notebook_that_imports_the_program_first_still_shows_its_pictures():
    """matplotlib looks at the variable but once."""
    code = "import train_diffusion, matplotlib; print(matplotlib.get_backend())"
    settings = {"cwd": ROOT, "env": {**os.environ, "MPLBACKEND": "svg"}}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, **settings)
    assert (result.returncode, result.stdout, result.stderr) == (0, "svg\n", "")


def text_stream(encoding="utf-8"):
    return io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")


def test_printing_never_ends_a_run_and_spells_out_what_a_terminal_lacks(tmp_path, monkeypatch):
    file, closed, narrow = open(tmp_path / "full", "wb"), text_stream(), text_stream("cp1252")
    full = mock.Mock(encoding="utf-8", fileno=file.fileno)
    full.write.side_effect = OSError(28, "No space left on device")
    closed.close()
    logger, odd = SimpleNamespace(write=len), mock.Mock(encoding="no such")
    for stream in (closed, full, None, logger, odd, narrow, text_stream()):
        monkeypatch.setattr(sys, "stdout", stream)
        program.say("Łukasz")
        program.say("undecodable \udcff")
    assert narrow.buffer.getvalue().startswith(b"\\u0141ukasz\n")
    assert sys.stdout.buffer.getvalue().startswith("Łukasz\n".encode())
    file.write(b"what was left in the stream")  # as Python does at its end: it goes nowhere
    file.close()
    assert (tmp_path / "full").read_bytes() == b""


@pytest.mark.parametrize("kind", [torch.cuda.OutOfMemoryError, MemoryError, RuntimeError])
def test_too_little_memory_gets_one_line(small_data, tmp_path, resume, monkeypatch, kind):
    """As a GPU's allocator, Python and a CPU's allocator say it; other errors are no user's."""
    problem = "[enforce fail at alloc.cpp] err == 0. DefaultCPUAllocator:\ncan't allocate memory"
    if kind is torch.cuda.OutOfMemoryError:
        problem = "CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has 8 GiB,\nof which"
    monkeypatch.setattr(program, "training_loss", mock.Mock(side_effect=kind(problem)))
    code, message = run_main(*resume)
    assert code == 1 and message.startswith("there is too little memory (") and "\n" not in message
    assert "--device cpu" in message and "--batch-size" not in message  # which a run keeps
    new_run = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path / "new"]
    assert "Try a lower --batch-size" in run_main(*new_run)[1]
    bug = RuntimeError("unsupported memory format option")
    monkeypatch.setattr(program, "training_loss", mock.Mock(side_effect=bug))
    with pytest.raises(RuntimeError, match="unsupported"):
        program.main([str(option) for option in resume])


def test_a_notebook_calls_main_from_a_thread_and_with_its_own_options(
    small_data, tmp_path, monkeypatch
):
    """There the command line is the kernel's, the output has no encoding, and no handler is set."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/tmp/kernel.json"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    options = [*TINY, "--max-steps", 1, "--data-dir", small_data, "--output-dir", tmp_path]
    results = []
    thread = threading.Thread(target=lambda: results.append(run_main(*options)))
    thread.start()
    thread.join()
    assert results == [(0, "")] and "train_diffusion.py --sample-only" in sys.stdout.getvalue()


def test_the_users_matplotlib_settings_have_no_say(tmp_path):
    """Neither TeX that is not installed nor a size; and they stay as they are."""
    rows = [{"epoch": 1, "train_loss": 0.1, "val_loss": 0.2}]
    t, losses = torch.arange(20), torch.rand(20)
    program.draw_loss_curve(tmp_path / "a.png", rows, t, losses)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red", "font.size": 50}):
        before = dict(matplotlib.rcParams)
        program.draw_loss_curve(tmp_path / "b.png", rows, t, losses)
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
    assert run_main(*drawing, "--labels", 1, 1, "--output=~/x.npz") == (0, "")
    assert program.load_model("~/runs/x/weights.pt")[0].num_classes == 10
    assert len(program.load_images("~/x.npz")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# --- devices --------------------------------------------------------------------------------------


@pytest.fixture
def set_device(monkeypatch):
    """As if there were NVIDIA GPUs: the call, with its number, for one that was tried."""
    ones, call = torch.ones, mock.Mock()
    monkeypatch.setattr("torch.ones", lambda *sizes, device: ones(*sizes))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", call)
    return call


@pytest.mark.parametrize("works", [True, False])
def test_a_gpu_gets_its_number_and_is_left_aside_if_it_cannot_work(
    works, set_device, monkeypatch, capsys
):
    """One that is asked for by name is never left aside."""
    conv2d = torch.nn.functional.conv2d
    broken = RuntimeError("CUDA error: no kernel image is available")
    if not works:  # an old GPU is found out by its first convolution; the CPU comes after it
        conv2d = mock.Mock(side_effect=[broken, mock.DEFAULT, broken], wraps=conv2d)
    monkeypatch.setattr("torch.nn.functional.conv2d", conv2d)
    if works:
        for name in ("auto", "cuda", "cuda:0"):
            assert program.choose_device(name) == torch.device("cuda", 0)
            set_device.assert_called_with(torch.device("cuda", 0))
        assert capsys.readouterr() == ("", "")
        set_device.side_effect = RuntimeError("CUDA error: invalid device ordinal")
        with pytest.raises(ValueError, match="--device: cuda:1 cannot be used .*--device cpu"):
            program.choose_device("cuda:1")
    else:
        assert program.choose_device("auto").type in ("cpu", "mps")
        assert "cuda cannot be used (CUDA error" in capsys.readouterr().err
        with pytest.raises(ValueError, match="no kernel image"):
            program.choose_device("cuda")
        set_device.assert_not_called()


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_real_gpu_trains_and_draws(name, small_data, tmp_path):
    backend = torch.cuda if name == "cuda" else torch.backends.mps
    if not backend.is_available():
        pytest.skip(f"no {name} here")
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--device", name]
    assert run_main(*options, "--epochs", 2, pictures=True) == (0, "")
    history = checkpoint(tmp_path)["history"]
    assert history[1]["train_loss"] < history[0]["train_loss"]


# --- several processes ----------------------------------------------------------------------------


def test_torchrun_is_believed_once_all_of_its_variables_are_there(monkeypatch, capsys):
    """Some that are left over from elsewhere mean nothing, whatever they are."""
    names = "WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()
    for name in names:
        for left_over in ("many", "", "2"):
            monkeypatch.setenv(name, left_over)
            if name != names[-1] or not left_over:
                assert program.torchrun_variables() == (0, 0, 1)
                assert program.parse_options(["--batch-size", "15"]).batch_size == 15
    assert program.torchrun_variables() == (2, 2, 2)
    with pytest.raises(ValueError, match="--batch-size: must divide among 2 processes"):
        program.parse_options(["--batch-size", "15"])
    program.say("the first process alone speaks")
    assert capsys.readouterr().out == ""


def test_every_process_has_a_gpu_of_its_own_or_the_run_ends(set_device, monkeypatch):
    monkeypatch.setattr(program, "torchrun_variables", lambda: (5, 1, 8))  # 1 on its machine
    for name in ("auto", "cuda"):
        assert program.choose_device(name) == torch.device("cuda", 1)
        set_device.assert_called_with(torch.device("cuda", 1))
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match=f"--device: {name} cannot be used .it serves one"):
            program.choose_device(name)
    broken = RuntimeError("CUDA error: out of memory")
    monkeypatch.setattr("torch.nn.functional.conv2d", mock.Mock(side_effect=broken))
    with pytest.raises(ValueError, match="--device: cuda cannot be used .CUDA error"):
        program.choose_device("auto")  # and does not train on a CPU beside seven GPUs


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, OSError, MemoryError])
def test_processes_close_together_unless_one_fails(end, tmp_path, monkeypatch):
    """After an error the others may be waiting in another place, and closing would wait for them.

    As if this were one of two. They wait for the first one's pictures, which may take hours.
    """
    dist = mock.Mock()
    monkeypatch.setattr(program, "dist", dist)
    monkeypatch.setattr(program, "torchrun_variables", lambda: (1, 1, 2))
    monkeypatch.setattr(program, "train", mock.Mock(side_effect=end))
    with contextlib.suppress(KeyboardInterrupt, OSError):
        program.main([f"--output-dir={tmp_path}", "--device=cpu"])
    dist.init_process_group.assert_called_once()
    backend, options = dist.init_process_group.call_args
    assert backend == ("gloo",) and options["timeout"] >= datetime.timedelta(hours=12)
    assert dist.destroy_process_group.called == (end in (None, KeyboardInterrupt))


def test_two_processes_learn_what_one_does_and_one_resumes_them(small_data, tmp_path):
    """Up to rounding. Within the second epoch, so that a whole one is compared too."""
    options = [*TINY, "--data-dir", small_data, "--device", "cpu", "--max-steps", 10]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    one, two = tmp_path / "one", tmp_path / "two"
    result = run_program(*options, "--output-dir", two, launcher=launcher)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.count("done: 10 steps") == 1
    assert run_main(*options, "--output-dir", one) == (0, "")
    assert set(os.listdir(one)) < set(os.listdir(two)) and not list(two.glob("*.tmp"))
    for folder in (one, two):
        assert run_main("--resume", "--output-dir", folder, "--max-steps", 14) == (0, "")
    one, two = checkpoint(one), checkpoint(two)
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=1e-4)
    assert (two["losses"] > 0).all()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=0, atol=1e-5)
    means = [state["history"][0]["train_loss"] for state in (one, two)]
    assert means[0] == pytest.approx(means[1], abs=1e-5)


def test_the_means_over_processes_go_back_to_where_the_tensors_were(monkeypatch):
    """As if the other of two processes had the same and one more."""
    monkeypatch.setattr(program, "torchrun_variables", lambda: (0, 0, 2))
    monkeypatch.setattr(program.dist, "all_reduce", lambda flat: flat.add_(flat + 1))
    loss, kernel = torch.tensor(3.0), torch.arange(24.0).reshape(2, 3, 2, 2)
    kernel = kernel.to(memory_format=torch.channels_last)
    program.average_over_processes([loss, kernel])
    assert loss == 3.5 and torch.equal(kernel, torch.arange(24.0).reshape(2, 3, 2, 2) + 0.5)
    assert len(program.sum_over_processes.kept) == 25  # no thread may be the last to hold it
