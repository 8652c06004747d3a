"""What a target asks of the source of its disk, by the mailbox that this exports (`format/mailbox.py`)."""

from __future__ import annotations

import errno
import math
import secrets
import socket
from collections.abc import Callable

import trio

from fvdfs.errors import FvdError, ImageError, Unreachable, UsageError
from fvdfs.format import hot, mailbox
from fvdfs.format.mailbox import Answer, Question, Wish
from fvdfs.format.migration import Incoming
from fvdfs.format.profile import Extent
from fvdfs.store.connecting import NoExport
from fvdfs.store.locations import Location
from fvdfs.store.nbd_client import NbdClient, nbd_client

ASKED_PATIENCE = 3.0  # seconds for the source to do what a user asks for
ANSWER_TIMEOUT = 10.0  # seconds until a question is given up: a freeze may have much to flush
_LOOK = 0.005  # seconds between looks for an answer
_RETRY = 0.1  # seconds before what failed is asked again
_NUMBER_BYTES = 8


async def epoch_of(location: Location, tls_creds: str) -> str:
    """The epoch of the move that this source is ready for. `tls_creds`: as `Policy.tls_creds`.

    Raises UsageError where it is no disk that `fvdfs serve` gives, ImageError, OSError.
    """
    try:
        async with nbd_client(location, mailbox.EXPORT, tls_creds, writable=True) as box:
            epoch = mailbox.epoch_in(await box.pread(mailbox.SECTOR, 0))
    except NoExport:
        epoch = ""
    if not epoch:
        raise UsageError(f"{location.name}: is no disk that fvdfs serve gives there")
    return epoch


async def hot_blocks(location: Location, tls_creds: str, size: int) -> list[Extent]:
    """What was used last of a disk of `size` bytes that its source has handed over, the hottest first.

    Raises OSError, also where the source says nothing, or nonsense; Unreachable, ImageError.
    """
    async with nbd_client(location, hot.EXPORT, tls_creds) as export:
        extents = hot.decode(await export.pread(hot.SIZE, 0), size)
    if extents is None:
        raise OSError(errno.EBADMSG, "the source's word makes no sense")
    return extents


async def ask(
    location: Location,
    tls_creds: str,
    into: Incoming,
    wish: Wish,
    patience: float,
    away_patience: float = math.inf,
    failed: Callable[[FvdError | OSError], None] = lambda _error: None,
) -> None:
    """Have the source do it, trying for so many seconds; `away_patience`: where it cannot be reached, if that is less.

    `failed` is told of each attempt that has failed, and is followed by another one.

    Raises UsageError where it refuses for good, ImageError where it cannot do it yet, Unreachable or OSError where it
    cannot be reached.
    """
    began = trio.current_time()
    deadline = began + patience
    while True:
        try:
            answer = await _ask_once(location, tls_creds, into, wish)
            if answer.done:
                return
            if not answer.later:
                raise UsageError(f"the source refuses: {answer.text}")
            error: FvdError | OSError = ImageError("the source", f"cannot hand it over: {answer.text}")
        except (OSError, Unreachable) as failure:
            if trio.current_time() > began + away_patience:
                raise
            error = failure
        if trio.current_time() > deadline:
            raise error
        failed(error)
        await trio.sleep(_RETRY)


async def tell_of_end(location: Location, tls_creds: str, into: Incoming, patience: float) -> None:
    """Say that the move was given up, which is stable in the target's record.

    Raises ImageError where it cannot be told.
    """
    try:
        await ask(location, tls_creds, into, Wish.GO_ON, patience)
    except (FvdError, OSError) as error:
        raise ImageError(
            location.name,
            f"the move is given up for good here, but the source could not be told: {error}; do this once more later, "
            "or there: fvdfs thaw --lose-writes, which loses nothing",
        ) from error


async def _ask_once(location: Location, tls_creds: str, into: Incoming, wish: Wish) -> Answer:
    """Raises Unreachable, OSError."""
    number = secrets.token_hex(_NUMBER_BYTES)
    question = Question.of(into, wish, number, socket.gethostname())
    at = mailbox.question_at(question.target)
    async with nbd_client(location, mailbox.EXPORT, tls_creds, writable=True) as box:
        await box.pwrite(question.encode(), at)
        deadline = trio.current_time() + ANSWER_TIMEOUT
        while trio.current_time() < deadline:
            answer = await _look(box, at + mailbox.SECTOR, number)
            if answer is not None:
                return answer
            await trio.sleep(_LOOK)
    raise OSError(errno.ETIMEDOUT, "the source does not answer; does fvdfs serve run there?")


async def _look(box: NbdClient, at: int, number: str) -> Answer | None:
    answer = Answer.decode(await box.pread(mailbox.SECTOR, at))
    return answer if answer is not None and answer.number == number else None
