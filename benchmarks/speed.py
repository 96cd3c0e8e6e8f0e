"""How fast do they train, how much memory does it take, and how long does drawing take?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py

The contenders of race.py, each trained by its own recipe, in turn, round after round, so that
whatever else the machine does falls on all of them; medians with the lowest and the highest round.
Peak memory is that of a process of its own for each. Then how near this program comes to what the
machine can do: how many floating-point operations an image takes, how many a second the machine
does in a product of two large matrices, and where a training step's time goes. Prints one line of
JSON per figure.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from quality import NUM_CLASSES, mnist
from race import CONTENDERS, EVERYONE, Contender, training
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train_diffusion
from forward_reverse_process import NoiseScheduler, UNet
from support.options import number

NUM_SAMPLES = 64  # digits that are drawn to time sampling
ROUND_SECONDS = 5  # of training for each contender in a round, at least


def peak_memory(name: str) -> int | None:
    """MiB of a process that trains for three steps; None where the system does not say."""
    command = [sys.executable, __file__, "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def print_peak_memory(name: str) -> None:
    steps = training(EVERYONE[name](), *mnist()[0])
    for _ in range(3):
        next(steps)
    peak = None
    if sys.platform != "win32":  # which does not say
        import resource

        unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)
    print(json.dumps(peak))


def summary(values: list[float]) -> dict[str, float]:
    """The median of all rounds, the lowest and the highest."""
    figures = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: round(value, 2) for name, value in figures.items()}


def matrix_rate(size: int = 2048) -> float:
    """Floating-point operations a second in a product of two square matrices: the best of ten."""
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def operations_of_an_image(contender: Contender, images: Tensor, labels: Tensor) -> float:
    """Floating-point operations, there and back, in products and convolutions, of one image."""
    with FlopCounterMode(display=False) as counter:
        contender.loss(images, labels).backward()
    return counter.get_total_flops() / len(images)


# What the profiler calls the parts of a step, by the beginnings of names of PyTorch's operations.
PARTS = {
    "convolutions": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "normalization": ("aten::native_group_norm",),
    "Muon's and other products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
}


def shares_of_a_step(steps: Iterator[object], num_steps: int = 20) -> dict[str, float]:
    """The share of each part in the time of a training step, by PyTorch's profiler."""
    with torch.profiler.profile() as profiler:
        for _ in range(num_steps):
            next(steps)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = {
        part: sum(event.self_cpu_time_total for event in events if event.key.startswith(names))
        for part, names in PARTS.items()
    }
    shares["the rest"] = total - sum(shares.values())
    return {part: round(share / total, 3) for part, share in shares.items()}


def nearness(batch_size: int, rates: list[float], steps: Iterator[object]) -> dict[str, object]:
    """How near this program's training, at these images a second, comes to the machine's limit."""
    images, labels = (part[:batch_size] for part in mnist()[0])
    x_0 = train_diffusion.to_model(images)
    operations = operations_of_an_image(CONTENDERS["this repository"](), x_0, labels)
    limit = matrix_rate()
    return {
        "operations_per_image": operations,
        "matrix_operations_per_second": limit,
        "share_of_it_in_training": round(operations * statistics.median(rates) / limit, 3),
        "shares_of_a_step": shares_of_a_step(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    everyone, ours = list(EVERYONE), "this repository"
    rounds = "rounds over all contenders (%(default)s)"
    add("--rounds", type=number(int, 1, 1000), default=5, help=rounds)
    add("--contenders", nargs="+", choices=everyone, default=list(CONTENDERS), help="(no variants)")
    add("--memory-of", choices=everyone, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_peak_memory(args.memory_of)

    # Memory first: a process inherits the peak of the one that starts it.
    names = list(dict.fromkeys([ours, *args.contenders]))
    memory = {name: peak_memory(name) for name in names}
    torch.manual_seed(0)
    contenders = {name: EVERYONE[name]() for name in names}
    steps = {name: training(contender, *mnist()[0]) for name, contender in contenders.items()}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds + 1):
        for name in names:
            before, seen_before, _ = next(steps[name])
            seconds = before
            while seconds - before < ROUND_SECONDS:
                seconds, seen, _ = next(steps[name])
            rates[name].append((seen - seen_before) / (seconds - before))
    for name, contender in contenders.items():  # the first round warms up
        ratios = [our / this for our, this in zip(rates[ours][1:], rates[name][1:])]
        figures = {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
            "batch_size": contender.batch_size,
            "training_images_per_second": summary(rates[name][1:]),
            "ours_over_this": summary(ratios),
            "peak_memory_mib": memory[name],
        }
        print(json.dumps(figures), flush=True)

    print(
        json.dumps(nearness(contenders[ours].batch_size, rates[ours][1:], steps[ours])), flush=True
    )

    # A guided step of sampling looks at each image twice, with its label and without.
    scheduler = NoiseScheduler()
    model = UNet(scheduler, num_classes=NUM_CLASSES).eval().to(memory_format=torch.channels_last)
    times: dict[float, list[float]] = {train_diffusion.GUIDANCE: [], 0: []}
    for _ in range(args.rounds + 1):
        for guidance, seconds_each in times.items():
            started = time.perf_counter()
            train_diffusion.sample(model, scheduler, NUM_SAMPLES, guidance=guidance)
            seconds_each.append(time.perf_counter() - started)
    for guidance, seconds_each in times.items():
        figures = {"sampling_seconds": summary(seconds_each[1:]), "images": NUM_SAMPLES}
        figures |= {"steps": train_diffusion.SAMPLE_STEPS, "guidance": guidance}
        print(json.dumps(figures), flush=True)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({**versions, "rounds": args.rounds}))


if __name__ == "__main__":
    main()
