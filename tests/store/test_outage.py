"""A server that goes away, as its store sees it: what comes back must be what was there."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fvdfs.errors import Unreachable
from fvdfs.store import outage, qemu_supervisor
from fvdfs.store.outage import Interrupt, Lost, OnLoss, Outage, asked_by
from fvdfs.store.qemu_store import QemuStore
from support.mounts import MIB, running, wait_until
from support.qsd import named, opened
from support.servers import listens

DATA = random.Random(1).randbytes(2 * MIB)


class Server:
    """nbdkit with a file, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "template"
        self.file.write_bytes(DATA)
        self._socket = folder / "nbd.sock"
        self.url = f"nbd+unix:///?socket={self._socket}"
        self._stack = contextlib.ExitStack()
        self.pid = 0

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-r", "-U", str(self._socket), "file", str(self.file)]
        self.pid = self._stack.enter_context(running(*command, stderr=subprocess.DEVNULL)).pid
        wait_until(lambda: listens(self._socket))

    def stop(self) -> None:
        self._stack.close()

    def write_qcow2(self) -> None:
        """The same content in this format."""
        raw = self.file.with_suffix(".raw")
        self.file.rename(raw)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, self.file], check=True)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.start()
    yield server
    server.stop()


async def read(store: QemuStore, offset: int = 0) -> bytes:
    data = bytearray(512)
    count = await store.pread(memoryview(data), offset)
    return bytes(data[:count])


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  a server tells nobody
            await trio.sleep(0.02)


def reason(store: QemuStore) -> str:
    return store.outage.reason if store.outage is not None else ""


async def test_a_read_waits_and_others_see_why(folder: Path, server: Server) -> None:
    async with opened(folder, server.url, "raw", "nbd+unix:///", on_loss=OnLoss.WAIT) as store:

        async def wait() -> None:
            assert await read(store, 512) == DATA[512:1024]

        server.stop()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await until(lambda: store.is_away)
            server.start()
        assert store.outage is not None
        assert store.outage.until is not None


@pytest.mark.parametrize("on_loss", [OnLoss.EIO, OnLoss.REFUSE, OnLoss(patience=0.5)])
async def test_the_limit(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_loss: OnLoss
) -> None:
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.5)
    async with opened(folder, server.url, "raw", "nbd+unix:///", on_loss=on_loss) as store:
        server.stop()
        began = trio.current_time()
        with pytest.raises(Lost, match="cannot be reached"):
            await read(store)
        assert trio.current_time() - began > 0.4
        with trio.fail_after(0.1):
            for _ in range(3):
                with pytest.raises(Lost):
                    await read(store)
        server.start()
        await until(lambda: not store.is_away)
        assert await read(store) == DATA[:512]
    assert [record.message.partition("its server ")[2][:7] for record in caplog.records] == ["is lost", "is back"]


def test_what_the_user_may_write() -> None:
    written = {text: OnLoss.of(text).patience for text in ("eio", "wait", "wait=60", "wait=60s", "wait=5m", "wait=2h")}
    assert [*written.values()] == [None, math.inf, 60, 60, 300, 7200]
    for text in ("", "wait=", "wait=0", "wait=-1s", "wait=1d", "wait=1.5s", "eio=5s", "wait=9999999", "WAIT"):
        with pytest.raises(ValueError, match="must be wait"):
            OnLoss.of(text)


async def test_one_that_does_not_answer(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, so it is waited for, and said."""
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.5)
    async with opened(folder, server.url, "raw", "nbd+unix:///") as store, trio.open_nursery() as nursery:
        os.kill(server.pid, signal.SIGSTOP)
        nursery.start_soon(read, store)
        await until(lambda: "has not answered" in reason(store))
        assert not store.is_away
        os.kill(server.pid, signal.SIGCONT)
        await until(lambda: store.outage is not None and store.outage.until is not None)


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
async def test_one_that_does_not_answer_for_long_counts_as_away(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, format_: str
) -> None:
    """Read by a connection of our own, and by a daemon."""
    if format_ == "qcow2":
        server.stop()
        server.write_qcow2()
        server.start()
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.5)
    monkeypatch.setattr(qemu_supervisor, "HANG_TIMEOUT", 1.0)
    async with opened(folder, server.url, format_, "nbd+unix:///", on_loss=OnLoss.WAIT) as store:
        async with trio.open_nursery() as nursery:
            os.kill(server.pid, signal.SIGSTOP)

            async def wait() -> None:
                assert await read(store) == DATA[:512]

            nursery.start_soon(wait)
            await until(lambda: store.is_away)
            assert "has not answered for 1 s" in reason(store)
            os.kill(server.pid, signal.SIGCONT)
        assert not store.is_away
    assert "has answered" not in caplog.text


@pytest.mark.parametrize("was_open", [True, False])
async def test_another_file_is_not_taken_for_it(folder: Path, server: Server, was_open: bool) -> None:
    if not was_open:
        server.stop()
    async with opened(folder, server.url, "raw", "nbd+unix:///", on_loss=OnLoss.WAIT) as store:
        assert store.is_away is not was_open
        store.expect(len(DATA) - 511)
        server.stop()
        server.file.write_bytes(DATA[:MIB])
        with trio.move_on_after(0.1):
            await read(store)
        server.start()
        await until(lambda: "is it another one?" in reason(store))
        with trio.move_on_after(0.1) as scope:
            await read(store)
        assert scope.cancelled_caught
        server.stop()
        server.file.write_bytes(DATA)
        server.start()
        with trio.fail_after(60):
            assert await read(store) == DATA[:512]


async def test_another_format_is_not_taken_for_it(folder: Path, server: Server) -> None:
    server.stop()
    image = folder / "image.qcow2"
    await trio.run_process(["qemu-img", "convert", "-O", "qcow2", server.file, image], capture_stdout=True)
    async with opened(folder, server.url, "qcow2", "nbd+unix:///", on_loss=OnLoss.WAIT) as store:
        server.start()
        await until(lambda: "qcow2" in reason(store))
        server.stop()
        os.rename(image, server.file)
        server.start()
        with trio.fail_after(60):
            assert await read(store) == DATA[:512]


async def test_nothing_is_opened_without_a_server_by_commands(folder: Path, server: Server) -> None:
    server.stop()
    store = named(folder, server.url, "raw", "nbd+unix:///")
    with pytest.raises(Unreachable, match="cannot be reached"):
        await store.start()
    await store.aclose()


async def test_an_error_of_the_server_itself_is_passed_on(folder: Path, server: Server) -> None:
    """The server has lost nothing, so nothing is started again."""
    server.stop()
    socket = folder / "nbd.sock"
    socket.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=error", "memory", "1M", "error-pread-rate=1"]
    with running(*command, stderr=subprocess.DEVNULL):
        wait_until(lambda: listens(socket))
        async with opened(folder, server.url, "raw", "nbd+unix:///", on_loss=OnLoss.WAIT) as store:
            pid = store.pid
            with pytest.raises(OSError, match="Input/output error"):
                await read(store)
            assert (store.outage, store.pid) == (None, pid)


async def test_an_error_that_makes_no_sense_is_one_of_the_server(folder: Path, server: Server) -> None:
    """QEMU passes on what libnfs says of a stale handle: a bad address in memory."""
    async with opened(folder, server.url, "raw", "nbd+unix:///") as store:

        async def fail(_: object) -> None:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

        with pytest.raises(OSError) as caught:
            await store._running.call(fail)
        assert caught.value.errno == errno.EIO


async def test_closed_while_it_is_away(folder: Path, server: Server) -> None:
    async with opened(folder, server.url, "raw", "nbd+unix:///", on_loss=OnLoss.WAIT) as store:
        server.stop()
        with trio.move_on_after(0.3):
            await read(store)
    with pytest.raises(OSError) as caught:
        await read(store)
    assert caught.value.errno == errno.EBADF


async def test_who_waits_is_let_go() -> None:
    waited = Outage("the cable is cut")
    ends: list[int | None] = []

    async def wait(interrupt: Interrupt | None) -> None:
        asked_by.set(interrupt)
        try:
            await waited.wait("base")
        except OSError as error:
            ends.append(error.errno)

    async with trio.open_nursery() as nursery:
        interrupt = Interrupt()
        nursery.start_soon(wait, interrupt)
        nursery.start_soon(wait, None)
        await trio.testing.wait_all_tasks_blocked()
        interrupt.interrupt()
        await trio.testing.wait_all_tasks_blocked()
        assert ends == [errno.EINTR]
        await wait(interrupt)
        waited.let_go()
        await trio.testing.wait_all_tasks_blocked()
        await wait(None)
    assert ends == [errno.EINTR, errno.EINTR, errno.EIO, errno.EIO]


async def test_a_thread_that_has_ended_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "LOOK_INTERVAL", 0.01)
    with running("sleep", "60") as process:
        asked_by.set(Interrupt(process.pid))
        waited = Outage("the cable is cut")
        with trio.move_on_after(0.1) as scope:
            await waited.wait("base")
        assert scope.cancelled_caught
        process.kill()
        process.wait()
        with pytest.raises(InterruptedError):
            await waited.wait("base")
    asked_by.set(None)
