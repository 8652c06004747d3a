"""Calls in threads: results, errors, order, parallelism, cancellation, several event loops, the end."""

from __future__ import annotations

import errno
import functools
import threading
import time

import pytest
import trio

from fvdfs.store.base import Done, result_of
from fvdfs.store.worker import Worker


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


async def test_results_and_errors_come_back_to_who_asked() -> None:
    worker = Worker("results")
    found: dict[int, int] = {}

    async def ask(number: int) -> None:
        found[number] = await worker.run(lambda: number * 2)

    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(ask, number)
    assert found == {number: number * 2 for number in range(500)}
    with pytest.raises(ZeroDivisionError):
        await worker.run(lambda: 1 // 0)
    assert await worker.run(lambda: threading.current_thread().name) == "results"
    worker.close()


async def test_what_is_started_needs_no_task() -> None:
    """Its result, or the errno of its OSError, is told."""
    worker = Worker("started")

    def fail() -> int:
        raise OSError(errno.ENOSPC, "full")

    assert await result_of(functools.partial(worker.start, lambda: 5)) == 5
    with pytest.raises(OSError) as caught:
        await result_of(functools.partial(worker.start, fail))
    assert caught.value.errno == errno.ENOSPC
    worker.close()


async def test_a_result_may_be_there_at_once_or_not_come_from_here() -> None:
    def at_once(done: Done) -> bool:
        done(7)
        return True

    assert await result_of(at_once) == 7
    assert await result_of(lambda _: False) is None


async def test_one_thread_does_calls_in_order() -> None:
    worker = Worker("ordered")
    order: list[int] = []
    gate = threading.Event()

    async def ask(number: int) -> None:
        await worker.run(lambda: order.append(number))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run, gate.wait)
        await trio.sleep(0.05)
        for number in range(200):
            nursery.start_soon(ask, number)
            await trio.lowlevel.checkpoint()
        gate.set()
    assert order == sorted(order)
    assert threads("ordered") == 1
    worker.close()


async def test_slow_calls_are_done_side_by_side_up_to_the_limit() -> None:
    worker = Worker("parallel", threads=4, batch=1)
    barrier = threading.Barrier(4)
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(worker.run, lambda: barrier.wait(timeout=10))
    assert threads("parallel") == 4
    worker.close()


async def test_few_calls_need_few_threads() -> None:
    worker = Worker("few", threads=8)
    for _ in range(20):
        await worker.run(lambda: None)
        time.sleep(0.001)  # noqa: ASYNC251 - lets the thread become idle
    assert threads("few") <= 2
    worker.close()


async def test_a_call_that_has_begun_is_not_cancelled() -> None:
    worker = Worker("cancel")
    gate = threading.Event()
    done: list[str] = []

    def slow() -> None:
        gate.wait(10)
        done.append("done")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run, slow)
        await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
        gate.set()
    assert done == ["done"]
    with trio.move_on_after(0):
        await worker.run(lambda: done.append("not begun"))
    assert done == ["done"]
    worker.close()


def test_one_event_loop_after_the_other() -> None:
    worker = Worker("loops")
    for _ in range(3):
        assert trio.run(worker.run, lambda: 5) == 5
    worker.close()


def test_threads_end_with_the_worker() -> None:
    worker = Worker("ends", threads=4, batch=1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(worker.run, lambda: time.sleep(0.01))

    trio.run(main)
    assert threads("ends") > 1
    worker.close()
    deadline = time.monotonic() + 5
    while threads("ends"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_thread_that_cannot_be_started_fails_the_call_and_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("worker")

    def fails(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        told: list[int] = []
        assert worker.start(lambda: 0, told.append)
        assert told == [-errno.ENOMEM]
        with pytest.raises(OSError, match="start new thread"):
            await worker.run(lambda: 1)
    assert await worker.run(lambda: 2) == 2
    worker.close()
