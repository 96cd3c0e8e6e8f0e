"""How good are the digits? Beside real ones, in the features of a small digit classifier.

    python benchmarks/quality.py checkpoint.pt    # draws digits three times and judges them
    python benchmarks/quality.py samples.npz      # judges what --sample-only --output wrote

Prints one line of JSON per file. Every figure is the mean of all draws, with the lowest and the
highest; beside it stands what ten draws of as many real images get.

    frechet                  how far the digits' features are from those of the 10,000 test images,
                             by mean and covariance
    over_floor               the same, divided by the mean distance of the real images: the floor
    as_asked                 share of the digits that the classifier takes for what was asked
    sure                     share of which it is at least 99 % sure, whatever it takes them for
    coverage, density        how much of the real digits' variety is there, how typical the drawn
                             ones are; of N digits among N real ones, ideally 1 - 2^-5 = .969 and 1
    class_total_variation    how far the shares of the classes are from the training set's
    near_training_images     share nearer to a training image than 99 % of the test images are: .01
                             by definition for new digits, more for copies

No image has two roles. The classifier is trained on one half of the training split, and the real
images come from the other half: those that the classifier has seen would look too typical to it.
They have the class shares of the labels, since these shares are given and not achieved.

The test images are for the tables in RESULTS.md alone. What is chosen is chosen with --choose: the
place of the test images is taken by 10,000 training images, which neither the classifier nor the
networks compared may have seen. Train these networks without them, by race.py --choose.

An .npz file holds images, uint8 [N, 28, 28], and perhaps labels, int [N], the digits that were
asked for; an .npy file holds images alone. Either is one draw. A checkpoint of a network with
labels draws them in the training set's proportions. The floor falls as N grows, so only ratios of
the same N compare. Inception features, the usual ones, say little about digits. The classifier is
trained once, by a fixed seed, and cached in benchmarks/cache/.
"""

import argparse
import functools
import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_diffusion
from support.datasets import Split, to_tensors
from support.options import number

CACHE = Path(__file__).resolve().parent / "cache" / "classifier_of_one_half.pt"
SURE = 0.99  # the classifier is sure of a digit if it gives one class at least this probability
NEIGHBORS = 5  # k of coverage and density (Naeem et al. 2020 use 5)
REAL_DRAWS = 10  # draws of real images, for the floor and what stands beside every figure
NUM_CLASSES = 10
IMAGE_SHAPE = (1, 28, 28)

# --- The images and their roles -------------------------------------------------------------------


@functools.cache
def mnist() -> list[tuple[Tensor, Tensor]]:
    """Training and test split: images, uint8 [N, 1, 28, 28], and labels, int64 [N]."""
    (images, labels), (test_images, test_labels) = train_diffusion.load_images("MNIST")
    assert labels is not None and test_labels is not None
    return [(images, labels), (test_images, test_labels)]


def sixths() -> Tensor:
    """Which sixth each training image belongs to, by chance: int64 [60000], 0 to 5.

    By chance, since the training set alternates between MNIST's two sources of handwriting: every
    second image is like the first half of the test images, the others are like the second.
    """
    num_images = len(mnist()[0][0])
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(0)) % 6


def classifier_half() -> tuple[Tensor, Tensor]:
    """The images and labels that the classifier is trained on: three sixths."""
    (images, labels), mine = mnist()[0], sixths() < 3
    return images[mine], labels[mine]


@dataclass
class Roles:
    """Which images do what, beside those of the classifier."""

    reference: Tensor  # real digits that the drawn ones are compared with
    others: Tensor  # real digits that are drawn for the floor
    others_labels: Tensor
    trained_on: Tensor  # what the networks that are judged may have seen
    trained_on_labels: Tensor


def roles(choose: bool = False) -> Roles:
    """For the tables, or to choose by: then a third of the classifier's other half is kept back."""
    (images, labels), (test_images, _) = mnist()
    sixth = sixths()
    if not choose:
        other = sixth >= 3
        return Roles(test_images, images[other], labels[other], images, labels)
    kept_back, other, seen = sixth == 3, sixth > 3, sixth != 3
    return Roles(images[kept_back], images[other], labels[other], images[seen], labels[seen])


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


# --- The classifier -------------------------------------------------------------------------------


class DigitClassifier(nn.Module):
    """A plain convolutional classifier. `features` is its last hidden layer, [N, 64].

    [N, 1, 28, 28] in [0, 1] -> logits [N, 10]
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = ((1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1))
        for c_in, c_out, stride in sizes:
            layers.append(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(64, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def train_classifier(
    images: Tensor, labels: Tensor, epochs: int = 12, batch_size: int = 128
) -> DigitClassifier:
    """Train on images shifted by up to two pixels; about three minutes on two cores."""
    torch.manual_seed(0)
    padded = F.pad(images, (2, 2, 2, 2))
    model = DigitClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: steps // epochs * batch_size]
        for batch in order.split(batch_size):
            top, left = torch.randint(0, 5, (2,)).tolist()
            x = to_unit(padded[batch, :, top : top + 28, left : left + 28])
            loss = F.cross_entropy(model(x), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_schedule.step()
        print(f"classifier: epoch {epoch + 1}/{epochs}, loss {loss.item():.4f}", file=sys.stderr)
    return model.eval()


def load_classifier() -> DigitClassifier:
    """The cached classifier; trained and checked on the test split the first time."""
    if CACHE.exists():
        model = DigitClassifier()
        model.load_state_dict(torch.load(CACHE, weights_only=True))
        return model.eval()
    model = train_classifier(*classifier_half())
    images, labels = mnist()[1]
    accuracy = share(look(model, images)[1].argmax(1) == labels)
    print(f"classifier: {accuracy:.2%} of the test split", file=sys.stderr)
    if accuracy < 0.99:
        raise SystemExit("the classifier is too weak to judge by (below 99 %)")
    CACHE.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), CACHE)
    return model


@torch.inference_mode()
def look(model: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, 64] and class probabilities [N, 10] of uint8 images [N, 1, 28, 28]."""
    features = torch.cat([model.features(to_unit(chunk)) for chunk in images.split(500)])
    return features, model.head(features).softmax(1)


# --- The figures ----------------------------------------------------------------------------------


def share(flags: Tensor) -> float:
    """The share of a bool tensor that is true."""
    return flags.double().mean().item()


def evenly(images: Tensor, num: int) -> Tensor:
    """num of the images, evenly spaced: the first test images are easier than the last."""
    return images[torch.arange(num) * len(images) // num]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The distance of two sets of features [N, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    The trace of the square root is the sum of the square roots of the eigenvalues; this works for
    singular C_a and C_b too.
    """
    points_a, points_b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(points_a, rowvar=False), np.cov(points_b, rowvar=False)
    trace_of_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    mean_part = ((points_a.mean(0) - points_b.mean(0)) ** 2).sum()
    return float(mean_part + np.trace(cov_a + cov_b) - 2 * trace_of_root)


def density_and_coverage(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """Density and coverage of `fake` in `real`, features [N, D] (Naeem et al. 2020, eq. 4, 5)."""
    # Each point is its own nearest, hence + 1.
    radii = torch.cdist(real, real).kthvalue(NEIGHBORS + 1, dim=1).values
    inside = torch.cdist(real, fake) < radii[:, None]  # [real, fake]
    density = inside.sum(0).double().mean().item() / NEIGHBORS
    return density, inside.any(1).double().mean().item()


def distance_to_training_set(images: Tensor, train_images: Tensor) -> Tensor:
    """Pixel distance (L2, images in [0, 1]) from each image to the nearest training image: [N]."""
    flat, train_flat = to_unit(images).flatten(1), to_unit(train_images).flatten(1)
    return torch.cat([torch.cdist(chunk, train_flat).amin(1) for chunk in flat.split(250)])


def proportional_labels(num_samples: int, train_labels: Tensor) -> Tensor:
    """Labels in the training set's proportions, sorted: int64 [num_samples].

    Every class gets its exact share, rounded down; the classes that lost most by that get one more,
    until the sum is right.
    """
    exact = num_samples * train_labels.bincount(minlength=NUM_CLASSES)  # times the images there are
    counts, lost = exact // len(train_labels), exact % len(train_labels)
    missing = num_samples - int(counts.sum())
    counts[lost.argsort(descending=True, stable=True)[:missing]] += 1
    return torch.arange(NUM_CLASSES).repeat_interleave(counts)


def draw_real(images: Roles, num_samples: int, labels: Tensor | None, seed: int) -> Tensor:
    """Real images for the floor, without replacement: uint8 [num_samples, 1, 28, 28].

    With labels, int64 [num_samples], there are as many images of each class as labels.
    """
    order = torch.randperm(len(images.others), generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return images.others[order[:num_samples]]
    chosen = []
    for digit, count in enumerate(labels.bincount(minlength=NUM_CLASSES).tolist()):
        of_class = order[images.others_labels[order] == digit]
        if count > len(of_class):
            raise ValueError(f"{count} samples of {digit}, but only {len(of_class)} real images")
        chosen.append(of_class[:count])
    return images.others[torch.cat(chosen)]


def summary(values: Sequence[float]) -> dict[str, float]:
    """The mean of all draws, the lowest and the highest."""
    figures = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}


class Judge:
    """What is known of the real images, computed once. Call it to get the figures of samples."""

    def __init__(self, classifier: DigitClassifier, images: Roles) -> None:
        self.classifier, self.images = classifier, images
        self.reference_features, _ = look(classifier, images.reference)
        counts = images.trained_on_labels.bincount(minlength=NUM_CLASSES)
        self.classes = counts / counts.sum()
        some = evenly(images.reference, min(2000, len(images.reference)))
        self.copy_threshold = distance_to_training_set(some, images.trained_on).quantile(0.01)
        self.real_figures: dict[object, list[dict[str, float]]] = {}

    def __call__(self, draws: Sequence[Tensor], labels: Tensor | None = None) -> dict[str, Any]:
        """The figures of draws, each uint8 [N, 1, 28, 28]; labels, int64 [N], are what was asked.

        A figure is {"mean", "low", "high", "real": {"mean", "low", "high"}}.
        """
        num_samples = len(draws[0])
        most = len(self.reference_features)
        if not NEIGHBORS < num_samples <= most:
            raise ValueError(f"{num_samples} digits: {NEIGHBORS + 1} to {most} can be judged")
        real = self.of_real_images(num_samples, None if labels is None else labels.sort().values)
        floor = sum(each["frechet"] for each in real) / len(real)
        drawn = []
        for samples in draws:
            nearest = distance_to_training_set(samples, self.images.trained_on)
            copies = {"near_training_images": share(nearest < self.copy_threshold)}
            drawn.append(self.of_one_draw(samples, labels) | copies)
        for each in [*real, *drawn]:
            each["over_floor"] = each["frechet"] / floor
        result: dict[str, Any] = {"num_samples": num_samples, "draws": len(draws)}
        for name in drawn[0]:
            result[name] = dict(summary([each[name] for each in drawn]))
            if name in real[0]:
                result[name]["real"] = summary([each[name] for each in real])
        return result

    def of_real_images(self, num_samples: int, labels: Tensor | None) -> list[dict[str, float]]:
        """The figures of ten draws of real images: see `draw_real`."""
        key = num_samples if labels is None else tuple(labels.tolist())
        if key not in self.real_figures:
            draws = (draw_real(self.images, num_samples, labels, i) for i in range(REAL_DRAWS))
            self.real_figures[key] = [self.of_one_draw(images, labels) for images in draws]
        return self.real_figures[key]

    def of_one_draw(self, samples: Tensor, labels: Tensor | None) -> dict[str, float]:
        features, probs = look(self.classifier, samples)
        among = evenly(self.reference_features, len(samples))
        density, coverage = density_and_coverage(among, features)
        classes = probs.argmax(1).bincount(minlength=NUM_CLASSES) / len(samples)
        figures = {
            "frechet": frechet_distance(features, self.reference_features),
            "sure": share(probs.amax(1) >= SURE),
            "coverage": coverage,
            "density": density,
            "class_total_variation": 0.5 * (classes - self.classes).abs().sum().item(),
        }
        if labels is not None:
            figures["as_asked"] = share(probs.argmax(1) == labels)
        return figures


# --- The samples ----------------------------------------------------------------------------------


def read_samples(path: Path) -> Split:
    """The images in an .npz or .npy file, uint8 [N, 1, 28, 28]; labels, int64 [N], or None."""
    content = np.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        return to_tensors(path, content, None)
    if "images" not in content:
        raise ValueError(f"{path}: there is no array called images")
    labels = content.get("labels")
    return to_tensors(path, content["images"], labels)


def draw_samples(
    path: Path, args: argparse.Namespace
) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """What a checkpoint draws, with which labels (None if it has none), and how it was drawn."""
    model, scheduler = train_diffusion.load_model(path)
    num_steps, eta, guidance = args.sample_steps, args.eta, args.guidance
    interval = tuple(args.guidance_interval)
    num_samples, labels = args.num_samples, None
    if model.num_classes is None:
        guidance = 0  # there is nothing to guide by
    elif model.num_classes != NUM_CLASSES:
        raise ValueError(f"{path} has {model.num_classes} classes, not MNIST's {NUM_CLASSES}")
    else:
        labels = proportional_labels(num_samples, mnist()[0][1])
    how = {"sample_steps": num_steps, "eta": eta, "guidance": guidance}
    how |= {"guidance_interval": interval, "seed": args.seed}
    seeds = range(args.seed, args.seed + args.draws)
    sampler = num_steps, eta, guidance
    draws = [
        train_diffusion.sample(model, scheduler, num_samples, labels, *sampler, seed, interval)
        for seed in seeds
    ]
    return draws, labels, how


def main() -> None:
    default = {
        name: parameter.default
        for name, parameter in inspect.signature(train_diffusion.sample).parameters.items()
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, number(int, 1, 10_000)
    add("files", nargs="+", type=Path, help=".npz or .npy samples, or .pt checkpoints")
    add("--choose", action="store_true", help="beside training images kept back for choices")
    add("--num-samples", type=count, default=2000, help="of a checkpoint's draw (%(default)s)")
    add("--draws", type=count, default=3, help="of a checkpoint (%(default)s)")
    add("--sample-steps", type=count, default=default["num_steps"], help="(%(default)s)")
    add("--eta", type=float, default=default["eta"], help="0: DDIM, 1: DDPM (%(default)s)")
    add("--guidance", type=float, default=default["guidance"], help="0: none (%(default)s)")
    interval = "alpha-bar_t between which guidance is used (%(default)s)"
    between = {"type": float, "nargs": 2, "default": default["guidance_interval"]}
    add("--guidance-interval", metavar=("LOW", "HIGH"), help=interval, **between)
    add("--seed", type=int, default=default["seed"], help="of the first draw (%(default)s)")
    args = parser.parse_args()

    @functools.cache  # and not before the files have been read
    def judge() -> Judge:
        return Judge(load_classifier(), roles(args.choose))

    for path in args.files:
        try:
            how: dict[str, Any] = {}
            if path.suffix in (".npz", ".npy"):
                images, labels = read_samples(path)
                draws = [images]
            else:
                draws, labels, how = draw_samples(path, args)
            if draws[0].shape[1:] != IMAGE_SHAPE:
                raise ValueError(f"{path}: images are {list(draws[0].shape[1:])}, not MNIST's")
            if labels is not None and labels.max() >= NUM_CLASSES:
                raise ValueError(f"{path}: labels must be 0 to {NUM_CLASSES - 1}")
            figures = judge()(draws, labels)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(json.dumps({"file": str(path), **how, **figures}), flush=True)


if __name__ == "__main__":
    main()
