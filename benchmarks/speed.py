"""How fast does it train and sample, beside other projects' networks and beside what the machine can do?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py

One process, all contenders in turn, round after round, so that whatever else the machine does falls on all of them; medians
with the lowest and highest round. Peak memory is that of a process of its own for each. Prints one line of JSON per figure.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_diffusion  # noqa: E402

BATCH_SIZE = 128


def our_step(device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    """The program's own training step, with everything that it does, on real images."""
    options = train_diffusion.parse_options(["--quiet", "--batch-size", str(BATCH_SIZE)])
    images = train_diffusion.load_images("MNIST", ROOT / "data", train=True)[:BATCH_SIZE].to(device)
    run = train_diffusion.Run(options, 60_000, device, state=None)
    return run.model, lambda: train_diffusion.train_step(run, images)


def diffusers_net() -> nn.Module:
    """The network of the Hugging Face diffusion course, unit 1."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
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


def peer_step(build: Callable[[], nn.Module], device: torch.device) -> tuple[nn.Module, Callable[[], object]]:
    """A plain training step: noise, prediction, MSE, clipping, AdamW, in the precision that ours uses."""
    torch.manual_seed(0)
    model = build().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = train_diffusion.NoiseScheduler().to(device)
    x_0 = torch.rand(BATCH_SIZE, 1, 28, 28, device=device) * 2 - 1

    def step() -> None:
        t = torch.randint(0, 1000, (BATCH_SIZE,), device=device)
        x_t, noise = scheduler.add_noise(x_0, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(x_t, t)
        loss = F.mse_loss((output if isinstance(output, torch.Tensor) else output.sample).float(), noise)
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
    """GFLOP/s of the best plain 3x3 convolution, forward and backward, among the sizes that such networks use."""
    rates = []
    for channels, size in ((48, 14), (64, 14), (96, 14), (64, 7), (96, 7), (128, 7), (128, 14)):
        x = (
            torch.randn(BATCH_SIZE, channels, size, size, device=device)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
        )
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(device, memory_format=torch.channels_last)
        gradient = torch.randn_like(x)

        def both(layer=layer, x=x, gradient=gradient) -> None:
            x.grad = layer.weight.grad = layer.bias.grad = None
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
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


def peak_memory(name: str, device: torch.device) -> float:
    """MiB: of the process on the CPU, of the device's memory on a GPU, after three steps in a process of its own."""
    command = [sys.executable, __file__, "--device", str(device), "--memory-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(name: str, device: torch.device) -> None:
    _, step = make(name, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "low": round(min(values), 2), "high": round(max(values), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over all contenders (default: 5)")
    parser.add_argument("--without-peers", action="store_true", help="ours alone")
    parser.add_argument("--memory-of", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = train_diffusion.choose_device(args.device)
    if args.memory_of:
        return print_peak_memory(args.memory_of, device)

    names = ["ours", *([] if args.without_peers else PEERS)]
    memory = {
        name: peak_memory(name, device) for name in names
    }  # first: a process inherits the peak of the one that starts it
    contenders = {name: make(name, device) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    conv_rates = []
    for _ in range(args.rounds + 1):
        conv_rates.append(convolution_rate(device))
        for name, (_, step) in contenders.items():
            repeats = 20 if name == "ours" or device.type == "cuda" else 2
            rates[name].append(BATCH_SIZE / seconds(step, repeats, device))
    our_flops = flops_per_image(contenders["ours"][1])
    for name, (model, _) in contenders.items():
        figures = {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "training_images_per_second": summary(rates[name][1:]),  # the first round warms up
            "ours_over_this": summary([ours / this for ours, this in zip(rates["ours"][1:], rates[name][1:])]),
            "peak_memory_mib": round(memory[name]),
        }
        print(json.dumps(figures), flush=True)
    shares = [rate * our_flops / 1e9 / best for rate, best in zip(rates["ours"][1:], conv_rates[1:])]
    print(
        json.dumps(
            {
                "training_mflop_per_image": round(our_flops / 1e6),
                "convolution_gflop_per_second": summary(conv_rates[1:]),
                "share_of_convolution_rate": summary(shares),
            }
        )
    )

    scheduler = train_diffusion.NoiseScheduler().to(device)
    model = train_diffusion.UNet(scheduler).to(device, memory_format=torch.channels_last).eval()
    options = train_diffusion.parse_options(["--sample-only", "--quiet"])
    times = [seconds(lambda: train_diffusion.sample(model, scheduler, options), 1, device) for _ in range(args.rounds + 1)]
    print(
        json.dumps({"sampling_seconds": summary(times[1:]), "images": options.num_samples, "steps": options.sample_steps})
    )
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": args.rounds}
    print(json.dumps({**versions, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}))


if __name__ == "__main__":
    main()
