"""Train a denoising diffusion model on MNIST and draw digits with it.

    python train_diffusion.py                    # the whole job: train, sample, save
    python train_diffusion.py --resume           # go on after an interruption; other options as before
    python train_diffusion.py --sample-only      # draw with a trained checkpoint
    torchrun --nproc-per-node=2 train_diffusion.py

The mathematics and the network are in forward_reverse_process.py; read that first. This file is the program around them, in
the order in which a batch passes through it: images, one training step (DDPM's Algorithm 1), the training loop, several
processes, sampling (Algorithm 2, DDIM's way to take fewer steps, and guidance), then the optimiser, files, pictures, options.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import math
import os
import shlex
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from forward_reverse_process import BASE_CHANNELS_FACTOR, NoiseScheduler, UNet

HERE = Path(__file__).resolve().parent
WARMUP_STEPS = 200  # optimiser steps in which the learning rate rises
ADAM_BETAS = (0.9, 0.99)
EMA_DECAY = 0.999  # of the moving average (EMA) of the weights, which looks back over about 1 / (1 - decay) steps
MAX_GRAD_NORM = 1.0
CHECK_EVERY = 20  # optimiser steps between two looks at the loss, for which a GPU must wait
NUM_VALIDATION_IMAGES = 2000
IMAGE_SIZE = 28  # pixels, in all three data sets
SAMPLE_CHUNK = 250  # images that are sampled together
GUIDANCE_FROM = 0.15  # sampling is guided where alpha-bar is at least this: at t = 743 and below by default

# torchrun tells every process how many there are, which one it is, and which one on its machine; without it there is one.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))


def fail(message: str, code: int) -> NoReturn:
    """End the program with one line on standard error; code 2 is a wrong option, 1 a broken file or run."""
    print(f"train_diffusion.py: error: {message}", file=sys.stderr)
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------------------------------


def load_images(dataset: str, data_dir: Path, train: bool) -> Tensor:
    """All images of one split in one tensor, uint8 [N, 28, 28]; a batch is then an index into it.

    torchvision checks the .gz files, unpacks them, and downloads what is missing.
    """
    try:
        return getattr(datasets, dataset)(data_dir, train=train, download=True).data
    except Exception as error:  # torchvision raises anything from AssertionError to zlib.error
        raw = data_dir / dataset / "raw"
        reason = str(error).strip().split("\n")[0].rstrip(":") or type(error).__name__
        fail(
            f"cannot read {dataset}: {broken_file(dataset, raw)} in {raw.resolve()} is missing or damaged ({reason}). "
            "Delete it if it is there, then put the published file in its place or run again with a network.",
            code=1,
        )


def broken_file(dataset: str, raw: Path) -> str:
    """The name of the first file in `raw` that torchvision cannot use."""
    for filename, md5 in getattr(datasets, dataset).resources:
        unpacked = raw / Path(filename).stem
        if unpacked.exists():
            try:
                datasets.mnist.read_sn3_pascalvincent_tensor(str(unpacked))
            except Exception:
                return unpacked.name
        elif not datasets.utils.check_integrity(raw / filename, md5):
            return filename
    return "a file"


def to_model(images: Tensor) -> Tensor:
    """uint8 [B, 28, 28] -> float32 [B, 1, 28, 28] in [-1, 1], where the model works."""
    return images.unsqueeze(1).float() / 127.5 - 1


def to_uint8(x_0: Tensor) -> Tensor:
    """[B, 1, 28, 28] in [-1, 1] -> uint8 [B, 28, 28], as images are kept outside the model."""
    return ((x_0.squeeze(1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------------------
# Training (DDPM, Algorithm 1)
# ------------------------------------------------------------------------------------------------------------------------


def generator_for(purpose: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own for every purpose, fixed by purpose and seed.

    So sampling cannot change what training draws next, and a resumed run needs to know nothing but its step.
    """
    digest = hashlib.sha256(f"{purpose}, seed {seed}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


def draw_timesteps(batch_size: int, num_timesteps: int, generator: torch.Generator) -> Tensor:
    """One timestep per image, int64 [B], from 0 ... T - 1; t = 800 is drawn twice as often as t = 400.

    DDPM draws them evenly. But it is at large t, out of much noise, that it is decided which digit there will be; what the
    network has to do at small t is easy, and it learns it from fewer examples. (The weight in `train_step` says how much an
    error at t counts; this, how often the network practises there.)

    Before the square root, image i draws from the i-th of B equal slices of [0, 1): no batch happens to be all early or all
    late, and the loss is steadier.
    """
    device = generator.device
    slices = torch.arange(batch_size, device=device) + torch.rand(batch_size, generator=generator, device=device)
    return ((slices / batch_size).sqrt() * num_timesteps).long().clamp(max=num_timesteps - 1)  # rounding may reach T


def lr_factor(step: int, total_steps: int) -> float:
    """Share of --lr at this step: up over the first steps, then on a straight line down to 0 after the last."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1 - step / total_steps)


def update_ema(ema_params: list[Tensor], params: list[Tensor], step: int) -> None:
    """Move the averaged weights towards the current ones, fast at first: the random start is soon forgotten."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    get_ema_multi_avg_fn(decay)(ema_params, params, step)


class Run:
    """Everything that training changes: what a checkpoint holds and --resume restores.

    Args:
        args: the options, as `parse_options` gives them.
        num_images: how many training images there are; the rest of the last batch of an epoch is left out.
        device: where to train.
        state: the content of a checkpoint to go on from.
    """

    def __init__(self, args: argparse.Namespace, num_images: int, device: torch.device, state: dict | None) -> None:
        self.args = args
        self.path = args.output_dir / "checkpoint.pt"
        self.saved_at = time.monotonic()
        self.steps_per_epoch = num_images // args.batch_size
        self.total_steps = args.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, args.max_steps or self.total_steps)
        self.scheduler = NoiseScheduler(args.timesteps, args.schedule).to(device)

        torch.manual_seed(args.seed)  # for the initial weights; every later draw has a generator of its own
        self.model = UNet(self.scheduler, base_channels=args.base_channels).to(device, memory_format=torch.channels_last)
        # Samples are drawn with an average of the weights over many steps, which is smoother than the latest ones.
        self.ema = AveragedModel(self.model, multi_avg_fn=lambda ema, now, _: update_ema(ema, now, self.step)).eval()
        # Muon (below) for the convolutions, which are most of the weights; AdamW for biases, norms and linear layers.
        kernels = [weight for weight in self.model.parameters() if weight.ndim == 4]
        others = [weight for weight in self.model.parameters() if weight.ndim < 4]
        self.optimizers = [Muon(kernels, lr=args.lr), torch.optim.AdamW(others, lr=args.lr, betas=ADAM_BETAS, fused=True)]
        self.step = 0  # optimiser steps done
        self.seconds = 0.0  # spent training, earlier sessions included
        self.step_losses = torch.zeros(self.steps_per_epoch, device=device)  # of the current epoch
        self.history: list[dict[str, float]] = []  # a row for every finished epoch, as in train_log.csv
        self.strips: list[tuple[int, Tensor]] = []  # epoch and first digits of every sample grid, uint8 [8, 28, 28]
        if state:
            self.load_state_dict(state)
        self.lr_schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: lr_factor(step, self.total_steps), last_epoch=self.step - 1
            )
            for optimizer in self.optimizers
        ]
        self.network = DistributedDataParallel(self.model, broadcast_buffers=False) if WORLD_SIZE > 1 else self.model

    def state_dict(self) -> dict:
        """Tensors and plain Python values only, so that it loads with `weights_only=True`."""
        return {
            "format": CHECKPOINT_FORMAT,
            "settings": {name: getattr(self.args, name) for name in SETTINGS},
            "ema": self.ema.module.state_dict(),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "step_losses": self.step_losses,
            "history": self.history,
            "strips": self.strips,
        }

    def load_state_dict(self, state: dict) -> None:
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["step"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history, self.strips = state["history"], state["strips"]
        self.step_losses.copy_(state["step_losses"])

    def save(self) -> None:
        """Write checkpoint.pt, unless the run has gone wrong: the last good one stays."""
        self.check_losses()
        if RANK == 0:
            save_checkpoint(self.path, self.state_dict())
        self.saved_at = time.monotonic()

    def check_losses(self) -> None:
        """End the program if a loss of this epoch is infinite or not a number; nothing can be learnt after that."""
        bad = (~torch.isfinite(self.step_losses)).nonzero()
        if len(bad):
            step = (self.step - 1) // self.steps_per_epoch * self.steps_per_epoch + int(bad[0])
            lr = self.args.lr * lr_factor(step, self.total_steps)
            fail(
                f"the loss is not finite at step {step + 1} (learning rate {lr:.2g}). Try a lower --lr. "
                f"{self.path} was not touched: it holds the last good state, if there is one.",
                code=1,
            )


def train_step(run: Run, images: Tensor) -> Tensor:
    """One step of training on uint8 images [B, 28, 28]; returns the mean squared error, a scalar.

    This is DDPM's Algorithm 1 but for two things that favour large t: `draw_timesteps` and a weight. DDPM (eq. 14)
    minimises the squared error of the noise as it is. The UNet multiplies what its layers put out, v, by sqrt(alpha-bar_t),
    so dividing that error by alpha-bar_t leaves the error of v, which counts the same at every t; else large t would hardly
    count. (Salimans, Ho 2022, section 4: as a weight on the error of x_0 this is SNR + 1, with the signal-to-noise ratio
    SNR = alpha-bar / (1 - alpha-bar).) The error that is returned and logged has no weight.

    With several processes, each draws the timesteps and the noise of the whole batch and works on its share of them.
    """
    share = slice(RANK, None, WORLD_SIZE)
    device = images.device

    # Noise: a timestep for every image, and the image as it looks there.
    generator = generator_for(f"training step {run.step}", run.args.seed, device)
    t = draw_timesteps(len(images), run.args.timesteps, generator)[share]
    noise = torch.randn(len(images), 1, *images.shape[1:], generator=generator, device=device)[share]
    x_t, noise = run.scheduler.add_noise(to_model(images[share]), t, noise)

    # Predict: which noise was it?
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        noise_pred = run.network(x_t, t)
    squared_error = (noise_pred - noise).square().mean(dim=(1, 2, 3))  # [B, 1, 28, 28] -> [B]
    weighted_loss = (squared_error / run.scheduler.alphas_cumprod[t].clamp(min=1e-9)).mean()  # less would magnify rounding

    # Learn.
    run.model.zero_grad()
    weighted_loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    for optimizer, lr_schedule in zip(run.optimizers, run.lr_schedules):
        optimizer.step()
        lr_schedule.step()

    # Average the weights.
    run.ema.update_parameters(run.model)
    return squared_error.detach().mean() + 0 * grad_norm  # not finite if the gradient, and so the weights, are not


def train_epoch(run: Run, images: Tensor, interrupts: list[int]) -> bool:
    """Train to the end of the current epoch, or to `run.last_step`; True if a signal in `interrupts` ended it earlier."""
    args = run.args
    epoch, first = divmod(run.step, run.steps_per_epoch)
    order = torch.randperm(len(images), generator=generator_for(f"order of epoch {epoch + 1}", args.seed))
    batches = order[: run.steps_per_epoch * args.batch_size].to(images.device).split(args.batch_size)
    started = time.monotonic()
    with bar(
        args,
        total=len(batches) * args.batch_size,
        initial=first * args.batch_size,
        unit="img",
        unit_scale=True,
        desc=f"epoch {epoch + 1}",
        leave=False,
    ) as epoch_bar:
        for batch in batches[first : first + run.last_step - run.step]:
            loss = over_processes(train_step(run, images[batch])) / WORLD_SIZE
            run.step_losses[run.step % run.steps_per_epoch] = loss
            run.step += 1
            epoch_bar.update(args.batch_size)
            now = time.monotonic()
            run.seconds, started = run.seconds + now - started, now

            if run.step % CHECK_EVERY == 0:
                run.check_losses()
                epoch_bar.set_postfix(loss=f"{mean_loss(run):.4f}")
            in_between = run.step % run.steps_per_epoch > 0 and run.step < run.last_step  # an end is saved with its samples
            if in_between and now - run.saved_at > args.save_every_minutes * 60:
                run.save()
            if any_process(bool(interrupts), images.device):
                return True
    return False


def mean_loss(run: Run) -> float:
    """Mean training loss of the current epoch so far; of the whole epoch at its end."""
    return run.step_losses[: (run.step - 1) % run.steps_per_epoch + 1].mean().item()


@torch.inference_mode()
def validate(run: Run, test_images: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the averaged weights on images never trained on, at timesteps drawn as in training, the same every time.

    Returns, for every image, its timestep, int64 [N], and its loss, float32 [N], on the CPU.
    """
    generator = generator_for("validation", run.args.seed, test_images.device)
    timesteps, losses = [], []
    for images in test_images.split(SAMPLE_CHUNK):
        t = draw_timesteps(len(images), run.args.timesteps, generator)
        noise = torch.randn(len(images), 1, *images.shape[1:], generator=generator, device=images.device)
        x_t, noise = run.scheduler.add_noise(to_model(images), t, noise)
        timesteps.append(t)
        losses.append((run.ema.module(x_t, t) - noise).square().mean(dim=(1, 2, 3)))  # [B, 1, 28, 28] -> [B]
    return torch.cat(timesteps).cpu(), torch.cat(losses).cpu()


def train(run: Run, images: Tensor, test_images: Tensor) -> None:
    """Train to the last step. Every epoch ends with a line in the log and a checkpoint, some with samples."""
    interrupts: list[int] = []

    def note(signum: int, frame: object) -> None:
        interrupts.append(signum)  # Ctrl-C or SIGTERM: the current step can still finish
        if WORLD_SIZE == 1:  # torchrun repeats the signal
            signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once

    handlers = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    run_bar = bar(
        run.args,
        total=run.total_steps // run.steps_per_epoch,
        initial=run.step // run.steps_per_epoch,
        unit="epoch",
        desc="run",
    )
    with run_bar:
        while run.step < run.last_step:
            interrupted = train_epoch(run, images, interrupts)
            run.check_losses()
            if RANK == 0 and (run.step % run.steps_per_epoch == 0 or run.step == run.last_step):
                finish_epoch(run, test_images)
                run_bar.update()
            run.save()
            if interrupted:
                break
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if run.step < run.last_step:
        if RANK == 0:
            print(f"interrupted after step {run.step}; saved {run.path}. Go on with: {resume_command()}", file=sys.stderr)
        sys.exit(128 + (interrupts or [signal.SIGTERM])[0])


def finish_epoch(run: Run, test_images: Tensor) -> None:
    """Measure, log and draw what the epoch has brought."""
    args = run.args
    epoch = (run.step - 1) // run.steps_per_epoch + 1
    before = run.history[-1] if run.history else {"step": 0, "seconds": 0.0}
    timesteps, losses = validate(run, test_images)
    row = {
        "epoch": epoch,
        "step": run.step,
        "train_loss": mean_loss(run),
        "val_loss": losses.mean().item(),
        "seconds": run.seconds,
        "images_per_second": (run.step - before["step"]) * args.batch_size / (run.seconds - before["seconds"]),
    }
    rows, strips = run.history + [row], run.strips
    write_log(args.output_dir / "train_log.csv", rows)
    draw_loss_curve(args.output_dir / "loss_curve.png", rows, timesteps, losses, args.timesteps)
    if epoch % args.sample_every == 0 or run.step == run.last_step:
        images = sample(run.ema.module, run.scheduler, args).cpu()
        save_grid(args.output_dir / f"samples_epoch_{epoch}.png", images)
        strips = strips + [(epoch, images[:8].clone())]  # a view would save all of them
        draw_progress(args.output_dir / "samples_progress.png", strips)
    if run.step % run.steps_per_epoch == 0:  # an epoch cut short by --max-steps does not count: a resumed run will end it
        run.history, run.strips = rows, strips
    if not args.quiet:
        tqdm.write(
            f"epoch {epoch}/{args.epochs}  loss {row['train_loss']:.4f}  held-out {row['val_loss']:.4f}  "
            f"{row['images_per_second']:.0f} images/s  {row['seconds'] / 60:.1f} min"
        )


# ------------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun); with one, these do nothing
# ------------------------------------------------------------------------------------------------------------------------


def over_processes(value: Tensor) -> Tensor:
    """The sum of a scalar over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process, so that all of them stop after the same step."""
    return bool(over_processes(torch.tensor(float(flag), device=device))) if WORLD_SIZE > 1 else flag


def one_first(load: Callable[[], Tensor]) -> Tensor:
    """The result of `load`, called by one process of each machine before the others: it unpacks the files for them."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier()
    result = load()
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier()
    return result


# ------------------------------------------------------------------------------------------------------------------------
# Sampling (DDPM, Algorithm 2; DDIM)
# ------------------------------------------------------------------------------------------------------------------------


def sampling_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps` timesteps, evenly spaced and strictly decreasing from T - 1; all of them if num_steps is T."""
    return [num_timesteps * (num_steps - i) // num_steps - 1 for i in range(num_steps)]


def predict_guided(model: torch.nn.Module, scheduler: NoiseScheduler, x_t: Tensor, t: int, guidance: float) -> Tensor:
    """The noise in x_t, all at timestep t, by a network that is steered away from its own mistakes: [B, 1, H, W].

        noise_pred = better + guidance (better - worse)

    Without its middle block the network errs mostly in the same direction, only farther. So the step from the worse
    prediction to the better one leads towards the truth, and `guidance` says how much farther to go. While x_t is mostly
    noise, alpha-bar below GUIDANCE_FROM, that would favour some digits over others, so there is no guidance there.

    (Karras et al. 2024, Guiding a Diffusion Model with a Bad Version of Itself, arXiv:2406.02507, whose worse network is a
    smaller one, trained less, and whose weight w is 1 + guidance. Leaving a block out needs no second network.)
    """
    timesteps = torch.full((len(x_t),), t, device=x_t.device)
    better = model(x_t, timesteps)
    if guidance == 0 or scheduler.alphas_cumprod[t] < GUIDANCE_FROM:
        return better
    return better + guidance * (better - model(x_t, timesteps, skip_middle=True))


@torch.inference_mode()
def denoise(
    model: torch.nn.Module,
    scheduler: NoiseScheduler,
    x_t: Tensor,
    timesteps: list[int],
    eta: float,
    guidance: float,
    generator: torch.Generator,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The reverse process from pure noise x_t [B, 1, H, W] to images (DDPM's Algorithm 2 if eta = 1, guidance = 0 and every
    timestep is visited; fewer timesteps or less eta are DDIM's).

    The guess at x_0 sharpens on the way. A jump over many timesteps on the guess at its start lags behind, so it takes the
    guess halfway, as it will be there if it goes on changing as it did in the last jump. (A second-order step, as in Lu et
    al. 2022, DPM-Solver++, arXiv:2211.01095, Algorithm 2, where log-SNR takes the place of t. In the first guided jump the
    change includes the guidance, half of which so counts twice.)

    Yields, at every timestep, (t, x_t, the x_0 predicted from it), and last (-1, x_0, x_0).
    """
    x_0_last = None  # the guess one jump ago
    for t, t_prev in zip(timesteps, timesteps[1:] + [-1]):
        noise_pred = predict_guided(model, scheduler, x_t, t, guidance)
        x_0_pred = scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
        yield t, x_t, x_0_pred
        if x_0_last is not None and -1 < t_prev < t - 1:  # a jump that is neither the first nor the last
            noise_pred = scheduler.predict_noise(x_t, t, x_0_pred + (x_0_pred - x_0_last) / 2)
        x_0_last = x_0_pred
        noise = torch.randn(x_t.shape, generator=generator, device=x_t.device)
        x_t = scheduler.step(noise_pred, t, x_t, t_prev, eta, noise)
    yield -1, x_t, x_t


def sample(model: torch.nn.Module, scheduler: NoiseScheduler, args: argparse.Namespace) -> Tensor:
    """Draw --num-samples images in chunks, uint8 [N, 28, 28]; the same seed starts from the same noise every time."""
    device = scheduler.betas.device
    generator = generator_for("sampling", args.seed, device)
    timesteps = sampling_timesteps(scheduler.num_timesteps, args.sample_steps)
    sizes = [min(SAMPLE_CHUNK, args.num_samples - i) for i in range(0, args.num_samples, SAMPLE_CHUNK)]
    chunks = []
    with bar(args, total=len(sizes) * len(timesteps), desc="sampling", unit="step", leave=False) as sampling_bar:
        for size in sizes:
            x_T = torch.randn(size, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator, device=device)
            for t, x_t, _ in denoise(model, scheduler, x_T, timesteps, args.eta, args.guidance, generator):
                sampling_bar.update(t >= 0)
            chunks.append(to_uint8(x_t))
    return torch.cat(chunks)


# ------------------------------------------------------------------------------------------------------------------------
# The optimiser of the convolutions; nothing here is about diffusion, and AdamW would do, given more time
# ------------------------------------------------------------------------------------------------------------------------


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T for a matrix U S V^T (its singular value decomposition): the same directions, all equally long.

    Divided by its norm, a matrix X has singular values between 0 and 1. The odd polynomial a X + b (X X^T) X + c (X X^T)^2 X
    turns each of them, s, into a s + b s^3 + c s^5. Five rounds bring all but the smallest to 0.7 ... 1.2, near enough to 1
    (Newton-Schulz; coefficients from Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Each round multiplies X from the left by a polynomial P in X X^T. As X X^T is small and X may be wide, the five P are
    computed and multiplied from X X^T alone (the next X X^T is P X X^T P), and X is multiplied once, at the end.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # X X^T is then the smaller of the two products
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    gram = x @ x.T
    identity = torch.eye(len(x), dtype=x.dtype, device=x.device)
    factor = identity
    for _ in range(5):
        polynomial = a * identity + b * gram + c * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    return factor @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised (Jordan et al. 2024), for the weights of convolutions, [out, in, k, k].

    Such a weight is the matrix, [out, in * k * k], that takes the pixels it looks at to its output channels. A gradient
    mostly consists of a few directions that many images share (its large singular values); steps along it learn those and
    little else. An orthogonalised step goes equally far in every direction. It is made about as large as AdamW's, so that
    one learning rate fits both (Liu et al. 2025, Muon is Scalable for LLM Training, arXiv:2502.16982, eq. 4).

    There is no weight decay. (torch.optim.Muon takes matrices alone, and calculates in bfloat16, which most CPUs have to
    emulate. Linear layers could have Muon too, but gain nothing from it here: benchmarks/RESULTS.md.)
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov: as if this gradient came once more
                matrix = ahead.flatten(1)  # [out, in, k, k] -> [out, in * k * k]
                size = 0.2 * math.sqrt(max(matrix.shape))  # a root mean square of 0.2, as AdamW's steps have
                weight.sub_(orthogonalize(matrix).view_as(weight), alpha=group["lr"] * size)


# ------------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "diffusion-mnist 3"  # counts up when earlier files no longer fit
# What decides the weights and the pictures; a resumed run must have the same.
SETTINGS = (
    "dataset",
    "batch_size",
    "lr",
    "timesteps",
    "schedule",
    "base_channels",
    "seed",
    "sample_every",
    "num_samples",
    "sample_steps",
    "eta",
    "guidance",
)


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it, out to the disk, then in its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        fail(
            f"cannot write {path}: {error.strerror}. Make room or choose another folder; what was there is untouched.",
            code=1,
        )


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a state as `Run.state_dict` gives it."""
    content = io.BytesIO()
    torch.save(state, content)
    write_file(path, content.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint. It can only hold tensors and plain values: a file from a stranger cannot run code."""
    if not path.is_file():
        fail(f"no checkpoint at {path}. Train one first, without --resume or --sample-only.", code=2)
    try:
        damaged = zipfile.ZipFile(path).testzip()  # a checkpoint is a zip file; this compares its check sums
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises anything from KeyError to UnpicklingError on a foreign file
        state = None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} is damaged, or no checkpoint that this version of the program wrote. Name another one.", code=1)
    return state


def keep_earlier_checkpoint(path: Path) -> None:
    """Move an earlier run's checkpoint to the first free numbered name and say so: a new run never overwrites one."""
    if path.exists():
        numbered = (path.with_name(f"{path.stem}_{i}{path.suffix}") for i in itertools.count(1))
        kept = next(name for name in numbered if not name.exists())
        path.rename(kept)
        print(f"{path} is from an earlier run: kept as {kept.name}")


def write_log(path: Path, rows: list[dict[str, float]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


# ------------------------------------------------------------------------------------------------------------------------
# Pictures; nothing here is needed to understand diffusion, but looking at them helps
# ------------------------------------------------------------------------------------------------------------------------


def save_figure(path: Path, figure: Figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_file(path, content.getvalue())


def show_images(axes: Axes, images: Tensor, column_labels: list[str], row_labels: list[str]) -> None:
    """Draw uint8 images [rows, columns, 28, 28] with a label under each column and beside each row."""
    rows, columns, size, _ = images.shape
    grid = make_grid(images.reshape(-1, 1, size, size), nrow=columns, padding=2)[0]
    axes.imshow(grid.cpu().numpy(), cmap="gray", vmin=0, vmax=255)
    centre = 2 + size / 2
    axes.set_xticks([centre + i * (size + 2) for i in range(columns)], column_labels)
    axes.set_yticks([centre + i * (size + 2) for i in range(rows)], row_labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw_loss_curve(path: Path, rows: list[dict[str, float]], t: Tensor, losses: Tensor, num_timesteps: int) -> None:
    """Loss by epoch, from the log, and by timestep, from the last look at the held-out images (t and losses [N])."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_epoch, by_timestep = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    by_epoch.plot(epochs, [row["train_loss"] for row in rows], marker="o", label="training, mean of the epoch")
    by_epoch.plot(epochs, [row["val_loss"] for row in rows], marker="o", label="held-out images, averaged weights")
    by_epoch.set(xlabel="epoch", ylabel="mean squared error of the predicted noise", yscale="log", title="Loss")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_epoch.legend()

    num_bins = min(10, num_timesteps)
    edges = torch.linspace(0, num_timesteps, num_bins + 1)
    bins = torch.bucketize(t.float(), edges[1:-1], right=True)
    means = [losses[bins == i].mean().item() for i in range(num_bins)]
    by_timestep.bar(edges[:-1], means, width=edges.diff(), align="edge", edgecolor="white")
    by_timestep.set(
        xlabel="timestep t (0: almost clean, right: pure noise)",
        ylabel="mean squared error of the predicted noise",
        yscale="log",
        title=f"Held-out loss by timestep after epoch {epochs[-1]}",
    )
    save_figure(path, figure)


def draw_noise_schedule(path: Path, num_timesteps: int) -> None:
    """alpha-bar, beta and the signal-to-noise ratio over t, for both schedules."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, betas, snr = figure.subplots(1, 3)
    for schedule in ("cosine", "linear"):
        scheduler = NoiseScheduler(num_timesteps, schedule)
        alpha_bar = scheduler.alphas_cumprod
        left.plot(alpha_bar, label=schedule)
        betas.plot(scheduler.betas, label=schedule)
        snr.plot((alpha_bar / (1 - alpha_bar)).log10(), label=schedule)
    left.set(title="signal left: alpha-bar", xlabel="timestep t", ylabel="weight of x_0 in x_t, squared")
    betas.set(title="noise per step: beta", xlabel="timestep t", ylabel="variance added by step t", yscale="log")
    snr.set(title="signal-to-noise ratio", xlabel="timestep t", ylabel="log10(alpha-bar / (1 - alpha-bar))")
    left.legend()
    save_figure(path, figure)


def draw_forward_process(path: Path, scheduler: NoiseScheduler, images: Tensor, seed: int) -> None:
    """A few digits on their way from x_0 to pure noise: q(x_t | x_0) at ten timesteps."""
    x_0 = to_model(images)
    noise = torch.randn(x_0.shape, generator=generator_for("forward process", seed, x_0.device), device=x_0.device)
    timesteps = torch.linspace(0, scheduler.num_timesteps - 1, 10).long().tolist()
    columns = [images] + [to_uint8(scheduler.add_noise(x_0, t, noise)[0]) for t in timesteps]
    ratios = [(a / (1 - a)).item() for a in scheduler.alphas_cumprod[timesteps]]
    labels = ["x_0"] + [f"t = {t}\nSNR {ratio:.2g}" for t, ratio in zip(timesteps, ratios)]
    figure = Figure(figsize=(11, 1 + len(images)), layout="constrained")
    axes = figure.subplots()
    show_images(axes, torch.stack(columns, dim=1), labels, [""] * len(images))
    axes.set_title(
        f"Forward process: x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) noise ({scheduler.schedule} schedule)"
    )
    save_figure(path, figure)


def draw_denoising(run: Run) -> None:
    """The reverse process: denoising.png, x_t and the x_0 predicted from it, and denoising.gif."""
    args, device = run.args, run.scheduler.betas.device
    generator = generator_for("denoising pictures", args.seed, device)
    x_T = torch.randn(32, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator, device=device)
    timesteps = sampling_timesteps(args.timesteps, args.sample_steps)
    path = [
        (t, to_uint8(x_t).cpu(), to_uint8(x_0_pred).cpu())
        for t, x_t, x_0_pred in denoise(run.ema.module, run.scheduler, x_T, timesteps, args.eta, args.guidance, generator)
    ]
    shown = [path[round(i * (len(path) - 1) / 10)] for i in range(11)]
    columns = torch.stack([torch.stack([x_t[:4], x_0_pred[:4]], dim=1).flatten(0, 1) for _, x_t, x_0_pred in shown], dim=1)
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots()
    show_images(axes, columns, [f"t = {t}" if t >= 0 else "result" for t, _, _ in shown], ["x_t", "predicted x_0"] * 4)
    axes.set_title(f"Reverse process: from noise to digits in {args.sample_steps} steps")
    save_figure(args.output_dir / "denoising.png", figure)

    every = math.ceil(len(path) / 50)  # at most about 50 frames
    frames = [
        make_grid(x_t.unsqueeze(1), nrow=8)[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
        for _, x_t, _ in path[::-every][::-1]
    ]
    first, *rest = [Image.fromarray((frame // 16 * 17).numpy()) for frame in frames]  # 16 greys keep the file small
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=rest, duration=[80] * len(rest) + [2500], loop=0)
    write_file(args.output_dir / "denoising.gif", content.getvalue())


def draw_progress(path: Path, strips: list[tuple[int, Tensor]]) -> None:
    """The first digits of every sample grid, one row an epoch: the same noise, ever better weights."""
    images = torch.stack([strip for _, strip in strips])
    figure = Figure(figsize=(6, 0.5 + 0.75 * len(strips)), layout="constrained")
    axes = figure.subplots()
    show_images(axes, images, [""] * images.shape[1], [f"epoch {epoch}" for epoch, _ in strips])
    axes.set_title("Samples from the same noise")
    save_figure(path, figure)


def save_grid(path: Path, images: Tensor) -> None:
    """Write uint8 images [N, 28, 28] as one square grid."""
    content = io.BytesIO()
    columns = math.ceil(math.sqrt(len(images)))
    save_image(images.unsqueeze(1).float() / 255, content, format="png", nrow=columns)
    write_file(path, content.getvalue())


# ------------------------------------------------------------------------------------------------------------------------
# Options and the program
# ------------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help explains every option)", code=2)  # argparse would print all options first


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text}")
    return int(text)


def to_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text}") from None


def positive_float(text: str) -> float:
    value = to_float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def nonnegative_float(text: str) -> float:
    value = to_float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, not {text}")
    return value


def unit_float(text: str) -> float:
    value = to_float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def make_parser() -> Parser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(description="Train a diffusion model on MNIST and draw digits with it.", formatter_class=formatter)
    more_epochs = "passes over the images; the learning rate falls to 0 at the last, so --resume with more raises it again"
    checkpoint = "for --sample-only; if not given, OUTPUT_DIR/checkpoint.pt, else pretrained.pt beside this file"
    output = "for --sample-only: .png, a grid, or .npy, uint8 [N, 28, 28]; if not given, OUTPUT_DIR/samples.png"

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=15, help=more_epochs)
    add("--batch-size", type=positive_int, default=64, help="images per step, all processes together")
    add("--lr", type=positive_float, default=0.005, help="highest learning rate (Muon, AdamW)")
    add("--timesteps", type=positive_int, default=1000, help="T, steps of the forward process")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="how the noise grows with t")
    add("--base-channels", type=positive_int, default=48, help="width of the U-Net, a multiple of 24")
    add("--max-steps", type=positive_int, metavar="N", help="stop after N optimiser steps in all, and end as usual")
    add("--resume", action="store_true", help="go on from OUTPUT_DIR/checkpoint.pt; repeat the other options of that run")
    add("--save-every-minutes", type=positive_float, default=5.0, help="minutes between checkpoints within an epoch")

    add = parser.add_argument_group("sampling").add_argument
    add("--sample-every", type=positive_int, default=5, help="epochs between sample grids")
    add("--num-samples", type=positive_int, default=64, help="images to draw")
    add("--sample-steps", type=positive_int, default=32, help="steps from noise to image, at most --timesteps")
    add("--eta", type=unit_float, default=1.0, help="fresh noise in each step back, 0 to 1: 0 is DDIM, 1 as much as DDPM")
    add(
        "--guidance",
        type=nonnegative_float,
        default=2.0,
        help="how far to steer away from the network's own mistakes; 0 is off",
    )
    add("--sample-only", action="store_true", help="no training: draw with --checkpoint and write --output")
    add("--checkpoint", type=Path, help=checkpoint)
    add("--output", type=Path, help=output)

    add = parser.add_argument_group("where and how").add_argument
    add("--dataset", choices=["MNIST", "FashionMNIST", "KMNIST"], default="MNIST", help="what to learn")
    add("--data-dir", type=Path, default=HERE / "data", help="folder of the data sets; what is missing is downloaded")
    add("--output-dir", type=Path, default=Path(), help="folder for all that a run writes; made if missing")
    add("--seed", type=int, default=0, help="the same seed gives the same weights and pictures (on the same kind of CPU)")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: cuda, else mps, else cpu")
    add("--quiet", action="store_true", help="no progress bars, no line per epoch")
    return parser


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked against each other."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.base_channels % BASE_CHANNELS_FACTOR:
        parser.error(f"argument --base-channels: must be a multiple of {BASE_CHANNELS_FACTOR}, not {args.base_channels}")
    if args.timesteps < 2:
        parser.error("argument --timesteps: must be at least 2")
    if not 0 <= args.seed < 2**63:
        parser.error(f"argument --seed: must be a whole number from 0 to 2^63 - 1, not {args.seed}")
    if not args.sample_only and args.sample_steps > args.timesteps:
        parser.error(f"argument --sample-steps: {args.sample_steps} is more than --timesteps {args.timesteps}")
    if args.batch_size % WORLD_SIZE:
        parser.error(f"argument --batch-size: {args.batch_size} images do not divide among {WORLD_SIZE} processes")
    if args.sample_only and args.resume:
        parser.error("--sample-only and --resume exclude each other")
    if not args.sample_only and (args.checkpoint or args.output):
        parser.error("--checkpoint and --output need --sample-only")
    args.output = args.output or args.output_dir / "samples.png"
    if args.output.suffix not in (".png", ".npy"):
        parser.error(f"argument --output: must end in .png or .npy, not {args.output}")
    return args


def choose_device(name: str) -> torch.device:
    """The device that --device names, tried out."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available() and WORLD_SIZE == 1
            else "cpu"
        )
    if name == "cuda" and WORLD_SIZE > 1:
        name = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # unknown name, no such GPU, or torch built without it: all of different types
        reason = str(error).split("\n")[0]
        fail(f"argument --device: {name} cannot be used here ({reason}). Try --device cpu.", code=2)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def state_to_resume(args: argparse.Namespace) -> dict:
    """The content of checkpoint.pt, if it belongs to a run with these options."""
    path = args.output_dir / "checkpoint.pt"
    state = load_checkpoint(path)
    if "optimizers" not in state:
        fail(f"{path} holds weights to sample with, not a run to resume.", code=2)
    differing = [
        f"--{name.replace('_', '-')} {value} (now {getattr(args, name)})"
        for name, value in state["settings"].items()
        if value != getattr(args, name)
    ]
    if differing:
        fail(
            f"{path} was trained with other settings: {', '.join(differing)}. Resume with those, or start anew "
            "without --resume.",
            code=2,
        )
    return state


def load_model(path: Path, device: torch.device) -> tuple[UNet, NoiseScheduler]:
    """The averaged network in a checkpoint, and the schedule that it was trained with."""
    state = load_checkpoint(path)
    settings = state["settings"]
    scheduler = NoiseScheduler(settings["timesteps"], settings["schedule"]).to(device)
    model = UNet(scheduler, base_channels=settings["base_channels"]).to(device, memory_format=torch.channels_last).eval()
    try:
        model.load_state_dict(state["ema"])
    except (KeyError, RuntimeError):
        fail(f"{path} holds the weights of another network than this program's. Name another one.", code=1)
    return model, scheduler


def sample_only(args: argparse.Namespace, device: torch.device) -> None:
    """Load a checkpoint, draw, and write --output."""
    own = args.output_dir / "checkpoint.pt"
    path = args.checkpoint or (own if own.exists() else HERE / "pretrained.pt")
    model, scheduler = load_model(path, device)
    if args.sample_steps > scheduler.num_timesteps:
        fail(
            f"argument --sample-steps: {args.sample_steps} is more than the {scheduler.num_timesteps} timesteps that "
            f"{path} was trained with",
            code=2,
        )
    started = time.monotonic()
    images = sample(model, scheduler, args)
    seconds = time.monotonic() - started
    if args.output.suffix == ".npy":
        content = io.BytesIO()
        np.save(content, images.cpu().numpy())
        write_file(args.output, content.getvalue())
    else:
        save_grid(args.output, images)
    print(f"drew {len(images)} images with {path} in {seconds:.1f} s: {args.output}")


def bar(args: argparse.Namespace, **options) -> tqdm:
    """A progress bar in the first process; none with --quiet or where the output is no terminal."""
    return tqdm(disable=True if args.quiet or RANK > 0 else None, **options)


def resume_command() -> str:
    """What to type to go on with this run."""
    if WORLD_SIZE > 1:
        return "the same torchrun command and --resume"
    return shlex.join(["python", *sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])


def check_writable(folder: Path) -> None:
    """Make the folder and write to it now, rather than fail after an epoch of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"cannot write to {folder} ({error.strerror}). Choose another --output-dir or --output.", code=2)


def report(run: Run) -> None:
    """What the run has left, and what to do with it."""
    if run.args.quiet:
        return
    print(f"done: {run.step} steps, {run.seconds / 60:.1f} minutes of training. In {run.args.output_dir.resolve()}:")
    print("  samples_epoch_*.png, samples_progress.png     the digits")
    print("  denoising.gif, denoising.png                  how they come out of noise")
    print("  forward_process.png, noise_schedule.png       how images become noise")
    print("  loss_curve.png, train_log.csv                 how well the noise is predicted")
    print("  checkpoint.pt, weights.pt                     to go on with; to draw with")
    again = {
        "--checkpoint": run.path,
        "--sample-steps": run.args.sample_steps,
        "--eta": run.args.eta,
        "--guidance": run.args.guidance,
        "--seed": run.args.seed + 1,
    }
    draw = [str(word) for option in again.items() for word in option]
    print(f"Draw more: python train_diffusion.py --sample-only {shlex.join(draw)}")
    longer = "more --epochs" if run.step == run.total_steps else "without --max-steps"
    print(f"Train on:  the same command with --resume, {longer}")


def main() -> None:
    args = parse_options()
    device = choose_device(args.device)
    check_writable(args.output.parent if args.sample_only else args.output_dir)
    if args.sample_only:
        return sample_only(args, device) if RANK == 0 else None
    state = state_to_resume(args) if args.resume else None
    if WORLD_SIZE > 1:
        dist.init_process_group()

    images = one_first(lambda: load_images(args.dataset, args.data_dir, train=True)).to(device)
    test_images = load_images(args.dataset, args.data_dir, train=False)[:NUM_VALIDATION_IMAGES].to(device)
    if args.batch_size > len(images):
        fail(f"argument --batch-size: {args.batch_size} is more than the {len(images)} training images", code=2)
    run = Run(args, len(images), device, state)
    if RANK == 0:
        if not args.resume:
            keep_earlier_checkpoint(run.path)
        draw_noise_schedule(args.output_dir / "noise_schedule.png", args.timesteps)
        draw_forward_process(args.output_dir / "forward_process.png", run.scheduler, test_images[:4], args.seed)
    train(run, images, test_images)
    if RANK == 0:
        draw_denoising(run)
        state = run.state_dict()
        save_checkpoint(args.output_dir / "weights.pt", {key: state[key] for key in ("format", "settings", "ema")})
        report(run)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file, too, shows each epoch's line at once
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
