"""Several processes learn what one does."""

import contextlib
import datetime
import os
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    checkpoint,
    parsed,
    run_main,
    run_program,
)

import train_diffusion as program
from support import messages, processes


def test_torchrun_is_believed_once_all_of_its_variables_are_there(as_process, monkeypatch):
    """Some that are left over from elsewhere mean nothing, whatever they are."""
    names = "WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT".split()
    for name in names:
        for left_over in ("many", "", "2"):
            monkeypatch.setenv(name, left_over)
            if name != names[-1] or not left_over:
                processes.this_process.cache_clear()
                assert processes.this_process() == (0, 0, 1)
                assert parsed("--batch-size", "15").batch_size == 15
    processes.this_process.cache_clear()
    assert processes.this_process() == (2, 2, 2)
    with pytest.raises(ValueError, match="--batch-size: must divide among 2 processes"):
        parsed("--batch-size", "15")


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_of_another_launcher_are_told_how_to_start(name, as_process, monkeypatch):
    processes.this_process.cache_clear()
    monkeypatch.setenv(name, "1")
    assert processes.this_process() == (0, 0, 1)
    processes.this_process.cache_clear()
    monkeypatch.setenv(name, "2")
    with pytest.raises(messages.UserError, match="one of 2 tasks.*torchrun.*RANK"):
        processes.this_process()
    as_process(1, 1, 2)  # with PyTorch's own variables too, all is well
    assert processes.this_process() == (1, 1, 2)


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, OSError, MemoryError])
def test_processes_close_together_unless_one_fails(end, tmp_path, as_process, monkeypatch):
    """After an error the others may be waiting in another place, and closing would wait for them.

    As if this were one of two. They wait for the first one's pictures, which may take hours.
    """
    dist = mock.Mock()
    monkeypatch.setattr(processes, "dist", dist)
    as_process(1, 1, 2)
    monkeypatch.setattr(program, "train", mock.Mock(side_effect=end))
    with contextlib.suppress(KeyboardInterrupt, OSError, messages.UserError):
        program.main([f"--output-dir={tmp_path}", "--device=cpu"])
    dist.init_process_group.assert_called_once()
    backend, options = dist.init_process_group.call_args
    assert backend == ("gloo",) and options["timeout"] <= datetime.timedelta(hours=1)
    assert dist.new_group.call_args.kwargs["timeout"] >= datetime.timedelta(hours=12)
    assert dist.destroy_process_group.called == (end in (None, KeyboardInterrupt))


def test_two_processes_learn_what_one_does_and_one_resumes_them(small_data, tmp_path):
    """Up to rounding. Within the second epoch, so that a whole one is compared too."""
    options = [*TINY, "--data-dir", small_data, "--device", "cpu", "--max-steps", 10]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    launcher.append("--nproc-per-node=2")
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


@pytest.mark.slow
def test_two_machines_of_one_process_each_train_save_and_resume(small_data, tmp_path):
    """As two agents of torchrun on this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    agent += ["--local-addr=127.0.0.1", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}"]
    new_run = [*TINY, "--data-dir", small_data, "--device", "cpu", "--max-steps", 10]
    for options in (new_run, ["--resume", "--device", "cpu", "--max-steps", 14]):
        words = [*agent, ROOT / "train_diffusion.py", *options, "--output-dir", tmp_path / "two"]
        words = [str(word) for word in words]
        machines = [subprocess.Popen(words, stdout=subprocess.DEVNULL) for _ in range(2)]
        assert [machine.wait(timeout=100) for machine in machines] == [0, 0]
    assert run_main(*new_run, "--output-dir", tmp_path / "one", "--max-steps", 14) == (0, "")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert two["step"] == 14
    torch.testing.assert_close(two["model"], one["model"], rtol=0, atol=1e-4)


def test_the_means_over_processes_go_back_to_where_the_tensors_were(as_process, monkeypatch):
    """As if the other of two processes had the same and one more."""
    as_process(0, 0, 2)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.add_(flat + 1))
    loss, kernel = torch.tensor(3.0), torch.arange(24.0).reshape(2, 3, 2, 2)
    kernel = kernel.to(memory_format=torch.channels_last)
    processes.average([loss, kernel])
    assert loss == 3.5 and torch.equal(kernel, torch.arange(24.0).reshape(2, 3, 2, 2) + 0.5)
    assert len(processes.last_sent[0]) == 25  # no thread may be the last to hold it


def test_all_begin_with_the_weights_of_the_first(as_process, monkeypatch):
    """As if the first had ones. A process alone asks nobody."""
    weights = list(torch.nn.Conv2d(2, 3, 1).parameters())
    broadcast = mock.Mock(side_effect=lambda weight, src: weight.fill_(1))
    monkeypatch.setattr(processes.dist, "broadcast", broadcast)
    processes.take_over_from_first(weights)
    assert not broadcast.called
    as_process(1, 1, 2)
    processes.take_over_from_first(weights)
    assert all((weight == 1).all() for weight in weights)
    assert [call.kwargs for call in broadcast.call_args_list] == [{"src": 0}] * 2
