"""What fvdfs may write to its log, as its source has it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


class LogLine(NamedTuple):
    """A call that writes to the log."""

    place: str
    level: str
    text: str
    """`…` stands for what varies."""


def log_lines() -> Iterator[LogLine]:
    """All that stand in the source."""
    for path in sorted(ROOT.glob("fvdfs/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log" | "logger"), attr=level), args=[first, *more]):
                    if level in LEVELS or level == "log":
                        place = f"{path.relative_to(ROOT)}:{node.lineno}"
                        text = more[0] if level == "log" else first
                        assert isinstance(text, ast.Constant), f"{place}: the text of a log line is written out"
                        yield LogLine(place, level, re.sub("…+", "…", re.sub(r"%[\d.]*[sdfr]", "…", str(text.value))))
