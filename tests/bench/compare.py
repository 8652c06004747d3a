"""fvdfs next to its peers: the same workloads on the same disk, interleaved, in one run.

    python tests/bench/compare.py [--rounds N] [--work DIR] [--only WORKLOAD,...] [--targets TARGET,...]

Prints a table of medians and, for each target of fvdfs, the ratio to the best peer. Needs root, fio,
qemu-utils, qemu-system-common (qemu-storage-daemon), nbdkit and libnbd-bin; a peer that is not
installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.lab import wait_for

MIB = 1 << 20
SIZE = 1 << 30
FVDFS = [sys.executable, "-m", "fvdfs"]

DIRECT16 = ["--direct=1", "--ioengine=libaio", "--iodepth=16"]
WORKLOADS: dict[str, list[str]] = {
    "seqread": ["--rw=read", "--bs=1m", "--size=512m"],
    "randread4k": ["--rw=randread", "--bs=4k", "--size=1g", "--io_size=48m", "--direct=1"],
    "randread4k16": ["--rw=randread", "--bs=4k", "--size=1g", "--io_size=96m", *DIRECT16],
    "randwrite4k": ["--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=48m", "--end_fsync=1"],
    "randwrite4ks": ["--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=4m", "--fsync=1"],
    "randwrite4k16": ["--rw=randwrite", "--bs=4k", "--size=1g", "--io_size=64m", *DIRECT16],
    "seqwrite": ["--rw=write", "--bs=1m", "--size=512m", "--offset=512m", "--end_fsync=1"],
}
IN_MB = {"seqread", "seqwrite"}

Target = Callable[[Path, Path], "Iterator[Path]"]


def run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


# --- what is measured: each makes a fresh disk over the base, serves it, and takes it away --------


def fvdfs_target(*options: str, device: bool = False) -> Target:
    def serve(work: Path, base: Path) -> Iterator[Path]:
        folder, point = work / "images", work / "disks"
        folder.mkdir()
        point.mkdir()
        image = folder / "disk.fvd"
        chosen = [str(base) if option == "BASE" else option for option in options]
        loop = ""
        try:
            if device:
                backing = work / "device"
                backing.touch()
                os.truncate(backing, 2 * SIZE)
                loop = run("losetup", "-f", "--show", backing).strip()
                image.symlink_to(loop)
            run(*FVDFS, "create", loop or image, str(SIZE), *chosen)
            run(*FVDFS, "mount", folder, point, "-o", f"base_path={base.parent}")
            try:
                yield point / "disk.raw"
            finally:
                run(*FVDFS, "umount", point)
        finally:
            if loop:
                run("losetup", "-d", loop)

    return serve


def raw_target(work: Path, base: Path) -> Iterator[Path]:
    disk = work / "disk.raw"
    shutil.copyfile(base, disk)
    yield disk


def daemon_target(*create: str) -> Target:
    def serve(work: Path, base: Path) -> Iterator[Path]:
        disk, export = work / "disk.qcow2", work / "export"
        backing = ["-b", str(base), "-F", "raw"] if "BASE" in create else []
        run("qemu-img", "create", "-q", "-f", "qcow2", *backing, disk, str(SIZE))
        export.touch()
        daemon = subprocess.Popen(
            [
                "qemu-storage-daemon",
                f"--blockdev=driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}",
                f"--export=type=fuse,id=e,node-name=disk,mountpoint={export},writable=on",
            ]
        )
        try:
            wait_for(lambda: export.stat().st_size == SIZE)
            yield export
        finally:
            daemon.terminate()
            daemon.wait()

    return serve


def nbdkit_target(work: Path, base: Path) -> Iterator[Path]:
    export = work / "export"
    export.touch()
    socket = work / "socket"
    server = subprocess.Popen(["nbdkit", "-f", "-U", socket, "--filter=cow", "file", base])
    try:
        wait_for(socket.exists)
        client = subprocess.Popen(["nbdfuse", export, "--unix", socket])
        try:
            wait_for(lambda: export.stat().st_size == SIZE)
            yield export
        finally:
            subprocess.run(["fusermount3", "-u", export], check=False)
            client.wait()
    finally:
        server.terminate()
        server.wait()


TARGETS: dict[str, tuple[str, Target]] = {
    "raw file": ("", raw_target),
    "fvdfs cow": ("", fvdfs_target("-b", "BASE", "-F", "raw")),
    "fvdfs compact cow": ("", fvdfs_target("-b", "BASE", "-F", "raw", "--compact", "--block-size", "64K")),
    "fvdfs plain": ("", fvdfs_target()),
    "fvdfs compact": ("", fvdfs_target("--compact")),
    "fvdfs compact on device": ("", fvdfs_target("--compact", device=True)),
    "qcow2 cow": ("qemu-storage-daemon", daemon_target("BASE")),
    "qcow2": ("qemu-storage-daemon", daemon_target()),
    "nbdkit cow": ("nbdfuse", nbdkit_target),
}
PEERS = ("qcow2 cow", "qcow2", "nbdkit cow")


# --- measuring ----------------------------------------------------------------------------------


def measure(disk: Path, workload: str) -> float:
    """MB/s of a sequential workload, operations per second of another."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    output = run("fio", "--name=x", f"--filename={disk}", "--output-format=json", *WORKLOADS[workload])
    job = json.loads(output[output.index("{") :])["jobs"][0]
    busy = max(job["read"], job["write"], key=lambda side: side["io_bytes"])
    return float(busy["bw"] * 1.024 / 1000 if workload in IN_MB else busy["iops"])


@contextmanager
def served(target: Target, work: Path, base: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=work))
    try:
        yield from target(folder, base)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    arguments = parser.parse_args()
    workloads = arguments.only.split(",")
    targets = {}
    for name in arguments.targets.split(","):
        program, target = TARGETS[name]
        if program and not shutil.which(program):
            print(f"left out: {name} ({program} is not installed)")
        else:
            targets[name] = target
    figures: dict[tuple[str, str], list[float]] = {(t, w): [] for t in targets for w in workloads}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        base = work / "base.raw"
        with open(base, "wb") as file:
            for _ in range(SIZE // MIB):
                file.write(os.urandom(MIB))
        for number in range(arguments.rounds):
            for target_name, target in targets.items():
                with served(target, work, base) as disk:
                    for workload in workloads:
                        figures[target_name, workload].append(measure(disk, workload))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    print(table(list(targets), workloads, figures))


def table(targets: list[str], workloads: list[str], figures: dict[tuple[str, str], list[float]]) -> str:
    """Medians, and the ratio to the best peer behind those of fvdfs."""
    lines = ["| | " + " | ".join(f"{w} ({'MB/s' if w in IN_MB else 'IOPS'})" for w in workloads) + " |"]
    lines.append("|---" * (len(workloads) + 1) + "|")
    median = {key: statistics.median(values) for key, values in figures.items()}
    for target in targets:
        cells = []
        for workload in workloads:
            cell = f"{median[target, workload]:.0f}"
            peers = [median[peer, workload] for peer in PEERS if peer in targets]
            if target.startswith("fvdfs") and peers:
                cell += f" ({median[target, workload] / max(peers):.2f}x)"
            cells.append(cell)
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
