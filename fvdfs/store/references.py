"""What else QEMU would open for an image: its backing file, its data file.

An attacker may have written the names inside an image. So they are found here, before QEMU sees the image, by a reader
that trusts no offset and no length; then each is judged like any name. A format whose references cannot be found is not
opened.

Sizes and offsets are in bytes. Errors are `ImageError`s whose image is the name that was given. Pure.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from fvdfs.errors import FormatError, UnsupportedFeature

Reader = Callable[[int, int], bytes]
"""Reads (offset, length) of an image; fewer bytes where it ends before. Lengths are at most `MAX_READ`."""
RAW = "raw"
LUKS = "luks"
"""Encrypted; nothing in it is zeros by itself."""
PROBE_SIZE = 512
MAX_READ = 2 << 20
_MAGICS = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", LUKS),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"\xa9\xf5\x43\x51", "fvd"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def detect(first_bytes: bytes) -> str | None:
    """The QEMU name of the format that a file with these first bytes (`PROBE_SIZE`) seems to have; None: raw."""
    for offset, magic, name in _MAGICS:
        if first_bytes[offset : offset + len(magic)] == magic:
            return name
    return None


@dataclass(frozen=True, slots=True)
class Reference:
    """A name inside an image that its user must open too."""

    kind: str
    """`backing` or `data-file`."""
    name: str
    """As it is written there: perhaps relative to where the image is."""
    format: str
    """What the image says about its format; empty where it says nothing."""


REFUSED = {"fvd": "an FVD image can be the base of FVD images only"}
"""Formats that QEMU does not open for us, and why."""


def references(file_format: str, name: str, read: Reader, size: int) -> list[Reference]:
    """What the image `name` of this format and size refers to: at most one reference of each kind.

    Raises UnsupportedFeature where the format is not known, or the image uses something of it that is
    not supported; FormatError where its header makes no sense. Errors of `read` pass.
    """
    if file_format in REFUSED:
        raise UnsupportedFeature(name, f"format {file_format}: {REFUSED[file_format]}")
    look = FORMATS.get(file_format)
    if look is None:
        known = ", ".join(BASE_FORMATS)
        raise UnsupportedFeature(name, f"format {file_format or '(none)'} is not known; known are {known}")
    try:
        return look(name, read, size)
    except struct.error:
        raise FormatError(name, f"this is no {file_format} image, or it is cut off") from None


_DIFFERENCE = "this is the difference to another image; convert it to one that has all data"


def _wrong_magic(name: str, file_format: str, first: bytes) -> NoReturn:
    guess = detect(first)
    raise FormatError(name, f"this is no {file_format} image" + (f", it looks like {guess}" if guess else ""))


def _text(name: str, what: str, raw: bytes, size: int) -> str:
    if len(raw) < size or not raw or b"\0" in raw:
        raise FormatError(name, f"the name of its {what} is broken")
    return raw.decode("utf-8", "surrogateescape")


def _nothing(_name: str, _read: Reader, _size: int) -> list[Reference]:
    return []


_QCOW2_BACKING_FORMAT = 0xE2792ACA
_QCOW2_DATA_FILE = 0x44415441
_QCOW2_EXTERNAL_DATA = 1 << 2
_QCOW2_EXTENSIONS = 1000
_MAX_BACKING_NAME = 1023


def _qcow2(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    magic, version, backing_at, backing_size, cluster_bits, _, crypt = struct.unpack_from(">4sIQIIQI", first)
    if magic != b"QFI\xfb" or version not in (2, 3):
        _wrong_magic(name, "qcow2", first)
    if crypt:
        raise UnsupportedFeature(name, "it is encrypted, and there is no way to hand over its secret")
    if not 9 <= cluster_bits <= 21:
        raise FormatError(name, f"cluster_bits={cluster_bits} is not in 9..21")
    features, header_length = 0, 72
    if version == 3:
        features, _, _, _, header_length = struct.unpack_from(">QQQII", first, 72)
    cluster = read(0, 1 << cluster_bits)
    stop = backing_at or len(cluster)
    if header_length < 72 or header_length > len(cluster) or stop > len(cluster) or backing_size > _MAX_BACKING_NAME:
        raise FormatError(name, "its header makes no sense: a length or an offset leads out of it")
    extensions = _qcow2_extensions(name, cluster[:stop], header_length)
    found = []
    if backing_at and backing_size:
        raw = cluster[backing_at : backing_at + backing_size]
        words = extensions.get(_QCOW2_BACKING_FORMAT, b"").rstrip(b"\0").decode("ascii", "backslashreplace")
        found.append(Reference("backing", _text(name, "backing file", raw, backing_size), words))
    if features & _QCOW2_EXTERNAL_DATA:
        data_file = extensions.get(_QCOW2_DATA_FILE, b"")
        found.append(Reference("data-file", _text(name, "data file", data_file, len(data_file)), RAW))
    return found


def _qcow2_extensions(name: str, header: bytes, at: int) -> dict[int, bytes]:
    """The header extensions of a qcow2 image that begin at this offset, by their type."""
    found: dict[int, bytes] = {}
    for _ in range(_QCOW2_EXTENSIONS):
        if len(header) - at < 8:
            return found
        kind, length = struct.unpack_from(">II", header, at)
        if kind == 0:
            return found
        if length > len(header) - at - 8:
            raise FormatError(name, f"header extension {kind:#x} is {length} bytes long, more than there are")
        found[kind] = header[at + 8 : at + 8 + length]
        at += 8 + (length + 7) // 8 * 8
    raise FormatError(name, f"it has more than {_QCOW2_EXTENSIONS} header extensions")


def _qcow(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    magic, version, backing_at, backing_size = struct.unpack_from(">4sIQI", first)
    if magic != b"QFI\xfb" or version != 1:
        _wrong_magic(name, "qcow", first)
    (crypt,) = struct.unpack_from(">I", first, 36)
    if crypt:
        raise UnsupportedFeature(name, "it is encrypted, and there is no way to hand over its secret")
    if not backing_at or not backing_size:
        return []
    if backing_size > _MAX_BACKING_NAME or backing_at >= MAX_READ:
        raise FormatError(name, "the name of its backing file is broken")
    return [Reference("backing", _text(name, "backing file", read(backing_at, backing_size), backing_size), "")]


def _qed(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    magic, features, backing_at, backing_size = struct.unpack_from("<4s12xQ32xII", first)
    if magic != b"QED\0":
        _wrong_magic(name, "qed", first)
    if not features & 1:
        return []
    if backing_size > _MAX_BACKING_NAME or backing_at >= MAX_READ:
        raise FormatError(name, "the name of its backing file is broken")
    raw = read(backing_at, backing_size)
    return [Reference("backing", _text(name, "backing file", raw, backing_size), RAW if features & 4 else "")]


_VMDK_DESCRIPTOR_SIZE = 20 * 512
_VMDK_TYPES = (b"monolithicSparse", b"streamOptimized")


def _vmdk(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    if first[:4] != b"KDMV":
        if detect(first) == "vmdk":
            raise UnsupportedFeature(name, "only vmdk images of type monolithicSparse, all in one file, are supported")
        _wrong_magic(name, "vmdk", first)
    capacity, _, descriptor_at = struct.unpack_from("<QQQ", first, 12)
    part = "this is a part of a vmdk image; only images that are one file are supported"
    if capacity == 0 or descriptor_at == 0:
        raise UnsupportedFeature(name, part)
    if descriptor_at * 512 >= MAX_READ:
        raise FormatError(name, "the descriptor is not at the start of the file")
    created = []
    for at in {512, descriptor_at * 512}:  # QEMU looks for a parent at 512, whatever the header says
        descriptor = read(at, _VMDK_DESCRIPTOR_SIZE)
        parent = re.search(rb"parentCID\s*=\s*([0-9A-Fa-f]+)", descriptor)
        if b"parentFileNameHint" in descriptor or (parent is not None and parent[1].lower().strip(b"f")):
            raise UnsupportedFeature(name, _DIFFERENCE)
        created += re.findall(rb'createType\s*=\s*"([^"]*)"', descriptor)
    if not created:
        raise UnsupportedFeature(name, part)
    for kind in created:
        if kind not in _VMDK_TYPES:
            raise UnsupportedFeature(name, f"vmdk of type {kind.decode('latin-1')!a} is not supported")
    return []


def _vdi(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    signature, kind = struct.unpack_from("<4s8xI", first, 64)
    if signature != b"\x7f\x10\xda\xbe":
        _wrong_magic(name, "vdi", first)
    if kind not in (1, 2):
        raise UnsupportedFeature(name, _DIFFERENCE)
    return []


def _vpc(name: str, read: Reader, size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    footer = first if first.startswith(b"conectix") else read(max(0, size - 512), 512)
    cookie, kind = struct.unpack_from(">8s52xI", footer)
    if cookie != b"conectix":
        _wrong_magic(name, "vpc", first)
    if kind not in (2, 3):
        raise UnsupportedFeature(name, _DIFFERENCE)
    return []


_VHDX_REGION_TABLE = 192 << 10
_VHDX_METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
_VHDX_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B").bytes_le
_VHDX_TABLE_SIZE = 64 << 10


def _vhdx(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    if not first.startswith(b"vhdxfile"):
        _wrong_magic(name, "vhdx", first)
    broken = FormatError(name, "its tables of regions and metadata make no sense")
    table = read(_VHDX_REGION_TABLE, _VHDX_TABLE_SIZE)
    magic, count = struct.unpack_from("<4s4xI", table)
    entries = [struct.unpack_from("<16sQ", table, 16 + 32 * i) for i in range(min(count, 2047))]
    regions = [offset for guid, offset in entries if guid == _VHDX_METADATA_REGION]
    if magic != b"regi" or len(regions) != 1 or regions[0] > 1 << 62:
        raise broken
    table = read(regions[0], _VHDX_TABLE_SIZE)
    magic, count = struct.unpack_from("<8s2xH", table)
    entries = [struct.unpack_from("<16sI", table, 32 + 32 * i) for i in range(min(count, 2046))]
    items = [offset for guid, offset in entries if guid == _VHDX_FILE_PARAMETERS]
    if magic != b"metadata" or len(items) != 1:
        raise broken
    _, flags = struct.unpack_from("<II", read(regions[0] + items[0], 8))
    if flags & 2:
        raise UnsupportedFeature(name, _DIFFERENCE)
    return []


def _parallels(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    if detect(first) != "parallels":
        _wrong_magic(name, "parallels", first)
    return []


def _luks(name: str, read: Reader, _size: int) -> list[Reference]:
    first = read(0, PROBE_SIZE)
    if detect(first) != LUKS:
        _wrong_magic(name, LUKS, first)
    return []


FORMATS: dict[str, Callable[[str, Reader, int], list[Reference]]] = {
    RAW: _nothing,
    "qcow2": _qcow2,
    "qcow": _qcow,
    "qed": _qed,
    "vmdk": _vmdk,
    "vdi": _vdi,
    "vhdx": _vhdx,
    "vpc": _vpc,
    "parallels": _parallels,
    LUKS: _luks,
}
"""The formats that are opened, with what finds their references."""

BASE_FORMATS = ("fvd", *sorted(FORMATS))
"""What a base can be."""
