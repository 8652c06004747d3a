"""SEEK_DATA, SEEK_HOLE and fallocate at the end of a disk, which the kernel may know better than fvdfs."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import fsx
from support.fsx import seek
from support.mounts import MIB, mounted, must

MODES = ("writeback=on", "writeback=off")


@contextmanager
def opened(folder: Path, mode: str, flags: int = os.O_RDWR, *options: str) -> Iterator[int]:
    """A disk of 4 MiB that is a hole."""
    must("create", folder / "a.fvd", "4M", *options)
    with mounted(folder, "-o", mode) as mount:
        descriptor = os.open(mount.raw("a"), flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("mode", MODES)
def test_a_write_past_the_end_has_moved_it(folder: Path, mode: str) -> None:
    with opened(folder, mode) as disk:
        os.pwrite(disk, b"x" * 1000, 5 * MIB)
        assert seek(disk, 5 * MIB + 999, os.SEEK_DATA) == 5 * MIB + 999
        assert seek(disk, 5 * MIB, os.SEEK_HOLE) == 5 * MIB + 1000
        for what in (os.SEEK_DATA, os.SEEK_HOLE):
            assert seek(disk, 5 * MIB + 1000, what) is None


def test_an_allocation_that_is_refused_does_not_move_the_end(folder: Path) -> None:
    with opened(folder, MODES[1], os.O_RDWR, "--data-file", "a.qcow2", "--data-format", "qcow2") as disk:
        for offset in (0, 4 * MIB):
            with pytest.raises(OSError) as caught:
                fsx.fallocate(disk, 0, offset, 5 * MIB)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert os.fstat(disk).st_size == 4 * MIB
    assert json.loads(must("info", folder / "a.fvd", "--json"))["virtual_size"] == 4 * MIB
