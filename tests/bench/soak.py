"""A mixed load on one mount for a long time: does the process that serves it grow?

For --minutes, several workers at once do what users do, over and over:

    guests      qemu-io writes patterns to a disk and reads them back; one in three is killed in the middle
    readers     a disk over a base is read by copy-on-read, its prefetching started, paused and stopped
    tenants     an image is created, written to, read and removed, also while it is open
    lookers     the folder is listed, `status` and `map` are asked

Each verdict is about content as well: what qemu-io wrote, and what the base holds, must be read. Every few seconds
the resident memory and the number of descriptors of the process are sampled. After a warm-up, which fills caches,
both are to be flat: the medians of the first and of the last quarter of the samples may differ by no more than
--growth MiB, and by a handful of descriptors; and when all is closed no descriptor of an image is left.

    python tests/bench/soak.py --minutes 60 [--seed N] [--growth 8] [--folder DIR]

Prints a line every minute, and the figures at the end; exit code 1 where something grew or went wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
FVDFS = [sys.executable, "-m", "fvdfs"]
BASE = 16 * MIB
SAMPLE = 2.0  # seconds
WARM_UP = 0.2  # of the samples
DESCRIPTORS = 6  # by which their median may differ


@dataclass(frozen=True)
class Sample:
    """What the process takes at one moment."""

    seconds: float
    resident: int
    descriptors: int


class Soak:
    """The mount, the workers, what they have counted."""

    def __init__(self, work: Path, seed: int) -> None:
        self.folder = work / "images"
        self.point = work / "disks"
        self.log = work / "log"
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.samples: list[Sample] = []
        self._seed = seed
        self._stop = threading.Event()
        self._base = random.Random(seed).randbytes(BASE)
        self._pid = 0

    def fvdfs(self, *arguments: str | Path, check: bool = True) -> str:
        """Run the program."""
        done = subprocess.run([*FVDFS, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)
        if check and done.returncode:
            raise RuntimeError(f"fvdfs {arguments}: {done.stderr.strip()}")
        return done.stdout

    def create(self, name: str, *options: str, size: str = "24M") -> Path:
        """A new image, in the place of one that may still be being closed; the path of its disk."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.fvdfs("create", self.folder / f"{name}.fvd", size, *options, "--force")
                return self.point / f"{name}.raw"
            except RuntimeError as error:
                if "in use" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def run(self, minutes: float) -> None:
        """All of it."""
        self.folder.mkdir()
        self.point.mkdir()
        (self.folder / "base.raw").write_bytes(self._base)
        self.fvdfs("mount", self.folder, self.point, "--log-file", self.log, "-o", "prefetch_max=8M")
        try:
            self._pid = int(os.getxattr(self.point, "user.fvdfs.pid"))
            self._work(minutes)
        finally:
            self.fvdfs("umount", self.point)
        if "Traceback" in self.log.read_text():
            self.problems.append("there is a traceback in the log")

    def _work(self, minutes: float) -> None:
        workers: list[Callable[[random.Random, int], None]] = [
            self._guest, self._guest, self._reader, self._reader, self._tenant, self._looker,
        ]  # fmt: skip
        threads = [
            threading.Thread(target=self._repeat, args=(worker, number)) for number, worker in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        said = 0
        while time.monotonic() < start + 60 * minutes and not self.problems:
            time.sleep(SAMPLE)
            self.samples.append(self._sample(time.monotonic() - start))
            if self.samples[-1].seconds // 60 > said:
                said = int(self.samples[-1].seconds // 60)
                print(f"{said:4} min  {self._line(self.samples[-1])}  {dict(self.counts)}", flush=True)
        self._stop.set()
        for thread in threads:
            thread.join()
        self._closed()

    def _repeat(self, worker: Callable[[random.Random, int], None], number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        while not self._stop.is_set():
            try:
                worker(rng, number)
            except Exception as error:
                self.problems.append(f"{worker.__name__}: {error!r}")
                return

    # --- the workers ------------------------------------------------------------------------------

    def _guest(self, rng: random.Random, number: int) -> None:
        """A disk that a client of QEMU writes to; killed, or asked what it wrote."""
        options = [["--compact", "--chunk-size", "64K"], ["-b", "base.raw", "-F", "raw"], []][rng.randrange(3)]
        raw = self.create(f"guest{number}", *options)
        for _ in range(4):
            runs = [(rng.randrange(0, 20 * MIB // 4096) * 4096, rng.randrange(1, 64) * 4096) for _ in range(12)]
            kill = rng.random() < 0.33
            writes = [f"write -q -P {n + 1} {at} {length}" for n, (at, length) in enumerate(runs)]
            commands = [*writes, "flush"] if not kill else [*writes * 20, "flush"]
            process = subprocess.Popen(
                ["qemu-io", "-f", "raw", "-n", *(word for command in commands for word in ("-c", command)), str(raw)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            if kill:
                time.sleep(rng.uniform(0.02, 0.3))
                process.kill()
                process.communicate()
                self.counts["guests killed"] += 1
                continue
            output, _ = process.communicate(timeout=300)
            if process.returncode:
                raise RuntimeError(f"qemu-io: {output.decode(errors='replace')[-500:]}")
            expected = bytearray(20 * MIB + 64 * 4096)
            for n, (at, length) in enumerate(runs):
                expected[at : at + length] = bytes([n + 1]) * length
            with open(raw, "rb") as disk:
                for at, length in runs:
                    disk.seek(at)
                    if disk.read(length) != expected[at : at + length]:
                        raise RuntimeError(f"{raw}: bytes {at}..{at + length} are not what was written")
            self.counts["guests"] += 1

    def _reader(self, rng: random.Random, number: int) -> None:
        """A disk over a base, read while it is prefetched."""
        options = ["-b", "base.raw", "-F", "raw", "--copy-on-read"]
        raw = self.create(f"reader{number}", *options, *(["--compact"] if rng.random() < 0.5 else []))
        with open(raw, "r+b", buffering=0) as disk:
            for _ in range(20):
                at = rng.randrange(BASE - 300_000)
                length = rng.randrange(1, 300_000)
                if os.pread(disk.fileno(), length, at) != self._base[at : at + length]:
                    raise RuntimeError(f"{raw}: bytes {at}..{at + length} are not the base's")
            for command in ("start", "pause", "start", "stop"):
                with contextlib.suppress(OSError):  # it may be done already
                    os.setxattr(raw, "user.fvdfs.prefetch", command.encode())
                time.sleep(rng.uniform(0, 0.4))
        with open(raw, "rb") as disk:
            if hashlib.sha256(disk.read(BASE)).digest() != hashlib.sha256(self._base).digest():
                raise RuntimeError(f"{raw}: is not its base")
        self.counts["readers"] += 1

    def _tenant(self, rng: random.Random, number: int) -> None:
        """An image that comes and goes."""
        raw = self.create(f"tenant{number}-{rng.randrange(5)}", size="4M")
        data = rng.randbytes(rng.randrange(1, 100_000))
        with open(raw, "r+b", buffering=0) as disk:
            disk.write(data)
            os.fsync(disk.fileno())
            if rng.random() < 0.5:
                (self.folder / raw.with_suffix(".fvd").name).unlink()
            if os.pread(disk.fileno(), len(data), 0) != data:
                raise RuntimeError(f"{raw}: is not what was written")
        (self.folder / raw.with_suffix(".fvd").name).unlink(missing_ok=True)
        self.counts["tenants"] += 1

    def _looker(self, rng: random.Random, number: int) -> None:
        """Somebody who only looks."""
        self.fvdfs("status", self.point, "--json")
        for name in os.listdir(self.point):
            with contextlib.suppress(OSError):
                os.stat(self.point / name)
                if name.startswith("reader"):
                    os.getxattr(self.point / name, "user.fvdfs.map")
        time.sleep(0.2)
        self.counts["looks"] += 1

    # --- the figures ------------------------------------------------------------------------------

    def _sample(self, seconds: float) -> Sample:
        status = Path(f"/proc/{self._pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
        return Sample(seconds, resident * 1024, len(os.listdir(f"/proc/{self._pid}/fd")))

    def _closed(self) -> None:
        """When nobody has a disk open, the process has no image open."""
        deadline = time.monotonic() + 30
        while left := self._open_images():
            if time.monotonic() > deadline:
                self.problems.append(f"left open: {left}")
                return
            time.sleep(0.2)

    def _open_images(self) -> list[str]:
        found = []
        for name in os.listdir(f"/proc/{self._pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{self._pid}/fd/{name}")
                if target.startswith(str(self.folder)):
                    found.append(target)
        return found

    @staticmethod
    def _line(sample: Sample) -> str:
        return f"{sample.resident / MIB:6.1f} MiB, {sample.descriptors:3} descriptors"

    def verdict(self, growth: float) -> int:
        """Print the figures; the exit code."""
        steady = self.samples[int(len(self.samples) * WARM_UP) :]
        quarter = len(steady) // 4
        if quarter:
            first, last = [
                Sample(
                    part[-1].seconds,
                    int(statistics.median(sample.resident for sample in part)),
                    int(statistics.median(sample.descriptors for sample in part)),
                )
                for part in (steady[:quarter], steady[-quarter:])
            ]
            print(f"start  {self._line(first)}\nend    {self._line(last)}\n{dict(self.counts)}")
            if last.resident > first.resident + growth * MIB:
                self.problems.append("memory grew")
            if last.descriptors > first.descriptors + DESCRIPTORS:
                self.problems.append("the number of descriptors grew")
        else:
            print("too short for a verdict on growth")
        for problem in self.problems:
            print(f"FAILED: {problem}")
        return 1 if self.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A mixed load on one mount for a long time.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--growth", type=float, default=8, help="MiB that the median of the memory may grow")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="fvdfs-soak-") as work:
        soak = Soak(Path(work), arguments.seed)
        soak.run(arguments.minutes)
        return soak.verdict(arguments.growth)


if __name__ == "__main__":
    sys.exit(main())
