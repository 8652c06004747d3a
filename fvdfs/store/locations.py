"""Where a name leads: to a local file, or through one of QEMU's protocols.

`json:{...}` is turned into the same few forms as a URL, so that there is one list of what is allowed; options that
could make QEMU open anything else on this host are refused. Nothing is opened here.

Errors are `ImageError`s whose image is the name that was given. Pure.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlsplit

from fvdfs.errors import ImageError, UnsupportedFeature
from fvdfs.store.references import FORMATS, REFUSED

Options = dict[str, object]
"""A QAPI `BlockdevOptions`, as JSON."""


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
    def shown(self) -> str:
        """Its name for messages: of the web without what follows the ?, which may let in whoever has it."""
        return self.name.partition("?")[0] if self.protocol.get("driver") in ("http", "https") else self.name

    @property
    def address(self) -> tuple[str, int] | str | None:
        """Where its server listens: host and port, or the path of a socket; None: a file, or not known."""
        parts = urlsplit(self.url)
        if parts.scheme in _UNIX:
            return parse_qs(parts.query)["socket"][0]
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme) or (_NFS_PORT if parts.scheme == "nfs" else None)
        return (parts.hostname, port) if parts.hostname and port else None

    @property
    def tls_user(self) -> str | None:
        """Who we are for a server that is spoken to by TLS, if it asks for a pre-shared key; None: no TLS."""
        return str(self.protocol["tls-creds"]).removeprefix(TLS_PREFIX) if "tls-creds" in self.protocol else None

    @property
    def is_device(self) -> bool:
        """Whether it is an array of bytes of a fixed size, which may hold a former owner's bytes."""
        return self.protocol.get("driver") in ("nbd", "iscsi")


_SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix", "http", "https", "ftp", "ftps", "ssh", "iscsi", "nfs")
_KNOWN = "a path, " + ", ".join(f"{scheme}://" for scheme in _SCHEMES) + ", rbd:pool/image or json:{...}"
_HAS_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_UNSAFE = re.compile(r"[\0-\x20\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PORTAL = re.compile(r"([A-Za-z0-9._%-]+|\[[A-Za-z0-9._:%-]+\])(:[0-9]{1,5})?")
_DEFAULT_PORTS = {
    "nbd": 10809,
    "nbds": 10809,
    "ssh": 22,
    "iscsi": 3260,
    "http": 80,
    "https": 443,
    "ftp": 21,
    "ftps": 990,
}
_NFS_PORT = 2049  # where it listens if all is as usual; QEMU asks the portmapper
_UNIX = ("nbd+unix", "nbds+unix")
CREDENTIALS = "name a file that has them: --credentials FILE, or -o credentials=FILE for a mount"
TLS_PREFIX = "tls-"
"""What the credentials of a user are called, for the daemon."""
_TLS_USER = re.compile(r"[A-Za-z0-9._-]{1,100}")
DEFAULT_TLS_USER = "qemu"
"""Whose pre-shared key is used where a URL names nobody, as QEMU does it."""


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
    return _parse_url(name, match[1].lower())


def _parse_url(name: str, scheme: str) -> Location:
    if scheme not in _SCHEMES:
        raise UnsupportedFeature(name, f"{scheme}:// is not known; known are {_KNOWN}")
    parts, port = _split_url(name)
    if parts.fragment:
        raise ImageError(name, "a URL of an image has no #fragment")
    if parts.password is not None or (parts.username is not None and scheme not in ("ssh", "nbds")):
        raise UnsupportedFeature(name, f"URLs of images have no users and passwords: {CREDENTIALS}")
    if scheme == "nbds" and parts.username is not None and not _TLS_USER.fullmatch(parts.username):
        raise ImageError(name, "the user of a pre-shared key has only letters, digits and . _ -")
    if any(segment in (".", "..") for segment in unquote(parts.path).split("/")):
        raise ImageError(name, '"." and ".." are not allowed in a URL')
    if scheme not in _UNIX:
        if not _HOST.fullmatch(parts.hostname or ""):
            raise ImageError(name, f"the URL needs a host: {scheme}://host/...")
        if port == 0:
            raise ImageError(name, "port 0 cannot be connected to")
    if parts.query and scheme not in (*_UNIX, "http", "https"):
        remedy = f" (user and group: {CREDENTIALS})" if scheme == "nfs" else ""
        raise UnsupportedFeature(name, f"options after ? are not supported for {scheme}://{remedy}")
    protocol, tail = _protocol(name, scheme, parts, port or _DEFAULT_PORTS.get(scheme, 0))
    return Location(name, None, _authority(scheme, parts, port) + tail, protocol, "")


def _split_url(name: str) -> tuple[SplitResult, int | None]:
    """The parts of a URL, and its port."""
    if _UNSAFE.search(name):
        raise ImageError(name, "spaces, backslashes and control characters must be written as %XX in a URL")
    try:
        unquote(name, errors="strict").encode()
        parts = urlsplit(name)
        return parts, parts.port
    except UnicodeError:
        raise ImageError(name, "a URL must be UTF-8") from None
    except ValueError as error:
        raise ImageError(name, f"not a URL: {error}") from None


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
    """QEMU's options for a URL that was checked, and what follows the host in its one spelling."""
    host = parts.hostname or ""
    path = unquote(parts.path)
    if "\0" in path or "\0" in unquote(parts.username or ""):
        raise ImageError(name, "%00 is not allowed in a URL")
    inet: Options = {"host": host, "port": str(port)}
    tail = quote(path, safe="/:")
    match scheme:
        case "nbd" | "nbds":
            server: Options = {"type": "inet", **inet}
            tls = _tls(host, parts.username or DEFAULT_TLS_USER) if scheme == "nbds" else {}
            return _nbd(server, path[1:], tls), "/" + quote(path[1:])
        case "nbd+unix" | "nbds+unix":
            socket = parts.query.removeprefix("socket=")
            if parts.netloc or socket == parts.query or not socket or "&" in socket:
                raise ImageError(name, f"to be written as {scheme}:///EXPORT?socket=PATH")
            socket = unquote(socket)
            if not socket.startswith("/") or "\0" in socket or ".." in socket.split("/"):
                raise ImageError(name, "the socket must be an absolute path without ..")
            server = {"type": "unix", "path": socket}
            tls = _tls("localhost", DEFAULT_TLS_USER) if scheme == "nbds+unix" else {}
            return _nbd(server, path[1:], tls), f"{tail or '/'}?socket={quote(socket)}"
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


def _nbd(server: Options, export: str, tls: Options) -> Options:
    return {"driver": "nbd", "server": server, "export": export, **tls}


def _tls(host: str, user: str) -> Options:
    """`host`: whose certificate it must be."""
    return {"tls-creds": TLS_PREFIX + user, "tls-hostname": host}


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
    return any(_is_within(url, each) for each in (prefix, prefix.replace("%3A", ":")))


def _is_within(url: str, prefix: str) -> bool:
    if not url.startswith(prefix) or not prefix:
        return False
    return len(url) == len(prefix) or prefix[-1] in "/:?" or url[len(prefix)] in "/?"


def join(base: Location, name: str) -> str:
    """A name inside the remote image at `base`, made absolute.

    Raises ImageError where relative names mean nothing.
    """
    if _HAS_SCHEME.match(name) or name.startswith(("json:", "rbd:", "file:", "/")):
        return name
    if base.protocol.get("driver") not in ("http", "https", "ftp", "ftps", "ssh", "nfs"):
        raise ImageError(name, f"a relative name means nothing in {base.name}")
    return base.url.partition("?")[0].rpartition("/")[0] + "/" + _quoted(name, name)


def _quoted(name: str, text: str, safe: str = "/") -> str:
    """Text as a part of a URL; `name` is for the error. Raises ImageError where it is not UTF-8."""
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
    if isinstance(driver, str) and (driver in FORMATS or driver in REFUSED):
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
    server = options.get("server", {})
    if not isinstance(server, dict):
        raise ImageError(name, "server must be {...}")
    given = _Given(name, "", {key: value for key, value in options.items() if key != "server"})
    given_server = _Given(name, "server.", dict(server))
    driver = given.take("driver", "")
    as_url = _AS_URL.get(driver)
    if as_url is None:
        raise UnsupportedFeature(name, f"driver={driver} is not known; known are {_KNOWN}")
    url = as_url(given, given_server)
    for key in (*given.left(), *given_server.left()):
        raise UnsupportedFeature(name, f"{key} is not supported for {driver}")
    return url


class _Given:
    """The options of a protocol or of its server; each that is used is taken out."""

    def __init__(self, name: str, prefix: str, options: Options) -> None:
        self.name = name
        self._prefix = prefix
        self._options = options

    def take(self, key: str, default: str | None = None) -> str:
        value = self._options.pop(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ImageError(self.name, f"{key} is missing" if value is None else f"{key} must be a string")
        return value

    def quoted(self, key: str, default: str | None = None, *, safe: str = "/") -> str:
        """As a part of a URL."""
        return _quoted(self.name, self.take(key, default), safe)

    def path(self) -> str:
        return _quoted(self.name, self.take("path").removeprefix("/"))

    def host_and_port(self, scheme: str) -> str:
        host = self.take("host")
        port = self.take("port", str(_DEFAULT_PORTS.get(scheme, "")))
        if not _HOST.fullmatch(host) or not re.fullmatch("[0-9]{0,5}", port):
            raise ImageError(self.name, "host or port makes no sense")
        return (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")

    def left(self) -> list[str]:
        """What nobody has taken."""
        return [self._prefix + key for key in self._options]


def _file_as_url(given: _Given, _server: _Given) -> str:
    return "file:" + re.sub("^/+", "/", given.take("filename"))


def _web_as_url(driver: str, given: _Given, _server: _Given) -> str:
    url = given.take("url")
    if not url.lower().startswith(driver + "://"):
        raise ImageError(given.name, f"the url is not of {driver}")
    return url


def _nbd_as_url(given: _Given, server: _Given) -> str:
    export = given.quoted("export", "")
    if server.take("type") == "unix":
        return f"nbd+unix:///{export}?socket={server.quoted('path')}"
    return f"nbd://{server.host_and_port('nbd')}/{export}"


def _ssh_as_url(given: _Given, server: _Given) -> str:
    user = given.quoted("user", "", safe="")
    return f"ssh://{user + '@' if user else ''}{server.host_and_port('ssh')}/{given.path()}"


def _nfs_as_url(given: _Given, server: _Given) -> str:
    server.take("type", "inet")
    return f"nfs://{server.host_and_port('nfs')}/{given.path()}"


def _iscsi_as_url(given: _Given, _server: _Given) -> str:
    given.take("transport", "tcp")
    portal, lun = given.take("portal"), given.take("lun", "0")
    if not _PORTAL.fullmatch(portal) or not lun.isdecimal():
        raise ImageError(given.name, "portal or lun makes no sense")
    return f"iscsi://{portal}/{given.quoted('target')}/{lun}"


def _rbd_as_url(given: _Given, _server: _Given) -> str:
    words = [given.take("pool"), given.take("namespace", ""), given.take("image")]
    snapshot, user = given.take("snapshot", ""), given.take("user", "")
    if not words[0] or not words[2] or re.search(r"[/@:\\]", "".join([*words, snapshot, user])):
        raise ImageError(given.name, "its words must not be empty, nor hold any of / @ : \\")
    url = "rbd:" + "/".join(word for word in words if word)
    return url + (f"@{snapshot}" if snapshot else "") + (f":id={user}" if user else "")


_AS_URL: dict[str, Callable[[_Given, _Given], str]] = {
    "file": _file_as_url,
    "host_device": _file_as_url,
    **{driver: functools.partial(_web_as_url, driver) for driver in ("http", "https", "ftp", "ftps")},
    "nbd": _nbd_as_url,
    "ssh": _ssh_as_url,
    "nfs": _nfs_as_url,
    "iscsi": _iscsi_as_url,
    "rbd": _rbd_as_url,
}
"""By driver: what makes a URL of the options of a protocol and of its server."""
