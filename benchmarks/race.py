"""Who draws the better digits after the same minutes of training? Ours beside three projects.

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/race.py --minutes 5 15 --keep runs/race --picture race.png

Every contender trains once, on the same images and labels in memory, for the largest number of
minutes; the weights are kept at each of --minutes. Only training counts: the clock stands still
while weights are kept, and judging comes after the race. Each draws --num-samples digits with its
averaged weights and its own sampler in 25 steps, and quality.py judges --draws of them for each.
Two of the six show whether it is the network or the recipe: the course's network by our recipe, and
ours by the course's. (v-prediction counts as part of our network, guidance as part of our recipe.)
What is in --keep is not raced again, so a race may be broken off between two contenders.

The others train after their own documentation, but for what their functions here name. In their
favor: the course gets an average of its weights, smalldiffusion the label and a batch that fits
minutes on a CPU (its own is 1024). In our favor: our settings were chosen on MNIST, at minutes on a
CPU, and by this classifier; we have guidance, which the course and smalldiffusion do without; our
learning rate ends with the race, as our program's ends with its run. (So at the earlier of two
times it is still high.) The course's network, by our recipe, spends 200 of its few steps on our
warm-up, and is not channels_last.
Prints one line of JSON for each contender and time.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from quality import NUM_CLASSES, Judge, Roles, load_classifier, mnist, proportional_labels, roles
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.utils import make_grid

import train_diffusion
from forward_reverse_process import NoiseScheduler, UNet
from support.devices import images_together
from support.files import write_file
from support.optimizers import LEARNING_RATES, ema_decay, make_optimizers
from support.options import number
from support.pictures import figure_at

NUM_STEPS = train_diffusion.SAMPLE_STEPS  # of every sampler


@dataclass
class Contender:
    """A network and how its project trains it and draws with it."""

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    batch_size: int
    ema_decay: Callable[[int], float]  # of the average of the weights, by steps done before
    loss: Callable[[Tensor, Tensor], Tensor]  # of images [B, 1, 28, 28] in [-1, 1], labels [B]
    draw: Callable[[nn.Module, Tensor], Tensor]  # averaged network, labels -> images in [-1, 1]
    max_grad_norm: float = 1.0
    lr_falls: bool = False  # on a line, to 0 at the end; else the learning rate stays


def forgetful(decay: float) -> Callable[[int], float]:
    """A constant decay, but less in the first steps: the random start is soon forgotten."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def our_network() -> UNet:
    width = train_diffusion.make_parser().get_default("base_channels")
    model = UNet(NoiseScheduler(), base_channels=width, num_classes=NUM_CLASSES)
    return model.to(memory_format=torch.channels_last)


def our_recipe(
    network: Callable[[], nn.Module],
    optimizer: str = "muon",
    spread: bool = True,
    guidance: float = train_diffusion.GUIDANCE,
    interval: tuple[float, float] = train_diffusion.GUIDANCE_INTERVAL,
) -> Contender:
    """This program by its defaults. Its learning rate ends with the run, as it does there.

    network: called like our `UNet`, with a `no_label`.
    spread: the timesteps of a batch are spread evenly; else each is drawn on its own.
    """
    default = train_diffusion.make_parser().get_default
    scheduler, model = NoiseScheduler(), cast(UNet, network())
    optimizers = make_optimizers(model, optimizer)
    for each in optimizers:
        each.param_groups[0]["lr"] = LEARNING_RATES[optimizer]

    def loss(x_0: Tensor, labels: Tensor) -> Tensor:
        dropped = torch.rand(len(labels)) < default("label_dropout")
        labels = labels.masked_fill(dropped, model.no_label)
        t = None if spread else torch.randint(scheduler.num_timesteps, (len(x_0),))
        return train_diffusion.training_loss(model, scheduler, x_0, labels, t).mean()

    def draw(ema: nn.Module, labels: Tensor) -> Tensor:
        x_T = torch.randn(len(labels), 1, 28, 28)
        path = train_diffusion.denoise(
            cast(UNet, ema), scheduler, x_T, labels, guidance=guidance, guidance_interval=interval
        )
        *_, (_, x_0, _) = path
        return x_0

    return Contender(model, optimizers, default("batch_size"), ema_decay, loss, draw, lr_falls=True)


class CourseNetwork(nn.Module):
    """The network of unit 2 of the Hugging Face diffusion course, called like our `UNet`.

    The label goes in by diffusers' own embedding, with a row more for "no label".
    """

    no_label = NUM_CLASSES

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=28,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=NUM_CLASSES + 1,
        )

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor) -> Tensor:
        return self.unet(x_t, t, labels).sample


def course_recipe(network: Callable[[], nn.Module]) -> Contender:
    """Unit 2 of the Hugging Face diffusion course, but for the way in which the label goes in.

    DDIMScheduler with these settings is the course's DDPMScheduler, in 25 steps in place of 1000.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    model = network()
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
    noising = DDPMScheduler(**schedule)

    def loss(x_0: Tensor, labels: Tensor) -> Tensor:
        t, noise = torch.randint(1000, (len(x_0),)), torch.randn_like(x_0)
        return F.mse_loss(model(noising.add_noise(x_0, noise, t), t, labels), noise)

    def draw(ema: nn.Module, labels: Tensor) -> Tensor:
        sampler = DDIMScheduler(**schedule, timestep_spacing="trailing")
        sampler.set_timesteps(NUM_STEPS)
        x_t = torch.randn(len(labels), 1, 28, 28)
        for t in sampler.timesteps.tolist():
            # With noise that fits the clipped x_0, as in the course's DDPMScheduler.
            fits = {"eta": 1.0, "use_clipped_model_output": True}
            x_t = sampler.step(ema(x_t, t, labels), t, x_t, **fits).prev_sample
        return x_t

    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3)]
    return Contender(model, optimizers, 128, forgetful(0.999), loss, draw, max_grad_norm=math.inf)


def smalldiffusion() -> Contender:
    """The project's example for FashionMNIST, with its embedding of the label."""
    from accelerate import Accelerator
    from smalldiffusion import CondEmbedderLabel, Scaled, ScheduleLogLinear, Unet, samples

    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    label_embedding = CondEmbedderLabel(4 * 64, NUM_CLASSES)
    shape = {"ch": 64, "ch_mult": (1, 1, 2), "attn_resolutions": (14,)}
    model = Scaled(Unet)(28, 1, 1, **shape, cond_embed=label_embedding)

    def loss(x_0: Tensor, labels: Tensor) -> Tensor:
        sigma = schedule.sample_batch(x_0).view(-1, 1, 1, 1)
        return model.get_loss(x_0, sigma, torch.randn_like(x_0), cond=labels)

    def draw(ema: nn.Module, labels: Tensor) -> Tensor:
        sigmas = schedule.sample_sigmas(NUM_STEPS)
        size = {"batchsize": len(labels), "accelerator": Accelerator(cpu=True)}
        *_, x_0 = samples(ema, sigmas, gam=1.6, cond=labels, **size)
        return x_0

    optimizers = [torch.optim.AdamW(model.parameters(), lr=7e-4)]
    return Contender(model, optimizers, 128, forgetful(0.999), loss, draw, max_grad_norm=math.inf)


def denoising_diffusion_pytorch() -> Contender:
    """The project's Trainer, with the network and the process of its guidance by labels.

    The network has two resolutions in place of its example's four, a tenth of the labels is dropped
    in place of half, and the average is taken at every step, not at every tenth.
    """
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

    unet = Unet(64, NUM_CLASSES, cond_drop_prob=0.1, dim_mults=(1, 2), channels=1)
    model = GaussianDiffusion(unet, image_size=28, sampling_timesteps=NUM_STEPS)

    def loss(x_0: Tensor, labels: Tensor) -> Tensor:
        return model((x_0 + 1) / 2, classes=labels)

    def draw(ema: nn.Module, labels: Tensor) -> Tensor:
        assert isinstance(ema, GaussianDiffusion)
        return ema.sample(labels, cond_scale=1.2) * 2 - 1  # s = 1 + w, rescaled; 1 itself fails

    optimizers = [torch.optim.Adam(unet.parameters(), lr=1e-4, betas=(0.9, 0.99))]
    return Contender(model, optimizers, 16, forgetful(0.995), loss, draw)


partial = functools.partial
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "this repository": partial(our_recipe, our_network),
    "diffusers course": partial(course_recipe, CourseNetwork),
    "course network, our recipe": partial(our_recipe, CourseNetwork),
    "our network, course recipe": partial(course_recipe, our_network),
    "smalldiffusion": smalldiffusion,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}
VARIANTS: dict[str, Callable[[], Contender]] = {  # to compare choices by
    "this repository, Adam alone": partial(our_recipe, our_network, "adam"),
    "this repository, independent timesteps": partial(our_recipe, our_network, spread=False),
    "this repository, guided everywhere": partial(
        our_recipe, our_network, guidance=0.1, interval=(0, 1)
    ),
}

EVERYONE = CONTENDERS | VARIANTS


def training(
    contender: Contender, images: Tensor, labels: Tensor, length: float = math.inf
) -> Iterator[tuple[float, int, nn.Module]]:
    """Train step by step. Yields the seconds and images so far, and the averaged network.

    Seconds are those of training alone: the clock stands still between a yield and the next step.
    A learning rate that falls is 0 after `length` seconds.
    """
    model, ema = contender.model.train(), copy.deepcopy(contender.model).eval()
    rates = [optimizer.param_groups[0]["lr"] for optimizer in contender.optimizers]
    seconds = 0.0
    for step in itertools.count():
        started = time.perf_counter()
        batch = torch.randint(len(images), (contender.batch_size,))
        loss = contender.loss(train_diffusion.to_model(images[batch]), labels[batch])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), contender.max_grad_norm)
        for optimizer, rate in zip(contender.optimizers, rates):
            if contender.lr_falls:
                rise = min(1, (step + 1) / train_diffusion.WARMUP_STEPS)
                optimizer.param_groups[0]["lr"] = rate * rise * max(0, 1 - seconds / length)
            optimizer.step()
        average = get_ema_multi_avg_fn(contender.ema_decay(step))
        average(list(ema.parameters()), list(model.parameters()), None)
        seconds += time.perf_counter() - started
        yield seconds, (step + 1) * contender.batch_size, ema


def race(
    contender: Contender, images: Tensor, labels: Tensor, minutes: list[float]
) -> list[tuple[nn.Module, int]]:
    """Train for the largest of minutes; the averaged network and the images seen at each."""
    kept: list[tuple[nn.Module, int]] = []
    for seconds, seen, ema in training(contender, images, labels, 60 * minutes[-1]):
        if seconds >= 60 * minutes[len(kept)]:
            kept.append((copy.deepcopy(ema), seen))
        if len(kept) == len(minutes):
            break
    return kept


@torch.no_grad()
def draw(contender: Contender, ema: nn.Module, labels: Tensor, seed: int = 0) -> Tensor:
    """uint8 [N, 1, 28, 28]."""
    torch.manual_seed(seed)
    chunks = [contender.draw(ema, chunk) for chunk in labels.split(images_together((1, 28, 28)))]
    return train_diffusion.to_uint8(torch.cat(chunks))


def draw_picture(path: Path, rows: list[dict[str, Any]], digits: dict[str, Tensor]) -> None:
    """The share of digits as asked over minutes, and ten digits of each beside real ones."""
    grid = make_grid(torch.cat(list(digits.values())), nrow=10, padding=2, pad_value=64)
    with figure_at(path, 13, 4.4) as figure:
        curves, pictures = figure.subplots(1, 2, width_ratios=[1, 1.2])
        for name in dict.fromkeys(row["name"] for row in rows):
            mine = [row for row in rows if row["name"] == name]
            shares = [100 * row["as_asked"]["mean"] for row in mine]
            curves.plot([row["minutes"] for row in mine], shares, marker="o", label=name)
        curves.set(xlabel="minutes of training", ylabel="%", ylim=(0, 101))
        curves.set_title("digits that a classifier takes for what was asked")
        figure.legend(*curves.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        pictures.imshow(grid.permute(1, 2, 0).numpy())
        pictures.set_yticks([16 + 30 * i for i in range(len(digits))], list(digits))
        pictures.set_xticks([])
        pictures.set_title(f"after {rows[-1]['minutes']:g} minutes, nothing selected")


def kept_or_raced(
    name: str, args: argparse.Namespace, images: Roles, judge: Judge
) -> dict[str, Any]:
    """One contender's rows and ten digits: from --keep if they are there, else raced for."""
    settings = {
        key: getattr(args, key) for key in ("minutes", "num_samples", "draws", "choose", "seed")
    }
    path = args.keep / f"{name}.pt" if args.keep else None
    if path and path.exists():
        done = torch.load(path, weights_only=True)
        if done["settings"] != settings:
            raise SystemExit(f"race.py: error: {path} is of another race: {done['settings']}")
        return done

    torch.manual_seed(args.seed)
    contender = EVERYONE[name]()
    labels = proportional_labels(args.num_samples, mnist()[0][1])
    done = {"settings": settings, "rows": []}
    train_on = images.trained_on, images.trained_on_labels
    for minutes, (ema, seen) in zip(args.minutes, race(contender, *train_on, args.minutes)):
        samples = [draw(contender, ema, labels, seed) for seed in range(args.draws)]
        row = {"name": name, "minutes": minutes, "images": seen, **judge(samples, labels)}
        done["rows"].append(row)
    done["digits"] = draw(contender, ema, torch.arange(NUM_CLASSES))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: torch.save(done, file))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    minutes, size = number(float, 1e-3, 1e4), number(int, 10, 10_000)
    add("--minutes", type=minutes, nargs="+", default=[5, 15], help="when to judge (%(default)s)")
    add("--num-samples", type=size, default=1000, help="digits to judge by (%(default)s)")
    add("--draws", type=number(int, 1, 100), default=3, help="of so many digits (%(default)s)")
    add("--choose", action="store_true", help="train and judge by training images: see quality.py")
    usual = list(CONTENDERS)
    add("--contenders", nargs="+", choices=list(EVERYONE), default=usual, help="(no variants)")
    add("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    add("--keep", type=Path, help="a folder for what is done, and to go on from")
    add("--picture", type=Path, help="a .png to draw")
    args = parser.parse_args()
    args.minutes.sort()

    images = roles(args.choose)
    judge = Judge(load_classifier(), images)
    test_images, test_labels = mnist()[1]
    first = [int((test_labels == digit).nonzero()[0]) for digit in range(NUM_CLASSES)]
    rows, digits = [], {"real digits": test_images[first]}
    for name in args.contenders:
        done = kept_or_raced(name, args, images, judge)
        for row in done["rows"]:
            print(json.dumps(row), flush=True)
        rows += done["rows"]
        digits[name] = done["digits"]
    if args.picture:
        draw_picture(args.picture, rows, digits)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
