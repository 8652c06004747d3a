"""What copy-on-read, prefetching and profiles do for a guest and to its server, next to what QEMU does.

    python tests/bench/prefetch.py [--only N,...] [--rounds N] [--seconds N] [--work DIR] [--json FILE]

Every base is behind an nbdkit, and what is read from it is counted in its log (see `lab`). The candidates
take turns in one run; printed are the medians of the rounds. The measurements:

1. What a guest's first and second boot read from the base, with copy-on-read.
2. Prefetching alone, as a share of what `dd` gets over the same protocol; and that the disk is whole
   afterwards, with the server gone.
3. What prefetching costs a guest that reads at random, and what it gets of the link that the guest leaves:
   prefetching works elsewhere on the disk than the guest, so that the guest's mix stays half local and both
   are told apart by their offsets. Again while another program writes to the same local disk.
4. How soon prefetching makes way when a second client loads the server, and how soon it is back: when the
   first second begins in which it gets less than 30 %, or again 80 %, of what it got before. And whether
   ten images at one server get the same.
5. A boot over a slow, far link, and the same reads without the guest's own work in between.
6. What prefetching a template of 20 GiB of which 1 GiB is used reads, where the data lies in 1024 pieces.

Needs root, a machine that is otherwise idle, fio, nbdkit, libnbd-bin, qemu-utils, qemu-system-common and
-x86, busybox-static, cpio and linux-image-cloud-amd64.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import lab
from bench.lab import MIB, Disk, Link, Ranges, Read, Server, serve
from bench.report import Report
from support.guest import CommandError, build_initrd

SLOW_LINK: Link = (50_000_000, 0)
FAR_LINK: Link = (20_000_000, 5)
IDLE = {"no limit": ((0, 0), 1024 * MIB), "50 MB/s": (SLOW_LINK, 384 * MIB), "20 MB/s 5 ms": (FAR_LINK, 160 * MIB)}
RANDOM_DISK = 8192 * MIB
RANDOM = ("random", f"size={RANDOM_DISK}", "seed=1")
SPARSE_DISK = 20 << 30
SPARSE_LINKS: dict[str, Link] = {"no limit": (0, 0), "100 MB/s 1 ms": (100_000_000, 1)}
BLOCK = 64 << 10  # of images and overlays
COPY = ("--copy-on-read", "--block-size", str(BLOCK))
QCOW2_COPY = ",format=qcow2,copy-on-read=on"


@dataclass
class Bench:
    """Where to work, how long a run of random reads is, who takes part, and the figures."""

    work: Path
    seconds: float
    who: Sequence[str]
    report: Report
    guest_size: tuple[int, int] = (512 * MIB, 64 * MIB)
    """Bytes of a guest's disk, and what its boot reads of them."""

    @cached_property
    def initrd(self) -> Path:
        return build_initrd(self.work, lab.GUEST_SCRIPT, ["ext4"])

    @cached_property
    def guest(self) -> tuple[Path, str]:
        """A guest's disk, and the checksum of what its boot reads."""
        disk = self.work / "guest.raw"
        return disk, lab.make_guest_disk(disk, *self.guest_size)

    @cached_property
    def trace(self) -> Ranges:
        """What the guest reads of its disk."""
        with serve("file", self.guest[0], filters=["cow"]) as server:
            self.boot(f"nbd:unix:{server.folder}/socket")
            return [(read.offset, read.length) for read in server.reads()]

    def boot(self, disk: str | Path, drive: str = "") -> tuple[float, float]:
        return lab.boot_guest(disk, self.initrd, self.guest[1], drive)

    def disks(self, who: str, *urls: str, local: Ranges = ()) -> AbstractContextManager[list[Disk]]:
        return (lab.fvdfs_disks if who == "fvdfs" else lab.qcow2_disks)(self.work, urls, local)


def boots(bench: Bench) -> None:
    touched = lab.union(bench.trace, BLOCK)
    for who in bench.who:
        with serve("file", bench.guest[0]) as server, ExitStack() as stack:
            if who == "fvdfs":
                images = lab.new_images(bench.work, [server.url("vm")], *COPY)
                disk, drive = stack.enter_context(lab.mounted(images))[0].path, ""
            else:
                disk, drive = lab.new_overlay(bench.work, server.url("vm")), QCOW2_COPY
            bench.boot(disk, drive)
            first = server.reads("vm")
            bench.boot(disk, drive)
            second = server.reads("vm")[len(first) :]
        size, distinct = lab.total(first), lab.union([(read.offset, read.length) for read in first])
        bench.report.add("1. first boot reads", "MB", who, size / 1e6)
        bench.report.add("1. first boot reads each byte", "times", who, size / distinct, "<= 1.02")
        bench.report.add("1. first boot reads of the blocks that the guest touches", "share", who, size / touched)
        bench.report.add("1. second boot reads", "bytes", who, lab.total(second), "<= 0")


def idle_link(bench: Bench) -> None:
    base, copy = bench.work / "base.raw", bench.work / "copy.raw"
    largest = max(size for _, size in IDLE.values())
    lab.command("dd", "if=/dev/urandom", f"of={base}", "bs=1M", f"count={largest // MIB}")
    for name, (link, size) in IDLE.items():
        speeds: dict[str, float] = {}
        with ExitStack() as stack:
            server = stack.enter_context(serve("file", base, f"truncate={size}", link=link, filters=["truncate"]))
            for who in ("dd-nbdfuse", "dd-qemu", "convert", *bench.who):
                lab.drop_caches()
                with ExitStack() as opened:
                    if who.startswith("dd-"):
                        view = opened.enter_context(base_as_file(bench.work, server, who))
                        lab.command("dd", f"if={view}", "of=/dev/null", "bs=1M")
                    elif who == "convert":
                        lab.command("qemu-img", "convert", "-f", "raw", "-O", "raw", server.url(who), copy)
                    else:
                        (disk,) = opened.enter_context(bench.disks(who, server.url(who)))
                        disk.start()
                        lab.wait_for(disk.done, 300)
                    reads = server.reads(who)
                    speeds[who] = lab.total(reads) / (max(read.ended for read in reads) - reads[0].began)
                    bench.report.add(f"2. alone, {name}", "MB/s", who, speeds[who] / 1e6)
                    if who == bench.who[-1]:
                        stack.close()
                        lab.drop_caches()
                        lab.command("cmp", "-n", str(size), disk.path, base)
        for who in bench.who:
            share = speeds[who] / max(speeds["dd-nbdfuse"], speeds["dd-qemu"])
            bench.report.add(f"2. alone, {name}", "of dd", who, share, ">= 0.95")
    base.unlink()


@contextmanager
def base_as_file(work: Path, server: Server, who: str) -> Iterator[Path]:
    """The base by way of nbdfuse, or of QEMU as fvdfs does it."""
    path, address = work / "view", {"type": "unix", "path": f"{server.folder}/socket"}
    if who == "dd-qemu":
        with lab.exported(work, [{"driver": "nbd", "server": address, "export": who, "read-only": True}]) as (disk,):
            yield disk.path
    else:
        path.touch()
        with lab.running("nbdfuse", "-r", path, "--uri", server.url(who), errors=work / "errors"):
            lab.wait_for(lambda: path.stat().st_size)
            yield path


def busy_guest(bench: Bench) -> None:
    start, size = RANDOM_DISK * 3 // 4, 1024 * MIB
    local = [(offset, MIB) for offset in range(start, start + size, 2 * MIB)]
    writes = ["--rw=randwrite", "--bs=64k", "--direct=1", "--fsync=16", "--size=256m", "--time_based", "--runtime=600"]
    writer = ["fio", "--name=writer", f"--filename={bench.work}/writer", *writes]
    for who in bench.who:
        with serve(*RANDOM, link=SLOW_LINK) as server, bench.disks(who, server.url("vm"), local=local) as (disk,):
            for where in ("quiet", "local disk busy"):
                p99 = {}
                for mode in ("alone", "fetching"):
                    with lab.running(*writer) if where != "quiet" else nullcontext():
                        if mode == "fetching":
                            disk.start()
                        time.sleep(3)
                        begin = time.time() + 1
                        found = lab.random_reads(disk.path, bench.seconds, start, size)
                        end = time.time() - 0.5
                        if mode == "fetching":
                            disk.pause()
                    for (what, value), unit in zip(found.items(), ("us", "us", "1/s"), strict=True):
                        bench.report.add(f"3. {where}, {what}", unit, f"{who} {mode}", value)
                    p99[mode] = found["p99"]
                reads = server.reads()
                left = SLOW_LINK[0] - lab.rate([read for read in reads if read.offset >= start], begin, end)
                share = lab.rate([read for read in reads if read.offset < start], begin, end) / left
                ratio = p99["fetching"] / p99["alone"]
                bench.report.add(f"3. {where}, p99 while fetching", "of p99 alone", who, ratio, "<= 1.1")
                bench.report.add(f"3. {where}, fetching gets", "of what is left", who, share, ">= 0.8")


def busy_server(bench: Bench) -> None:
    for who in bench.who:
        with serve(*RANDOM, link=SLOW_LINK) as server, bench.disks(who, server.url("vm")) as (disk,):
            disk.start()
            time.sleep(8)
            # Alone it would take eight seconds. nbdkit 1.32 ends when a client goes away that it is holding back.
            lab.command("qemu-img", "bench", "-f", "raw", "-c", "400", "-d", "16", "-s", "1M", server.url("load"))
            time.sleep(12)
            fetched, load = server.reads("vm"), server.reads("load")
        begin, end = load[0].began, max(read.ended for read in load)
        before = lab.rate(fetched, begin - 4, begin)
        under = lab.rate(fetched, begin + 1, end) / before
        bench.report.add("4. before the load", "MB/s", who, before / 1e6)
        bench.report.add("4. makes way after", "s", who, first_second(fetched, begin, 0, 0.3 * before), "<= 1")
        bench.report.add("4. under load, but for its first second", "of before", who, under, "<= 0.3")
        bench.report.add("4. the load gets", "MB/s", who, lab.rate(load, begin, end) / 1e6)
        bench.report.add("4. is back after", "s", who, first_second(fetched, end, 0.8 * before), "<= 5")
    names = [f"vm{number}" for number in range(10)]
    for who in bench.who:
        with serve(*RANDOM, link=SLOW_LINK) as server, bench.disks(who, *map(server.url, names)) as disks:
            for disk in disks:
                disk.start()
            begin = time.time()
            time.sleep(10)
            got = [lab.rate(server.reads(name), begin, begin + 10) for name in names]
        worst = max(abs(one * len(got) / sum(got) - 1) for one in got)
        bench.report.add("4. ten images together", "MB/s", who, sum(got) / 1e6)
        bench.report.add("4. ten images, farthest from the fair share", "of it", who, worst, "<= 0.2")


def first_second(reads: Sequence[Read], start: float, least: float, most: float = float("inf")) -> float:
    """Seconds until the first second begins whose rate is between these; of ten that are looked at."""
    steps = (step / 10 for step in range(100))
    return next((t for t in steps if least <= lab.rate(reads, start + t, start + t + 1) < most), float("inf"))


def far_boot(bench: Bench) -> None:
    whole: dict[str, float] = {}

    def measure(who: str, disk: Path, drive: str = "") -> None:
        whole[who], reading = bench.boot(disk, drive)
        bench.report.add("5. boot, from QEMU's start to its end", "s", who, whole[who])
        bench.report.add("5. of this, reading files", "s", who, reading)

    def replay(who: str, disk: Path) -> None:
        lab.drop_caches()
        bench.report.add("5. its reads, one after another", "s", who, lab.replay(bench.trace, disk))

    needed = lab.union(bench.trace, BLOCK) / FAR_LINK[0]
    bench.report.add("5. its reads, one after another", "s", "the link alone", needed)
    local = bench.work / "local.raw"
    lab.command("cp", bench.guest[0], local)
    replay("raw", local)
    measure("raw", local)
    with serve("file", bench.guest[0], link=FAR_LINK) as server:
        url = server.url("vm")
        measure("qcow2", lab.new_overlay(bench.work, url), QCOW2_COPY)
        with lab.qcow2_disks(bench.work, [url], copy=True) as (disk,):
            replay("qcow2", disk.path)
        recorded = lab.new_images(bench.work, [url], *COPY)
        with lab.mounted(recorded, "allow_url=nbd+unix:///,record_profile") as (disk,):
            bench.boot(disk.path)
        more = {"fvdfs copy-on-read": [], "fvdfs prefetching": ["--prefetch-delay", "1"]}
        more["fvdfs"] = ["--prefetch-delay", "1", "--profile", str(recorded / "0.fvd")]
        for who in more:
            for use in (measure, replay):
                with lab.mounted(lab.new_images(bench.work, [url], *COPY, *more[who])) as (disk,):
                    use(who, disk.path)
    bench.report.add("5. boot with a profile", "of raw", "fvdfs", whole["fvdfs"] / whole["raw"], "<= 1.3")


def sparse_template(bench: Bench) -> None:
    base, pieces = bench.work / "sparse.raw", 1024
    with base.open("wb") as file:
        file.truncate(SPARSE_DISK)
        for number in range(pieces):
            file.seek(number * (SPARSE_DISK // pieces))
            file.write(os.urandom(MIB))
    for who in bench.who:
        for name, link in SPARSE_LINKS.items():
            with serve("file", base, link=link) as server, bench.disks(who, server.url("vm")) as (disk,):
                start = time.monotonic()
                disk.start()
                lab.wait_for(disk.done, 300)
                seconds = time.monotonic() - start
                read = lab.total(server.reads("vm"))
                bench.report.add(f"6. sparse template, {name}: read", "MB", who, read / 1e6, "<= 1150")
                bench.report.add(f"6. sparse template, {name}", "s", who, seconds)
    base.unlink()


MEASUREMENTS = (boots, idle_link, busy_guest, busy_server, far_boot, sparse_template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="1,2,3,4,5,6", metavar="N,...")
    parser.add_argument("--who", default="qcow2,fvdfs", metavar="CANDIDATE,...")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20, help="of each run of measurement 3")
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the figures there, and count those that are there"
    )
    arguments = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print(f"others are at work here (load average {os.getloadavg()[0]}): figures will vary", file=sys.stderr)
    report, failed = Report(arguments.json), []
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="prefetch-") as name:
        bench = Bench(Path(name), arguments.seconds, arguments.who.split(","), report)
        for number in map(int, arguments.only.split(",") * arguments.rounds):
            try:
                MEASUREMENTS[number - 1](bench)
            except (OSError, RuntimeError, subprocess.SubprocessError, CommandError):
                traceback.print_exc()
                failed.append(number)
    print(report.table())
    if failed:
        sys.exit(f"failed: {failed}")


if __name__ == "__main__":
    main()
