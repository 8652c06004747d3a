"""The chunk table: loading, allocation, replay, resizing, pages."""

from __future__ import annotations

import struct
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdfs.alloc.table import ENTRIES_PER_PAGE, NOT_JOURNALED, Table, TooDamaged, decode_entries, new_table
from fvdfs.format.header import MAX_CHUNKS, PAGE, UNALLOCATED

ROOM = 1000  # chunks that the storage has room for, where it does not matter


def raw(entries: dict[int, int], chunks: int, tail: int = UNALLOCATED) -> bytes:
    """A table as on disk, in whole pages (format.md, "Chunk table")."""
    size = -(-chunks // ENTRIES_PER_PAGE) * ENTRIES_PER_PAGE
    values = [entries.get(chunk, UNALLOCATED if chunk < chunks else tail) for chunk in range(size)]
    return struct.pack(f"<{size}I", *values)


def load(entries: dict[int, int], chunks: int = 10, room: int = ROOM) -> Table:
    return Table(decode_entries(raw(entries, chunks)), chunks, room)


def contents(table: Table) -> dict[int, int]:
    return {chunk: table[chunk] for chunk in range(table.chunks) if table[chunk] != UNALLOCATED}


# --- loading --------------------------------------------------------------------------------------


def test_load() -> None:
    table = load({0: 3, 9: 0})
    assert contents(table) == {0: 3, 9: 0}
    assert (table.highest, table.allocated(), table.dirty_pages) == (3, 2, 0)
    assert not table.damaged


def test_empty_table() -> None:
    table = Table(decode_entries(new_table(10)), 10, 0)
    assert contents(table) == {}
    assert (table.highest, table.allocated(), table.damaged) == (-1, 0, False)
    assert Table(decode_entries(b""), 0, 0).highest == -1


def test_bit_31_on_disk_is_ignored_and_stored_as_0() -> None:
    table = load({0: 3 | NOT_JOURNALED, 1: NOT_JOURNALED, 2: 5})
    assert contents(table) == {0: 3, 1: 0, 2: 5}
    assert table.highest == 5
    table.allocate(3)
    ((page, data),) = table.take_dirty_pages()
    assert (page, data) == (0, raw({0: 3, 1: 0, 2: 5, 3: 6}, 10))


def test_entry_at_the_end_of_the_storage() -> None:
    table = load({0: 9, 1: 10, 2: 500, 3: 10}, room=10)
    assert table.beyond == {1, 2, 3}
    assert table.shared == set()
    assert table.damaged
    assert table.highest == 9


def test_number_that_no_chunk_can_have() -> None:
    table = load({1: 0x7FFFFFFF})
    assert table.beyond == {1}


def test_storage_larger_than_the_format_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvdfs.alloc.table.MAX_CHUNKS", 20)
    table = load({0: 19, 1: 20}, room=30)
    assert table.beyond == {1}
    assert table.replay(2, [20]) == "entry 2 is 20, but the storage ends at chunk 20"


def test_chunk_used_twice() -> None:
    table = load({0: 4, 3: 5, 5: 4 | NOT_JOURNALED, 7: 6, 8: 6, 9: 6})
    assert table.shared == {0, 5, 7, 8, 9}
    assert table.beyond == set()
    assert table.damaged
    assert table.highest == 6


def test_chunk_used_twice_on_two_pages() -> None:
    table = load({5: 7, ENTRIES_PER_PAGE + 5: 7, 2 * ENTRIES_PER_PAGE + 1: 8}, chunks=2 * ENTRIES_PER_PAGE + 2)
    assert table.shared == {5, ENTRIES_PER_PAGE + 5}
    assert table.highest == 8


def test_damage_in_words() -> None:
    assert load({0: 4, 3: 5}).damage == ""
    table = load({0: 4, 3: 4, 5: 500}, room=100)
    shared, beyond = "2 chunks share their place with others", "1 chunks lie past the end of the storage"
    assert table.damage == f"chunk table: {shared}, {beyond}"
    table.replay(7, [100])
    assert table.damage == f"chunk table: {shared}, {beyond}, the journal names places past the end of the storage"


def test_what_a_replay_puts_right_is_no_damage() -> None:
    table = load({0: 4, 3: 4, 5: 6, 6: 6})
    assert table.replay(3, [5]) is None
    table.replay_done()
    assert table.shared == {5, 6}


def test_more_damage_than_can_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fvdfs.alloc.table.MAX_DAMAGED", 2)
    assert load({0: 1, 1: 1, 2: 500}, room=100).damaged
    with pytest.raises(TooDamaged):
        load({0: 1, 1: 1, 2: 500, 3: 501}, room=100)


def test_what_is_behind_the_last_entry_means_nothing() -> None:
    table = Table(decode_entries(raw({0: 1}, 10, tail=1) + raw({0: 1}, 10)), 10, 2)
    assert not table.damaged
    assert (table.highest, table.allocated()) == (1, 1)


def test_every_entry_of_many_pages_is_looked_at() -> None:
    """Pages with nothing allocated are passed over, and only these."""
    for chunk in (0, ENTRIES_PER_PAGE - 1, ENTRIES_PER_PAGE, 3 * ENTRIES_PER_PAGE - 1, 3 * ENTRIES_PER_PAGE):
        table = load({chunk: 7}, chunks=3 * ENTRIES_PER_PAGE + 1, room=7)
        assert table.beyond == {chunk}


# --- allocation -----------------------------------------------------------------------------------


def test_numbers_are_handed_out_in_order() -> None:
    table = load({})
    assert [table.allocate(chunk) for chunk in (7, 2, 9, 0)] == [0, 1, 2, 3]
    assert contents(table) == {7: 0, 2: 1, 9: 2, 0: 3}
    assert table.allocated() == 4


def test_next_number_is_the_highest_and_1() -> None:
    """Numbers that a crash left out are never filled."""
    table = load({4: 17, 5: 2})
    assert [table.allocate(chunk) for chunk in (0, 1)] == [18, 19]
    assert table.highest == 19


def test_numbers_that_no_entry_names_are_given_again() -> None:
    table = load({0: 5, 3: 1, 4: 2})
    assert table.unnamed == 3
    assert table.take_unnamed() == [4, 3, 0]
    table.give_again([4, 3, 0])
    assert table.unnamed == 0
    assert [table.allocate(chunk) for chunk in (1, 2, 5, 6)] == [0, 3, 4, 6]


def test_a_smaller_disk_gives_no_number_twice() -> None:
    table = load({0: 0, 1: 1, 9: 5})
    table.give_again(table.take_unnamed())
    table.shrink(5)
    table.grow(10)
    numbers = [table.allocate(chunk) for chunk in range(2, 10)]
    assert sorted(numbers) == list(range(2, 10))


def test_a_chunk_that_holds_nothing_is_freed() -> None:
    table = load({0: 0, 1: 1, 2: 2})
    table.take_dirty_pages()
    table.free([1])
    assert (table[1], table.allocated(), table.unnamed) == (UNALLOCATED, 2, 1)
    assert table.dirty_pages == 1
    assert list(table.chunk_runs(0, 3)) == [(0, 1, 0), (1, 2, UNALLOCATED), (2, 3, 2)]


def test_chunk_is_allocated_once() -> None:
    table = load({4: 17})
    with pytest.raises(AssertionError):
        table.allocate(4)


def test_last_number_of_the_format() -> None:
    table = load({})
    assert table.numbers_left == MAX_CHUNKS
    table.highest = MAX_CHUNKS - 2
    assert table.numbers_left == 1
    assert table.allocate(0) == 0x7FFFFFFE
    assert table.numbers_left == 0
    with pytest.raises(AssertionError):
        table.allocate(1)
    assert contents(table) == {0: 0x7FFFFFFE}


# --- runs -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5) | st.just(UNALLOCATED), min_size=1, max_size=12), st.data())
def test_runs(entries: list[int], data: st.DataObject) -> None:
    """In order, without a gap, as long as can be; each chunk at its place."""
    table = load(dict(enumerate(entries)), len(entries))
    first = data.draw(st.integers(0, len(entries) - 1))
    end = data.draw(st.integers(first + 1, len(entries)))
    runs = list(table.chunk_runs(first, end))
    found = list[int]()
    for start, stop, number in runs:
        assert start == first + len(found)
        found += [number if number == UNALLOCATED else number + index for index in range(stop - start)]
    assert found == entries[first:end]
    for (start, stop, number), (_, _, following) in pairwise(runs):
        assert following != (number if number == UNALLOCATED else number + stop - start), "two runs that are one"


def test_runs_do_not_join_the_last_number_and_unallocated() -> None:
    table = load({0: 0x7FFFFFFE, 1: 0x7FFFFFFF}, 3)
    assert list(table.chunk_runs(0, 3)) == [(0, 2, 0x7FFFFFFE), (2, 3, UNALLOCATED)]


# --- replay (format.md, "Journal" and "Beyond the original") ---------------------------------------------------------


def test_replay() -> None:
    table = load({0: 3})
    assert table.replay(1, [7, 5 | NOT_JOURNALED]) is None
    assert contents(table) == {0: 3, 1: 7, 2: 5}
    assert table.highest == 7
    assert table.take_dirty_pages() == [(0, raw({0: 3, 1: 7, 2: 5}, 10))]


def test_replay_of_what_is_known_changes_nothing() -> None:
    table = load({0: 3, 1: 4})
    assert table.replay(0, [3, 4 | NOT_JOURNALED]) is None
    assert table.replay(3, []) is None
    assert table.replay(10, []) is None
    assert contents(table) == {0: 3, 1: 4}
    assert table.dirty_pages == 0


def test_replay_makes_only_changed_pages_dirty() -> None:
    table = load({}, chunks=3 * ENTRIES_PER_PAGE)
    assert table.replay(2 * ENTRIES_PER_PAGE - 1, [0, 1]) is None
    assert [page for page, _ in table.take_dirty_pages()] == [1, 2]


@pytest.mark.parametrize(
    ("first", "entries", "reason"),
    [
        (10, [5], "entries 10..10 of a table of 10"),
        (9, [5, 6], "entries 9..10 of a table of 10"),
        (0xFFFFFFFF, [5, 6], "entries 4294967295..4294967296 of a table of 10"),
        (11, [], "of a table of 10"),
        (2, [5, UNALLOCATED], "entry 3 is 0xFFFFFFFF"),
        (2, [20], "entry 2 is 20, but the storage ends at chunk 20"),
        (2, [5, 0x7FFFFFFF], "entry 3 is 2147483647, but the storage ends at chunk 20"),
        (2, [3], "entry 2 is 3, a chunk that is in use already"),
        (1, [5, 3 | NOT_JOURNALED], "entry 2 is 3, a chunk that is in use already"),
        (2, [5, 6, 5], "a chunk number occurs twice in entries 2..4"),
        (2, [5, 5 | NOT_JOURNALED], "a chunk number occurs twice in entries 2..3"),
        (0, [3, 3], "entry 1 is 3, a chunk that is in use already"),
    ],
)
def test_replay_refuses(first: int, entries: list[int], reason: str) -> None:
    """All of a record, or none of it."""
    table = load({0: 3}, room=20)
    problem = table.replay(first, entries)
    assert problem is not None
    assert reason in problem
    assert contents(table) == {0: 3}
    assert (table.highest, table.dirty_pages) == (3, 0)


def test_last_chunk_of_the_storage_can_be_replayed() -> None:
    table = load({}, room=20)
    assert table.replay(9, [19]) is None
    assert contents(table) == {9: 19}


def test_later_record_wins() -> None:
    """Entries do not change in a sound image; if one does, the place that it leaves is free."""
    table = load({0: 3})
    assert table.replay(0, [4]) is None
    assert contents(table) == {0: 4}
    assert table.replay(1, [3]) is None
    assert contents(table) == {0: 4, 1: 3}
    assert table.replay(2, [4]) is not None
    assert table.highest == 4


def test_replay_repairs_an_entry_past_the_storage() -> None:
    table = load({0: 3, 1: 20, 2: 25}, room=20)
    assert table.beyond == {1, 2}
    assert table.replay(1, [4]) is None
    assert table.beyond == {2}
    assert table.replay(2, [5]) is None
    assert not table.damaged
    assert contents(table) == {0: 3, 1: 4, 2: 5}


def test_table_is_used_after_replay() -> None:
    table = load({0: 3})
    assert table.replay(1, [8]) is None
    table.replay_done()
    assert table.allocate(5) == 9


# --- another size ---------------------------------------------------------------------------------


def test_grow_by_nothing() -> None:
    table = load({0: 3, 9: 4})
    table.grow(10)
    assert contents(table) == {0: 3, 9: 4}


def test_grow_within_a_page_forgets_what_stood_there() -> None:
    table = Table(decode_entries(raw({0: 3}, 10, tail=5)), 10, ROOM)
    table.grow(20)
    assert table.chunks == 20
    assert contents(table) == {0: 3}
    assert table.allocate(19) == 4
    ((page, data),) = table.take_dirty_pages()
    assert page == 0
    assert data == raw({0: 3, 19: 4}, 20, tail=5)


def test_grow_over_pages() -> None:
    table = load({0: 3})
    table.grow(2 * ENTRIES_PER_PAGE + 1)
    assert table.take_dirty_pages() == [(0, raw({0: 3}, 10)), (1, raw({}, 1)), (2, raw({}, 1))]
    assert table.allocate(2 * ENTRIES_PER_PAGE) == 4
    assert table.take_dirty_pages() == [(2, raw({0: 4}, 1))]
    table.grow(3 * ENTRIES_PER_PAGE)
    assert [page for page, _ in table.take_dirty_pages()] == [2]
    table.grow(3 * ENTRIES_PER_PAGE + 1)
    assert table.take_dirty_pages() == [(3, raw({}, 1))]


def test_grow_does_not_shrink() -> None:
    with pytest.raises(AssertionError):
        load({}).grow(9)
    with pytest.raises(AssertionError):
        load({}).shrink(11)


def test_shrink_gives_back_the_highest_numbers() -> None:
    table = load({0: 2, 1: 3, 2: 0, 5: 9, 6: 1})
    table.shrink(10)
    assert (table.chunks, table.allocated(), table.highest) == (10, 5, 9)
    table.shrink(5)
    assert (table.chunks, table.allocated(), table.highest) == (5, 3, 3)
    assert table.allocate(4) == 4
    table.shrink(0)
    assert (table.highest, table.allocated()) == (-1, 0)


def test_shrink_forgets_the_entries_on_disk() -> None:
    """Their places may be given to others; pages where nothing was allocated stay."""
    table = load({0: 3, 5: 9, 2 * ENTRIES_PER_PAGE + 4: 5}, chunks=3 * ENTRIES_PER_PAGE)
    table.shrink(5)
    assert table.take_dirty_pages() == [(0, raw({0: 3}, 10)), (2, raw({}, 1))]
    table.grow(2 * ENTRIES_PER_PAGE + 5)
    assert contents(table) == {0: 3}


# --- pages ----------------------------------------------------------------------------------------


def test_dirty_pages() -> None:
    table = load({}, chunks=3 * ENTRIES_PER_PAGE)
    table.allocate(2 * ENTRIES_PER_PAGE)
    table.allocate(ENTRIES_PER_PAGE - 1)
    table.allocate(0)
    assert table.dirty_pages == 2
    pages = table.take_dirty_pages()
    assert pages == [(0, raw({ENTRIES_PER_PAGE - 1: 1, 0: 2}, ENTRIES_PER_PAGE)), (2, raw({0: 0}, ENTRIES_PER_PAGE))]
    assert table.dirty_pages == 0
    assert table.take_dirty_pages() == []
    table.pages_not_written(pages[1:])
    assert table.dirty_pages == 1
    table.allocate(1)
    assert [page for page, _ in table.take_dirty_pages()] == [0, 2]


def test_pages_are_taken_in_order() -> None:
    table = load({}, chunks=41 * ENTRIES_PER_PAGE)
    for page in (40, 3, 8):
        table.allocate(page * ENTRIES_PER_PAGE)
    assert [page for page, _ in table.take_dirty_pages()] == [3, 8, 40]


def test_page_is_a_snapshot() -> None:
    table = load({})
    table.allocate(0)
    ((_, data),) = table.take_dirty_pages()
    table.allocate(1)
    assert data == raw({0: 0}, 10)


def test_tail_of_the_last_page_is_kept() -> None:
    """0xFF in an image that is sound, and whatever it is otherwise."""
    for tail in (UNALLOCATED, 0, 7):
        table = Table(decode_entries(raw({}, 10, tail=tail)), 10, ROOM)
        table.allocate(9)
        assert table.take_dirty_pages() == [(0, raw({9: 0}, 10, tail=tail))]


def test_data_that_ends_inside_a_page() -> None:
    table = Table(decode_entries(raw({2: 1}, 10)[:40]), 10, ROOM)
    table.allocate(0)
    assert table.take_dirty_pages() == [(0, raw({2: 1, 0: 2}, 10))]


def test_new_table() -> None:
    assert new_table(0) == b""
    assert new_table(1) == new_table(ENTRIES_PER_PAGE) == b"\xff" * PAGE
    assert new_table(ENTRIES_PER_PAGE + 1) == b"\xff" * (2 * PAGE)


def test_bytes_on_disk_are_little_endian() -> None:
    data = b"\x04\x03\x02\x01".ljust(PAGE, b"\xff")
    table = Table(decode_entries(data), 2, 0x01020304 + 1)
    assert table[0] == 0x01020304
    assert table.allocate(1) == 0x01020305
    assert table.take_dirty_pages() == [(0, b"\x04\x03\x02\x01\x05\x03\x02\x01".ljust(PAGE, b"\xff"))]


def test_host_of_the_other_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told that the host is what it is not, reading and writing are wrong alike, and memory stays as it is."""
    monkeypatch.setattr(sys, "byteorder", {"little": "big", "big": "little"}[sys.byteorder])

    def page(*entries: int) -> bytes:
        return struct.pack(f">{len(entries)}I", *entries).ljust(PAGE, b"\xff")

    table = Table(decode_entries(page(5, UNALLOCATED, 0x102)), 3, ROOM)
    assert (table[0], table[2]) == (5, 0x102)
    assert table.allocate(1) == 0x103
    for _ in range(2):
        assert table.take_dirty_pages() == [(0, page(5, 0x103, 0x102))]
        table.pages_not_written([(0, b"")])
    assert table[0] == 5


def test_replay_over_a_shared_chunk() -> None:
    table = load({0: 5, 1: 5})
    assert table.replay(0, [6]) is None
    assert table.replay(2, [5]) is not None
    assert contents(table) == {0: 6, 1: 5}
