"""Overlays in qcow2 as fvdfs lays them out, for QEMU and for its own reader, and that reader on what makes no sense."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from fvdfs.errors import FormatError, UnsupportedFeature, UsageError
from fvdfs.format.qcow2 import CLUSTER, Overlay, Part, Placed, read_overlay
from support.mounts import MIB

TABLE = CLUSTER // 8 * CLUSTER  # bytes of a disk that an L2 table is about


def random_parts(source: random.Random, size: int) -> list[Part]:
    parts: list[Part] = []
    at = 0
    while len(parts) < 20:
        start = at + source.randrange(8) * CLUSTER
        if start >= size:
            break
        stop = min(start + source.choice((1, 2, 5, 3000)) * CLUSTER, size)
        parts.append((start, stop, source.random() < 0.6))
        at = stop + source.choice((0, 1, 9000)) * CLUSTER
    return parts


def joined(places: Iterable[Placed]) -> list[Placed]:
    """With those that go on from each other as one."""
    found: list[Placed] = []
    for start, stop, where in places:
        if found and found[-1][1] == start:
            begin, _, place = found[-1]
            if where == (None if place is None else place + start - begin):
                found[-1] = begin, stop, place
                continue
        found.append((start, stop, where))
    return found


def held(overlay: Overlay) -> bytearray:
    """The file, without data."""
    data = bytearray(overlay.file_size)
    for offset, part in overlay.metadata():
        data[offset : offset + len(part)] = part
    return data


@pytest.mark.parametrize("seed", range(12))
def test_qemu_reads_what_was_laid_out(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    size = source.choice((MIB, MIB + 512, 700 * MIB, 5 << 30))
    base, expected = tmp_path / "base.raw", tmp_path / "expected.raw"
    base.write_bytes(source.randbytes(MIB))
    expected.write_bytes(base.read_bytes())
    overlay = Overlay(size, random_parts(source, size), "base.raw", "raw", ((0x46564458, b"a note"),))
    with open(tmp_path / "new.qcow2", "wb") as file, open(expected, "r+b") as disk:
        file.truncate(overlay.file_size)
        disk.truncate(size)
        for offset, part in overlay.metadata():
            file.seek(offset)
            file.write(part)
        for start, stop, where in overlay.places():
            disk.seek(start)
            disk.write(bytes(max(0, min(stop, MIB) - start)))  # behind that the base has nothing
            if where is not None:
                for at in range(start, stop, CLUSTER):  # the rest of each cluster is a hole
                    data = source.randbytes(512)
                    for target, place in ((disk, at), (file, where + at - start)):
                        target.seek(place)
                        target.write(data)
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "new.qcow2"], check=True)
    subprocess.run(["qemu-img", "compare", "-q", "-F", "raw", tmp_path / "new.qcow2", expected], check=True)
    with open(tmp_path / "new.qcow2", "rb") as file:
        found = read_overlay(
            "new.qcow2", lambda offset, length: os.pread(file.fileno(), length, offset), overlay.file_size
        )
    assert (found.size, found.places) == (size, joined(overlay.places()))
    assert found.extensions[0x46564458] == b"a note"


def read(data: bytes) -> list[Placed]:
    return list(read_overlay("x", lambda offset, length: data[offset : offset + length], len(data)).places)


def test_what_makes_no_sense_is_refused() -> None:
    good = held(Overlay(TABLE + CLUSTER, [(0, CLUSTER, True), (TABLE, TABLE + CLUSTER, False)], "b", "raw"))
    good[-1:] = b"\0"
    l1 = int.from_bytes(good[40:48], "big")
    l2 = int.from_bytes(good[l1 : l1 + 8], "big") & ~(1 << 63)
    assert read(bytes(good)) == [(0, CLUSTER, len(good) - CLUSTER), (TABLE, TABLE + CLUSTER, None)]
    for offset, value, error in (
        (0, b"QFI\xfa", FormatError),
        (4, bytes(3) + b"\2", UnsupportedFeature),  # version
        (20, bytes(3) + b"\x11", UnsupportedFeature),  # cluster_bits
        (24, b"\x7f" + bytes(7), FormatError),  # size
        (32, bytes(3) + b"\1", UnsupportedFeature),  # encrypted
        (36, bytes(4), FormatError),  # entries of the L1 table
        (40, b"\0" * 6 + b"\2\0", FormatError),  # its place
        (40, b"\0\x7f" + bytes(6), FormatError),
        (60, bytes(3) + b"\1", UnsupportedFeature),  # snapshots
        (72, bytes(7) + b"\2", UnsupportedFeature),  # features
        (100, b"\0\1\0\0", FormatError),  # the header's size
        (100, bytes(4), FormatError),
        (108, b"\xff\xff\xff\xff", FormatError),  # an extension's size
        (l1, b"\x80\x01" + bytes(6), FormatError),
        (l1 + 8, good[l1 : l1 + 8], FormatError),  # the same table twice
        (l2, b"\x80\x01" + bytes(6), FormatError),
        (l2, b"\x80" + bytes(7), FormatError),
        (l2, b"\x40" + bytes(5) + b"\1\0", UnsupportedFeature),  # compressed
    ):
        bad = bytearray(good)
        bad[offset : offset + len(value)] = value
        with pytest.raises(error):
            read(bytes(bad))
    for length in (0, 100, CLUSTER, len(good) - CLUSTER):
        with pytest.raises(FormatError):
            read(bytes(good[:length]))


def test_what_there_is_no_room_for() -> None:
    with pytest.raises(UsageError, match="too large"):
        list(Overlay(1 << 52, [], "b", "raw").metadata())
    with pytest.raises(UsageError, match="too long"):
        Overlay(MIB, [], "b" * 1024, "raw").header()
