"""Steps of a move of an image that nobody has open (`format/migration.py` says which there are)."""

from __future__ import annotations

from collections.abc import Callable

from fvdfs.errors import FormatError, MovedAway
from fvdfs.format import migration
from fvdfs.format.migration import Record
from fvdfs.image.chain import open_chain
from fvdfs.image.migration import new_number, read_record, settle_record, write_record
from fvdfs.image.policy import Policy
from fvdfs.layers.snapshot import opened_alone


async def freeze(path: str, policy: Policy) -> None:
    """Have nobody write the image from now on; where it was not closed, its journal is replayed first.

    Raises UsageError, ImageBusy, ImageError, OSError.
    """
    try:
        async with opened_alone(path, policy) as (_, file):
            write_record(file, migration.freeze(read_record(file), new_number()))
    except MovedAway:  # by now, or before
        change_record(path, lambda record: migration.freeze(record, new_number()))


def record_of(path: str) -> tuple[Record, str]:
    """What an image says of its moves, and the base that its header names. Blocks. Raises ImageError, OSError."""
    layer = open_chain(path, Policy(), top_only=True).layers[0]
    try:
        return layer.record(), layer.header.base_img
    finally:
        layer.meta.close()


def change_record(path: str, event: Callable[[Record], Record], *, damaged: bool = False) -> None:
    """Have the image say what follows from this event. Blocks. `damaged`: also where its record is, which goes then.

    Raises UsageError, ImageBusy, ImageError, OSError.
    """
    layer = open_chain(path, Policy(), top_only=True).layers[0]
    file = layer.meta
    try:
        file.lock(exclusive=True)
        layer.check_unchanged()
        try:
            before = read_record(file)
            after = event(before)
        except FormatError:
            if not damaged:
                raise
            before, after = None, Record()
        if after != before:
            write_record(file, after)
        else:
            settle_record(file)
    finally:
        file.close()
