"""How fast does it train and sample, beside other projects' networks and what the machine can do?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py

One process, all contenders in turn, round after round, so that whatever else the machine does falls
on all of them; medians with the lowest and highest round. Peak memory is that of a process of its
own for each. Prints one line of JSON per figure.
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_diffusion
from forward_reverse_process import NoiseScheduler, UNet

try:
    import resource
except ImportError:  # Windows has none
    resource = None

BATCH_SIZE = 128
NUM_SAMPLES = 64  # digits that are drawn to time sampling
NUM_CLASSES = 10


def autocast(device: torch.device) -> torch.autocast:
    """The precision in which the program trains: bfloat16 on a GPU that has it, else float32."""
    use_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16)


def our_step(device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    """The program's own training step by its default settings, on real images and labels.

    The same as in `train_diffusion.train`, from the draws to the averaged weights. Only the look at
    the loss, the progress bar and the files are left out.
    """
    default = train_diffusion.make_parser().get_default
    (images, labels), _ = train_diffusion.load_images("MNIST")
    images, labels = images.to(device), labels.to(device)
    total_steps = default("epochs") * (len(images) // BATCH_SIZE)
    torch.manual_seed(0)
    scheduler = NoiseScheduler(default("timesteps"), default("schedule")).to(device)
    model = UNet(scheduler, base_channels=default("base_channels"), num_classes=NUM_CLASSES)
    model.to(device, memory_format=train_diffusion.memory_format(device))
    ema = copy.deepcopy(model).eval()
    optimizers = train_diffusion.make_optimizers(model, default("optimizer"))
    batches = itertools.cycle(torch.randperm(len(images)).to(device).split(BATCH_SIZE)[:-1])
    numbers = itertools.count()

    def step() -> None:
        number, batch = next(numbers), next(batches)
        generator = train_diffusion.generator_for(f"step {number}", 0, device)
        draw = {"generator": generator, "device": device}
        t = torch.randint(scheduler.num_timesteps, (BATCH_SIZE,), **draw)
        noise = torch.randn(BATCH_SIZE, *model.image_shape, **draw)
        dropped = torch.rand(BATCH_SIZE, **draw)
        x_0 = train_diffusion.to_model(images[batch])
        y = labels[batch].masked_fill(dropped < default("label_dropout"), model.no_label)
        with autocast(device):
            loss = train_diffusion.training_loss(model, scheduler, x_0, y, t, noise).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train_diffusion.MAX_GRAD_NORM)
        lr = train_diffusion.LEARNING_RATES[default("optimizer")]
        lr *= min(1, (number + 1) / train_diffusion.WARMUP_STEPS) * (1 - number / total_steps)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        decay = min(train_diffusion.EMA_DECAY, (1 + number) / (10 + number))
        get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)

    return model, step


def diffusers_net(num_classes: int | None = None) -> nn.Module:
    """The network of the Hugging Face diffusion course, with diffusers' own labels if wanted."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=num_classes,
    )


def denoising_diffusion_pytorch_net() -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(64, dim_mults=(1, 2), channels=1)


def smalldiffusion_net() -> nn.Module:
    from smalldiffusion import Unet

    return Unet(28, 1, 1, ch=64, ch_mult=(1, 1, 2))


PEERS = {
    "diffusers UNet2DModel": diffusers_net,
    "denoising-diffusion-pytorch Unet(64, (1, 2))": denoising_diffusion_pytorch_net,
    "smalldiffusion Unet (1, 1, 2)": smalldiffusion_net,
}


def peer_step(
    build: Callable[[], nn.Module], device: torch.device
) -> tuple[nn.Module, Callable[[], object]]:
    """A plain training step: noise, prediction, MSE, clipping, AdamW, in our precision."""
    torch.manual_seed(0)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = NoiseScheduler().to(device)
    x_0 = torch.rand(BATCH_SIZE, 1, 28, 28, device=device) * 2 - 1

    def step() -> None:
        t = torch.randint(0, 1000, (BATCH_SIZE,), device=device)
        x_t, noise = scheduler.add_noise(x_0, t)
        with autocast(device):
            output = model(x_t, t)
        noise_pred = output if isinstance(output, torch.Tensor) else output.sample
        loss = F.mse_loss(noise_pred.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


def make(name: str, device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    return our_step(device) if name == "ours" else peer_step(PEERS[name], device)


def seconds(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def convolution_rate(device: torch.device) -> float:
    """GFLOP/s of the best 3x3 convolution, both ways, of the sizes that such networks use."""
    rates = []
    for channels, size in ((48, 14), (64, 14), (96, 14), (64, 7), (96, 7), (128, 7), (128, 14)):
        x = (
            torch.randn(BATCH_SIZE, channels, size, size, device=device)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
        )
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        layer.to(device, memory_format=torch.channels_last)
        gradient = torch.randn_like(x)

        def both(layer=layer, x=x, gradient=gradient) -> None:
            x.grad = layer.weight.grad = layer.bias.grad = None
            with autocast(device):
                y = layer(x)
            y.backward(gradient.to(y.dtype))

        seconds(both, 3, device)
        flops = 3 * 2 * 9 * channels**2 * size**2 * BATCH_SIZE
        rates += [flops / seconds(both, 5, device) / 1e9 for _ in range(3)]
    return max(rates)


def flops_per_image(step: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / BATCH_SIZE


def peak_memory(name: str, device: torch.device) -> int | None:
    """MiB after three steps in a process of its own; None where the system does not say.

    On the CPU it is the memory of the process, on a GPU that of the device.
    """
    command = [sys.executable, __file__, "--device", str(device), "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def print_peak_memory(name: str, device: torch.device) -> None:
    _, step = make(name, device)
    for _ in range(3):
        step()
    peak = None
    if device.type == "cuda":
        peak = round(torch.cuda.max_memory_allocated() / 2**20)
    elif resource is not None:
        unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
    print(json.dumps(peak))


def summary(values: list[float]) -> dict[str, float]:
    """The median of all rounds, the lowest and the highest."""
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--rounds", type=int, default=5, help="rounds over all contenders (%(default)s)")
    add("--without-peers", action="store_true", help="ours alone")
    add("--memory-of", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = train_diffusion.choose_device(args.device)
    if args.memory_of:
        return print_peak_memory(args.memory_of, device)

    # Memory first: a process inherits the peak of the one that starts it.
    names = ["ours", *([] if args.without_peers else PEERS)]
    memory = {name: peak_memory(name, device) for name in names}
    contenders = {name: make(name, device) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    conv_rates = []
    for _ in range(args.rounds + 1):
        conv_rates.append(convolution_rate(device))
        for name, (_, step) in contenders.items():
            repeats = 20 if name == "ours" or device.type == "cuda" else 2
            rates[name].append(BATCH_SIZE / seconds(step, repeats, device))
    our_rates = rates["ours"][1:]  # the first round warms up
    our_flops = flops_per_image(contenders["ours"][1])
    for name, (model, _) in contenders.items():
        ratios = [ours / this for ours, this in zip(our_rates, rates[name][1:])]
        figures = {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "batch_size": BATCH_SIZE,
            "training_images_per_second": summary(rates[name][1:]),
            "ours_over_this": summary(ratios),
            "peak_memory_mib": memory[name],
        }
        print(json.dumps(figures), flush=True)
    shares = [rate * our_flops / 1e9 / best for rate, best in zip(our_rates, conv_rates[1:])]
    figures = {
        "training_mflop_per_image": round(our_flops / 1e6),
        "convolution_gflop_per_second": summary(conv_rates[1:]),
        "share_of_convolution_rate": summary(shares),
    }
    print(json.dumps(figures), flush=True)

    # With guidance every step of sampling looks at each image twice, with its label and without.
    scheduler = NoiseScheduler().to(device)
    model = UNet(scheduler, num_classes=NUM_CLASSES).eval()
    model.to(device, memory_format=train_diffusion.memory_format(device))
    ways = {"default": {}, "0": {"guidance": 0}}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds + 1):
        for way, options in ways.items():

            def draw(options=options) -> None:
                train_diffusion.sample(model, scheduler, NUM_SAMPLES, **options)

            times[way].append(seconds(draw, 1, device))
    for way, options in ways.items():
        figures = {
            "sampling_seconds": summary(times[way][1:]),
            "images": NUM_SAMPLES,
            "steps": train_diffusion.SAMPLE_STEPS,
            "guidance": options.get("guidance", train_diffusion.GUIDANCE),
        }
        print(json.dumps(figures), flush=True)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({**versions, "rounds": args.rounds, "device": name}))


if __name__ == "__main__":
    main()
