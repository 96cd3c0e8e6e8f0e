"""What benchmarks/quality.py measures, where the answer is known."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import train_diffusion as program

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


@pytest.mark.parametrize("choose", [False, True])
def test_no_image_has_two_roles(choose, monkeypatch):
    """The classifier's half, the real images beside, what is compared with, what is trained on."""
    train, test = (list(range(60)), list(range(100, 120)))
    monkeypatch.setattr(quality, "mnist", lambda: [(torch.tensor(x), torch.tensor(x))
                                                   for x in (train, test)])  # fmt: skip
    classifier, labels = quality.classifier_half()
    images = quality.roles(choose)
    assert torch.equal(classifier, labels) and torch.equal(images.others, images.others_labels)
    assert torch.equal(images.trained_on, images.trained_on_labels)
    seen, others, reference, trained_on = (
        set(part.tolist())
        for part in (classifier, images.others, images.reference, images.trained_on)
    )
    assert len(seen) == 30 and not seen & others and not (seen | others) & reference
    assert len(seen | others) == (50 if choose else 60)
    assert not reference & trained_on and trained_on == set(train) - reference
    assert len(reference) == (10 if choose else 20) and reference <= set(train if choose else test)


def test_roles_are_given_by_chance(mnist):
    """Every second training image is of the same source: each role has as many of either."""
    sixths = quality.sixths()
    assert sixths.bincount().tolist() == [10_000] * 6
    for sixth in range(6):
        assert abs((sixths[::2] == sixth).sum() - 5000) < 4 * (60_000 * 5 / 144) ** 0.5
    odd, even = (mnist[0][0][i::2].float().mean() for i in (1, 0))
    assert odd - even > 3  # gray levels: they do differ


def test_real_images_for_the_floor_have_the_labels_shares(mnist):
    (images, labels), (test_images, _) = mnist
    roles = quality.Roles(test_images, images, labels, images, labels)
    asked = torch.tensor([3] * 20 + [8] * 5)
    drawn = quality.draw_real(roles, 25, asked, seed=0)
    which = torch.cdist(drawn.flatten(1).float(), images.flatten(1).float()).argmin(dim=1)
    assert labels[which].tolist() == asked.tolist() and len(which.unique()) == 25
    assert len(quality.draw_real(roles, 9, None, seed=0)) == 9
    assert not torch.equal(drawn, quality.draw_real(roles, 25, asked, seed=1))
    with pytest.raises(ValueError, match="7000 samples of 4, but only 5842 real images"):
        quality.draw_real(roles, 7000, torch.full((7000,), 4), seed=0)


def test_images_are_taken_evenly():
    assert quality.evenly(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
    assert quality.evenly(torch.arange(10), 10).tolist() == list(range(10))


@pytest.fixture(scope="module")
def judge(mnist):
    """By a classifier trained for seconds. It compares with 600 test images."""
    (images, labels), (test_images, _) = mnist
    classifier = quality.train_classifier(images[:6000], labels[:6000], epochs=1)
    real, new = slice(6000, 9000), slice(9000, 12000)
    roles = quality.Roles(test_images[:600], images[real], labels[real], images[new], labels[new])
    return quality.Judge(classifier, roles)


def without(figures, *names):
    return {name: value for name, value in figures.items() if name not in names}


def test_shuffled_labels_change_what_is_as_asked_alone(judge, mnist):
    images, labels = (part[20000:20500] for part in mnist[0])
    shuffled = labels[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    right, wrong = judge([images], labels), judge([images], shuffled)
    assert right["as_asked"]["mean"] > 0.6 and 0.05 < wrong["as_asked"]["mean"] < 0.15
    assert right["as_asked"]["real"] == wrong["as_asked"]["real"]
    assert without(right, "as_asked") == without(wrong, "as_asked")
    assert judge([images]).keys() == without(right, "as_asked").keys()


def test_real_images_against_themselves_are_perfect(judge):
    figures = judge([judge.images.reference])
    assert figures["frechet"]["mean"] == pytest.approx(0, abs=1e-4)
    assert figures["over_floor"]["mean"] == pytest.approx(0, abs=1e-4)
    assert figures["coverage"]["mean"] == 1
    assert figures["near_training_images"]["mean"] == pytest.approx(0.01, abs=0.005)


def test_the_distance_is_to_all_real_images_and_coverage_is_among_as_many(judge):
    samples = judge.images.others[:150]
    features, _ = quality.look(judge.classifier, samples)
    reference, _ = quality.look(judge.classifier, judge.images.reference)
    figures = judge.of_one_draw(samples, None)
    assert figures["frechet"] == pytest.approx(quality.frechet_distance(features, reference))
    density, coverage = quality.density_and_coverage(reference[::4], features)  # 150 of 600
    assert (figures["density"], figures["coverage"]) == pytest.approx((density, coverage))


def test_the_classifier_is_trained_on_its_half_alone_and_refused_if_weak(
    judge, monkeypatch, tmp_path
):
    seen = []
    half = torch.zeros(3, 1, 28, 28), torch.arange(3)
    monkeypatch.setattr(quality, "CACHE", tmp_path / "cache" / "classifier.pt")
    monkeypatch.setattr(quality, "classifier_half", lambda: half)
    monkeypatch.setattr(
        quality, "train_classifier", lambda *data: seen.append(data) or judge.classifier
    )
    with pytest.raises(SystemExit, match="too weak"):
        quality.load_classifier()  # it was trained for seconds
    assert not quality.CACHE.exists() and seen == [half]
    right = F.one_hot(quality.mnist()[1][1], 10).float()
    monkeypatch.setattr(quality, "look", lambda model, images: (None, right))
    quality.load_classifier()
    again = quality.load_classifier()  # from the file
    assert len(seen) == 2 and not again.training
    assert all(
        map(torch.equal, again.state_dict().values(), judge.classifier.state_dict().values())
    )


def test_training_images_are_found_to_be_copies(judge):
    assert judge([judge.images.trained_on[:50]])["near_training_images"]["mean"] == 1


def test_figures_are_the_mean_of_all_draws_beside_ten_of_real_images(judge, monkeypatch):
    """Real images as draws: two of the ten that make the floor, and no others."""
    labels = quality.proportional_labels(300, judge.images.trained_on_labels)
    draws = [quality.draw_real(judge.images, 300, labels, seed) for seed in range(10)]
    figures = judge(draws, labels)
    assert figures["num_samples"] == 300 and figures["draws"] == 10
    assert figures["over_floor"]["mean"] == pytest.approx(1, abs=1e-4)
    assert figures["over_floor"]["low"] < 1 < figures["over_floor"]["high"]
    for name in ("frechet", "over_floor", "as_asked", "sure", "coverage", "density"):
        assert without(figures[name], "real") == figures[name]["real"], name
    two = judge(draws[:2], labels)
    assert two["frechet"]["real"] == figures["frechet"]["real"]
    each = [judge([draw], labels)["frechet"]["mean"] for draw in draws[:2]]
    assert without(two["frechet"], "real") == pytest.approx(
        {"mean": sum(each) / 2, "low": min(each), "high": max(each)}, abs=1e-4
    )
    assert each[0] != each[1]


def test_a_digit_is_sure_if_one_class_has_99_percent(judge, monkeypatch):
    """Half of six are sure, two are not what was asked, all but one are of class 0."""
    probs = torch.full((6, 10), 0.001)
    probs[range(6), [0, 0, 0, 0, 0, 3]] = torch.tensor([0.991, 0.999, 0.995, 0.989, 0.6, 0.5])
    monkeypatch.setattr(quality, "look", lambda model, images: (torch.randn(6, 64), probs))
    figures = judge.of_one_draw(torch.zeros(6, 1, 28, 28), torch.tensor([0, 1, 2, 0, 0, 3]))
    assert figures["sure"] == 0.5 and figures["as_asked"] == pytest.approx(4 / 6)
    shares = judge.images.trained_on_labels.bincount() / 3000
    classes = torch.tensor([5, 0, 0, 1, 0, 0, 0, 0, 0, 0]) / 6
    expected = (classes - shares).abs().sum().item() / 2
    assert figures["class_total_variation"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_samples", [5, 601])
def test_too_few_or_too_many_digits_are_refused(judge, num_samples):
    with pytest.raises(ValueError, match=f"{num_samples} digits: 6 to 600 can be judged"):
        judge([torch.zeros(num_samples, 1, 28, 28, dtype=torch.uint8)])


@pytest.mark.parametrize("choose", [[], ["--choose"]])
def test_each_draw_of_a_checkpoint_has_its_own_seed(judge, monkeypatch, capsys, tmp_path, choose):
    """Two draws from seed 3 on are judged as the files of --sample-only with seeds 3 and 4 are."""
    monkeypatch.setattr(quality, "load_classifier", lambda: judge.classifier)
    asked = []
    monkeypatch.setattr(quality, "roles", lambda choose: asked.append(choose) or judge.images)
    model, scheduler = program.load_model()
    labels = quality.proportional_labels(12, judge.images.trained_on_labels)
    files = []
    for seed in (3, 4):
        images = program.sample(model, scheduler, labels=labels, num_steps=2, seed=seed)
        files.append(tmp_path / f"{seed}.npz")
        np.savez(files[-1], images=images[:, 0].numpy(), labels=labels.numpy())
    options = ["--num-samples", "12", "--draws", "2", "--sample-steps", "2", "--seed", "3"]
    checkpoint = str(ROOT / "pretrained.pt")
    monkeypatch.setattr(
        sys, "argv", ["quality.py", checkpoint, *map(str, files), *options, *choose]
    )
    quality.main()
    assert asked == [bool(choose)]
    both, *each = map(json.loads, capsys.readouterr().out.splitlines())
    assert both["draws"] == 2 and both["guidance"] == program.GUIDANCE and both["seed"] == 3
    distances = [figures["frechet"]["mean"] for figures in each]
    assert without(both["frechet"], "real") == pytest.approx(
        {"mean": sum(distances) / 2, "low": min(distances), "high": max(distances)}, rel=1e-3
    )
