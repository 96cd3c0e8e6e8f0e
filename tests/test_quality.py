"""What benchmarks/quality.py measures, where the answer is known."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import quality


def gaussian_cloud(mean: np.ndarray, covariance: np.ndarray, seed: int) -> torch.Tensor:
    """300 points with exactly this mean and this covariance."""
    points = np.random.default_rng(seed).normal(size=(300, len(mean)))
    points -= points.mean(axis=0)
    whitened = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return torch.from_numpy(whitened @ np.linalg.cholesky(covariance).T + mean)


def root(symmetric: np.ndarray) -> np.ndarray:
    """The square root of a matrix, by its eigenvalues."""
    values, vectors = np.linalg.eigh(symmetric)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def test_the_frechet_distance_is_that_of_two_gaussians():
    """Heusel et al. 2017, eq. 6, in its symmetric form, for covariances that do not commute."""
    means = np.array([[1.0, 0.0, -2.0], [0.5, 1.0, 0.0]])
    c_a = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.5]])
    c_b = np.array([[0.7, -0.2, 0.1], [-0.2, 1.5, 0.0], [0.1, 0.0, 3.0]])
    a, b = (gaussian_cloud(*pair, seed=i) for i, pair in enumerate(zip(means, (c_a, c_b))))
    trace = np.trace(c_a + c_b - 2 * root(root(c_a) @ c_b @ root(c_a)))
    expected = ((means[0] - means[1]) ** 2).sum() + trace
    assert quality.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert quality.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert quality.frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-6)


def test_density_and_coverage_count_points_in_neighborhoods():
    """Real points 0 ... 9 on a line: the fifth neighbor of 0 is 5 away, that of 4 is 3 away."""
    real, far = torch.arange(10.0)[:, None], torch.full((4, 1), 99.0)
    at_4_5 = torch.full((4, 1), 4.5)  # within the radius of 0 to 9 alike: all but none
    radii = torch.tensor([5, 4, 3, 3, 3, 3, 3, 3, 4, 5.0])
    inside = ((real.flatten() - 4.5).abs() < radii).sum().item()
    assert quality.density_and_coverage(real, far) == (0, 0)
    assert quality.density_and_coverage(real, at_4_5) == (inside / 5, inside / 10)
    half_far = torch.cat([far, at_4_5])
    assert quality.density_and_coverage(real, half_far) == (inside / 10, inside / 10)


@pytest.mark.parametrize("num_samples", [1, 7, 100, 2000])
def test_proportional_labels_have_the_shares_of_the_training_set(num_samples, mnist):
    labels = quality.proportional_labels(num_samples, mnist[0][1])
    counts = labels.bincount(minlength=10)
    exact = num_samples * mnist[0][1].bincount(minlength=10) / 60_000
    assert counts.sum() == num_samples and (counts - exact).abs().max() < 1


def test_real_images_for_the_floor_have_the_labels_shares(mnist):
    images, labels = mnist[0]
    asked = torch.tensor([3] * 20 + [8] * 5)
    drawn = quality.draw_real(25, asked)
    which = torch.cdist(drawn.flatten(1).float(), images.flatten(1).float()).argmin(dim=1)
    assert labels[which].tolist() == asked.tolist() and len(which.unique()) == 25
    assert len(quality.draw_real(9, None)) == 9
