"""The note in an exported overlay: of which disk it is, since which earlier state, and how to know that state again.

Of the earlier state it has checksums of sectors that are spread evenly over the disk: a short one for each of those
that have changed since, which a restore that did not end may have replaced already, and one for all others together.
They show a mistake, not an attack.

In an FVD image the note lies in the padding behind the header (format.md, "Left to the writer"), in a qcow2 image in a
header extension of its own. Pure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from fvdfs.errors import FormatError
from fvdfs.format.header import HEADER_SIZE, MAX_DISK_SIZE, SECTOR, round_up
from fvdfs.format.migration import PLACE
from fvdfs.format.sealed import seal_text, unseal

NOTE_OFFSET = round_up(HEADER_SIZE, SECTOR)  # in an FVD image; what is before is the header's sectors
NOTE_ROOM = PLACE - NOTE_OFFSET
QCOW2_EXTENSION = 0x46564458
_MAGIC = b"FVDEXPRT"
CHANGED_SAMPLES = 256  # sectors with a checksum of their own: what there is room for
OTHER_SAMPLES = 1024  # sectors that share one
_SHORT = 4  # bytes of a sector's checksum
_MAX_TIME = 1 << 36  # seconds since 1970: what localtime(3) takes everywhere
_NAME = 60  # characters of a name that are kept, each of 6 bytes at most


@dataclass(frozen=True, slots=True)
class Note:
    """What an export says of itself."""

    disk: str
    """The file name of the image that was exported."""
    since: str
    """That of the earlier state."""
    size: int
    """Bytes of the disk, and of its earlier state."""
    since_size: int
    since_time: int
    """When the earlier state was written last, in seconds since 1970."""
    changed: bytes
    """A checksum for each sector of `spread(changes, CHANGED_SAMPLES)`, as it was in the earlier state."""
    others: str
    """A checksum of the sectors of `spread(gaps, OTHER_SAMPLES)`."""

    def encode(self) -> bytes:
        """As it is stored in an image: at most NOTE_ROOM bytes."""
        fields = {
            "disk": self.disk[-_NAME:],
            "since": self.since[-_NAME:],
            "size": self.size,
            "since_size": self.since_size,
            "since_time": self.since_time,
            "changed": base64.b64encode(self.changed).decode(),
            "others": self.others,
        }
        text = json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return seal_text(_MAGIC, text, NOTE_ROOM)

    @classmethod
    def decode(cls, data: bytes, image: str) -> Note | None:
        """The note in these bytes of an image; None where there is none. Raises FormatError where it is damaged."""
        try:
            if (fields := unseal(_MAGIC, data)) is None:
                return None
            note = cls(**{**fields, "changed": base64.b64decode(fields["changed"], validate=True)})
            limits = (note.size, MAX_DISK_SIZE), (note.since_size, MAX_DISK_SIZE), (note.since_time, _MAX_TIME)
            if not all(isinstance(number, int) and 0 <= number <= limit for number, limit in limits):
                raise ValueError
            if not all(isinstance(text, str) for text in (note.disk, note.since, note.others)):
                raise ValueError
        except (ValueError, TypeError, KeyError, binascii.Error):
            raise FormatError(image, "what it says of its export is damaged") from None
        return note


def short_checksum(sector: bytes) -> bytes:
    """Of one sector."""
    return hashlib.blake2b(sector, digest_size=_SHORT).digest()


def changed_checksums(sectors: Iterable[bytes]) -> bytes:
    """`Note.changed` of these sectors."""
    return b"".join(map(short_checksum, sectors))


def is_changed_sample(note: Note, number: int, sector: bytes) -> bool:
    """Whether a sector is the `number`th that `Note.changed` has a checksum of."""
    return note.changed[number * _SHORT : (number + 1) * _SHORT] == short_checksum(sector)


def others_checksum(sectors: Iterable[bytes]) -> str:
    """`Note.others` of these sectors."""
    found = hashlib.blake2b(digest_size=16)
    for sector in sectors:
        found.update(sector)
    return found.hexdigest()
