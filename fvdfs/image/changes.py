"""What of a disk has changed since an earlier state of it, which is an image in its chain.

What the images above that one store has changed, and what they have holes for: a discarded range now reads as zeros,
and may have held data. Contents are not compared: a block that was written with what it held, or that an image above
has copied when it was read, counts as changed. All that lies past the end of the earlier state has changed as well.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import NamedTuple

import trio

from fvdfs.format.header import SECTOR, ceil_div, round_up
from fvdfs.image.core import PIECES_PER_TURN, Core, LastExtents
from fvdfs.store.base import Store


class Change(NamedTuple):
    """Bytes [start, stop) of a disk that have changed; not `data`: they read as zeros now."""

    start: int
    stop: int
    data: bool


async def changes(image: Core, since: Core | Store | None) -> AsyncIterator[Change]:
    """The changes of a disk since it was `since`, which is below it in its chain: in order, adjacent ones joined.

    None: since it was all zeros; then zeros are no change. Raises OSError.
    """
    last: Change | None = None
    async for change in _pieces(image, since):
        if since is None and not change.data:
            continue
        if last is not None and (last.stop, last.data) == (change.start, change.data):
            last = Change(last.start, change.stop, last.data)
            continue
        if last is not None:
            yield last
        last = change
    if last is not None:
        yield last


async def _pieces(image: Core, since: Core | Store | None) -> AsyncIterator[Change]:
    known = LastExtents()
    unchanged = since.own if isinstance(since, Core) else since
    at = 0
    pieces = image.pieces(0, image.size, down_to=since if isinstance(since, Core) else None)
    for number, (start, stop, source, where) in enumerate(pieces):
        if not number % PIECES_PER_TURN:
            await trio.lowlevel.checkpoint()
        if at < start:
            yield Change(at, start, data=False)
        at = start
        if source is None:
            yield Change(start, stop, data=False)
        if source is None or source is unchanged:
            at = stop
            continue
        while at < stop:
            place = where + at - start
            end, hole = await known.at(source, place, place + image.size - at)
            end = min(stop, at + end - place)
            yield Change(at, end, data=not hole)
            at = end
    if at < image.size:
        yield Change(at, image.size, data=False)


def in_units(found: Iterable[Change], unit: int, size: int) -> Iterator[Change]:
    """Changes of a disk of `size` bytes in whole units: those with data get larger, those without smaller."""
    last = Change(0, 0, data=True)
    for change in found:
        start, stop = change.start // unit * unit, min(round_up(change.stop, unit), size)
        if change.data:
            parts = [Change(start, stop, data=True)]
        else:
            inner = round_up(change.start, unit), stop if change.stop == stop else change.stop // unit * unit
            if inner[0] >= inner[1]:
                parts = [Change(start, stop, data=True)]
            else:
                parts = [
                    Change(start, inner[0], data=True),
                    Change(*inner, data=False),
                    Change(inner[1], stop, data=True),
                ]
        for part in parts:
            part = part._replace(start=max(part.start, last.stop))
            if part.start >= part.stop:
                continue
            if last.stop == part.start and last.data == part.data:
                last = last._replace(stop=part.stop)
                continue
            if last.stop:
                yield last
            last = part
    if last.stop:
        yield last


def spread(parts: Sequence[tuple[int, int]], count: int) -> Iterator[int]:
    """At most `count` sectors, by their first bytes, spread evenly over parts (start, stop) of a disk, in order."""
    sectors = [(start, (stop - start) // SECTOR) for start, stop in parts]
    whole = sum(number for _, number in sectors)
    before = 0  # sectors of parts that are done
    step = max(1, ceil_div(whole, count))
    at = step // 2 if whole > count else 0
    for start, number in sectors:
        while at < before + number:
            yield start + (at - before) * SECTOR
            at += step
        before += number


def gaps(parts: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What lies between parts (start, stop) of bytes [0, size)."""
    at = 0
    for start, stop in parts:
        if at < min(start, size):
            yield at, min(start, size)
        at = max(at, stop)
    if at < size:
        yield at, size
