"""The chunk table of a compact image, and the allocator that fills it.

One u32 a chunk of the virtual disk (format.md, "Chunk table"): UNALLOCATED, or the number of the chunk
in the storage, where its bytes are at data start + number * chunk_size. Numbers are handed out in
the order of first writes: the next is the highest in the table + 1. An entry never changes once it
is set, and two virtual chunks never share one place. Where the storage is full, chunks that hold nothing are freed, and
numbers that no entry names are given again (`image/reuse.py`).

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
        return self.highest + 1 - self.allocated() - len(self._spare)

    def take_unnamed(self) -> list[int]:
        """Those numbers, and those that were ready, in descending order."""
        used = bitarray(self.highest + 1)
        for chunk in self._allocated.search(1):
            used[self._entries[chunk]] = 1
        self._spare.clear()
        return sorted(used.search(0), reverse=True)

    def leave_allocated(self, chunks: bitarray) -> None:
        """Of these chunks, leave those that have a place in the storage."""
        del chunks[self.chunks :]
        chunks &= self._allocated[: len(chunks)]

    def give_again(self, numbers: Iterable[int]) -> None:
        """No entry names these numbers, none does on the disk, and their places read as zeros."""
        self._spare.extend(numbers)

    def free(self, chunks: Iterable[int]) -> None:
        """These chunks hold zeros, and need no place any more. The journal must be clear."""
        for chunk in chunks:
            assert self._entries[chunk] != UNALLOCATED
            self._entries[chunk] = UNALLOCATED
            self._allocated[chunk] = 0
            self._dirty.add(chunk // ENTRIES_PER_PAGE)

    def in_front(self, first: int) -> list[int]:
        """The chunks with numbers below this one."""
        entries = self._entries
        return [chunk for chunk in self._allocated.search(1) if entries[chunk] < first]

    def give_from(self, first: int) -> None:
        """Give no number below this one any more."""
        self._spare.clear()
        self.highest = max(self.highest, first - 1)

    def move(self, chunk: int, number: int) -> None:
        """The chunk's bytes are at another place, too. The journal must be clear."""
        self._entries[chunk] = number
        self.highest = max(self.highest, number)
        self._dirty.add(chunk // ENTRIES_PER_PAGE)

    def pages_less(self, by: int) -> Iterator[bytes]:
        """The pages of the table, each number less by so many; there is none below that."""
        for start in range(0, self.chunks, ENTRIES_PER_PAGE):
            yield encode_entries(self._less(start, by))

    def renumber(self, by: int) -> None:
        """Each number is less by so many from now on; so the table is on disk, in another place."""
        for start in range(0, self.chunks, ENTRIES_PER_PAGE):
            self._entries[start : start + ENTRIES_PER_PAGE] = self._less(start, by)
        self.highest -= by
        self._spare.clear()

    def _less(self, start: int, by: int) -> array[int]:
        """The entries of a page."""
        page = self._entries[start : start + ENTRIES_PER_PAGE]
        allocated = self._allocated[start : start + ENTRIES_PER_PAGE]
        if by and allocated.any():
            page = array("I", [entry - by if entry != UNALLOCATED else entry for entry in page])
        return page

    def allocate(self, chunk: int) -> int:
        """Give the chunk a number."""
        assert self._entries[chunk] == UNALLOCATED
        assert self.numbers_left > 0
        number = self._spare.pop() if self._spare else self.highest + 1
        self.highest = max(self.highest, number)
        self._entries[chunk] = number
        self._allocated[chunk] = 1
        self._dirty.add(chunk // ENTRIES_PER_PAGE)
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

    def grow(self, chunks: int) -> None:
        """The disk has grown: the new chunks are unallocated, whatever stood in their place."""
        assert chunks >= self.chunks
        have = len(self._entries)
        need = round_up(chunks * TABLE_ENTRY_SIZE, PAGE) // TABLE_ENTRY_SIZE
        self._entries.extend(array("I", [UNALLOCATED]) * (need - have))
        for chunk in range(self.chunks, min(chunks, have)):
            self._entries[chunk] = UNALLOCATED
        self._allocated.extend(bitarray(chunks - self.chunks))
        self._dirty.update(range(self.chunks // ENTRIES_PER_PAGE, ceil_div(chunks, ENTRIES_PER_PAGE)))
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
            self.highest = max(live, default=-1)
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
        return [(page, self._page(page)) for page in pages]

    def _page(self, page: int) -> bytes:
        return encode_entries(self._entries[page * ENTRIES_PER_PAGE : (page + 1) * ENTRIES_PER_PAGE])

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
