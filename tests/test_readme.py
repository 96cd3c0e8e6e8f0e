"""The pages' commands, code, links and pictures are those of the repository."""

import itertools
import re
import shlex
import shutil

import pytest
from conftest import ROOT, TINY, look_like, right, run_main
from PIL import Image

import train_diffusion as program

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
INSTALL = "python3 -m venv .venv && .venv/bin/python -m pip install -q -r requirements.txt"


def test_the_first_commands_start_from_nothing():
    """They are complete on a fresh machine; .ci/run types them."""
    install, draw, train, test = COMMANDS[:4]
    assert install == INSTALL
    assert draw.startswith(".venv/bin/python train_diffusion.py --sample-only ")
    assert train == f"{INSTALL} && .venv/bin/python train_diffusion.py"
    assert test == f"{INSTALL} && .venv/bin/python -m pytest"


def test_every_other_command_of_the_program_works(small_data, tmp_path, monkeypatch):
    """In the README's order, made small: what is resumed has been trained before."""
    monkeypatch.chdir(tmp_path)
    small = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*small, "--max-steps", 2) == (0, "")
    shutil.copy(ROOT / "pretrained.pt", tmp_path)
    for i, name in enumerate(("cat", "dog") * 8):
        (tmp_path / "my_pictures" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (200 * (i % 2), i, 9)).save(f"my_pictures/{name}/{i}.png")
    words = [shlex.split(command, comments=True) for command in [COMMANDS[1], *COMMANDS[4:]]]
    ours = [command[2:] for command in words if command[1] == "train_diffusion.py"]
    assert len(ours) == 7
    assert [" ".join(command) for command in words if command[1] != "train_diffusion.py"] == [
        # test_processes.py runs it
        "torchrun --standalone --local-addr=127.0.0.1 --nproc-per-node=2 train_diffusion.py",
    ]
    for options in ours:
        if "--sample-only" in options:
            labels = "--labels" in options
            few = ["--sample-steps", 2, *([] if labels else ["--num-samples", 4])]
        else:
            own = options if "--output-dir" in options else []  # a later one has the last word
            few = ["--max-steps", 3, *([] if "--resume" in options else [*small, *own])]
        assert run_main(*options, *few) == (0, ""), options


def test_readme_and_help_name_the_same_options():
    """And the defaults that the README states are the program's."""
    parser = program.make_parser()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - {"--nproc-per-node", "--standalone", "--local-addr"} <= set(
        parser._option_string_actions
    )
    assert all(action.help for action in parser._actions)
    default, text = parser.get_default, " ".join(README.split())
    low, high = program.GUIDANCE_INTERVAL
    assert f"The default is $w = {default('guidance')}$, and only while" in text
    assert f"lies between {low} and {high}." in text
    assert f"Why do {default('sample_steps')} steps do?" in text
    assert f"$x_t$ at $t = {default('timesteps') - 1}$ is almost pure noise" in text
    size = sum(weight.numel() for weight in program.load_model()[0].parameters())
    assert f"This one has {size:,} parameters" in text


def test_a_number_is_drawn(tmp_path, monkeypatch, mnist):
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    (block,) = (text for text in PYTHON if "save_image" in text)
    exec(block, variables)
    assert (tmp_path / "number.png").is_file()
    assert right(look_like(variables["digits"], mnist), [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]) >= 0.8


def test_the_code_beside_the_equations_is_that_of_the_source():
    """Every other block of Python is lines of one of the two files, one after the other."""

    def unindented(text: str) -> str:
        return "\n".join(line.strip() for line in text.strip().splitlines())

    files = "forward_reverse_process.py", "train_diffusion.py"
    sources = [unindented((ROOT / name).read_text(encoding="utf-8")) for name in files]
    blocks = [unindented(text) for text in PYTHON if "save_image" not in text]
    assert len(blocks) == 6
    for block in blocks:
        assert any(block in source for source in sources), block


def test_options_of_the_benchmarks_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, options in re.findall(r"python benchmarks/(\w+\.py)(.*)", text):
            source = (ROOT / "benchmarks" / script).read_text(encoding="utf-8")
            for option in re.findall(r"--[a-z-]+", options):
                assert f'"{option}"' in source, f"{script} {option}"


def table(page: str, head: str) -> list[list[str]]:
    """The cells below a line of a page that begins so."""
    lines = page.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def first_number(cell: str) -> float:
    return float(re.findall(r"[\d.]+", cell)[0])


def test_figures_are_those_of_the_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    experiments = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    steps = {(row[0], row[1]): first_number(row[2]) for row in table(results, "| steps | eta |")}
    ((_, *shown),) = table(README, "| steps | 1 |")
    counts = ["1", "2", "5", "10", "25", "50", "100"]
    assert len(shown) == len(counts)
    for count, cell in zip(counts, shown):
        places = len(cell.partition(".")[2])
        assert round(steps[count, "1"], places) == float(cell), count
    text = " ".join(experiments.split())
    said = ("1,084 in one step, 19.8 in 2, 3.7 in 5, 3.0 in 10, 1.6 in 25, 1.35 in 50 and in 100",
            "nearest to real ones with 10 steps (1.5), and with more they get worse (2.5 with 100)",
            "the other way round (3.0 and 1.35)")  # fmt: skip
    assert all(sentence in text for sentence in said)
    assert (round(steps["10", "0"], 1), round(steps["100", "0"], 1)) == (1.5, 2.5)

    guidance = {row[0]: row for row in table(results, "| w | over the floor |")}
    for w, sure, nearby in table(experiments, "| w |"):
        assert sure == guidance[w][3]
        assert first_number(nearby) == round(100 * float(guidance[w][4]), 1)

    default = {row[0].split(" (")[0]: row[1:] for row in table(results, "| | seed 0 |")}
    names = [("as asked", 1), ("sure", 1), ("coverage", 100), ("over the floor", 1)]
    for (name, scale), (_, *shown) in zip(names, table(README, "| | drawn |"), strict=True):
        seeds = [scale * first_number(cell) for cell in default[name][:3]]
        places = len(shown[0].split()[0].partition(".")[2])
        assert abs(sum(seeds) / 3 - first_number(shown[0])) <= 0.5 * 10**-places, name
        assert round(scale * first_number(default[name][3]), places) == first_number(shown[1])


def anchors(page: str) -> set[str]:
    """GitHub's names of the headings of a page."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    pattern = r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"|^\[\w+\]: (\S+)$"
    return ["".join(found) for found in re.findall(pattern, page, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(page):
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_formulas_in_a_sentence_are_such_that_github_renders_them():
    """It takes the backslash of `\\,` away, as everywhere in Markdown, and shows the comma."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for formula in re.findall(r"\$[^$]+\$", text):
            assert not re.search(r"\\[^a-zA-Z]|\n", formula), formula


def test_every_picture_is_shown_and_made_by_a_block_or_a_command():
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    made = {name for page in pages for name in re.findall(r'"(\w+\.png)"', page)}
    made |= {name for page in pages for name in re.findall(r"--picture docs/(\S+)", page)}
    made |= {"samples.png", "denoising.gif", "denoising.png", "forward_process.png"}  # by a run
    made |= {"loss_curve.png", "noise_schedule.png"}
    shown = {link.partition("/")[2] or link for page in pages for link in links(page)}
    pictures = {path.name for path in (ROOT / "docs").glob("*.*") if path.suffix != ".md"}
    assert pictures <= made and pictures <= {name.rpartition("/")[2] for name in shown}
    assert sum(path.stat().st_size for path in (ROOT / "docs").iterdir()) < 3_000_000
