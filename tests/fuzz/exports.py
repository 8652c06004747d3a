"""Fuzz target without I/O: what an export says of itself, and where a qcow2 overlay has its parts."""

from __future__ import annotations

from itertools import pairwise

from fuzz.source import Source
from fvdfs.errors import FvdError
from fvdfs.format.header import MAX_DISK_SIZE
from fvdfs.format.note import NOTE_ROOM, Note
from fvdfs.format.qcow2 import CLUSTER, Overlay, read_overlay

NAME = "export"
NOTE = Note("vm.fvd", "vm@mon.fvd", 1 << 30, 1 << 20, 1_700_000_000, b"abcd" * 8, "00" * 16)
_TABLE = CLUSTER // 8 * CLUSTER
OVERLAY = Overlay(
    2 * _TABLE,
    ((0, 2 * CLUSTER, True), (3 * CLUSTER, 5 * CLUSTER, False), (_TABLE, _TABLE + CLUSTER, True)),
    "base.raw",
    "raw",
    ((0x46564458, b"note"),),
)
FILE = bytearray(OVERLAY.file_size)
for _offset, _part in OVERLAY.metadata():
    FILE[_offset : _offset + len(_part)] = _part
L1 = int.from_bytes(FILE[40:48], "big")
PLACES = (*range(0, 112, 4), 108, 112, 116, L1, L1 + 8, *range(L1 + CLUSTER, L1 + CLUSTER + 64, 8), L1 + 2 * CLUSTER)
FLAGS = (0, 1, 1 << 62, 1 << 63, 1 << 63 | 1)


def fuzz_export(data: bytes) -> bool:
    """A note, or the tables of an overlay, with some of its bytes changed."""
    source = Source(data)
    return _fuzz_note(source) if source.byte() & 1 else _fuzz_overlay(source)


def _fuzz_note(source: Source) -> bool:
    raw = bytearray(NOTE.encode())
    for _ in range(source.byte() % 4):
        at = source.number(2) % len(raw)
        raw[at : at + 1] = source.take(source.byte() % 3)
    if source.byte() & 1:
        text = source.rest()
        raw[8:] = len(text).to_bytes(4, "little") + source.number(0).to_bytes(4, "little") + text
    try:
        note = Note.decode(bytes(raw), NAME)
    except FvdError as error:
        assert "\n" not in str(error)
        return False
    if note is None:
        return False
    assert 0 <= note.size <= MAX_DISK_SIZE
    assert 0 <= note.since_size <= MAX_DISK_SIZE
    assert len(note.encode()) <= NOTE_ROOM
    assert note == NOTE
    return True


def _fuzz_overlay(source: Source) -> bool:
    raw = bytearray(FILE)
    for _ in range(source.byte() % 5):
        at = source.pick(PLACES)
        size = 8 if source.byte() & 1 else 4
        number = source.size(len(raw)) ^ source.pick(FLAGS)
        raw[at : at + size] = (number & (1 << 8 * size) - 1).to_bytes(size, "big")
    if source.byte() & 1:
        del raw[source.number(3) :]
    try:
        found = read_overlay(NAME, lambda offset, length: bytes(raw[offset : offset + length]), len(raw))
    except FvdError as error:
        assert "\n" not in str(error)
        return False
    for start, stop, where in found.places:
        assert 0 <= start < stop <= found.size
        assert where is None or CLUSTER <= where <= where + stop - start <= len(raw)
    for before, after in pairwise(found.places):
        assert before[1] <= after[0]
    return True
