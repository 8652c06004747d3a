"""The ring on real files; what it cannot do is left to threads."""

from __future__ import annotations

import errno
import functools
import os
import platform
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fvdfs.store import uring
from fvdfs.store.base import FlushError, result_of
from fvdfs.store.flushing import EXPECTED
from fvdfs.store.host import COLD, LARGE, HostFile, open_path

T = TypeVar("T")

CONTENT = os.urandom(1 << 20)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[HostFile]:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    store = open_path(str(path), writable=True)
    yield store
    store.close()


@pytest.fixture(autouse=True)
async def _available() -> None:
    try:
        uring.Ring().close()
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


class Told(list[T]):
    """What callbacks were told."""

    def __init__(self) -> None:
        super().__init__()
        self._more = trio.Event()

    def tell(self, what: T) -> None:
        self.append(what)
        self._more.set()
        self._more = trio.Event()

    async def wait(self, count: int) -> None:
        with trio.fail_after(60):
            while len(self) < count:
                await self._more.wait()


def drop_from_cache(file: HostFile) -> None:
    os.fsync(file._fd)
    os.posix_fadvise(file._fd, 0, 0, os.POSIX_FADV_DONTNEED)


async def test_calls_of_many_tasks_go_where_they_belong(file: HostFile) -> None:
    """So many that both rings go round several times."""
    fd = file._fd

    async def write_and_read(ring: uring.Ring, number: int) -> None:
        data = bytearray(number.to_bytes(4, "big") * 128)
        offset = number * 512
        assert await ring.do((uring.WRITE, fd, memoryview(data), offset)) == [512]
        back = bytearray(512)
        assert await ring.do((uring.READ, fd, memoryview(back), offset)) == [512]
        assert back == data

    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        for start in range(0, 2000, 100):
            async with trio.open_nursery() as nursery:
                for number in range(start, start + 100):
                    nursery.start_soon(write_and_read, ring, number)
    assert uring.ring() is None


async def test_linked_calls_are_done_in_order_and_end_with_the_first_that_fails(file: HostFile) -> None:
    fd = file._fd
    flush = (uring.FSYNC, fd, None, 0)
    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        data = memoryview(bytearray(b"new" * 100))
        assert await ring.do(flush, (uring.WRITE, fd, data, 0), flush) == [0, 300, 0]
        assert os.pread(fd, 300, 0) == data
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            results = await ring.do(flush, (uring.WRITE, read_only, data, 1000), flush)
        finally:
            os.close(read_only)
        assert results == [0, -errno.EBADF, -errno.ECANCELED]
        past_the_end = memoryview(bytearray(512))
        results = await ring.do((uring.READ, fd, past_the_end, len(CONTENT) - 100), flush)
        assert results == [100, -errno.ECANCELED]


async def test_what_has_begun_is_waited_for_though_cancelled(file: HostFile) -> None:
    read, write = os.pipe()
    buffer = bytearray(1)
    async with uring.use_ring(), trio.open_nursery() as nursery:
        ring = uring.ring()
        assert ring is not None

        async def read_pipe() -> None:
            assert await ring.do((uring.READ, read, memoryview(buffer), 0)) == [1]

        nursery.start_soon(read_pipe)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(0.01)
            assert nursery.child_tasks
            os.write(write, b"x")
    assert buffer == b"x"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("where", ["done", "then", "outside"])
async def test_a_mistake_ends_all_but_what_waits_for_calls(file: HostFile, where: str) -> None:
    """Who saves data meanwhile is not to wait for ever."""

    def fail(*_: object) -> None:
        raise RuntimeError(where)

    saved = []
    told = Told[int]()
    with trio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery, uring.use_ring():
            try:
                for tell in (told.tell, fail if where == "done" else told.tell, told.tell):
                    assert file.start_flush(tell)
                with uring.followed_by(fail if where == "then" else lambda: None):
                    if where == "outside":
                        nursery.start_soon(_mistake)
                    await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await file.flush()
                    await file.append_stable(b"record", 4096, flush_first=True)
                saved.append(True)
    assert saved
    assert told == [0] * (2 if where == "done" else 3)
    assert caught.group_contains(RuntimeError, match=where)


async def _mistake() -> None:
    raise RuntimeError("outside")


class Entries:
    """How often the kernel is entered for a ring, and with how many calls; refused as often as `refuse` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[int] = []
        self.refuse = 0
        self.error = errno.EAGAIN
        self.in_part = False
        """Whether the next time the first call alone is taken."""
        self._real = uring._system_call
        monkeypatch.setattr(uring, "_system_call", self._call)

    def _call(self, number: int, *arguments: int) -> int:
        if number == uring._ENTER:
            if self.refuse:
                self.refuse -= 1
                raise OSError(self.error, os.strerror(self.error))
            self.calls.append(arguments[1])
            if self.in_part:
                self.in_part, self.refuse = False, 1
                return self._real(number, arguments[0], 1, *arguments[2:])
        return self._real(number, *arguments)


async def test_gathered_calls_are_handed_over_together(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = Entries(monkeypatch)
    told = Told[int]()
    buffers = [bytearray(512) for _ in range(uring.GATHERED + 2)]
    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        with ring.gathered():
            for number, buffer in enumerate(buffers):
                assert file.start_pread(memoryview(buffer), number * 512, told.tell)
            assert entries.calls == [uring.GATHERED]
        assert entries.calls == [uring.GATHERED, 2]
        await told.wait(len(buffers))
        assert file.start_pread(memoryview(buffers[0]), 512, told.tell)
        assert entries.calls[2:] == [1], "at once again"
        await told.wait(len(buffers) + 1)
    assert told == [512] * (len(buffers) + 1)
    assert b"".join(buffers[1:]) == CONTENT[512 : len(buffers) * 512]
    assert buffers[0] == CONTENT[512:1024]


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EINVAL])
async def test_what_the_kernel_does_not_take_is_done_by_threads(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Whatever its reason is."""
    entries = Entries(monkeypatch)
    entries.error = error
    told = Told[int]()
    buffer, data = bytearray(512), bytearray(b"w" * 512)
    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        entries.refuse = 1
        with ring.gathered():
            assert file.start_pread(memoryview(buffer), 0, told.tell)
            assert file.start_pwrite(memoryview(data), 0, told.tell)
        assert told == [], "only later"
        await told.wait(2)
        assert told == [512, 512]
        assert os.pread(file._fd, 512, 0) == data
        assert buffer in (data, CONTENT[:512])
        entries.refuse = 1
        assert await file.pread(memoryview(buffer), 1024) == 512
        assert buffer == CONTENT[1024:1536]
        entries.refuse = 1
        await file.flush()
        entries.refuse = 1
        await file.append_stable(data, 2048, flush_first=True)
        assert os.pread(file._fd, 512, 2048) == data
        assert file.start_pread(memoryview(buffer), 4096, told.tell)
        await told.wait(3)
        assert told[2] == 512
        assert buffer == CONTENT[4096:4608], "the ring is in order"


async def test_a_link_of_which_the_kernel_takes_a_part_ends_in_order(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take is known at once; the call that it has taken goes on, and uses its buffer."""
    entries = Entries(monkeypatch)
    read, write = os.pipe()
    buffer = bytearray(1)
    first, ended = Told[int](), Told[list[int]]()
    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        entries.in_part = True
        calls = ((uring.READ, read, memoryview(buffer), 0), (uring.FSYNC, file._fd, None, 0))
        ring.begin(calls, ended.tell, first.tell)
        await trio.sleep(0.01)
        assert entries.refuse == 0
        assert first == []
        os.write(write, b"x")
        await ended.wait(1)
    assert first == [1]
    assert ended == [[1, -errno.ECANCELED]]
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("flush_first", [False, True])
async def test_a_journal_record_of_which_the_kernel_takes_a_part_is_completed_by_threads(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, flush_first: bool
) -> None:
    entries = Entries(monkeypatch)
    async with uring.use_ring():
        entries.in_part = True
        await file.append_stable(b"record", 4096, flush_first=flush_first)
        assert entries.calls[:1] == [3 if flush_first else 2], "one chain"
        assert entries.calls[1:] == [1], "then a flush of its own"
    assert os.pread(file._fd, 6, 4096) == b"record"


Done = Callable[[list[int]], None]
FirstDone = Callable[[int], None] | None


def change_begin(
    patch: pytest.MonkeyPatch, change: Callable[[Sequence[uring.Call], Done, FirstDone], tuple[Done, FirstDone]]
) -> None:
    """From now on, what `Ring.begin` tells the results to is what `change` makes of it."""
    begin = uring.Ring.begin

    def changed(ring: uring.Ring, calls: Sequence[uring.Call], done: Done, first_done: FirstDone = None) -> None:
        begin(ring, calls, *change(calls, done, first_done))

    patch.setattr(uring.Ring, "begin", changed)


@pytest.mark.parametrize("done", [0, 100, -errno.EAGAIN])
async def test_what_the_kernel_does_in_part_is_completed_by_threads(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    """Half of it may be there; nobody is told of less than the whole."""

    def shorten(_: Sequence[uring.Call], tell: Done, __: FirstDone) -> tuple[Done, FirstDone]:
        return lambda results: tell([done, *results[1:]]), None

    buffer, data = memoryview(bytearray(512)), memoryview(bytearray(b"w" * 512))
    async with uring.use_ring():
        change_begin(monkeypatch, shorten)
        assert await result_of(functools.partial(file.start_pread, buffer, 1024)) == 512
        assert buffer == CONTENT[1024:1536]
        assert await result_of(functools.partial(file.start_pwrite, data, 1024)) == 512
        assert os.pread(file._fd, 1024, 1024) == bytes(data) + CONTENT[1536:2048]
        end = memoryview(bytearray(512))
        assert await result_of(functools.partial(file.start_pread, end, len(CONTENT) - 100)) == 100
        assert end[:100] == CONTENT[-100:]


@pytest.mark.parametrize(
    ("at", "result"), [(0, -errno.ECANCELED), (0, -errno.EINTR), (1, -errno.EINTR), (1, 2), (2, -errno.EINTR)]
)
async def test_a_journal_record_that_is_done_in_part_is_completed_by_threads(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, at: int, result: int
) -> None:
    """Or that was interrupted: no failure of the disk."""
    chains: list[list[int]] = []

    def end(calls: Sequence[uring.Call], tell: Done, first: FirstDone) -> tuple[Done, FirstDone]:
        chains.append([call[0] for call in calls])
        if len(calls) == 1:
            return tell, first

        def ended(results: list[int]) -> None:
            os.pwrite(file._fd, bytes(6), 4096)
            tell([*results[:at], result, -errno.ECANCELED, -errno.ECANCELED][:3])

        return ended, first

    async with uring.use_ring():
        change_begin(monkeypatch, end)
        await file.append_stable(b"record", 4096, flush_first=True)
    flushes = [[uring.FSYNC]] * (1 if at else 2)
    assert chains == [[uring.FSYNC, uring.WRITE, uring.FSYNC], *flushes]
    assert os.pread(file._fd, 6, 4096) == b"record"


class Flushes:
    """The flushes that a ring begins, which fail with the errors given, if any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self.errors: list[int] = []
        change_begin(monkeypatch, self._count)

    def _count(self, calls: Sequence[uring.Call], done: Done, first_done: FirstDone) -> tuple[Done, FirstDone]:
        at = [number for number, call in enumerate(calls) if call[0] == uring.FSYNC]
        self.begun += len(at)
        error = self.errors.pop() if at and self.errors else 0

        def ended(results: list[int]) -> None:
            for number in at if error else ():
                results[number] = -error
            done(results)

        return ended, first_done


async def write_started(file: HostFile, offset: int = 0) -> None:
    data = memoryview(bytearray(b"w" * 512))
    assert await result_of(functools.partial(file.start_pwrite, data, offset)) == 512


async def write_and_flush(file: HostFile, times: int) -> None:
    for _ in range(times):
        await write_started(file)
        await file.flush()


async def test_a_flush_that_is_expected_begins_at_the_write(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    async with uring.use_ring():
        await write_started(file)
        await write_and_flush(file, 1)
        await write_and_flush(file, EXPECTED)
        assert flushes.begun == 1 + EXPECTED
        await write_started(file)
        assert flushes.begun == 2 + EXPECTED, "ahead"
        await file.flush()
        assert flushes.begun == 2 + EXPECTED, "and not once more"
        await write_started(file)
        await file.append_stable(b"record", 4096, flush_first=True)
        assert flushes.begun == 4 + EXPECTED, "ahead, and after the record"


@pytest.mark.parametrize("change", ["write_started", "pwrite", "zero", "resize"])
async def test_a_flush_ahead_does_not_cover_what_came_later(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    flushes = Flushes(monkeypatch)
    changes = {
        "write_started": lambda: write_started(file, 512),
        "pwrite": lambda: file.pwrite(b"new", 512),
        "zero": lambda: file.zero(0, 4096),
        "resize": lambda: file.resize(len(CONTENT) + 1),
    }
    async with uring.use_ring():
        await write_and_flush(file, EXPECTED)
        await write_started(file)
        begun = flushes.begun
        await changes[change]()
        await file.flush()
        assert flushes.begun == begun + 1
        await write_started(file)
        assert flushes.begun == begun + 1, "a flush after every write is not what happens any more"


async def test_a_flush_that_could_not_begin_ahead_begins_when_asked_for(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(monkeypatch)
    async with uring.use_ring():
        await write_and_flush(file, EXPECTED)
        flushes.errors = [errno.ECANCELED]
        await write_started(file)
        begun = flushes.begun
        await file.flush()
        assert flushes.begun == begun + 1


@pytest.mark.parametrize("later", [False, True])
async def test_a_flush_that_failed_ahead_is_told_of(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """The kernel tells of an error once: flushes that are asked for afterwards would find all well."""
    flushes = Flushes(monkeypatch)
    told = Told[int]()
    async with uring.use_ring():
        await write_and_flush(file, EXPECTED)
        flushes.errors = [errno.EIO]
        await write_started(file)
        assert flushes.errors == []
        if later:
            await write_started(file)
            await trio.sleep(0.05)
        begun = flushes.begun
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                await file.flush()
            assert caught.value.errno == errno.EIO
            assert file.start_flush(told.tell)
        assert told == [-errno.EIO] * 2
        with pytest.raises(FlushError):
            await file.append_stable(b"record", 4096, flush_first=False)
        assert flushes.begun == begun


class HeldFlushes(Flushes):
    """The ring's flushes are told of when `release` says so; of a write with a flush, the write at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.held = Told[Callable[[], None]]()
        change_begin(monkeypatch, self._hold)

    def _hold(self, calls: Sequence[uring.Call], done: Done, first_done: FirstDone) -> tuple[Done, FirstDone]:
        if calls[-1][0] != uring.FSYNC:
            return done, first_done
        return lambda results: self.held.tell(lambda: done(results)), first_done

    async def release(self) -> None:
        """Tell of the calls that have ended: there is one flush at a time."""
        await self.held.wait(1)
        (tell,) = self.held
        self.held.clear()
        tell()


@asynccontextmanager
async def flush_expected(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HeldFlushes]:
    """A ring, and so many flushes after a single write that one begins with the next."""
    flushes = HeldFlushes(monkeypatch)
    told = Told[int]()
    async with uring.use_ring():
        for number in range(1 + EXPECTED):
            await write_started(file)
            assert file.start_flush(told.tell)
            await flushes.release()
            assert told == [0] * (number + 1)
        yield flushes


async def test_flushes_are_done_one_after_the_other(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while one is under way shares the next: that one may have begun before the last write."""
    flushes = HeldFlushes(monkeypatch)
    told = Told[str]()
    async with uring.use_ring():
        for who in ("first", "second", "third"):
            assert file.start_flush(functools.partial(lambda who, result: told.tell(f"{who} {result}"), who))
        assert flushes.begun == 1
        await flushes.release()
        assert told == ["first 0"]
        assert flushes.begun == 2
        await flushes.release()
        assert told == ["first 0", "second 0", "third 0"]
        assert flushes.begun == 2


async def test_the_failure_of_a_flush_is_told_to_all_who_wait(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would not tell it again."""
    flushes = HeldFlushes(monkeypatch)
    told = Told[int]()
    async with uring.use_ring():
        flushes.errors = [errno.ENOSPC]
        for _ in range(3):
            assert file.start_flush(told.tell)
        await flushes.release()
        assert told == [-errno.ENOSPC] * 3
        assert flushes.begun == 1


async def test_a_journal_record_and_a_flush_wait_for_each_other(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = HeldFlushes(monkeypatch)
    told = Told[int]()
    async with uring.use_ring(), trio.open_nursery() as nursery:
        assert file.start_flush(told.tell)

        async def append() -> None:
            await file.append_stable(b"record", 4096, flush_first=True)
            told.tell(1)

        nursery.start_soon(append)
        await wait_all_tasks_blocked()
        assert flushes.begun == 1
        await flushes.release()
        await flushes.held.wait(1)
        assert flushes.begun == 3, "before the record, and after it"
        assert file.start_flush(told.tell)
        assert flushes.begun == 3
        await flushes.release()
        await flushes.release()
        await told.wait(3)
        assert sorted(told) == [0, 0, 1]
        assert flushes.begun == 4


async def test_who_is_told_of_a_flush_may_ask_for_the_next(file: HostFile) -> None:
    told = Told[int]()

    def again(result: int) -> None:
        told.tell(result)
        if len(told) < 3:
            assert file.start_flush(again)

    async with uring.use_ring():
        await write_and_flush(file, EXPECTED)
        await write_started(file)
        assert file.start_flush(again)
        await told.wait(3)
        assert told == [0, 0, 0]


async def test_a_flush_ahead_is_shared_where_it_covers_all(file: HostFile, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told[int]()
    async with flush_expected(file, monkeypatch) as flushes:
        begun = flushes.begun
        await write_started(file)
        assert file.start_flush(told.tell)
        await trio.sleep(0.01)
        assert told == [], "not before it is"
        await flushes.release()
        assert told == [0]
        await write_started(file)
        await flushes.release()
        assert file.start_flush(told.tell)
        assert told == [0, 0], "it has ended already"
        assert flushes.begun == begun + 2
        await write_started(file)
        assert file.start_flush(told.tell)
        await write_started(file, 512)
        assert file.start_flush(told.tell)
        await flushes.release()
        assert told == [0, 0, 0], "the second write came later"
        await flushes.release()
        assert told == [0, 0, 0, 0]
        assert flushes.begun == begun + 4


async def test_a_flush_ahead_does_not_cover_what_ended_while_its_own_write_was_under_way(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush may have begun before that. It was asked for once already, which does not change this."""
    told = Told[int]()
    async with flush_expected(file, monkeypatch) as flushes:
        begun = flushes.begun
        data = memoryview(bytearray(512))
        ring = uring.ring()
        assert ring is not None
        with monkeypatch.context() as patch:
            patch.setattr(ring, "reap_now", lambda: None)
            assert file.start_pwrite(data, 0, told.tell)
            await file.pwrite(b"later", 4096)
            assert file.start_flush(told.tell)
            assert told == []
        await told.wait(1)
        assert file.start_flush(told.tell)
        await flushes.release()
        assert told == [512]
        await flushes.release()
        assert told == [512, 0, 0]
        assert flushes.begun == begun + 2


async def test_no_flush_begins_ahead_while_another_is_under_way(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told[int]()
    async with flush_expected(file, monkeypatch) as flushes:
        await write_started(file)
        await flushes.release()
        await write_started(file, 512)
        assert file.start_flush(told.tell)
        begun = flushes.begun
        await write_started(file)
        assert flushes.begun == begun
        await flushes.release()
        assert told == [0]


async def test_a_flush_ahead_need_not_cover_what_ended_before_its_own_write(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have begun in between."""
    told = Told[int]()
    held = Told[Callable[[], None]]()
    flushes = Flushes(monkeypatch)
    async with uring.use_ring():
        await write_and_flush(file, EXPECTED)

        def hold(calls: Sequence[uring.Call], done: Done, first_done: FirstDone) -> tuple[Done, FirstDone]:
            def tell(results: list[int]) -> None:
                assert first_done is not None
                first_done(results[0])
                done(results)

            return lambda results: held.tell(lambda: tell(results)), None

        with monkeypatch.context() as patch:
            change_begin(patch, hold)
            assert file.start_pwrite(memoryview(bytearray(512)), 0, told.tell)
            await held.wait(1)
        await file.pwrite(b"new", 512)
        held.pop()()
        assert told == [512]
        begun = flushes.begun
        await file.flush()
        assert flushes.begun == begun + 1


@pytest.mark.parametrize("error", [errno.EIO, errno.ECANCELED])
async def test_a_flush_ahead_that_fails_while_it_is_waited_for(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    told = Told[int]()
    async with flush_expected(file, monkeypatch) as flushes:
        flushes.errors = [error]
        await write_started(file)
        begun = flushes.begun
        assert file.start_flush(told.tell)
        assert file.start_flush(told.tell)
        await flushes.release()
        if error == errno.ECANCELED:
            assert told == []
            await flushes.release()
            assert told == [0, 0]
            assert flushes.begun == begun + 1, "it had not begun"
        else:
            assert told == [-error, -error]
            assert flushes.begun == begun


async def test_a_full_ring_is_not_used() -> None:
    read, write = os.pipe()
    ended = Told[list[int]]()
    async with uring.use_ring():
        buffers = [bytearray(1) for _ in range(uring.CALLS)]
        begun = 0
        while (ring := uring.ring()) is not None:
            ring.begin(((uring.READ, read, memoryview(buffers[begun]), 0),), ended.tell)
            begun += 1
        assert begun >= uring.CALLS // uring.LONGEST
        os.write(write, bytes(begun))
        await ended.wait(begun)
        assert uring.ring() is not None
    assert ended == [[1]] * begun
    os.close(read)
    os.close(write)


async def test_reads_and_writes_of_a_file_without_a_task(file: HostFile) -> None:
    told = Told[int]()
    async with uring.use_ring():
        buffer, short, data = bytearray(4096), bytearray(4096), bytearray(b"w" * 4096)
        drop_from_cache(file)
        assert file.start_pread(memoryview(buffer), 8192, told.tell)
        assert file.start_pwrite(memoryview(data), 65536, told.tell)
        assert told == [], "only later"
        await told.wait(2)
        assert told == [4096, 4096]
        assert buffer == CONTENT[8192:12288]
        assert os.pread(file._fd, 4096, 65536) == data
        assert file.start_pread(memoryview(short), len(CONTENT) - 1, told.tell)
        await told.wait(3)
        assert told[2] == 1, "the file ends before"
        large = bytearray(LARGE + 1)
        assert file.start_pread(memoryview(large), 0, told.tell)
        await told.wait(4)
        assert told[3] == len(large)
        assert large[:65536] == CONTENT[:65536]
        assert large[-65536:] == CONTENT[LARGE + 1 - 65536 : LARGE + 1]
        assert not file.start_pwrite(memoryview(large), 0, told.tell)
    assert not file.start_pread(memoryview(buffer), 0, told.tell)


async def test_reads_in_and_past_a_file(file: HostFile) -> None:
    async with uring.use_ring():
        for offset, length in ((0, 100), (4000, 10000), (len(CONTENT) - 10, 100), (len(CONTENT) + 5, 7), (0, 1 << 20)):
            buffer = bytearray(length)
            expected = CONTENT[offset : offset + length]
            assert await file.pread(memoryview(buffer), offset) == len(expected)
            assert buffer[: len(expected)] == expected


async def test_a_cold_file_is_tried_less_often_while_much_is_under_way(
    file: HostFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a warm one again."""
    buffer = memoryview(bytearray(4096))
    read, write = os.pipe()
    cold = True
    preadv = os.preadv

    def preadv_of_a_slow_disk(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        if cold and flags & os.RWF_NOWAIT:
            raise BlockingIOError
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", preadv_of_a_slow_disk)
    async with uring.use_ring():
        ring = uring.ring()
        assert ring is not None
        for _ in range(COLD):
            assert not file.pread_nowait(buffer, 0)
        cold = False
        assert file.pread_nowait(buffer, 0), "nothing else is under way"
        cold = True
        for _ in range(COLD):
            assert not file.pread_nowait(buffer, 0)
        cold = False
        waiting = [bytearray(1) for _ in range(uring.BUSY)]
        for each in waiting:
            ring.begin(((uring.READ, read, memoryview(each), 0),), lambda results: None)
        tries = [file.pread_nowait(buffer, 0) for _ in range(10 * COLD)]
        assert not tries[0]
        assert all(tries[-COLD:])
        os.write(write, bytes(len(waiting)))
        await trio.sleep(0.05)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("with_ring", [True, False])
async def test_a_journal_record_between_flushes(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, with_ring: bool
) -> None:
    if not with_ring:
        await file.append_stable(b"record", 4096, flush_first=True)
        assert os.pread(file._fd, 6, 4096) == b"record"
        return
    chains: list[list[int]] = []

    def note(calls: Sequence[uring.Call], done: Done, first_done: FirstDone) -> tuple[Done, FirstDone]:
        chains.append([call[0] for call in calls])
        return done, first_done

    async with uring.use_ring():
        change_begin(monkeypatch, note)
        await file.append_stable(b"record", 4096, flush_first=False)
        await file.append_stable(b"second", 4102, flush_first=True)
        assert os.pread(file._fd, 12, 4096) == b"recordsecond"
    assert chains == [[uring.WRITE, uring.FSYNC], [uring.FSYNC, uring.WRITE, uring.FSYNC]]


@pytest.mark.parametrize("with_ring", [True, False])
async def test_which_step_of_a_journal_record_failed(tmp_path: Path, with_ring: bool) -> None:
    read, write = os.pipe()  # cannot be flushed
    (tmp_path / "file").touch()
    read_only = open_path(str(tmp_path / "file"), writable=False)
    pipe = HostFile(write, "pipe", writable=True)

    async def fail() -> None:
        with pytest.raises(FlushError):
            await pipe.append_stable(b"record", 0, flush_first=True)
        with pytest.raises(OSError) as caught:
            await read_only.append_stable(b"record", 0, flush_first=True)
        assert not isinstance(caught.value, FlushError)
        assert caught.value.errno == errno.EBADF

    if with_ring:
        async with uring.use_ring():
            await fail()
    else:
        await fail()
    pipe.close()
    read_only.close()
    os.close(read)


async def test_no_ring_where_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, *arguments: int) -> int:
        raise OSError(errno.EPERM, "forbidden")

    monkeypatch.setattr(uring, "_system_call", refuse)
    async with uring.use_ring() as there:
        assert not there
        assert uring.ring() is None


@pytest.mark.parametrize(
    ("machine", "suits"), [("aarch64", False), ("riscv64", False), ("ppc64le", False), ("", False), ("i686", True)]
)
async def test_the_ring_is_for_processors_that_keep_the_order(
    file: HostFile, monkeypatch: pytest.MonkeyPatch, machine: str, suits: bool
) -> None:
    """Elsewhere threads do the work."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    buffer = bytearray(512)
    async with uring.use_ring() as there:
        assert there == suits
        assert (uring.ring() is not None) == suits
        await file.pwrite(b"new", 4096)
        await file.append_stable(b"record", 8192, flush_first=True)
        assert await file.pread(memoryview(buffer), 4096) == len(buffer)
    assert buffer == b"new" + CONTENT[4099 : 4096 + 512]
    assert os.pread(file._fd, 6, 8192) == b"record"
