"""The bitmap of local blocks, twice: what is true, and what a crash would leave.

One bit a block of the base image; 0: the block's data is in the base, 1: it is in the image's own
storage (format.md, section 3). There are two of them (section 7):

*fresh*  what is true now. Requests are planned by it.
*stale*  what a replay of what is on stable storage would rebuild. Never ahead of *fresh*.

A bit only ever goes from 0 to 1, first in *fresh*, then in *stale*:

    fresh 0, stale 0    in the base
    fresh 1, stale 0    local. Stored by a guest's write that is not committed yet, or copied from
                        the base (copy-on-read, prefetching), which needs no commit: if the bit is
                        lost, the base still has the same bytes. A *write* to such a block must be
                        committed before a flush is answered, or a crash would bring the base's
                        old bytes back.
    fresh 1, stale 1    local, and a crash cannot change it

Whoever sets a fresh bit does so only once the block's bytes are in the storage; whoever marks a
stale bit, only once the record or the page that shows it is on stable storage.

The unit of writing to disk is a page of 4096 bytes; pages in which a fresh bit was set since they
were last written are dirty. Bits past the last block mean nothing and are kept as they are.

The two differ only in pages that are dirty or on their way to disk, so memory holds stale bits of
those alone: what an open image takes is its bitmap once.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray

from fvdfs.format.header import PAGE, ceil_div

BLOCKS_PER_PAGE = PAGE * 8


class Bitmap:
    """Both bitmaps of an image. Block ranges are half-open: [start, stop)."""

    def __init__(self, data: bytes | bytearray, blocks: int) -> None:
        """`data`: the bitmap as it is on disk, whole pages, at least `blocks` bits; a bytearray is taken over."""
        assert len(data) % PAGE == 0
        assert len(data) * 8 >= blocks
        self.blocks = blocks
        self._fresh = bitarray(endian="little", buffer=data if isinstance(data, bytearray) else bytearray(data))
        self._stale: dict[int, bitarray] = {}
        """Of pages by number; in all others the stale bits are the fresh ones."""
        self._dirty: set[int] = set()

    def all_local(self, start: int, stop: int) -> bool:
        """Whether every block of the range is in the image's own storage."""
        return self._fresh.find(0, start, stop) < 0

    def none_local(self, start: int, stop: int) -> bool:
        """Whether every block of the range is in the base."""
        return self._fresh.find(1, start, stop) < 0

    def all_committed(self, start: int, stop: int) -> bool:
        """Whether a crash would leave every block of the range local."""
        if self._stale and start < stop:
            for page in range(start // BLOCKS_PER_PAGE, (stop - 1) // BLOCKS_PER_PAGE + 1):
                stale = self._stale.get(page)
                if stale is not None and stale.find(0, *_within(page, start, stop)) >= 0:
                    return False
        return self._fresh.find(0, start, stop) < 0

    def is_local(self, block: int) -> bool:
        """Whether the block is in the image's own storage."""
        return bool(self._fresh[block])

    def next_missing(self, block: int) -> int | None:
        """The first block, from this one on, that is in the base; None where there is none."""
        found = self._fresh.find(0, block, self.blocks)
        return found if found >= 0 else None

    def next_local(self, start: int, stop: int) -> int:
        """The first block of the range that is in own storage, or where the range (or the bitmap) ends."""
        stop = min(stop, self.blocks)
        found = self._fresh.find(1, start, stop)
        return found if found >= 0 else stop

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The range as runs (start, stop, local) of blocks in the same state."""
        fresh = self._fresh
        while start < stop:
            local = fresh[start]
            end = fresh.find(1 - local, start, stop)
            if end < 0:
                end = stop
            yield start, end, bool(local)
            start = end

    def count_local(self) -> int:
        """How many blocks are in the image's own storage."""
        return self._fresh.count(1, 0, self.blocks)

    def set_local(self, start: int, stop: int) -> None:
        """Blocks are now in the image's own storage; their pages become dirty."""
        assert 0 <= start <= stop <= self.blocks
        if start == stop:
            return
        for page in range(start // BLOCKS_PER_PAGE, (stop - 1) // BLOCKS_PER_PAGE + 1):
            if page not in self._stale:
                self._stale[page] = self._fresh[page * BLOCKS_PER_PAGE : (page + 1) * BLOCKS_PER_PAGE]
            self._dirty.add(page)
        self._fresh[start:stop] = 1

    def shrink(self, blocks: int) -> None:
        """The base's range has become smaller: bits past its end are gone, those that meant nothing before too."""
        assert blocks <= self.blocks
        first = self._fresh.find(1, blocks)
        if first >= 0:
            last = self._fresh.find(1, blocks, right=True)
            self._dirty.update(range(first // BLOCKS_PER_PAGE, last // BLOCKS_PER_PAGE + 1))
        self._fresh[blocks:] = 0
        for page, stale in self._stale.items():
            stale[max(0, blocks - page * BLOCKS_PER_PAGE) :] = 0
        self.blocks = blocks

    def mark_committed(self, start: int, stop: int) -> None:
        """A journal record on stable storage now shows these blocks as local."""
        if self._stale and start < stop:
            for page in range(start // BLOCKS_PER_PAGE, (stop - 1) // BLOCKS_PER_PAGE + 1):
                if page in self._stale:
                    first, end = _within(page, start, stop)
                    self._stale[page][first:end] = 1

    @property
    def dirty_pages(self) -> int:
        return len(self._dirty)

    def take_dirty_pages(self) -> list[tuple[int, bytes]]:
        """The dirty pages as (page number, bytes), in order; they count as clean from here on."""
        pages = sorted(self._dirty)
        self._dirty.clear()
        view = memoryview(self._fresh)
        return [(page, bytes(view[page * PAGE : (page + 1) * PAGE])) for page in pages]

    def pages_written(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """These pages, from `take_dirty_pages`, are on stable storage."""
        for page, data in pages:
            stale = self._stale.get(page)
            if stale is None:
                continue
            # The page was a snapshot of fresh bits, which include every stale one of that time.
            # Bits that were committed since, through the journal, must stay.
            written = bitarray(endian="little")
            written.frombytes(data)
            stale |= written
            if stale == self._fresh[page * BLOCKS_PER_PAGE : (page + 1) * BLOCKS_PER_PAGE]:
                del self._stale[page]

    def pages_not_written(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Writing these pages failed: they are dirty again."""
        self._dirty.update(page for page, _ in pages)


def _within(page: int, start: int, stop: int) -> tuple[int, int]:
    """The part of a range of blocks that is in the page, counted from its begin."""
    origin = page * BLOCKS_PER_PAGE
    return max(start - origin, 0), min(stop - origin, BLOCKS_PER_PAGE)


def bitmap_bytes(blocks: int) -> int:
    """Bytes that a bitmap of so many blocks takes in memory and on disk: whole pages."""
    return ceil_div(blocks, BLOCKS_PER_PAGE) * PAGE
