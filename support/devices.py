"""Which device calculates, how it wants its tensors laid out, and in which precision."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from support.messages import InputError, one_line, say
from support.processes import this_process


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name, tried out. "auto" is an NVIDIA GPU, else Apple's, else the CPU."""
    me = this_process()
    auto = ["cuda"] if torch.cuda.is_available() else []
    auto += ["mps"] if torch.backends.mps.is_available() and me.world_size == 1 else []
    for candidate in [*auto, "cpu"] if name == "auto" else [name]:
        try:
            device = torch.device(f"cuda:{me.local_rank}" if candidate == "cuda" else candidate)
            if candidate not in ("cuda", "cpu") and me.world_size > 1:
                raise RuntimeError("it serves one process alone")
            x = torch.ones(1, 1, 3, 3, device=device)
            F.conv2d(x, x).item()  # a GPU may be too old for this PyTorch, taken, or broken
            if device.type == "cuda":
                torch.cuda.set_device(device)
            break
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            problem = f"argument --device: {candidate} cannot be used ({one_line(error)})"
            if candidate in (name, "cpu") or me.world_size > 1:  # each process needs its own
                raise InputError(f"{problem}. Try --device cpu") from None
            say(f"{problem}; trying the next", sys.stderr)
    return device


def memory_format(device: torch.device) -> torch.memory_format:
    """Channels last is faster on CPUs and NVIDIA's GPUs; on Apple's it has had bugs."""
    return torch.preserve_format if device.type == "mps" else torch.channels_last


PIECE = 196_000  # pixels that are drawn or measured together: 250 images of 28x28


def images_together(image_shape: Sequence[int]) -> int:
    """How many images [..., H, W] are drawn or measured together, so that memory suffices."""
    return max(1, PIECE // (image_shape[-2] * image_shape[-1]))


def pieces(count: int, image_shape: Sequence[int]) -> list[slice]:
    """So many images in pieces of `images_together`."""
    size = images_together(image_shape)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on NVIDIA's GPUs that calculate in it, for speed; elsewhere float32.

    float16 has less range, and what overflows in it is nan. Most CPUs have to emulate bfloat16.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """In this block the layers calculate in `compute_dtype`. Weights stay float32."""
    dtype = compute_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
