"""`fvdfs freeze`, `thaw` and `release`: a disk moves to another host, or does not. Blocks.

The process that serves a mount is told so, through an extended attribute; an image that is not mounted is changed here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

from fvdfs.commands.attributes import explained, facts, flush, or_by_mount, unwritable
from fvdfs.commands.layers import policy_of, refuse_of_raw
from fvdfs.daemon import run_loop
from fvdfs.errors import FvdError, ImageBusy, ImageError, UsageError
from fvdfs.format import migration
from fvdfs.format.mailbox import Wish
from fvdfs.format.migration import Record, Target
from fvdfs.image.policy import given_tls_creds
from fvdfs.layers.move import change_record, freeze, record_of
from fvdfs.store.filelock import FileLock
from fvdfs.store.locations import parse_location
from fvdfs.store.source import ASKED_PATIENCE, ask
from fvdfs.xattrs import MOVE, STATUS

LET_GO_PATIENCE = 5.0  # seconds; a machine may be there that holds locks, too
_LET_GO_INTERVAL = 0.02  # seconds


def run_freeze(disk: str, *, options: Sequence[str] = (), secret: str = "") -> int:
    """Have nobody write a disk on this host from now on. Raises UsageError, ImageBusy, ImageError, OSError."""
    if disk.endswith(".raw"):
        refuse_of_raw(disk, options, secret)
        with explained(disk), contextlib.ExitStack() as stack:
            stack.enter_context(kept_from_qemu(disk))
            flush(disk)
            if facts(disk, STATUS).get("passthrough") == "on":
                stack.close()  # else it could not be taken from the kernel
            ask_mount(disk, "freeze")
        return 0
    with or_by_mount():
        run_loop(functools.partial(freeze, disk, policy_of(options, secret)))
    return 0


def run_thaw(disk: str, *, lose_writes: bool) -> int:
    """Have a frozen disk be written here again. Raises as `run_freeze`."""
    step = "thaw lose-writes" if lose_writes else "thaw"
    code = _run(disk, step, functools.partial(migration.thaw, lose_writes=lose_writes), damaged=lose_writes)
    if disk.endswith(".raw"):
        with contextlib.suppress(OSError):  # it is thawed
            _wait_until_let_go(disk)
    return code


def _wait_until_let_go(raw: str) -> None:
    """`fvdfs serve` keeps machines from a disk until it has seen the thaw: they can start when this returns."""
    descriptor = os.open(raw, os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LET_GO_PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(ImageBusy):
                FileLock(descriptor, raw).take(exclusive=True)
                return
            time.sleep(_LET_GO_INTERVAL)
    finally:
        os.close(descriptor)


def run_release(disk: str) -> int:
    """Say that the target has all of a disk, so that its image may be removed. Raises as `run_freeze`.

    Where the disk had come from another host itself, and still followed, that is told, too: by the mount, or from here.
    """
    code = _run(disk, "release", migration.release)
    if not disk.endswith(".raw"):
        _pass_release_on(disk)
    return code


def _pass_release_on(image: str) -> None:
    """Raises ImageError where the source of an image that was released cannot be told, OSError."""
    record, base = record_of(image)
    into = record.incoming
    if into is None or into.state is not Target.ACTIVE:
        return
    source = parse_location(into.url(base))
    try:
        run_loop(functools.partial(ask, source, given_tls_creds.get(), into, Wish.RELEASE, ASKED_PATIENCE))
    except (FvdError, OSError) as error:
        raise ImageError(
            source.name,
            f"the image here is released, but its own source, which nobody needs any more, could not be told: {error}; "
            "do this once more later, or there: fvdfs release",
        ) from error


def _run(disk: str, step: str, event: Callable[[Record], Record], *, damaged: bool = False) -> int:
    if disk.endswith(".raw"):
        with explained(disk):
            ask_mount(disk, step)
        return 0
    with or_by_mount():
        try:
            change_record(disk, event, damaged=damaged)
        except UsageError as error:
            text = str(error)
            raise UsageError(text if disk in text else f"{disk}: {text}") from error
    return 0


@contextlib.contextmanager
def kept_from_qemu(raw: str) -> Iterator[None]:
    """No QEMU writes a disk in a mount meanwhile, nor can a machine that was stopped go on.

    Raises ImageBusy where one has it open for writing, OSError.
    """
    descriptor = os.open(raw, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            FileLock(descriptor, raw).take(exclusive=False)
        except ImageBusy:
            raise ImageBusy(raw, "a machine runs on it; stop that, or let it migrate first") from None
        yield
    finally:
        os.close(descriptor)


def ask_mount(raw: str, step: str) -> dict[str, object]:
    """Have the mount take a step of a move; the status of the disk then. Raises UsageError, ImageError, OSError."""
    facts(raw, STATUS)  # another file system might take the attribute, and think nothing of it
    try:
        os.setxattr(raw, MOVE, step.encode())
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES):
            raise UsageError(f"{raw}: only its owner, or root, may move it") from None
        refused = str(facts(raw, STATUS).get("move_refused", ""))
        if not refused:
            if error.errno == errno.EROFS:
                raise unwritable(raw) from error
            raise
        if error.errno == errno.EINVAL:
            raise UsageError(f"{raw}: {refused}") from error
        raise ImageError(raw, refused) from error
    return facts(raw, STATUS)
