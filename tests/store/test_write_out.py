"""Writing out early keeps no failure from the flush that has to tell of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fvdfs.store.base import FlushError
from fvdfs.store.host import open_path
from support.devices import loop_device, small_disk
from support.mounts import MIB


async def test_the_failure_of_a_write_out_is_left_to_the_flush(tmp_path: Path) -> None:
    """Linux tells each opening of a failed write-back once; sync_file_range(2) counts."""
    with small_disk(tmp_path / "small", "1M"):
        backing = tmp_path / "small" / "backing"
        backing.touch()
        os.truncate(backing, 8 * MIB)
        with loop_device(backing) as device:
            file = open_path(str(device), writable=True)
            try:
                await file.pwrite(os.urandom(4 * MIB), 0)
                await file.write_out(0, 4 * MIB)
                with pytest.raises(FlushError):
                    await file.flush()
            finally:
                await file.aclose()
