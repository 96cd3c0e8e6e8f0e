"""How fast do they train, how much memory does it take, and how long does drawing take?

    python -m pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py

The contenders of race.py, each trained by its own recipe, in turn, round after round, so that
whatever else the machine does falls on all of them; medians with the lowest and the highest round.
Peak memory is that of a process of its own for each. Prints one line of JSON per figure.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from quality import NUM_CLASSES, mnist
from race import CONTENDERS, training

import train_diffusion
from forward_reverse_process import NoiseScheduler, UNet

NUM_SAMPLES = 64  # digits that are drawn to time sampling
ROUND_SECONDS = 5  # of training for each contender in a round, at least


def peak_memory(name: str) -> int | None:
    """MiB of a process that trains for three steps; None where the system does not say."""
    command = [sys.executable, __file__, "--memory-of", name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def print_peak_memory(name: str) -> None:
    steps = training(CONTENDERS[name](), *mnist()[0])
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    everyone, (ours, *_) = list(CONTENDERS), CONTENDERS
    add("--rounds", type=int, default=5, help="rounds over all contenders (%(default)s)")
    add("--contenders", nargs="+", choices=everyone, default=everyone, help="(all)")
    add("--memory-of", choices=everyone, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_peak_memory(args.memory_of)

    # Memory first: a process inherits the peak of the one that starts it.
    names = list(dict.fromkeys([ours, *args.contenders]))
    memory = {name: peak_memory(name) for name in names}
    torch.manual_seed(0)
    contenders = {name: CONTENDERS[name]() for name in names}
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

    # With guidance every step of sampling looks at each image twice, with its label and without.
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
