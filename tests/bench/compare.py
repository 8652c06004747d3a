"""fvdfs next to its peers: the same workloads on the same disk, interleaved, in one run.

    python tests/bench/compare.py [--rounds N] [--work DIR] [--only WORKLOAD,...] [--targets TARGET,...]
                                  [--picture FILE]

Each round makes each disk anew, over a base of 1 GiB or without one, boots a guest on it, runs fio on it,
then has a guest unpack a tree of files and run PostMark on it. Prints the medians, with their ratios to the
best peer of the same kind (above 1 is better), the goals, and what serving a GiB costs in CPU time.

Needs root, fio, qemu-utils, qemu-system-x86, qemu-system-common (qemu-storage-daemon), nbdkit, libnbd-bin,
postmark, and what tests/support/guest.py names; a peer that is not installed is left out, and said so. Guests are
emulated, so that what they take is mostly their own time. The picture needs matplotlib.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import kept_memory
from bench.targets import TARGETS, Served, Target
from bench.workloads import FIO, GUESTS, LESS_IS_BETTER, UNITS, Figure, Guests, measure_fio

RAW, SPARSE, MAIN, PASSTHROUGH = "raw file", "sparse raw file", "fvdfs cow", "fvdfs passthrough"
OF_RAW = 0.95  # of the raw file's figure, that passthrough shall reach


@dataclass(frozen=True)
class Goal:
    """A ratio that fvdfs shall reach."""

    ratio: float
    to: str = ""
    """The target that it is a ratio to; empty: the best peer."""


GOALS = {
    "seqread": (Goal(2),),
    "reread": (Goal(1),),
    "randread4k": (Goal(1.1),),
    "randread4k16": (Goal(1.1),),
    "randwrite4k": (Goal(3),),
    "randwrite4ks": (Goal(1.2),),
    "randwrite4k16": (Goal(1),),
    "seqwrite": (Goal(1, SPARSE), Goal(1)),
}


class Results:
    """Figures of all rounds."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str], list[Figure]] = {}

    def add(self, target: str, workload: str, figure: Figure) -> None:
        self._figures.setdefault((target, workload), []).append(figure)
        print(f"{target}: {workload} {figure.value:.4g} {UNITS[workload]}", file=sys.stderr, flush=True)

    def median(self, target: str, workload: str) -> float | None:
        found = self._figures.get((target, workload))
        return statistics.median(figure.value for figure in found) if found else None

    def cost(self, target: str, workload: str) -> float | None:
        found = [f.cpu_per_gib for f in self._figures.get((target, workload), ()) if f.cpu_per_gib is not None]
        return statistics.median(found) if found else None

    def ratio(self, target: str, workload: str, others: Iterable[str]) -> float | None:
        """How much better it is than the best of the others."""
        mine = self.median(target, workload)
        theirs = [value for other in others if (value := self.median(other, workload)) is not None]
        if mine is None or not theirs:
            return None
        return min(theirs) / mine if workload in LESS_IS_BETTER else mine / max(theirs)


def peers_of(target: str) -> list[str]:
    """Those that do the same: with a base, or without."""
    return [name for name, other in TARGETS.items() if other.peer and other.cow == TARGETS[target].cow]


def table(
    targets: Sequence[str], workloads: Sequence[str], units: Mapping[str, str], cell: Callable[[str, str], str]
) -> str:
    """In Markdown; columns without anything are left out."""
    cells = {(t, w): cell(t, w) for t in targets for w in workloads}
    used = [w for w in workloads if any(cells[t, w] for t in targets)]
    lines = ["| | " + " | ".join(f"{w} ({units[w]})" for w in used) + " |", "|---" * (len(used) + 1) + "|"]
    lines += [f"| {t} | " + " | ".join(cells[t, w] for w in used) + " |" for t in targets]
    return "\n".join(lines)


def figures_table(results: Results, targets: Sequence[str], workloads: Sequence[str]) -> str:
    def cell(target: str, workload: str) -> str:
        value = results.median(target, workload)
        if value is None:
            return ""
        ratio = results.ratio(target, workload, peers_of(target)) if target.startswith("fvdfs") else None
        return f"{value:.4g}" + (f" ({ratio:.2f}x)" if ratio is not None else "")

    return table(targets, workloads, UNITS, cell)


def cost_table(results: Results, targets: Sequence[str], workloads: Sequence[str]) -> str:
    def cell(target: str, workload: str) -> str:
        cost = results.cost(target, workload)
        return f"{cost:.2f}" if cost is not None else ""

    return table([t for t in targets if RAW not in t], workloads, dict.fromkeys(workloads, "s/GiB"), cell)


def goals_table(results: Results) -> str:
    lines = ["| | best peer | fvdfs cow | of the best peer | goal | |", "|---" * 6 + "|"]
    peers = peers_of(MAIN)
    for workload, goals in GOALS.items():
        mine, of_peer = results.median(MAIN, workload), results.ratio(MAIN, workload, peers)
        ratios = [results.ratio(MAIN, workload, [goal.to] if goal.to else peers) for goal in goals]
        if mine is None or of_peer is None or None in ratios:
            continue
        met = all(ratio is not None and ratio >= goal.ratio for ratio, goal in zip(ratios, goals, strict=True))
        text = " and ".join(
            f"{goal.ratio:g}x {goal.to or 'the best peer'}" + (f" ({ratio:.2f})" if goal.to else "")
            for ratio, goal in zip(ratios, goals, strict=True)
        )
        lines.append(
            f"| {workload} | {mine / of_peer:.4g} | {mine:.4g} | {of_peer:.2f} | {text} |"
            f" {'reached' if met else '**missed**'} |"
        )
    return "\n".join(lines)


def passthrough_table(results: Results) -> str:
    lines = ["| | raw file | passthrough | of raw | goal | |", "|---" * 6 + "|"]
    for workload in FIO:
        raw, mine = results.median(RAW, workload), results.median(PASSTHROUGH, workload)
        if raw is not None and mine is not None:
            met = "reached" if mine / raw >= OF_RAW else "**missed**"
            lines.append(f"| {workload} | {raw:.4g} | {mine:.4g} | {mine / raw:.2f} | {OF_RAW}x raw | {met} |")
    return "\n".join(lines)


LABELS = {
    "seqread": "sequential\nreads, cold",
    "reread": "the same,\nwarm",
    "randread4k": "random\nreads, 4 KiB",
    "randread4k16": "the same,\n16 at a time",
    "randwrite4k": "random\nwrites, 4 KiB",
    "randwrite4ks": "the same,\neach flushed",
    "randwrite4k16": "the same,\ndirect, 16",
    "seqwrite": "sequential\nwrites",
    "boot": "a guest\nboots",
    "unpack": "it unpacks\na tree",
    "postmark": "it runs\nPostMark",
    RAW: "raw file",
    MAIN: "fvdfs",
    "qcow2 cow": "qcow2, qemu-storage-daemon",
    "nbdkit cow": "nbdkit's cow, nbdfuse",
}
"""What workloads and targets are called in docs/measured.md."""


def draw(results: Results, workloads: Sequence[str], file: Path) -> None:
    """Bars: each workload on fvdfs and its peers, as a ratio to the best peer."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    peers = peers_of(MAIN)
    names = [RAW, MAIN, *peers]
    shown = [w for w in workloads if all(results.median(name, w) for name in names)]
    figure, axes = pyplot.subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.8 / len(names)
    for number, (name, color) in enumerate(zip(names, ("#c8c8c8", "#c0392b", "#4a7fb5", "#9dbfdf"), strict=True)):
        ratios = [results.ratio(name, w, peers) or 0 for w in shown]
        places = [at + number * width for at in range(len(shown))]
        axes.bar(places, ratios, width, label=LABELS.get(name, name), color=color)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    labels = [LABELS.get(workload, workload) for workload in shown]
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(shown))], labels, fontsize=8)
    axes.set_ylabel("of the best peer; higher is better")
    figure.legend(ncols=len(names), loc="outside upper center", frameon=False)
    figure.savefig(file)


def measure(results: Results, guests: Guests, name: str, served: Served, workloads: Sequence[str]) -> None:
    """Run the workloads on a fresh disk; those that read only where it holds something."""
    target = TARGETS[name]
    if target.guests and "boot" in workloads and (target.cow or name == RAW):
        results.add(name, "boot", guests.boot(served))
    for workload in workloads:
        if workload in FIO and not (target.empty and "read" in workload):
            results.add(name, workload, measure_fio(served, workload))
    if target.guests and {"unpack", "postmark"} & set(workloads):
        for workload, figure in guests.work(served).items():
            results.add(name, workload, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--only", default=",".join((*FIO, *GUESTS)))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--picture", type=Path, help="a file to draw the ratios in, as SVG")
    arguments = parser.parse_args()
    workloads = arguments.only.split(",")
    targets: dict[str, Target] = {name: TARGETS[name] for name in arguments.targets.split(",")}
    for name in [name for name, target in targets.items() if target.needs and not shutil.which(target.needs)]:
        print(f"left out: {name} ({targets.pop(name).needs} is not installed)")
    if not shutil.which("postmark"):
        print("left out: unpack and postmark (postmark is not installed)")
    results = Results()
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch, kept_memory():
        work = Path(scratch)
        base = work / "base.raw"
        guests = Guests(work, base)
        for number in range(arguments.rounds):
            for name, target in targets.items():
                with tempfile.TemporaryDirectory(dir=work) as folder, target.served(Path(folder), base) as served:
                    measure(results, guests, name, served, workloads)
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    print(f"Medians of {arguments.rounds} rounds; in brackets the ratio to the best peer of the same kind:\n")
    print(figures_table(results, list(targets), workloads))
    print(f"\nThe goals:\n\n{goals_table(results)}\n\n{passthrough_table(results)}")
    print(f"\nCPU time of the servers:\n\n{cost_table(results, list(targets), workloads)}")
    if arguments.picture:
        draw(results, workloads, arguments.picture)


if __name__ == "__main__":
    main()
