"""Many tasks on one image, and what happens when some of them are cancelled, or the mount ends under them.

In the process: for each n, one operation is cancelled at its n-th checkpoint while other tasks read and write. Then
every sector holds what somebody wrote to it, no claim, fetch or lock is left, and an image that is loaded anew from
the same bytes is sound. A cancelled write may have happened in part, as one that fails may.

With a real mount: unmounting under load, images that vanish and are replaced under load, two mounts on one folder, a
daemon that is killed under QEMU, and a great many images opened and closed.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import wait_all_tasks_blocked

from fvdfs.image.image import Image
from fvdfs.image.policy import Policy
from fvdfs.ops.background import Background
from fvdfs.ops.folder import Folder
from fvdfs.ops.openings import Openings
from fvdfs.prefetch.prefetcher import Prefetcher
from fvdfs.prefetch.scheduler import Scheduler
from support import reference
from support.builder import LAYOUTS, Layout, load, read_files
from support.fakes import SECTOR, MemoryStore, fsync_as_mounted
from support.guest import build_initrd, find_kernel, find_program
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_for_end, wait_until

# --- cancelled in the process --------------------------------------------------------------------

MAX_STEPS = 600


class CancelAt(trio.abc.Instrument):
    """Cancels a scope when the tasks in it have been at so many checkpoints together."""

    def __init__(self, nth: int) -> None:
        self.scope = trio.CancelScope()
        self.steps = 0
        self._nth = nth
        self._tasks: set[Any] = set()

    def watch(self, task: Any) -> None:
        """This task and those that it starts are in the scope."""
        self._tasks.add(task)

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        parent = task.parent_nursery.parent_task if task.parent_nursery is not None else None
        if parent in self._tasks:
            self._tasks.add(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self._tasks:
            self.steps += 1
            if self.steps == self._nth:
                self.scope.cancel()


@dataclass
class Bench:
    """An image with others at it, and the one that is going to be cancelled."""

    image: Image
    stores: dict[str, MemoryStore]
    before: bytes
    legal: dict[int, set[bytes]]
    """What sectors may hold besides what they held."""

    def may_hold(self, offset: int, data: bytes) -> None:
        """A write of whole sectors that may, or may not, happen."""
        for at in range(0, len(data), SECTOR):
            self.legal.setdefault((offset + at) // SECTOR, set()).add(data[at : at + SECTOR])

    def must_hold(self, offset: int, data: bytes) -> None:
        """A write that has happened, and that nobody else wrote over."""
        for at in range(0, len(data), SECTOR):
            self.legal[(offset + at) // SECTOR] = {data[at : at + SECTOR]}

    def check(self, found: bytes) -> None:
        """Whether a disk with this content may come of it; a resize only adds or takes zeros at the end."""
        for sector in range(min(len(found), len(self.before)) // SECTOR):
            content = bytes(found[sector * SECTOR : (sector + 1) * SECTOR])
            old = self.before[sector * SECTOR : (sector + 1) * SECTOR]
            if sector in self.legal:
                allowed = self.legal[sector] if MUST in self.legal[sector] else self.legal[sector] | {old}
                assert content in allowed, f"sector {sector}"
            else:
                assert content == old, f"sector {sector} was not written to"


MUST = b"must"
"""In a set of contents: what the sector held before is not one of them."""

Operation = Callable[[Bench], Awaitable[None]]
NEW = random.Random(5).randbytes(150 * SECTOR)
AT = 77 * SECTOR


async def cancelled_read(bench: Bench) -> None:
    data = await bench.image.read(10, 300_000)
    assert len(data) == 300_000


async def cancelled_write(bench: Bench) -> None:
    bench.may_hold(AT, NEW)
    await bench.image.write(AT, NEW)


async def cancelled_zero(bench: Bench) -> None:
    bench.may_hold(AT, bytes(len(NEW)))
    await bench.image.zero(AT, AT + len(NEW))


async def cancelled_flush(bench: Bench) -> None:
    bench.may_hold(AT, NEW)
    await bench.image.write(AT, NEW)
    await bench.image.fsync()


async def cancelled_growth(bench: Bench) -> None:
    await bench.image.resize(bench.image.size + 40 * SECTOR)


async def cancelled_cut(bench: Bench) -> None:
    await bench.image.resize(bench.image.size - 40 * SECTOR, shrink=True)


async def cancelled_copy(bench: Bench) -> None:
    start, stop = bench.image.missing(0, 300_000)
    if start < stop:
        data = bytearray(stop - start)
        await bench.image.read_base(memoryview(data), start)
        await bench.image.store_copy(start, memoryview(data))


async def cancelled_prefetch(bench: Bench) -> None:
    await Prefetcher(bench.image, Scheduler()).run()


async def cancelled_close(bench: Bench) -> None:
    bench.may_hold(AT, NEW)
    await bench.image.write(AT, NEW)
    await bench.image.close()


OPERATIONS: dict[str, Operation] = {
    name.removeprefix("cancelled_"): operation for name, operation in globals().items() if name.startswith("cancelled_")
}
CANCEL_LAYOUTS = ["cow-64k", "compact-cow-7680-64k", "copy-on-read-7680", "cow-no-journal"]


async def others(bench: Bench, rounds: int) -> None:
    """What goes on beside it: writes next to it, in the same blocks, and reads."""
    rng = random.Random(3)
    for number in range(rounds):
        at = (40 + 3 * number) * SECTOR if number % 2 else AT + len(NEW) + number * SECTOR
        data = rng.randbytes(SECTOR)
        bench.may_hold(at, data)
        try:
            await bench.image.write(at, data)
        except OSError as error:
            assert error.errno in (errno.EROFS, errno.EIO)  # the image is being closed
            return
        bench.must_hold(at, data)
        bench.legal[at // SECTOR].add(MUST)
        assert await bench.image.read(at, SECTOR) == data
        if number % 4 == 0:
            await fsync_as_mounted(bench.image)


async def cancel_once(built: dict[str, bytes], operation: Operation, nth: int) -> bool:
    """Cancel it at its n-th checkpoint; False where it had ended before."""
    stores = {name: MemoryStore(content, name, slow=True) for name, content in built.items()}
    for name, store in stores.items():
        store.writable = name.startswith("disk.")
    image = await load(stores, spawn=lambda work: background.start_soon(work))
    before = bytes(await image.read(0, image.size))
    bench = Bench(image, stores, before, {})
    instrument = CancelAt(nth)
    closes = operation is cancelled_close
    async with trio.open_nursery() as background:
        await image.begin_writing(accept_unclean=True)
        trio.lowlevel.add_instrument(instrument)
        try:
            async with trio.open_nursery() as nursery:

                async def victim() -> None:
                    instrument.watch(trio.lowlevel.current_task())
                    with instrument.scope:
                        await operation(bench)

                nursery.start_soon(victim)
                if not closes:
                    nursery.start_soon(others, bench, 8)
        finally:
            trio.lowlevel.remove_instrument(instrument)
        if closes and instrument.scope.cancelled_caught and not image.meta.closed:  # type: ignore[attr-defined]
            await image.close()  # it was cancelled before it came to closing
        elif not closes:
            await nothing_is_left(image)
            bench.check(bytes(await image.read(0, image.size)))
            await image.write(0, b"still works".ljust(SECTOR, b"!"))
            bench.must_hold(0, b"still works".ljust(SECTOR, b"!"))
            bench.legal[0].add(MUST)
            await image.close()
    assert image.committer.failed is None
    assert all(store.closed for store in stores.values())
    again = await load({name: MemoryStore(store.data, name) for name, store in stores.items()})
    assert again.header.clean
    bench.check(bytes(await again.read(0, again.size)))
    return instrument.steps >= nth


async def nothing_is_left(image: Image) -> None:
    """No claim, fetch, lock, reader or writer, once all has settled."""
    with trio.fail_after(60):
        while image.fetcher is not None and image.fetcher._fetches:
            await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    assert not image._locks
    assert not image.in_use
    assert not image._gate.is_closed
    assert not image._resizer.lock.locked()
    assert not image.committer._lock.locked()
    if image.fetcher is not None:
        assert image.fetcher._outstanding == 0


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("layout", CANCEL_LAYOUTS)
def test_cancelled_at_every_checkpoint(tmp_path: Path, layout: str, operation: str) -> None:
    chosen: Layout = next(each for each in LAYOUTS if each.name == layout)
    chosen.build(tmp_path)
    built = read_files(tmp_path)
    nth = 1
    while trio.run(cancel_once, built, OPERATIONS[operation], nth, clock=trio.testing.MockClock(autojump_threshold=0)):
        nth += 1 if nth < 40 else 7  # later ones are all of a kind
        assert nth < MAX_STEPS
    assert nth > 1 or operation == "copy", "it has no checkpoint: nothing was tried"


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_opening_and_closing_cancelled_at_every_checkpoint(folder: Path, write: bool) -> None:
    """No descriptor is left, and the next who opens the image can."""
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "2M", "--base", "base.raw", "--base-format", "raw", "--compact")

    async def once(nth: int) -> bool:
        images = Openings(Folder(str(folder), Policy()), Background())
        entry = await images.folder.lookup(b"a.raw")
        assert entry is not None
        instrument = CancelAt(nth)
        trio.lowlevel.add_instrument(instrument)
        opened = False
        try:
            instrument.watch(trio.lowlevel.current_task())
            with instrument.scope:
                await images.open(entry.inode, write=write)
                opened = True
                await images.close(entry)
                opened = False
        finally:
            trio.lowlevel.remove_instrument(instrument)
        if opened and entry.opens:
            await images.close(entry)
        assert entry.opens == 0
        assert entry.image is None
        assert not entry.lock.locked()
        again, _ = await images.open(entry.inode, write=True)
        assert again.image is not None
        await again.image.write(0, b"x")
        await images.close(again)
        return instrument.steps >= nth

    before = len(os.listdir("/proc/self/fd"))
    nth = 1
    while trio.run(once, nth):
        nth += 1
    gc.collect()
    assert nth > 3
    assert len(os.listdir("/proc/self/fd")) <= before
    assert reference.check(folder / "a.fvd", "fvdfs") == []


# --- the end of a mount under load ----------------------------------------------------------------


@contextlib.contextmanager
def fio(*disks: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Random reads and writes to these disks, until they fail."""
    jobs = [word for disk in disks for word in (f"--name={disk.stem}", f"--filename={disk}")]
    options = ["--rw=randrw", "--bs=4k", "--ioengine=psync", "--size=4m", "--time_based", "--runtime=60", "--thread"]
    command = [find_program("fio"), *options, "--fsync=16", "--fallocate=none", *jobs]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=disks[0].parent.parent
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(60)


def is_open(mount: Mount, name: str) -> bool:
    return bool(mount.status(name)["open"])


def two_images(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"base" * MIB)
    must("create", folder / "a.fvd", "4M", "-b", "base.raw", "-F", "raw", "--copy-on-read", "--prefetch-delay", "1")
    must("create", folder / "b.fvd", "4M", "--compact", "--chunk-size", "64K")


@pytest.mark.parametrize("end", ["SIGTERM", "umount"])
def test_a_mount_ends_under_load(folder: Path, end: str) -> None:
    two_images(folder)
    with mounted(folder) as mount:
        pid = mount.pid
        with fio(mount.raw("a"), mount.raw("b")) as load_process:
            wait_until(lambda: is_open(mount, "a") and is_open(mount, "b"))
            time.sleep(0.5)
            if end == "umount":
                done = fvdfs("umount", mount.point)
                assert done.code == 1
                assert "busy" in done.err
                assert load_process.poll() is None, "who has a disk open goes on"
                load_process.kill()
                load_process.wait(60)
                mount.umount()
            else:
                os.kill(pid, signal.SIGTERM)
                wait_for_end(pid)
                mount.pid = 0
                assert load_process.wait(60) != 0, "fio was told"
        assert not os.path.ismount(mount.point)
        assert "Traceback" not in mount.log
    for name in "ab":
        assert reference.check(folder / f"{name}.fvd", "fvdfs") == []


def test_images_are_removed_and_replaced_under_load(folder: Path) -> None:
    two_images(folder)
    with mounted(folder) as mount, fio(mount.raw("a"), mount.raw("b")) as load_process:
        wait_until(lambda: is_open(mount, "a") and is_open(mount, "b"))
        for number in range(5):
            must("create", folder.parent / "new.fvd", "1M")
            os.rename(folder.parent / "new.fvd", folder / "a.fvd")
            assert mount.raw("a").stat().st_size == MIB
            with open(mount.raw("a"), "r+b", buffering=0) as disk:
                disk.write(b"%d" % number * 512)
                os.fsync(disk.fileno())
            assert mount.raw("a").read_bytes()[:512] == b"%d" % number * 512
            (folder / "a.fvd").unlink()
            assert not mount.raw("a").exists()
        assert load_process.poll() is None, "who had the old one open still has it"
        load_process.kill()
        load_process.wait(60)
        assert "Traceback" not in mount.log
    assert reference.check(folder / "b.fvd", "fvdfs") == []


def test_two_mounts_on_one_folder(folder: Path, tmp_path: Path) -> None:
    two_images(folder)
    other = Mount(folder, tmp_path / "other", tmp_path / "other.log")
    other.point.mkdir()
    with mounted(folder) as mount:
        other.mount()
        try:
            with fio(mount.raw("a")) as first, fio(other.raw("b")) as second:
                wait_until(lambda: is_open(mount, "a") and is_open(other, "b"))
                for taken in (other.raw("a"), mount.raw("b")):
                    with pytest.raises(OSError) as caught:
                        os.open(taken, os.O_RDWR)
                    assert caught.value.errno == errno.EBUSY
                assert first.poll() is second.poll() is None
            wait_until(lambda: not is_open(mount, "a") and not is_open(other, "b"))
            with open(mount.raw("b"), "r+b", buffering=0) as disk:
                disk.write(b"by the first")
            with open(other.raw("b"), "r+b", buffering=0) as disk:  # waits for the other's closing
                assert disk.read(12) == b"by the first"
        finally:
            other.umount()
    for name in "ab":
        assert reference.check(folder / f"{name}.fvd", "fvdfs") == []


def test_a_hundred_images_opened_five_hundred_times(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "i0.fvd", "1M", "-b", "base.raw", "-F", "raw", "--compact", "--copy-on-read")
    for number in range(1, 100):
        subprocess.run(["cp", "--sparse=always", folder / "i0.fvd", folder / f"i{number}.fvd"], check=True)
    with mounted(folder) as mount:

        def figures() -> tuple[int, int]:
            status = Path(f"/proc/{mount.pid}/status").read_text()
            resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
            return len(os.listdir(f"/proc/{mount.pid}/fd")), resident

        def use(first: int) -> None:
            for number in range(first, 500, 4):
                with open(mount.raw(f"i{number % 100}"), "r+b", buffering=0) as disk:
                    disk.write(b"%03d" % number)
                    os.pread(disk.fileno(), 4096, 65536)

        def all_at_once() -> None:
            threads = [threading.Thread(target=use, args=(first,)) for first in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: b'"open": true' not in must("status", mount.point, "--json").encode())

        all_at_once()
        before = figures()
        all_at_once()
        time.sleep(0.5)  # the last is still being closed
        after = figures()
        print(f"descriptors and KiB: {before}, {after}")
        assert after[0] <= before[0]
        assert after[1] <= before[1] + 4096
        assert "Traceback" not in mount.log


# --- QEMU ---------------------------------------------------------------------------------------


def test_a_client_of_qemu_gets_errors_when_the_daemon_is_killed(folder: Path) -> None:
    two_images(folder)
    with mounted(folder) as mount:
        commands = [word for _ in range(20_000) for word in ("-c", "aio_write -q 0 64k", "-c", "flush")][:8000]
        process = subprocess.Popen(
            [find_program("qemu-io"), "-f", "raw", "-n", *commands, str(mount.raw("a"))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: is_open(mount, "a"))
            time.sleep(0.1)
            os.kill(mount.pid, signal.SIGKILL)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert b"failed: " in output, output[-500:]
        wait_for_end(mount.pid)
        assert fvdfs("umount", mount.point).code == 0, "a dead mount can be cleared away by the same command"
        mount.mount()
        assert len(mount.raw("a").read_bytes()) == 4 * MIB
        with open(mount.raw("a"), "r+b"):
            pass
    assert reference.check(folder / "a.fvd", "fvdfs") == []


@pytest.mark.slow
def test_a_guest_gets_errors_when_the_daemon_is_killed(folder: Path, tmp_path: Path) -> None:
    """It reports them and ends; its file system is sound after the journals, fvdfs's and its own, were replayed."""
    (folder / "base.raw").write_bytes(bytes(32 * MIB))
    must("create", folder / "a.fvd", "64M", "-b", "base.raw", "-F", "raw", "--compact", "--chunk-size", "64K")
    script = (
        "mkdir -p /mnt; mount -t ext4 -o errors=continue /dev/vda /mnt; n=0\n"
        "echo GUEST-WRITES\n"
        "while dd if=/dev/urandom of=/mnt/f$((n % 20)) bs=64k count=4 conv=fsync 2>/dev/null; do n=$((n + 1)); done\n"
        "echo GUEST-SAW-AN-ERROR\n"
    )
    initrd = build_initrd(tmp_path, script, extra_modules=["ext4"])
    kernel, _ = find_kernel()
    log = tmp_path / "console"
    with mounted(folder) as mount:
        subprocess.run([find_program("mkfs.ext4"), "-q", "-F", mount.raw("a")], check=True)
        for round_ in range(2):
            with open(log, "wb") as console:
                guest = subprocess.Popen(
                    [
                        "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nographic",
                        "-no-reboot", "-nic", "none", "-kernel", str(kernel), "-initrd", str(initrd),
                        "-append", "console=ttyS0 panic=-1 quiet",
                        "-drive", f"file={mount.raw('a')},format=raw,if=virtio,cache=none,werror=report,rerror=report",
                    ],
                    stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                )  # fmt: skip
            try:
                wait_until(lambda: b"GUEST-WRITES" in log.read_bytes(), timeout=120)
                time.sleep(1 + round_)
                mount.kill()
                wait_until(lambda: b"GUEST-SAW-AN-ERROR" in log.read_bytes(), timeout=60)
            finally:
                guest.kill()
                guest.wait()
            mount.mount()
            done = subprocess.run([find_program("e2fsck"), "-p", mount.raw("a")], capture_output=True, check=False)
            assert done.returncode in (0, 1), done.stdout
            subprocess.run([find_program("e2fsck"), "-fn", mount.raw("a")], check=True, capture_output=True)
    assert reference.check(folder / "a.fvd", "fvdfs") == []
