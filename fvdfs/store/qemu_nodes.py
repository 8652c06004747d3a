"""What QEMU is told to open, as `BlockdevOptions`.

Files are open and locked already, and named by their descriptors. The backing file and the data file are always given,
even if as "none", so that QEMU follows no name by itself. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvdfs.store.locations import TLS_PREFIX, Location, Options

SECRET_ID = "secret"
"""What an encrypted image calls its passphrase, for the daemon."""
TLS_FILES = ("ca-cert.pem", "keys.psk")
"""What a folder with credentials has, as QEMU names it: certificates, or pre-shared keys."""


NO_CREDENTIALS = (
    "is spoken to by TLS: name the folder with certificates or keys: --tls-creds DIR, or -o tls_creds=DIR for a mount"
)


def tls_object(credentials: str, user: str) -> Options:
    """What the options of a `Location` with this `tls_user` refer to. `credentials`: the path of one of `TLS_FILES`."""
    found = _tls_object(TLS_PREFIX + user, credentials, "client")
    return found | {"username": user} if credentials.endswith(TLS_FILES[1]) else found


def server_tls(name: str, credentials: str) -> Options:
    """What a server refers to by this name: it lets in clients with a certificate of its authority, or with a key."""
    return _tls_object(name, credentials, "server")


def _tls_object(name: str, credentials: str, endpoint: str) -> Options:
    folder, _, file = credentials.rpartition("/")
    common: Options = {"id": name, "dir": folder or "/", "endpoint": endpoint}
    if file == TLS_FILES[1]:
        return {"qom-type": "tls-creds-psk", **common}
    return {"qom-type": "tls-creds-x509", "verify-peer": True, **common}


@dataclass(frozen=True, slots=True)
class Node:
    """An image that has been judged, with all that it stands on."""

    format: str
    location: Location
    fd: int = -1
    """The descriptor of a local file, or of a connection, the same number in the daemon.

    To an NBD server; for a file on the web to us (`nbd_giver`).
    """
    is_device: bool = False
    """Whether the local file is a block device."""
    backing: Node | None = None
    data_file: Node | None = None
    path: str = ""
    """Of a local file."""
    secret: str = SECRET_ID
    """What its passphrase is called, for the daemon."""

    @property
    def is_plain_nbd(self) -> bool:
        """Whether it is a raw disk on an NBD server that is spoken to without TLS."""
        return self.format == "raw" and self.location.protocol.get("driver") == "nbd" and self.location.tls_user is None

    @property
    def is_plain_web(self) -> bool:
        """Whether it is a raw disk on a web server."""
        return self.format == "raw" and self.location.protocol.get("driver") in ("http", "https")


def blockdevs(node: Node, *, writable: bool, node_name: str) -> list[Options]:
    """The `BlockdevOptions` of an image, after those of its backing files, which are read only in any case.

    Backing files are nodes of their own: QEMU would take one inside the image's for a change of what the image names.
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
    if node.fd >= 0 and file.get("driver") in ("http", "https"):
        file = {"driver": "nbd", "server": {"type": "fd", "str": str(node.fd)}, "export": ""}
    elif node.fd >= 0 and file.get("driver") == "nbd":
        file["server"] = {"type": "fd", "str": str(node.fd)}
    elif node.fd >= 0:
        driver = "host_device" if node.is_device else "file"
        # Who opened it holds QEMU's locks; another opening's would exclude it.
        file = {"driver": driver, "filename": f"/proc/self/fd/{node.fd}", "locking": "off"}
    file |= common
    if node.location.is_device and not writable:
        # QEMU's export takes for a hole also what a server has not stored and does not call zeros (NBD_STATE_HOLE
        # alone). A quorum, here of one, tells zeros from all else, and nothing else.
        file = {"driver": "quorum", "children": [file], "vote-threshold": 1, "read-pattern": "fifo", **common}
    result: Options = {"driver": node.format, "file": file, **common}
    if node.format in _WITH_BACKING:
        result["backing"] = None
        if node.backing is not None:
            backing = _blockdev(node.backing, False, found)
            result["backing"] = backing["node-name"] = f"backing{len(found)}"
            found.append(backing)
    if node.format == "luks":
        result["key-secret"] = node.secret
    if node.data_file is not None:
        result["data-file"] = _blockdev(node.data_file, writable, found)
    return result
