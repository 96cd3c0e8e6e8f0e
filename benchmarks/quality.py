"""How good are the digits? Beside real ones, in the features of a small digit classifier.

    python benchmarks/quality.py checkpoint.pt    # draws --num-samples digits and judges them
    python benchmarks/quality.py samples.npz      # judges what --sample-only --output wrote

Prints one line of JSON per file. A checkpoint of a network with labels draws them in the training
set's proportions. An .npz file holds images, uint8 [N, 28, 28], and perhaps labels, int [N], the
digits that were asked for; an .npy file holds images alone.

Inception features say little about digits, and a Frechet distance depends on the number of samples.
So every line states N and the floor: the same distance for N real training images, which is what a
perfect generator would reach. Where labels are known, the real images have the same class shares as
the labels, since these shares are given and not achieved. For labels in the data's proportions that
floor is lower than the one of images drawn at random, whose shares differ by chance. The classifier
has seen the training images; so they lie a little farther from the test images than new ones would.
Coverage and density are those of the first N test images.

The classifier is trained once, by a fixed seed, and cached in benchmarks/cache/.
"""

import argparse
import functools
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_diffusion
from support.datasets import Split, to_tensors

CACHE = Path(__file__).resolve().parent / "cache" / "classifier.pt"
SURE = 0.99  # a digit is legible if the classifier gives one class at least this probability
NEIGHBORS = 5  # k of coverage and density (Naeem et al. 2020 use 5)
NUM_CLASSES = 10
IMAGE_SHAPE = (1, 28, 28)


@functools.cache
def mnist() -> list[tuple[Tensor, Tensor]]:
    """Training and test split: images, uint8 [N, 1, 28, 28], and labels, int64 [N]."""
    (images, labels), (test_images, test_labels) = train_diffusion.load_images("MNIST")
    assert labels is not None and test_labels is not None
    return [(images, labels), (test_images, test_labels)]


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


def train_classifier(epochs: int = 8, batch_size: int = 128) -> DigitClassifier:
    """Train on images shifted by up to two pixels; about four minutes on two cores."""
    torch.manual_seed(0)
    images, labels = mnist()[0]
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
    model = train_classifier()
    images, labels = mnist()[1]
    accuracy = share(look(model, images)[1].argmax(1) == labels)
    print(f"classifier: {accuracy:.2%} of the test split", file=sys.stderr)
    if accuracy < 0.994:
        raise SystemExit("the classifier is too weak to judge by (below 99.4 %)")
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
    return round(flags.double().mean().item(), 4)


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


def draw_real(num_samples: int, labels: Tensor | None) -> Tensor:
    """Real training images, without replacement, for the floor: uint8 [num_samples, 1, 28, 28].

    With labels, int64 [num_samples], there are as many images of each class as labels. With labels
    in the data's proportions they score lower than images drawn at random do, whose class shares
    are a matter of chance.
    """
    images, train_labels = mnist()[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if labels is None:
        return images[order[:num_samples]]
    chosen = []
    for digit, count in enumerate(labels.bincount(minlength=NUM_CLASSES).tolist()):
        of_class = order[train_labels[order] == digit]
        if count > len(of_class):
            raise ValueError(f"{count} samples of {digit}, but only {len(of_class)} real images")
        chosen.append(of_class[:count])
    return images[torch.cat(chosen)]


class Judge:
    """What is known of the real images, computed once. Call it to get the figures of samples."""

    def __init__(self) -> None:
        self.model = load_classifier()
        (self.train_images, train_labels), (test_images, test_labels) = mnist()
        self.test_features, test_probs = look(self.model, test_images)
        self.legible = share(test_probs.amax(1) >= SURE)
        self.accuracy = share(test_probs.argmax(1) == test_labels)
        self.train_classes = train_labels.bincount(minlength=NUM_CLASSES) / len(train_labels)
        test_distance = distance_to_training_set(test_images[:2000], self.train_images)
        self.copy_threshold = test_distance.quantile(0.01)

    def __call__(self, samples: Tensor, labels: Tensor | None = None) -> dict[str, float]:
        """The figures of samples, uint8 [N, 1, 28, 28]; labels, int64 [N], are what was asked for.

        The floor is the Frechet distance of N real training images: with labels, of images that
        have the labels' class shares (see `draw_real`), else of images drawn at random.
        """
        features, probs = look(self.model, samples)
        distance = frechet_distance(features, self.test_features)
        real_features, _ = look(self.model, draw_real(len(samples), labels))
        floor = frechet_distance(real_features, self.test_features)
        classes = probs.argmax(1).bincount(minlength=NUM_CLASSES) / len(samples)
        density, coverage = density_and_coverage(self.test_features[: len(samples)], features)
        nearest = distance_to_training_set(samples, self.train_images)
        figures = {
            "num_samples": len(samples),
            "frechet": round(distance, 4),
            "frechet_floor": round(floor, 4),
            "frechet_over_floor": round(distance / floor, 2),
            "legible": share(probs.amax(1) >= SURE),
            "legible_test_images": self.legible,
        }
        if labels is not None:  # how many samples are taken for the digit that was asked for
            figures["conditional_accuracy"] = share(probs.argmax(1) == labels)
        total_variation = 0.5 * (classes - self.train_classes).abs().sum().item()
        return figures | {
            "accuracy_test_images": self.accuracy,
            "class_total_variation": round(total_variation, 4),
            "density": round(density, 3),
            "coverage": round(coverage, 3),
            # Of real test images this is 0.01 by definition; more means copies of training images.
            "closer_to_training_set_than_99_percent_of_test_images": share(
                nearest < self.copy_threshold
            ),
        }


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


def draw_samples(path: Path, options: argparse.Namespace) -> tuple[Split, dict[str, float]]:
    """What a checkpoint draws, with which labels (None if it has none), and how it was drawn."""
    model, scheduler = train_diffusion.load_model(path)
    num_steps, eta, guidance = options.sample_steps, options.eta, options.guidance
    num_samples, labels = options.num_samples, None
    if model.num_classes is None:
        guidance = 0  # there is nothing to guide by
    elif model.num_classes != NUM_CLASSES:
        raise ValueError(f"{path} has {model.num_classes} classes, not MNIST's {NUM_CLASSES}")
    else:
        labels = proportional_labels(num_samples, mnist()[0][1])
    images = train_diffusion.sample(
        model, scheduler, num_samples, labels, num_steps, eta, guidance, options.seed
    )
    how = {"sample_steps": num_steps, "eta": eta, "guidance": guidance, "seed": options.seed}
    return (images, labels), how


def main() -> None:
    default = {
        name: parameter.default
        for name, parameter in inspect.signature(train_diffusion.sample).parameters.items()
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, help=".npz or .npy samples, or .pt checkpoints")
    add("--num-samples", type=int, default=2000, help="to draw with a checkpoint (%(default)s)")
    add("--sample-steps", type=int, default=default["num_steps"], help="(%(default)s)")
    add("--eta", type=float, default=default["eta"], help="0: DDIM, 1: DDPM (%(default)s)")
    add("--guidance", type=float, default=default["guidance"], help="0: none (%(default)s)")
    add("--seed", type=int, default=default["seed"], help="of the samples (%(default)s)")
    options = parser.parse_args()

    the_judge = functools.cache(Judge)
    for path in options.files:
        try:
            how: dict[str, float] = {}
            if path.suffix in (".npz", ".npy"):
                images, labels = read_samples(path)
            else:
                (images, labels), how = draw_samples(path, options)
            if images.shape[1:] != IMAGE_SHAPE:
                raise ValueError(f"{path}: images are {list(images.shape[1:])}, not MNIST's")
            if labels is not None and labels.max() >= NUM_CLASSES:
                raise ValueError(f"{path}: labels must be 0 to {NUM_CLASSES - 1}")
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(json.dumps({"file": str(path), **how, **the_judge()(images, labels)}), flush=True)


if __name__ == "__main__":
    main()
