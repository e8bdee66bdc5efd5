"""The documentation names what there is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def names_in(path: Path) -> set[str]:
    """Functions and classes of a file, methods also after their class's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found.update(f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))
    return found


def test_the_walk_names_files_and_functions_that_there_are() -> None:
    lines = (ROOT / "docs" / "walk.md").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if re.match(r"\d+\. ", line)]
    assert 30 <= len(steps) <= 40
    path = ROOT
    for line in steps:
        head, _, _ = line.partition(":")
        words = re.findall(r"`([\w./]+)`", head)
        if words[0].endswith(".py"):
            path = ROOT / "graphpart" / words.pop(0)
        names = names_in(path)
        assert words[0] in names, f"{path}: {words[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
