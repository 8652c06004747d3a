"""What is prefetched next: pieces of the base that are missing, by address or in the order of a profile."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from fvdfs.cow.fetching import Fetcher
from fvdfs.format.header import ceil_div, round_up
from fvdfs.format.profile import Extent
from fvdfs.image.image import Image


class Piece(NamedTuple):
    """Whole blocks, from byte `start` to `stop`."""

    start: int
    stop: int
    hole: bool = False
    """Of any length, and zeros in the base; else of a size to be read at once."""


def next_piece(image: Image, fetcher: Fetcher, start: int, limit: float, size: int) -> tuple[int, int]:
    """The first whole blocks in [start, limit), about `size` bytes at most, that are missing and in no fetch."""
    block_size, base_size = image.base_range()
    while True:
        start, stop = image.missing(start, size)
        if start >= min(stop, limit):
            return start, start
        start, free_stop = fetcher.free(start, stop)
        start = round_up(start, block_size)
        stop = min(ceil_div(free_stop, block_size) * block_size, base_size)
        if stop > free_stop:
            stop = free_stop // block_size * block_size
        if start < stop:
            return start, stop
        start = round_up(free_stop + 1, block_size)


class ProfileOrder:
    """Pieces in the order of a profile."""

    def __init__(self, image: Image, fetcher: Fetcher, requests: Sequence[Extent], longest: int) -> None:
        """`longest`: bytes that are fetched at once, whatever the profile says."""
        self._image = image
        self._longest = longest
        self._fetcher = fetcher
        self._requests = deque(requests)
        self.under_way: list[Piece] = []
        """Pieces that were given out, and are not copied yet."""

    def leave_out(self, start: int) -> None:
        """Of what was under way, all but the piece that begins there comes again."""
        again = (piece for piece in reversed(self.under_way) if piece.start != start)
        self._requests.extendleft((piece.start, piece.stop) for piece in again)
        self.under_way.clear()

    def has_more(self) -> bool:
        """Whether `next` has not come to the end yet."""
        return bool(self._requests)

    def next(self) -> Piece | None:
        """The next piece; None where the profile ends.

        Holes are those that are known: the guest is about to need what is here, and should not wait for a question.
        """
        while self._requests:
            start, stop = self._requests.popleft()
            block_size = self._image.base_range()[0]
            size = round_up(min(stop - start, self._longest), block_size)
            found, end = next_piece(self._image, self._fetcher, start // block_size * block_size, stop, size)
            if found < end:
                if end < stop:
                    self._requests.appendleft((end, stop))
                known = self._fetcher.extents.known(found)
                piece = Piece(found, end, hole=known is not None and known[1] and known[0] >= end)
                self.under_way.append(piece)
                return piece
        return None
