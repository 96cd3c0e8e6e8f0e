"""Where a training run stands, and how it is begun, saved, resumed and stopped."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from support.checkpoints import Checkpoint, save_checkpoint
from support.files import clear_leftovers, put_aside
from support.messages import DivergedError, InputError, explained, not_vital, say
from support.processes import this_process

# What a run writes.
RUN_FILES = ["checkpoint.pt", "weights.pt", "train_log.csv", "loss_curve.png", "noise_schedule.png"]
RUN_FILES += ["forward_process.png", "denoising.png", "denoising.gif", "samples_epoch_*.png"]


@dataclass
class Run:
    """What a run has done so far. Epochs count from 1; one that was looked at has a row."""

    path: Path  # of its checkpoint
    constant: Checkpoint  # what of it stays the same in a run
    losses: Tensor  # of the current epoch's steps, float32 [steps per epoch]
    last_step: int  # at which it ends
    step: int = 0
    seconds: float = 0.0  # of training: neither looking nor drawing counts
    history: list[dict[str, float]] = field(default_factory=list)  # rows, as in train_log.csv
    clock: float = 0.0  # when the last step ended, as time.monotonic() says
    saved_at: float = 0.0  # by the same clock

    # --- the current epoch ------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The current epoch: the first that was not looked at."""
        return len(self.history) + 1

    @property
    def is_over(self) -> bool:
        return self.step >= self.last_step

    @property
    def start(self) -> int:
        """How many steps there are before the current epoch."""
        return len(self.history) * len(self.losses)

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all of its steps are done, so that it only has to be looked at."""
        return self.step == self.start + len(self.losses)

    @property
    def rest_of_epoch(self) -> slice:
        """Which of the current epoch's steps are left to do, counted from its start."""
        return slice(self.step - self.start, self.last_step - self.start)

    def start_clock(self) -> None:
        self.clock = self.saved_at = time.monotonic()

    def count(self, loss: Tensor) -> None:
        """One more step, with this loss."""
        self.losses[self.step - self.start] = loss
        now = time.monotonic()
        self.step, self.seconds, self.clock = self.step + 1, self.seconds + now - self.clock, now

    def mean_loss(self) -> float:
        """Of the current epoch's steps so far. Makes the CPU wait for a GPU."""
        return self.losses[: self.step - self.start].mean().item()

    def show_loss(self, bar: "tqdm[Tensor]") -> None:
        """Beside the progress bar, where somebody sees one: fetching it makes the CPU wait."""
        if not bar.disable:
            bar.set_postfix(loss=f"{self.mean_loss():.4f}")

    def warn_if_useless(self) -> None:
        """A network that always says 0 has a loss of 1, the variance of the noise."""
        if self.mean_loss() > 1:
            problem = "a network that says nothing has 1, so this one has learned nothing"
            say(
                f"warning: the loss is {self.mean_loss():.2f}; {problem}. Try a lower --lr",
                sys.stderr,
            )

    def stop_if_not_finite(self) -> None:
        """End the run at a loss that is infinite or no number: nothing is learned after that."""
        bad = (~self.losses[: self.step - self.start].isfinite()).nonzero().flatten().tolist()
        if bad:
            problem = f"the loss is not finite at step {self.start + bad[0] + 1}. Try a lower --lr"
            raise DivergedError(f"{problem}. {self.path} holds the last good state")

    def end_epoch(self, row: dict[str, float]) -> None:
        """The current epoch was looked at: the next one is the current one."""
        self.history.append(row)

    # --- its checkpoint ---------------------------------------------------------------------------

    def begin(self, learned: Checkpoint) -> None:
        """Put an earlier run's files aside and write the first checkpoint of this one."""
        if this_process().rank == 0:
            clear_leftovers(self.path.parent)
            put_aside(self.path.parent, RUN_FILES)
        self.save(learned)

    def save(self, learned: Checkpoint) -> None:
        """Write all that a run needs to go on; the first process does it for all."""
        own: Checkpoint = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        if this_process().rank == 0:
            save_checkpoint(self.path, {**self.constant, **learned, **own, "history": self.history})
        self.saved_at = time.monotonic()

    def save_weights(self, learned: Checkpoint) -> None:
        """Write weights.pt: the averaged weights alone, to draw with."""
        with not_vital("weights.pt"):
            state: Checkpoint = {
                "scheduler": self.constant["scheduler"],
                "unet": self.constant["unet"],
                "class_names": self.constant["class_names"],
                "ema": learned["ema"],
            }
            save_checkpoint(self.path.with_name("weights.pt"), state)

    def resume(self, saved: Checkpoint, load: Callable[[Checkpoint], None]) -> None:
        """Stand where the saved run stood; `load` takes over what it had learned."""
        if this_process().rank == 0:
            clear_leftovers(self.path.parent)
        if any(saved.get(name) != self.constant.get(name) for name in ("unet", "check_sums")):
            images = self.constant["settings"]["dataset"]
            problem = f"the images of {images} are not what {self.path} was trained on"
            if str(images).endswith(".npz"):
                problem += " (or held out: earlier versions held out the last ones)"
            raise InputError(f"--resume: {problem}. Give their --dataset or --data-dir")
        other = (KeyError, ValueError, RuntimeError)  # as PyTorch finds other names and shapes
        with explained(self.path, "does not fit this program", "Name another --output-dir", other):
            load(saved)
            self.step, self.seconds = saved["step"], saved["seconds"]
            self.losses, self.history = saved["losses"].to(self.losses.device), saved["history"]

    def say_the_end(self) -> None:
        minutes = f"{self.seconds / 60:.1f} min of training"
        say(f"done: {self.step} steps, {minutes}; all files are in {self.path.parent}")

    def say_what_comes(self, device: torch.device) -> None:
        if self.is_over:
            asked = f"{self.last_step} are asked for. Give more --epochs, or --max-steps"
            say(f"nothing left to train: {self.path} is at step {self.step}, and {asked}")
        else:
            steps = f"from step {self.step} to {self.last_step}"
            say(f"training on {device}, {steps}; each epoch gets a line")
