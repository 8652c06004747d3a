"""A disk that is frozen for its move to another host: nobody writes it, through the mount or past it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.format.migration import PLACE, Incoming, Outgoing, Record, Source, Target
from fvdfs.format.proof import Word, number_of, proof_of
from fvdfs.image.image import Image
from fvdfs.ops import moves
from fvdfs.ops.background import Background
from fvdfs.ops.openings import Openings
from fvdfs.store.filelock import FileLock
from fvdfs.store.host import HostFile, open_path
from support import reference
from support.kernel import Kernel
from support.mounts import MIB, PASSED_THROUGH, Mount, fvdfs, mounted, must, needs_passthrough, running, wait_for_log
from support.moves import record
from support.served import CTX, Served
from support.served import SIZE as SIZE_OF_DISK

E, T, OTHER_T, SECRET = "e" * 16, "1" * 32, "2" * 32, "3" * 32
DATA = bytes(range(256)) * 16


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    (folder / "base.raw").write_bytes(b"b" * 4 * MIB)
    must("create", folder / "vm.fvd", "--base", "base.raw", "-F", "raw", "--copy-on-read")
    with mounted(folder) as found:
        yield found


def step(mount: Mount, text: str) -> None:
    os.setxattr(mount.raw("vm"), "user.fvdfs.move", text.encode())


def write(raw: Path) -> None:
    with raw.open("r+b") as file:
        file.write(DATA)


def refused(path: Path) -> str:
    with pytest.raises(OSError) as caught:
        os.close(os.open(path, os.O_RDWR))
    return errno.errorcode[caught.value.errno or 0]


def test_a_frozen_disk_is_written_by_nobody(mount: Mount) -> None:
    raw, image = mount.raw("vm"), mount.folder / "vm.fvd"
    write(raw)
    must("freeze", raw)
    assert b"".join(reference.read_disk(image)).startswith(DATA), "it is closed, and clean"
    assert mount.status("vm")["move"] == "frozen"
    frozen = record(image)
    must("freeze", raw)
    assert record(image) == frozen
    for _ in range(2):
        assert refused(raw) == "EROFS"
        wait_for_log(mount, "frozen for a move")
        assert raw.read_bytes()[: len(DATA)] == DATA
        with pytest.raises(OSError, match="Read-only"):
            os.truncate(raw, 8 * MIB)
        commands: tuple[tuple[str | Path, ...], ...] = (
            ("snapshot", raw),
            ("prefetch", "start", raw),
            ("flatten", raw),
            ("resize", raw, "+1M"),
        )
        for command in commands:
            assert fvdfs(*command).code, command
        mount.remount()
    mount.umount()
    before = image.read_bytes()
    commands = (
        ("create", image, "1M", "--force"),
        ("convert", mount.folder / "base.raw", image, "--force"),
        ("resize", image, "+1M"),
        ("amend", image, "-F", "raw"),
        ("profile", "record", image),
        ("snapshot", image),
        ("flatten", image),
        ("rebase", image, "-b", "base.raw", "--unsafe"),
        ("check", image, "--repair"),
    )
    for command in commands:
        done = fvdfs(*command)
        assert done.code, command
        assert "frozen for a move" in done.err, (command, done.err)
        assert len(done.err.splitlines()) == 1
        assert image.read_bytes() == before, command
    assert fvdfs("check", image).code == 0
    must("info", image)
    must("thaw", image)
    must("resize", image, "+1M")


def test_writers_that_have_it_open_are_stopped_and_go_on_after_a_thaw(mount: Mount) -> None:
    raw, image = mount.raw("vm"), mount.folder / "vm.fvd"
    written, failed, ended = 0, threading.Event(), threading.Event()
    with open(raw, "r+b", buffering=0) as file:

        def write() -> None:
            nonlocal written
            descriptor = os.open(raw, os.O_RDWR | os.O_DSYNC)
            try:
                while not ended.is_set():
                    os.pwrite(descriptor, (written + 1).to_bytes(4, "little"), MIB)
                    written += 1
            except OSError as error:
                assert error.errno == errno.EROFS
                failed.set()
            finally:
                with contextlib.suppress(OSError):  # EIO: the kernel tells once more of what it could not write
                    os.close(descriptor)

        writer = threading.Thread(target=write)
        writer.start()
        while not written:
            time.sleep(0.01)
        try:
            must("freeze", raw)
            assert failed.wait(30)
        finally:
            ended.set()
            writer.join()
        # At the freeze all is in the image that was answered, and nothing later.
        content = b"".join(reference.read_disk(image))
        assert int.from_bytes(content[MIB : MIB + 4], "little") == written
        with pytest.raises(OSError, match="Read-only"):
            os.pwrite(file.fileno(), DATA, 0)
            os.fsync(file.fileno())
        must("thaw", raw)
        os.pwrite(file.fileno(), DATA, 0)
        os.fsync(file.fileno())
        assert not record(image)
        assert fvdfs("thaw", raw).code == 2
    mount.umount()
    assert b"".join(reference.read_disk(image)).startswith(DATA)


def test_it_goes_to_one_target_and_comes_back_only_by_force(mount: Mount) -> None:
    raw, image = mount.raw("vm"), mount.folder / "vm.fvd"
    step(mount, "serve")
    epoch = mount.status("vm")["move_epoch"]
    write(raw)  # it goes on
    step(mount, f"handover {epoch} {T} beta")
    assert record(image).outgoing == Outgoing(Source.MOVED, epoch, T, "beta")
    step(mount, f"handover {epoch} {T} beta")
    assert refused(raw) == "EROFS"
    wait_for_log(mount, f"moved to beta (epoch {epoch})")
    for text in (f"handover {epoch} {OTHER_T} gamma", f"handover {E} {T} beta", "thaw", "handover x y z", "nonsense"):
        with pytest.raises(OSError, match="Invalid"):
            step(mount, text)
        assert mount.status("vm")["move_refused"]
    assert "go on there" in fvdfs("thaw", raw).err
    wait_for_log(mount, "setxattr: vm.raw: has moved to beta")
    mount.remount()
    assert mount.status("vm")["move"] == "moved"
    assert mount.status("vm")["moved_to"] == "beta"
    must("release", raw)
    assert refused(raw) == "EROFS"
    must("thaw", "--lose-writes", raw)
    write(raw)


def test_only_what_is_released_can_be_removed(folder: Path) -> None:
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder, "-o", "create,remove") as mount:
        (mount.point / "other.raw").write_bytes(DATA)
        must("freeze", mount.raw("vm"))
        epoch = mount.status("vm")["move_epoch"]
        target = number_of(SECRET, epoch)
        step(mount, f"handover {epoch} {target} beta")
        with pytest.raises(OSError, match="Read-only"):
            mount.raw("vm").unlink()
        with pytest.raises(OSError, match="Read-only"):
            os.rename(mount.raw("other"), mount.raw("vm"))
        proof, other = (proof_of(SECRET, epoch, word) for word in Word)
        for words in (f"{target}", f"{target} {other.key} {other.other}", f"{target} {proof.other} {proof.key}"):
            with pytest.raises(OSError, match="Invalid"):
                step(mount, f"release {epoch} {words}")
        step(mount, f"release {epoch} {target} {proof.key} {proof.other}")
        mount.raw("vm").unlink()


def test_a_machine_that_runs_keeps_it_from_being_frozen(mount: Mount) -> None:
    raw = mount.raw("vm")
    with running("qemu-io", "-f", "raw", "-n", raw, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as machine:
        assert machine.stdin is not None
        assert machine.stdout is not None
        machine.stdin.write(b"write 0 4k\n")
        machine.stdin.flush()
        machine.stdout.readline()
        done = fvdfs("freeze", raw)
        assert (done.code, "a machine runs on it" in done.err) == (1, True)
        assert not record(mount.folder / "vm.fvd")
    descriptor = os.open(raw, os.O_RDONLY)
    FileLock(descriptor, str(raw)).take(exclusive=False)  # as `fvdfs freeze` and `fvdfs serve` do
    other = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "read 0 4k", raw], capture_output=True, text=True, check=False
    )
    assert 'Failed to get "write" lock' in other.stderr
    os.close(descriptor)


def test_a_crashed_image_is_recovered_before_it_is_frozen(mount: Mount) -> None:
    raw, image = mount.raw("vm"), mount.folder / "vm.fvd"
    descriptor = os.open(raw, os.O_RDWR)
    os.write(descriptor, DATA)
    os.fsync(descriptor)
    mount.kill()
    with pytest.raises(OSError, match="not connected"):
        os.close(descriptor)
    must("freeze", image)
    assert Header.decode(image.read_bytes()[:HEADER_SPACE], "").clean
    assert b"".join(reference.read_disk(image)).startswith(DATA)
    mount.mount()
    assert refused(raw) == "EROFS"


@pytest.mark.parametrize(("where", "failing"), [(moves, "write_record"), (moves, "stop_copies"), (os, "fsync")])
def test_a_freeze_that_fails_leaves_the_disk_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: ModuleType, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    async def work(kernel: Kernel, fh: int) -> None:
        step = functools.partial(moves.take_step, served.filesystem.openings, served.entry, "freeze")
        assert await kernel.write(fh, 0, DATA) == len(DATA)
        with monkeypatch.context() as patched:
            patched.setattr(where, failing, fail)
            with pytest.raises(OSError, match="no"):
                await step()
        assert await kernel.write(fh, 4096, DATA) == len(DATA)
        assert not record(tmp_path / "a.fvd")
        await step()
        with pytest.raises(OSError, match="Read-only"):
            await kernel.write(fh, 8192, DATA)
        assert await kernel.read(fh, 0, 8192) == DATA + DATA

    served = Served(tmp_path, monkeypatch)
    served.run(work)
    assert record(tmp_path / "a.fvd").state == "frozen"


def test_a_write_that_waits_for_a_freeze_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        image = served.entry.image
        assert image is not None
        begun, go_on, stop_writing = trio.Event(), trio.Event(), image.stop_writing

        async def stop_slowly() -> None:
            begun.set()
            await go_on.wait()
            await stop_writing()

        monkeypatch.setattr(image, "stop_writing", stop_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(moves.take_step, served.filesystem.openings, served.entry, "freeze")
            await begun.wait()
            waiting = [kernel.send_write(fh, at, DATA) for at in (0, SIZE_OF_DISK)]  # the second enlarges it
            await trio.sleep(0.05)
            answered = set(waiting) & set(kernel.answered)
            go_on.set()
        assert not answered
        for unique in waiting:
            with pytest.raises(OSError, match="Read-only"):
                await kernel.answer(unique)

    served = Served(tmp_path, monkeypatch)
    served.run(work)
    assert not b"".join(reference.read_disk(tmp_path / "a.fvd")).startswith(DATA)


@pytest.mark.parametrize(
    ("where", "name"), [(Image, "change_base"), (moves, "begin_writing"), (Background, "begin"), (Openings, "forget")]
)
def test_a_take_over_that_fails_once_it_is_stable_is_finished_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """There is no way back then: nobody else can write the disk."""
    served = Served(tmp_path, monkeypatch)
    (tmp_path / "frozen.raw").write_bytes((tmp_path / "base.raw").read_bytes())
    with (tmp_path / "a.fvd").open("r+b") as file:
        file.seek(PLACE)
        file.write(Record(Incoming(Target.RECEIVING, E, SECRET)).encode())

    async def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    async def say_yes(*_: object, **__: object) -> None:
        pass

    def open_source(image: str, *_: object, **__: object) -> HostFile:
        return open_path(str(tmp_path / "frozen.raw"), writable=False)

    monkeypatch.setattr(moves, "ask", say_yes)
    monkeypatch.setattr(moves, "open_named", open_source)

    async def work(kernel: Kernel, fh: int) -> None:
        openings = served.filesystem.openings
        expected = await kernel.read(fh, 0, 8192)
        with monkeypatch.context() as patched:
            if where is Openings:
                patched.setattr(openings, "forget_pages", fail)
            else:
                patched.setattr(where, name, fail)
            for _ in range(2):
                with pytest.raises(OSError, match="Input/output"):
                    await kernel.write(fh, 0, DATA)
                assert record(tmp_path / "a.fvd").state == "active"
                assert served.entry.move_refused == "no space"
                assert await kernel.read(fh, 0, 8192) == expected
            # Nobody may hold pages that are still to be forgotten while his own change has to wait for that.
            info = await served.filesystem.open(served.entry.inode, os.O_RDONLY, CTX)
            assert info.direct_io == (where in (Image, Openings))
            await served.filesystem.release(info.fh)
        assert await kernel.write(fh, 0, DATA) == len(DATA)
        assert not served.entry.move_refused
        assert await kernel.read(fh, 0, 8192) == DATA + expected[len(DATA) :]
        assert served.entry.image is not None
        assert served.entry.image.writable

    served.run(work)
    assert b"".join(reference.read_disk(tmp_path / "a.fvd")).startswith(DATA)


def test_writes_that_queue_up_fail_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU waits for all of them before its machine stands still."""
    served = Served(tmp_path, monkeypatch)
    with (tmp_path / "a.fvd").open("r+b") as file:
        file.seek(PLACE)
        file.write(Record(Incoming(Target.RECEIVING, E, SECRET)).encode())
    asked = []

    async def ask_in_vain(*_: object, **__: object) -> None:
        asked.append(1)
        await trio.sleep(1.1)  # what counts as long
        raise OSError(errno.ETIMEDOUT, "no answer")

    monkeypatch.setattr(moves, "ask", ask_in_vain)

    async def work(kernel: Kernel, fh: int) -> None:
        for _ in range(4):
            with pytest.raises(OSError, match="Input/output"):
                await kernel.write(fh, 0, DATA)
        assert len(asked) == 1
        served.entry.vain_until = 0
        with pytest.raises(OSError, match="Input/output"):
            await kernel.write(fh, 0, DATA)
        assert len(asked) == 2

    served.run(work)


def test_a_thaw_that_cannot_have_the_disk_be_written_is_finished_by_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise OSError(errno.EIO, "no")

    async def never(_inode: int) -> None:
        pytest.fail("the kernel would wait for pages that it holds for this very write")

    async def work(kernel: Kernel, fh: int) -> None:
        step = functools.partial(moves.take_step, served.filesystem.openings, served.entry)
        await step("freeze")
        served.filesystem.openings.forget_pages = never
        with monkeypatch.context() as patched:
            patched.setattr(moves, "begin_writing", fail)
            await step("thaw")
            with pytest.raises(OSError, match="Input/output"):
                await kernel.write(fh, 0, DATA)
        await step("freeze")
        with pytest.raises(OSError, match="Read-only"):
            await kernel.write(fh, 0, DATA)
        await step("thaw")
        assert await kernel.write(fh, 0, DATA) == len(DATA)

    served = Served(tmp_path, monkeypatch)
    served.run(work)


def test_a_frozen_base_gets_no_copies(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"b" * 4 * MIB)
    must("create", folder / "cache.fvd", "--base", "base.raw", "-F", "raw", "--copy-on-read")
    must("create", folder / "vm.fvd", "--base", "cache.fvd", "-F", "fvd")
    must("freeze", folder / "cache.fvd")
    before = (folder / "cache.fvd").read_bytes()
    with mounted(folder) as mount:
        assert mount.raw("vm").read_bytes() == b"b" * 4 * MIB
    assert (folder / "cache.fvd").read_bytes() == before


def test_damaged_records_keep_an_image_from_being_used(folder: Path) -> None:
    image = folder / "vm.fvd"
    must("create", image, "4M")
    must("freeze", image)
    with image.open("r+b") as file:
        file.seek(PLACE + 20)
        file.write(b"?")
    with mounted(folder) as mount:
        assert not mount.raw("vm").exists()
        wait_for_log(mount, "is damaged")
    assert "is damaged" in fvdfs("resize", image, "+1M").err
    assert fvdfs("thaw", image).code
    must("thaw", "--lose-writes", image)
    must("resize", image, "+1M")


@needs_passthrough
def test_the_kernel_does_not_write_by_itself_to_what_is_frozen(folder: Path) -> None:
    must("create", folder / "vm.fvd", "4M", "--data-file", "auto")
    with mounted(folder, "-o", PASSED_THROUGH, passes="vm") as mount:
        raw = mount.raw("vm")
        with open(raw, "r+b", buffering=0) as file:
            file.write(DATA)
            assert "-o writeback=on" in fvdfs("freeze", raw).err
            file.write(DATA)
        must("freeze", raw)
        assert refused(raw) == "EROFS"
        assert raw.read_bytes().startswith(DATA + DATA)
        must("thaw", raw)
        write(raw)
