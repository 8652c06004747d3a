"""A raw disk on an NBD server, read by a connection of our own: from real servers, and from one that says nonsense."""

from __future__ import annotations

import errno
import random
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.store import nbd_reader
from fvdfs.store.connecting import connect
from fvdfs.store.locations import Location
from fvdfs.store.nbd_client import ALIGNMENT, LARGEST, Export, negotiate
from fvdfs.store.nbd_reader import Ahead, NbdReader, _Pace, reads_ahead
from fvdfs.store.outage import OnLoss
from fvdfs.store.qemu_store import QemuStore
from support.mounts import MIB, running, wait_until
from support.qsd import opened
from support.servers import listens, listens_at

SIZE = 4 * MIB
HOLE = range(MIB, 2 * MIB)
REQUEST = struct.Struct(">IHHQQI")
READ, BLOCK_STATUS = 0, 7
NOTHING, DATA, ZEROS, STATUS, ERROR = 0, 1, 2, 5, 1 << 15 | 1
DONE = 1
ONE_PART = 1 << 2


def filled(file: Path) -> bytes:
    """A sparse file; what it holds."""
    data = bytearray(random.Random(5).randbytes(SIZE))
    data[HOLE.start : HOLE.stop] = bytes(len(HOLE))
    with file.open("wb") as out:
        out.truncate(SIZE)
        for start, stop in ((0, HOLE.start), (HOLE.stop, SIZE)):
            out.seek(start)
            out.write(data[start:stop])
    return bytes(data)


def qemu_nbd(file: Path, at: Path) -> list[str]:
    return ["qemu-nbd", "-t", "-r", "-e", "0", "-f", "raw", "-x", "disk", "-k", str(at), str(file)]


def storage_daemon(file: Path, at: Path) -> list[str]:
    return [
        *("qemu-storage-daemon", "--blockdev", f"driver=file,filename={file},node-name=disk,read-only=on"),
        *("--nbd-server", f"addr.type=unix,addr.path={at}", "--export", "type=nbd,id=e,node-name=disk,name=disk"),
    ]


def nbdkit(*words: str) -> Callable[[Path, Path], list[str]]:
    def command(file: Path, at: Path) -> list[str]:
        return ["nbdkit", "-f", "-r", "-U", str(at), *words[:1], "file", str(file), *words[1:]]

    return command


@asynccontextmanager
async def served(
    folder: Path, command: Callable[[Path, Path], list[str]], name: str = "disk"
) -> AsyncIterator[QemuStore]:
    """What such a server gives of `folder`/file."""
    at = folder / "socket"
    with running(*command(folder / "file", at), stderr=subprocess.DEVNULL):
        await trio.to_thread.run_sync(wait_until, lambda: listens(at))
        async with opened(folder, f"nbd+unix:///{name}?socket={at}", "raw", "nbd+unix:///") as store:
            yield store


async def read(store: QemuStore | NbdReader, start: int, length: int) -> bytes:
    data = bytearray(b"?" * length)
    with memoryview(data) as view:
        count = await store.pread(view, start)
    return bytes(data[:count])


async def holes(store: QemuStore) -> list[tuple[int, int]]:
    found, at = [], 0
    while at < SIZE:
        end, hole = await store.extent(at, SIZE)
        if hole:
            found.append((at, end))
        at = end
    return found


STRICT = (
    "--filter=blocksize-policy",
    "blocksize-minimum=4096",
    "blocksize-error-policy=error",
    "blocksize-maximum=64k",
)


@pytest.mark.parametrize("command", [qemu_nbd, storage_daemon, nbdkit("--threads=4"), nbdkit(*STRICT)])
async def test_a_real_server(folder: Path, command: Callable[[Path, Path], list[str]]) -> None:
    data = filled(folder / "file")
    async with served(folder, command) as store:
        assert store.pid == 0  # no daemon
        assert await store.size() == SIZE
        assert await read(store, 0, SIZE + 1) == data
        assert await holes(store) == [(HOLE.start, HOLE.stop)]
        assert await store.extent(HOLE.start + 7, SIZE - 7) == (HOLE.stop, True)
        assert await store.extent(7, 9) == (9, False)

        async def some(seed: int) -> None:
            at = random.Random(seed)
            for _ in range(20):
                start, length = at.randrange(SIZE), at.choice((1, 512, 4096, 65536, 300_000))
                assert await read(store, start, length) == data[start : start + length]

        async with trio.open_nursery() as nursery:
            for seed in range(16):
                nursery.start_soon(some, seed)


async def test_a_server_without_extents(folder: Path) -> None:
    data = filled(folder / "file")
    async with served(folder, nbdkit("--no-sr")) as store:
        assert store.pid == 0
        assert await read(store, 0, SIZE) == data
        assert await holes(store) == []


SAME = ("--filter=blocksize-policy", "blocksize-minimum=65536", "blocksize-preferred=65536", "blocksize-maximum=65536")


@pytest.mark.parametrize(("command", "name"), [(nbdkit("--oldstyle"), ""), (nbdkit(*SAME), "disk")])
async def test_an_odd_server_is_read_by_a_daemon(
    folder: Path, command: Callable[[Path, Path], list[str]], name: str
) -> None:
    data = filled(folder / "file")
    async with served(folder, command, name) as store:
        assert store.pid
        with trio.fail_after(60):
            assert await read(store, 0, SIZE) == data


async def test_a_server_that_ends_with_many_under_way(folder: Path) -> None:
    """All of them are answered by the next one."""
    data = filled(folder / "file")
    at = folder / "socket"
    found: dict[int, bytes] = {}
    hangs = nbdkit("--filter=delay", "delay-read=60")
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        with running(*hangs(folder / "file", at), stderr=subprocess.DEVNULL) as process:
            await trio.to_thread.run_sync(wait_until, lambda: listens(at))
            url = f"nbd+unix:///disk?socket={at}"
            store = await stack.enter_async_context(opened(folder, url, "raw", "nbd+unix:///", on_loss=OnLoss.WAIT))

            async def one(start: int) -> None:
                found[start] = await read(store, start, 65536)

            starts = range(0, SIZE, SIZE // 32)
            for start in starts:
                nursery.start_soon(one, start)
            await trio.testing.wait_all_tasks_blocked(0.1)
            at.unlink()
            process.kill()
        stack.enter_context(running(*nbdkit("--threads=4")(folder / "file", at), stderr=subprocess.DEVNULL))
        with trio.fail_after(60):
            while len(found) < len(starts):  # noqa: ASYNC110  nobody tells
                await trio.sleep(0.02)
    assert found == {start: data[start : start + 65536] for start in starts}


# --- what is read ahead -------------------------------------------------------------------------------


def connections(port: int) -> int:
    """That stand to a server on this host."""
    wanted = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().split("\n")[1:-1]
    return sum(line.split()[2:4] == [wanted, "01"] for line in lines)


@contextmanager
def gives(file: Path, port: int, clients: int = 0) -> Iterator[None]:
    """A server that lets in so many clients (0: any number)."""
    words = ["qemu-nbd", "-t", "-r", "-e", str(clients), "-f", "raw", "-x", "disk", "-b", "127.0.0.1", "-p", str(port)]
    with running(*words, file, stderr=subprocess.DEVNULL):
        wait_until(lambda: listens_at(port))
        yield


@pytest.mark.parametrize("clients", [0, 1])
async def test_what_is_read_ahead_goes_by_a_connection_of_its_own(
    folder: Path, free_port: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server takes one more. The first one to need it may be cancelled meanwhile."""
    data = filled(folder / "file")
    port = free_port
    url = f"nbd://127.0.0.1:{port}/disk"
    with gives(folder / "file", port, clients):
        async with opened(folder, url, "raw", "nbd://") as store:
            found: dict[int, bytes] = {}
            ahead = Ahead()

            reads_ahead.set(ahead)

            async def one(start: int) -> None:
                found[start] = await read(store, start, 100_000)

            async def cancelled(location: Location) -> socket.socket | None:
                scope.cancel()
                return await connect(location)

            with trio.CancelScope() as scope, monkeypatch.context() as patched:
                patched.setattr(nbd_reader, "connect", cancelled)
                await one(7)
            found.clear()
            async with trio.open_nursery() as nursery:
                for start in range(0, SIZE, 100_000):
                    nursery.start_soon(one, start)
            assert found == {start: data[start : start + 100_000] for start in found}
            assert len(found) == -(-SIZE // 100_000)
            assert connections(port) == (1 if clients else 2)
            assert (ahead.room > 0) == (clients == 0)
            reads_ahead.set(None)
            assert await read(store, 5, 1000) == data[5:1005]
            assert connections(port) == (1 if clients else 2)


async def test_a_server_that_ends_takes_both_connections_along(folder: Path, free_port: int) -> None:
    """What is read ahead, and what is not, comes from the next one."""
    data, port = filled(folder / "file"), free_port
    url = f"nbd://127.0.0.1:{port}/disk"
    async with AsyncExitStack() as stack:
        with gives(folder / "file", port):
            store = await stack.enter_async_context(opened(folder, url, "raw", "nbd://", on_loss=OnLoss.WAIT))
            reads_ahead.set(Ahead())
            assert await read(store, 0, 1000) == data[:1000]
            assert connections(port) == 2
        stack.enter_context(gives(folder / "file", port))
        with trio.fail_after(20):
            assert await read(store, 1000, 1000) == data[1000:2000]
            assert connections(port) == 2
            reads_ahead.set(None)
            assert await read(store, 2000, 1000) == data[2000:3000]


def test_how_much_is_on_the_way() -> None:
    """What the way holds, and what comes in a moment in which nobody receives; of the highest rate of late."""
    pace, now = _Pace(), 100.0
    least = pace.room(0.001)
    for _ in range(20):
        now += 0.05
        pace.came(now, 5_000_000)
    assert pace.room(0.0) == pytest.approx(100e6 * 0.0025, rel=0.1)
    assert pace.room(0.02) == pytest.approx(100e6 * (0.0025 + 0.02 * 1.5), rel=0.1)
    now += 60
    pace.came(now, 1 << 30)  # after a pause
    assert pace.room(0.0) == pytest.approx(100e6 * 0.0025, rel=0.1)
    for _ in range(600):
        now += 0.01
        pace.came(now, 20_000)
    assert pace.room(0.0) == least


# --- a server that is played here ---------------------------------------------------------------------


class Played:
    """The other end of a connection."""

    def __init__(self, stream: trio.SocketStream, other: socket.socket) -> None:
        self.stream = stream
        self.flags = 0
        self.other = other
        """The reader's end."""

    async def request(self) -> tuple[int, int, int, int]:
        """What is asked, under which number, from where on, and how much; its `flags`."""
        data = b""
        while len(data) < REQUEST.size:
            part = await self.stream.receive_some(REQUEST.size - len(data))
            assert part
            data += part
        _, self.flags, kind, number, offset, length = REQUEST.unpack(data)
        return kind, number, offset, length

    async def chunk(self, number: int, kind: int, payload: bytes = b"", flags: int = DONE) -> None:
        await self.stream.send_all(struct.pack(">IHHQI", 0x668E33EF, flags, kind, number, len(payload)) + payload)

    async def data(self, number: int, offset: int, data: bytes, flags: int = DONE) -> None:
        await self.chunk(number, DATA, struct.pack(">Q", offset) + data, flags)


@asynccontextmanager
async def played(*, has_chunks: bool = True, takes_one_part: bool = False) -> AsyncIterator[tuple[NbdReader, Played]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the kernel has
    reader = NbdReader("disk", ours, Export(SIZE, has_chunks, has_chunks, ALIGNMENT, LARGEST, takes_one_part))
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    try:
        yield reader, Played(stream, ours)
    finally:
        reader.stop()
        await stream.aclose()
        with trio.fail_after(60):
            while ours.fileno() >= 0:  # noqa: ASYNC110  the receiver closes it
                await trio.sleep(0.01)


GREETING = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)


def told(kind: int, text: bytes = b"") -> bytes:
    """A reply to an option."""
    return struct.pack(">QIII", 0x3E889045565A9, 0, kind, len(text)) + text


@asynccontextmanager
async def greeted(*, text: bytes, again: bytes = b"") -> AsyncIterator[trio.SocketStream]:
    """A connection to a server that says this, and that again and again, whatever it hears."""
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())

    async def say() -> None:
        with suppress(trio.BrokenResourceError):
            await theirs.send_all(text)
            while again:
                await theirs.send_all(again)

    async with trio.open_nursery() as nursery, theirs:
        nursery.start_soon(say)
        async with ours:
            yield ours
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("least", "most", "fits"),
    [
        *((1, LARGEST, True), (1, 2**32 - 1, True), (4096, 8192, True)),
        *((1 << 31, 2**32 - 1, False), (3000, LARGEST, False), (4096, 4096, False), (1, 0, False), (0, 0, False)),
    ],
)
async def test_only_sizes_of_requests_that_serve_are_taken(least: int, most: int, fits: bool) -> None:
    sizes = told(3, struct.pack(">HQH", 0, SIZE, 3)) + told(3, struct.pack(">HIII", 3, least, 4096, most))
    async with greeted(text=GREETING + told(0x8000_0001) + sizes + told(1)) as stream:
        assert (await negotiate(stream, "disk") is not None) == fits


async def test_a_server_that_tells_without_end_of_what_it_opens() -> None:
    async with greeted(text=GREETING, again=told(3, bytes(1000))) as stream:
        with pytest.raises(OSError, match="Protocol error"), trio.fail_after(60):
            await negotiate(stream, "disk")


def pattern(offset: int, length: int) -> bytes:
    return bytes((offset // ALIGNMENT + at // ALIGNMENT) % 251 for at in range(length))


async def test_answers_come_in_any_order_and_in_parts() -> None:
    starts = [0, 65536, 4096, 131072]
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def one(start: int) -> None:
            assert await read(reader, start, 4096) == pattern(start, 2048) + bytes(1024) + pattern(start, 4096)[3072:]

        for start in starts:
            nursery.start_soon(one, start)
        asked = [await server.request() for _ in starts]  # all of them, before one is answered
        assert {offset for _, _, offset, _ in asked} == set(starts)
        for _, number, start, _ in reversed(asked):
            await server.data(number, start + 3072, pattern(start, 4096)[3072:], flags=0)
        for _, number, start, _ in asked:
            await server.chunk(number, ZEROS, struct.pack(">QI", start + 2048, 1024), flags=0)
            await server.data(number, start, pattern(start, 2048), flags=0)
            await server.chunk(number, NOTHING)


async def test_errors_are_those_of_one_request() -> None:
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def fails(code: int, text: str) -> None:
            with pytest.raises(OSError, match=text) as caught:
                await read(reader, 0, 512)
            assert caught.value.errno == code

        for code, told, text in ((errno.EIO, b"bad sector", "bad sector"), (123456, b"", "Input/output error")):
            nursery.start_soon(fails, errno.EIO, text)
            _, number, _, _ = await server.request()
            await server.data(number, 0, bytes(512), flags=0)
            await server.chunk(number, ERROR, struct.pack(">IH", code, len(told)) + told)
        nursery.start_soon(read, reader, 512, 512)
        _, number, start, length = await server.request()
        await server.data(number, start, bytes(length))
    assert reader.last_words


async def test_simple_replies() -> None:
    async with played(has_chunks=False) as (reader, server), trio.open_nursery() as nursery:

        async def one() -> None:
            assert await read(reader, 512, 1024) == pattern(512, 1024)
            with pytest.raises(OSError, match="Input/output error"):
                await read(reader, 0, 512)

        nursery.start_soon(one)
        _, number, start, length = await server.request()
        await server.stream.send_all(struct.pack(">IIQ", 0x67446698, 0, number) + pattern(start, length))
        _, number, _, _ = await server.request()
        await server.stream.send_all(struct.pack(">IIQ", 0x67446698, errno.EIO, number))


async def test_who_is_cancelled_gets_nothing_any_more() -> None:
    """Its buffer may be another's by then; what follows the unwanted answer is understood."""
    data = bytearray(b"?" * 65536)
    async with played() as (reader, server), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def one() -> None:
            with scope:
                await reader.pread(memoryview(data), 0)

        nursery.start_soon(one)
        _, number, _, _ = await server.request()
        payload = struct.pack(">Q", 0) + b"x" * 65536
        head = struct.pack(">IHHQI", 0x668E33EF, DONE, DATA, number, len(payload))
        await server.stream.send_all(head + payload[:1000])
        with trio.fail_after(60):
            while not data.startswith(b"x"):  # noqa: ASYNC110  it is received meanwhile
                await trio.sleep(0.01)
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        before = bytes(data)
        nursery.start_soon(server.stream.send_all, payload[1000:])

        async def another() -> None:
            assert await read(reader, 512, 512) == b"y" * 512

        nursery.start_soon(another)
        _, number, start, _ = await server.request()
        await server.data(number, start, b"y" * 512)
    assert bytes(data) == before


async def test_nonsense_while_requests_wait_to_be_sent() -> None:
    """Whoever still waits to send his own is told as the others are."""
    lost = []
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def one() -> None:
            with pytest.raises(OSError) as caught:
                await read(reader, 0, 512)
            lost.append(caught.value.errno)

        for _ in range(100):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        await server.stream.send_all(b"?" * 20)
    assert lost == [errno.ECONNRESET] * 100


async def test_a_connection_that_takes_nothing_can_be_ended() -> None:
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def one() -> None:
            with pytest.raises(OSError) as caught:
                await read(reader, 0, 512)
            assert caught.value.errno == errno.ECONNRESET

        nursery.start_soon(one)
        await server.request()
        with pytest.raises(BlockingIOError):
            while True:
                server.other.send(bytes(28))
        reader.stop()
        with trio.fail_after(60):
            while server.other.fileno() >= 0:  # noqa: ASYNC110  the receiver closes it
                await trio.sleep(0.01)


async def test_a_server_that_sends_without_end_leaves_others_their_turn() -> None:
    turns = 0
    async with played() as (reader, server), trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def one() -> None:
                assert await read(reader, 0, 512) == bytes(512)
                scope.cancel()

            nursery.start_soon(one)
            _, number, _, _ = await server.request()
            parts = [struct.pack(">IHHQIQB", 0x668E33EF, 0, DATA, number, 9, at, 0) for at in range(512)]
            await server.stream.send_all(b"".join(parts) + struct.pack(">IHHQI", 0x668E33EF, DONE, NOTHING, number, 0))
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()
    assert turns > 40


async def wrong_magic(server: Played, number: int) -> None:
    await server.stream.send_all(b"?" * 20)


async def another_number(server: Played, number: int) -> None:
    await server.data(number + 1, 0, bytes(512))


async def too_much(server: Played, number: int) -> None:
    await server.data(number, 0, bytes(1024))


async def elsewhere(server: Played, number: int) -> None:
    await server.data(number, 512, bytes(512))


async def before(server: Played, number: int) -> None:
    await server.chunk(number, ZEROS, struct.pack(">QI", 0, 1 << 31))


async def twice(server: Played, number: int) -> None:
    for _ in range(2):
        await server.data(number, 0, bytes(512), flags=0)


async def repeated(server: Played, number: int) -> None:
    """As many bytes as were asked for; half of them are never told."""
    await server.data(number, 0, bytes(256), flags=0)
    await server.data(number, 0, bytes(256))


async def overlapping(server: Played, number: int) -> None:
    await server.data(number, 256, bytes(256), flags=0)
    await server.chunk(number, ZEROS, struct.pack(">QI", 128, 256))


async def too_little(server: Played, number: int) -> None:
    await server.data(number, 0, bytes(256))


async def nothing(server: Played, number: int) -> None:
    await server.chunk(number, NOTHING)


async def unknown_kind(server: Played, number: int) -> None:
    await server.chunk(number, 77, bytes(9))


async def endless_error(server: Played, number: int) -> None:
    await server.stream.send_all(struct.pack(">IHHQI", 0x668E33EF, DONE, ERROR, number, 1 << 31))


async def end_in_the_middle(server: Played, number: int) -> None:
    await server.stream.send_all(struct.pack(">IHHQI", 0x668E33EF, DONE, DATA, number, 520) + bytes(100))
    await server.stream.send_eof()


NONSENSE: Sequence[Callable[[Played, int], Awaitable[None]]] = [
    *(wrong_magic, another_number, too_much, elsewhere, before, twice, too_little, nothing, unknown_kind),
    *(repeated, overlapping),
    *(endless_error, end_in_the_middle),
]


@pytest.mark.parametrize("answer", NONSENSE)
async def test_nonsense_ends_the_connection(answer: Callable[[Played, int], Awaitable[None]]) -> None:
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def one() -> None:
            with pytest.raises(OSError) as caught:
                await read(reader, 0, 512)
            assert caught.value.errno == errno.ECONNRESET
            assert not reader.is_connected
            with pytest.raises(OSError, match=r"makes no sense|closed"):
                await read(reader, 0, 512)

        nursery.start_soon(one)
        _, number, _, _ = await server.request()
        with suppress(trio.BrokenResourceError), trio.fail_after(60):
            await answer(server, number)


async def test_extents_that_do_not_reach_the_question() -> None:
    async with played() as (reader, server), trio.open_nursery() as nursery:

        async def one() -> None:
            with pytest.raises(OSError, match="does not say what is at 600"):
                await reader.extent(600, SIZE)
            assert await reader.extent(600, SIZE) == (1024, True)
            assert await reader.extent(600, SIZE) == (1024, False)  # not stored, and not said to be zeros

        nursery.start_soon(one)
        for length, flags in ((88, 2), (512, 2), (512, 1)):
            kind, number, start, _ = await server.request()
            assert (kind, start) == (BLOCK_STATUS, 512)
            await server.chunk(number, STATUS, struct.pack(">III", 1, length, flags))


@pytest.mark.parametrize("takes", [True, False])
async def test_what_is_known_to_be_data_is_asked_for_in_one_part(takes: bool) -> None:
    """A server that looks for holes in each read does so in vain there; elsewhere zeros are not to travel."""
    async with played(takes_one_part=takes) as (reader, server), trio.open_nursery() as nursery:
        nursery.start_soon(reader.extent, 4096, SIZE)
        _, number, start, _ = await server.request()
        await server.chunk(number, STATUS, struct.pack(">III", 1, 8192, 0))
        nursery.start_soon(reader.extent, 65536, SIZE)
        _, number, start, _ = await server.request()
        await server.chunk(number, STATUS, struct.pack(">III", 1, 8192, 3))
        for start, length, known in ((4096, 8192, True), (4608, 100, True), (8192, 8192, False), (65536, 512, False)):
            nursery.start_soon(read, reader, start, length)
            _, number, first, size = await server.request()
            assert server.flags == (ONE_PART if known and takes else 0), start
            await server.data(number, first, bytes(size))


@pytest.mark.parametrize("flags", [0, 1 << 7, 1 << 8])
async def test_what_a_server_can(flags: int) -> None:
    grants = told(1) + told(4, struct.pack(">I", 1) + b"base:allocation") + told(1)
    async with greeted(text=GREETING + grants + told(3, struct.pack(">HQH", 0, SIZE, 1 | flags)) + told(1)) as stream:
        export = await negotiate(stream, "disk")
    assert export is not None
    assert export.has_extents
    assert (export.takes_one_part, export.takes_more) == (flags == 1 << 7, flags == 1 << 8)
