"""Several processes that train together: who am I, and what do the others have?

torchrun starts them. Each works on its share of every batch, and gradients are averaged.
"""

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from support.messages import InputError, UserError, one_line


class Process(NamedTuple):
    """One of `world_size` processes. A program that runs alone is the first of one."""

    rank: int = 0  # its number among all
    local_rank: int = 0  # its number on this machine
    world_size: int = 1  # how many there are


# What tells a task how many there are.
OTHER_LAUNCHERS = {"SLURM's srun": "SLURM_STEP_NUM_TASKS", "MPI": "OMPI_COMM_WORLD_SIZE"}


@functools.cache
def this_process() -> Process:
    """What PyTorch's own variables say in the environment, read once.

    torchrun sets all of them, and so may any other launcher. One alone, left over from elsewhere,
    means nothing.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    others = ("MASTER_ADDR", "MASTER_PORT")
    if all(os.environ.get(name) for name in names + others):
        return Process(*(int(os.environ[name]) for name in names))
    for launcher, name in OTHER_LAUNCHERS.items():
        if os.environ.get(name, "1") != "1":
            raise InputError(
                f"{launcher} started this as one of {os.environ[name]} tasks, which do not know of "
                f"each other. Start torchrun by it, or export {', '.join(names + others)}"
            )
    return Process()


def share(tensor: Tensor) -> Tensor:
    """This process's part of a batch: each so-many-th image; all of it for a process alone."""
    me = this_process()
    return tensor[me.rank :: me.world_size]


@contextlib.contextmanager
def joined(device: torch.device, apart: bool = False) -> Iterator[None]:
    """The processes can exchange tensors in this block; each is on its own if `apart`."""
    if this_process().world_size == 1 or apart:
        yield
        return
    if os.environ["MASTER_ADDR"].startswith("127.") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it looks up the machine's own name
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    # The first alone draws pictures, for which the others may have to wait for hours.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    patient_group[:] = [cast(dist.ProcessGroup, group)]
    try:
        yield
    finally:  # but after an error the others may still wait, and closing would wait for them
        patient_group.clear()
        if not isinstance(sys.exception(), Exception):
            dist.destroy_process_group()


# In which processes wait for each other longer than for a tensor.
patient_group: list[dist.ProcessGroup] = []


# The last tensor that was sent. If a thread of gloo's were the last to hold it, that thread would
# need Python to free it, for which it may wait for ever at the end of the program.
last_sent: list[Tensor] = []


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, put in its place. All of them wait here for the last."""
    if this_process().world_size > 1:
        last_sent[:] = [tensor]
        with explained_connection():
            dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def explained_connection() -> Iterator[None]:
    """Another process ended, and has said why."""
    try:
        yield
    except RuntimeError as error:  # mostly: the connection is closed
        cause = one_line(error).partition(". ")[0]
        raise UserError(f"another process cannot be reached; see its words ({cause})") from None


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message for all of them."""
    world_size = this_process().world_size
    if world_size > 1:
        means = sum_over_processes(torch.cat([x.flatten() for x in tensors])) / world_size
        for tensor, mean in zip(tensors, means.split([x.numel() for x in tensors])):
            tensor.copy_(mean.view(tensor.shape))


def take_over_from_first(weights: Iterable[Tensor]) -> None:
    """Begin with the first process's weights, so that equality rests on more than equal seeds."""
    if this_process().world_size > 1:
        for weight in weights:
            dist.broadcast(weight.detach(), src=0)


def wait_for_all() -> None:
    """Nobody goes on from here before all have come, however long one of them takes."""
    if this_process().world_size > 1:
        with explained_connection():
            dist.barrier(patient_group[0])


def any_process(flag: object, device: torch.device) -> bool:
    """Whether `flag` is true in any process. All of them wait here for the last."""
    if this_process().world_size == 1:  # and no GPU has to wait
        return bool(flag)
    return bool(sum_over_processes(torch.tensor(float(bool(flag)), device=device)))
