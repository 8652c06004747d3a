"""The two bitmaps: a model of Python sets beside them, and what the model is too small to show."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from fvdfs.cow.bitmap import BLOCKS_PER_PAGE, Bitmap, bitmap_bytes
from fvdfs.format.header import PAGE

Pages = list[tuple[int, bytes]]


def encode(bits: set[int], size: int) -> bytes:
    """A bitmap of `size` bytes as it is on disk (format.md, "Bitmap")."""
    data = bytearray(size)
    for bit in bits:
        data[bit // 8] |= 1 << bit % 8
    return bytes(data)


class BitmapModel(RuleBasedStateMachine):
    """Sets of blocks: local, committed; dirty pages; and snapshots of pages on their way to disk."""

    stored = Bundle("stored")
    snapshots = Bundle("snapshots")

    @initialize(
        pages=st.integers(1, 3),
        short=st.integers(0, 20),
        bits=st.sets(st.integers(0, 40) | st.integers(-40, 40).map(lambda n: BLOCKS_PER_PAGE + n), max_size=5),
        tail=st.sets(st.integers(0, 30), max_size=3),
    )
    def load(self, pages: int, short: int, bits: set[int], tail: set[int]) -> None:
        self.size = pages * PAGE
        self.blocks = pages * BLOCKS_PER_PAGE - short
        bits = {bit for bit in bits if bit < self.blocks}
        self.tail = {self.blocks + bit for bit in tail if bit < short}
        self.local, self.committed, self.dirty = set(bits), set(bits), set[int]()
        self.bitmap = Bitmap(encode(bits | self.tail, self.size), self.blocks)

    def block_range(self, data: st.DataObject) -> tuple[int, int]:
        """A range, often near a page's end or the bitmap's."""
        near = st.sampled_from([0, BLOCKS_PER_PAGE, 2 * BLOCKS_PER_PAGE, self.blocks])
        place = st.builds(lambda at, by: min(max(at + by, 0), self.blocks), near, st.integers(-40, 40))
        first, second = data.draw(place), data.draw(place)
        return min(first, second), max(first, second)

    @rule(target=stored, data=st.data())
    def set_local(self, data: st.DataObject) -> tuple[int, int]:
        start, stop = self.block_range(data)
        self.bitmap.set_local(start, stop)
        self.local.update(range(start, stop))
        self.dirty.update(block // BLOCKS_PER_PAGE for block in range(start, stop))
        return start, stop

    @rule(blocks=stored)
    def mark_committed(self, blocks: tuple[int, int]) -> None:
        self.bitmap.mark_committed(*blocks)
        self.committed.update(range(*blocks))

    @rule(target=snapshots)
    def take_dirty_pages(self) -> Pages:
        pages = self.bitmap.take_dirty_pages()
        whole = encode(self.local | self.tail, self.size)
        assert pages == [(page, whole[page * PAGE : (page + 1) * PAGE]) for page in sorted(self.dirty)]
        self.dirty.clear()
        return pages

    @rule(pages=consumes(snapshots))
    def pages_written(self, pages: Pages) -> None:
        self.bitmap.pages_written(pages)
        for page, data in pages:
            digits = f"{int.from_bytes(data, 'little'):b}"[::-1]
            bits = {page * BLOCKS_PER_PAGE + bit for bit, digit in enumerate(digits) if digit == "1"}
            self.committed |= bits - self.tail

    @rule(pages=consumes(snapshots))
    def pages_not_written(self, pages: Pages) -> None:
        self.bitmap.pages_not_written(pages)
        self.dirty.update(page for page, _ in pages)

    @rule(data=st.data())
    def query(self, data: st.DataObject) -> None:
        start, stop = self.block_range(data)
        blocks = range(start, stop)
        assert self.bitmap.all_local(start, stop) == self.local.issuperset(blocks)
        assert self.bitmap.none_local(start, stop) == self.local.isdisjoint(blocks)
        assert self.bitmap.all_committed(start, stop) == self.committed.issuperset(blocks)
        if blocks:
            assert self.bitmap.is_local(start) == (start in self.local)
            assert self.bitmap.is_local(stop - 1) == (stop - 1 in self.local)

    @rule(data=st.data())
    def runs(self, data: st.DataObject) -> None:
        start, stop = self.block_range(data)
        at, before = start, None
        for run_start, run_stop, local in self.bitmap.block_runs(start, stop):
            assert run_start == at < run_stop <= stop
            assert local is not before, "two runs of the same state"
            run = range(run_start, run_stop)
            assert self.local.issuperset(run) if local else self.local.isdisjoint(run)
            at, before = run_stop, local
        assert at == stop

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "bitmap"):
            assert self.bitmap.count_local() == len(self.local)
            assert self.bitmap.dirty_pages == len(self.dirty)


BitmapModel.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestBitmapModel = BitmapModel.TestCase


def test_bits_are_counted_from_the_least_significant() -> None:
    bitmap = Bitmap(b"\x01\x82".ljust(PAGE, b"\0"), 16)
    assert [block for block in range(16) if bitmap.is_local(block)] == [0, 9, 15]
    bitmap.set_local(2, 3)
    assert bitmap.take_dirty_pages() == [(0, b"\x05\x82".ljust(PAGE, b"\0"))]


def test_what_is_on_disk_is_committed() -> None:
    bitmap = Bitmap(b"\x0f".ljust(PAGE, b"\0"), 8)
    assert bitmap.all_committed(0, 4)
    assert not bitmap.all_committed(0, 5)
    assert bitmap.dirty_pages == 0


def test_a_copied_block_is_not_committed() -> None:
    """Setting a bit changes only what is true now, not what a crash leaves."""
    bitmap = Bitmap(bytes(PAGE), 8)
    bitmap.set_local(3, 5)
    assert bitmap.all_local(3, 5)
    assert not bitmap.all_committed(3, 4)
    bitmap.mark_committed(3, 4)
    assert bitmap.all_committed(3, 4)
    assert not bitmap.all_committed(4, 5)


def test_page_on_disk_does_not_take_back_what_the_journal_shows() -> None:
    """A block stored and committed while an older snapshot of its page was on its way."""
    bitmap = Bitmap(bytes(PAGE), 16)
    bitmap.set_local(0, 1)
    pages = bitmap.take_dirty_pages()
    bitmap.set_local(5, 7)
    bitmap.mark_committed(5, 6)
    bitmap.pages_written(pages)
    assert [block for block in range(16) if bitmap.all_committed(block, block + 1)] == [0, 5]
    assert [page for page, _ in bitmap.take_dirty_pages()] == [0]


def test_bits_past_the_end_stay_as_on_disk() -> None:
    """Prefetching by the original sets all of them; they mean nothing."""
    bitmap = Bitmap(b"\xf8\xff" + bytes(PAGE - 2), 3)
    assert bitmap.count_local() == 0
    assert bitmap.none_local(0, 3)
    assert list(bitmap.block_runs(0, 3)) == [(0, 3, False)]
    bitmap.set_local(1, 2)
    assert bitmap.take_dirty_pages() == [(0, b"\xfa\xff" + bytes(PAGE - 2))]


def test_range_over_many_pages_makes_each_dirty() -> None:
    bitmap = Bitmap(bytes(5 * PAGE), 5 * BLOCKS_PER_PAGE)
    bitmap.set_local(BLOCKS_PER_PAGE - 1, 3 * BLOCKS_PER_PAGE + 1)
    assert [page for page, _ in bitmap.take_dirty_pages()] == [0, 1, 2, 3]
    bitmap.set_local(BLOCKS_PER_PAGE, 3 * BLOCKS_PER_PAGE)
    assert [page for page, _ in bitmap.take_dirty_pages()] == [1, 2]


def test_pages_are_taken_in_order() -> None:
    bitmap = Bitmap(bytes(41 * PAGE), 41 * BLOCKS_PER_PAGE)
    for page in (40, 3, 8):
        bitmap.set_local(page * BLOCKS_PER_PAGE, page * BLOCKS_PER_PAGE + 1)
    assert [page for page, _ in bitmap.take_dirty_pages()] == [3, 8, 40]


def test_each_page_shows_its_own_blocks() -> None:
    bitmap = Bitmap(bytes(3 * PAGE), 3 * BLOCKS_PER_PAGE)
    bitmap.set_local(BLOCKS_PER_PAGE - 1, 2 * BLOCKS_PER_PAGE + 1)
    pages = bitmap.take_dirty_pages()
    bitmap.pages_written(pages[1:2])
    assert bitmap.all_committed(BLOCKS_PER_PAGE, 2 * BLOCKS_PER_PAGE)
    assert not bitmap.all_committed(BLOCKS_PER_PAGE - 1, BLOCKS_PER_PAGE)
    assert not bitmap.all_committed(2 * BLOCKS_PER_PAGE, 2 * BLOCKS_PER_PAGE + 1)
    bitmap.pages_not_written([pages[0], pages[2]])
    assert bitmap.take_dirty_pages() == [pages[0], pages[2]]


def test_memory_holds_one_bitmap_once_all_is_written() -> None:
    pages = 200
    tracemalloc.start()
    try:
        bitmap = Bitmap(bytearray(pages * PAGE), pages * BLOCKS_PER_PAGE)
        bitmap.set_local(0, bitmap.blocks)
        assert tracemalloc.get_traced_memory()[0] >= 2 * pages * PAGE, "both, while they differ"
        bitmap.pages_written(bitmap.take_dirty_pages())
        assert tracemalloc.get_traced_memory()[0] < 1.1 * pages * PAGE
    finally:
        tracemalloc.stop()
    assert bitmap.all_committed(0, bitmap.blocks)


def test_shrink() -> None:
    """Bits past the new end are gone, from memory and from disk."""
    bitmap = Bitmap(b"\xff" * (3 * PAGE), 3 * BLOCKS_PER_PAGE - 1)
    bitmap.shrink(BLOCKS_PER_PAGE + 3)
    assert bitmap.blocks == bitmap.count_local() == BLOCKS_PER_PAGE + 3
    assert bitmap.all_committed(0, BLOCKS_PER_PAGE + 3)
    assert not any(bitmap.all_committed(block, block + 1) for block in (BLOCKS_PER_PAGE + 3, 3 * BLOCKS_PER_PAGE - 2))
    assert bitmap.take_dirty_pages() == [(1, b"\x07".ljust(PAGE, b"\0")), (2, bytes(PAGE))]
    bitmap.shrink(BLOCKS_PER_PAGE)
    assert [page for page, _ in bitmap.take_dirty_pages()] == [1]
    bitmap.shrink(BLOCKS_PER_PAGE)
    assert bitmap.count_local() == BLOCKS_PER_PAGE
    with pytest.raises(AssertionError):
        bitmap.shrink(BLOCKS_PER_PAGE + 1)


def test_a_page_that_has_not_changed_stays_committed() -> None:
    """Only of a page that has changed there is anything to note."""
    bitmap = Bitmap(encode({BLOCKS_PER_PAGE}, 2 * PAGE), 2 * BLOCKS_PER_PAGE)
    bitmap.set_local(0, 1)
    bitmap.mark_committed(BLOCKS_PER_PAGE, BLOCKS_PER_PAGE + 1)
    bitmap.pages_written([(1, encode({0}, PAGE))])
    assert bitmap.all_committed(BLOCKS_PER_PAGE, BLOCKS_PER_PAGE + 1)
    assert not bitmap.all_committed(0, 1)
    assert bytes(bitmap.pages) == encode({0, BLOCKS_PER_PAGE}, 2 * PAGE)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 9)])
def test_range_must_lie_in_the_bitmap(start: int, stop: int) -> None:
    with pytest.raises(AssertionError):
        Bitmap(bytes(PAGE), 8).set_local(start, stop)


def test_data_must_be_whole_pages_and_enough() -> None:
    Bitmap(bytes(PAGE), BLOCKS_PER_PAGE)
    for size, blocks in ((PAGE, BLOCKS_PER_PAGE + 1), (PAGE - 1, 8), (0, 1)):
        with pytest.raises(AssertionError):
            Bitmap(bytes(size), blocks)


@pytest.mark.parametrize(
    ("blocks", "size"), [(0, 0), (1, PAGE), (BLOCKS_PER_PAGE, PAGE), (BLOCKS_PER_PAGE + 1, 2 * PAGE)]
)
def test_bitmap_bytes(blocks: int, size: int) -> None:
    assert bitmap_bytes(blocks) == size
