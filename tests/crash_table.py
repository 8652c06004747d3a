"""Run the crash simulations of `crash.py`, and print what was tried, a line an image.

    python tests/crash_table.py [part of a name ...]

FVDFS_CRASH_EFFORT scales the number of states: 1 is what the tests try; from about 400 on every state
is tried of each moment that has at most 4096.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from crash import EFFORT, SUBJECTS, Counts, Effort, simulate

COLUMNS = ("moments", "exhausted", "states", "checks", "second_cuts", "second_states", "kills")


def table(rows: Iterable[tuple[str, Counts]]) -> str:
    """The counts, with a head and a sum."""
    total = Counts()
    lines = [f"{'image':36}" + "".join(f"{column:>15}" for column in COLUMNS)]
    for name, counts in rows:
        total.add(counts)
        lines.append(f"{name:36}" + "".join(f"{getattr(counts, column):15}" for column in COLUMNS))
    return "\n".join([*lines, f"{'all':36}" + "".join(f"{getattr(total, column):15}" for column in COLUMNS)])


def main(wanted: list[str]) -> None:
    """Print it."""
    rows = []
    began = time.monotonic()
    for subject in SUBJECTS:
        if not wanted or any(part in subject.name for part in wanted):
            with tempfile.TemporaryDirectory() as scratch:
                rows.append((subject.name, simulate(subject, Path(scratch), Effort.scaled(EFFORT))))
    print(table(rows))
    print(f"effort {EFFORT:g}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
