"""benchmarks/race.py, with contenders that train in no time."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from test_quality import quality
from torch import nn

sys.path.insert(0, str(ROOT / "benchmarks"))
import race


class Gray(nn.Module):
    """Draws the gray level that it has learned."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros(1))


def contender(lr_falls=False):
    model = Gray()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5)]

    def loss(images, labels):
        assert images.shape == (4, 1, 28, 28) and labels.shape == (4,)
        return (model.level - images).square().mean()

    def draw(ema, labels):
        return ema.level.expand(len(labels), 1, 28, 28)

    return race.Contender(model, optimizers, 4, lambda step: 0.5, loss, draw, lr_falls=lr_falls)


@pytest.fixture
def clock(monkeypatch):
    """A second goes by at every look at it."""
    seconds = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))


IMAGES, LABELS = torch.full((20, 1, 28, 28), 255, dtype=torch.uint8), torch.arange(20) % 10


def test_only_training_counts_and_weights_are_kept_at_each_time(clock):
    """A step takes a second, so there are 60 and 120 of them, of four images each."""
    (early, seen), (late, seen_late) = race.race(contender(), IMAGES, LABELS, [1, 2])
    assert (seen, seen_late) == (240, 480)
    assert 0.9 < early.level.item() <= late.level.item() <= 1
    assert early.level is not late.level


def test_a_learning_rate_rises_falls_to_0_and_stays_for_the_others(clock):
    falling, steady = contender(lr_falls=True), contender()
    rates = []
    for each in (falling, steady):
        steps = race.training(each, IMAGES, LABELS, length=400)
        for _ in range(401):
            next(steps)
            rates.append(each.optimizers[0].param_groups[0]["lr"])
    warm_up = race.train_diffusion.WARMUP_STEPS
    assert rates[0] == pytest.approx(0.5 / warm_up) and max(rates[:401]) == rates[warm_up - 1]
    assert rates[400] == 0 and rates[300] == pytest.approx(0.5 * (1 - 300 / 400))
    assert set(rates[401:]) == {0.5}


def test_a_race_goes_on_with_what_was_kept_but_not_of_another_race(
    clock, monkeypatch, tmp_path, capsys, mnist
):
    raced = []

    def make(name):
        return lambda: (raced.append(name), contender())[1]

    def judge(samples, labels):
        return {"as_asked": {"mean": len(samples) / 10}, "over_floor": {"mean": len(labels)}}

    contenders = {name: make(name) for name in ("one", "two")}
    monkeypatch.setattr(race, "CONTENDERS", contenders)
    monkeypatch.setattr(race, "EVERYONE", contenders)
    monkeypatch.setattr(race, "load_classifier", lambda: None)
    monkeypatch.setattr(race, "Judge", lambda classifier, images: judge)
    monkeypatch.setattr(race, "mnist", lambda: mnist)
    monkeypatch.setattr(quality, "mnist", lambda: mnist)

    def run(*options):
        common = ["--minutes", "0.2", "0.1", "--num-samples", "20", "--draws", "2"]
        monkeypatch.setattr("sys.argv", ["race.py", *common, "--keep", str(tmp_path), *options])
        race.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]

    rows = run("--contenders", "one")
    assert [row["minutes"] for row in rows] == [0.1, 0.2] and raced == ["one"]
    assert rows[0]["as_asked"]["mean"] == 0.2 and rows[0]["over_floor"]["mean"] == 20
    both = run("--picture", str(tmp_path / "race.png"))
    assert both[:2] == rows and len(both) == 4 and raced == ["one", "two"]
    assert (tmp_path / "race.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="of another race"):
        run("--seed", "1")


def test_our_recipe_trains_and_draws():
    """One step of the real one: the network learns, and an average of it draws what is asked."""
    torch.manual_seed(0)
    ours = race.CONTENDERS["this repository"]()
    before = [weight.clone() for weight in ours.model.parameters()]
    images, labels = torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 10
    _, seen, ema = next(race.training(ours, images, labels))
    assert seen == 64
    assert any((a != b).any() for a, b in zip(before, ours.model.parameters()))
    drawn = race.draw(ours, ema, torch.tensor([3, 1]))
    assert drawn.shape == (2, 1, 28, 28) and drawn.dtype == torch.uint8
