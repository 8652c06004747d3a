"""What block devices stand on, as /sys tells it. Devices are numbers, as of `os.makedev`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def stands_on(device: int) -> tuple[list[int], str]:
    """What a block device stands on directly: other devices, and the file of a loop device (empty: none)."""
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    parts = [f"{folder}/.."] if os.path.exists(f"{folder}/partition") else []
    with contextlib.suppress(OSError):
        parts += [f"{folder}/slaves/{name}" for name in os.listdir(f"{folder}/slaves")]
    devices = []
    for part in parts:
        with contextlib.suppress(OSError, ValueError), open(f"{part}/dev", encoding="ascii") as file:
            major, minor = file.read().strip().split(":")
            devices.append(os.makedev(int(major), int(minor)))
    return devices, _loop_file(folder)


def files_below(device: int) -> Iterator[str]:
    """The files that a block device stands on, itself or by the devices below it."""
    devices = [device]
    for one in devices:
        below, file = stands_on(one)
        if file:
            yield file
        devices += [other for other in below if other not in devices]


def loop_devices() -> Iterator[tuple[str, str]]:
    """The loop devices that show a file, by name, and the files."""
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else ():
        file = _loop_file(f"/sys/block/{name}")
        if file:
            yield f"/dev/{name}", file


def _loop_file(folder: str) -> str:
    try:
        with open(f"{folder}/loop/backing_file", "rb") as file:
            return os.fsdecode(file.read().rstrip(b"\n"))
    except OSError:
        return ""
