"""docs/tests.md, the index from rules to tests: its quotes stand in their pages, its tests exist, none is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
INDEX = ROOT / "docs/tests.md"
TEST = re.compile(r"`(?P<file>[\w/]+\.py)::(?P<name>\w+)`")
ROW = re.compile(r"^\| (?P<rule>.+) \| (?P<tests>(?:`[\w/.:]+` ?)+)\|$", re.MULTILINE)


def plain(text: str) -> str:
    return " ".join(text.split())


def rows() -> Iterator[tuple[str, str, str]]:
    """The page, the rule that is quoted from it, and its tests."""
    for section in re.split(r"^## ", INDEX.read_text(), flags=re.MULTILINE)[1:]:
        page, _, text = section.partition("\n")
        for row in ROW.finditer(text):
            yield page, row["rule"], row["tests"]


def paragraphs(page: str) -> Iterator[str]:
    """Those of a page, or of the head of a module: each item of a list is one, each table, each block of code."""
    text = (ROOT / page).read_text()
    if page.endswith(".py"):
        text = ast.get_docstring(ast.parse(text)) or ""
    for block in re.split(r"\n\s*\n|\n(?=\s*- |\d\. )", text.partition("\n")[2]):
        if block.strip() and not block.startswith("#"):
            yield plain(block)


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in functions if node.name.startswith("test_"))


PAGES = sorted({page for page, _, _ in rows()})


@pytest.mark.parametrize("page", PAGES)
def test_every_rule_stands_in_its_page(page: str) -> None:
    found = list(paragraphs(page))
    assert [rule for of, rule, _ in rows() if of == page and not any(rule in text for text in found)] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_paragraph_is_without_a_test(page: str) -> None:
    rules = [rule for of, rule, _ in rows() if of == page]
    others = [text for text in paragraphs(page) if not any(rule in text for rule in rules)]
    assert [text for text in others if not text.endswith(":")] == [], "only what introduces others needs none"


def test_every_test_exists() -> None:
    named = [(test["file"], test["name"]) for test in TEST.finditer(INDEX.read_text())]
    assert len(named) > 100
    assert [(file, name) for file, name in named if name not in names_in(file)] == []


def test_every_row_is_read() -> None:
    lines = [line for line in INDEX.read_text().splitlines() if "::" in line and line.startswith("|")]
    assert len(lines) == len(list(rows()))
    assert all(test.startswith("`") and TEST.fullmatch(test) for _, _, tests in rows() for test in tests.split())
