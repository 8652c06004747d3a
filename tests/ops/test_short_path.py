"""READ, WRITE and FSYNC without a mount: a `Device` between a kernel and a libfuse that the test plays."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Awaitable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from fvdfs.image.commit import Committer
from fvdfs.image.image import Image
from fvdfs.ops.filesystem import Sync
from fvdfs.ops.requests import Write
from fvdfs.ops.wire import (
    FATTR_FH,
    FATTR_TIMES,
    FUSE_FALLOCATE,
    FUSE_FSYNC,
    FUSE_INIT,
    FUSE_INTERRUPT,
    FUSE_LSEEK,
    FUSE_NOTIFY_INVAL_INODE,
    FUSE_READ,
    FUSE_SETATTR,
    FUSE_WRITE,
    FUSE_WRITE_CACHE,
    IN_HEADER,
    SETATTR,
)
from fvdfs.store.host import HostFile
from support.builder import KIB
from support.fakes import SECTOR
from support.kernel import GETATTR, MAX_WRITE, Kernel, Libfuse
from support.served import BASE, SIZE, Served, failing


@pytest.fixture
def served(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(folder, monkeypatch)


@pytest.mark.parametrize("ring", [False, True], ids=["threads", "ring"])
@pytest.mark.parametrize("sync", Sync)
def test_what_is_written_is_read(served: Served, sync: Sync, ring: bool) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        rng = random.Random(2)
        content = bytearray(BASE.ljust(SIZE, b"\0"))
        for size in (1, SECTOR, 5000, 64 * KIB, 64 * KIB + 1, MAX_WRITE):
            offset = rng.randrange(SIZE - size)
            data = content[offset : offset + size] = rng.randbytes(size)
            assert await kernel.write(fh, offset, data) == size
            await kernel.fsync(fh)
            assert await kernel.read(fh, offset, size) == data
        for offset in range(0, SIZE, MAX_WRITE):
            assert await kernel.read(fh, offset, MAX_WRITE) == content[offset : offset + MAX_WRITE]
        assert await kernel.read(fh, SIZE - 100, 4096) == content[-100:]
        assert await kernel.read(fh, SIZE, 4096) == b""

    served.run(work, sync=sync, ring=ring)


@pytest.mark.parametrize("ring", [False, True], ids=["threads", "ring"])
def test_requests_side_by_side_get_their_own_answers(served: Served, ring: bool) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        for first in range(0, 100, 5):
            numbers = range(first, first + 5)
            reads = {kernel.send_read(fh, number * 4096, 4096): number for number in numbers}
            writes = [kernel.send_write(fh, len(BASE) + number * 4096, bytes([number]) * 4096) for number in numbers]
            for unique, number in reads.items():
                assert await kernel.answer(unique) == BASE[number * 4096 :][:4096]
            for unique in writes:
                await kernel.answer(unique)
        for number in range(100):
            assert await kernel.read(fh, len(BASE) + number * 4096, 4096) == bytes([number]) * 4096

    served.run(work, ring=ring)


def test_direct_io_of_no_whole_sector_is_refused(served: Served) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        for offset, size in ((1, SECTOR), (0, SECTOR - 1), (100, SECTOR - 100)):
            for call in (
                kernel.read(fh, offset, size, os.O_DIRECT),
                kernel.write(fh, offset, bytes(size), os.O_DIRECT),
            ):
                with pytest.raises(OSError) as caught:
                    await call
                assert caught.value.errno == errno.EINVAL
            assert await kernel.write(fh, offset, bytes(size), os.O_DIRECT, FUSE_WRITE_CACHE) == size, "a page"
        assert await kernel.read(fh, 4096, SECTOR, os.O_DIRECT) == BASE[4096 : 4096 + SECTOR]

    served.run(work)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_errors_reach_who_asked(served: Served, caplog: pytest.LogCaptureFixture, code: int) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        async def fails(call: Awaitable[object]) -> None:
            with pytest.raises(OSError) as caught:
                await call
            assert caught.value.errno == code

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostFile, "pread_nowait", lambda *_: False)
            patch.setattr(HostFile, "pread", failing(code))
            await fails(kernel.read(fh, 0, 4096))
            patch.setattr(HostFile, "pwrite", failing(code))
            await fails(kernel.write(fh, len(BASE), bytes(4096)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Committer, "start_commit", lambda *_: False)
            patch.setattr(Image, "fsync", failing(code))
            await fails(kernel.fsync(fh))
        for what in ("read", "write", "fsync"):
            assert any(f": {what}: " in record.getMessage() for record in caplog.records)
        assert await kernel.read(fh, 0, 4096) == BASE[:4096], "it goes on"
        assert await kernel.write(fh, 0, b"new") == 3
        await kernel.fsync(fh)

    served.run(work)


def test_a_write_that_fails_as_it_begins_is_one_that_failed() -> None:
    """The kernel may have kept its bytes, and believe that the disk is longer by them."""

    def start(_: object) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    entry: Any = SimpleNamespace(cached=object(), misjudged=False)
    pending: Any = SimpleNamespace(start=start)
    told: list[int] = []
    with pytest.raises(OSError, match="No space"):
        Write(entry, pending, lambda _: None, beyond=True).start(told.append)
    assert entry.cached is None
    assert entry.misjudged
    assert told == []


def test_an_interrupt_changes_nothing(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here can be interrupted: the request is answered once, when it has ended; others go on meanwhile."""

    async def work(kernel: Kernel, fh: int) -> None:
        begun, goes_on = trio.Event(), trio.Event()
        read = HostFile.pread

        async def waiting(file: HostFile, buffer: memoryview, offset: int) -> int:
            begun.set()
            await goes_on.wait()
            return await read(file, buffer, offset)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HostFile, "pread_nowait", lambda *_: False)
            patch.setattr(HostFile, "pread", waiting)
            slow = kernel.send_read(fh, 0, 4096)
            with trio.fail_after(60):
                await begun.wait()
        kernel.interrupt(slow)
        assert await kernel.write(fh, len(BASE), b"meanwhile") == 9
        assert slow not in kernel.answers
        goes_on.set()
        assert await kernel.answer(slow) == BASE[:4096]
        assert slow | 1 not in kernel.answered
        assert served.libfuse.requests == []

    served.run(work)


def test_what_hangs_can_be_refused_and_is_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a mount: who waits gets EIO, and a request that ends after all is answered to nobody."""
    ends: list[str] = []

    async def work(kernel: Kernel, fh: int) -> None:
        begun, goes_on = trio.Event(), trio.Event()

        async def waiting(*_: object, **__: object) -> None:
            begun.set()
            await goes_on.wait()
            ends.append("written")

        monkeypatch.setattr(HostFile, "pwrite", waiting)
        slow = kernel.send_write(fh, len(BASE), bytes(4096))
        with trio.fail_after(60):
            await begun.wait()
        served.device.refuse_rest()
        with pytest.raises(OSError) as caught:
            await kernel.answer(slow)
        assert caught.value.errno == errno.EIO
        goes_on.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert ends == ["written"]

    served.run(work)


def test_other_requests_are_libfuses(served: Served) -> None:
    """In between, and whole; so is what nobody knows."""

    async def work(kernel: Kernel, fh: int) -> None:
        for opcode, body in ((GETATTR, bytes(16)), (999, b""), (999, bytes(100_000))):
            reading, other = kernel.send_read(fh, 0, 512), kernel.send(opcode, body)
            with pytest.raises(OSError) as caught:
                await kernel.answer(other)
            assert caught.value.errno == errno.ENOSYS
            assert await kernel.answer(reading) == BASE[:512]
            request = served.libfuse.requests.pop()
            assert IN_HEADER.unpack_from(request)[1:3] == (opcode, other)
            assert request[IN_HEADER.size :] == body

    served.run(work)


def test_a_request_that_is_cut_short_is_refused(served: Served) -> None:
    """Or says another length than it has, or asks for more than was agreed; what is no header is left alone."""

    def request(fh: int, size: int, data: bytes = b"") -> bytes:
        return bytes(IN_HEADER.size) + struct.pack("=QQII16x", fh, 0, size, 0) + data

    async def work(kernel: Kernel, fh: int) -> None:
        whole, setattr_ = request(fh, 512), SETATTR.pack(0, FATTR_TIMES, 7, 8)
        wrong = [
            *((FUSE_READ, whole[:length], None) for length in range(IN_HEADER.size, len(whole))),
            *((FUSE_WRITE, whole[:length], None) for length in range(IN_HEADER.size, len(whole))),
            *((FUSE_FSYNC, whole[:length], None) for length in range(IN_HEADER.size, IN_HEADER.size + 16)),
            *((FUSE_SETATTR, setattr_[:length], None) for length in range(IN_HEADER.size, len(setattr_))),
            *((opcode, whole, declared) for opcode in (FUSE_READ, GETATTR) for declared in (0, 79, 81, 2**32 - 1)),
            *((FUSE_READ, request(fh, size), None) for size in (MAX_WRITE + 1, 2**32 - 1)),
            *((FUSE_WRITE, request(fh, size, b"x" * 512), None) for size in (0, 511, 513, MAX_WRITE, 2**32 - 1)),
        ]
        for opcode, message, declared in wrong:
            assert await kernel.message(kernel.send_message(opcode, message, declared)) == (errno.EINVAL, b"")
        for opcode in (FUSE_READ, FUSE_WRITE, FUSE_FSYNC):
            data = b"x" * 512 if opcode == FUSE_WRITE else b""
            assert await kernel.message(kernel.send_message(opcode, request(fh + 1, 512, data))) == (errno.EBADF, b"")
        for length in range(1, IN_HEADER.size):
            kernel.send_message(FUSE_READ, bytes(length))
        answered = len(kernel.answered)
        assert await kernel.read(fh, 0, len(BASE[:MAX_WRITE])) == BASE[:MAX_WRITE]
        assert len(kernel.answered) == answered + 1
        assert served.libfuse.requests == []

    served.run(work)


ANSWERED_HERE = (FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FUSE_SETATTR, FUSE_FALLOCATE, FUSE_LSEEK)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_a_kernel_sends_ends_the_mount(served: Served, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostFile, "_reserve", lambda *_: None)  # it would fill the disk of the host
    rng = random.Random(seed)
    numbers = (0, 1, 511, 512, MAX_WRITE, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)

    def some(bits: int) -> int:
        return int(rng.choice(numbers) % 2**bits)

    async def work(kernel: Kernel, fh: int) -> None:
        for _ in range(300):
            opcode = rng.choice((*ANSWERED_HERE, FUSE_INTERRUPT, GETATTR, some(32)))
            handle = fh if rng.random() < 0.7 else some(64)
            fields = struct.pack("=QQIIQII", handle, some(64), some(32), some(32), some(64), some(32), some(32))
            message = bytes(IN_HEADER.size) + fields + bytes(rng.choice((0, 0, 48, 512, MAX_WRITE)))
            if rng.random() < 0.2:
                message = message[: rng.randrange(1, len(message))]
            number = kernel.send_message(opcode, message, some(32) if rng.random() < 0.1 else None)
            if len(message) >= IN_HEADER.size and opcode not in (FUSE_INIT, FUSE_INTERRUPT):
                await kernel.message(number)
        assert await kernel.write(fh, 4096, b"y" * 4096) == 4096
        assert await kernel.read(fh, 4096, 4096) == b"y" * 4096

    served.run(work)


def test_a_libfuse_that_refuses_init_ends_the_mount(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Libfuse, "init_error", errno.EPROTO)

    async def work(kernel: Kernel, fh: int) -> None:
        await served.device.ending.wait()
        assert not served.device.connected.is_set()

    served.run(work)
    assert "no common version of FUSE" in caplog.text


def test_a_time_of_change_alone_is_remembered_at_once(served: Served) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        def send(valid: int) -> int:
            return kernel.send(FUSE_SETATTR, SETATTR.pack(0, valid, 7, 8)[IN_HEADER.size :], served.inode)

        assert len(await kernel.answer(send(FATTR_TIMES | FATTR_FH))) > 0
        assert served.libfuse.requests == []
        with pytest.raises(OSError) as caught:
            await kernel.answer(send(FATTR_TIMES | 1))  # and the mode
        assert caught.value.errno == errno.ENOSYS
        assert len(served.libfuse.requests) == 1

    served.run(work)


def test_pages_are_forgotten_by_number(served: Served) -> None:
    async def work(kernel: Kernel, fh: int) -> None:
        await served.device.forget_pages(17)
        code, data = await kernel.message(0)
        assert -code == FUSE_NOTIFY_INVAL_INODE
        assert int.from_bytes(data[:8], "little") == 17

    served.run(work)
