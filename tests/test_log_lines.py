"""docs/operations.md tells of every line that fvdfs may write to its log, and of no others."""

from __future__ import annotations

import re

from support.loglines import ROOT, log_lines

SECTION = "What a line of the log means"


def told() -> set[str]:
    """The lines that the page explains: those in the first cells of its tables."""
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition(f"## {SECTION}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    return {line for cell in cells for line in re.findall("`([^`]+)`", cell)}


def test_each_line_of_the_log_is_explained() -> None:
    lines = list(log_lines())
    assert len(lines) > 80
    assert sorted(f"{line.place}: {line.text}" for line in lines if line.text not in told()) == []


def test_each_line_that_is_explained_exists() -> None:
    assert sorted(told() - {line.text for line in log_lines()}) == []
