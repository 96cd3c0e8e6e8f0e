"""How good are the digits? Distances between generated and real MNIST, in the features of a small digit classifier.

    python benchmarks/quality.py samples.npy            # uint8 [N, 28, 28], as --sample-only --output samples.npy writes
    python benchmarks/quality.py checkpoint.pt --num-samples 2000 --sample-steps 32 --eta 1.0 --guidance 2.0

Prints one line of JSON per file. Inception features say little about digits, and a Fréchet distance depends on the number
of samples, so every line states N and carries the same distance for N real training images, the floor that a perfect
generator would reach. The classifier is trained once, by a fixed seed, and cached in benchmarks/cache/.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "benchmarks" / "cache" / "classifier.pt"
SURE = 0.99  # a digit counts as legible when the classifier gives one class at least this probability
NEIGHBOURS = 5  # k of coverage and density (Naeem et al. 2020 use 5)

sys.path.insert(0, str(ROOT))
import train_diffusion  # noqa: E402


class DigitClassifier(nn.Module):
    """A plain convolutional classifier, [N, 1, 28, 28] in [0, 1] -> logits [N, 10]; `features` is its last hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, stride in ((1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 128, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def load_mnist(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8 [N, 28, 28], and their labels, int64 [N]."""
    split = datasets.MNIST(ROOT / "data", train=train, download=True)
    return split.data, split.targets


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 28, 28] -> float [N, 1, 28, 28] in [0, 1]."""
    return images.unsqueeze(1).float() / 255


def train_classifier(epochs: int = 8, batch_size: int = 128) -> DigitClassifier:
    """Train on the training split with random shifts of up to two pixels; about four minutes on two cores."""
    torch.manual_seed(0)
    images, labels = load_mnist(train=True)
    padded = F.pad(images, (2, 2, 2, 2))
    model = DigitClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for epoch in range(epochs):
        for batch in torch.randperm(len(images))[: steps // epochs * batch_size].split(batch_size):
            top, left = torch.randint(0, 5, (2,)).tolist()
            x = to_unit(padded[batch, top : top + 28, left : left + 28])
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
    images, labels = load_mnist(train=False)
    accuracy = (look(model, images)[1].argmax(1) == labels).double().mean().item()
    print(f"classifier: {accuracy:.2%} of the test split", file=sys.stderr)
    if accuracy < 0.994:
        raise SystemExit("the classifier is too weak to judge by (below 99.4 %)")
    CACHE.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), CACHE)
    return model


@torch.inference_mode()
def look(model: DigitClassifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, 64] and class probabilities [N, 10] of uint8 images [N, 28, 28]."""
    features = torch.cat([model.features(to_unit(chunk)) for chunk in images.split(500)])
    return features, model.head(features).softmax(1)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [N, D] (Heusel et al. 2017, eq. 6)."""
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the square root is the sum of the square roots of the eigenvalues; this works for singular C_a, C_b too.
    trace_of_root = np.sqrt(scipy.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * trace_of_root)


def density_and_coverage(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """Density and coverage of `fake` in `real`, both features [N, D] (Naeem et al. 2020, eq. 4 and 5)."""
    radii = torch.cdist(real, real).kthvalue(NEIGHBOURS + 1, dim=1).values  # + 1: each point is its own nearest
    inside = torch.cdist(real, fake) < radii[:, None]  # [real, fake]
    return inside.sum(0).double().mean().item() / NEIGHBOURS, inside.any(1).double().mean().item()


def distance_to_training_set(images: torch.Tensor, train_images: torch.Tensor) -> torch.Tensor:
    """Pixel distance (L2, images in [0, 1]) from each image to the nearest training image, [N]."""
    flat = to_unit(train_images).flatten(1)
    return torch.cat([torch.cdist(chunk, flat).amin(1) for chunk in to_unit(images).flatten(1).split(250)])


class Judge:
    """Everything about the real images, computed once; `judge(samples)` gives the figures of one set of samples."""

    def __init__(self, num_samples: int) -> None:
        self.model = load_classifier()
        self.train_images, self.train_labels = load_mnist(train=True)
        self.test_images, _ = load_mnist(train=False)
        self.test_features, self.test_probs = look(self.model, self.test_images)
        chosen = torch.randperm(len(self.train_images), generator=torch.Generator().manual_seed(0))[:num_samples]
        floor_features, _ = look(self.model, self.train_images[chosen])
        self.floor = frechet_distance(floor_features, self.test_features)
        test_distance = distance_to_training_set(self.test_images[:2000], self.train_images)
        self.copy_threshold = test_distance.quantile(0.01)

    def __call__(self, samples: torch.Tensor) -> dict:
        features, probs = look(self.model, samples)
        distance = frechet_distance(features, self.test_features)
        classes = probs.argmax(1).bincount(minlength=10) / len(samples)
        train_classes = self.train_labels.bincount(minlength=10) / len(self.train_labels)
        density, coverage = density_and_coverage(self.test_features[: len(samples)], features)
        nearest = distance_to_training_set(samples, self.train_images)
        return {
            "num_samples": len(samples),
            "frechet": round(distance, 4),
            "frechet_floor": round(self.floor, 4),
            "frechet_over_floor": round(distance / self.floor, 2),
            "legible": round((probs.amax(1) >= SURE).double().mean().item(), 4),
            "legible_test_images": round((self.test_probs.amax(1) >= SURE).double().mean().item(), 4),
            "class_total_variation": round(0.5 * (classes - train_classes).abs().sum().item(), 4),
            "density": round(density, 3),
            "coverage": round(coverage, 3),
            # of real test images this is 0.01 by definition; more means copies of training images
            "closer_to_training_set_than_99_percent_of_test_images": round(
                (nearest < self.copy_threshold).double().mean().item(), 4
            ),
        }


def samples_of(path: Path, options: argparse.Namespace) -> torch.Tensor:
    """The images in a .npy file, or what a checkpoint draws, uint8 [N, 28, 28]."""
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path))
    model, scheduler = train_diffusion.load_model(path, torch.device("cpu"))
    return train_diffusion.sample(model, scheduler, options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options (--num-samples, --sample-steps, --eta, --guidance, --seed) are those of train_diffusion.py.",
    )
    parser.add_argument("files", nargs="+", type=Path, help=".npy samples or .pt checkpoints")
    args, sampling = parser.parse_known_args()
    options = train_diffusion.parse_options(["--sample-only", *sampling])
    judge_for = functools.cache(Judge)  # one for every number of samples, on which the floor depends
    for path in args.files:
        samples = samples_of(path, options)
        sampler = (
            {}
            if path.suffix == ".npy"
            else {name: getattr(options, name) for name in ("sample_steps", "eta", "guidance", "seed")}
        )
        print(json.dumps({"file": str(path), **sampler, **judge_for(len(samples))(samples)}), flush=True)


if __name__ == "__main__":
    main()
