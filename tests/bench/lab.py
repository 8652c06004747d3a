"""The parts of an experiment with prefetching: a base behind NBD whose log is evidence, disks over it, a guest.

A base is a file, or nbdkit's own random data, behind an nbdkit with a limited rate and a delay. Its outermost
filter is the log: it sees requests and answers as the clients do. Clients are told apart by the name of the
export that they ask for, which means nothing to the server. What a disk reads is counted there and nowhere else.

A disk is a flat file over such a base: an FVD image in a mount of fvdfs, or a qcow2 overlay behind the
FUSE export of a qemu-storage-daemon, where block-stream does what prefetching does in fvdfs. QEMU 7.2
streams only while nobody may write through that export.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from support.guest import boot

MIB = 1 << 20
FVDFS = [sys.executable, "-m", "fvdfs"]
Ranges = Sequence[tuple[int, int]]  # (offset, length)
Link = tuple[int, int]  # bytes per second (0: all that the server can), and milliseconds until an answer


def command(*words: str | Path, timeout: float = 300) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))[:500]}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def wait_for(condition: Callable[[], object], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so after {timeout:g} s")
        time.sleep(0.1)


@contextmanager
def running(*words: str | Path, errors: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program in the background, ended at the end whatever happens; where its complaints go."""
    with open(errors, "w") if errors else nullcontext() as sink:
        process = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=sink)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Have memory in use once, and have the host of a virtual machine not take it back while it is free.

    Otherwise whoever uses a page first pays for it, some microseconds, which is more than reading it costs.
    """
    setting = Path("/sys/module/page_reporting/parameters/page_reporting_order")
    try:
        before = setting.read_text()
        setting.write_text("11")  # larger than any free block
    except OSError:  # no such kernel
        yield
        return
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, free * 4 // 5, flags=flags).close()
        yield
    finally:
        setting.write_text(before)


@dataclass(frozen=True)
class Read:
    """A read that a server answered; times as `time.time`."""

    offset: int
    length: int
    began: float
    ended: float


_LINE = re.compile(r"(\S+ \S+) connection=(\d+) (?:Connect export=(\S*)|(\.\.\.)?Read id=(\d+) (.*))")


@dataclass
class Server:
    """A running nbdkit."""

    folder: Path

    def url(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.folder}/socket"

    def reads(self, export: str = "") -> list[Read]:
        """The reads by this client (default: by all) that were answered, in the order of asking."""
        names: dict[str, str] = {}
        asked: dict[tuple[str, str], tuple[float, list[int]]] = {}
        found = []
        for match in filter(None, map(_LINE.match, (self.folder / "log").read_text().splitlines())):
            stamp, connection, name, answer, number, rest = match.groups()
            when = datetime.fromisoformat(stamp).timestamp()
            if name is not None:
                names[connection] = name
            elif not answer:
                asked[connection, number] = when, [int(value, 16) for value in re.findall(r"=0x(\w+)", rest)]
            elif rest.startswith("return=0") and export in ("", names[connection]):
                began, (offset, length) = asked.pop((connection, number))
                found.append(Read(offset, length, began, when))
        return sorted(found, key=lambda read: read.began)


@contextmanager
def serve(
    *plugin: str | Path, link: Link = (0, 0), filters: Sequence[str] = (), burst: float = 0.1
) -> Iterator[Server]:
    """Serve a plugin's disk over a link; read-only unless a filter keeps what is written to itself.

    `burst`: the seconds that the link's cap saves for. nbdkit's own is 2.
    """
    with tempfile.TemporaryDirectory(prefix="base-") as name:
        chosen, settings = ["log"], [*map(str, plugin), f"logfile={name}/log"]
        if link[0]:
            chosen.append("rate")
            settings += [f"rate={link[0] * 8}", f"burstiness={burst:g}"]
        if link[1]:
            chosen.append("delay")
            settings.append(f"rdelay={link[1]}ms")
        words = [*(f"--filter={one}" for one in (*chosen, *filters)), *([] if "cow" in filters else ["--readonly"])]
        # It complains of every client that leaves without waiting for its answers.
        with running(
            "nbdkit", "-f", "--exit-with-parent", *words, "-U", f"{name}/socket", *settings, errors=Path(name, "errors")
        ):
            wait_for(Path(name, "socket").exists)
            yield Server(Path(name))


def total(reads: Iterable[Read]) -> int:
    return sum(read.length for read in reads)


def rate(reads: Iterable[Read], start: float, stop: float) -> float:
    """Bytes per second that were answered in this time."""
    return total(read for read in reads if start <= read.ended < stop) / (stop - start)


def union(ranges: Ranges, unit: int = 1) -> int:
    """Bytes in the union of ranges, each widened to whole units."""
    covered = end = 0
    for first, last in sorted((at // unit * unit, -(-(at + length) // unit) * unit) for at, length in ranges):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return covered


@dataclass
class Disk:
    """A flat file that reads what it lacks from a base; how to fetch the rest, and whether all is there."""

    path: Path
    start: Callable[[], object]
    pause: Callable[[], object]
    done: Callable[[], bool]


def fill(file: Path, image_format: str, ranges: Ranges) -> None:
    """Write something to these ranges."""
    command("qemu-io", "-f", image_format, *(f"-c write -q {offset} {length}" for offset, length in ranges), file)


def new_images(work: Path, urls: Sequence[str], *create: str | Path) -> Path:
    """A folder of images, one over each of these bases."""
    folder = Path(tempfile.mkdtemp(dir=work, prefix="images-"))
    for number, url in enumerate(urls):
        command(*FVDFS, "create", folder / f"{number}.fvd", "--base", url, "--base-format", "raw", *create)
    return folder


ALLOW_URLS = "allow_url=nbd+unix:///"


@contextmanager
def mount(folder: Path, options: str = ALLOW_URLS) -> Iterator[Path]:
    """Where it is mounted."""
    point, log = folder.with_suffix(".mnt"), folder.with_suffix(".log")
    point.mkdir(exist_ok=True)
    command(*FVDFS, "mount", folder, point, "--log-file", log, "-o", options)
    pid = int(os.getxattr(point, "user.fvdfs.pid"))
    try:
        yield point
    finally:
        try:
            command(*FVDFS, "umount", point)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"umount: {error}; the end of {log}:\n{log.read_text()[-2000:]}", file=sys.stderr)
            subprocess.run(["umount", "-l", point], check=False)
            with suppress(ProcessLookupError):
                os.kill(pid, 9)


@contextmanager
def mounted(folder: Path, options: str = ALLOW_URLS) -> Iterator[list[Disk]]:
    """Its disks, as long as it is mounted."""
    with mount(folder, options) as point:
        yield [fvdfs_disk(point / f"{number}.raw") for number in range(len(list(folder.glob("*.fvd"))))]


def fvdfs_disk(path: Path) -> Disk:
    """A disk in a mount."""

    def done() -> bool:
        status = json.loads(os.getxattr(path, "user.fvdfs.status"))
        return bool(status["local_bytes"] >= status["base_size"])

    start, pause = (partial(command, *FVDFS, "prefetch", word, path) for word in ("start", "pause"))
    return Disk(path, start, pause, done)


@contextmanager
def fvdfs_disks(work: Path, urls: Sequence[str], local: Ranges = ()) -> Iterator[list[Disk]]:
    """New images over these bases, in one mount; these parts of each are local."""
    folder = new_images(work, urls)
    with mounted(folder) as disks:
        for disk in disks:
            fill(disk.path, "raw", local)
        yield disks
    shutil.rmtree(folder)


def new_overlay(work: Path, url: str, local: Ranges = ()) -> Path:
    """A qcow2 image over a base; these parts are local."""
    file = Path(tempfile.mkdtemp(dir=work, prefix="overlay-"), "disk.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", "-b", url, "-F", "raw", file)
    fill(file, "qcow2", local)
    return file


@contextmanager
def qcow2_disks(work: Path, urls: Sequence[str], local: Ranges = (), copy: bool = False) -> Iterator[list[Disk]]:
    """New overlays over these bases; these parts of each are local. `copy`: with copy-on-read, not to be streamed."""
    files = [{"driver": "file", "filename": str(new_overlay(work, url, local))} for url in urls]
    devices: list[dict[str, Any]] = [{"driver": "qcow2", "file": file} for file in files]
    devices = [{"driver": "copy-on-read", "file": device} for device in devices] if copy else devices
    with exported(work, devices, writable=copy) as disks:
        yield disks
    for file in files:
        Path(file["filename"]).unlink()


@contextmanager
def exported(work: Path, devices: Sequence[dict[str, Any]], writable: bool = False) -> Iterator[list[Disk]]:
    """Disks with the content of these block devices, from one qemu-storage-daemon."""
    folder = Path(tempfile.mkdtemp(dir=work, prefix="export-"))
    words = ["--chardev", f"socket,id=qmp,path={folder}/qmp,server=on,wait=off", "--monitor", "chardev=qmp"]
    nodes = {f"n{number}": device for number, device in enumerate(devices)}
    for node, device in nodes.items():
        (folder / node).touch()
        words += ["--blockdev", json.dumps({**device, "node-name": node}), "--export"]
        words += [f"fuse,id=e{node},node-name={node},mountpoint={folder}/{node},writable={'on' if writable else 'off'}"]
    with running("qemu-storage-daemon", *words), socket.socket(socket.AF_UNIX) as connection:
        wait_for(lambda: all((folder / node).stat().st_size for node in nodes))
        with chdir(folder):  # the name of a socket has to be short
            connection.connect("qmp")
        lines = connection.makefile()

        def qmp(name: str, **arguments: str) -> Any:
            request = {"execute": name, "arguments": {key.replace("_", "-"): arguments[key] for key in arguments}}
            connection.sendall(json.dumps(request).encode())
            answer = next(found for found in map(json.loads, lines) if found.keys() & {"return", "error"})
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            return answer["return"]

        qmp("qmp_capabilities")
        yield [_qemu_disk(folder / node, node, qmp) for node in nodes]
    shutil.rmtree(folder)


def _qemu_disk(path: Path, node: str, qmp: Callable[..., Any]) -> Disk:
    def done() -> bool:
        return all(job["device"] != node for job in qmp("query-block-jobs"))

    def start() -> None:
        qmp("block-stream", job_id=node, device=node) if done() else qmp("block-job-resume", device=node)

    return Disk(path, start, lambda: qmp("block-job-pause", device=node), done)


def random_reads(disk: Path, seconds: float, offset: int, size: int) -> dict[str, float]:
    """Read 4 KiB at random, one at a time, past every cache: p50 and p99 in microseconds, reads per second."""
    words = ["--rw=randread", "--bs=4k", "--direct=1", f"--offset={offset}", f"--size={size}", "--randrepeat=0"]
    words += ["--norandommap", "--time_based", f"--runtime={seconds:g}", "--ramp_time=1"]
    output = command("fio", "--name=x", f"--filename={disk}", "--output-format=json", *words)
    side = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    percentile = side["clat_ns"]["percentile"]
    return {"p50": percentile["50.000000"] / 1e3, "p99": percentile["99.000000"] / 1e3, "reads": side["iops"]}


def replay(trace: Ranges, disk: Path) -> float:
    """Seconds to read these ranges, one after another, past every cache."""
    descriptor = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    start = time.monotonic()
    try:
        with mmap.mmap(-1, 32 * MIB) as area, memoryview(area) as buffer:
            for offset, length in trace:
                with buffer[:length] as part:
                    os.preadv(descriptor, [part], offset)
        return time.monotonic() - start
    finally:
        os.close(descriptor)


GUEST_SCRIPT = """\
mkdir /mnt
mount -t ext4 -o noatime /dev/vda /mnt
uptime() { cut -d' ' -f1 /proc/uptime; }
echo READING $(uptime)
echo SUM $(xargs cat < /mnt/boot.list | md5sum)
echo READ $(uptime)
date >> /mnt/log
umount /mnt
"""


def make_guest_disk(disk: Path, size: int, read: int) -> str:
    """A file system full of files, some of which (`read` bytes, in boot.list) a boot reads; their checksum."""
    chance, files, left = random.Random(5), list[Path](), size * 7 // 10
    with tempfile.TemporaryDirectory(dir=disk.parent) as name:
        while left > 0:
            file = Path(name, str(chance.randrange(40)), str(len(files)))
            file.parent.mkdir(exist_ok=True)
            left -= file.write_bytes(chance.randbytes(int(2 ** chance.uniform(11, 21))))
            files.append(file)
        chance.shuffle(files)
        while sum(file.stat().st_size for file in files) > read:
            files.pop()
        Path(name, "boot.list").write_text("".join(f"/mnt/{file.relative_to(name)}\n" for file in files))
        command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", "-d", name, disk, f"{size // 1024}k")
        return command("sh", "-c", 'cat "$@" | md5sum', "sh", *files).split()[0]


def boot_guest(disk: str | Path, initrd: Path, checksum: str, drive: str = "") -> tuple[float, float]:
    """Seconds from QEMU's start to its end, and of reading by the guest's clock, which must read the right data.

    The disk is raw; further options of QEMU's -drive may say that it is another one, since the last one wins.
    """
    drop_caches()
    start = time.monotonic()
    log = boot(Path(disk), initrd, cache=f"none{drive}", timeout=300)
    whole = time.monotonic() - start
    found = dict(re.findall(r"^(READING|READ|SUM) (\S+)", log, re.MULTILINE))
    if found["SUM"] != checksum:
        raise RuntimeError(f"{disk}: the guest has read something else than the base holds")
    return whole, float(found["READ"]) - float(found["READING"])
