"""docs/experiments.md: every block runs as it stands, and shows what its sentences say."""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, look_like, right
from test_likelihood import GaussianNetwork, gaussian_images
from test_readme import anchors

from train_diffusion import denoise

PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## \d+\. ", PAGE, flags=re.MULTILINE)[1:]
BLOCKS = {
    section.split("\n")[0]: block
    for section in SECTIONS
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a block, with some of its words replaced so that it takes less time.

    Returns its variables; `picture`, the images [rows, columns, C, H, W] that it drew; and
    `numbers`, those that it printed, line by line.
    """
    monkeypatch.chdir(tmp_path)

    def run_block(title, smaller=None):
        code = BLOCKS[title]
        for words, fewer in (smaller or {}).items():
            assert words in code, words
            code = code.replace(words, fewer)
        result: dict = {}
        with mock.patch("support.pictures.draw_images") as draw_images:
            exec(code, result)
        if draw_images.called:
            _, result["picture"], rows, columns, _ = draw_images.call_args.args
            assert result["picture"].shape[:2] == (len(rows), len(columns))
        number = r"-?\d+\.?\d*(?:e-?\d+)?"
        lines = capsys.readouterr().out.splitlines()
        result["numbers"] = [[float(n) for n in re.findall(number, line)] for line in lines]
        return SimpleNamespace(**result)

    return run_block


def test_every_section_has_a_question_a_block_and_a_test():
    assert len(BLOCKS) == len(SECTIONS) == 15
    source = (ROOT / "tests" / "test_experiments.py").read_text(encoding="utf-8")
    for i, (title, block) in enumerate(BLOCKS.items()):
        assert f'"{title}"' in source, title
        assert len(block.splitlines()) <= (50 if i == 0 else 30), title
    assert all("\n**Question.** " in section for section in SECTIONS)
    for i, title in enumerate(BLOCKS, start=1):
        (anchor,) = anchors(f"## {i}. {title}")
        assert f"{i}. [{title}](#{anchor})" in PAGE


def test_one_dimension_needs_many_steps_and_loses_variance(run):
    result = run("A perfect network in one dimension", {"1000, 1, 1, 1": "300, 1, 1, 1"})
    *runs, (spread_of_images,) = result.numbers
    assert [row[:2] for row in runs] == [[1, 1], [4, 1], [25, 1], [1000, 1], [25, 0]]
    _, _, between, spread = zip(*runs)
    assert between[0] == 100 and between[1] > 10 and max(between[2:]) < 1.5
    assert spread[2] < 0.8 * spread_of_images < spread[3] < 1.2 * spread_of_images
    *_, (_, x_0, _) = denoise(result.perfect_network, result.scheduler, result.x_T, num_steps=1)
    torch.testing.assert_close(x_0, result.x_0.mean().expand_as(x_0), rtol=0, atol=1e-3)


def test_a_perfect_network_copies_and_ours_does_not(run):
    fewer = {"to_model(images).": "to_model(images[:9000]).", "torch.arange(0, 1000, 2)":
             "torch.arange(0, 1000, 10)", ":500]": ":100]"}  # fmt: skip
    result = run("A perfect network on MNIST", fewer)
    drawn, nearest = result.picture.int()
    assert (drawn - nearest).abs().max() <= 1 and result.numbers[0][0] < 1e-3
    (perfect, _, ours), (perfect_on_test, _, ours_on_test) = result.numbers[1:]
    assert perfect < ours / 3 and perfect_on_test > 3 * ours_on_test
    assert abs(ours - ours_on_test) < 0.15 * ours


def test_the_prediction_is_the_mean_of_the_draws(run):
    result = run("Many images, one mean", {"(200,)": "(16,)", "repeat(200,": "repeat(16,",
                                           "(299, 599, 799, 999)": "(299, 799)",
                                           '"t = 599", ': "", ', "t = 999"': ""})  # fmt: skip
    (t, apart, spread), (later, apart_later, spread_later) = result.numbers
    assert (t, later) == (299, 799) and spread < spread_later
    # The mean of 16 draws has a chance of its own: a quarter of their spread.
    assert apart < spread / 4 + 0.02 and apart_later < spread_later / 4 + 0.05


def test_more_steps_make_sharper_digits(run, mnist):
    result = run("How many steps?", {", 10, 25, 100, 1000]": ", 25]"})
    gray = ((result.picture > 50) & (result.picture < 200)).float().mean(dim=(1, 2, 3, 4))
    one, two, _, many = gray.tolist()
    assert one > 1.5 * many and two > many
    assert right(look_like(result.picture[-1], mnist), list(range(10))) >= 0.8


def test_without_fresh_noise_the_start_decides_everything(run):
    result = run("Fresh noise or none: eta")
    all_fresh, half, none = result.picture.float().std(dim=1).mean(dim=(1, 2, 3))
    assert all_fresh > 10 and half > 10 and none == 0


def test_guidance_costs_variety(run, mnist):
    result = run("What guidance trades")
    ink = result.picture.float().mean(dim=(1, 2, 3, 4))
    assert ink[-1] > 1.1 * ink[0]
    assert right(look_like(result.picture[-1], mnist), [4] * 10) == 1


def test_the_way_leads_from_noise_over_the_average_seven_to_a_seven(run, mnist):
    x_t, x_0 = run("The way from noise to a digit").picture
    images, labels = mnist[0]
    average = images[labels == 7].float().mean(dim=0)

    def likeness(image):
        return torch.corrcoef(torch.stack([image.flatten().float(), average.flatten()]))[0, 1]

    assert likeness(x_0[0]) > 0.7 and abs(likeness(x_t[0])) < 0.2
    assert torch.equal(x_t[-1], x_0[-1]) and look_like(x_0[-1:], mnist) == [7]


def test_three_formulas_draw_the_same_digits(run):
    result = run("v is a velocity: the same network is a flow")
    torch.testing.assert_close(result.u, result.x, rtol=0, atol=2e-3)
    assert result.numbers[0][0] < 0.01 and result.numbers[0][1] < 0.01


def test_twice_the_steps_halve_the_error_of_an_inversion(run):
    fewer = {"(25, 50, 100, 200)": "(25, 50)", ":20]": ":6]", "noised, 200": "noised, 50"}
    (_, error, _), (_, half, deviation), (_, noised, right_one) = run(
        "Inversion: the noise of a real digit", fewer
    ).numbers
    assert 1.6 < error / half < 2.6
    assert deviation < 0.6 and 0.85 < right_one < 1.1 and noised < 0.2


def test_a_walk_starts_and_ends_at_real_digits(run, mnist):
    fewer = {"(1000, 100)": "(1000, 50)", "repeat(8), 100": "repeat(8), 50", "(2, 4, 7)": "(2, 7)",
             "[\"\"] * 3": "[\"\"] * 2"}  # fmt: skip
    picture = run("A walk between two real digits", fewer).picture.float()
    steps = picture.diff(dim=1).abs().mean(dim=(2, 3, 4))
    apart = (picture[:, 0] - picture[:, -1]).abs().mean(dim=(1, 2, 3))
    assert (
        steps[:, [0, -1]].amax(dim=1) < 0.2 * apart
    ).all()  # the first drawn one is the real one
    assert (steps.amax(dim=1) < apart).all()
    assert right(look_like(picture.flatten(0, 1), mnist), [2] * 10 + [7] * 10) >= 0.8


def test_filling_in_keeps_what_is_given(run, mnist):
    result = run("Filling in", {"repeat(4": "repeat(2", "(6, 10)": "(4, 10)", "range(1, 5)":
                                "range(1, 3)"})  # fmt: skip
    real, given, *filled = result.picture.int()
    assert torch.equal(given[:, :, :14], real[:, :, :14]) and given[:, :, 14:].unique().numel() == 1
    for new in filled:
        assert torch.equal(new[:, :, :14], real[:, :, :14])
        assert (new - real)[:, :, 14:].abs().float().mean() > 5
        assert right(look_like(new, mnist), mnist[1][1][:10].tolist()) >= 0.7
    assert (filled[0] - filled[1])[:, :, 14:].abs().float().mean() > 5


def test_more_noise_brings_back_less_of_a_digit(run, mnist):
    rows = run("Halfway and back").picture.float()
    changes = [(rows[i] - rows[0]).abs().mean().item() for i in (2, 4, 6)]
    assert changes == sorted(changes) and changes[-1] > 2 * changes[0]
    back = look_like(rows[2::2].flatten(0, 1), mnist)
    assert right(back, mnist[1][1][:10].tolist() * 3) >= 0.8


def test_the_network_reads_and_better_with_more_timesteps(run):
    fewer = {":200]": ":40]", "range(100, 851, 50)}": "range(200, 801, 100)}", "[300, 500, 700], ":
             "", ", range(100, 851, 50))": ")"}  # fmt: skip
    (one, read, _), (many, read_more, _) = run("The network reads", fewer).numbers
    assert (one, many) == (1, 7) and read + 20 < read_more and read_more > 80


def test_the_bits_of_our_network_are_in_the_range_that_the_page_gives(run):
    steps, last, start, total = run("How many bits?").numbers[0]
    assert total == pytest.approx(steps + last, abs=0.011) and 1.2 < total < 1.8
    assert 0 < start < 1e-8


def test_the_bits_are_a_bound_for_data_whose_entropy_is_known(run, monkeypatch):
    network, images = GaussianNetwork(), gaussian_images(999)
    data = None, (images, torch.zeros(999, dtype=torch.int64))
    monkeypatch.setattr("train_diffusion.load_model", lambda: (network, network.scheduler))
    monkeypatch.setattr("train_diffusion.load_images", lambda: data)
    width = GaussianNetwork.last_deviation
    steps, last, start, total = run("How many bits?", {"0.003)": f"{width})"}).numbers[0]
    expected = network.bits()
    assert steps == pytest.approx(expected["steps"], abs=0.1)
    assert last == pytest.approx(expected["last"], abs=0.1)
    assert start == pytest.approx(expected["start"], rel=0.5)
    assert network.entropy() < total < network.entropy() + 0.7


def test_the_linear_schedule_loses_the_image_earlier(run):
    result = run("Two schedules")
    cosine, linear = (torch.stack(result.noised[i : i + 10]).flatten(1) for i in (0, 10))
    image = result.x_0.flatten()
    for early, late in zip(linear[2:8], cosine[2:8]):
        likeness = torch.corrcoef(torch.stack([image, early, late]))[0, 1:]
        assert likeness[0] < likeness[1]
    assert torch.corrcoef(torch.stack([image, linear[6]]))[0, 1] < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("title", BLOCKS)
def test_every_block_prints_what_the_page_says_and_draws_its_picture(
    title, tmp_path, monkeypatch, capsys
):
    """Numbers, by a quarter: another machine rounds otherwise."""
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[title], {})
    numbers = re.compile(r"\d+\.?\d*(?:e-?\d+)?")
    printed = numbers.findall(capsys.readouterr().out)
    for expected in re.findall(r"```text\n(.*?)```", SECTIONS[list(BLOCKS).index(title)], re.S):
        for number, said in zip(printed, numbers.findall(expected), strict=True):
            assert float(number) == pytest.approx(float(said), rel=0.25, abs=0.01)
    pictures = {path.name for path in tmp_path.iterdir()}
    section = SECTIONS[list(BLOCKS).index(title)]
    assert pictures == set(re.findall(r"\]\((\w+\.png)\)", section)) - {"bits.png"}
