"""Threads for calls that may block but are mostly short, such as a write to the page cache.

`trio.to_thread` costs more than such a call: each one wakes a thread, and then the event loop. A `Worker`
has threads of its own, which take all that is queued when they wake, and hand back the results
together. So when many calls are under way, as with a queue depth of 16, one wake-up serves many.

A thread does the calls that it has taken one after the other; a worker for calls that wait for a disk has
several threads, each of which takes few at a time. A thread is started when more calls are queued
than idle threads can take, up to the limit, and ends with the worker.
"""

from __future__ import annotations

import errno
import functools
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import outcome
import trio

from fvdfs.store.base import Done, uncancellable

T = TypeVar("T")

_Tell = Callable[["outcome.Outcome[Any]"], None]
_Call = tuple[Callable[[], Any], _Tell, trio.lowlevel.TrioToken]


class Worker:
    """Does calls in threads, for whichever event loop asks."""

    def __init__(self, name: str, *, threads: int = 1, batch: int = 64) -> None:
        """`threads`: at the most; `batch`: calls that one of them takes at a time, at the most."""
        self._name = name
        self._limit = threads
        self._batch = batch
        self._threads = 0
        self._idle = 0
        self._lock = threading.Lock()  # for the number of idle threads
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()

    async def run(self, call: Callable[[], T]) -> T:
        """What the call returns, or raises. Once it has begun it cannot be cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._queue_call(call, functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        return cast(T, await trio.lowlevel.wait_task_rescheduled(uncancellable))

    def start(self, call: Callable[[], int], done: Done) -> bool:
        """Do the call without a task, and tell `done`, later, what it returns, or the errno of its OSError."""
        try:
            self._queue_call(call, lambda ended: done(_result(ended)))
        except OSError as error:
            done(-(error.errno or errno.EIO))
        return True

    def _queue_call(self, call: Callable[[], Any], tell: _Tell) -> None:
        if self._queue.qsize() >= self._idle and self._threads < self._limit:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError as error:  # the host has no room for one more
                if not self._threads:
                    raise OSError(errno.ENOMEM, f"{self._name}: {error}") from error
            else:
                self._threads += 1
        self._queue.put((call, tell, trio.lowlevel.current_trio_token()))

    def close(self) -> None:
        """End the threads; no call may be under way."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _work(self) -> None:
        get, empty = self._queue.get, self._queue.empty
        while True:
            with self._lock:
                self._idle += 1
            call = get()
            with self._lock:
                self._idle -= 1
            if call is None:
                return
            batch = [call]
            while len(batch) < self._batch and not empty():
                try:
                    more = get(block=False)
                except queue.Empty:
                    break
                if more is None:  # meant for another thread, or for this one later
                    self._queue.put(None)
                    break
                batch.append(more)
            _do(batch)


def _do(batch: list[_Call]) -> None:
    done: list[tuple[_Tell, outcome.Outcome[Any]]] = []
    token = batch[0][2]
    for call, tell, its_token in batch:
        if its_token is not token:
            token.run_sync_soon(_hand_back, done)
            done, token = [], its_token
        done.append((tell, outcome.capture(call)))
    token.run_sync_soon(_hand_back, done)


def _hand_back(done: list[tuple[_Tell, outcome.Outcome[Any]]]) -> None:
    for tell, ended in done:
        tell(ended)


def _result(ended: outcome.Outcome[int]) -> int:
    """What it returned, or the negative errno of an OSError."""
    try:
        return ended.unwrap()
    except OSError as error:
        return -(error.errno or errno.EIO)
