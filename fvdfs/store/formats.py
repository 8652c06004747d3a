"""Other image formats and protocols: what a name means, what an image refers to, what to ask of QEMU.

Everything here decides, nothing opens anything. Three questions are answered:

* `parse_location`: where does a name lead? To a local file, or through one of QEMU's protocols. A
  name written as `json:{...}` is turned into the same few forms, so that there is one list of what is
  allowed; every option that could make QEMU open something else of this host is refused.
* `references`: what else would QEMU open for this image? Names inside an image are an attacker's
  words, so they are found here, before QEMU sees the image, by a reader that trusts no offset and no
  length, and each is judged as any name is. A format whose references cannot be seen is not opened.
* `blockdev`: the words for QEMU. Every file is one that is open already, named by its descriptor, and locked; the
  backing file and the data file are always given, be it as "none", so QEMU follows no name by itself.

Sizes and offsets are in bytes. Errors are `ImageError`s whose image is the name that was given.
"""

from __future__ import annotations

import json
import re
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import SplitResult, quote, unquote, urlsplit

from fvdfs.errors import FormatError, ImageError, UnsupportedFeature

Options = dict[str, object]
"""A QAPI `BlockdevOptions`, as JSON."""

Reader = Callable[[int, int], bytes]
"""Reads (offset, length) of an image; fewer bytes where it ends before. Lengths are at most `MAX_READ`."""

RAW = "raw"
PROBE_SIZE = 512
MAX_READ = 2 << 20
SECRET_ID = "secret"
"""What an encrypted image calls its passphrase, for the daemon."""

_MAGICS = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
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


# ---- Locations ----


@dataclass(frozen=True, slots=True)
class Location:
    """Where a name leads: to the local `path`, or to `url` through QEMU's `protocol`."""

    name: str
    """As it was written."""
    path: str | None
    """The path of a local file, as written: perhaps relative. None: not a local file."""
    url: str
    """One spelling for all ways to write the same URL; empty for a local file."""
    protocol: Options
    """What QEMU is to open; empty for a local file."""
    format: str
    """The format that a `json:` name states; empty where none is stated."""

    @property
    def is_device(self) -> bool:
        """Whether it is an array of bytes of a fixed size, which may hold a former owner's bytes."""
        return self.protocol.get("driver") in ("nbd", "iscsi")


_SCHEMES = ("nbd", "nbd+unix", "http", "https", "ftp", "ftps", "ssh", "iscsi", "nfs")
_KNOWN = "a path, " + ", ".join(f"{scheme}://" for scheme in _SCHEMES) + ", rbd:pool/image or json:{...}"
_HAS_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_UNSAFE = re.compile(r"[\0-\x20\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PORTAL = re.compile(r"([A-Za-z0-9._%-]+|\[[A-Za-z0-9._:%-]+\])(:[0-9]{1,5})?")
_DEFAULT_PORTS = {"nbd": 10809, "ssh": 22, "iscsi": 3260, "http": 80, "https": 443, "ftp": 21, "ftps": 990}


def parse_location(name: str) -> Location:
    """What a name in an image or from a user means.

    Raises ImageError where it makes no sense, UnsupportedFeature for what is not known or not allowed.
    """
    if not name or "\0" in name:
        raise ImageError(name.replace("\0", "\\0"), "not a name of a file")
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # from "\ud800" in json:{...}
        raise ImageError(name.encode("utf-8", "backslashreplace").decode(), "not a name of a file") from None
    if name.startswith("json:"):
        return _parse_json(name)
    if name.startswith("rbd:"):
        return _parse_rbd(name)
    match = _HAS_SCHEME.match(name)
    if match is None:
        return Location(name, name.removeprefix("file:"), "", {}, "")
    scheme = match[1].lower()
    if scheme not in _SCHEMES:
        raise UnsupportedFeature(name, f"{scheme}:// is not known; known are {_KNOWN}")
    if _UNSAFE.search(name):
        raise ImageError(name, "spaces, backslashes and control characters must be written as %XX in a URL")
    try:
        unquote(name, errors="strict").encode()
        parts = urlsplit(name)
        port = parts.port
    except UnicodeError:
        raise ImageError(name, "a URL must be UTF-8") from None
    except ValueError as error:
        raise ImageError(name, f"not a URL: {error}") from None
    if parts.fragment:
        raise ImageError(name, "a URL of an image has no #fragment")
    if parts.password is not None or (parts.username is not None and scheme != "ssh"):
        raise UnsupportedFeature(name, "user names and passwords in URLs are not supported (but ssh://user@host)")
    if any(segment in (".", "..") for segment in unquote(parts.path).split("/")):
        raise ImageError(name, '"." and ".." are not allowed in a URL')
    if scheme != "nbd+unix":
        host = parts.hostname or ""
        if not _HOST.fullmatch(host):
            raise ImageError(name, f"the URL needs a host: {scheme}://host/...")
        if port == 0:
            raise ImageError(name, "port 0 cannot be connected to")
    if parts.query and scheme not in ("nbd+unix", "http", "https"):
        raise UnsupportedFeature(name, f"options after ? are not supported for {scheme}://")
    protocol, tail = _protocol(name, scheme, parts, port or _DEFAULT_PORTS.get(scheme, 0))
    return Location(name, None, _authority(scheme, parts, port) + tail, protocol, "")


def is_local(name: str) -> bool:
    """Whether a name is a plain path of this host."""
    return not (name.startswith(("json:", "rbd:", "file:")) or _HAS_SCHEME.match(name))


def _authority(scheme: str, parts: SplitResult, port: int | None) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    user = f"{parts.username}@" if parts.username is not None else ""
    number = f":{port}" if port is not None and port != _DEFAULT_PORTS.get(scheme) else ""
    return f"{scheme}://{user}{host}{number}"


def _protocol(name: str, scheme: str, parts: SplitResult, port: int) -> tuple[Options, str]:
    """QEMU's options for a URL whose parts are sane, and what follows the host in its one spelling."""
    host = parts.hostname or ""
    path = unquote(parts.path)
    if "\0" in path or "\0" in unquote(parts.username or ""):
        raise ImageError(name, "%00 is not allowed in a URL")
    inet: Options = {"host": host, "port": str(port)}
    tail = quote(path)
    match scheme:
        case "nbd":
            server: Options = {"type": "inet", **inet}
            return _nbd(server, path[1:]), "/" + quote(path[1:])
        case "nbd+unix":
            socket = parts.query.removeprefix("socket=")
            if parts.netloc or socket == parts.query or not socket or "&" in socket:
                raise ImageError(name, "to be written as nbd+unix:///EXPORT?socket=PATH")
            socket = unquote(socket)
            if not socket.startswith("/") or "\0" in socket or ".." in socket.split("/"):
                raise ImageError(name, "the socket must be an absolute path without ..")
            server = {"type": "unix", "path": socket}
            return _nbd(server, path[1:]), f"{tail or '/'}?socket={quote(socket)}"
        case "ssh":
            if not path.strip("/"):
                raise ImageError(name, "the URL needs a path: ssh://[user@]host/path")
            user: Options = {"user": unquote(parts.username)} if parts.username else {}
            return {"driver": "ssh", "server": inet, "path": path, **user}, tail
        case "iscsi":
            target, _, lun = path[1:].rpartition("/")
            if not target or not re.fullmatch("[0-9]{1,5}", lun):
                raise ImageError(name, "to be written as iscsi://HOST[:PORT]/TARGET/LUN")
            portal = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            return {
                "driver": "iscsi",
                "transport": "tcp",
                "portal": portal,
                "target": target,
                "lun": int(lun),
            }, tail
        case "nfs":
            if parts.port is not None or not path.strip("/"):
                raise ImageError(name, "to be written as nfs://HOST/PATH, without a port")
            return {"driver": "nfs", "server": {"type": "inet", "host": host}, "path": path}, tail
        case _:
            tail = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            return {"driver": scheme, "url": _authority(scheme, parts, parts.port) + tail}, tail


def _nbd(server: Options, export: str) -> Options:
    return {"driver": "nbd", "server": server, "export": export}


_RBD = re.compile(r"rbd:([^/@:\\]+)/(?:([^/@:\\]+)/)?([^/@:\\]+)(?:@([^/@:\\]+))?(?::id=([^/@:=\\]+))?")


def _parse_rbd(name: str) -> Location:
    match = _RBD.fullmatch(name)
    if match is None:
        raise UnsupportedFeature(
            name, "only rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT][:id=USER] is supported, the rest is read from ceph.conf"
        )
    keys = ("pool", "namespace", "image", "snapshot", "user")
    values: Options = {key: value for key, value in zip(keys, match.groups(), strict=True) if value is not None}
    return Location(name, None, name, {"driver": "rbd", **values}, "")


def within(url: str, prefix: str) -> bool:
    """Whether a `Location.url` lies under `prefix`, itself a URL, by whole parts: https://a.b is not under https://a."""
    if not url.startswith(prefix) or not prefix:
        return False
    return len(url) == len(prefix) or prefix[-1] in "/:?" or url[len(prefix)] in "/?"


def join(base: Location, name: str) -> str:
    """A name inside the remote image at `base`, as a name that stands for itself.

    Raises ImageError where relative names mean nothing.
    """
    if _HAS_SCHEME.match(name) or name.startswith(("json:", "rbd:", "file:", "/")):
        return name
    if base.protocol.get("driver") not in ("http", "https", "ftp", "ftps", "ssh", "nfs"):
        raise ImageError(name, f"a relative name means nothing in {base.name}")
    return base.url.partition("?")[0].rpartition("/")[0] + "/" + _quoted(name, name)


def _quoted(name: str, text: str, safe: str = "/") -> str:
    """Text as a part of a URL; `name`: what it comes from. Raises ImageError where no URL can say it."""
    try:
        return quote(text, safe=safe)
    except UnicodeEncodeError:
        raise ImageError(name, "a URL must be UTF-8") from None


def _parse_json(name: str) -> Location:
    try:
        options = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError) as error:
        raise ImageError(name, f"not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ImageError(name, "json: must be followed by {...}")
    options = _unflatten(name, options)
    file_format = ""
    driver = options.get("driver")
    if isinstance(driver, str) and (driver in FORMATS or driver in _REFUSED):
        file_format = driver
        inner = options.pop("file", None)
        if set(options) != {"driver"} or not isinstance(inner, dict):
            raise UnsupportedFeature(name, f"only driver and file={{...}} can be given for {driver}")
        options = inner
    found = parse_location(_as_url(name, options))
    return Location(name, found.path, found.url, found.protocol, file_format)


def _unflatten(name: str, options: Mapping[str, object]) -> Options:
    """{"file.driver": x} as {"file": {"driver": x}}."""
    result: Options = {}
    for key, value in options.items():
        *parents, last = key.split(".")
        if len(parents) > 8:
            raise ImageError(name, f"{key}: too deep")
        at = result
        for parent in parents:
            inner = at.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ImageError(name, f"{key}: {parent} is given twice")
            at = inner
        if last in at:
            raise ImageError(name, f"{key} is given twice")
        at[last] = dict(value) if isinstance(value, dict) else value
    return result


def _as_url(name: str, options: Options) -> str:
    """The URL or path that says the same as the options of a protocol; refuses all that have none."""
    left = dict(options)

    def take(key: str, default: str | None = None, source: Options = left) -> str:
        value = source.pop(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ImageError(name, f"{key} is missing" if value is None else f"{key} must be a string")
        return value

    def host_and_port(scheme: str, source: Options) -> str:
        host = take("host", None, source)
        port = take("port", str(_DEFAULT_PORTS.get(scheme, "")), source)
        if not _HOST.fullmatch(host) or not re.fullmatch("[0-9]{0,5}", port):
            raise ImageError(name, "host or port makes no sense")
        return (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")

    def escaped(text: str) -> str:
        return _quoted(name, text)

    server = left.pop("server", {})
    if not isinstance(server, dict):
        raise ImageError(name, "server must be {...}")
    server = dict(server)
    driver = take("driver", "")
    match driver:
        case "file" | "host_device":
            url = "file:" + re.sub("^/+", "/", take("filename"))
        case "http" | "https" | "ftp" | "ftps":
            url = take("url")
            if not url.lower().startswith(driver + "://"):
                raise ImageError(name, f"the url is not of {driver}")
        case "nbd":
            export = escaped(take("export", ""))
            if take("type", None, server) == "unix":
                url = f"nbd+unix:///{export}?socket={escaped(take('path', None, server))}"
            else:
                url = f"nbd://{host_and_port('nbd', server)}/{export}"
        case "ssh":
            user = take("user", "")
            url = f"ssh://{_quoted(name, user, '') + '@' if user else ''}{host_and_port('ssh', server)}"
            url += "/" + escaped(take("path").removeprefix("/"))
        case "nfs":
            take("type", "inet", server)
            url = f"nfs://{host_and_port('nfs', server)}/{escaped(take('path').removeprefix('/'))}"
        case "iscsi":
            take("transport", "tcp")
            portal, lun = take("portal"), take("lun", "0")
            if not _PORTAL.fullmatch(portal) or not lun.isdecimal():
                raise ImageError(name, "portal or lun makes no sense")
            url = f"iscsi://{portal}/{escaped(take('target'))}/{lun}"
        case "rbd":
            words = [take("pool"), take("namespace", ""), take("image")]
            snapshot, user = take("snapshot", ""), take("user", "")
            if not words[0] or not words[2] or re.search(r"[/@:\\]", "".join([*words, snapshot, user])):
                raise ImageError(name, "its words must not be empty, nor hold any of / @ : \\")
            url = "rbd:" + "/".join(word for word in words if word)
            url += (f"@{snapshot}" if snapshot else "") + (f":id={user}" if user else "")
        case _:
            raise UnsupportedFeature(name, f"driver={driver} is not known; known are {_KNOWN}")
    for key in (*left, *(f"server.{key}" for key in server)):
        raise UnsupportedFeature(name, f"{key} is not supported for {driver}")
    return url


# ---- References ----


@dataclass(frozen=True, slots=True)
class Reference:
    """A name inside an image that its user must open too."""

    kind: str
    """`backing` or `data-file`."""
    name: str
    """As it is written there: perhaps relative to where the image is."""
    format: str
    """What the image says about its format; empty where it says nothing."""


_REFUSED = {
    "fvd": "an FVD image can be the base of FVD images only",
}


def references(file_format: str, name: str, read: Reader, size: int) -> list[Reference]:
    """What the image `name` of this format and size refers to: at most one reference of each kind.

    Raises UnsupportedFeature where the format is not known, or the image uses something of it that is
    not supported; FormatError where its header makes no sense. Errors of `read` pass.
    """
    if file_format in _REFUSED:
        raise UnsupportedFeature(name, f"format {file_format}: {_REFUSED[file_format]}")
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
    backing_format, data_file = b"", b""
    at = header_length
    for _ in range(_QCOW2_EXTENSIONS):
        if stop - at < 8:
            break
        kind, length = struct.unpack_from(">II", cluster, at)
        if kind == 0:
            break
        if length > stop - at - 8:
            raise FormatError(name, f"header extension {kind:#x} is {length} bytes long, more than there are")
        value = cluster[at + 8 : at + 8 + length]
        if kind == _QCOW2_BACKING_FORMAT:
            backing_format = value
        elif kind == _QCOW2_DATA_FILE:
            data_file = value
        at += 8 + (length + 7) // 8 * 8
    else:
        raise FormatError(name, f"it has more than {_QCOW2_EXTENSIONS} header extensions")
    found = []
    if backing_at and backing_size:
        raw = cluster[backing_at : backing_at + backing_size]
        words = backing_format.rstrip(b"\0").decode("ascii", "backslashreplace")
        found.append(Reference("backing", _text(name, "backing file", raw, backing_size), words))
    if features & _QCOW2_EXTERNAL_DATA:
        found.append(Reference("data-file", _text(name, "data file", data_file, len(data_file)), RAW))
    return found


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
    if detect(first) != "luks":
        _wrong_magic(name, "luks", first)
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
    "luks": _luks,
}

BASE_FORMATS = ("fvd", *sorted(FORMATS))
"""What a base can be."""
"""The formats that are opened, with what finds their references."""


# ---- Words for QEMU ----


@dataclass(frozen=True, slots=True)
class Node:
    """An image that has been judged, with all that it stands on."""

    format: str
    location: Location
    fd: int = -1
    """The descriptor of a local file, the same number in the daemon."""
    is_device: bool = False
    """Whether the local file is a block device."""
    backing: Node | None = None
    data_file: Node | None = None


def blockdevs(node: Node, *, writable: bool, node_name: str) -> list[Options]:
    """The `BlockdevOptions` of an image, after those of its backing files, which are read only in any case.

    These are nodes of their own: QEMU would take what stands inside another for a change of what the image names.
    """
    found: list[Options] = []
    top = _blockdev(node, writable, found)
    top["node-name"] = node_name
    return [*found, top]


_WITH_BACKING = ("qcow2", "qcow", "qed", "vmdk")


def _blockdev(node: Node, writable: bool, found: list[Options]) -> Options:
    """One node; those that it refers to go to `found`."""
    common: Options = {"read-only": not writable, "discard": "unmap"}
    file: Options = dict(node.location.protocol)
    if node.fd >= 0:
        driver = "host_device" if node.is_device else "file"
        # Who opened it holds QEMU's locks; another opening's would exclude it.
        file = {"driver": driver, "filename": f"/proc/self/fd/{node.fd}", "locking": "off"}
    result: Options = {"driver": node.format, "file": {**file, **common}, **common}
    if node.format in _WITH_BACKING:
        result["backing"] = None
        if node.backing is not None:
            backing = _blockdev(node.backing, False, found)
            result["backing"] = backing["node-name"] = f"backing{len(found)}"
            found.append(backing)
    if node.format == "luks":
        result["key-secret"] = SECRET_ID
    if node.data_file is not None:
        result["data-file"] = _blockdev(node.data_file, writable, found)
    return result
