"""What is asked about a base's holes, and what is made of the answers."""

from __future__ import annotations

import errno

import pytest
import trio
from trio.testing import MockClock

from fvdfs.cow.extents import CREDIT, STRIDE, UNTOLD, Extents

BLOCK = 4096
SIZE = 1 << 30


class Asked:
    """Extents as a base tells them: data from each of these places to the next, with holes between."""

    def __init__(self, *data: tuple[int, int], seconds: float = 0) -> None:
        self.data = data
        self.seconds = seconds
        self.questions: list[int] = []
        self.error = 0

    async def __call__(self, start: int, stop: int) -> tuple[int, bool]:
        self.questions.append(start)
        await trio.sleep(self.seconds)
        if self.error:
            raise OSError(self.error, "no")
        for begin, end in self.data:
            if start < begin:
                return min(begin, stop), True
            if start < end:
                return min(end, stop), False
        return stop, True


@pytest.mark.parametrize(
    ("start", "limit", "expected"),
    [
        (0, 16 * BLOCK, (BLOCK, True)),  # to the block in which data begins
        (BLOCK, 16 * BLOCK, (3 * BLOCK, False)),  # to the end of the block in which it ends
        (BLOCK, 2 * BLOCK, (2 * BLOCK, False)),
        (3 * BLOCK, 16 * BLOCK, (5 * BLOCK, True)),  # not stopped by the limit
        (5 * BLOCK, 16 * BLOCK, (8 * BLOCK, False)),  # the hole in it has no whole block
        (8 * BLOCK, 16 * BLOCK, (SIZE + 100, True)),  # the last block is cut
    ],
)
async def test_whole_blocks(start: int, limit: int, expected: tuple[int, bool]) -> None:
    base = Asked((BLOCK + 10, 2 * BLOCK + 10), (5 * BLOCK, 6 * BLOCK), (6 * BLOCK + 4000, 7 * BLOCK + 100))
    assert await Extents("x", base).blocks(start, limit, BLOCK, SIZE + 100) == expected


async def test_nothing_is_asked_twice() -> None:
    base = Asked((100 * BLOCK, 200 * BLOCK))
    extents = Extents("x", base)
    for at in (0, 50, 99, 100, 150, 199, 200, 1000, 10):
        assert (await extents.at(at * BLOCK, SIZE))[1] is not (100 <= at < 200)
    assert base.questions == [0, 100 * BLOCK, 200 * BLOCK]
    assert extents.known(150 * BLOCK) == (200 * BLOCK, False)


async def test_what_cannot_be_asked_is_data(caplog: pytest.LogCaptureFixture) -> None:
    base = Asked()
    base.error = errno.EIO
    extents = Extents("x", base)
    assert await extents.at(0, SIZE) == (UNTOLD, False)
    assert await extents.at(0, SIZE) == (UNTOLD, False)
    assert len(caplog.records) == 1
    base.error = 0
    assert await extents.at(0, SIZE) == (SIZE, True)


@pytest.mark.parametrize(("hole", "pays"), [(16 * BLOCK, False), (2 << 20, True)])
async def test_asking_has_to_pay(autojump_clock: MockClock, hole: int, pays: bool) -> None:
    """Over a link of 20 MB/s whose answers take 5 ms, for which a hole of 64 KiB is read sooner."""
    data = [(at, at + hole) for at in range(0, SIZE, 2 * hole)]
    base = Asked(*data, seconds=0.005)
    extents, at, read = Extents("x", base), 0, 0
    while at < SIZE:
        end, is_hole = await extents.blocks(at, min(at + (1 << 20), SIZE), BLOCK, SIZE)
        if not is_hole:
            extents.was_read(end - at, (end - at) / 20e6)
            read += end - at
        at = end
    spent = len(base.questions) * base.seconds
    if pays:
        assert read == SIZE // 2
    else:
        assert spent < 0.1 * SIZE / 20e6 + 2 * CREDIT
        assert len(base.questions) < 10 * SIZE / STRIDE
