"""The chunk table of a compact image, and the allocator that fills it.

One u32 a chunk of the virtual disk (format.md, "Chunk table"): UNALLOCATED, or the number of the chunk
in the storage, where its bytes are at data start + number * chunk_size. Numbers are handed out in
the order of first writes: the next is the highest in the table + 1. An entry does not change once it
is set, and two virtual chunks never share one place. Where the storage is full, chunks that hold nothing are freed, and
numbers that no entry names are given again (`image/reuse.py`). When the table moves, chunks get other places, and all
numbers on disk become less (`image/table_moving.py`); those in memory stay.

Bit 31 on disk says "not yet journaled" about the original's memory; it is ignored here and stored
as 0.

A chunk whose number occurs twice, or lies past the end of the storage (where the file was truncated
short), is remembered as damaged: nobody can tell whose the bytes are.

Pure: no I/O, no clock.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from bitarray import bitarray

from fvdfs.format.header import MAX_CHUNKS, PAGE, TABLE_ENTRY_SIZE, UNALLOCATED, ceil_div, round_up

NOT_JOURNALED = 0x80000000
ENTRIES_PER_PAGE = PAGE // TABLE_ENTRY_SIZE
_UNALLOCATED_PAGE = b"\xff" * PAGE
LONGEST_RUN = 1 << 12  # chunks that are looked at in one step
MAX_DAMAGED = 1 << 20  # entries that cannot be right; each is remembered, and a table with more is garbage


class TooDamaged(Exception):
    """The table has more entries that cannot be right than is worth remembering."""


class Table:
    """Virtual chunk -> chunk in the storage."""

    def __init__(self, entries: array[int], chunks: int, storage_chunks: int) -> None:
        """`entries`: the table as on disk (`decode_entries`), at least `chunks`; is taken over.

        `storage_chunks`: how many whole chunks the storage has room for now. Raises TooDamaged.
        """
        self.chunks = chunks
        del entries[ceil_div(chunks, ENTRIES_PER_PAGE) * ENTRIES_PER_PAGE :]
        self._entries = entries
        self._allocated = bitarray(chunks)
        """Which chunks have a place, for a quick way across those that have none."""
        self._dirty: set[int] = set()
        self._storage_chunks = min(storage_chunks, MAX_CHUNKS)
        self.beyond: set[int] = set()
        """Virtual chunks whose entry lies past the end of the storage."""
        self.shared: set[int] = set()
        """Virtual chunks whose entry occurs more than once."""
        self.truncated = False
        """Whether a journal record names a place past the end of the storage: what it showed is not known."""
        self._used = bitarray(min(storage_chunks, MAX_CHUNKS))
        self.highest = -1
        self._spare: list[int] = []
        """Numbers below the highest that are ready to be given again."""
        self._lowest = 0
        """Numbers below it are not given."""
        self.less = 0
        """Numbers on disk are less by so many than here."""
        self._uncopied: bitarray | None = None
        """Pages that a copy of the table does not have as they are."""
        self._copy_less = 0
        self._filled = 0
        """Behind the table, entries up to this page are UNALLOCATED on disk."""
        self._load()

    def _load(self) -> None:
        twice: set[int] = set()
        extra = 0
        for page in range(0, self.chunks, ENTRIES_PER_PAGE):
            entries = self._entries[page : min(page + ENTRIES_PER_PAGE, self.chunks)]
            if entries.tobytes() == _UNALLOCATED_PAGE[: len(entries) * TABLE_ENTRY_SIZE]:
                continue
            for chunk, entry in enumerate(entries, page):
                if entry == UNALLOCATED:
                    continue
                self._allocated[chunk] = 1
                if entry & NOT_JOURNALED:
                    entry &= ~NOT_JOURNALED
                    self._entries[chunk] = entry
                if entry >= self._storage_chunks:
                    self.beyond.add(chunk)
                    continue
                if self._used[entry]:
                    twice.add(entry)
                    extra += 1
                self._used[entry] = 1
                self.highest = max(self.highest, entry)
            if extra + len(self.beyond) > MAX_DAMAGED:
                raise TooDamaged
        if twice:
            self.shared = {c for c in range(self.chunks) if self._entries[c] in twice}

    def __getitem__(self, chunk: int) -> int:
        """The number of the chunk in the storage, or UNALLOCATED."""
        return self._entries[chunk]

    @property
    def damaged(self) -> bool:
        return bool(self.beyond or self.shared or self.truncated)

    @property
    def damage(self) -> str:
        """What is wrong with it, in words; empty: nothing."""
        found = []
        if self.shared:
            found.append(f"{len(self.shared)} chunks share their place with others")
        if self.beyond:
            found.append(f"{len(self.beyond)} chunks lie past the end of the storage")
        if self.truncated:
            found.append("the journal names places past the end of the storage")
        return f"chunk table: {', '.join(found)}" if found else ""

    def named(self, numbers: Iterable[int]) -> set[int]:
        """Those of these chunks of the storage that an entry names."""
        return set(numbers).intersection(self._entries[: self.chunks]) if numbers else set()

    def allocated(self) -> int:
        """How many chunks have a place in the storage."""
        return self._allocated.count(1)

    @property
    def numbers_left(self) -> int:
        """How many more chunks the format has numbers for."""
        return MAX_CHUNKS - 1 - self.highest + len(self._spare)

    @property
    def spare(self) -> int:
        """How many numbers are ready to be given again."""
        return len(self._spare)

    @property
    def unnamed(self) -> int:
        """How many numbers below the highest no entry names, besides those."""
        return max(0, self.highest + 1 - self._lowest - self.allocated() - len(self._spare))

    def take_unnamed(self) -> list[int]:
        """Those numbers, and those that were ready, in descending order."""
        used = bitarray(self.highest + 1)
        for chunk in self._allocated.search(1):
            used[self._entries[chunk]] = 1
        self._spare.clear()
        return sorted(used.search(0, self._lowest), reverse=True)

    def leave_allocated(self, chunks: bitarray) -> None:
        """Of these chunks, leave those that have a place in the storage."""
        del chunks[self.chunks :]
        chunks &= self._allocated[: len(chunks)]

    def give_again(self, numbers: Iterable[int]) -> None:
        """No entry names these numbers, none does on the disk, and their places read as zeros."""
        self._spare.extend(number for number in numbers if number >= self._lowest)

    def free(self, chunks: Iterable[int]) -> None:
        """These chunks hold zeros, and need no place any more. The journal must be clear."""
        for chunk in chunks:
            assert self._entries[chunk] != UNALLOCATED
            self._entries[chunk] = UNALLOCATED
            self._allocated[chunk] = 0
            self._changed(chunk)

    def on_disk(self, chunk: int) -> int:
        """The entry as it belongs there; the chunk has a place."""
        return self._entries[chunk] - self.less

    # --- a move of the table (`image/table_moving.py`) --------------------------------------------

    def give_from(self, first: int) -> None:
        """Give no number below this one."""
        self._spare.clear()
        self._lowest = first
        self.highest = max(self.highest, first - 1)

    def in_front(self, first: int, start: int, stop: int) -> list[int]:
        """Those of the chunks [start, stop) whose numbers are below this one."""
        entries = self._entries[start : min(stop, self.chunks)]
        if not entries or min(entries) >= first:
            return []
        return [chunk for chunk, entry in enumerate(entries, start) if entry < first]

    def take(self, count: int) -> range:
        """So many numbers above all others, which are given to nobody else."""
        numbers = range(self.highest + 1, self.highest + 1 + count)
        self.highest += count
        return numbers

    def move(self, chunk: int, number: int) -> None:
        """The chunk's bytes are at another place, too. No record in the journal may name the former one."""
        self._entries[chunk] = number
        self._changed(chunk)

    def begin_copy(self, less: int) -> None:
        """A copy of the table is going to be made, whose numbers are less by so many than those on disk now."""
        self._copy_less = self.less + less
        self._uncopied = bitarray(ceil_div(self.chunks, ENTRIES_PER_PAGE))
        self._uncopied.setall(1)

    def take_uncopied(self, first: int = 0, limit: int | None = None) -> list[tuple[int, bytes]]:
        """So many pages from `first` on that the copy does not have as they are, in order, as (page number, bytes).

        Now it has them.
        """
        assert self._uncopied is not None
        pages = list(islice(self._uncopied.search(1, first), limit))
        for page in pages:
            self._uncopied[page] = 0
        return [(page, self._page(page, self._copy_less)) for page in pages]

    def end_move(self) -> None:
        """There is none, or it is done: no copy is needed, and all numbers above metadata may be given."""
        self._uncopied, self._lowest = None, self.less

    def use_copy(self, filled: int) -> None:
        """It is the table from now on. On disk, entries up to the end of so many pages follow it, all UNALLOCATED."""
        assert self._uncopied is not None
        assert not self._uncopied.any()
        self.less, self._uncopied, self._filled = self._copy_less, None, filled

    def _changed(self, chunk: int) -> None:
        page = chunk // ENTRIES_PER_PAGE
        self._dirty.add(page)
        if self._uncopied is not None:
            self._uncopied[page] = 1

    def allocate(self, chunk: int) -> int:
        """Give the chunk a number."""
        assert self._entries[chunk] == UNALLOCATED
        assert self.numbers_left > 0
        number = self._spare.pop() if self._spare else self.highest + 1
        self.highest = max(self.highest, number)
        self._entries[chunk] = number
        self._allocated[chunk] = 1
        self._changed(chunk)
        return number

    def replay(self, first: int, entries: Sequence[int]) -> str | None:
        """Take over the entries of a journal record, or none of them and say why (format.md, "Beyond the original")."""
        if first + len(entries) > self.chunks:
            return f"entries {first}..{first + len(entries) - 1} of a table of {self.chunks}"
        numbers = [entry & ~NOT_JOURNALED for entry in entries]
        for chunk, (entry, number) in enumerate(zip(entries, numbers, strict=True), first):
            if entry == UNALLOCATED:
                return f"entry {chunk} is 0x{UNALLOCATED:X}"
            if number >= self._storage_chunks:
                self.truncated = True
                return f"entry {chunk} is {number}, but the storage ends at chunk {self._storage_chunks}"
            if self._entries[chunk] != number and self._used[number]:
                return f"entry {chunk} is {number}, a chunk that is in use already"
        if len(set(numbers)) != len(numbers):
            return f"a chunk number occurs twice in entries {first}..{first + len(entries) - 1}"
        for chunk, number in enumerate(numbers, first):
            old = self._entries[chunk]
            if old == number:
                continue
            if old != UNALLOCATED:
                self.beyond.discard(chunk)
                if old < self._storage_chunks and chunk not in self.shared:
                    self._used[old] = 0
            self._used[number] = 1
            self._entries[chunk] = number
            self._allocated[chunk] = 1
            self._dirty.add(chunk // ENTRIES_PER_PAGE)
            self.highest = max(self.highest, number)
        return None

    def replay_done(self) -> None:
        """No more records follow: drop what only their check needs; what they put right is no longer shared."""
        if self.shared:
            owners = Counter(self._entries[chunk] for chunk in self.shared)
            self.shared = {chunk for chunk in self.shared if owners[self._entries[chunk]] > 1}
        self._used = bitarray()

    @property
    def room(self) -> int:
        """How many entries it has room for in memory."""
        return len(self._entries)

    def make_room(self, chunks: int) -> None:
        """Have room for so many entries."""
        more = round_up(chunks, ENTRIES_PER_PAGE) - len(self._entries)
        self._entries.extend(array("I", [UNALLOCATED]) * more)

    def grow(self, chunks: int) -> None:
        """The disk has grown: the new chunks are unallocated, whatever stood in their place."""
        assert chunks >= self.chunks
        end = min(chunks, round_up(self.chunks, ENTRIES_PER_PAGE))
        self._entries[self.chunks : end] = array("I", [UNALLOCATED]) * (end - self.chunks)
        self.make_room(chunks)
        self._allocated.extend(bitarray(chunks - self.chunks))
        pages = ceil_div(self.chunks, ENTRIES_PER_PAGE)
        self._dirty.update(range(self.chunks // ENTRIES_PER_PAGE, pages))
        self._dirty.update(range(max(pages, self._filled), ceil_div(chunks, ENTRIES_PER_PAGE)))
        self.chunks = chunks

    def shrink(self, chunks: int) -> list[int]:
        """The disk has shrunk: entries past the end are gone; the numbers that they had.

        If there were any, the highest number is that of the entries that are left, and none is ready below it.
        """
        assert chunks <= self.chunks
        freed = []
        for chunk in range(chunks, self.chunks):
            if self._entries[chunk] != UNALLOCATED:
                freed.append(self._entries[chunk])
                self._entries[chunk] = UNALLOCATED
                self._dirty.add(chunk // ENTRIES_PER_PAGE)
        del self._allocated[chunks:]
        self.chunks = chunks
        if freed:
            self._spare.clear()
            live = (e for e in self._entries[:chunks] if e != UNALLOCATED)
            self.highest = max(live, default=self._lowest - 1)
        return freed

    def chunk_runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Chunks [start, stop) as runs (start, stop, number of the first) that lie together in the storage.

        The number is UNALLOCATED for a run of chunks that are not allocated. A run of others is cut at `LONGEST_RUN`.
        """
        entries = self._entries
        while start < stop:
            number = entries[start]
            end = start + 1
            if number == UNALLOCATED:
                end = self._allocated.find(1, start, stop)
                end = end if end >= 0 else stop
            else:
                limit = min(stop, start + LONGEST_RUN)
                while end < limit and entries[end] == number + end - start:
                    end += 1
            yield start, end, number
            start = end

    @property
    def dirty_pages(self) -> int:
        return len(self._dirty)

    def take_dirty_pages(self) -> list[tuple[int, bytes]]:
        """The dirty pages as (page number, bytes), in order; they count as clean from here on."""
        pages = sorted(self._dirty)
        self._dirty.clear()
        return [(page, self._page(page, self.less)) for page in pages]

    def _page(self, page: int, less: int) -> bytes:
        start, stop = page * ENTRIES_PER_PAGE, (page + 1) * ENTRIES_PER_PAGE
        entries = self._entries[start:stop]
        if less and self._allocated[start:stop].any():
            entries = array("I", [entry - less if entry != UNALLOCATED else entry for entry in entries])
        return encode_entries(entries)

    def pages_not_written(self, pages: Iterable[tuple[int, bytes]]) -> None:
        """Writing these pages failed: they are dirty again."""
        self._dirty.update(page for page, _ in pages)


def encode_entries(entries: array[int]) -> bytes:
    """Entries as on disk."""
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def decode_entries(data: bytes | bytearray | memoryview) -> array[int]:
    """Entries from disk, made up to a page with UNALLOCATED."""
    entries = array("I")
    assert entries.itemsize == TABLE_ENTRY_SIZE
    entries.frombytes(data)
    if sys.byteorder == "big":
        entries.byteswap()
    missing = -len(entries) % ENTRIES_PER_PAGE
    entries.extend(array("I", [UNALLOCATED]) * missing)
    return entries


def new_table(chunks: int) -> bytes:
    """The table of a new image: nothing allocated, whole pages."""
    return b"\xff" * round_up(chunks * TABLE_ENTRY_SIZE, PAGE)
