"""What random writes cost beyond the guest's own bytes: fvdfs, counted at its stores, and qcow2, by strace.

    python tests/bench/metadata.py [--writes N] [--work DIR]

The workload: N random writes of 4 KiB on a disk of 1 GiB, a flush after every 64. Printed are bytes
written and read besides the data itself: metadata, and what had to be copied to complete blocks.
Then how many extents the host's file system needs for a disk that a guest has filled in order.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio

from fvdfs.commands.create import create_image
from fvdfs.format.creation import CreateOptions
from fvdfs.image.chain import open_chain
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image, open_image
from fvdfs.image.locking import lock_for_writing
from fvdfs.image.policy import Policy
from fvdfs.store.base import Buffer, Store, append_by_steps

SIZE = 1 << 30
PIECE = 4096
FLUSH_EVERY = 64


def offsets(count: int) -> Iterator[int]:
    chance = random.Random(1)
    for _ in range(count):
        yield chance.randrange(SIZE // PIECE) * PIECE


class CountingStore:
    """A store that counts the bytes that pass through it."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.written = 0
        self.read = 0
        self.flushes = 0
        self.name = inner.name
        self.writable = inner.writable
        self.fixed_size = inner.fixed_size
        self.server = inner.server
        self.is_remote = inner.is_remote
        self.zero = inner.zero
        self.reserve = inner.reserve
        self.copy = inner.copy
        self.write_out = inner.write_out
        self.extent = inner.extent
        self.size = inner.size
        self.resize = inner.resize
        self.usage = inner.usage
        self.aclose = inner.aclose
        self.append_stable = functools.partial(append_by_steps, self)
        self.start_pread = inner.start_pread
        self.start_pwrite = inner.start_pwrite
        self.start_flush = inner.start_flush

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        done = self.inner.pread_nowait(buffer, offset)
        self.read += len(buffer) if done else 0
        return done

    async def pread(self, buffer: memoryview, offset: int) -> int:
        count = await self.inner.pread(buffer, offset)
        self.read += count
        return count

    async def pwrite(self, data: Buffer, offset: int) -> None:
        self.written += len(data)
        await self.inner.pwrite(data, offset)

    async def flush(self) -> None:
        self.flushes += 1
        await self.inner.flush()


async def fvdfs(path: Path, count: int) -> tuple[int, int]:
    """Bytes written and read beyond the guest's, from opening to closing."""
    chain = open_chain(str(path), Policy())
    layer = chain.layers[0]
    own = CountingStore(layer.meta)
    base = CountingStore(chain.base) if chain.base else None
    image: Image = await load_image(layer.path, layer.header, layer.raw_header, own, own, base, Policy())
    await lock_for_writing(image)
    await image.begin_writing()
    data = os.urandom(PIECE)
    for number, offset in enumerate(offsets(count), 1):
        await image.write(offset, data)
        if number % FLUSH_EVERY == 0:
            await image.fsync()
    await image.close()
    return own.written - count * PIECE, own.read + (base.read if base else 0)


def qcow2(work: Path, count: int, base: Path | None) -> tuple[int, int]:
    disk = work / "disk.qcow2"
    backing = ["-b", str(base), "-F", "raw"] if base else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, disk, str(SIZE)], check=True)
    commands = []
    for number, offset in enumerate(offsets(count), 1):
        commands.append(f"write -q {offset} {PIECE}")
        if number % FLUSH_EVERY == 0:
            commands.append("flush")
    log = work / "strace"
    calls = "trace=pread64,pwrite64,preadv,pwritev,preadv2,pwritev2"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-s", "0", "-o", log, "qemu-io", "-t", "writeback", "-f", "qcow2", disk],
        input="\n".join(commands).encode(),
        check=True,
        capture_output=True,
    )
    written = read = 0
    for line in log.read_text(errors="replace").splitlines():
        # A call that was interrupted by another thread's ends on a line of its own, with its name again.
        found = re.search(r"\b(pread|pwrite)\w*(?:\(| resumed>).* = (\d+)$", line)
        if found and (str(disk) in line or "resumed" in line or (base and str(base) in line)):
            if found.group(1) == "pwrite":
                written += int(found.group(2))
            else:
                read += int(found.group(2))
    disk.unlink()
    return written - count * PIECE, read


async def fill(path: Path) -> None:
    """Write the first quarter of the disk in order."""
    image = await open_image(str(path), Policy(), write=True)
    data = os.urandom(1 << 20)
    for offset in range(0, SIZE // 4, len(data)):
        await image.write(offset, data)
    await image.close()


def fill_qcow2(work: Path) -> Path:
    disk = work / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE)], check=True)
    commands = [f"write -q {offset} 1M" for offset in range(0, SIZE // 4, 1 << 20)]
    run = ["qemu-io", "-t", "writeback", "-f", "qcow2", str(disk)]
    subprocess.run(run, input="\n".join(commands).encode(), check=True, capture_output=True)
    return disk


def extents(path: Path) -> int:
    output = subprocess.run(["filefrag", path], check=True, capture_output=True, text=True).stdout
    return int(output.rpartition(": ")[2].split()[0])


LAYOUTS: dict[str, CreateOptions] = {
    "compact": CreateOptions(compact=True),
    "cow": CreateOptions(base_img="base.raw"),
    "compact cow, 64K blocks": CreateOptions(base_img="base.raw", compact=True, block_size=64 << 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writes", type=int, default=8192)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        base = work / "base.raw"
        with open(base, "wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
        peers = {"qcow2": qcow2(work, arguments.writes, None), "qcow2 over a base": qcow2(work, arguments.writes, base)}
        print(
            f"{arguments.writes} random writes of 4 KiB, a flush after {FLUSH_EVERY}; KiB beyond the guest's own bytes"
        )
        print("| | written | read | written, qcow2 : this |")
        print("|---|---|---|---|")
        for peer, (written, read) in peers.items():
            print(f"| {peer} | {written >> 10} | {read >> 10} | |")
        for layout, options in LAYOUTS.items():
            image = work / "disk.fvd"
            create_image(str(image), SIZE, options)
            written, read = trio.run(fvdfs, image, arguments.writes)
            peer_written = peers["qcow2 over a base" if options.base_img else "qcow2"][0]
            print(f"| fvdfs {layout} | {written >> 10} | {read >> 10} | {peer_written / max(1, written):.1f} |")
            image.unlink()
        print(f"\n{SIZE >> 22} MiB written in order: extents of the host's file")
        for layout, options in {"plain": CreateOptions(), "compact": CreateOptions(compact=True)}.items():
            create_image(str(image), SIZE, options)
            trio.run(fill, image)
            print(f"fvdfs {layout}: {extents(image)}")
            image.unlink()
        print(f"qcow2: {extents(fill_qcow2(work))}")


if __name__ == "__main__":
    main()
