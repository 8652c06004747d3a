"""A running guest moves to another host and its disk follows, next to what QEMU does: mirroring, or shared storage.

    python tests/bench/migrate.py [--only NAME,...] [--size SIZE] [--percent N] [--memory MIB]
        [--bits N] [--delay-us N] [--rounds N] [--work DIR] [--json FILE]
    python tests/bench/migrate.py --guests 10 [--size SIZE] ...

Two hosts (network namespaces) are joined by a link of 1 Gbit/s and 0.5 ms each way. The guest (`support/witness.py`)
has a disk of 20 GiB, 30 % full. Ten times a second it appends to a log, flushes, rewrites hot blocks, and verifies what
it reads; 128 MiB of its memory change. The candidates take turns, and each has a cold cache:

- `shared`: QEMU's own migration, of a raw file that both hosts see. What a move takes without its disk.
- `mirror`: QEMU's own storage migration: `blockdev-mirror` of qcow2 over NBD, then the memory.
- `fvdfs`: `fvdfs migrate`. The disk follows.
- `unprofiled`: the same by `serve` and `receive`, without what the source tells of hot blocks.
- `alone`: the same again, and nothing is fetched ahead in the first minute: the guest reads by copy-on-read alone.
- `nbdcopy`: copies the disk over the same link, from the same server, while the guest runs at the source.

Times to the target are from the first command to the guest's first line there, the start of QEMU there included. Bytes
over the link are frames from the source to the target, less QEMU's own count of the memory. With `--guests`, so many
guests, each with a disk of its own of 1 GiB, are moved at once, by fvdfs. Each run ends with an error where the guest
has seen anything wrong, and a check of all of the disk.

Needs root, a machine that is otherwise idle, gcc, libnbd-bin, qemu-utils, qemu-system-x86, busybox-static, cpio and
linux-image-cloud-amd64; in the folder of work, three times what is allocated on the disk.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import MIB, command, drop_caches
from bench.report import Report
from fvdfs.qmp import Connection
from fvdfs.sizes import parse_size
from support.guest import drive
from support.hosts import Host, two_hosts
from support.mounts import FVDFS, Mount, fvdfs, must, wait_until
from support.witness import Console, Course, Machine, MachineEnded, Tick, Witness, follow, move

BEFORE = 30  # ticks of the guest at the source
FIRST, MINUTE = 20.0, 60.0  # seconds at the target that are compared
RAM_PORT, NBD_PORT = 4444, "10810"
TRIES = 5  # of a move, until a guest survives it
MOST = 600.0  # seconds for a disk to follow
LEAST_EFFORT = 0.05  # seconds; less is not told
LOOK = 0.2  # seconds between looks whether it has: each takes the target a millisecond or two


@dataclass
class Bench:
    """Where to work, what the disk and the link are, and the figures."""

    work: Path
    mib: int
    percent: int
    memory: int
    dirty: int
    hz: int
    bits: float
    delay_us: int
    report: Report
    is_checked: bool
    warm: float
    """Seconds that a guest runs before `fvdfs migrate`: the source tells what it has used."""

    @functools.cached_property
    def witness(self) -> Witness:
        return Witness(self.work, self.mib, percent=self.percent, hz=self.hz, dirty=self.dirty)

    @functools.cached_property
    def raw(self) -> Path:
        """A filled disk that is a raw file."""
        file = self.work / "disk.raw"
        self.witness.fill(file)
        return file

    def hosts(self) -> Any:
        return two_hosts(bits=self.bits, delay_us=self.delay_us)

    def boot(self, host: Host, drive: Sequence[str], incoming: str = "", socket: Path | None = None) -> Machine:
        return self.witness.boot(host, drive, incoming=incoming, memory=self.memory, socket=socket)

    def judge(self, course: Course, disk: Path) -> None:
        if not course.is_right:
            raise RuntimeError(f"the guest has seen: {course.lost} {course.complaints}")
        if self.is_checked:
            print(self.witness.check(disk).strip(), file=sys.stderr)


def address(host: Host, number: int = 0) -> str:
    return f"tcp:{host.address}:{RAM_PORT + number}"


def wait_for_all(*mounts: tuple[Mount, str]) -> float:
    """Wait until these disks are all local; when that was, by the monotonic clock."""

    def all_local() -> bool:
        time.sleep(LOOK)
        return all(mount.status(name)["move"] == "local" for mount, name in mounts)

    wait_until(all_local, MOST)
    return time.monotonic()


class Effort:
    """Processor seconds of all that runs on these hosts, and of the link, from now on."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self._hosts = hosts
        self._before = self._now()

    def _now(self) -> dict[tuple[str, str, int], float]:
        return {
            (name, process, pid): seconds
            for name, host in self._hosts.items()
            for pid, process, seconds in host.efforts()
        }

    def report(self, report: Report, who: str, what: str) -> None:
        """Those that have taken something."""
        found: dict[str, float] = {}
        for key, seconds in self._now().items():
            name = f"{key[1]} at the {key[0]}" if key[1] != "link" else "the link"
            found[name] = found.get(name, 0.0) + seconds - self._before.get(key, 0.0)
        for name, seconds in sorted(found.items()):
            if seconds >= LEAST_EFFORT:
                report.add(f"processor time while {what}, {name}", "s", who, seconds)


def first_tick(machine: Machine) -> float:
    machine.wait_for(1)
    return machine.ticks[0].when


def milliseconds(values: Sequence[int], percent: float) -> float:
    """A percentile of microseconds."""
    return sorted(values)[int(len(values) * percent / 100)] / 1000


def reads(ticks: Sequence[Tick], start: float, stop: float) -> list[int]:
    return [read for tick in ticks if start <= tick.when < stop for read in tick.reads]


def add_move(bench: Bench, who: str, done: dict[str, Any], course: Course, to_target: float) -> None:
    bench.report.add("downtime, as QEMU tells it", "ms", who, done["downtime"])
    bench.report.add("longest time between two lines of the guest", "s", who, course.gap)
    bench.report.add("from the command to the guest's first line at the target", "s", who, to_target)
    bench.report.add("memory over the link", "MB", who, done["ram"]["transferred"] / 1e6)


def shared(bench: Bench) -> None:
    """QEMU's own, with a file that both hosts see."""
    disk = drive(bench.raw, cache="none")
    bench.witness.reset(bench.raw)
    with bench.hosts() as (here, there, _):
        source = bench.boot(here, disk)
        source.wait_for(BEFORE)
        drop_caches()
        began = time.monotonic()
        target = bench.boot(there, disk, incoming=address(there))
        done = move(source, address(there))
        to_target = first_tick(target) - began
        time.sleep(3)
        course = follow(source, target)
        target.kill()
        bench.judge(course, bench.raw)
        add_move(bench, "shared", done, course, to_target)


def qcow2_drive(file: Path) -> list[str]:
    node = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={file},cache.direct=on,file.cache.direct=on"
    return ["-blockdev", node, "-device", "virtio-blk-pci,drive=disk"]


def mirror(bench: Bench) -> None:
    """QEMU's own, with a qcow2 image at each host."""
    file, copy = bench.work / "source.qcow2", bench.work / "target.qcow2"
    bench.witness.reset(bench.raw)
    command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", bench.raw, file)
    command("qemu-img", "create", "-q", "-f", "qcow2", copy, str(bench.mib * MIB))
    with bench.hosts() as (here, there, link):
        source = bench.boot(here, qcow2_drive(file))
        source.wait_for(BEFORE)
        drop_caches()
        began, before = time.monotonic(), link.bytes()[0]
        target = bench.boot(there, qcow2_drive(copy), incoming=address(there))
        server = {"type": "inet", "host": there.address, "port": NBD_PORT}
        listen = {"type": "inet", "data": {"host": there.address, "port": NBD_PORT}}
        target.monitor("nbd-server-start", addr=listen)
        target.monitor(
            "block-export-add", **{"type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": True}
        )
        source.monitor("blockdev-add", **{"driver": "nbd", "node-name": "copy", "server": server, "export": "disk"})
        source.monitor("blockdev-mirror", **{"job-id": "m", "device": "disk", "target": "copy", "sync": "full"})
        wait_until(lambda: any(job["ready"] for job in source.monitor("query-block-jobs")), MOST)
        bench.report.add("mirroring until memory may go", "s", "mirror", time.monotonic() - began)

        def finish(monitor: Connection) -> None:
            monitor.call("block-job-cancel", MOST, device="m")
            wait_until(lambda: not monitor.call("query-block-jobs", MOST), MOST)
            target.monitor("block-export-del", id="e", mode="hard")

        done = move(source, address(there), finish)
        to_target = first_tick(target) - began
        crossed = link.bytes()[0] - before - done["ram"]["transferred"]
        time.sleep(3)
        course = follow(source, target)
        target.kill()
        if not course.is_right:
            raise RuntimeError(f"the guest has seen: {course.lost} {course.complaints}")
        add_move(bench, "mirror", done, course, to_target)
        bench.report.add("bytes over the link, of those allocated", "", "mirror", crossed / allocated(file))
        during = [read for tick in course.ticks if began <= tick.when < began + to_target for read in tick.reads]
        add_reads(bench, "reads while the disk is copied", "mirror", during)
    file.unlink()
    copy.unlink()


def allocated(file: Path) -> int:
    return file.stat().st_blocks * 512


def add_reads(bench: Bench, what: str, who: str, found: Sequence[int], goal: str = "") -> None:
    bench.report.add(f"{what}, median", "ms", who, milliseconds(found, 50))
    bench.report.add(f"{what}, p99", "ms", who, milliseconds(found, 99), goal)


@contextmanager
def ending(*mounts: tuple[Host, Mount]) -> Iterator[None]:
    """Whatever happens, nothing on these hosts keeps a mount busy afterwards."""
    try:
        yield
    finally:
        for host, mount in mounts:
            host.kill(but=[mount.pid])


@contextmanager
def mounts(bench: Bench, here: Host, there: Host, *options: str) -> Iterator[tuple[Mount, Mount]]:
    """At the source the folder with the disk, as it was filled; at the target an empty one."""
    folder = bench.work / "source"
    if not folder.exists():
        folder.mkdir()
        must("create", folder / "vm.fvd", str(bench.mib * MIB))
        with here.mounted(folder) as source:
            bench.witness.fill(source.raw("vm"))
    target_folder = Path(tempfile.mkdtemp(dir=bench.work, prefix="target-"))
    allow = ",".join([f"allow_url=nbd://{here.address}/", *options])
    with here.mounted(folder) as source, there.mounted(target_folder, "-o", allow) as target:
        if source.status("vm")["move_reason"]:
            must("thaw", "--lose-writes", source.raw("vm"))
        bench.witness.reset(source.raw("vm"))
        with ending((here, source), (there, target)):
            yield source, target
    for file in target_folder.iterdir():
        file.unlink()


@dataclass
class Arrived:
    """A guest that was moved by fvdfs."""

    source: Machine
    target: Machine
    began: float
    first: float
    done: dict[str, Any]

    def kill(self) -> None:
        self.source.kill()
        self.target.kill()


@contextmanager
def serving(host: Host, *disks: Path) -> Iterator[list[str]]:
    """Where they are."""
    process = host.popen(*FVDFS, "serve", *disks, "--listen", host.address, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield [process.stdout.readline().strip() for _ in disks]
    process.terminate()
    process.wait()


def moved(
    bench: Bench, source: Machine, there: Host, target: Mount, url: str, *options: str, number: int = 0
) -> Arrived:
    """Receive the disk, and move the machine."""
    began, name = time.monotonic(), url.rpartition("/")[2]
    there.must("receive", url, target.folder / f"{name}.fvd", *options)
    machine = bench.boot(there, drive(target.raw(name), cache="none"), incoming=address(there, number))
    done = move(source, address(there, number))
    return Arrived(source, machine, began, first_tick(machine), done)


_SENT = re.compile(rb"the machine was sent \(([\d.]+) (\w+)\); it stood still for (\d+) ms")


def migrated(bench: Bench, source: Machine, raw: Path, there: Host, target: Mount) -> Arrived:
    """`fvdfs migrate` does it; a machine that waits is started there as soon as its disk is there."""
    qmp = Path(tempfile.mkdtemp(dir=bench.work, prefix="qmp-"), "qmp")
    began = time.monotonic()
    process = source.host.popen(
        *FVDFS,
        "migrate",
        *(raw, f"{there.address}:{target.point}", "--qmp", source.socket, "--qmp-target", qmp),
        *("--ssh", shlex.join(there.on()), "--program", shlex.join(FVDFS)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    console = Console(process)

    def says(pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        return next(filter(None, (pattern.search(line) for _, line in list(console.lines))), None)

    def wait(pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        wait_until(lambda: says(pattern) or process.poll(), MOST)
        found = says(pattern)
        if found is None:
            raise RuntimeError(b"\n".join(line for _, line in console.lines).decode())
        return found

    wait(re.compile(b"received at"))
    machine = bench.boot(there, drive(target.raw("vm"), cache="none"), "defer", qmp)
    amount, unit, downtime = wait(_SENT).groups()
    memory = float(amount) * (1 << {b"KiB": 10, b"MiB": 20, b"GiB": 30}[unit])
    done = {"downtime": int(downtime), "ram": {"transferred": memory}}
    for when, line in console.lines:
        print(f"{when - began:8.3f} {line.decode()}", file=sys.stderr)
    return Arrived(source, machine, began, first_tick(machine), done)


def nbdcopy(bench: Bench) -> None:
    """What nbdcopy needs for the same, while the guest runs at the source."""
    copy = bench.work / "copy.raw"
    with bench.hosts() as (here, there, link), mounts(bench, here, there) as (source, _), ExitStack() as stack:
        bench.boot(here, drive(source.raw("vm"), cache="none")).wait_for(BEFORE)
        drop_caches()
        (url,) = stack.enter_context(serving(here, source.raw("vm")))
        before, began = link.bytes()[0], time.monotonic()
        effort = Effort({"source": here, "target": there})
        copying = there.popen("nbdcopy", url, copy)
        os.waitid(os.P_PID, copying.pid, os.WEXITED | os.WNOWAIT)
        took = time.monotonic() - began
        effort.report(bench.report, "nbdcopy", "the disk is copied")
        if copying.wait():
            raise RuntimeError("nbdcopy has failed")
        crossed = link.bytes()[0] - before
    bench.report.add("bytes over the link, of those allocated", "", "nbdcopy", crossed / allocated(copy))
    bench.report.add("all is local", "s", "nbdcopy", took)
    copy.unlink()


def by_fvdfs(bench: Bench) -> None:
    with bench.hosts() as (here, there, link), mounts(bench, here, there) as (source, target):
        machine = bench.boot(here, drive(source.raw("vm"), cache="none"))
        machine.wait_for(BEFORE)
        time.sleep(bench.warm)
        drop_caches()
        before = link.bytes()[0]
        arrived = migrated(bench, machine, source.raw("vm"), there, target)
        began = arrived.began
        effort = Effort({"source": here, "target": there})
        data = allocated(source.folder / "vm.fvd")
        local = wait_for_all((target, "vm"))
        effort.report(bench.report, "fvdfs", "the disk is copied")
        crossed = link.bytes()[0] - before - arrived.done["ram"]["transferred"]
        wait_until(lambda: source.status("vm")["move"] == "released")
        time.sleep(3)
        course = follow(machine, arrived.target)
        arrived.kill()
        bench.judge(course, target.raw("vm"))
        add_move(bench, "fvdfs", arrived.done, course, arrived.first - began)
        report = bench.report
        report.add("bytes over the link, of those allocated", "", "fvdfs", crossed / data)
        report.add("all is local", "s", "fvdfs", local - arrived.first)
        add_reads(bench, "reads at the source", "fvdfs", reads(course.ticks, 0, began))
        add_reads(bench, "reads while the disk is copied", "fvdfs", reads(course.ticks, arrived.first, local))
        add_early(bench, "fvdfs", course, arrived.first)
        add_reads(bench, "reads afterwards", "fvdfs", reads(course.ticks, local + 0.5, local + 100))


def add_early(bench: Bench, who: str, course: Course, first: float) -> None:
    for seconds in (FIRST, MINUTE):
        early = [tick for tick in course.ticks if first <= tick.when < first + seconds]
        add_reads(bench, f"reads in the first {seconds:g} s", who, [read for tick in early for read in tick.reads])
        hot = [read for tick in early for read in tick.reads[: len(tick.reads) // 2]]
        add_reads(bench, f"of hot blocks in the first {seconds:g} s", who, hot)


def alone(bench: Bench) -> None:
    by_hand(bench, "copy-on-read alone", is_fetched=False)


def unprofiled(bench: Bench) -> None:
    by_hand(bench, "without the profile", is_fetched=True)


def by_hand(bench: Bench, who: str, *, is_fetched: bool) -> None:
    with bench.hosts() as (here, there, _), mounts(bench, here, there) as (source, target):
        machine = bench.boot(here, drive(source.raw("vm"), cache="none"))
        machine.wait_for(BEFORE)
        drop_caches()
        with serving(here, source.raw("vm")) as (url,):
            arrived = moved(bench, machine, there, target, url, "--profile", "none")
            if not is_fetched:
                wait_until(lambda: fvdfs("prefetch", "pause", target.raw("vm")).code == 0)  # once it is to begin
            time.sleep(MINUTE)
            course = follow(machine, arrived.target)
            arrived.kill()
        if not course.is_right:
            raise RuntimeError(f"the guest has seen: {course.lost} {course.complaints}")
        add_early(bench, who, course, arrived.first)


def many(bench: Bench, count: int) -> None:
    """So many guests at once."""
    folder, target_folder = (Path(tempfile.mkdtemp(dir=bench.work, prefix=name)) for name in ("source-", "target-"))
    names = [f"vm{number}" for number in range(count)]
    for name in names:
        must("create", folder / f"{name}.fvd", str(bench.mib * MIB))
    with (
        bench.hosts() as (here, there, link),
        here.mounted(folder) as source,
        there.mounted(target_folder, "-o", f"allow_url=nbd://{here.address}/") as target,
        ending((here, source), (there, target)),
        ThreadPoolExecutor(count) as threads,
    ):
        for name in names:
            bench.witness.fill(source.raw(name))
        machines = [bench.boot(here, drive(source.raw(name), cache="none")) for name in names]
        for machine in machines:
            machine.wait_for(BEFORE, 600)
        drop_caches()
        began, before = time.monotonic(), link.bytes()[0]
        with serving(here, *(source.raw(name) for name in names)) as urls:
            found = list(
                threads.map(
                    lambda number: moved(bench, machines[number], there, target, urls[number], number=number),
                    range(count),
                )
            )
            data = sum(allocated(file) for file in folder.glob("*.fvd"))
            local = wait_for_all(*((target, name) for name in names))
            crossed = link.bytes()[0] - before - sum(one.done["ram"]["transferred"] for one in found)
            wait_until(lambda: all(source.status(name)["move"] == "released" for name in names))
        courses = [follow(one.source, one.target) for one in found]
        for one in found:
            one.kill()
        for name, course in zip(names, courses, strict=True):
            bench.judge(course, target.raw(name))
        what = f"{count} guests at once"
        report = bench.report
        report.add(f"{what}: all run at the target after", "s", "fvdfs", max(one.first for one in found) - began)
        report.add(f"{what}: median downtime", "ms", "fvdfs", statistics.median(one.done["downtime"] for one in found))
        report.add(f"{what}: longest downtime", "ms", "fvdfs", max(one.done["downtime"] for one in found))
        report.add(f"{what}: longest time between two lines", "s", "fvdfs", max(course.gap for course in courses))
        report.add(f"{what}: all is local after", "s", "fvdfs", local - began)
        report.add(f"{what}: bytes over the link, of those allocated", "", "fvdfs", crossed / data)


def ratios(report: Report) -> None:
    """The goals, where there is what they need."""

    def median(what: str, unit: str, who: str) -> float:
        return report.median(what, unit, who)

    to_target = ("from the command to the guest's first line at the target", "s")
    early = (f"reads in the first {FIRST:g} s, p99", "ms")
    wanted: list[tuple[str, str, tuple[str, str], str, Callable[[float, float], float], str]] = [
        ("downtime, beyond shared's", "ms", ("downtime, as QEMU tells it", "ms"), "shared", lambda a, b: a - b, "<= 0"),
        ("at the target, after shared", "s", to_target, "shared", lambda a, b: a - b, "<= 0.3"),
        ("at the target, times as soon as mirror", "", to_target, "mirror", lambda a, b: b / a, ">= 20"),
        ("all is local, of what nbdcopy takes", "", ("all is local", "s"), "nbdcopy", lambda a, b: a / b, "<= 1.1"),
        ("early reads' p99, of copy-on-read's alone", "", early, "copy-on-read alone", lambda a, b: a / b, "<= 2"),
    ]
    for what, unit, figure, other, relation, goal in wanted:
        mine, theirs = median(*figure, "fvdfs"), median(*figure, other)
        if mine and theirs:
            report.add(what, unit, "fvdfs", relation(mine, theirs), goal)


def persist(candidate: Callable[[Bench], None], bench: Bench) -> None:
    """Emulation is not made for moves: a guest that panics is no figure."""
    for _ in range(TRIES - 1):
        try:
            return candidate(bench)
        except MachineEnded as ended:
            print(f"the guest has died, again: {str(ended)[-200:]}", file=sys.stderr)
    candidate(bench)


CANDIDATES = {
    "shared": shared,
    "mirror": mirror,
    "nbdcopy": nbdcopy,
    "fvdfs": by_fvdfs,
    "unprofiled": unprofiled,
    "alone": alone,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CANDIDATES), metavar="NAME,...")
    parser.add_argument("--size", type=parse_size, help="of the disk (20G; with --guests 1G)")
    parser.add_argument("--percent", type=int, default=30, help="of the disk that holds data (%(default)s)")
    parser.add_argument("--memory", type=int, default=384, help="MiB of a guest (%(default)s)")
    parser.add_argument("--bits", type=float, default=1e9, help="a second, over the link (1e9)")
    parser.add_argument("--delay-us", type=int, default=500, help="over the link, each way (%(default)s)")
    parser.add_argument("--guests", type=int, default=1, help="that are moved at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--warm", type=float, default=30, help="seconds that a guest runs before fvdfs migrate (%(default)s)"
    )
    parser.add_argument("--no-check", action="store_true", help="do not read the whole disk in the end")
    parser.add_argument("--work", type=Path, help="a folder on the disk to use (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures there, and count those there")
    arguments = parser.parse_args(words)
    report = Report(arguments.json)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="migrate-") as name:
        is_one = arguments.guests == 1
        size = arguments.size or ((20 if is_one else 1) << 30)
        dirty, hz = (128, 10) if is_one else (0, 2)
        bench = Bench(
            *(Path(name), size // MIB, arguments.percent, arguments.memory if is_one else 160, dirty, hz),
            *(arguments.bits, arguments.delay_us, report, not arguments.no_check, arguments.warm),
        )
        with suppress(KeyboardInterrupt):
            for _ in range(arguments.rounds):
                if is_one:
                    for candidate in arguments.only.split(","):
                        persist(CANDIDATES[candidate], bench)
                else:
                    persist(functools.partial(many, count=arguments.guests), bench)
    ratios(report)
    print(report.table())


if __name__ == "__main__":
    main()
