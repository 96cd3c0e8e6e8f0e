"""Train a denoising diffusion model on MNIST and draw digits with it.

    python train_diffusion.py                                # the whole job: train, sample, save
    python train_diffusion.py --resume                       # go on after an interruption
    python train_diffusion.py --sample-only --labels 3 1 4   # draw with a trained network
    python train_diffusion.py --dataset my_images.npz        # train on your own images
    torchrun --nproc-per-node=2 train_diffusion.py           # several processes or GPUs

or, from Python:

    from train_diffusion import load_model, sample
    model, scheduler = load_model()
    digits = sample(model, scheduler, labels=[3, 1, 4, 1, 5])

The network learns to say which noise was added to an image. forward_reverse_process.py has the
mathematics and the network; read that first. This file has the program around them: images, one
step of training (DDPM's Algorithm 1), the loop, sampling (Algorithm 2, DDIM, guidance). What comes
after that is not about diffusion: files, processes, pictures, the command line, an optimizer.
"""

import argparse
import contextlib
import copy
import datetime
import gzip
import io
import itertools
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NoReturn, TextIO

if __name__ == "__main__":  # Ctrl-C during the slow imports: no traceback
    SIGINT_HANDLER = signal.signal(signal.SIGINT, signal.SIG_DFL)
# import matplotlib would fail over a backend that is not installed, and files need none.
MPLBACKEND = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)

import matplotlib.style
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from forward_reverse_process import NORM_GROUPS, NoiseScheduler, UNet

if MPLBACKEND is not None:
    os.environ["MPLBACKEND"] = MPLBACKEND
    with contextlib.suppress(ValueError):  # matplotlib looks but once; a notebook needs it later
        matplotlib.rcParams["backend"] = MPLBACKEND
if __name__ == "__main__":
    signal.signal(signal.SIGINT, SIGINT_HANDLER)

HERE = Path(__file__).resolve().parent
LEARNING_RATES = {"muon": 0.005, "adam": 0.002}  # highest of a run; Muon: the file's last section
WARMUP_STEPS = 200  # steps in which the learning rate rises
MAX_GRAD_NORM = 1.0  # a longer gradient is shortened to this length
EMA_DECAY = 0.999  # of the weights' exponential moving average: about 1 / (1 - decay) steps long
CHECK_EVERY = 20  # steps between two looks at the loss; each makes the CPU wait for a GPU
SAVE_EVERY = 300  # seconds between checkpoints within an epoch: so much may a killed run lose
NUM_HELD_OUT = 2000  # images at most for the held-out loss
CHUNK = 250  # images that are drawn or measured together

# --- Images: uint8 [N, C, H, W] outside the model, float32 in [-1, 1] inside ----------------------


def to_model(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x_0: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --- Training -------------------------------------------------------------------------------------


def training_loss(
    model: UNet,
    scheduler: NoiseScheduler,
    x_0: Tensor,
    labels: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The mean squared error of the predicted noise, for each image: float32 [B].

    This is DDPM's Algorithm 1 up to its gradient step.

    Why a squared error: the images should be probable to the network. Their negative log-likelihood
    has an upper bound (the variational bound, by Jensen's inequality, DDPM eq. 3 to 5). It
    compares, at every t > 0, the step back that is true if x_0 is known,
    `NoiseScheduler.posterior`, with the network's. Both are Gaussians. If the network's is given
    the posterior's variance, their distance (KL divergence) is the squared distance of the means
    over twice that variance (eq. 8). The means differ by a multiple of noise - noise_pred. So the
    bound gives the squared error of the noise the weight beta_t / (2 alpha_t (1 - alpha-bar_{t-1}))
    (from eq. 12), by DDPM's schedule most at small t. Eq. 14 leaves the weight out. That is no
    longer the bound, but draws better (section 3.4).

    Why the noise and not the image: x_0_pred is wrong by the error of noise_pred times
    sqrt((1 - alpha-bar_t) / alpha-bar_t), so its square would count large t most, where there is
    hardly an image to see. DDPM, predicting x_0, got worse samples (section 3.2). The error of the
    noise, counted alike at all t, lies between that and the bound.

    The noise is also the score, up to a factor. q(x_t | x_0) is a Gaussian, whose
    grad log q(x_t | x_0) is -eps / sqrt(1 - alpha-bar_t). The score, grad log q(x_t), is the mean
    of this over the x_0 that fit x_t. So minus the mean noise points to where x_t gets more
    probable.

    Args:
        x_0: clean images in [-1, 1], [B, C, H, W].
        labels: int64 [B], or None: no label for all.
        t: int64 [B] in 0 ... T - 1; drawn if not given.
        noise: shaped like x_0; drawn if not given.
    """
    if t is None:
        t = torch.randint(scheduler.num_timesteps, (len(x_0),), device=x_0.device)
    x_t, noise = scheduler.add_noise(x_0, t, noise)
    noise_pred = model(x_t, t, labels)
    return (noise - noise_pred).square().mean(dim=(1, 2, 3))


def train(args: argparse.Namespace, device: torch.device, signals: SimpleNamespace) -> None:
    """The whole run: from the images to the trained network and its pictures.

    `signals` is what `heard_signals` yields. With several processes, each draws what one alone
    would draw for the whole batch, and works on its share. Gradients are averaged, so the result is
    that of one process, up to rounding.
    """
    rank, _, num_processes = torchrun_variables()
    share = slice(rank, None, num_processes)  # of every batch: each so-many-th image
    batch_size = args.batch_size
    folder, path = args.output_dir, args.output_dir / "checkpoint.pt"

    # Load.
    data_dir = args.data_dir or HERE / "data"
    (images, labels), (test_images, test_labels) = load_images(args.dataset, data_dir)
    if batch_size > len(images):
        raise ValueError(f"argument --batch-size: only {len(images)} images are to train on")
    data = [images] if labels is None else [images, labels]
    check_sums = [zlib.crc32(x.contiguous().numpy()) for x in data]  # a run keeps to its images
    if labels is None or args.label_dropout == 1:
        num_classes = labels = test_labels = None
    else:
        num_classes = int(labels.max()) + 1
        labels, test_labels = labels.to(device), test_labels[:NUM_HELD_OUT].to(device)
    images, test_images = images.to(device), test_images[:NUM_HELD_OUT].to(device)
    steps_per_epoch = len(images) // batch_size
    total_steps = args.epochs * steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    num_steps = min(args.sample_steps, args.timesteps)  # of sampling

    # Build.
    schedule = {"num_timesteps": args.timesteps, "schedule": args.schedule}
    shape = {"image_shape": tuple(images.shape[1:]), "base_channels": args.base_channels}
    shape |= {"num_classes": num_classes}
    scheduler = NoiseScheduler(**schedule).to(device)
    torch.manual_seed(args.seed)  # for the initial weights; later draws have their own generators
    model = UNet(scheduler, **shape).to(device, memory_format=memory_format(device))
    ema = copy.deepcopy(model).eval()  # an average of the weights, smoother than the latest ones
    optimizers = make_optimizers(model, args.optimizer)
    step, seconds = 0, 0.0  # done so far
    losses = torch.zeros(steps_per_epoch, device=device)  # of the current epoch
    history: list[dict[str, float]] = []  # a row for every epoch, as in train_log.csv
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    # Resume.
    if args.resume:
        saved = args.saved
        if (saved.get("unet"), saved.get("check_sums")) != (shape, check_sums):
            problem = f"the images of {args.dataset} are not what {path} was trained on"
            raise ValueError(f"--resume: {problem}. Give their --dataset or --data-dir")
        with explained(path, "does not fit this program", "Name another --output-dir"):
            model.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            step, seconds, losses = saved["step"], saved["seconds"], saved["losses"].to(device)
            history = saved["history"]
        if step >= last_step:
            asked = f"{last_step} are asked for. Give more --epochs, or --max-steps"
            say(f"nothing left to train: {path} is at step {step}, and {asked}")
    weights = {"scheduler": schedule, "unet": shape, "ema": ema.state_dict()}  # live tensors

    def save() -> None:
        """Write checkpoint.pt: all that a run needs to go on, in tensors and plain values."""
        state = {"settings": {name: getattr(args, name) for name in CHANGEABLE + KEPT}}
        state |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"step": step, "seconds": seconds, "losses": losses, "check_sums": check_sums}
        if rank == 0:
            save_checkpoint(path, weights | state | {"history": history})

    if rank == 0:
        if not args.resume:
            keep_earlier_checkpoint(path)
            save()  # now, so that a run can be resumed whenever it is interrupted
        signals.resumable = True
        draw_noise_schedule(folder / "noise_schedule.png", args.timesteps)
        draw_forward_process(folder / "forward_process.png", scheduler, test_images[:4], args.seed)
    if step < last_step:
        say(f"training on {device}, from step {step} to {last_step}; each epoch gets a line")
    while step < last_step or len(history) < step // steps_per_epoch:
        # What is left of an epoch, as numbers of images, [steps, B]. (Nothing, if the run was
        # killed after the epoch's last step and before its row in the log.)
        epoch, start = len(history) + 1, len(history) * steps_per_epoch
        order = torch.randperm(len(images), generator=generator_for(f"epoch {epoch}", args.seed))
        batches = order[: steps_per_epoch * batch_size].view(steps_per_epoch, -1).to(device)
        bar = progress_bar(batches[step - start : last_step - start, share], f"epoch {epoch}")
        clock = saved_at = time.monotonic()
        signals.deferred = True
        for batch in bar:
            # Draw t, noise, and whose label to drop (`guided_noise` asks the network without one
            # too). The generator's own seed makes every step repeatable.
            draw = {"generator": generator_for(f"step {step}", args.seed, device), "device": device}
            t = torch.randint(args.timesteps, (batch_size,), **draw)[share]
            noise = torch.randn(batch_size, *model.image_shape, **draw)[share]
            dropped = torch.rand(batch_size, **draw)[share] < args.label_dropout
            x_0 = to_model(images[batch])
            y = labels[batch].masked_fill(dropped, model.no_label) if num_classes else None

            # Predict the noise (in bfloat16 where the GPU has it, for speed).
            with torch.autocast("cuda" if use_bf16 else "cpu", torch.bfloat16, enabled=use_bf16):
                loss = training_loss(model, scheduler, x_0, y, t, noise).mean()

            # Learn: one step down the gradient. The learning rate rises over the first steps, then
            # falls on a line, to 0 at the end of the last epoch.
            model.zero_grad()
            loss.backward()
            loss = loss.detach()
            average_over_processes([loss, *(weight.grad for weight in model.parameters())])
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            lr = args.lr * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / total_steps)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()

            # Average the weights, as DDPM does (appendix B): ema = decay ema + (1 - decay) model.
            # That evens out what single batches do to them. Its memory is short at first, so that
            # the random start is soon forgotten.
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)

            # Count, and now and then look: nan marks a loss that is bad or has a bad gradient.
            losses[step - start] = torch.where(grad_norm.isfinite(), loss, torch.nan)
            step, now = step + 1, time.monotonic()
            seconds, clock = seconds + now - clock, now
            if step % CHECK_EVERY == 0:
                stop_if_not_finite(losses[: step - start], start, path)
                bar.set_postfix(loss=f"{losses[: step - start].mean():.4f}")
                if now - saved_at > SAVE_EVERY:
                    save()
                    saved_at = now
            meet = num_processes == 1 or step % CHECK_EVERY == 0  # processes wait for each other
            if meet and any_process(signals.received, device):
                break

        # Save first, then look: a signal that comes after this ends the run and loses nothing.
        bar.close()
        stop_if_not_finite(losses[: step - start], start, path)
        save()
        signals.deferred = num_processes > 1
        if any_process(signals.received, device):
            raise KeyboardInterrupt(*signals.received)
        row = {"epoch": epoch, "step": step, "train_loss": losses[: step - start].mean().item()}
        if rank == 0:
            t, errors = held_out_loss(ema, scheduler, test_images, test_labels, args.seed)
            row |= {"val_loss": errors.mean().item(), "seconds": seconds}
            write_log(folder / "train_log.csv", [*history, row])
            draw_loss_curve(folder / "loss_curve.png", [*history, row], t, errors)
            if epoch % args.sample_every == 0 or step == last_step:
                grid = sample(ema, scheduler, args.num_samples, None, num_steps, **args.sampler)
                with not_vital(folder / f"samples_epoch_{epoch}.png") as file:
                    write_file(file, lambda out: grid_image(grid, num_classes).save(out, "PNG"))
            losses_said = f"loss {row['train_loss']:.4f}  held-out {row['val_loss']:.4f}"
            say(f"epoch {epoch}/{args.epochs}  {losses_said}  {seconds / 60:.1f} min")
        if step == start + steps_per_epoch:  # else --max-steps cut it short; --resume completes it
            history.append(row)
            save()  # with the row, so that a resumed run does not look again

    if rank == 0:
        with not_vital(folder / "weights.pt") as file:
            save_checkpoint(file, weights)
        draw_denoising(folder, ema, scheduler, num_steps, **args.sampler)
        say(f"done: {step} steps, {seconds / 60:.1f} min of training; all files are in {folder}")
        say(f"draw more: {command_line('--sample-only', f'--checkpoint={path}')}")
    any_process(False, device)  # nobody leaves before all are done


@torch.no_grad()
def held_out_loss(
    model: UNet, scheduler: NoiseScheduler, images: Tensor, labels: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The loss of images that are never trained on, at the same t and noise every time.

    images are uint8 [N, C, H, W], labels int64 [N] or None. Returns t, int64 [N], evenly spaced,
    and the loss of each image, float32 [N].
    """
    generator = generator_for("held-out loss", seed, images.device)
    t = torch.arange(len(images), device=images.device) * scheduler.num_timesteps // len(images)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    losses = []
    for i in range(0, len(images), CHUNK):
        part = slice(i, i + CHUNK)
        x_0, y = to_model(images[part]), None if labels is None else labels[part]
        losses.append(training_loss(model, scheduler, x_0, y, t[part], noise[part]))
    return t, torch.cat(losses)


def generator_for(purpose: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator for every purpose: sampling cannot change what training draws next."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{purpose}, seed {seed}".encode()))


# --- Sampling -------------------------------------------------------------------------------------

SAMPLE_STEPS = 25  # timesteps that sampling visits, of T
GUIDANCE = 0.1  # strength of classifier-free guidance
NUM_SAMPLES = 100  # images in a grid, about, so that its rows are full


def sampling_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly spaced timesteps, decreasing from T - 1: 999, 959, ..., 39 for 25 steps of 1000."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps (--sample-steps) is {num_steps}, not 1 to {num_timesteps}")
    return [num_timesteps * (num_steps - i) // num_steps - 1 for i in range(num_steps)]


def guided_noise(
    model: UNet, x_t: Tensor, t: int, labels: Tensor | None, guidance: float
) -> Tensor:
    """The noise in x_t by classifier-free guidance (Ho, Salimans 2022, arXiv:2207.12598, eq. 6).

        noise_pred = (1 + w) eps_theta(x_t, t, label) - w eps_theta(x_t, t, no label)

    w is `guidance`; many libraries write s = 1 + w. One network knows both terms, since training
    drops some labels. The noise is the score times -sqrt(1 - alpha-bar_t), see `training_loss`, and
    by Bayes' rule grad log q(x_t | label) - grad log q(x_t) = grad log q(label | x_t). So guidance
    goes farther to where x_t fits its label better. Images get clearer, and more alike; each step
    costs twice as much.
    """
    if labels is None or guidance == 0:
        return model(x_t, t, labels)
    no_labels = torch.full_like(labels, model.no_label)
    both = model(torch.cat([x_t, x_t]), t, torch.cat([labels, no_labels]))  # [2B, C, H, W]
    labeled, unlabeled = both.chunk(2)
    return (1 + guidance) * labeled - guidance * unlabeled


@torch.no_grad()
def denoise(
    model: UNet,
    scheduler: NoiseScheduler,
    x_T: Tensor,
    labels: Tensor | None = None,
    num_steps: int = SAMPLE_STEPS,
    eta: float = 1.0,
    guidance: float = GUIDANCE,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The reverse process, from pure noise to images, a step at a time.

    With all T steps, eta = 1 and no guidance this is DDPM's Algorithm 2 (with x_0_pred clamped, see
    `NoiseScheduler.step`). Fewer steps are longer jumps by DDIM's formula. Every jump leaves x_t
    with about the noise that the network knows from training, so it may be asked at any of its T
    timesteps. What a long jump loses (see `posterior`) is little at large t, where alpha-bar is
    near 0 and x_0 has little weight, and at small t, where hardly any other image fits. How few
    steps do in between was found by trial: 25 draw about as well as 50 or 100 here, 10 worse
    (benchmarks/RESULTS.md).

    Args:
        x_T: noise from N(0, I), [B, C, H, W].
        labels: what to draw, int64 [B], or None: no label for all.
        num_steps: timesteps to visit, 1 to T.
        eta: share of DDPM's fresh noise in each step, 0 to 1.
        guidance: w of `guided_noise`.
        generator: for the fresh noise.

    Yields:
        At each timestep (t, x_t, the x_0 predicted from it), and last (-1, x_0, x_0).
    """
    timesteps = sampling_timesteps(scheduler.num_timesteps, num_steps)
    x_t = x_T
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        noise_pred = guided_noise(model, x_t, t, labels, guidance)
        yield t, x_t, scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
        noise = torch.randn(x_t.shape, generator=generator, device=x_t.device)
        x_t = scheduler.step(x_t, t, noise_pred, t_prev, eta, noise)
    yield -1, x_t, x_t


def labels_in_turn(
    num_samples: int, num_classes: int | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """0, 1, 2, ... over and over, int64 [N]; None if there are no classes."""
    return torch.arange(num_samples, device=device) % num_classes if num_classes else None


def columns_for(num_classes: int | None) -> int:
    """Columns of a grid, about ten or more: each shows one class if labels are in turn."""
    classes = num_classes or 1
    return classes * max(1, 10 // classes)


def full_rows(about: int, num_classes: int | None) -> int:
    """How many images fill the rows of a grid: about as many as that."""
    columns = columns_for(num_classes)
    return columns * max(1, about // columns)


def sample(
    model: UNet,
    scheduler: NoiseScheduler,
    num_samples: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    num_steps: int = SAMPLE_STEPS,
    eta: float = 1.0,
    guidance: float = GUIDANCE,
    seed: int = 0,
) -> Tensor:
    """Draw images, uint8 [N, C, H, W]: with the same seed and options, the same on every call.

    Without labels, a model that has classes draws them in turn. (Its "no label" row is there for
    guidance, and draws badly.)

    Args:
        num_samples: how many; as many as labels if those are given, else about 100, in full rows.
        labels: what to draw, whole numbers from 0 to the model's num_classes - 1.
        num_steps, eta, guidance: see `denoise`.
    """
    device, classes = scheduler.betas.device, model.num_classes
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples (--num-samples) must be 1 or more, not {num_samples}")
    if labels is None:
        num_samples = num_samples or full_rows(NUM_SAMPLES, classes)
        labels = labels_in_turn(num_samples, classes, device)
    else:
        if classes is None:
            raise ValueError("labels (--labels): this model was trained without labels")
        labels = labels.numpy(force=True) if isinstance(labels, Tensor) else np.array(labels)
        labels = labels.reshape(-1)
        good = len(labels) and labels.dtype.kind in "iu"  # whole numbers, with a sign or without
        if not good or not np.isin(labels, np.arange(classes)).all():
            raise ValueError(f"labels (--labels) must be whole numbers from 0 to {classes - 1}")
        if num_samples not in (None, len(labels)):
            raise ValueError(
                f"num_samples (--num-samples) is {num_samples} for {len(labels)} labels"
            )
        num_samples = len(labels)
        labels = torch.from_numpy(labels.astype(np.int64)).to(device)
    generator = generator_for("sampling", seed, device)
    images = []
    for i in progress_bar(range(0, num_samples, CHUNK), "sampling"):
        size = min(CHUNK, num_samples - i)
        x_T = torch.randn(size, *model.image_shape, generator=generator, device=device)
        y = None if labels is None else labels[i : i + size]
        for _, x_t, _ in denoise(model, scheduler, x_T, y, num_steps, eta, guidance, generator):
            pass  # to the last, which is x_0
        images.append(to_uint8(x_t))
    return torch.cat(images)


# --- Files. (Nothing from here on is needed to understand diffusion.) -----------------------------

IDX_SETS = ("MNIST", "FashionMNIST", "KMNIST")  # published in MNIST's file format, called idx
MAX_LABEL = 9999  # every label up to the largest has a row in the network
CHECKPOINT_FORMAT = "diffusion 5"  # changes when earlier files no longer fit
# What a resumed run takes from its checkpoint. KEPT settings may not change (nor may the images: a
# changed --dataset is another path to them).
KEPT = "batch_size optimizer timesteps schedule base_channels label_dropout seed".split()
CHANGEABLE = "dataset data_dir epochs lr sample_every num_samples sample_steps eta guidance".split()


@contextlib.contextmanager
def explained(path: Path, problem: str, remedy: str, kind: type = OSError) -> Iterator[None]:
    """Whatever goes wrong in this block becomes one sentence that names file, cause and remedy."""
    try:
        yield
    except PermissionError as error:
        raise kind(f"{path} is not yours to use ({error.strerror}). {remedy}") from None
    except MemoryError as error:
        raise OSError(f"there is too little memory for {path} ({one_line(error)})") from None
    except Exception as error:  # libraries raise anything from KeyError to zlib.error
        raise kind(f"{path} {problem} ({one_line(error)}). {remedy}") from None


def load_images(dataset: str = "MNIST", data_dir: str | Path = HERE / "data") -> list[tuple]:
    """The training split and the held-out split: images, uint8 [N, C, H, W], and labels, int64 [N].

    Args:
        dataset: MNIST, FashionMNIST or KMNIST; or an .npz file with an array `images`, uint8
            [N, H, W] or [N, H, W, 3], and perhaps `labels` (else None), whole numbers from 0; or
            with the names of MedMNIST (train_images, test_images, ...) or Keras (x_train, ...).
        data_dir: where the published sets are. What is missing is downloaded.
    """
    if dataset not in IDX_SETS:
        return read_npz(Path(dataset).expanduser())
    published, folder = getattr(datasets, dataset), Path(data_dir).expanduser() / dataset / "raw"
    arrays = []
    for filename, md5 in published.resources:  # images and labels, then those of the held-out split
        path, unpacked = folder / filename, folder / Path(filename).stem
        if not path.exists() and not unpacked.exists():
            download(published.mirrors, path, md5)
        arrays.append(read_idx(path if path.exists() else unpacked))
    return matching(folder, [to_tensors(folder, *arrays[:2]), to_tensors(folder, *arrays[2:])])


def read_idx(path: Path) -> np.ndarray:
    """An idx file, packed or not: 0, 0, 8 (for uint8), how many axes, their sizes, the data."""
    remedy = "Put the published file in its place, or delete it and run again with a network"
    with explained(path, "is damaged", remedy):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = bytearray(file.read())
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin like an idx file")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def download(mirrors: list[str], path: Path, md5: str) -> None:
    """Fetch a file from the first of the published addresses that gives the right one."""
    remedy = "Put the published file there, or name another --data-dir"
    with explained(path, "is missing, and its folder cannot be written to", remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent)  # nobody shall meet half a file
    causes = []
    with folder:
        for address in (mirror + path.name for mirror in mirrors):
            try:
                datasets.utils.download_url(address, folder.name, path.name, md5)
                return os.replace(Path(folder.name) / path.name, path)
            except Exception as error:  # of many kinds, from URLError to RuntimeError
                causes.append(f"{address}: {one_line(error)}")
    raise OSError(
        f"{path} is missing, and no address gave it ({'; '.join(causes)}). Put the published file "
        "there, run again with a network, or name another --data-dir"
    )


def read_npz(path: Path) -> list[tuple[Tensor, Tensor | None]]:
    """Both splits of an .npz file; the last 5 % of the images are held out if there is but one."""
    if not path.is_file():
        raise FileNotFoundError(f"argument --dataset: there is no file {path}")
    with explained(path, "cannot be read", "Write it with numpy.savez, from plain arrays"):
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("images", "train_images", "x_train") if name in file][:1]
            names += [name for name in ("test_images", "x_test") if names and name in file][:1]
            labels = [name.replace("images", "labels").replace("x_", "y_") for name in names]
            arrays = [(file[x], file[y] if y in file else None) for x, y in zip(names, labels)]
    if not arrays:
        raise ValueError(f"{path}: there is no array called images (or train_images, x_train)")
    splits = [to_tensors(path, *pair) for pair in arrays]
    if len(splits) == 1:
        cut = len(splits[0][0]) * 19 // 20
        if not cut:
            raise ValueError(f"{path}: there must be at least two images, one of them to hold out")
        parts = (slice(None, cut), slice(cut, None))
        splits = [tuple(x if x is None else x[part] for x in splits[0]) for part in parts]
    return matching(path, splits)


def matching(path: Path, splits: list[tuple]) -> list[tuple]:
    """Both splits, if images to train on and held-out ones are of a kind."""
    (images, labels), (test_images, test_labels) = splits
    if images.shape[1:] != test_images.shape[1:] or (labels is None) != (test_labels is None):
        raise ValueError(f"{path}: one split has other shapes, or labels where the other has not")
    if labels is not None:
        if not torch.isin(test_labels, labels).all():
            raise ValueError(f"{path}: only held-out images have some label. Shuffle the images")
        if unused := set(range(int(labels.max()))) - set(labels.tolist()):
            without = f"no image has the label {min(unused)}, so drawing it will give nonsense"
            say(f"warning: {path}: {without}. Number labels from 0, without gaps", sys.stderr)
    return splits


def to_tensors(path: Path, images: np.ndarray, labels: np.ndarray | None) -> tuple:
    """Images, checked, as a view uint8 [N, C, H, W] of the same memory; labels as int64 [N]."""
    found = f"not {images.dtype} {list(images.shape)}"
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{path}: images must be uint8 [N, H, W] or [N, H, W, 1 or 3], {found}")
    if not images.size or images.shape[1] % 4 or images.shape[2] % 4:
        problem = "there must be images, and 4 must divide their height and width"
        raise ValueError(f"{path}: {problem}, {found}. Pad or resize them")
    if labels is not None:
        labels = labels.reshape(-1) if labels.shape[1:] == (1,) else labels
        good = labels.dtype.kind in "iuf" and labels.shape == (len(images),)
        if not good or not np.isin(labels, np.arange(MAX_LABEL + 1)).all():
            raise ValueError(
                f"{path}: labels must be whole numbers from 0 to {MAX_LABEL}, one for each image"
            )
        labels = torch.from_numpy(labels.astype(np.int64))
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def to_arrays(images: Tensor) -> np.ndarray:
    """The way back, as files hold images: uint8 [N, C, H, W] -> [N, H, W] or [N, H, W, 3]."""
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    return array[..., 0] if array.shape[3] == 1 else array


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all (atomically): beside it, out to the disk, into its place."""
    # Of this process alone; and cut short, since the name may be as long as names can be.
    temporary = path.with_name(f"{path.name[:50]}.{os.getpid()}.tmp")
    remedy = "Make room or name another folder; what was there is untouched"
    with explained(path, "cannot be written", remedy):
        content = io.BytesIO()
        write(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            for _ in range(10 if os.name == "nt" else 0):  # a virus scanner may hold the file
                with contextlib.suppress(PermissionError):
                    return os.replace(temporary, path)
                time.sleep(0.1)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def not_vital(path: Path) -> Iterator[Path]:
    """Pictures and logs never end a run: if one cannot be made or written, one line says so."""
    try:
        yield path
    except Exception as error:
        say(f"warning: no {path.name}: {one_line(error)}", sys.stderr)


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    """A table with commas, as spreadsheets read it."""
    with not_vital(path):
        names = list(rows[-1])
        lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
        write_file(path, lambda file: file.write("".join(x + "\n" for x in lines).encode()))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a dict of tensors and plain values."""
    write_file(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict:
    """Read what `save_checkpoint` wrote. A file from a stranger cannot run code."""
    remedy = "Train first, or name another by --checkpoint or, to resume, --output-dir"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}. {remedy}")
    with explained(path, "is damaged or no checkpoint", remedy):
        with zipfile.ZipFile(path) as file:  # as which a checkpoint is written, with check sums
            if file.testzip():
                raise ValueError("a check sum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError("it is of another version of this program")
    return state


def load_model(
    path: str | Path = HERE / "pretrained.pt", device: torch.device | str = "cpu"
) -> tuple[UNet, NoiseScheduler]:
    """The averaged network in a checkpoint (by default the repository's own), and its schedule."""
    path = Path(path).expanduser()
    state = load_checkpoint(path)
    with explained(path, "holds another network than this program's", "Name another one"):
        scheduler = NoiseScheduler(**state["scheduler"])
        model = UNet(scheduler, **state["unet"])
        model.load_state_dict(state["ema"])
    return model.to(device, memory_format=memory_format(device)).eval(), scheduler.to(device)


def keep_earlier_checkpoint(path: Path) -> None:
    """Move an earlier run's checkpoint to the first free numbered name: none is overwritten."""
    if path.exists():
        names = (path.with_name(f"{path.stem}_{i}{path.suffix}") for i in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        path.rename(kept)
        say(f"{path} is from an earlier run: kept as {kept.name}")


# --- Processes, devices, signals, messages --------------------------------------------------------


def torchrun_variables() -> tuple[int, int, int]:
    """The number of this process, that on this machine, and how many there are; 0, 0, 1 if alone.

    torchrun sets all of these variables. One that is left over from elsewhere means nothing.
    """
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID".split()
    values = [os.environ.get(name) for name in names]
    return tuple(map(int, values[:3])) if all(values) else (0, 0, 1)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, put in its place. All of them wait here for the last."""
    if torchrun_variables()[2] > 1:
        # Kept until the next one: if a thread of gloo's were the last to hold it, that thread would
        # need Python to free it, for which it may wait for ever at the end of the program.
        sum_over_processes.kept = tensor
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:  # mostly: the connection is closed
            cause = one_line(error).partition(". ")[0]
            raise OSError(f"another process cannot be reached; see its words ({cause})") from None
    return tensor


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message for all of them."""
    num_processes = torchrun_variables()[2]
    if num_processes > 1:
        means = sum_over_processes(torch.cat([x.flatten() for x in tensors])) / num_processes
        for tensor, mean in zip(tensors, means.split([x.numel() for x in tensors])):
            tensor.copy_(mean.view(tensor.shape))


def any_process(flag: object, device: torch.device) -> bool:
    """Whether `flag` is true in any process."""
    if torchrun_variables()[2] == 1:  # and no GPU has to wait
        return bool(flag)
    return bool(sum_over_processes(torch.tensor(float(bool(flag)), device=device)))


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name, tried out. "auto" is an NVIDIA GPU, else Apple's, else the CPU."""
    _, local_rank, num_processes = torchrun_variables()
    mps = torch.backends.mps.is_available() and num_processes == 1
    auto = ["cuda"] * torch.cuda.is_available() + ["mps"] * mps + ["cpu"]
    for candidate in auto if name == "auto" else [name]:
        try:
            device = torch.device(f"cuda:{local_rank}" if candidate == "cuda" else candidate)
            if candidate not in ("cuda", "cpu") and num_processes > 1:
                raise ValueError("it serves one process alone")
            x = torch.ones(1, 1, 3, 3, device=device)
            F.conv2d(x, x).item()  # a GPU may be too old for this PyTorch, taken, or broken
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return device
        except Exception as error:  # of many kinds
            problem = f"argument --device: {candidate} cannot be used ({one_line(error)})"
            if candidate in (name, "cpu") or num_processes > 1:  # each process needs its own
                raise ValueError(f"{problem}. Try --device cpu") from None
            say(f"{problem}; trying the next", sys.stderr)


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Channels last is faster on CPUs and NVIDIA's GPUs; on Apple's it has had bugs."""
    return torch.preserve_format if "mps" in str(device) else torch.channels_last


@contextlib.contextmanager
def heard_signals() -> Iterator[SimpleNamespace]:
    """SIGINT (Ctrl-C), SIGTERM and the like in this block; yields what `train` needs of them.

    While `deferred`, a signal is only noted in `received`, so that the loop can end its step and
    save. A second one, or one at another time, raises KeyboardInterrupt. Several processes go on
    deferring, since they have to leave together and torchrun repeats the signal.
    """
    signals = SimpleNamespace(received=[], deferred=False)
    # Windows has no hangup, but a Ctrl-Break.
    hangup, ctrl_break = (getattr(signal, name, None) for name in ("SIGHUP", "SIGBREAK"))

    def handle(signum: int, frame: object) -> None:
        signals.received.append(signum)
        again = len(signals.received) > 1 and torchrun_variables()[2] == 1
        if not signals.deferred or (again and signum != hangup):  # a terminal sends it twice
            raise KeyboardInterrupt(signum)

    heard = [signal.SIGINT, signal.SIGTERM, ctrl_break]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # as nohup does
        heard.append(hangup)
    in_main = threading.current_thread() is threading.main_thread()  # else no handler may be set
    before = {signum: signal.signal(signum, handle) for signum in heard if signum and in_main}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: it was not set by Python


def stop_if_not_finite(losses: Tensor, first_step: int, path: Path) -> None:
    """End the run at a loss that is infinite or no number: nothing is learned after that."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad:
        problem = f"the loss is not finite at step {first_step + bad[0] + 1}. Try a lower --lr"
        raise ArithmeticError(f"{problem}. {path} holds the last good state")


def say(message: str, stream: TextIO | None = None) -> None:
    """Print a line at once. A full disk, a closed pipe or a missing letter never ends a run."""
    if stream is None and torchrun_variables()[0] > 0:
        return  # the first process speaks for all, except of errors
    stream = stream or sys.stdout
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        message = message.encode(encoding, "backslashreplace").decode(encoding)
        print(message, file=stream, flush=True)
    except Exception:  # of many kinds: a notebook or a logger may have put anything in its place
        # Else what is left in the stream would fail again at exit.
        with contextlib.suppress(Exception), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def one_line(error: Exception) -> str:
    """What an exception says, in one line that is not too long."""
    text = getattr(error, "strerror", None) or str(error)
    return textwrap.shorten(text, 300).rstrip(".:") or type(error).__name__


def progress_bar(items: Sequence, title: str) -> tqdm:
    """The items, with a bar in the first process; with none where there is no terminal."""
    hidden = True if torchrun_variables()[0] > 0 or not sys.stderr else None
    return tqdm(items, desc=title, leave=False, disable=hidden)


def command_line(*options: object) -> str:
    """What to type to call this program again, as this system's shell reads it."""
    num_processes = torchrun_variables()[2]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
    script = sys.argv[0] if __name__ == "__main__" else __file__
    words = [sys.executable, *(launcher if num_processes > 1 else []), script, *map(str, options)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


# --- Pictures -------------------------------------------------------------------------------------


@contextlib.contextmanager
def figure_at(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, with matplotlib's own settings; a PNG in the end."""
    with not_vital(path), matplotlib.style.context("default"):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))


def draw_images(
    path: Path, images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Draw uint8 images [rows, columns, C, H, W] with a label for every row and column."""
    height, width = images.shape[-2:]
    grid = make_grid(images.flatten(0, 1), nrow=len(columns), padding=2)
    with figure_at(path, 1.5 + 0.85 * len(columns), 1.2 + 0.85 * len(rows)) as figure:
        axes = figure.subplots()
        axes.imshow(grid.permute(1, 2, 0).cpu().numpy())
        axes.set_xticks([2 + width / 2 + i * (width + 2) for i in range(len(columns))], columns)
        axes.set_yticks([2 + height / 2 + i * (height + 2) for i in range(len(rows))], rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)


def grid_image(images: Tensor, num_classes: int | None) -> Image.Image:
    """uint8 images [N, C, H, W] as one picture, each column of one class."""
    grid = make_grid(images.cpu(), nrow=columns_for(num_classes), padding=2)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def draw_loss_curve(path: Path, rows: list[dict[str, float]], t: Tensor, losses: Tensor) -> None:
    """Loss by epoch, from the log, and by timestep: a dot for each held-out image's t and loss."""
    with figure_at(path, 11, 4) as figure:
        by_epoch, by_timestep = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in rows]
        for key, label in (("train_loss", "training"), ("val_loss", "held-out, averaged weights")):
            by_epoch.plot(epochs, [row[key] for row in rows], marker="o", label=label)
        by_epoch.set(xlabel="epoch", title="Loss")
        by_epoch.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        by_epoch.legend()
        by_timestep.scatter(t.cpu(), losses.cpu(), s=4)
        by_timestep.set(xlabel="timestep t", title=f"Held-out loss by t, after epoch {epochs[-1]}")
        for axes in (by_epoch, by_timestep):
            axes.set(ylabel="mean squared error of the predicted noise", yscale="log")


def draw_noise_schedule(path: Path, num_timesteps: int) -> None:
    """alpha-bar, beta and the signal-to-noise ratio over t, for both schedules."""
    with figure_at(path, 13, 3.6) as figure:
        panels = figure.subplots(1, 3)
        for schedule in ("cosine", "linear"):
            scheduler = NoiseScheduler(num_timesteps, schedule)
            alpha_bar = scheduler.alphas_cumprod
            curves = (alpha_bar, scheduler.betas, (alpha_bar / (1 - alpha_bar)).log10())
            for axes, curve in zip(panels, curves):
                axes.plot(curve.numpy(), label=schedule)
                axes.set_xlabel("timestep t")
        panels[0].set(title="signal left: alpha-bar", ylabel="weight of x_0 in x_t, squared")
        panels[1].set(title="noise per step: beta", ylabel="variance added", yscale="log")
        panels[2].set(title="signal-to-noise ratio", ylabel="log10(alpha-bar / (1 - alpha-bar))")
        panels[0].legend()


def draw_forward_process(path: Path, scheduler: NoiseScheduler, images: Tensor, seed: int) -> None:
    """uint8 images [N, C, H, W] on their way to pure noise: q(x_t | x_0) at ten timesteps."""
    x_0, device = to_model(images), images.device
    generator = generator_for("forward process", seed, device)
    noise = torch.randn(x_0.shape, generator=generator, device=device)
    timesteps = torch.linspace(0, scheduler.num_timesteps - 1, 10).long().tolist()
    columns = [images, *(to_uint8(scheduler.add_noise(x_0, t, noise)[0]) for t in timesteps)]
    snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod))[timesteps].tolist()
    labels = ["x_0", *(f"t = {t}\nSNR {ratio:.2g}" for t, ratio in zip(timesteps, snr))]
    title = "Forward process: x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise"
    draw_images(path, torch.stack(columns, dim=1), [""] * len(images), labels, title)


def draw_denoising(
    folder: Path,
    model: UNet,
    scheduler: NoiseScheduler,
    num_steps: int,
    eta: float,
    guidance: float,
    seed: int,
) -> None:
    """The reverse process: denoising.png, x_t and the x_0 predicted from it, and denoising.gif."""
    device = scheduler.betas.device
    generator = generator_for("denoising pictures", seed, device)
    num_images = min(full_rows(40, model.num_classes), CHUNK)
    x_T = torch.randn(num_images, *model.image_shape, generator=generator, device=device)
    labels = labels_in_turn(num_images, model.num_classes, device)
    steps = denoise(model, scheduler, x_T, labels, num_steps, eta, guidance, generator)
    way = [(t, to_uint8(x_t).cpu(), to_uint8(x_0_pred).cpu()) for t, x_t, x_0_pred in steps]
    shown = [way[round(i * (len(way) - 1) / 10)] for i in range(11)]
    pairs = [torch.stack([x_t[:4], x_0_pred[:4]], 1).flatten(0, 1) for _, x_t, x_0_pred in shown]
    columns = [f"t = {t}" if t >= 0 else "result" for t, _, _ in shown]
    rows, title = ["x_t", "predicted x_0"] * 4, f"Reverse process, in {len(way) - 1} steps"
    draw_images(folder / "denoising.png", torch.stack(pairs, dim=1), rows, columns, title)
    with not_vital(folder / "denoising.gif"):
        frames = []
        for _, x_t, _ in way[:: -math.ceil(len(way) / 50)]:  # at most 50, the result among them
            frame = grid_image(x_t // 16 * 17, model.num_classes)  # 16 grays, for a smaller file
            frames.insert(0, ImageOps.scale(frame, 2, Image.Resampling.NEAREST))
        times = [80] * (len(frames) - 1) + [2500]  # milliseconds
        gif = {"save_all": True, "append_images": frames[1:], "duration": times, "loop": 0}
        write_file(folder / "denoising.gif", lambda file: frames[0].save(file, "GIF", **gif))


# --- The command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but an error is an exception and no exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help explains every option)")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An option's type: a number from low to high, a whole one if kind is int."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"must be a {noun} from {low:g} to {high:g}, not {text}")

    return parse


def home_path(text: str) -> Path:
    """An option's type: a path, in which ~ stands for the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"there is no home folder for {text}") from None


def absolute_path(text: str) -> str:
    """An option's type: a path that stays right in another folder."""
    return os.path.abspath(home_path(text))


def source(text: str) -> str:
    """An option's type: a published set, or the path of a file."""
    return text if text in IDX_SETS else absolute_path(text)


def make_parser() -> Parser:
    commands, _, _ = (__doc__ or "").partition("or, from Python")  # python -OO drops it
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=commands, formatter_class=formatter, allow_abbrev=False)
    count = number(int, 1, 10**6)

    add = parser.add_argument_group("training").add_argument
    sets = f"{', '.join(IDX_SETS)}, or an .npz file (%(default)s)"
    add("--dataset", type=source, default="MNIST", help=sets)
    add("--epochs", type=count, default=10, help="passes over the images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images a step, in all (%(default)s)")
    add("--optimizer", choices=list(LEARNING_RATES), default="muon", help="(%(default)s)")
    add("--lr", type=number(float, 1e-9, 1e9), help=f"highest learning rate ({LEARNING_RATES})")
    add("--timesteps", type=number(int, 2, 10**5), default=1000, help="T (%(default)s)")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="(%(default)s)")
    width = f"width, a multiple of {NORM_GROUPS} (%(default)s)"
    add("--base-channels", type=count, default=32, help=width)
    dropout = "share of labels to drop, for guidance; 1: all, for a plain model (%(default)s)"
    add("--label-dropout", type=number(float, 1e-3, 1), default=0.1, help=dropout)
    add("--max-steps", type=count, metavar="N", help="end early, after N steps in all")
    add("--resume", action="store_true", help="go on with OUTPUT_DIR/checkpoint.pt as it was")

    add = parser.add_argument_group("sampling").add_argument
    add("--sample-every", type=count, default=5, help="epochs between grids (%(default)s)")
    add("--num-samples", type=count, help=f"images to draw (about {NUM_SAMPLES}: full rows)")
    steps = "steps to an image, at most T (%(default)s)"
    add("--sample-steps", type=count, default=SAMPLE_STEPS, help=steps)
    add("--eta", type=number(float, 0, 1), default=1.0, help="0: DDIM, 1: DDPM (%(default)s)")
    guidance = "strength of classifier-free guidance, 0: off (%(default)s)"
    add("--guidance", type=number(float, 0, 1e3), default=GUIDANCE, help=guidance)
    add("--sample-only", action="store_true", help="no training: draw with a trained network")
    labels = "what to draw, with --sample-only (every class in turn)"
    add("--labels", type=number(int, 0, MAX_LABEL), nargs="+", help=labels)
    checkpoint = "with --sample-only (OUTPUT_DIR/checkpoint.pt, else pretrained.pt)"
    add("--checkpoint", type=home_path, help=checkpoint)
    output = "with --sample-only: .png, .npy or .npz (OUTPUT_DIR/samples.png)"
    add("--output", type=home_path, help=output)

    add = parser.add_argument_group("where and how").add_argument
    add("--data-dir", type=absolute_path, help="of the published sets (data, beside this file)")
    add("--output-dir", type=home_path, default=Path(), help="for what a run writes (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    return parser


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other. A resumed run has its checkpoint's for defaults."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume and args.sample_only:
        parser.error("--sample-only and --resume exclude each other")
    if args.resume:
        path = args.output_dir / "checkpoint.pt"
        saved = load_checkpoint(path)
        if "settings" not in saved:
            raise ValueError(f"--resume: {path} holds weights to draw with, not a run")
        settings = saved["settings"]
        parser.set_defaults(saved=saved, **settings)
        args = parser.parse_args(argv)  # what was typed wins, where it may
        for name, old in settings.items():
            new, option = getattr(args, name), f"--{name.replace('_', '-')}"
            if name in KEPT and new != old:
                parser.error(f"argument {option}: the run in {path} has {old}, not {new}")
            if name == "epochs" and new < old:
                parser.error(f"argument --epochs: the run in {path} has {old}; {new} are fewer")
            if new != old:
                say(f"resuming with {option} {new} (was {old})")

    args.lr = args.lr or LEARNING_RATES[args.optimizer]
    args.sampler = {"eta": args.eta, "guidance": args.guidance, "seed": args.seed}
    num_processes = torchrun_variables()[2]
    if args.dataset not in IDX_SETS and not args.dataset.endswith(".npz"):
        parser.error(f"argument --dataset: must be {', '.join(IDX_SETS)} or an .npz file")
    if args.base_channels % NORM_GROUPS:
        parser.error(f"argument --base-channels: must be a multiple of {NORM_GROUPS}")
    if args.batch_size % num_processes:
        parser.error(f"argument --batch-size: must divide among {num_processes} processes")
    if not args.sample_only and (args.labels or args.checkpoint or args.output):
        parser.error("--labels, --checkpoint and --output need --sample-only")
    args.output = args.output or args.output_dir / "samples.png"
    directory = args.sample_only and args.output.is_dir()
    if args.output.suffix.lower() not in (".png", ".npy", ".npz") or directory:
        parser.error(f"argument --output: must be a .png, .npy or .npz file, not {args.output}")
    return args


def sample_only(args: argparse.Namespace, device: torch.device) -> None:
    """Load a checkpoint, draw, and write --output."""
    own = args.output_dir / "checkpoint.pt"
    path = args.checkpoint or (own if own.exists() else HERE / "pretrained.pt")
    model, scheduler = load_model(path, device)
    started = time.monotonic()
    num_steps = min(args.sample_steps, scheduler.num_timesteps)
    images = sample(model, scheduler, args.num_samples, args.labels, num_steps, **args.sampler)
    seconds = time.monotonic() - started
    arrays = {"images": to_arrays(images)}
    if model.num_classes:
        in_turn = labels_in_turn(len(images), model.num_classes).tolist()
        arrays["labels"] = np.array(args.labels or in_turn)
    writers = {
        ".png": lambda file: grid_image(images, model.num_classes).save(file, "PNG"),
        ".npy": lambda file: np.save(file, arrays["images"]),
        ".npz": lambda file: np.savez_compressed(file, **arrays),
    }
    write_file(args.output, writers[args.output.suffix.lower()])
    say(f"drew {len(images)} images with {path} in {seconds:.1f} s: {args.output}")


def main(argv: Sequence[str] | None = None) -> None:
    """The program, with these options or those of the command line.

    Raises ValueError or FileNotFoundError for what was asked, OSError or ArithmeticError for what
    broke, each with a sentence for the user; KeyboardInterrupt(signal number) when interrupted.
    """
    args = parse_options(argv)
    device = choose_device(args.device)
    rank, _, num_processes = torchrun_variables()
    folder = args.output.parent if args.sample_only else args.output_dir
    remedy = "Choose another --output-dir or --output"
    with explained(folder, "cannot be written to", remedy, ValueError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    together = num_processes > 1 and not args.sample_only
    if together:  # the first alone draws pictures, for which the others may have to wait long
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    with heard_signals() as signals:
        signals.resumable = args.resume  # a new run is, once it has saved
        try:
            if not args.sample_only:
                train(args, device, signals)
            elif rank == 0:
                sample_only(args, device)
        except (RuntimeError, MemoryError) as error:
            text = one_line(error)
            known = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")
            if isinstance(error, RuntimeError) and not any(words in text for words in known):
                raise
            remedy = "Try --device cpu, or close other programs"
            if not args.resume and not args.sample_only:  # which keep to their sizes
                remedy = "Try a lower --batch-size or --base-channels, or smaller images"
            raise OSError(f"there is too little memory ({text}). {remedy}") from None
        except KeyboardInterrupt:
            options = ["--resume", f"--output-dir={folder}", f"--device={args.device}"]
            options += [f"--max-steps={args.max_steps}"] if args.max_steps else []
            how = f"; go on with: {command_line(*options)}" if signals.resumable else ""
            if rank == 0:
                say(f"interrupted{how}", sys.stderr)
            raise
        finally:  # but after an error the others may still wait, and closing would wait for them
            if together and not isinstance(sys.exception(), Exception):
                dist.destroy_process_group()


# --- The optimizer. (It is no part of diffusion: Algorithm 1 says "take gradient descent step on".)


def make_optimizers(model: UNet, name: str) -> list[torch.optim.Optimizer]:
    """Adam for all weights, or Muon for the convolutions' and Adam for the rest."""
    kernels = [weight for weight in model.parameters() if weight.ndim == 4 and name == "muon"]
    others = [weight for weight in model.parameters() if weight.ndim < 4 or name == "adam"]
    return [torch.optim.Adam(others), *([Muon(kernels)] if kernels else [])]


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T for a matrix U S V^T (its singular value decomposition).

    Divided by its norm, a matrix X has singular values from 0 to 1. The odd polynomial a X +
    b (X X^T) X + c (X X^T)^2 X turns each of them, s, into a s + b s^3 + c s^5. Five rounds bring
    all but the smallest to 0.7 ... 1.2 (Newton-Schulz; coefficients from Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # X X^T is then the smaller of the two products
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalized (Jordan et al. 2024), for convolutions.

    A weight [out, in, k, k] is taken as the matrix [out, in * k * k]. Its step goes about equally
    far in all directions of the matrix, and not mostly along the few that dominate the gradient. It
    is about as large as Adam's, 0.2 by root mean square, so that one learning rate serves both (Liu
    et al. 2025, arXiv:2502.16982, eq. 4). torch.optim.Muon takes matrices alone and calculates in
    bfloat16, which most CPUs have to emulate.
    """

    def __init__(self, params: list[Tensor], lr: float = 0.005, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                matrix = ahead.flatten(1)  # [out, in, k, k] -> [out, in * k * k]
                size = 0.2 * math.sqrt(max(matrix.shape))
                weight.sub_(orthogonalize(matrix).view_as(weight), alpha=group["lr"] * size)


if __name__ == "__main__":
    socket.setdefaulttimeout(60)  # seconds; else a download waits for a silent server for ever
    try:
        main()
    except KeyboardInterrupt as interrupt:
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    except (ValueError, OSError, ArithmeticError) as error:
        say(f"train_diffusion.py: error: {error}", sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, FileNotFoundError)) else 1)
