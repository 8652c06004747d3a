"""Images for programs in Python without an event loop: `fvdfs.open(path)`. docs/python.md shows how.

Each open image has an event loop, in a thread of its own, and in that an `aio.Image`. A call is handed to the loop and
waited for, from whatever thread, and from several at once. Ctrl-C ends the wait, and tells the call to end as soon as
it can; closing waits for that.

The thread is a daemon: a program that ends without closing leaves its images as if it had been killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import TypeVar

import trio

from fvdfs import aio
from fvdfs.aio import Extent, Snapshot
from fvdfs.daemon import run_loop
from fvdfs.store.base import Buffer

log = logging.getLogger(__name__)

T = TypeVar("T")


class _Loop:
    """An event loop in a thread of its own, and the image that is open in it."""

    def __init__(self) -> None:
        self._begun: Future[trio.lowlevel.TrioToken] = Future()
        self._end = trio.Event()
        self._image: aio.Image | None = None
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="fvdfs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            run_loop(self._serve)
        except BaseException as error:
            if self._begun.done():
                raise
            self._begun.set_exception(error)

    async def _serve(self) -> None:
        self._begun.set_result(trio.lowlevel.current_trio_token())
        await self._end.wait()
        if self._image is not None:
            try:
                await self._image.close()
            except OSError as error:
                log.error("%s: was not closed by its program: %s", self._image.path, error)

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Have the loop do this. Raises as `work`; RuntimeError in an event loop of trio's."""
        if os.getpid() != self._process:
            raise RuntimeError("the image was opened by the process that this one was forked from; open it here again")
        if _in_event_loop():
            raise RuntimeError("this would block the event loop; there: await fvdfs.aio.open(path)")
        scope = trio.CancelScope()

        async def cancellable() -> T:
            with scope:
                return await work()
            raise AssertionError("nobody waits for what was cancelled")

        token = self._begun.result()
        try:
            return trio.from_thread.run(cancellable, trio_token=token)
        except trio.RunFinishedError:
            raise ValueError("the image is closed") from None
        except KeyboardInterrupt:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(scope.cancel)
            raise

    def open(self, work: Callable[[], Awaitable[aio.Image]]) -> aio.Image:
        """Open the image of this loop. Raises as `work`; then the loop has ended."""

        async def opened() -> aio.Image:
            self._image = await work()
            return self._image

        try:
            return self.call(opened)
        except Exception:
            self.end()
            self._thread.join()
            raise
        except BaseException:
            self.end()
            raise

    def close(self) -> None:
        """Close the image, and end. Raises OSError of closing."""
        try:
            if self._image is not None and not self._image.closed:
                self.call(self._image.close)
        finally:
            self.end()
        self._thread.join()

    def end(self) -> None:
        """End it, behind the calls that are under way, and close the image, if it is open. Does not wait."""
        if not self._begun.exception():
            with contextlib.suppress(trio.RunFinishedError):
                self._begun.result().run_sync_soon(self._end.set)


def _in_event_loop() -> bool:
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


def open(
    path: str | os.PathLike[str],
    *,
    write: bool = False,
    base_path: Iterable[str | os.PathLike[str]] = (),
    allow_url: Iterable[str] = (),
    base_format: Iterable[str] = (),
    secret: str | os.PathLike[str] = "",
    accept_unclean: bool = False,
) -> Image:
    """`aio.open`, from any thread."""
    return _opened(
        partial(
            aio.open,
            path,
            write=write,
            base_path=base_path,
            allow_url=allow_url,
            base_format=base_format,
            secret=secret,
            accept_unclean=accept_unclean,
        )
    )


def _opened(work: Callable[[], Awaitable[aio.Image]]) -> Image:
    loop = _Loop()
    return Image(loop, loop.open(work))


class Image:
    """An open image: `aio.Image`, which see, with calls that block. Any number of threads may use it."""

    def __init__(self, loop: _Loop, image: aio.Image) -> None:
        self._loop = loop
        self._image = image

    def __repr__(self) -> str:
        return repr(self._image)

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"{self.path}: was not closed", ResourceWarning, source=self, stacklevel=2)
        if not sys.is_finalizing():  # the loop was stopped somewhere then, and may have left locks behind
            self._loop.end()

    @property
    def path(self) -> str:
        """Of the image's file, absolute."""
        return self._image.path

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._image.closed

    @property
    def writable(self) -> bool:
        """Whether it was opened to be written."""
        return self._image.writable

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._image.size

    def read(self, offset: int, length: int) -> bytes:
        """`aio.Image.read`."""
        return self._call(partial(self._image.read, offset, length))

    def write(self, offset: int, data: Buffer) -> None:
        """`aio.Image.write`."""
        self._call(partial(self._image.write, offset, data))

    def zero(self, offset: int, length: int) -> None:
        """`aio.Image.zero`."""
        self._call(partial(self._image.zero, offset, length))

    def map(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """`aio.Image.map`."""
        return self._call(partial(self._image.map, offset, length))

    def flush(self) -> None:
        """`aio.Image.flush`."""
        self._call(self._image.flush)

    def snapshots(self) -> list[Snapshot]:
        """`aio.Image.snapshots`."""
        return self._call(self._image.snapshots)

    def create_snapshot(self, name: str = "") -> Snapshot:
        """`aio.Image.create_snapshot`."""
        return self._call(partial(self._image.create_snapshot, name))

    def delete_snapshot(self, name: str) -> None:
        """`aio.Image.delete_snapshot`."""
        self._call(partial(self._image.delete_snapshot, name))

    def open_snapshot(self, name: str) -> Image:
        """`aio.Image.open_snapshot`."""
        self._check_open()
        return _opened(partial(aio.open_as, *self._image.of_snapshot(name)))

    def close(self) -> None:
        """`aio.Image.close`."""
        self._loop.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Callable[[], Awaitable[T]]) -> T:
        self._check_open()
        return self._loop.call(work)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.path}: is closed")
