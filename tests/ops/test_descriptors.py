"""What an open disk takes of the limit on descriptors, as docs/operations.md has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.mounts import MIB, Mount, mounted, must


def taken(mount: Mount, disk: str) -> int:
    """By how many descriptors the mount has more while the disk is open."""
    before = len(os.listdir(f"/proc/{mount.pid}/fd"))
    with open(mount.raw(disk), "r+b", buffering=0) as file:
        file.write(bytes(4096))
        os.fsync(file.fileno())
        return len(os.listdir(f"/proc/{mount.pid}/fd")) - before


@pytest.mark.parametrize(
    ("layout", "descriptors"),
    [
        pytest.param([], 1, id="flat"),
        pytest.param(["--compact"], 1, id="compact"),
        pytest.param(["--data-file", "auto"], 3, id="data file"),
        pytest.param(["--base", "base.raw", "--base-format", "raw"], 2, id="base"),
    ],
)
def test_an_open_disk_takes_few(folder: Path, layout: list[str], descriptors: int) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "8M", *layout)
    with mounted(folder) as mount:
        assert taken(mount, "a") == descriptors


def test_disks_share_their_base(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    for name in ("a", "b"):
        must("create", folder / f"{name}.fvd", "8M", "--base", "base.raw", "--base-format", "raw")
    with mounted(folder) as mount, open(mount.raw("a"), "rb"):
        assert taken(mount, "b") == 1
