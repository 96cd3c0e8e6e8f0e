"""The rule of the house: what computes with x_0, x_t, t or noise is not in support/.

CONTRIBUTING.md has the map.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

SUPPORT = sorted((ROOT / "support").glob("*.py"))
LESSON = {"forward_reverse_process", "train_diffusion"}
DIFFUSION = {"x_0", "x_t", "x_T", "noise_pred", "alphas_cumprod", "NoiseScheduler", "UNet"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: "support.files", "torch.nn.functional"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = node.module == "support"
            names |= {f"support.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


def identifiers(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    fields = ("id", "arg", "attr", "name")
    return {getattr(node, field) for node in nodes for field in fields if hasattr(node, field)}


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.name)
def test_support_holds_no_diffusion_and_imports_no_lesson(path):
    assert not imported(path) & LESSON
    assert not identifiers(path) & DIFFUSION


def test_no_module_imports_itself_by_a_detour():
    graph = {f"support.{path.stem}": imported(path) for path in SUPPORT}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError at a circle


def test_the_mathematics_imports_pytorch_alone():
    names = imported(ROOT / "forward_reverse_process.py")
    assert {name.split(".")[0] for name in names} == {"math", "torch"}


def test_no_statement_stands_between_the_imports_of_the_program():
    _, *body = ast.parse((ROOT / "train_diffusion.py").read_text(encoding="utf-8")).body
    imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
    assert imports == sorted(imports, reverse=True)


def test_every_module_has_a_line_on_the_maps_and_tests_of_its_name():
    maps = [ROOT / "support" / "__init__.py", ROOT / "CONTRIBUTING.md"]
    for path in SUPPORT[1:]:
        for text in (file.read_text(encoding="utf-8") for file in maps):
            assert len(re.findall(rf"\b{path.stem}(\.py)?\b", text)) >= 1, path.stem
        assert (ROOT / "tests" / f"test_{path.stem}.py").is_file()
