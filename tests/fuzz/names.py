"""Fuzz target for other formats: what a header refers to, and what a name means.

Names are what an attacker may write into an image, so more is asked of them than that nothing is
raised: the one spelling of a URL must mean the same as what was written, and what is handed to QEMU
must hold nothing that is not text.
"""

from __future__ import annotations

import json
import struct
import uuid
from typing import cast

from fuzz.source import Source
from fvdfs.errors import FvdError
from fvdfs.store.locations import Location, Options, is_local, join, parse_location, within
from fvdfs.store.qemu_nodes import Node, blockdevs
from fvdfs.store.references import FORMATS, MAX_READ, PROBE_SIZE, Reader, detect, references

_GUIDS = ("8B7CA206-4790-4B9A-B8FE-575F050F886E", "CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_REGION, _PARAMETERS = (uuid.UUID(text).bytes_le for text in _GUIDS)
VHDX_TABLE = 192 << 10


def _qcow2() -> bytes:
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, 0x200, 8, 9, 1 << 20, 0).ljust(72, b"\0")
    head += struct.pack(">QQQII", 4, 0, 0, 4, 104)
    head += struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2") + struct.pack(">II8s", 0x44415441, 4, b"data")
    return head.ljust(0x1F0, b"\0") + b"back.img"


TEMPLATES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "qcow2": ((0, _qcow2()[:0x1F0].replace(b"\0\0\2\0\0\0\0\x08", b"\0\0\1\xf0\0\0\0\x08")), (0x1F0, b"back.img")),
    "qcow": ((0, struct.pack(">4sIQI", b"QFI\xfb", 1, 100, 4).ljust(100, b"\0") + b"base"),),
    "qed": ((0, struct.pack("<4s12xQ32xII", b"QED\0", 5, 100, 4).ljust(100, b"\0") + b"base"),),
    "vmdk": (
        (0, b"KDMV" + struct.pack("<IIQQQ", 1, 3, 20480, 128, 1)),
        (512, b'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicSparse"\n'),
    ),
    "vdi": ((64, struct.pack("<4s8xI", b"\x7f\x10\xda\xbe", 1)),),
    "vpc": ((0, struct.pack(">8s52xI", b"conectix", 3)),),
    "vhdx": (
        (0, b"vhdxfile"),
        (VHDX_TABLE, struct.pack("<4s4xI4x16sQ", b"regi", 1, _REGION, 256 << 10)),
        (256 << 10, struct.pack("<8s2xH20x16sI", b"metadata", 1, _PARAMETERS, 65536)),
    ),
    "parallels": ((0, b"WithoutFreeSpace"),),
    "luks": ((0, b"LUKS\xba\xbe"),),
    "raw": (),
    "fvd": ((0, b"\xa9\xf5\x43\x51"),),
}


def sparse_reader(pieces: list[tuple[int, bytes]], size: int) -> Reader:
    """Reads a file of this size that is zeros but for some pieces, later ones over earlier ones."""

    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset < 1 << 63
        assert 0 <= length <= MAX_READ
        stop = min(offset + length, size)
        if stop <= offset:
            return b""
        data = bytearray(stop - offset)
        for at, piece in pieces:
            first, last = max(at, offset), min(at + len(piece), stop)
            if first < last:
                data[first - offset : last - offset] = piece[first - at : last - at]
        return bytes(data)

    return read


def _fuzz_references(source: Source) -> bool:
    names = sorted(TEMPLATES)
    chosen = source.byte()
    template = names[chosen % len(names)]
    file_format = template if chosen < 220 else source.pick([*names, "", "vvfat"])
    pieces = list(TEMPLATES[template])
    for _ in range(source.byte() % 6):
        start = source.pick([at for at, _ in pieces] or [0])
        at = start + (source.byte() if source.byte() < 192 else source.number(2))
        pieces.append((at, source.take(source.byte() % 12)))
    size = 1 << 20 if source.byte() < 200 else source.number(source.byte() % 4)
    read = sparse_reader(pieces, size)
    assert detect(read(0, PROBE_SIZE)) in {None, *TEMPLATES}
    try:
        found = references(file_format, "image", read, size)
    except FvdError as error:
        assert "\n" not in str(error)
        return False
    assert len({reference.kind for reference in found}) == len(found) <= 2
    for reference in found:
        assert reference.kind in ("backing", "data-file")
        assert reference.name
        assert "\0" not in reference.name
        for where in ("https://h/dir/a", "nbd://h/x", "b"):
            _join(where, reference.name)
        _parse(reference.name)
    return True


def _join(where: str, name: str) -> None:
    base = parse_location(where)
    try:
        joined = join(base, name)
    except FvdError:
        return
    location = _parse(joined)
    if location is not None and joined != name:
        host = "/".join(base.url.split("/")[:3])
        assert within(location.url, host), "a relative name leads to another host"


def _strings(options: object) -> list[str]:
    if isinstance(options, dict):
        return [text for key, value in options.items() for text in (str(key), *_strings(value))]
    return [options] if isinstance(options, str) else []


def _flat(options: object, prefix: str = "") -> dict[str, object]:
    """The options with dotted keys."""
    if not isinstance(options, dict):
        return {prefix: options}
    return {
        inner: found
        for key, value in options.items()
        for inner, found in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }


KEPT = ("export", "user", "target", "lun", "pool", "namespace", "image", "snapshot", "server.path", "path")
"""Options of protocols that must arrive as they were given (but for a first slash)."""


def _compare_with_json(name: str, location: Location) -> None:
    given = _flat(json.loads(name.removeprefix("json:")))
    if location.format:
        given = {key.removeprefix("file."): value for key, value in given.items() if key != "driver"}
    found = _flat(location.protocol)
    for key in KEPT:
        if key in given:
            words = str(given[key]), str(found.get(key, ""))
            if key == "lun":
                words = str(int(words[0])), words[1]
            assert words[0].removeprefix("/") == words[1].removeprefix("/"), f"{key} is {words[1]}"


def _parse(name: str) -> Location | None:
    """The location, or None where it was refused."""
    try:
        location = parse_location(name)
    except FvdError as error:
        assert "\n" not in str(error)
        return None
    check_location(name, location)
    return location


def check_location(name: str, location: Location) -> None:
    """What must hold of a name that was accepted."""
    assert location.name == name
    assert (location.path is None) == bool(location.url) == bool(location.protocol)
    if is_local(name):
        assert location.path == name
    if location.path is not None:
        assert "\0" not in location.path
        location.path.encode("utf-8", "surrogateescape")  # the system takes no other text
        return
    if name.startswith("json:"):
        _compare_with_json(name, location)
    again = parse_location(location.url)
    assert again.url == location.url
    assert again.protocol == location.protocol
    assert within(location.url, location.url)
    assert not any("\0" in text for text in _strings(location.protocol))
    (options,) = blockdevs(Node(location.format or "raw", location), writable=False, node_name="disk")
    assert json.loads(json.dumps(options)) == options
    file = cast(Options, options["file"])
    if file["driver"] == "quorum":
        (file,) = cast(list[Options], file["children"])
    assert file["driver"] in ("nbd", "http", "https", "ftp", "ftps", "ssh", "iscsi", "nfs", "rbd")
    assert location.format in FORMATS or location.format in ("", "fvd")


WORDS = (
    *("nbd://", "nbd+unix:///", "http://", "https://", "ftp://", "ftps://", "ssh://", "iscsi://", "nfs://", "rbd:"),
    *("json:", "file:", "?socket=/", "host", "[::1]", ":10809", "/", "..", "%2e%2E", "%00", "%2F", "@", "#", "?x=1"),
    *('{"driver":', '"nbd"', '"https"', '"ssh"', '"file"', '"filename":', '"host_device"', '"qcow2"', '"raw"', '"rbd"'),
    *('"iscsi"', '"nfs"', '"url":', '"server":{', '"server.host":', '"server.port":', '"server.type":', '"unix"'),
    *('"inet"', '"path":', '"export":', '"user":', '"portal":', '"target":', '"lun":', '"transport":', '"pool":'),
    *('"image":', '"namespace":', '"snapshot":', '"file":{', '"file.driver":', '"file.server.host":', '"h"', '"a/b"'),
    *("}", "}}", ",", "1", "0", "99999", '"\\ud800"', '"\\u0000"', '"\\u00e9"', "\udcff", "é", "\n", "\\", "a", "b"),
    *('"http://h/a"', '"/a"', '"disk"', "me@", "me:pw@", "/target/3", ":id=user", "@snap", "//", ".", "ssh", " "),
)


def _some_name(source: Source) -> str:
    if source.byte() & 1:
        return source.rest().decode("utf-8", "surrogateescape")
    return "".join(source.pick(WORDS) for _ in range(min(source.left, 40)))


def fuzz_formats(data: bytes) -> bool:
    """Headers of other formats, names and joined names."""
    source = Source(data)
    kind = source.byte() % 4
    if kind == 0:
        return _fuzz_references(source)
    if kind == 1:
        raw = source.rest()
        assert detect(raw) in {None, *TEMPLATES}
        for file_format in FORMATS:
            try:
                references(file_format, "image", sparse_reader([(0, raw)], len(raw)), len(raw))
            except FvdError as error:
                assert "\n" not in str(error)
        return True
    name = _some_name(source)
    location = _parse(name)
    if kind == 3:
        for where in ("https://h/dir/a?b", "ssh://me@h/dir/a", "nfs://h/x"):
            _join(where, name)
    return location is not None
