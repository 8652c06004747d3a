"""Whether prefetching takes what is its own and leaves what is others', in a long series on a busy host.

    python tests/bench/series.py [--runs N] [--caps MB,...] [--delays MS,...] [--images N,...] [--busy N] [--json FILE]

The base is behind an nbdkit with a cap (`rate`) and a delay; `--busy` endless loops take the processors from
all that takes part. Each run of a cell is, right after each other and in turning order, since the machine
changes under them:

- `dd` alone, reading the base by way of a qemu-storage-daemon;
- prefetching alone. Its share is what it gets of what dd got;
- a rival alone, and prefetching that this rival comes to: how soon the first second begins in which it gets less
  than 30 % of what it got before, what it keeps after the first second, what the rival loses, and how soon
  prefetching has 80 % again when it has gone. The rivals take turns: a reader of 128 KiB after 128 KiB (`dd`), and one
  with 16 requests of 1 MiB under way (`qemu-img bench`).

A rival who loses less than a fifth of what it gets alone has room beside prefetching, which then need not make
way: where processors are short, a single reader cannot take the whole of a quick link.

Caps save for 0.1 and for 2 seconds (nbdkit's default) in turns. All figures come from the server's log. A cap of 0
is no cap. Goals: in 19 of 20 runs of all cells a share of 0.9, and in 19 of 20 of each kind of rival down within
1 s, or room. The exit code is 1 where one is missed. Needs root, nbdkit, qemu-utils and qemu-system-common.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import lab
from bench.lab import Read, Server
from bench.prefetch import base_as_file, first_second

SIZE = 64 << 30
BURSTS = (0.1, 2.0)  # seconds
RIVALS = ("one at a time", "sixteen at a time")
ENOUGH = 0.9
DOWN = 0.3
ROOM = 0.2
BACK = 0.8
OFTEN = 0.95
WARM = 4.0  # seconds before a rival comes, beside the seconds of a burst
PRESENT = 6.0  # seconds that it stays
AFTER = 6.0

Figures = dict[str, list[float]]


@contextmanager
def server(link: lab.Link, burst: float) -> Iterator[Server]:
    """A base that is no zeros and costs no time to make."""
    with lab.serve("pattern", f"size={SIZE}", link=link, burst=burst) as found:
        yield found


def from_first(reads: Sequence[Read], seconds: float) -> float:
    """Bytes a second, from the first read on."""
    return lab.rate(reads, reads[0].began, reads[0].began + seconds) if reads else 0.0


@contextmanager
def rival(work: Path, where: Server, kind: str) -> Iterator[None]:
    """A client that reads, while the block runs."""
    with ExitStack() as stack:
        if kind == RIVALS[0]:
            view = stack.enter_context(base_as_file(work, where, "dd-qemu"))
            command = ["dd", f"if={view}", "of=/dev/null", "bs=128k"]
        else:
            command = [
                "qemu-img",
                "bench",
                "-f",
                "raw",
                "-c",
                "100000000",
                "-d",
                "16",
                "-s",
                "1M",
                where.url("dd-qemu"),
            ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.kill()
            process.wait()


def alone(work: Path, link: lab.Link, burst: float, images: int, seconds: float, who: str) -> float:
    """What dd, a rival or prefetching gets, in bytes a second."""
    with server(link, burst) as where, ExitStack() as stack:
        if who == "fvdfs":
            names = [f"vm{number}" for number in range(images)]
            for disk in stack.enter_context(lab.fvdfs_disks(work, [where.url(name) for name in names])):
                disk.start()
        else:
            stack.enter_context(rival(work, where, RIVALS[0] if who == "dd" else who))
        lab.wait_for(lambda: where.reads())
        time.sleep(seconds + 0.2)
        return from_first(where.reads(), seconds)


def beside(work: Path, link: lab.Link, burst: float, images: int, kind: str) -> dict[str, float]:
    """Prefetching that a rival comes to, and that it leaves."""
    names = [f"vm{number}" for number in range(images)]
    before = WARM + burst
    with server(link, burst) as where, lab.fvdfs_disks(work, [where.url(name) for name in names]) as disks:
        for disk in disks:
            disk.start()
        time.sleep(before)
        with rival(work, where, kind):
            time.sleep(PRESENT)
        gone = time.time()
        time.sleep(AFTER)
        reads = where.reads()
        load = where.reads("dd-qemu")
    fetched = sorted(set(reads) - set(load), key=lambda read: read.began)
    came = load[0].began
    normal = statistics.median(lab.rate(fetched, came - at - 1, came - at) for at in (0, 0.5, 1, 1.5, 2))
    return {
        "down": first_second(fetched, came, 0, DOWN * normal),
        "keeps": lab.rate(fetched, came + 1, gone) / normal,
        "rival gets": lab.rate(load, came + 1, gone),
        "back": first_second(fetched, gone, BACK * normal),
    }


def quantiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    picked = (ordered[math.ceil(share * len(ordered)) - 1] for share in (0.05, 0.5, 0.95) if ordered)
    return " / ".join(f"{value:.2f}" for value in picked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="of each cell")
    parser.add_argument("--caps", default="2,10,50,200", metavar="MB,...")
    parser.add_argument("--delays", default="1,5", metavar="MS,...")
    parser.add_argument("--images", default="1,2,10", metavar="N,...")
    parser.add_argument("--busy", type=int, default=2, help="endless loops beside")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement of what one gets alone")
    parser.add_argument("--only", choices=["alone", "rival"], help="half of it")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    arguments = parser.parse_args()
    words = [[int(word) for word in text.split(",")] for text in (arguments.caps, arguments.delays, arguments.images)]
    cells = list(itertools.product(*words))
    figures: dict[str, Figures] = {}

    def add(cell: str, what: str, value: float) -> None:
        figures.setdefault(cell, {}).setdefault(what, []).append(value)
        print(f"{cell}: {what} {value:.3g}", file=sys.stderr, flush=True)

    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        with tempfile.TemporaryDirectory(dir=arguments.work, prefix="series-") as name:
            for run, (cap, delay, images) in itertools.product(range(arguments.runs), cells):
                cell = f"{cap or 'no'} MB/s, {delay} ms, {images} images"
                link, burst, kind = (cap * 1_000_000, delay), BURSTS[run % 2], RIVALS[run // 2 % 2]
                try:
                    measure(add, arguments, Path(name), cell, link, burst, images, kind, run)
                except (OSError, RuntimeError, IndexError, TimeoutError, statistics.StatisticsError) as error:
                    print(f"{cell}: failed: {error!r}", file=sys.stderr)
                    add(cell, "failed", 1)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))
        missed = summary(figures)
    sys.exit(missed)


def measure(
    add: object,
    arguments: argparse.Namespace,
    work: Path,
    cell: str,
    link: lab.Link,
    burst: float,
    images: int,
    kind: str,
    run: int,
) -> None:
    """One run of a cell."""
    assert callable(add)
    if arguments.only != "rival":
        got = {}
        for who in ("dd", "fvdfs") if run % 2 else ("fvdfs", "dd"):
            got[who] = alone(work, link, burst, images, arguments.seconds, who)
        add(cell, "share", got["fvdfs"] / got["dd"])
    if arguments.only != "alone":
        whole = alone(work, link, burst, images, PRESENT, kind)
        found = beside(work, link, burst, images, kind)
        lost = 1 - found.pop("rival gets") / whole
        add(cell, f"{kind}: lost", lost)
        add(cell, f"{kind}: made way", float(found["down"] <= 1 or lost < ROOM))
        for what, value in found.items():
            add(cell, f"{kind}: {what}", value)


def summary(figures: dict[str, Figures]) -> bool:
    """Print it; whether a goal is missed."""
    merged: Figures = {}
    print("| | runs | 5 % / median / 95 % |\n|---|---|---|")
    for cell, found in figures.items():
        for what, values in found.items():
            print(f"| {cell}: {what} | {len(values)} | {quantiles(values)} |")
            merged.setdefault(what, []).extend(values)
    missed = bool(merged.get("failed"))
    print("\n| all cells | runs | 5 % / median / 95 % | goal | met by | |\n|---|---|---|---|---|---|")
    for what, values in merged.items():
        goal, met = "", 0
        if what == "share":
            goal, met = f">= {ENOUGH}", sum(value >= ENOUGH for value in values)
        elif what.endswith(": made way"):
            goal, met = "1", sum(value == 1 for value in values)
        well = met >= OFTEN * len(values)
        missed |= bool(goal) and not well
        verdict = f"{met} of {len(values)} | {'ok' if well else '**missed**'}" if goal else " | "
        print(f"| {what} | {len(values)} | {quantiles(values)} | {goal} | {verdict} |")
    return missed


if __name__ == "__main__":
    main()
