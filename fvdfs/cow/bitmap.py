"""The bitmap of local blocks, twice: what is true now, and what a crash would leave.

One bit a block of the base image; 0: the block's data is in the base, 1: it is in the image's own
storage (format.md, "Bitmap"). There are two of them (format.md, "Reads, writes, copies"):

*local*      what is true now. Requests are planned by it.
*committed*  what a replay of what is on stable storage would rebuild. Never ahead of *local*.

A bit only ever goes from 0 to 1, first in *local*, then in *committed*:

    local 0, committed 0    in the base
    local 1, committed 0    local. Either written by a guest and not committed yet, or copied from the
                            base (copy-on-read, prefetching), which needs no commit: if the bit is
                            lost, the base still has the same bytes. A *write* to such a block must
                            be committed before a flush is answered, or a crash would bring the
                            base's old bytes back.
    local 1, committed 1    local, also after a crash

A local bit is set only once the block's bytes are in the storage; a committed bit only once the
journal record or the page that shows it is on stable storage.

Writing to disk goes by pages of 4096 bytes; a page is dirty while a local bit was set in it since it
was last written. Bits past the last block mean nothing and are kept as they are.

The two bitmaps differ only in pages that are dirty or on their way to disk, so memory holds committed
bits of those alone: an open image takes its bitmap once.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bitarray import bitarray

from fvdfs.format.header import PAGE, ceil_div

BLOCKS_PER_PAGE = PAGE * 8


class Bitmap:
    """Both bitmaps of an image. Block ranges are half-open: [start, stop)."""

    def __init__(self, data: bytes | bytearray | memoryview, blocks: int) -> None:
        """`data`: the bitmap as it is on disk, whole pages, at least `blocks` bits; it is taken over, unless bytes."""
        assert len(data) % PAGE == 0
        assert len(data) * 8 >= blocks
        self.blocks = blocks
        self.changes = 0
        """How often blocks have become local."""
        self._local = bitarray(endian="little", buffer=bytearray(data) if isinstance(data, bytes) else data)
        self._committed: dict[int, bitarray] = {}
        """By page number; in all other pages the committed bits are the local ones."""
        self._dirty: set[int] = set()

    def all_local(self, start: int, stop: int) -> bool:
        """Whether every block of the range is in the image's own storage."""
        return self._local.find(0, start, stop) < 0

    def none_local(self, start: int, stop: int) -> bool:
        """Whether every block of the range is in the base."""
        return self._local.find(1, start, stop) < 0

    def all_committed(self, start: int, stop: int) -> bool:
        """Whether a crash would leave every block of the range local."""
        if self._committed:
            for page in _pages(start, stop):
                committed = self._committed.get(page)
                if committed is not None and committed.find(0, *_within(page, start, stop)) >= 0:
                    return False
        return self.all_local(start, stop)

    def is_local(self, block: int) -> bool:
        """Whether the block is in the image's own storage."""
        return bool(self._local[block])

    def next_missing(self, block: int) -> int | None:
        """The first block, from this one on, that is in the base; None where there is none."""
        found = self._local.find(0, block, self.blocks)
        return found if found >= 0 else None

    def next_local(self, start: int, stop: int) -> int:
        """The first block of the range that is in own storage, else the end of the range or of the bitmap."""
        stop = min(stop, self.blocks)
        found = self._local.find(1, start, stop)
        return found if found >= 0 else stop

    def block_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
        """The range as runs (start, stop, local) of blocks in the same state."""
        bits = self._local
        while start < stop:
            bit = bits[start]
            end = bits.find(1 - bit, start, stop)
            if end < 0:
                end = stop
            yield start, end, bool(bit)
            start = end

    def count_missing(self, among: Bitmap) -> int:
        """How many of the blocks that are local in another bitmap, of blocks of the same size, are in the base."""
        blocks = min(self.blocks, among.blocks)
        return bitarray.count(among._local[:blocks] & ~self._local[:blocks], 1)

    def count_local(self) -> int:
        """How many blocks are in the image's own storage."""
        return self._local.count(1, 0, self.blocks)

    def set_local(self, start: int, stop: int) -> None:
        """Blocks are now in the image's own storage; their pages become dirty."""
        assert 0 <= start <= stop <= self.blocks
        if start == stop:
            return
        for page in _pages(start, stop):
            if page not in self._committed:
                self._committed[page] = self._page(page)
            self._dirty.add(page)
        self._local[start:stop] = 1
        self.changes += 1

    def shrink(self, blocks: int) -> None:
        """The base's range has become smaller: clear all bits past its end, also those that meant nothing."""
        assert blocks <= self.blocks
        first = self._local.find(1, blocks)
        if first >= 0:
            last = self._local.find(1, blocks, right=True)
            self._dirty.update(range(first // BLOCKS_PER_PAGE, last // BLOCKS_PER_PAGE + 1))
        self._local[blocks:] = 0
        for page, committed in self._committed.items():
            committed[max(0, blocks - page * BLOCKS_PER_PAGE) :] = 0
        self.blocks = blocks

    def mark_committed(self, start: int, stop: int) -> None:
        """A journal record on stable storage now shows these blocks as local."""
        if self._committed:
            for page in _pages(start, stop):
                if page in self._committed:
                    first, end = _within(page, start, stop)
                    self._committed[page][first:end] = 1

    @property
    def pages(self) -> memoryview:
        """The bitmap as it belongs on disk: whole pages, bits past the last block included."""
        return memoryview(self._local)

    @property
    def dirty_pages(self) -> int:
        return len(self._dirty)

    def take_dirty_pages(self) -> list[tuple[int, bytes]]:
        """The dirty pages as (page number, bytes), in order; they count as clean from here on."""
        pages = sorted(self._dirty)
        self._dirty.clear()
        view = memoryview(self._local)
        return [(page, bytes(view[page * PAGE : (page + 1) * PAGE])) for page in pages]

    def pages_written(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """These pages, from `take_dirty_pages`, are now on stable storage."""
        for page, data in pages:
            committed = self._committed.get(page)
            if committed is None:
                continue
            # The page is a snapshot of the local bits. Bits committed since, through the journal, must stay.
            written = bitarray(endian="little")
            written.frombytes(data)
            committed |= written
            if committed == self._page(page):
                del self._committed[page]

    def pages_not_written(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Writing these pages failed: they are dirty again."""
        self._dirty.update(page for page, _ in pages)

    def _page(self, page: int) -> bitarray:
        """A copy of the page's local bits."""
        return self._local[page * BLOCKS_PER_PAGE : (page + 1) * BLOCKS_PER_PAGE]


def _pages(start: int, stop: int) -> range:
    """The pages that hold the bits of these blocks."""
    return range(start // BLOCKS_PER_PAGE, ceil_div(stop, BLOCKS_PER_PAGE))


def _within(page: int, start: int, stop: int) -> tuple[int, int]:
    """The part of a range of blocks that is in the page, counted from the page's start."""
    origin = page * BLOCKS_PER_PAGE
    return max(start - origin, 0), min(stop - origin, BLOCKS_PER_PAGE)


def bitmap_bytes(blocks: int) -> int:
    """Bytes that a bitmap of so many blocks takes in memory and on disk: whole pages."""
    return ceil_div(blocks, BLOCKS_PER_PAGE) * PAGE
