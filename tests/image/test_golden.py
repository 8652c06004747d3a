"""Images of the original, through a real mount: what must be read, and what must stay as it is."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import reference
from support.fsx import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from support.golden import MANIFEST, extract
from support.mounts import mounted


def raw_sha256(path: Path) -> tuple[str, int]:
    """Digest and length of what a plain reader gets from a file."""
    digest = hashlib.sha256()
    length = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            length += len(piece)
    return digest.hexdigest(), length


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: hashlib.sha256(path.read_bytes()).digest() for path in folder.iterdir()}


golden = pytest.mark.parametrize("entry", MANIFEST, ids=[entry["name"] for entry in MANIFEST])


@golden
def test_a_golden_image_reads_as_its_manifest_says(entry: dict[str, Any], folder: Path) -> None:
    extract(entry["name"], folder)
    expected = entry["sha256"], entry["virtual_size"]
    before = contents(folder)
    with mounted(folder, "--read-only") as mount:
        assert raw_sha256(mount.raw("disk")) == expected
    assert contents(folder) == before, "a read-only mount has written"

    with mounted(folder) as mount:
        assert raw_sha256(mount.raw("disk")) == expected
        mount.umount()
        header = reference.Header(folder / "disk.fvd")
        if not header.copy_on_read and header.prefetch_start_delay <= 0:
            assert contents(folder) == before, "reading has written"
        mount.mount()
        # A write of what is there already: opens it for writing, with replay where it crashed.
        with open(mount.raw("disk"), "r+b") as disk:
            piece = disk.read(5000)
            disk.seek(0)
            disk.write(piece)
        assert raw_sha256(mount.raw("disk")) == expected
        mount.remount()
        assert raw_sha256(mount.raw("disk")) == expected
    assert reference.check(folder / "disk.fvd") == []
    assert reference.sha256(folder / "disk.fvd") == expected[0]
    assert contents(folder).get("base.raw") == before.get("base.raw"), "the base has been written to"
    shutil.rmtree(folder)


@golden
def test_a_golden_image_gives_space_back(entry: dict[str, Any], folder: Path) -> None:
    """Parts of blocks and of chunks, and long ranges: what is zeroed is, and nothing else; the original can read it."""
    extract(entry["name"], folder)
    before, size, chance = contents(folder), entry["virtual_size"], random.Random(entry["name"])
    content = bytearray(b"".join(reference.read_disk(folder / "disk.fvd")))
    with mounted(folder) as mount:
        for flags in (os.O_RDWR, os.O_RDWR | os.O_DIRECT):
            disk = os.open(mount.raw("disk"), flags)
            for longest in (3, 700, 9000, 100_000, size // 3):
                for mode in (PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE | KEEP_SIZE):
                    start = chance.randrange(size)
                    stop = min(size, start + chance.randrange(1, max(2, longest)))
                    fallocate(disk, mode, start, stop - start)
                    content[start:stop] = bytes(stop - start)
            os.close(disk)
        expected = hashlib.sha256(content).hexdigest(), size
        assert raw_sha256(mount.raw("disk")) == expected
    assert reference.check(folder / "disk.fvd") == []
    assert reference.sha256(folder / "disk.fvd") == expected[0]
    assert contents(folder).get("base.raw") == before.get("base.raw"), "the base has been written to"
    shutil.rmtree(folder)
