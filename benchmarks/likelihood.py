"""How probable is a digit to a trained network, and which digit does it see?

    python benchmarks/likelihood.py
    python benchmarks/likelihood.py runs/1/checkpoint.pt --picture bits.png

Bits: the bound that the training loss comes from (DDPM, eq. 5), of all test images, in bits for a
pixel and in its three parts. Each image is noised at --rounds timesteps, evenly spread; the lowest
and the highest round say how certain the mean is. The last step is a Gaussian around the predicted
x_0. Its standard deviation is the best of five for 2,000 training images.

Reading: the label with the smallest loss, summed over 1, 3, 7 and 16 timesteps, is the network's
answer (a diffusion classifier, Li et al. 2023, arXiv:2303.16203); for --read test images, evenly
spread. Prints one line of JSON for each.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from quality import NUM_CLASSES, evenly, mnist
from torch import Tensor

from forward_reverse_process import NoiseScheduler, UNet
from support.devices import pieces
from support.files import REPOSITORY
from support.pictures import figure_at
from train_diffusion import load_model, to_model, training_loss

DEVIATIONS = (0.001, 0.002, 0.003, 0.004, 0.006)  # of the last step, to choose from
READ_AT = {1: [500], 3: [300, 500, 700], 7: range(200, 801, 100), 16: range(100, 851, 50)}


def step_weights(scheduler: NoiseScheduler) -> Tensor:
    """What the bound counts the squared error at t > 0 with (DDPM, eq. 12): float64 [T], 0 at 0.

    The variance of a step is beta-tilde_t, as in `NoiseScheduler.step` at eta = 1.
    """
    betas = scheduler.betas.double()[1:]
    weights = betas / (2 * (1 - betas) * (1 - scheduler.alphas_cumprod.double()[:-1]))
    return torch.cat([torch.zeros(1, dtype=torch.float64), weights])


@torch.no_grad()
def losses_of(
    model: UNet, scheduler: NoiseScheduler, images: Tensor, labels: Tensor, t: Tensor
) -> Tensor:
    """The squared error of the noise of each uint8 image at its own t: float32 [N]."""
    chunks = []
    for some in pieces(len(images), model.image_shape):
        batch = to_model(images[some]), labels[some], t[some]
        chunks.append(training_loss(model, scheduler, *batch))
    return torch.cat(chunks)


@torch.no_grad()
def last_step(
    model: UNet, scheduler: NoiseScheduler, images: Tensor, labels: Tensor, deviation: float
) -> float:
    """Bits for a pixel from x_t at t = 0 to one of 256 gray levels, each a bin 2 / 255 wide."""
    bits = 0.0
    for some in pieces(len(images), model.image_shape):
        x_0 = to_model(images[some])
        x_t, _ = scheduler.add_noise(x_0, 0)
        x_0_pred = scheduler.predict_x0(x_t, 0, model(x_t, 0, labels[some]))
        normal = torch.distributions.Normal(x_0_pred.double(), deviation)
        upper = normal.cdf(x_0 + 1 / 255).masked_fill(x_0 == 1, 1)
        lower = normal.cdf(x_0 - 1 / 255).masked_fill(x_0 == -1, 0)
        bits -= (upper - lower).clamp(min=1e-12).log2().mean().item() * len(x_0)
    return bits / len(images)


def start(scheduler: NoiseScheduler, images: Tensor) -> float:
    """Bits for a pixel that x_T still holds: the KL divergence of q(x_T | x_0) from N(0, I)."""
    left, square = scheduler.alphas_cumprod[-1].double(), to_model(images).square().mean()
    return ((left * square - left - torch.log1p(-left)) / 2 / math.log(2)).item()


def count_bits(
    model: UNet,
    scheduler: NoiseScheduler,
    images: Tensor,
    labels: Tensor,
    rounds: int,
    deviation: float,
) -> tuple[dict[str, object], Tensor]:
    """The bound's three parts and their sum; and the bits of each t, the last step's at t = 0.

    There must be an image for each t > 0, T - 1 in all.
    """
    T = scheduler.num_timesteps
    by_round, weights = [], step_weights(scheduler) / math.log(2)
    for i in range(rounds):
        t = 1 + (torch.arange(len(images)) + i * T // rounds) % (T - 1)
        losses = losses_of(model, scheduler, images, labels, t).double()
        errors = torch.zeros(T, dtype=torch.float64).index_add(0, t, losses)
        by_round.append(weights * errors / t.bincount(minlength=T).clamp(min=1))  # a mean by t
    sums = [bits.sum().item() for bits in by_round]
    bits_by_t = torch.stack(by_round).mean(dim=0)
    parts = {"steps": bits_by_t.sum().item(), "start": start(scheduler, images)}
    parts["last"] = last_step(model, scheduler, images, labels, deviation)
    bits_by_t[0] = parts["last"]
    figures = {"total": sum(parts.values()), **parts, "deviation": deviation}
    return {**figures, "steps_low": min(sums), "steps_high": max(sums)}, bits_by_t


@torch.no_grad()
def read(
    model: UNet, scheduler: NoiseScheduler, images: Tensor, labels: Tensor
) -> dict[int, float]:
    """The share of images read right, by the number of timesteps."""
    at = {}
    for t in READ_AT[16]:
        columns, same = [], torch.full((len(images),), t)
        for digit in range(NUM_CLASSES):
            torch.manual_seed(t)  # every label is tried with the same noise
            guess = torch.full_like(labels, digit)
            columns.append(losses_of(model, scheduler, images, guess, same))
        at[t] = torch.stack(columns, dim=1)
    right = {}
    for count, timesteps in READ_AT.items():
        answers = torch.stack([at[t] for t in timesteps]).sum(dim=0).argmin(dim=1)
        right[count] = (answers == labels).float().mean().item()
    return right


def draw_bits(path: Path, bits_by_t: Tensor) -> None:
    """How many of the bits are spent by t, from the first gray level to the last noise."""
    spent = bits_by_t.cumsum(0) / bits_by_t.sum()
    with figure_at(path, 7, 3.4) as figure:
        axes = figure.subplots()
        axes.plot((torch.arange(len(spent)) + 1).numpy(), spent.numpy())
        axes.set(xlabel="t + 1", xscale="log", ylim=(0, 1.02), ylabel="share of the bits up to t")
        axes.set_title(f"{bits_by_t.sum():.2f} bits for a pixel, by timestep")
        axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    pretrained = REPOSITORY / "pretrained.pt"
    add("checkpoint", nargs="?", type=Path, default=pretrained, help="(%(default)s)")
    add("--rounds", type=int, default=10, help="timesteps for each image (%(default)s)")
    add("--read", type=int, default=2000, help="images to read (%(default)s)")
    add("--picture", type=Path, help="a .png of the bits by t")
    args = parser.parse_args()

    torch.manual_seed(0)
    network = load_model(args.checkpoint)
    train_images, train_labels = (part[:2000] for part in mnist()[0])
    chosen = [last_step(*network, train_images, train_labels, each) for each in DEVIATIONS]
    deviation = DEVIATIONS[chosen.index(min(chosen))]
    images, labels = mnist()[1]
    figures, bits_by_t = count_bits(*network, images, labels, args.rounds, deviation)
    shares = {f"up to t = {t}": bits_by_t[: t + 1].sum() / bits_by_t.sum() for t in (0, 10, 100)}
    print(json.dumps({**figures, **{name: share.item() for name, share in shares.items()}}))
    if args.picture:
        draw_bits(args.picture, bits_by_t)
    images, labels = (evenly(part, args.read) for part in (images, labels))
    print(json.dumps({"images": len(images), "read": read(*network, images, labels)}))


if __name__ == "__main__":
    main()
