"""What a disk has of its own beyond a template: the map by which a source says what has to travel.

A bit for each unit of the disk, set where a byte of the unit is not the template's. The units are as small as the map's
size allows. On its way it has a sector in front, which says of what move and which template it is, and a checksum; the
bits are compressed. Pure.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass

from bitarray import bitarray

from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.format.header import PAGE, SECTOR, ceil_div, round_up
from fvdfs.format.sealed import seal, unseal

MAX_BITS = 32 << 23
"""Of a map: 32 MiB."""
_MAGIC = b"FVDown-1"


def unit_for(size: int) -> int:
    """Bytes of a unit of a disk of this size."""
    unit = PAGE
    while ceil_div(size, unit) > MAX_BITS:
        unit *= 2
    return unit


class OwnBits:
    """The map of a disk while it is made: at first all of it is its own."""

    def __init__(self, size: int) -> None:
        """`size`: bytes of the disk."""
        self.size, self.unit = size, unit_for(size)
        self.bits = bitarray(ceil_div(size, self.unit), endian="little")
        self.bits.setall(1)
        self._shared = (0, 0)

    def shared(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are the template's; called in order."""
        if start != self._shared[1]:
            self.end()
            self._shared = start, start
        self._shared = self._shared[0], stop

    def end(self) -> None:
        """Nothing more is the template's."""
        start, stop = self._shared
        end = len(self.bits) if stop >= self.size else stop // self.unit
        first = ceil_div(start, self.unit)
        if first < end:
            self.bits[first:end] = 0

    def bitmap(self) -> Bitmap:
        """The bits."""
        return _bitmap(self.bits.tobytes(), len(self.bits))

    def encode(self, epoch: str, stamp: str) -> bytes:
        """The map of this move beyond the template of this stamp, in whole sectors."""
        data = zlib.compress(self.bits.tobytes(), 1)
        return Head(self.size, epoch, stamp, len(data), _checksum(data)).encode() + data.ljust(
            round_up(len(data), SECTOR), b"\0"
        )


@dataclass(frozen=True, slots=True)
class Head:
    """The first sector of a map."""

    size: int
    """Bytes of the disk."""
    epoch: str
    stamp: str
    length: int
    """Bytes that follow."""
    checksum: str

    def encode(self) -> bytes:
        """The sector."""
        fields = {"size": self.size, "epoch": self.epoch, "stamp": self.stamp}
        return seal(_MAGIC, fields | {"length": self.length, "sha256": self.checksum}, SECTOR)

    @property
    def unit(self) -> int:
        """Bytes for each bit."""
        return unit_for(self.size)

    @classmethod
    def decode(cls, sector: bytes) -> Head:
        """Raises ValueError for what is none."""
        try:
            fields = unseal(_MAGIC, sector) or {}
            size, length = fields["size"], fields["length"]
            if not isinstance(size, int) or not isinstance(length, int) or isinstance(size, bool) or size <= 0:
                raise ValueError
            head = cls(size, str(fields["epoch"]), str(fields["stamp"]), length, str(fields["sha256"]))
        except (TypeError, KeyError):
            raise ValueError("no map of what is its own") from None
        if not 0 < length <= MAX_BITS // 8 + SECTOR * SECTOR:
            raise ValueError("a map that is too long")
        return head

    def bitmap(self, data: bytes) -> Bitmap:
        """The bits, from what follows the sector. Raises ValueError where they are damaged."""
        if len(data) != self.length or _checksum(data) != self.checksum:
            raise ValueError("a map that is damaged")
        blocks = ceil_div(self.size, self.unit)
        wanted = ceil_div(blocks, 8)
        inflater = zlib.decompressobj()
        try:
            bits = inflater.decompress(data, wanted + 1)
        except zlib.error:
            raise ValueError("a map that is damaged") from None
        if len(bits) != wanted or not inflater.eof:
            raise ValueError("a map of another length")
        return _bitmap(bits, blocks)


def _bitmap(bits: bytes, blocks: int) -> Bitmap:
    return Bitmap(bytearray(bits.ljust(bitmap_bytes(blocks), b"\0")), blocks)


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
