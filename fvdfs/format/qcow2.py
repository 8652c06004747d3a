"""qcow2 overlays: how one is laid out that holds some parts of a disk, and where an image has such parts.

Written is version 3 with clusters of 64 KiB, in the order header, refcounts, L1 table, L2 tables, data. Read is the
same, as QEMU may have rewritten it: no compressed or encrypted clusters, no snapshots, no other features. (`references`
finds what an image refers to; QEMU itself opens all others.)

Numbers are big-endian, offsets and sizes in bytes; the format is QEMU's, docs/interop/qcow2.txt there. Pure.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fvdfs.errors import FormatError, UnsupportedFeature, UsageError
from fvdfs.format.header import ceil_div, round_up

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
_MAGIC = 0x514649FB
_HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
_BACKING_FORMAT = 0xE2792ACA
_PER_TABLE = CLUSTER // 8  # entries of an L1 or L2 table, or of a refcount table, a cluster
_PER_REFCOUNTS = CLUSTER // 2  # clusters that a cluster of refcounts is about
_REFCOUNT_ORDER = 4  # 2 ** 4 bits each
_OWN = 1 << 63  # of a table's entry: the cluster is used once
_ZERO = 1 << 0
_COMPRESSED = 1 << 62
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_MAX_TABLE = 32 << 20  # bytes of the L1 table that QEMU takes
_MAX_BACKING_NAME = 1023

Part = tuple[int, int, bool]
"""Bytes [start, stop) of a disk, in whole clusters but at its end, and whether they are stored; else they are zeros."""
Placed = tuple[int, int, int | None]
"""Bytes [start, stop) of a disk, and where they are stored; None: they are zeros."""
Reader = Callable[[int, int], bytes]
"""Reads (offset, length) of an image; fewer bytes where it ends before."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """A new overlay: its backing file, with its format, the extensions of its header, and what it holds itself."""

    size: int
    parts: Sequence[Part]
    backing: str
    backing_format: str
    extensions: Sequence[tuple[int, bytes]] = ()

    def _clusters(self) -> tuple[int, int, int, int, int]:
        """How many clusters there are of the refcount table, refcounts, L1 table and L2 tables, and in all."""
        tables = sum(1 for _ in self._tables())
        data = sum(ceil_div(stop - start, CLUSTER) for start, stop, stored in self.parts if stored)
        directory = max(1, ceil_div(self._l1_size, _PER_TABLE))
        refcount_table = refcounts = 1
        while True:
            whole = 1 + refcount_table + refcounts + directory + tables + data
            needed = ceil_div(whole, _PER_REFCOUNTS)
            if needed <= refcounts and ceil_div(needed, _PER_TABLE) <= refcount_table:
                return refcount_table, refcounts, directory, tables, whole
            refcounts = max(refcounts, needed)
            refcount_table = max(refcount_table, ceil_div(refcounts, _PER_TABLE))

    @property
    def _l1_size(self) -> int:
        return ceil_div(self.size, CLUSTER * _PER_TABLE)

    def _tables(self) -> Iterator[int]:
        """The numbers of the L2 tables that are there, in order."""
        last = -1
        for start, stop, _ in self.parts:
            first, end = start // (CLUSTER * _PER_TABLE), ceil_div(stop, CLUSTER * _PER_TABLE)
            yield from range(max(first, last + 1), end)
            last = max(last, end - 1)

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self._clusters()[-1] * CLUSTER

    def places(self) -> Iterator[Placed]:
        """Where what is stored has to be written."""
        refcount_table, refcounts, directory, tables, _ = self._clusters()
        at = (1 + refcount_table + refcounts + directory + tables) * CLUSTER
        for start, stop, stored in self.parts:
            yield start, stop, at if stored else None
            if stored:
                at += round_up(stop - start, CLUSTER)

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        """The rest: offset and content, the header last. Raises UsageError for what the format has no room for."""
        refcount_table, refcounts, directory, _, whole = self._clusters()
        header = self.header()
        if self._l1_size * 8 > _MAX_TABLE:
            raise UsageError(f"a disk of {self.size} bytes is too large for qcow2")
        counts = array("H", [1]) * whole
        yield (1 + refcount_table) * CLUSTER, _big_endian(counts)
        blocks = array("Q", ((1 + refcount_table + number) * CLUSTER for number in range(refcounts)))
        yield CLUSTER, _big_endian(blocks)
        at = l1_at = (1 + refcount_table + refcounts) * CLUSTER
        l1 = array("Q", bytes(8)) * self._l1_size
        at += directory * CLUSTER
        for number, table in self._filled_tables():
            l1[number] = at | _OWN
            yield at, _big_endian(table)
            at += CLUSTER
        yield l1_at, _big_endian(l1)
        yield 0, header

    def _filled_tables(self) -> Iterator[tuple[int, array[int]]]:
        number, table = -1, array("Q")
        for start, stop, place in self.places():
            for cluster in range(start // CLUSTER, ceil_div(stop, CLUSTER)):
                if cluster // _PER_TABLE != number:
                    if table:
                        yield number, table
                    number, table = cluster // _PER_TABLE, array("Q", bytes(CLUSTER))
                entry = _ZERO if place is None else place + cluster * CLUSTER - start | _OWN
                table[cluster % _PER_TABLE] = entry
        if table:
            yield number, table

    def header(self) -> bytes:
        """What stands at its start. Raises UsageError where the backing file's name is too long."""
        refcount_table, refcounts, *_ = self._clusters()
        l1_at = (1 + refcount_table + refcounts) * CLUSTER
        extensions = b""
        for kind, data in ((_BACKING_FORMAT, self.backing_format.encode()), *self.extensions, (0, b"")):
            extensions += struct.pack(">II", kind, len(data)) + data.ljust(round_up(len(data), 8), b"\0")
        name = self.backing.encode("utf-8", "surrogateescape")
        if len(name) > _MAX_BACKING_NAME:
            raise UsageError(f"{self.backing}: the name is too long for a backing file of qcow2")
        name_at = _HEADER.size + len(extensions)
        assert name_at + len(name) <= CLUSTER
        header = _HEADER.pack(
            *(_MAGIC, 3, name_at, len(name), CLUSTER_BITS, self.size, 0, self._l1_size, l1_at, CLUSTER, refcount_table),
            *(0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER.size),
        )
        return header + extensions + name


def _big_endian(values: array[int]) -> bytes:
    copy = array(values.typecode, values)
    copy.byteswap()
    return copy.tobytes()


@dataclass(frozen=True, slots=True)
class Stored:
    """What an overlay holds itself."""

    size: int
    places: Sequence[Placed]
    extensions: dict[int, bytes]


def read_overlay(name: str, read: Reader, file_size: int) -> Stored:
    """What the overlay `name` holds itself, adjacent parts joined. Raises FormatError, UnsupportedFeature."""
    first = read(0, CLUSTER)
    if len(first) < _HEADER.size or first[:4] != _MAGIC.to_bytes(4, "big"):
        raise FormatError(name, "this is no qcow2 image")
    _, version, name_at, _, bits, size, crypt, l1_size, l1_at, _, _, snapshots, _, features, _, _, _, header_size = (
        _HEADER.unpack_from(first)
    )
    if (version, bits) != (3, CLUSTER_BITS) or any((crypt, snapshots, features)):
        raise UnsupportedFeature(name, "only qcow2 overlays as fvdfs export makes them can be restored")
    wrong = FormatError(name, "its header or a table makes no sense: an offset or a size leads out of it")
    if size >= 1 << 62 or l1_size * 8 > _MAX_TABLE or l1_size < ceil_div(size, CLUSTER * _PER_TABLE):
        raise wrong
    extensions = _extensions(first[: name_at or CLUSTER], header_size)
    if extensions is None:
        raise wrong
    places: list[Placed] = []
    for start, place in _entries(read, l1_at, ceil_div(size, CLUSTER * _PER_TABLE), wrong):
        if start >= size:
            break
        if place & _COMPRESSED:
            raise UnsupportedFeature(name, "it is compressed; only what fvdfs export has made can be restored")
        stop = min(start + CLUSTER, size)
        where = None if place & _ZERO else place & _OFFSET
        if where is not None and not CLUSTER <= where <= file_size - (stop - start):
            raise wrong
        _join(places, (start, stop, where))
    return Stored(size, places, extensions)


def _entries(read: Reader, l1_at: int, tables: int, wrong: FormatError) -> Iterator[tuple[int, int]]:
    """The entries of all L2 tables that say something, each with the first byte of its cluster. Raises `wrong`."""
    seen: set[int] = set()
    for number, entry in enumerate(_table(read, l1_at, tables, wrong)):
        at = entry & _OFFSET
        if not at:
            continue
        if at in seen:  # else a small file could have more tables than anybody can read
            raise wrong
        seen.add(at)
        for index, place in enumerate(_table(read, at, _PER_TABLE, wrong)):
            if place:
                yield (number * _PER_TABLE + index) * CLUSTER, place


def _join(places: list[Placed], new: Placed) -> None:
    """Add a part, as a longer last one where it goes on from there."""
    if places:
        start, stop, where = places[-1]
        follows = new[2] is None if where is None else new[2] == where + stop - start
        if stop == new[0] and follows:
            places[-1] = start, new[1], where
            return
    places.append(new)


def _table(read: Reader, offset: int, entries: int, wrong: FormatError) -> array[int]:
    data = read(offset, entries * 8) if not offset % CLUSTER else b""
    if len(data) < entries * 8:
        raise wrong
    found = array("Q", data)
    found.byteswap()
    return found


def _extensions(header: bytes, at: int) -> dict[int, bytes] | None:
    """The header's extensions by kind; None where they make no sense."""
    found: dict[int, bytes] = {}
    if not _HEADER.size <= at <= len(header):
        return None
    while at <= len(header) - 8:
        kind, length = struct.unpack_from(">II", header, at)
        if not kind:
            return found
        if length > len(header) - at - 8:
            return None
        found[kind] = header[at + 8 : at + 8 + length]
        at += 8 + round_up(length, 8)
    return found
