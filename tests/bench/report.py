"""A table of the figures of fvdfs and others, with goals."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


class Report:
    """Figures of fvdfs and others, and the bounds that those of fvdfs should keep ("<= 1"); medians of all rounds.

    Those that are in the file already, from earlier runs, count, too; all are kept there.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.figures: dict[tuple[str, str, str], dict[str, list[float]]] = {}
        if file is not None and file.exists():
            self.figures = {(what, unit, goal): values for what, unit, goal, values in json.loads(file.read_text())}

    def add(self, what: str, unit: str, who: str, value: float, goal: str = "") -> None:
        self.figures.setdefault((what, unit, goal), {}).setdefault(who, []).append(value)
        print(f"{what}: {who} {value:.4g} {unit}", file=sys.stderr, flush=True)
        if self._file is not None:
            self._file.write_text(json.dumps([[*key, values] for key, values in self.figures.items()], indent=1))

    def median(self, what: str, unit: str, who: str) -> float:
        """Of all rounds, of a figure without a goal; 0 where there was none."""
        return statistics.median(self.figures.get((what, unit, ""), {}).get(who, [0.0]))

    def table(self) -> str:
        lines = ["| | unit | fvdfs | goal | | others |", "|---|---|---|---|---|---|"]
        for (what, unit, goal), values in self.figures.items():
            others = {who: f"{statistics.median(each):.4g}" for who, each in values.items()}
            mine, verdict = others.pop("fvdfs", ""), ""
            if goal and mine:
                value, bound = float(mine), float(goal.split()[1])
                verdict = "ok" if (value <= bound if goal.startswith("<") else value >= bound) else "**missed**"
            rest = ", ".join(f"{who} {value}" for who, value in others.items())
            lines.append(f"| {what} | {unit} | {mine} | {goal} | {verdict} | {rest} |")
        return "\n".join(lines)
