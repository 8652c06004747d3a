"""What code, tests and pages cite exists: every page, every section of a page, every file that a page links to."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fvdfs.mountoptions import MOUNT_OPTIONS
from support.options import options_page

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted([*PAGES, *ROOT.glob("fvdfs/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/**/*.sh")])

MENTION = re.compile(
    r"""
    \]\((?P<link>[^)\s]*)\)                                         # [text](docs/page.md#a-section)
    | (?P<page>[\w/-]+\.md\b)                                       # page.md, "A section" and "Another"
      (?: ,\s+ (?P<sections> "[^"]+" (?: (?:,|\s+and)\s+ "[^"]+" )* ) )?
    """,
    re.VERBOSE,
)
NUMBERED = re.compile(r"\bsections? \d", re.IGNORECASE)
"""Sections have names: numbers change when a page does."""


@cache
def sections(page: Path) -> frozenset[str]:
    """The headings of a page, its title left out."""
    return frozenset(re.findall(r"^##+ (.+)$", page.read_text(), re.MULTILINE))


def anchor(section: str) -> str:
    """The part of a link behind # that leads to a section."""
    return re.sub(r"[^\w -]", "", section).replace(" ", "-").lower()


def missing(source: Path, text: str) -> Iterator[str]:
    """What the text, which stands in `source`, cites and is not there."""
    for mention in MENTION.finditer(text):
        if mention["page"]:
            page = next((page for page in PAGES if page.match(mention["page"])), None)
            if page is None:
                yield mention["page"]
                continue
            for section in re.findall(r'"([^"]+)"', mention["sections"] or ""):
                if " ".join(section.split()) not in sections(page):
                    yield f'{mention["page"]}, "{section}"'
        elif source in PAGES and "://" not in mention["link"]:
            name, _, section = mention["link"].partition("#")
            target = source.parent / name if name else source
            if not target.exists() or (section and section not in map(anchor, sections(target))):
                yield mention["link"]
    yield from NUMBERED.findall(text)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(ROOT)))
def test_what_is_cited_exists(source: Path) -> None:
    if source != Path(__file__):  # which cites what does not exist
        assert list(missing(source, source.read_text())) == []


def test_every_kind_of_citation_is_found() -> None:
    cited = [m.groups() for source in SOURCES for m in MENTION.finditer(source.read_text())]
    assert any(page == "format.md" and found for _, page, found in cited)
    assert any(page == "format.md" and " and " in found for _, page, found in cited if found)
    assert any(link and link.endswith(".md") for link, _, _ in cited)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('(format.md, "Journal")', []),
        ('(format.md, "Journal" and\n    "Chunk\n    table").', []),
        ('docs/format.md, "Journal", "Bitmap"', []),
        ('(format.md, "Jornal")', ['format.md, "Jornal"']),
        ('(format.md, "Journal" and "Tabel")', ['format.md, "Tabel"']),
        ("(no-page.md)", ["no-page.md"]),
        ("(format.md, section 6)", ["section 6"]),
        ("see [it](docs/format.md) and [that](docs/format.md#reads-writes-copies)", []),
        ("[it](format.md)", ["format.md"]),
        ("[it](docs/format.md#no-such)", ["docs/format.md#no-such"]),
        ("[it](https://example.org/x.md)", []),
    ],
)
def test_what_is_missing_is_told(text: str, found: list[str]) -> None:
    assert list(missing(ROOT / "README.md", text)) == found


# ---- pages tell what is there, and pre-commit checks what tests/run.sh checks ----

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
NAME = re.compile(r"`([A-Za-z_][a-z_]\w*(?:\.\w+)+)`")
FILE = re.compile(r"`([\w/]+\.(?:py|sh))`")


def names_of(node: ast.AST) -> list[str]:
    """What a statement defines, or gives to self."""
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            match target:
                case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name):
                    return [name]
    return []


@cache
def defined() -> frozenset[str]:
    """All that fvdfs defines: `Class.name`; with its module, `module.name`; with its room, `room.module.name`."""
    found = set()
    for path in ROOT.glob("fvdfs/**/*.py"):
        for node in ast.parse(path.read_text()).body:
            names = set(names_of(node))
            if isinstance(node, ast.ClassDef):
                members = {f"{node.name}.{name}" for part in ast.walk(node) for name in names_of(part)}
                found |= members
                names |= members
            found |= {f"{module}.{name}" for module in (path.stem, f"{path.parent.name}.{path.stem}") for name in names}
    return frozenset(found)


def test_names_in_the_architecture_exist() -> None:
    named = set(NAME.findall(ARCHITECTURE)) - set(FILE.findall(ARCHITECTURE))
    assert len(named) > 50
    assert sorted(named - defined()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_in_pages_exist(page: Path) -> None:
    assert [name for name in FILE.findall(page.read_text()) if not any(ROOT.rglob(name))] == []


def test_pages_tell_of_every_mount_option() -> None:
    rows = "".join(re.findall(r"^\| (.+?) \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE))
    assert [name for name in MOUNT_OPTIONS if not re.search(rf"`{name}\b", rows)] == []


def test_the_page_of_options_is_that_of_the_parser() -> None:
    """Where it fails, have it made anew: see tests/support/options.py."""
    assert (ROOT / "docs/options.md").read_text() == options_page()


def test_pre_commit_checks_what_the_tests_check() -> None:
    run, hooks = ((ROOT / name).read_text() for name in ("tests/run.sh", ".pre-commit-config.yaml"))
    assert re.findall(r"^((?:ruff|mypy) .+)$", run, re.MULTILINE) == re.findall(r"entry: (.+)", hooks)
