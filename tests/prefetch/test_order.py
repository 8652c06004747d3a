"""What is fetched next, by a profile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from fvdfs.cow.fetching import Fetcher
from fvdfs.image.image import Image
from fvdfs.prefetch.order import ProfileOrder

PAGE = 4096
DISK = 1 << 30


def test_a_long_extent_is_fetched_in_parts() -> None:
    local = set(range(80, 90))  # blocks

    def missing(start: int, size: int) -> tuple[int, int]:
        first = start // PAGE
        while first in local:
            first += 1
        end = first + 1
        while end not in local and end * PAGE < min(first * PAGE + size, DISK):
            end += 1
        return first * PAGE, end * PAGE

    image = SimpleNamespace(base_range=lambda: (PAGE, DISK), missing=missing)
    fetcher = SimpleNamespace(free=lambda start, stop: (start, stop), extents=SimpleNamespace(known=lambda at: None))
    order = ProfileOrder(cast(Image, image), cast(Fetcher, fetcher), [(0, DISK), (PAGE, 2 * PAGE)], 64 * PAGE)
    pieces = [order.next() for _ in range(3)]
    assert [(piece.start // PAGE, piece.stop // PAGE) for piece in pieces if piece] == [(0, 64), (64, 80), (90, 154)]
