"""Who we are for servers, and what encrypted images are opened by: a file that the user names.

    [ssh://backup.example/]
    user = images
    key = id_ed25519
    known_hosts = known_hosts

A section is for all URLs under its prefix, or all images under its path; of several the longest counts, alone. Paths
start at the folder of the file. No value is a secret: those lie in files of their own, which only their owner may read.
Images name neither. Pure.
"""

from __future__ import annotations

import configparser
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fvdfs.store.locations import within

_OF_WEB = ("user", "password_file", "cookie_file", "access_key", "secret_key_file", "region", "ca")
_KEYS = {
    "http": _OF_WEB[:-1],
    "https": _OF_WEB,
    "ftp": ("user", "password_file"),
    "ftps": ("user", "password_file"),
    "ssh": ("user", "key", "known_hosts"),
    "iscsi": ("user", "password_file", "initiator"),
    "rbd": ("user", "keyring", "conf"),
    "nfs": ("user", "group"),
    "nbd": (),
    "nbds": (),
    "": (),
}
"""By scheme, what a section can say; of a path the scheme is empty."""
_OF_ANY = ("passphrase_file",)
SECRET_FILES = ("password_file", "secret_key_file", "cookie_file", "passphrase_file", "key", "keyring")
"""What names a file that only its owner may read."""
FILES = (*SECRET_FILES, "known_hosts", "ca", "conf")
"""What names a file."""
_NEEDS = {"password_file": "user", "secret_key_file": "access_key", "access_key": "secret_key_file"}
"""What makes no sense without another."""
_NUMBER = re.compile("[0-9]{1,9}")
_USER = re.compile("(?<=://)[^/@?]*@")


@dataclass(frozen=True, slots=True)
class Section:
    """What is known for one prefix. Values of `FILES` are absolute paths."""

    prefix: str
    values: dict[str, str]

    def get(self, key: str) -> str:
        """A value; empty where there is none."""
        return self.values.get(key, "")


NOTHING = Section("", {})


@dataclass(frozen=True, slots=True)
class Credentials:
    """All sections of a file."""

    sections: tuple[Section, ...] = ()

    def of(self, place: str) -> Section:
        """What is known for a `Location.url`, or for an absolute path."""
        places = (place, _USER.sub("", place, count=1))
        found = [section for section in self.sections if any(within(each, section.prefix) for each in places)]
        return max(found, key=lambda section: len(section.prefix), default=NOTHING)


def parse(text: str, folder: str) -> Credentials:
    """What a file in `folder`, an absolute path, says. Raises ValueError, in one line that says where."""
    parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#", ";"), default_section="")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise ValueError(_told(error)) from None
    return Credentials(tuple(_section(prefix, dict(parser[prefix]), folder) for prefix in parser.sections()))


def _told(error: configparser.Error) -> str:
    """Where a file cannot be read: not what stands there, which may be a secret."""
    if isinstance(error, configparser.DuplicateSectionError):
        return f"line {error.lineno}: [{error.section}] is there twice"
    if isinstance(error, configparser.DuplicateOptionError):
        return f"line {error.lineno}: [{error.section}]: {error.option} is there twice"
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"line {error.lineno}: begin with a [section], such as [ssh://host/]"
    numbers = [number for number, _ in error.errors] if isinstance(error, configparser.ParsingError) else []
    return f"line {numbers[0] if numbers else '?'}: must be NAME = VALUE"


def _section(prefix: str, values: dict[str, str], folder: str) -> Section:
    scheme = _scheme(prefix)
    known = (*_KEYS[scheme], *_OF_ANY)
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"[{prefix}]: {key} is not known there; known are {', '.join(known)}")
        if not value:
            raise ValueError(f"[{prefix}]: {key} needs a value")
        if key in _NEEDS and _NEEDS[key] not in values:
            raise ValueError(f"[{prefix}]: {key} needs {_NEEDS[key]}, too")
        if scheme == "nfs" and key in ("user", "group") and not _NUMBER.fullmatch(value):
            raise ValueError(f"[{prefix}]: {key} must be a number, as NFS has them (see id)")
        if key in FILES and not value.startswith("/"):
            values[key] = f"{folder.rstrip('/')}/{value}"
    return Section(prefix, values)


def _scheme(prefix: str) -> str:
    """Of a prefix; raises ValueError where that is none."""
    if prefix.startswith("/"):
        return ""
    found = re.match("([a-z]+)(?:[+]unix)?://|rbd:", prefix)
    scheme = (found[1] or "rbd") if found else "?"
    if scheme not in _KEYS:
        raise ValueError(f"[{prefix}]: is no beginning of a URL, such as ssh://host/, nor a path, such as /srv/images/")
    if scheme != "rbd" and "@" in urlsplit(prefix).netloc:
        raise ValueError(f"[{_scheme_and_host(prefix)}]: write no user there, but user = NAME")
    return scheme


def _scheme_and_host(prefix: str) -> str:
    """Without what may be a password."""
    parts = urlsplit(prefix)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def key_of_keyring(text: str, user: str) -> str:
    """The key of a Ceph user in a keyring, in base64; empty where it has none. Raises ValueError."""
    parser = configparser.RawConfigParser(strict=False)
    try:
        parser.read_string(text)
    except configparser.Error:
        raise ValueError("is no keyring of Ceph") from None
    return parser.get(f"client.{user}", "key", fallback="").strip()


_KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp521", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp256", "ssh-rsa")
"""Keys of hosts as libssh likes them, the best first: which of its keys a host shows."""


def host_key(lines: str) -> str:
    """Of a host's lines of a file of known hosts, the key that it will show, in base64; empty where there is none."""
    found: dict[str, str] = {}
    for line in lines.splitlines():
        words = line.split()
        if len(words) >= 3 and not line.startswith(("#", "@")):
            found.setdefault(words[1], words[2])
    return next((found[kind] for kind in _KINDS if kind in found), "")
