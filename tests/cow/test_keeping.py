"""Images that are only read: what is read of the base is kept, and nobody is kept out for it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SIZE, Header
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until

SIZE = 8 * MIB
BLOCK = 64 << 10


def header_of(image: Path) -> Header:
    return Header.decode(image.read_bytes()[:HEADER_SIZE], str(image))


def local_blocks(image: Path) -> int:
    header = header_of(image)
    with image.open("rb") as file:
        file.seek(header.bitmap_offset)
        bits = int.from_bytes(file.read(header.bitmap_size), "little")
    return (bits & (1 << header.blocks) - 1).bit_count()


@pytest.fixture
def content(folder: Path) -> bytes:
    found = random.Random(5).randbytes(SIZE)
    (folder / "base.raw").write_bytes(found)
    return found


def create(folder: Path, *options: str, name: str = "disk") -> Path:
    must("create", folder / f"{name}.fvd", "--base", "base.raw", "-F", "raw", "--block-size", "64K", *options)
    return folder / f"{name}.fvd"


@contextmanager
def mounted_twice(folder: Path) -> Iterator[tuple[Mount, Mount]]:
    with mounted(folder) as one:
        other = Mount(folder, folder.parent / "other.mnt", folder.parent / "other.log")
        other.point.mkdir()
        other.mount()
        try:
            yield one, other
        finally:
            other.umount()


@contextmanager
def reading(mount: Mount) -> Iterator[int]:
    descriptor = os.open(mount.raw("disk"), os.O_RDONLY)
    try:
        yield descriptor
    finally:
        with suppress(OSError):  # where the mount was killed
            os.close(descriptor)


LAYOUTS = {"flat": [], "compact": ["--compact", "--chunk-size", "64K"], "no journal": ["--journal-size", "none"]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_keeps_what_it_reads(layout: str, folder: Path, content: bytes) -> None:
    image = create(folder, "--copy-on-read", *LAYOUTS[layout])
    with mounted(folder) as mount:
        with reading(mount) as disk:
            assert os.pread(disk, 2 * MIB, MIB) == content[MIB : 3 * MIB]
        mount.umount()
        assert 2 * MIB // BLOCK <= local_blocks(image) < SIZE // BLOCK
        assert header_of(image).clean
        for _ in range(10):  # on a busy machine some reads are answered before they could be kept
            mount.mount()
            assert mount.raw("disk").read_bytes() == content
            mount.umount()
            if header_of(image).all_data_in_fvd_img:
                break
        else:
            pytest.fail("the base is read again and again")
        os.unlink(folder / "base.raw")
        mount.mount()
        assert mount.raw("disk").read_bytes() == content
    assert fvdfs("check", image).code == 0


@pytest.mark.parametrize("options", [["--read-only"], []], ids=["read-only", "no copy-on-read"])
def test_what_must_not_be_kept_is_not(options: list[str], folder: Path, content: bytes) -> None:
    image = create(folder, *(["--copy-on-read", "--prefetch-delay", "1"] if options else []))
    before = image.read_bytes(), image.stat().st_mtime_ns
    with mounted(folder, *options) as mount, reading(mount) as disk:
        assert os.pread(disk, SIZE, 0) == content
        time.sleep(1.5)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def test_a_look_at_the_map_keeps_nothing(folder: Path, content: bytes) -> None:
    image = create(folder, "--copy-on-read")
    before = image.read_bytes()
    with mounted(folder) as mount:
        must("map", mount.raw("disk"))
    assert image.read_bytes() == before


def test_prefetching_begins_for_readers(folder: Path, content: bytes) -> None:
    create(folder, "--prefetch-delay", "1")
    with mounted(folder) as mount, reading(mount):
        wait_until(lambda: mount.status("disk")["local_share"] == 1)


def test_a_profile_is_recorded_for_readers(folder: Path, content: bytes) -> None:
    image = create(folder)
    must("profile", "record", image)
    with mounted(folder) as mount, reading(mount) as disk:
        os.pread(disk, 4096, 3 * MIB)
    assert str(3 * MIB) in must("profile", "show", image)
    must("create", folder / "next.fvd", "--base", "base.raw", "-F", "raw", "--profile", image)
    with mounted(folder) as mount, open(mount.raw("next"), "rb"):
        wait_until(lambda: mount.status("next")["local_bytes"] > 0)


@pytest.mark.parametrize("layout", [[], ["--compact", "--chunk-size", "64K"]], ids=["flat", "compact"])
def test_nobody_is_kept_out(folder: Path, content: bytes, layout: list[str]) -> None:
    """Other mounts, tools and images based on it open the image while it is read, and copied to.

    Those that stand on it fill it meanwhile.
    """
    image = create(folder, "--copy-on-read", *layout)
    must("create", folder / "top.fvd", "--base", "disk.fvd", "-F", "fvd")
    with mounted_twice(folder) as (one, other), reading(one) as disk:
        for part in range(4):
            at = 2 * part * MIB
            wait_until(lambda: one.status("disk")["writable"])
            os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(disk, 300_000, at) == content[at : at + 300_000]
            if part == 0:
                assert fvdfs("check", image).code == 0
                assert '"problems": []' in must("info", image, "--json")
                must("map", image)
                must("convert", image, folder.parent / "out.raw", "-f", "fvd")
                assert (folder.parent / "out.raw").read_bytes() == content
            elif part == 1:
                assert other.raw("disk").read_bytes() == content
            elif part == 2:
                with open(other.raw("top"), "r+b") as top:
                    top.write(b"x")
                    assert not one.status("disk")["writable"]
                    assert os.pread(disk, SIZE, 0) == content
            else:
                with open(one.raw("top"), "r+b") as top:
                    assert top.read(SIZE) == b"x" + content[1:]
    for _ in range(10):  # on a busy machine some reads are answered before they could be kept
        if not header_of(image).has_base:
            break
        with mounted(folder) as mount, open(mount.raw("top"), "r+b") as top:
            assert top.read(SIZE) == b"x" + content[1:]
    assert not header_of(image).has_base, "what was read through the image on it is not kept"
    assert fvdfs("check", image).code == 0


def test_two_who_read_do_without(folder: Path, content: bytes) -> None:
    create(folder, "--copy-on-read")
    with mounted_twice(folder) as (one, other), reading(one) as disk, reading(other) as same:
        for at in range(0, SIZE, MIB):
            assert os.pread(disk, MIB, at) == os.pread(same, MIB, at) == content[at : at + MIB]
        with pytest.raises(OSError, match="busy"):
            open(other.raw("disk"), "r+b")
        assert not one.status("disk")["writable"]
        assert not other.status("disk")["writable"]


def test_who_writes_keeps_the_image(folder: Path, content: bytes) -> None:
    """One that was opened for writing is not given up to who asks."""
    create(folder, "--copy-on-read")
    with mounted_twice(folder) as (one, other), reading(one) as disk, open(one.raw("disk"), "r+b") as file:
        file.write(b"x")
        file.flush()
        with pytest.raises(OSError, match="busy"):
            open(other.raw("disk"), "rb")
        assert os.pread(disk, SIZE, 0) == b"x" + content[1:]


def test_asking_while_much_is_copied(folder: Path, content: bytes) -> None:
    """Each time the copies are complete and stable before another one reads; a crash of the copier loses nothing."""
    image = create(folder, "--copy-on-read", "--compact", "--chunk-size", "64K")
    rng = random.Random(6)
    with mounted_twice(folder) as (one, other), reading(one) as disk:
        for _ in range(10):
            for _ in range(5):
                at = rng.randrange(SIZE - MIB)
                assert os.pread(disk, 100_000, at) == content[at : at + 100_000]
            assert other.raw("disk").read_bytes() == content
            assert header_of(image).clean or one.status("disk")["writable"]
        one.kill()
        assert other.raw("disk").read_bytes() == content
        one.mount()
    assert fvdfs("check", image).code == 0
