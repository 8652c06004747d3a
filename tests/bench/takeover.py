"""Programs use disks while the daemon of their mount is killed again and again (`-o keep`): does one of them notice?

    python tests/bench/takeover.py [--kills 200] [--only LAYOUT,...] [--open 20] [--seed N] [--writeback on|off|auto]
        [--work DIR] [--json FILE]

For each layout of the disks, one mount serves

- a guest (`support/witness.py`) that appends to a log, flushes, rewrites blocks, and verifies what it reads,
- an ext4 file system of this host (a loop device with direct I/O), on which fio writes and verifies,
- a reader that asks for 4 KiB at a time, by direct I/O: it feels each pause,
- and more disks that are open, `--open` in all, one of them of 2 TiB.

Then the daemon gets SIGKILL at a random moment, up to three seconds after it was back the last time, `--kills` times.
A pause is what the reader waited longest for around a kill. At the end the guest's log must be whole, fio and e2fsck
must have found nothing, and `check` must find every image right.

Exit code 1 where something was wrong. Needs root, gcc, fio, e2fsprogs, qemu-system-x86, busybox-static, cpio and
linux-image-cloud-amd64.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.guest import drive
from support.hosts import two_hosts
from support.mounts import MIB, Mount, mounted, must, wait_until
from support.witness import Witness, follow

LAYOUTS = {
    "plain": [],
    "based": ["--base", "template.raw", "--copy-on-read"],
    "bare": ["--base", "template.raw", "--journal-size", "none"],
    "compact": ["--base", "template.raw", "--compact", "--copy-on-read"],
    "apart": ["--data-file", "{name}.data"],
    "based apart": ["--base", "template.raw", "--data-file", "{name}.data"],
}
DISK = 128  # MiB
LONGEST_CALM = 3.0  # seconds between kills; of eight that follow within one each, the keeper gives up (`keeper.py`)
BEFORE = 20  # ticks of the guest
GONE = 60.0  # seconds after which a daemon does not come any more
FIO = (
    *("fio", "--name=verify", "--rw=randwrite", "--bs=4k-64k", "--size=24M", "--direct=1", "--fsync=16"),
    *("--ioengine=libaio", "--iodepth=4", "--verify=crc32c", "--verify_fatal=1", "--output-format=terse"),
)


@dataclass
class Result:
    """What became of one layout. Times in seconds."""

    layout: str
    kills: int
    median: float
    p99: float
    longest: float
    """Pause."""
    gap: float
    """The guest's longest time between two ticks."""
    ticks: int
    fio_runs: int
    wrong: list[str]


class Reader(threading.Thread):
    """Reads a block over and over; how long each read took, and when it ended."""

    def __init__(self, raw: Path) -> None:
        super().__init__(name="reader", daemon=True)
        self.raw = raw
        self.reads: list[tuple[float, float]] = []
        self.error = ""
        self.stop = threading.Event()

    def run(self) -> None:
        descriptor = os.open(self.raw, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 4096)
        try:
            while not self.stop.wait(0.001):
                begun = time.monotonic()
                os.preadv(descriptor, [buffer], 0)
                ended = time.monotonic()
                self.reads.append((ended, ended - begun))
        except OSError as error:
            self.error = f"reader: {error.strerror}"
        finally:
            os.close(descriptor)

    def longest_since(self, begun: float) -> float:
        """The longest read that ended since then."""
        return max((took for ended, took in list(self.reads)[-5000:] if ended >= begun), default=0.0)


class Verifier(threading.Thread):
    """Runs fio over and over."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="verifier", daemon=True)
        self.folder = folder
        self.runs = 0
        self.error = ""
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set() and not self.error:
            done = subprocess.run([*FIO, f"--directory={self.folder}"], capture_output=True, text=True, check=False)
            self.runs += 1
            if done.returncode:
                self.error = f"fio: {(done.stderr or done.stdout).strip()[-300:]}"


@contextmanager
def file_system(raw: Path, point: Path, wrong: list[str]) -> Iterator[None]:
    """ext4 on a disk, mounted; e2fsck looks at it at the end."""
    device = subprocess.run(
        ["losetup", "--direct-io=on", "-f", "--show", raw], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        point.mkdir()
        subprocess.run(["mount", device, point], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", point], check=True)
        done = subprocess.run(["e2fsck", "-fn", device], capture_output=True, text=True, check=False)
        if done.returncode:
            wrong.append(f"e2fsck: {done.stdout[-300:]}")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def kill(mount: Mount) -> None:
    """End the daemon, and wait until the next one answers."""
    former = mount.pid
    os.kill(former, signal.SIGKILL)
    wait_until(lambda: int(os.getxattr(mount.point, "user.fvdfs.pid")) != former, GONE)
    mount.pid = int(os.getxattr(mount.point, "user.fvdfs.pid"))


def make_disks(folder: Path, layout: str, witness: Witness, others: int) -> None:
    """vm, fs, reads, large, and so many others, by which there are `others` in all."""
    template = folder / "template.raw"
    template.touch()
    os.truncate(template, DISK * MIB)
    witness.fill(template)
    names = ["vm", "fs", "reads", *(f"other{number}" for number in range(others - 4))]
    for name in names:
        words = [word.format(name=name) for word in LAYOUTS[layout]]
        must("create", folder / f"{name}.fvd", *([] if "--base" in words else [f"{DISK}M"]), *words)
    words = [word.format(name="large") for word in LAYOUTS[layout] if word not in ("--base", "template.raw")]
    must("create", folder / "large.fvd", "2T", *(word for word in words if word != "--copy-on-read"))


def try_layout(layout: str, options: argparse.Namespace, work: Path, chance: random.Random) -> Result:
    """Kill, and see."""
    folder = work / layout.replace(" ", "-") / "images"
    folder.mkdir(parents=True)
    witness = Witness(folder.parent, DISK)
    make_disks(folder, layout, witness, options.open)
    wrong: list[str] = []
    pauses: list[float] = []
    with ExitStack() as stack:
        host, _, _ = stack.enter_context(two_hosts())
        mount = stack.enter_context(mounted(folder, "-o", f"keep,writeback={options.writeback}"))
        if "--base" not in LAYOUTS[layout]:
            witness.fill(mount.raw("vm"))
        with ExitStack() as users:
            for disk in sorted(mount.point.glob("other*.raw")):
                users.enter_context(disk.open("r+b"))
            large = users.enter_context(mount.raw("large").open("r+b", buffering=0))
            large.seek(1 << 40)
            large.write(b"far away" * 512)
            users.enter_context(file_system(mount.raw("fs"), folder.parent / "ext4", wrong))
            verifier, reader = Verifier(folder.parent / "ext4"), Reader(mount.raw("reads"))
            verifier.start()
            reader.start()
            guest = witness.boot(host, drive(mount.raw("vm"), cache="none"))
            users.callback(guest.kill)
            guest.wait_for(BEFORE)
            for number in range(options.kills):
                time.sleep(chance.uniform(0, LONGEST_CALM))
                begun = time.monotonic()
                kill(mount)
                reads = len(reader.reads)
                wait_until(lambda reads=reads: len(reader.reads) > reads + 2 or reader.error)  # type: ignore[misc]
                pauses.append(reader.longest_since(begun))
                if number % 20 == 19:
                    print(f"{layout}: {number + 1} kills, longest pause {max(pauses):.2f} s", file=sys.stderr)
            guest.wait_for(len(guest.ticks) + BEFORE)
            for thread in (verifier, reader):
                thread.stop.set()
                thread.join(GONE)
            guest.kill()
            large.seek(1 << 40)
            if large.read(4096) != b"far away" * 512:
                wrong.append("large.raw: lost what was written")
            course = follow(guest)
            wrong += [error for error in (verifier.error, reader.error) if error]
            wrong += course.complaints + [f"the guest's tick {number} is lost" for number in course.lost]
        log = mount.log
        if (counted := log.count("is taken over")) != options.kills:
            wrong.append(f"{counted} take-overs for {options.kills} kills")
        wrong += [line for line in log.splitlines() if " ERROR " in line][:5]
        try:
            witness.check(mount.raw("vm"))
        except Exception as error:
            wrong.append(f"the guest's disk: {error}")
    for image in sorted(folder.glob("*.fvd")):
        try:
            must("check", image)
        except AssertionError as error:
            wrong.append(str(error))
    ranked = sorted(pauses)
    return Result(
        layout=layout,
        kills=len(pauses),
        median=statistics.median(ranked),
        p99=ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))],
        longest=ranked[-1],
        gap=course.gap,
        ticks=len(course.ticks),
        fio_runs=verifier.runs,
        wrong=wrong,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default=",".join(LAYOUTS))
    parser.add_argument("--open", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writeback", default="auto")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.work, prefix="takeover-") as work:
        for layout in options.only.split(","):
            result = try_layout(layout, options, Path(work), random.Random(options.seed))
            results.append(result)
            print(
                f"{layout:12} {result.kills:4} kills  pause {result.median:.2f} s, p99 {result.p99:.2f}, longest "
                f"{result.longest:.2f}  guest's gap {result.gap:.2f} s in {result.ticks} ticks  "
                f"fio {result.fio_runs} runs  " + ("; ".join(result.wrong) or "all right"),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if any(result.wrong for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
