"""Run the simulations of `crash.py` and the faults of `workload.py`; print what was tried, a line an image.

    cd tests && python -m support.crash_table [part of a name ...]

FVDFS_CRASH_EFFORT scales the number of states: 1 is what the tests try; from 512 on every state is tried
of each moment that has at most 4096. The columns:

    moments         at which the power was cut
    exhausted       those of which every state was tried
    states          different ones, each opened, replayed and checked
    checks          states compared with what is legal at a moment
    second_cuts     moments of recoveries at which the power was cut again
    second_states   states that only these left
    kills           ends of the process, followed by cuts
    faults          calls to a store that failed
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from support.builder import LAYOUTS, Layout
from support.crash import EFFORT, SUBJECTS, Counts, Effort, quiet, simulate
from support.workload import FAULTS, inject_faults, small

COLUMNS = ("moments", "exhausted", "states", "checks", "second_cuts", "second_states", "kills", "faults")


def line(name: str, counts: Counts) -> str:
    """A line of the table."""
    return f"{name:36}" + "".join(f"{getattr(counts, column):15}" for column in COLUMNS)


def faults(layout: Layout) -> int:
    """How many calls were made to fail."""
    found = 0
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as scratch, quiet():
            found += inject_faults(layout, fault, Path(scratch))
    return found


def main(wanted: list[str]) -> None:
    """Print the table."""
    layouts = {layout.name: layout for layout in LAYOUTS}
    total = Counts()
    began = time.monotonic()
    print(f"{'image':36}" + "".join(f"{column:>15}" for column in COLUMNS))
    for subject in SUBJECTS:
        if wanted and not any(part in subject.name for part in wanted):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            counts = simulate(subject, Path(scratch), Effort.scaled(EFFORT))
        if subject.name in layouts:
            counts.faults = faults(small(layouts[subject.name]))
        total.add(counts)
        print(line(subject.name, counts), flush=True)
    print(line("all", total))
    print(f"effort {EFFORT:g}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
