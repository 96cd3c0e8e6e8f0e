"""Train a denoising diffusion model on MNIST and draw digits with it.

    python train_diffusion.py                                # the whole job: train, sample, save
    python train_diffusion.py --resume                       # go on after an interruption
    python train_diffusion.py --sample-only --labels 3 1 4   # draw with a trained network
    python train_diffusion.py --dataset my_pictures --image-size 32  # train on your own pictures
    torchrun --standalone --nproc-per-node=2 train_diffusion.py   # several processes or GPUs

forward_reverse_process.py has the mathematics and the network; read that first. Here is what is
done with them, in this order: one step of training (DDPM's Algorithm 1), sampling (Algorithm 2,
DDIM, guidance), the loop of training, pictures of the forward and the reverse process, the command
line. What is not about diffusion is in support/.
"""

import argparse
import copy
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from forward_reverse_process import NORM_GROUPS, NoiseScheduler, UNet
from support import checkpoints, datasets, files, messages, options, pictures, processes
from support.checkpoints import Checkpoint, NetworkShape, Schedule
from support.datasets import load_images as load_images  # for whoever imports it from here
from support.devices import autocast, choose_device, images_together, memory_format, pieces
from support.interruption import Interruption, heard_interruptions
from support.messages import InputError, say
from support.optimizers import LEARNING_RATES, ema_decay, make_optimizers
from support.run import Run

# --- Images: uint8 [N, C, H, W] outside the model, float32 in [-1, 1] inside ----------------------


def to_model(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x_0: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((x_0 + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# --- One step of training -------------------------------------------------------------------------

MAX_GRAD_NORM = 1.0  # a longer gradient is shortened to this length


def draw_timesteps(
    scheduler: NoiseScheduler, images: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps for a batch: int64 [B], in 0 ... T - 1, evenly spaced from a random start.

    After T - 1 comes 0 again. So each image's timestep is uniform, as in DDPM, but they are not
    independent: every batch covers all amounts of noise, and its loss and its gradient vary less
    (the low-discrepancy sampler of Kingma et al. 2021, arXiv:2107.00630, appendix I.1).
    """
    T, B, device = scheduler.num_timesteps, len(images), images.device
    start = torch.randint(T, (1,), generator=generator, device=device)
    return (start + torch.arange(B, device=device) * T // B) % T


def training_loss(
    model: UNet,
    scheduler: NoiseScheduler,
    x_0: Tensor,
    labels: Tensor | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The mean squared error of the predicted noise (DDPM, eq. 14), for each image: float32 [B].

    DDPM's Algorithm 1 without the gradient step. Many noises fit the same x_t. Of all answers to
    it, their mean has the least squared error on average. So the network learns this mean, all that
    a small step back needs (`NoiseScheduler.predict_x0`, `posterior`). A bound on the probability
    of the images leads to the same loss, with weights (docs/derivations.md, section 4).

    Args:
        x_0: clean images in [-1, 1], [B, C, H, W].
        labels: int64 [B], or None: all unlabeled.
        t: int64 [B] in 0 ... T - 1; from `draw_timesteps` if not given.
        noise: shaped like x_0; drawn if not given.
    """
    if t is None:
        t = draw_timesteps(scheduler, x_0)
    x_t, noise = scheduler.add_noise(x_0, t, noise)
    noise_pred = model(x_t, t, labels)
    return (noise - noise_pred).square().mean(dim=(1, 2, 3))


@dataclass
class Learner:
    """What a training step changes. `state` is what a checkpoint keeps of it."""

    model: UNet
    ema: UNet  # to sample with: model's moving average, steadier (arXiv:2006.09011, section 4)
    optimizers: list[torch.optim.Optimizer]

    def state(self) -> Checkpoint:
        weights: Checkpoint = {"model": self.model.state_dict(), "ema": self.ema.state_dict()}
        return {**weights, "optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved["model"])
        self.ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def training_step(
    learner: Learner,
    scheduler: NoiseScheduler,
    images: Tensor,
    labels: Tensor | None,
    step: int,
    lr: float,
    label_dropout: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DDPM's Algorithm 1 on a batch. Returns the mean loss, nan if the gradient is not finite.

    Args:
        images: uint8 [B, C, H, W]; labels: int64 [B], or None: all unlabeled.
        step: how many steps came before.
        lr: the learning rate.
        label_dropout: how probable it is that a label is dropped, for `guided_noise`.
        generator: for all random draws, on the images' device.
    """
    model, device = learner.model, images.device

    # Draw a timestep and noise for every image, and which labels to drop. (If there are several
    # processes, each draws for the whole batch and keeps its share.)
    x_0 = processes.share(to_model(images))
    t = draw_timesteps(scheduler, images, generator)
    noise = torch.randn(images.shape, generator=generator, device=device)
    t, noise = processes.share(t), processes.share(noise)
    if labels is not None:
        dropped = torch.rand(len(images), generator=generator, device=device) < label_dropout
        labels = processes.share(labels.masked_fill(dropped, model.no_label))

    # Predict the noise, in bfloat16 where the GPU has it.
    with autocast(device):
        loss = training_loss(model, scheduler, x_0, labels, t, noise).mean()

    # Learn: one step down the gradient, which is the mean over all processes.
    model.zero_grad()
    loss.backward()
    loss, weights = loss.detach(), list(model.parameters())
    processes.average([loss, *(weight.grad for weight in weights if weight.grad is not None)])
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
    for optimizer in learner.optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    # Average the weights (DDPM, appendix B): ema = decay ema + (1 - decay) model.
    get_ema_multi_avg_fn(ema_decay(step))(list(learner.ema.parameters()), weights, None)
    return torch.where(grad_norm.isfinite(), loss, torch.nan)  # nan: `train` gives up


# --- Sampling -------------------------------------------------------------------------------------

SAMPLE_STEPS = 25  # timesteps that sampling visits, of T
GUIDANCE = 0.5  # strength of classifier-free guidance
GUIDANCE_INTERVAL = (0.2, 0.8)  # it is used while alpha-bar_t is between these
NUM_SAMPLES = 100  # images to draw if nobody says how many; a grid has full rows


def sampling_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Evenly spaced timesteps, decreasing from T - 1: 999, 959, ..., 39 for 25 steps of 1000."""
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps (--sample-steps) is {num_steps}, not 1 to {num_timesteps}")
    return [num_timesteps * (num_steps - i) // num_steps - 1 for i in range(num_steps)]


def guided_noise(
    model: UNet, x_t: Tensor, t: int, labels: Tensor | None, guidance: float
) -> Tensor:
    """noise_pred by classifier-free guidance (Ho, Salimans 2022, arXiv:2207.12598, eq. 6).

        noise_pred = (1 + w) eps_theta(x_t, t, label) - w eps_theta(x_t, t, no label)
                   = eps_theta(x_t, t, label) + w (labeled - unlabeled)

    w is `guidance`; many libraries write s = 1 + w. One network knows both terms, since training
    drops some labels.

    The mean noise is -sqrt(1 - alpha-bar_t) times the gradient of log q(x_t) (docs/derivations.md,
    section 5): it points to where x_t is less probable. With the label, it is that of
    log q(x_t | label). By Bayes' rule log q(label | x_t) is log q(x_t | label) - log q(x_t), plus
    log q(label), which does not depend on x_t. So for a perfect network the difference, labeled -
    unlabeled, points to where the label is less probable. It is added to the noise, and a step
    takes noise away: the label becomes more probable. Images that could be of another class become
    rare. What remains is clearer, but more alike. A guided step costs double.
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
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The reverse process, from pure noise to images, a step at a time.

    With all T steps, eta = 1 and no guidance this is DDPM's Algorithm 2, but for the clamp. Fewer
    steps are longer jumps: `NoiseScheduler.step` says why they are allowed, and what they lack. How
    many are enough must be measured. From 25 steps to 50, digits come perhaps a little nearer to
    real ones; from 50 to 100 they do not (benchmarks/RESULTS.md).

    Args:
        x_T: noise from N(0, I), [B, C, H, W].
        labels: what to draw, int64 [B], or None: all unlabeled.
        num_steps: timesteps to visit, 1 to T.
        eta: see `NoiseScheduler.step`.
        guidance: w of `guided_noise`; without labels there is none.
        generator: for the fresh noise.
        guidance_interval: guide only where alpha-bar_t lies between these. At a lower alpha-bar
            guidance costs variety, at a higher one it changes little (Kynkaanniemi et al. 2024,
            arXiv:2404.07724). The default limits were found by trial.

    Yields:
        At each timestep (t, x_t, x_0_pred in [-1, 1]), and last (-1, image, image).
    """
    timesteps = sampling_timesteps(scheduler.num_timesteps, num_steps)
    low, high = guidance_interval
    alphas_cumprod = scheduler.alphas_cumprod.tolist()  # once: each read waits for the GPU
    x_t = x_T
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1]):
        w = guidance if low <= alphas_cumprod[t] <= high else 0
        noise_pred = guided_noise(model, x_t, t, labels, w)
        yield t, x_t, scheduler.predict_x0(x_t, t, noise_pred).clamp(-1, 1)
        noise = torch.randn(x_t.shape, generator=generator, device=x_t.device)  # unused at the end
        x_t = scheduler.step(x_t, t, noise_pred, t_prev, eta, noise)
    yield -1, x_t, x_t


def sample(
    model: UNet,
    scheduler: NoiseScheduler,
    num_samples: int | None = None,
    labels: Sequence[int | str] | Tensor | None = None,
    num_steps: int = SAMPLE_STEPS,
    eta: float = 1.0,
    guidance: float = GUIDANCE,
    seed: int = 0,
    guidance_interval: tuple[float, float] = GUIDANCE_INTERVAL,
) -> Tensor:
    """Draw images, uint8 [N, C, H, W]: with the same seed and options, the same on every call.

    Without labels, a model that has classes draws them in turn.

    Args:
        num_samples: how many; as many as labels if those are given, else 100.
        labels: what to draw, whole numbers from 0 to the model's num_classes - 1, or class names.
        num_steps, eta, guidance, guidance_interval: see `denoise`.
    """
    device = scheduler.betas.device
    known = model.num_classes, model.class_names
    num_samples, y = datasets.labels_to_draw(num_samples, labels, NUM_SAMPLES, *known)
    generator = generator_for("sampling", seed, device)
    how = num_steps, eta, guidance, generator, guidance_interval
    images = []
    for part in messages.progress_bar(pieces(num_samples, model.image_shape), "sampling"):
        size = part.stop - part.start
        x_T = torch.randn(size, *model.image_shape, generator=generator, device=device)
        some = None if y is None else y[part].to(device)
        for _, x_t, _ in denoise(model, scheduler, x_T, some, *how):
            pass  # to the last, which is x_0
        images.append(to_uint8(x_t))
    return torch.cat(images)


def generator_for(purpose: str, seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator for every purpose: sampling cannot change what training draws next."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{purpose}, seed {seed}".encode()))


def load_model(
    path: str | Path = files.REPOSITORY / "pretrained.pt", device: torch.device | str = "cpu"
) -> tuple[UNet, NoiseScheduler]:
    """The averaged network in a checkpoint (by default the repository's own), and its schedule."""
    path = Path(path).expanduser()
    saved = checkpoints.load_checkpoint(path)
    model, scheduler = build_model(saved["scheduler"], saved["unet"], torch.device(device))
    problem, remedy = "holds another network than this program's", "Name another one"
    with messages.explained(path, problem, remedy, (RuntimeError,)):
        model.load_state_dict(saved["ema"])
    model.class_names = saved.get("class_names")
    return model.eval(), scheduler


def build_model(
    schedule: Schedule, shape: NetworkShape, device: torch.device
) -> tuple[UNet, NoiseScheduler]:
    """A new network and its schedule, on the device."""
    scheduler = NoiseScheduler(**schedule).to(device)
    model = UNet(scheduler, **shape).to(device)
    return model.to(memory_format=memory_format(device)), scheduler


# --- The loop of training -------------------------------------------------------------------------

WARMUP_STEPS = 200  # training steps in which the learning rate rises
CHECK_EVERY = 20  # training steps between two looks at the loss; each makes the CPU wait for a GPU
SAVE_EVERY = 300  # seconds between checkpoints within an epoch; a killed run loses up to that


@torch.enable_grad()
def train(args: argparse.Namespace, device: torch.device, interruption: Interruption) -> None:
    """The whole run: from the images to the trained network and its pictures.

    With several processes, each draws what one alone would draw for the whole batch, and works on
    its share. Gradients are averaged, so the result is that of one process, up to rounding.
    """
    folder, path = args.output_dir, args.output_dir / "checkpoint.pt"
    alone = processes.this_process().world_size == 1
    first = processes.this_process().rank == 0  # it alone draws and speaks

    # Load.
    source = args.dataset, args.data_dir, args.image_size
    data = datasets.load_data(*source, device, labeled=args.label_dropout < 1)
    if args.batch_size > len(data.images):
        raise InputError(f"argument --batch-size: only {len(data.images)} images are to train on")
    say(data.summary, aloud=first)
    steps_per_epoch = len(data.images) // args.batch_size
    total_steps = args.epochs * steps_per_epoch

    # Build.
    schedule: Schedule = {"num_timesteps": args.timesteps, "schedule": args.schedule}
    shape: NetworkShape = {
        "image_shape": data.image_shape,
        "base_channels": args.base_channels,
        "num_classes": data.num_classes,
    }
    torch.manual_seed(args.seed)  # for the initial weights; later draws have their own generators
    model, scheduler = build_model(schedule, shape, device)
    processes.take_over_from_first(model.parameters())
    learner = Learner(model, copy.deepcopy(model).eval(), make_optimizers(model, args.optimizer))
    named: Checkpoint = {"scheduler": schedule, "unet": shape, "class_names": data.class_names}
    constant: Checkpoint = {**named, "settings": args.settings, "check_sums": data.check_sums}
    losses = torch.zeros(steps_per_epoch, device=device)  # one for each step of an epoch
    run = Run(path, constant, losses, min(total_steps, args.max_steps or total_steps))

    # Resume, or save at once, so that a run can be resumed whenever it is interrupted.
    if args.resume:
        run.resume(args.saved, learner.load_state)
    else:
        run.begin(learner.state())
    interruption.resumable = True
    if first:
        draw_noise_schedule(folder / "noise_schedule.png", args.timesteps)
        few = data.held_out_images[:4]
        draw_forward_process(folder / "forward_process.png", scheduler, few, args.seed)
        run.say_what_comes(device)

    # Train. (A run that was killed after an epoch, but before its `look`, still has to look.)
    while run.epoch_is_complete or not run.is_over:
        draws = generator_for(f"epoch {run.epoch}", args.seed)
        order = torch.randperm(len(data.images), generator=draws).to(device)
        batches = order[: steps_per_epoch * args.batch_size].view(steps_per_epoch, -1)
        left = list(batches[run.rest_of_epoch])
        bar = messages.progress_bar(left, f"epoch {run.epoch}", first)
        interruption.deferred = True
        run.start_clock()
        for which in bar:
            # The learning rate rises in the first steps, and falls on a line to 0. Draws depend on
            # the step alone, so that a resumed run repeats them.
            lr = args.lr * min(1, (run.step + 1) / WARMUP_STEPS) * (1 - run.step / total_steps)
            draws = generator_for(f"step {run.step}", args.seed, device)
            images, labels = data.batch(which)
            loss = training_step(
                learner, scheduler, images, labels, run.step, lr, args.label_dropout, draws
            )
            run.count(loss)

            if run.step % CHECK_EVERY == 0:
                run.stop_if_not_finite()
                run.show_loss(bar)
                if run.clock - run.saved_at > SAVE_EVERY:
                    run.save(learner.state())
            all_meet = alone or run.step % CHECK_EVERY == 0  # processes wait for each other
            if all_meet and processes.any_process(interruption.received, device):
                break
        bar.close()

        # Save first, then look. So an interrupted look loses no training: --resume repeats it.
        run.stop_if_not_finite()
        run.save(learner.state())
        interruption.deferred = not alone
        if processes.any_process(interruption.received, device):
            raise KeyboardInterrupt(*interruption.received)
        row = look(args, data, scheduler, learner.ema, run) if first else {}
        processes.wait_for_all()
        if run.epoch_is_complete:  # else --max-steps cut it short; --resume completes it
            run.end_epoch(row)
            run.save(learner.state())  # with the row, so that a resumed run does not look again

    if first:
        run.save_weights(learner.state())
        with messages.not_vital("denoising.png, denoising.gif"):
            draw_denoising(folder, learner.ema, scheduler, args)
        run.say_the_end()
        say(f"draw more: {options.command_line(SCRIPT, '--sample-only', f'--checkpoint={path}')}")
    processes.wait_for_all()


def look(
    args: argparse.Namespace, data: datasets.Data, scheduler: NoiseScheduler, ema: UNet, run: Run
) -> dict[str, float]:
    """After an epoch: the held-out loss, the log, its curve, at times a grid. Returns the row."""
    folder, classes = args.output_dir, data.num_classes
    held_out = data.held_out_images, data.held_out_labels
    t, errors = torch.zeros(1), torch.full((1,), torch.nan)
    with messages.not_vital("held-out loss"):
        t, errors = held_out_loss(ema, scheduler, *held_out, args.seed)
    row: dict[str, float] = {"epoch": run.epoch, "step": run.step, "train_loss": run.mean_loss()}
    row |= {"val_loss": errors.mean().item(), "seconds": run.seconds}
    files.write_log(folder / "train_log.csv", [*run.history, row])
    pictures.draw_loss_curve(folder / "loss_curve.png", [*run.history, row], t, errors)
    if run.epoch % args.sample_every == 0 or run.is_over:
        num_samples = args.num_samples or pictures.full_rows(NUM_SAMPLES, classes)
        name = f"samples_epoch_{run.epoch}.png"
        with messages.not_vital(name):
            images = sample(ema, scheduler, num_samples, **args.sampler)
            pictures.draw_grid(folder / name, images, classes)
    losses = f"loss {row['train_loss']:.4f}  held-out {row['val_loss']:.4f}"
    say(f"epoch {run.epoch}/{args.epochs}  {losses}  {run.seconds / 60:.1f} min")
    run.warn_if_useless()
    return row


@torch.no_grad()
def held_out_loss(
    model: UNet, scheduler: NoiseScheduler, images: Tensor, labels: Tensor | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The loss of images never trained on, all labels kept, at the same t and noise every time.

    images are uint8 [N, C, H, W], labels int64 [N] or None. Returns t, int64 [N], evenly spaced,
    and the loss of each image, float32 [N].
    """
    generator = generator_for("held-out loss", seed, images.device)
    t = torch.arange(len(images), device=images.device) * scheduler.num_timesteps // len(images)
    losses = []
    for part in pieces(len(images), images.shape):
        x_0, y = to_model(images[part]), None if labels is None else labels[part]
        noise = torch.randn(x_0.shape, generator=generator, device=images.device)
        losses.append(training_loss(model, scheduler, x_0, y, t[part], noise))
    return t, torch.cat(losses)


# --- Pictures of both processes. (support/pictures.py draws; here is what they show.) -------------


def draw_noise_schedule(path: Path, num_timesteps: int) -> None:
    """alpha-bar, beta and the signal-to-noise ratio over t, for both schedules."""
    curves: dict[str, Sequence[Tensor]] = {}
    for schedule in ("cosine", "linear"):
        scheduler = NoiseScheduler(num_timesteps, schedule)
        alpha_bar = scheduler.alphas_cumprod
        curves[schedule] = (alpha_bar, scheduler.betas, torch.log10(alpha_bar / (1 - alpha_bar)))
    pictures.draw_noise_schedule(path, curves)


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
    pictures.draw_images(path, torch.stack(columns, dim=1), [""] * len(images), labels, title)


def draw_denoising(
    folder: Path, model: UNet, scheduler: NoiseScheduler, args: argparse.Namespace
) -> None:
    """The reverse process: denoising.png, x_t and the x_0 predicted from it, and denoising.gif."""
    device, classes = scheduler.betas.device, model.num_classes
    generator = generator_for("denoising pictures", args.seed, device)
    num_images = min(pictures.full_rows(20, classes), images_together(model.image_shape) // 2 or 1)
    x_T = torch.randn(num_images, *model.image_shape, generator=generator, device=device)
    _, labels = datasets.labels_to_draw(None, None, num_images, classes)
    labels = labels if labels is None else labels.to(device)
    num_steps = args.sampler["num_steps"]
    shown = [round(i * num_steps / 10) for i in range(11)]  # in denoising.png
    framed = range(num_steps, -1, -(num_steps + 1) // 50)  # in the GIF: 50 at most
    columns, frames = {}, []
    steps = denoise(model, scheduler, x_T, labels, num_steps, args.eta, args.guidance, generator)
    for i, (t, x_t, x_0_pred) in enumerate(steps):
        if i in shown:
            pair = torch.stack([to_uint8(x_t[:4]), to_uint8(x_0_pred[:4])], dim=1)
            columns[i] = (f"t = {t}" if t >= 0 else "result", pair.flatten(0, 1).cpu())
        if i in framed:
            frames.append(to_uint8(torch.cat([x_t, x_0_pred])).cpu())  # above, below
    labels_shown, images = zip(*(columns[i] for i in shown))
    rows, title = ["x_t", "predicted x_0"] * 4, f"Reverse process, in {num_steps} steps"
    path = folder / "denoising.png"
    pictures.draw_images(path, torch.stack(images, dim=1), rows, labels_shown, title)
    pictures.draw_gif(folder / "denoising.gif", frames, classes)


# --- The command line -----------------------------------------------------------------------------

SCRIPT = sys.argv[0] if __name__ == "__main__" else __file__  # as it is called again


def make_parser() -> options.Parser:
    """The options with their defaults."""
    commands, _, _ = (__doc__ or "").partition("forward_reverse_process.py")  # python -OO drops it
    formatter = argparse.RawDescriptionHelpFormatter
    parser = options.Parser(description=commands, formatter_class=formatter, allow_abbrev=False)
    number, path = options.number, options.home_path
    count, share = number(int, 1, 10**6), number(float, 0, 1)

    add = parser.add_argument_group("training").add_argument
    sets = f"{', '.join(datasets.IDX_SETS)}, a folder of pictures or an .npz file (%(default)s)"
    add("--dataset", type=options.source, default="MNIST", help=sets)
    size = "what a folder's pictures are resized to, a multiple of 4"
    add("--image-size", type=number(int, 4, 4096, 4), metavar="N", help=size)
    add("--epochs", type=count, default=10, help="passes over the images (%(default)s)")
    add("--batch-size", type=count, default=64, help="images a step, in all (%(default)s)")
    add("--optimizer", choices=list(LEARNING_RATES), default="muon", help="(%(default)s)")
    add("--lr", type=number(float, 1e-9, 1e9), help=f"highest learning rate ({LEARNING_RATES})")
    add("--timesteps", type=number(int, 2, 10**5), default=1000, help="T (%(default)s)")
    add("--schedule", choices=["cosine", "linear"], default="cosine", help="(%(default)s)")
    multiple = number(int, NORM_GROUPS, 10**6, NORM_GROUPS)
    width = f"width, a multiple of {NORM_GROUPS} (%(default)s)"
    add("--base-channels", type=multiple, default=32, help=width)
    dropout = "share of labels to drop, for guidance; 1: all, for a plain model (%(default)s)"
    add("--label-dropout", type=number(float, 1e-3, 1), default=0.1, help=dropout)
    add("--max-steps", type=count, metavar="N", help="end early, after N steps in all")
    add("--resume", action="store_true", help="go on with OUTPUT_DIR/checkpoint.pt as it was")

    add = parser.add_argument_group("sampling").add_argument
    add("--sample-every", type=count, default=5, help="epochs between grids (%(default)s)")
    add("--num-samples", type=count, help=f"images to draw (about {NUM_SAMPLES}: full rows)")
    steps = "steps to an image, at most T (%(default)s)"
    add("--sample-steps", type=count, default=SAMPLE_STEPS, help=steps)
    add("--eta", type=share, default=1.0, help="0: DDIM, 1: DDPM (%(default)s)")
    guidance = "strength of classifier-free guidance, 0: off (%(default)s)"
    add("--guidance", type=number(float, 0, 1e3), default=GUIDANCE, help=guidance)
    add("--sample-only", action="store_true", help="no training: draw with a trained network")
    labels = "what to draw, with --sample-only: numbers or class names (every class in turn)"
    add("--labels", nargs="+", help=labels)
    checkpoint = "with --sample-only (OUTPUT_DIR/checkpoint.pt, else pretrained.pt)"
    add("--checkpoint", type=path, help=checkpoint)
    output = "with --sample-only: .png, .npy or .npz (OUTPUT_DIR/samples.png)"
    add("--output", type=path, help=output)

    add = parser.add_argument_group("where and how").add_argument
    sets = "of the published sets (data, beside this file)"
    add("--data-dir", type=options.absolute_path, help=sets)
    add("--output-dir", type=path, default=Path(), help="for what a run writes (%(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of all draws (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    return parser


def sample_only(args: argparse.Namespace, device: torch.device) -> None:
    """Load a checkpoint, draw, and write --output."""
    own = args.output_dir / "checkpoint.pt"
    path = args.checkpoint or (own if own.exists() else files.REPOSITORY / "pretrained.pt")
    model, scheduler = load_model(path, device)
    started, classes = time.monotonic(), model.num_classes
    sampler = args.sampler | {"num_steps": min(args.sample_steps, scheduler.num_timesteps)}
    grid = pictures.full_rows(NUM_SAMPLES, classes)
    asked = args.num_samples, args.labels, grid
    num_samples, labels = datasets.labels_to_draw(*asked, classes, model.class_names)
    images = sample(model, scheduler, num_samples, labels, **sampler)
    seconds = time.monotonic() - started
    pictures.write_images(args.output, images, labels, classes)
    say(f"drew {len(images)} images with {path} in {seconds:.1f} s: {args.output}")


def main(argv: Sequence[str] | None = None) -> None:
    """The program, with these options or those of the command line.

    Raises UserError, with a sentence for the user, for what was asked and for what broke;
    KeyboardInterrupt(signal number) when interrupted.
    """
    args = options.parse_options(make_parser(), argv)
    device = choose_device(args.device)
    first = processes.this_process().rank == 0
    files.make_writable(args.output.parent if args.sample_only else args.output_dir)
    may_shrink = not (args.resume or args.sample_only)  # which keep to the sizes of a checkpoint
    with processes.joined(device, args.sample_only), heard_interruptions() as interruption:
        interruption.resumable = args.resume  # a new run is, once it has saved
        try:
            with messages.memory_explained(may_shrink):
                if not args.sample_only:
                    train(args, device, interruption)
                elif first:
                    sample_only(args, device)
        except KeyboardInterrupt:
            how = f"; go on with: {options.resume_command(SCRIPT, args)}"
            say(f"interrupted{how if interruption.resumable else ''}", sys.stderr, aloud=first)
            raise


if __name__ == "__main__":
    with messages.exit_status("train_diffusion.py"):
        main()
