"""Many machines from one template: making their disks, opening them, booting them all at once.

    python tests/bench/clones.py [--only N,...] [--who CANDIDATE,...] [--guests N,...] [--reads-only] [--rounds N]
                                 [--work DIR] [--json FILE]

1. A thousand clones of a local template of 20 GiB, next to qcow2 overlays (a hundred, times ten); how soon a mount of
   them is ready, and lists them. What 1, 10 and 200 open disks over one base image take in the mount's process, next
   to disks with a base image each.
2. Guests that boot at the same time, from a template behind a slow, far server: when the last one is up, and what
   crossed the link, next to one guest's. "fvdfs": clones on the host's cache; "fvdfs without cache": clones on the
   template, copy-on-read; "qcow2": overlays, without copying. Then the cache is prefetched to its end, and a guest
   boots without the server. Guests are emulated, and many need more CPU time than reading takes: with `--reads-only`
   programs read what a guest's boot reads, one read after another, in their place.
3. From nothing to a guest's first output that needed its disk (it has mounted it), and until it has read the files of
   its boot: `fvdfs clone` into a mounted folder, `qemu-img create`, `qemu-img convert`. "raw" is a local file.

A guest's kernel comes from the host, not from its disk. It reads 64 MiB of the 750 MB that the template's files take.
Printed are the medians of the rounds; with `--json` the figures of earlier runs in this file count, too, so that rows
and rounds can be run one by one. "Of one guest's" needs a run with one guest.

Needs root, a machine that is otherwise idle, nbdkit, qemu-utils, qemu-system-common and -x86, busybox-static, cpio and
linux-image-cloud-amd64.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import lab
from bench.lab import FVDFS, MIB, Link, Server, command, serve
from bench.prefetch import Bench
from bench.report import Report
from support.guest import boot_arguments

GIB = 1 << 30
CLONES = 1000
OVERLAYS = 100
SIZE = 20 * GIB
OPEN = (1, 10, 200)
LINK: Link = (50_000_000, 5)
TEMPLATE = GIB
BOOT_READS = 64 * MIB
CACHE, ALONE, QCOW2 = "fvdfs", "fvdfs without cache", "qcow2"
COPY, RAW = "full copy", "raw"
TIMEOUT = 300  # seconds, of a guest


@dataclass
class Clones(Bench):
    """Which numbers of guests boot together, and whether programs read in their place."""

    guests: Sequence[int] = (1,)
    reads_only: bool = False


def seconds(*words: str | Path) -> float:
    """How long a command takes."""
    start = time.monotonic()
    command(*words)
    return time.monotonic() - start


# --- 1 --------------------------------------------------------------------------------------------------


def a_thousand(bench: Clones) -> None:
    folder, overlays = bench.work / "images", bench.work / "overlays"
    for each in (folder, overlays):
        each.mkdir()
    template = folder / "template.raw"
    with template.open("wb") as file:
        file.truncate(SIZE)
    lab.drop_caches()
    took = seconds(*FVDFS, "clone", template, "vm", "-n", str(CLONES), "--into", folder)
    bench.report.add("1. 1000 clones", "s", CACHE, took, "<= 5")
    bench.report.add("1. 1000 clones", "MB of disk", CACHE, disk_space(folder) / 1e6, "<= 20")
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", template, "-F", "raw")
    took = sum(seconds(*create, overlays / f"{number}.qcow2") for number in range(OVERLAYS)) * CLONES / OVERLAYS
    bench.report.add("1. 1000 clones", "s", QCOW2, took, "<= 5")
    bench.report.add("1. 1000 clones", "MB of disk", QCOW2, disk_space(overlays) * CLONES / OVERLAYS / 1e6, "<= 20")
    lab.drop_caches()
    start = time.monotonic()
    with lab.mount(folder) as point:
        bench.report.add("1. their mount is ready after", "s", CACHE, time.monotonic() - start, "<= 3")
        bench.report.add("1. its first ls", "s", CACHE, seconds("ls", point))
        bench.report.add("1. its first ls -l", "s", CACHE, seconds("ls", "-l", point))
    shutil.rmtree(folder)
    shutil.rmtree(overlays)


def disk_space(folder: Path) -> int:
    """Bytes, of the folder and all that is in it."""
    return int(command("du", "-s", "-B1", folder).split()[0])


def memory(bench: Clones) -> None:
    """Each page of the base's bitmap has something in it."""
    for who, bases in ((CACHE, 1), ("fvdfs, a base each", max(OPEN))):
        folder = Path(tempfile.mkdtemp(dir=bench.work))
        with open(folder / "template.raw", "wb") as file:
            file.truncate(SIZE)
        command(*FVDFS, "create", folder / "base.fvd", "--base", "template.raw", "--base-format", "raw")
        with lab.mount(folder) as point, open(point / "base.raw", "r+b", buffering=0) as disk:
            for offset in range(0, SIZE, 32 * MIB):
                os.pwrite(disk.fileno(), b"x" * 4096, offset)
        for number in range(bases):
            base = folder / f"base-{number}.fvd"
            command("cp", "--sparse=always", folder / "base.fvd", base)
            count = 1 if bases > 1 else max(OPEN)
            command(*FVDFS, "clone", base, f"vm-{number}", "-n", str(count), "--into", folder)
        with lab.mount(folder) as point, ExitStack() as stack:
            pid = int(os.getxattr(point, "user.fvdfs.pid"))
            disks = sorted(point.glob("vm-*.raw"))
            empty = in_memory(pid)
            opened = 0
            for count in OPEN:
                for path in disks[opened:count]:
                    assert stack.enter_context(open(path, "r+b", buffering=0)).read(1) == b"x"
                opened = count
                rss, pss = in_memory(pid)
                bench.report.add(f"1. {count} open", "MiB RSS", who, rss / MIB)
                bench.report.add(f"1. {count} open", "MiB PSS", who, pss / MIB)
                bench.report.add(f"1. {count} open, each", "KiB PSS", who, (pss - empty[1]) / count / 1024)
                bench.report.add(f"1. {count} open", "descriptors", who, len(os.listdir(f"/proc/{pid}/fd")))
        shutil.rmtree(folder)


def in_memory(pid: int) -> tuple[int, int]:
    """Bytes of a process: RSS and PSS."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    rss, pss = (int(re.findall(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024 for name in ("Rss", "Pss"))
    return rss, pss


# --- 2 and 3 --------------------------------------------------------------------------------------------


def new_folder(bench: Clones, who: str, server: Server) -> Path:
    """A folder of images; with a cache of the template where that takes part."""
    folder = Path(tempfile.mkdtemp(dir=bench.work, prefix="images-"))
    if who == CACHE:
        base = ("--base", server.url("vm"), "--base-format", "raw")
        command(*FVDFS, "create", folder / "cache.fvd", *base, "--copy-on-read")
    return folder


def clone(server: Server, folder: Path, count: int) -> None:
    command(*FVDFS, "clone", server.url("vm"), "vm", "-n", str(count), "--into", folder, "--base-format", "raw")


@contextmanager
def new_disks(bench: Clones, who: str, server: Server, count: int) -> Iterator[tuple[list[Path], str]]:
    """So many, and what to add to QEMU's -drive."""
    if who != QCOW2:
        folder = new_folder(bench, who, server)
        clone(server, folder, count)
        with lab.mount(folder) as point:
            yield sorted(point.glob("vm-*.raw")), ""
        shutil.rmtree(folder)
    elif bench.reads_only:
        with lab.qcow2_disks(bench.work, [server.url("vm")] * count) as found:
            yield [disk.path for disk in found], ""
    else:
        yield [lab.new_overlay(bench.work, server.url("vm")) for _ in range(count)], ",format=qcow2"


def boot(bench: Clones, drive: str, disk: Path) -> dict[str, float]:
    """Times (time.monotonic) of a guest's marks on its console; it must read the right data, and end well."""
    qemu = ("qemu-system-x86_64", *boot_arguments(disk, bench.initrd, f"none{drive}"))
    marks = {}
    with subprocess.Popen(
        ["timeout", str(TIMEOUT), *qemu], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            marks[line.strip()] = time.monotonic()
    if not {f"SUM {bench.guest[1]} -", "GUEST-EXIT 0"} <= marks.keys():
        raise RuntimeError(f"{disk}: the guest did not boot: {' '.join(marks)[-1000:]}")
    return {line.split()[0]: when for line, when in marks.items() if line}


def together(bench: Clones) -> None:
    kind = "programs" if bench.reads_only else "guests"
    assert bench.trace  # made here, and not while the guests boot
    for who in bench.who:
        for count in bench.guests:
            with ExitStack() as link, ExitStack() as stack:
                server = link.enter_context(serve("file", bench.guest[0], link=LINK))
                paths, drive = stack.enter_context(new_disks(bench, who, server, count))
                lab.drop_caches()
                start, cpus = time.monotonic(), cpu_seconds()
                with ThreadPoolExecutor(count) as pool:
                    if bench.reads_only:
                        last = max(pool.map(partial(lab.replay, bench.trace), paths))
                    else:
                        last = max(marks["READ"] for marks in pool.map(partial(boot, bench, drive), paths)) - start
                        cpus = (cpu_seconds() - cpus) / (time.monotonic() - start)
                        bench.report.add(f"2. {count} {kind} keep busy", "CPUs", who, cpus)
                bench.report.add(f"2. {count} {kind}: the last is up after", "s", who, last)
                read = lab.total(server.reads("vm"))
                bench.report.add(f"2. {count} {kind} read", "MB", who, read / 1e6)
                one = bench.report.median(f"2. 1 {kind} read", "MB", who) * 1e6
                if one and count > 1:
                    bench.report.add(f"2. {count} {kind} read", "of one guest's", who, read / one, "<= 1.05")
                if who == CACHE and not bench.reads_only:
                    without_network(bench, server, paths[0], link)


def cpu_seconds() -> float:
    """Of all programs that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_network(bench: Clones, server: Server, path: Path, link: ExitStack) -> None:
    cache = lab.fvdfs_disk(path.with_name("cache.raw"))
    start = time.monotonic()
    cache.start()
    lab.wait_for(cache.done, TIMEOUT)
    bench.report.add("2. the rest of the cache is fetched in", "s", CACHE, time.monotonic() - start)
    bench.report.add("2. in all, its host has read", "MB", CACHE, lab.total(server.reads("vm")) / 1e6)
    link.close()
    lab.drop_caches()
    start = time.monotonic()
    up = boot(bench, "", path)["READ"] - start
    bench.report.add("2. then, without the server, a guest is up after", "s", CACHE, up)


def from_nothing(bench: Clones) -> None:
    local = bench.work / "local.raw"
    for who in (*bench.who, COPY, RAW):
        with serve("file", bench.guest[0], link=LINK) as server, ExitStack() as stack:
            disk, drive = local, ""
            if who in (CACHE, ALONE):
                folder = new_folder(bench, who, server)
                point = stack.enter_context(lab.mount(folder))
                disk = point / "vm-0001.raw"
            lab.drop_caches()
            start = time.monotonic()
            if who in (CACHE, ALONE):
                clone(server, folder, 1)
            elif who == QCOW2:
                disk, drive = lab.new_overlay(bench.work, server.url("vm")), ",format=qcow2"
            elif who == COPY:
                command("qemu-img", "convert", "-f", "raw", "-O", "raw", server.url("vm"), local)
            made = time.monotonic() - start
            marks = boot(bench, drive, disk)
            bench.report.add("3. the disk is there after", "s", who, made)
            bench.report.add("3. a guest's first output after", "s", who, marks["READING"] - start)
            bench.report.add("3. a guest has read its files after", "s", who, marks["READ"] - start)
            bench.report.add("3. read from the template until its end", "MB", who, lab.total(server.reads("vm")) / 1e6)


MEASUREMENTS: dict[str, Sequence[Callable[[Clones], None]]] = {
    "1": (a_thousand, memory),
    "2": (together,),
    "3": (from_nothing,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASUREMENTS), metavar="N,...")
    parser.add_argument("--who", default=",".join((CACHE, ALONE, QCOW2)), metavar="CANDIDATE,...")
    parser.add_argument("--guests", default="1,20", metavar="N,...")
    parser.add_argument("--reads-only", action="store_true", help="programs in place of the guests of measurement 2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures there, and count those that are there"
    )
    arguments = parser.parse_args()
    report = Report(arguments.json)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="clones-") as name:
        counts = [int(word) for word in arguments.guests.split(",")]
        size = (TEMPLATE, BOOT_READS)
        bench = Clones(Path(name), 0, arguments.who.split(","), report, size, counts, arguments.reads_only)
        for number in arguments.only.split(",") * arguments.rounds:
            for measure in MEASUREMENTS[number]:
                measure(bench)
    print(report.table())


if __name__ == "__main__":
    main()
