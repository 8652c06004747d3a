"""A disk that moves is fetched in the order in which it was used last at its source."""

from __future__ import annotations

import json
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.cow.heat import EXTENT, LONG_PASS
from fvdfs.format import hot
from fvdfs.format.header import HEADER_SPACE, Header, with_fields
from fvdfs.format.profile import Extent
from fvdfs.store.locations import parse_location
from fvdfs.store.source import hot_blocks as hot_blocks_of_source
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until
from support.moves import serving
from support.servers import nbd_server

DISK = 16 * MIB
CONTENT = random.Random(5).randbytes(DISK)
HOT, WARM, COLD = 9 * MIB, 3 * MIB, 14 * MIB
LATER = 3600  # seconds


@pytest.fixture
def source(folder: Path) -> Iterator[Mount]:
    must("create", folder / "vm.fvd", str(DISK))
    with mounted(folder) as mount:
        with mount.raw("vm").open("r+b") as file:
            file.write(CONTENT)
        mount.remount()  # what was written is not what was used last
        yield mount


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Mount]:
    folder = tmp_path / "target"
    folder.mkdir()
    with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
        yield mount


def use(raw: Path, *ranges: tuple[int, int, int], write: bool = False) -> None:
    """Read ranges (start, length, times), past the kernel's cache; or write what they have."""
    descriptor = os.open(raw, (os.O_RDWR if write else os.O_RDONLY) | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 4096)
        for start, length, times in ranges:
            for at in [*range(start, start + length, 4096)] * times:
                os.preadv(descriptor, [buffer], at)
                if write:
                    os.pwrite(descriptor, buffer, at)
    finally:
        os.close(descriptor)


def receive(socket: Path, target: Mount, *options: str) -> Path:
    """The image, of which only a profile is copied."""
    image = target.folder / "vm.fvd"
    must("receive", *options, f"nbd+unix:///vm?socket={socket}", image)
    with image.open("r+b") as file:
        header = with_fields(Header.decode(file.read(HEADER_SPACE), "vm"), prefetch_start_delay=LATER)
        file.seek(0)
        file.write(header.encode())
    return image


def hot_blocks(raw: Path) -> list[Extent]:
    found = hot.decode(os.getxattr(raw, "user.fvdfs.hot"), DISK)
    assert found is not None
    return found


def local(raw: Path) -> list[Extent]:
    """What is local, in order of addresses, where that is whole units of `EXTENT`."""
    found: list[Extent] = []
    residency = json.loads(os.getxattr(raw, "user.fvdfs.map"))
    size, cells = residency["cell_size"], residency["cells"]
    for start in range(0, DISK, EXTENT):
        if all(stored for stored, *_ in cells[start // size : (start + EXTENT - 1) // size + 1]):
            first = found.pop()[0] if found and found[-1][1] == start else start
            found.append((first, start + EXTENT))
    return found


def test_what_was_used_last_is_fetched_and_the_order_kept(source: Mount, target: Mount) -> None:
    raw = target.raw("vm")
    use(source.raw("vm"), (HOT, 2 * EXTENT, 16), (COLD, 4096, 1))
    use(source.raw("vm"), (WARM, EXTENT, 1), write=True)
    expected = [(HOT, HOT + 2 * EXTENT), (WARM, WARM + EXTENT), (COLD, COLD + EXTENT)]
    assert hot_blocks(source.raw("vm")) == expected
    expected.insert(2, (0, EXTENT))  # looked at by what serves the disk
    with serving(source) as socket:
        image = receive(socket, target)
        with raw.open("r+b"):
            must("activate", raw)
            wait_until(lambda: target.status("vm")["local_bytes"] == 5 * EXTENT)
            wait_until(lambda: target.status("vm")["state"] == "waiting")
            assert target.status("vm")["first"] == {"from": "source", "bytes": 5 * EXTENT}
            assert local(raw) == sorted(expected)
            assert hot_blocks(source.raw("vm")) == expected, "the target's own reads do not count"
    shown = must("profile", "show", image).splitlines()[1:]
    assert shown == [f"{start} {stop - start}" for start, stop in expected]
    assert fvdfs("check", image).code == 0


@pytest.mark.parametrize("how", ["cp", "direct"])
def test_a_backup_of_the_disk_does_not_hide_what_was_used(source: Mount, how: str) -> None:
    """What was used but once comes before all that the backup has passed since it is known to be one."""
    raw = source.raw("vm")
    use(raw, (HOT, 2 * EXTENT, 4), (COLD, 4096, 1))
    assert hot_blocks(raw)  # so that it is added up: of a second's requests the last ones count
    if how == "cp":
        subprocess.run(["cp", raw, source.folder.parent / "copy"], check=True)
    else:
        use(raw, (0, DISK, 1))
    found = [number for start, stop in hot_blocks(raw) for number in range(start // EXTENT, stop // EXTENT)]
    assert found[:2] == [HOT // EXTENT, HOT // EXTENT + 1]
    passed = range(LONG_PASS + 2, DISK // EXTENT)
    assert COLD // EXTENT in passed
    assert [number for number in found if number in passed][2] == COLD // EXTENT


def test_another_opening_goes_on_in_this_order(source: Mount, target: Mount) -> None:
    raw = target.raw("vm")
    use(source.raw("vm"), (HOT, 2 * EXTENT, 2))
    with serving(source) as socket:
        receive(socket, target)
        with raw.open("r+b"):
            must("activate", raw)  # and it is closed at once
        with raw.open("r+b"):
            wait_until(lambda: target.status("vm")["local_bytes"] == 3 * EXTENT)
        assert local(raw) == [(0, EXTENT), (HOT, HOT + 2 * EXTENT)]


def test_nothing_of_it_where_it_is_not_wanted(source: Mount, target: Mount) -> None:
    raw = target.raw("vm")
    use(source.raw("vm"), (HOT, EXTENT, 2))
    with serving(source) as socket:
        receive(socket, target, "--profile", "none")
        with raw.open("r+b"):
            must("activate", raw)
            wait_until(lambda: target.status("vm")["state"] == "waiting")
            must("prefetch", "start", raw)
            wait_until(lambda: source.status("vm")["move"] == "released")
    assert "used last" not in target.log


def test_a_move_goes_on_without(source: Mount, target: Mount) -> None:
    """Of a disk that nobody has used nothing is told."""
    raw = target.raw("vm")
    with serving(source) as socket:
        receive(socket, target)
        with raw.open("r+b"):
            must("activate", raw)
            must("prefetch", "start", raw)
            wait_until(lambda: source.status("vm")["move"] == "released")
    assert raw.read_bytes() == CONTENT


@pytest.mark.parametrize("said", [bytes(hot.SIZE), bytes(512)], ids=["nonsense", "too little"])
async def test_what_makes_no_sense_is_an_error(tmp_path: Path, said: bytes) -> None:
    (tmp_path / "said").write_bytes(said)
    with nbd_server(tmp_path / "said", tmp_path / "nbd"), pytest.raises(OSError):
        await hot_blocks_of_source(parse_location(f"nbd+unix:///vm?socket={tmp_path}/nbd"), "", DISK)
