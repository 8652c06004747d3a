"""What is mounted where, as the kernel lists it (/proc/PID/mountinfo)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MountPoint:
    """A line of mountinfo, as far as it matters here."""

    number: int
    parent: int
    device: int
    path: str
    fs_type: str
    source: str
    options: str
    """Those of the file system."""

    @property
    def is_ours(self) -> bool:
        """Whether fvdfs serves it."""
        return self.fs_type == "fuse.fvdfs"

    def owner(self, option: str) -> int:
        """The "user_id" or "group_id" of who mounted a FUSE file system; 0 where it says none."""
        return int(dict(word.partition("=")[::2] for word in self.options.split(",")).get(option, "0"))


def mount_points(process: str = "self") -> list[MountPoint]:
    """All that a process can see; the last of those on one path is the one that shows. Raises OSError."""
    found = []
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for line in file:
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, rest = before.split(" "), after.split(" ")
            major, minor = fields[2].split(":")
            device = os.makedev(int(major), int(minor))
            source, options = [*rest, "", ""][1:3]
            number, parent = int(fields[0]), int(fields[1])
            found.append(
                MountPoint(number, parent, device, _plain(fields[4]), rest[0], _plain(source), _plain(options))
            )
    return found


def _plain(text: str) -> str:
    """A field of mountinfo, where blanks and backslashes are three octal digits."""
    if "\\" not in text:
        return text
    data = text.encode("utf-8", "surrogateescape")
    parts = data.split(b"\\")
    plain = parts[0] + b"".join(
        bytes([int(part[:3], 8)]) + part[3:] if part[:3].isdigit() else b"\\" + part for part in parts[1:]
    )
    return plain.decode("utf-8", "surrogateescape")


def layers(point: MountPoint) -> Iterator[str]:
    """The paths that a file system shows other files, or bytes, of."""
    if point.source.startswith("/"):
        yield point.source
    if point.fs_type == "overlay":
        for option in point.options.split(","):
            name, _, value = option.partition("=")
            if name in ("lowerdir", "lowerdir+", "upperdir", "datadir+"):
                yield from (path for path in value.split(":") if path.startswith("/"))
