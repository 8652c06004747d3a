"""Run the simulations of `crash.py` and the faults of `test_crash_sweep.py`; print what was tried, a line an image.

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

from builder import LAYOUTS, Layout
from crash import EFFORT, SUBJECTS, Counts, Effort, quiet, simulate
from test_crash_sweep import FAULTS, inject_faults, small

COLUMNS = ("moments", "exhausted", "states", "checks", "second_cuts", "second_states", "kills", "faults")


def table(rows: Iterable[tuple[str, Counts]]) -> str:
    """The counts, with a head and a sum."""
    total = Counts()
    lines = [f"{'image':36}" + "".join(f"{column:>15}" for column in COLUMNS)]
    for name, counts in rows:
        total.add(counts)
        lines.append(f"{name:36}" + "".join(f"{getattr(counts, column):15}" for column in COLUMNS))
    return "\n".join([*lines, f"{'all':36}" + "".join(f"{getattr(total, column):15}" for column in COLUMNS)])


def faults(layout: Layout) -> int:
    """How many calls were made to fail."""
    found = 0
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as scratch, quiet():
            found += inject_faults(layout, fault, Path(scratch))
    return found


def main(wanted: list[str]) -> None:
    """Print it."""
    rows = []
    layouts = {layout.name: layout for layout in LAYOUTS}
    began = time.monotonic()
    for subject in SUBJECTS:
        if not wanted or any(part in subject.name for part in wanted):
            with tempfile.TemporaryDirectory() as scratch:
                counts = simulate(subject, Path(scratch), Effort.scaled(EFFORT))
            if subject.name in layouts:
                counts.faults = faults(small(layouts[subject.name]))
            rows.append((subject.name, counts))
    print(table(rows))
    print(f"effort {EFFORT:g}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
