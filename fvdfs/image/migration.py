"""The record of a move in an image file: read, written, and obeyed by all who write to images. Blocks.

What it says, `format/migration.py`. It is written by who has the image locked for writing, or could have.
"""

from __future__ import annotations

import os
import secrets

from fvdfs.errors import MovedAway, UsageError
from fvdfs.format.header import HEADER_SPACE, MAGIC
from fvdfs.format.migration import PLACE, SIZE, Record, Target
from fvdfs.format.proof import LENGTH
from fvdfs.store.host import HostFile, open_path

_NUMBER_BYTES = 8
_SECRET_BYTES = LENGTH // 2
_MAGIC = MAGIC.to_bytes(4, "little")


def new_number() -> str:
    """A random epoch."""
    return secrets.token_hex(_NUMBER_BYTES)


def new_secret() -> str:
    """What a target is to prove itself with."""
    return secrets.token_hex(_SECRET_BYTES)


def read_record(file: HostFile) -> Record:
    """The record of an image. Raises FormatError where it is damaged, OSError."""
    sector = bytearray(SIZE)
    file.pread_now(memoryview(sector), PLACE)
    return Record.decode(bytes(sector), file.name)


def write_record(file: HostFile, record: Record) -> None:
    """Have the image say this, stable when it returns. Raises OSError; then it says what it said before."""
    assert PLACE + SIZE <= HEADER_SPACE
    before = bytearray(SIZE)
    file.pread_now(memoryview(before), PLACE)
    file.pwrite_now(record.encode(), PLACE)
    try:
        os.fsync(file.fileno())
    except OSError:  # it may never get to the disk, and whoever reads it now would take it for stable
        file.pwrite_now(bytes(before), PLACE)
        raise


def settle_record(file: HostFile) -> None:
    """Have what the image says be stable: who wrote it may have been killed before it was. Raises OSError."""
    os.fsync(file.fileno())


def refuse_moved(file: HostFile) -> None:
    """Raise MovedAway where nobody may write to this image, FormatError where its record is damaged, OSError."""
    if obstacle := read_record(file).obstacle:
        raise MovedAway(file.name, obstacle)


def refuse_following(file: HostFile) -> None:
    """Raise UsageError where an image gets what is missing from its source, which alone may be its base.

    Raises as `read_record`.
    """
    into = read_record(file).incoming
    if into is not None and into.state is Target.ACTIVE:
        raise UsageError(
            f"{file.name}: follows its source, and can stand on nothing else until all is local: "
            f"fvdfs flatten {file.name}"
        )


def refuse_on_template(path: str) -> None:
    """Raise UsageError where an image follows its source on top of a template, for which it has to stay what it is.

    Raises as `read_record`.
    """
    file = open_path(path, writable=False)
    try:
        if read_record(file).keeps_base:
            raise UsageError(f"{path}: still follows its source, on top of a template: wait until all is local")
    finally:
        file.close()


def refuse_needed(file: HostFile) -> None:
    """Raise MovedAway where a file is an image that must not be removed or replaced, FormatError, OSError."""
    magic = bytearray(len(_MAGIC))
    file.pread_now(memoryview(magic), 0)
    if magic == _MAGIC and (needed := read_record(file).needed):
        raise MovedAway(file.name, needed)
