"""`fvdfs resize` of disks that are not open, and of those in a mount; the room of the chunk table."""

from __future__ import annotations

import errno
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from fvdfs.alloc.chunked import ChunkedStorage
from fvdfs.alloc.table import Table
from fvdfs.cli import main
from fvdfs.cow.locks import Gate
from fvdfs.errors import FormatError
from fvdfs.format import moving
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import Header, with_fields
from fvdfs.format.table_room import moved_table, smaller_journal
from fvdfs.image import table_moving
from fvdfs.image.core import Core
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.image.unsettled import Left
from fvdfs.ops.remembered import Remembered
from fvdfs.store.base import Buffer, Store, pwrite_pages
from fvdfs.store.host import HostFile
from fvdfs.xattrs import ROOM
from support import reference
from support.builder import KIB, Layout, create
from support.crash import Counts, Effort, Simulation, Subject, quiet
from support.devices import loop_device
from support.mounts import MIB, fvdfs, mounted, must
from support.steps import kills

SIZE = MIB
BASE = bytes(range(256)) * 2000
COW = CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB)
COMPACT = CreateOptions(compact=True, chunk_size=4 * KIB, journal_size=64 * KIB)
LAYOUTS = {
    "flat": CreateOptions(),
    "cow": COW,
    "compact": COMPACT,
    "compact cow": CreateOptions(
        base_img="base.raw",
        base_img_fmt="raw",
        block_size=8 * KIB,
        compact=True,
        chunk_size=4096,
        journal_size=64 * KIB,
    ),
    "data file": CreateOptions(data_file="vm.data"),
    "compact data file": CreateOptions(compact=True, chunk_size=4 * KIB, journal_size=64 * KIB, data_file="vm.data"),
    "compact small journal": replace(COMPACT, journal_size=8 * KIB),
    "compact no journal": replace(COMPACT, journal_size=0),
    "compact cow small journal": CreateOptions(
        base_img="base.raw",
        base_img_fmt="raw",
        block_size=1536,
        compact=True,
        chunk_size=4 * KIB,
        journal_size=8 * KIB,
        profile_room=4096,
    ),
    "compact data file small journal": replace(COMPACT, journal_size=4 * KIB, data_file="vm.data"),
    "no journal": CreateOptions(base_img="base.raw", base_img_fmt="raw", journal_size=0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
LARGE = 20 * MIB
"""A size for which the table of the compact layouts has no room at first."""


@pytest.fixture
def image(folder: Path) -> Path:
    return folder / "vm.fvd"


def make(image: Path, options: CreateOptions) -> None:
    (image.parent / "base.raw").write_bytes(BASE)
    create(image, SIZE, options, base_length=len(BASE) if options.base_img else None)


def write(path: Path, data: bytes, offset: int) -> None:
    async def work() -> None:
        image = await open_image(str(path), Policy(), write=True)
        await image.write(offset, data)
        await image.close()

    trio.run(work)


def content(path: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(path))


def header(path: Path) -> Header:
    return Header.decode(path.read_bytes()[:8192], str(path))


def check(path: Path) -> None:
    must("check", path)
    assert reference.check(path, "fvdfs") == []


@layouts
def test_a_disk_grows_and_shrinks(image: Path, layout: str) -> None:
    make(image, LAYOUTS[layout])
    write(image, b"one" * 1000, 5000)
    write(image, b"end", SIZE - 3)
    before = content(image)
    assert must("resize", image, str(SIZE + 1000)) == f"{image}: 1.001 MiB ({SIZE + 1024} bytes)\n"
    check(image)
    assert content(image) == before + bytes(1024)
    must("resize", image, f"+{LARGE}")
    check(image)
    assert content(image) == before + bytes(1024 + LARGE)
    write(image, b"far", SIZE + LARGE)
    assert content(image)[SIZE + LARGE :][:3] == b"far"
    done = fvdfs("resize", image, "300K")
    assert (done.code, done.err.count("\n"), "add --shrink" in done.err) == (2, 1, True)
    must("resize", image, "300K", "--shrink")
    check(image)
    assert content(image) == before[: 300 * KIB]
    must("resize", image, str(SIZE))
    assert content(image) == before[: 300 * KIB].ljust(SIZE, b"\0")


@layouts
def test_a_kill_before_any_step(image: Path, layout: str) -> None:
    """Afterwards the disk has the size before or after, and reads as it did; the image is clean once it was opened."""
    make(image, LAYOUTS[layout])
    write(image, b"one" * 1000, 5000)
    before = content(image)
    for size, more in ((LARGE, []), (SIZE // 2, ["--shrink"])):
        sizes = set[int]()
        resize = functools.partial(main, ["resize", str(image), str(size), *more])
        for _ in kills(image.parent, resize, at_least=2):
            left = content(image)
            sizes.add(len(left))
            # A part that was cut off may be gone already while the header still has the size before.
            assert left.rstrip(b"\0") == before[: len(left)].rstrip(b"\0")[: len(left.rstrip(b"\0"))]
            assert left[: min(size, SIZE)] == before[: min(size, SIZE)]
            if "no journal" not in layout:
                write(image, b"", 0)
                assert fvdfs("check", image).code in (0, 3)  # space behind the disk may be left
                assert reference.check(image, "fvdfs") == []
                must("resize", image, str(size), *more)
        assert sizes <= {SIZE, size}


def test_a_larger_table_takes_the_front_of_the_journal(image: Path) -> None:
    make(image, COMPACT)
    write(image, b"one", 5000)
    old = header(image)
    must("resize", image, str(LARGE))
    new = header(image)
    assert new.table_offset == old.table_offset
    assert new.journal_offset + new.journal_size == old.journal_offset + old.journal_size
    assert new.journal_offset == old.table_offset + 20 * KIB


def test_a_table_that_moves(image: Path) -> None:
    """Bitmap, table, journal and data stay in this order; only the chunks under the new table are copied."""
    make(image, LAYOUTS["compact cow small journal"])
    write(image, os.urandom(SIZE), 0)
    before, old, length = content(image), header(image), image.stat().st_size
    must("resize", image, str(LARGE))
    new = header(image)
    assert old.metadata_size <= new.table_offset < new.journal_offset < new.metadata_size
    assert (new.metadata_size - old.metadata_size) % new.chunk_size == 0
    assert image.stat().st_size - length <= new.metadata_size - old.metadata_size + new.storage_grow_unit
    assert content(image) == before.ljust(LARGE, b"\0")
    check(image)


def test_writers_do_not_wait_for_what_is_copied(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the gate is closed little is written, however much lies where the table goes."""
    make(image, LAYOUTS["compact small journal"])
    write(image, os.urandom(SIZE), 0)
    before, written = content(image), [0, 0]
    pwrite, images = HostFile.pwrite, list[Image]()

    async def counted(file: HostFile, data: Buffer, offset: int) -> None:
        written[bool(images) and images[0]._gate.is_closed] += len(data)
        await pwrite(file, data, offset)

    monkeypatch.setattr(HostFile, "pwrite", counted)

    async def work() -> None:
        images.append(await open_image(str(image), Policy(), write=True))
        await images[0].resize(4 << 30)
        await images[0].close()

    trio.run(work)
    assert written[0] > 2 * MIB
    assert written[1] < 32 * KIB
    assert content(image)[:SIZE] == before
    check(image)


def test_a_writer_to_new_chunks_does_not_keep_the_table_from_moving(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the table is never as the table is where an entry changes each time that pages of it are written."""
    make(image, LAYOUTS["compact small journal"])
    images, written = list[Image](), [0]

    async def overtaken(store: Store, base: int, size: int, pages: Sequence[tuple[int, bytes]]) -> None:
        await pwrite_pages(store, base, size, pages)
        if not images[0]._gate.is_closed and written[0] < SIZE:
            await images[0].write(written[0], b"new!" * KIB)
            written[0] += 4 * KIB

    monkeypatch.setattr("fvdfs.image.table_moving.pwrite_pages", overtaken)

    async def work() -> None:
        images.append(await open_image(str(image), Policy(), write=True))
        await images[0].resize(LARGE)
        await images[0].close()

    trio.run(work)
    assert 0 < written[0] < SIZE // 4
    assert content(image) == (b"new!" * (written[0] // 4)).ljust(LARGE, b"\0")
    check(image)


def test_what_is_written_to_chunks_that_have_moved_outlives_the_process(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No commit has named their places yet: who goes on (`-o keep`) has them from what is remembered."""
    make(image, LAYOUTS["compact small journal"])
    write(image, os.urandom(SIZE), 0)
    remembered, move = Remembered(), table_moving._move_chunks
    remembered.begin()
    found: list[tuple[int, bytes, Left]] = []

    def note(place: int) -> None:
        status = image.stat()
        found.append((place, image.read_bytes(), remembered.left((status.st_dev, status.st_ino))))

    async def moved(core: Core, storage: ChunkedStorage, table: Table, gate: Gate, chunks: Sequence[int]) -> None:
        await move(core, storage, table, gate, chunks)
        place = chunks[0] * core.header.chunk_size
        await opened[0].write(place, b"new!" * KIB)
        note(place)

    class Former(Remembered):
        def left(self, identity: tuple[int, int]) -> Left:
            return found[0][2]

    monkeypatch.setattr(table_moving, "_move_chunks", moved)
    opened: list[Image] = []

    async def work() -> None:
        opened.append(await open_image(str(image), Policy(unsettled=remembered), write=True))
        await opened[0].resize(LARGE)
        await opened[0].close()
        place, data, _ = found[0]
        (image.parent / "left.fvd").write_bytes(data)
        left = await open_image(str(image.parent / "left.fvd"), Policy(unsettled=Former()), write=True)
        assert await left.read(place, 4 * KIB) == b"new!" * KIB
        await left.close()

    trio.run(work)
    os.close(remembered.descriptor)
    assert reference.check(image.parent / "left.fvd", "fvdfs") == []


def test_room_that_is_made_before_the_truncation(image: Path) -> None:
    """A program that writes is not kept waiting by the kernel, and the truncation has little left to do."""
    make(image, LAYOUTS["compact small journal"])
    write(image, os.urandom(SIZE), 0)
    before, old = content(image), header(image)
    with mounted(image.parent) as mount, open(mount.raw("vm"), "r+b", buffering=0) as disk:
        raw = mount.raw("vm")
        os.setxattr(raw, ROOM, str(LARGE).encode())
        assert os.getxattr(raw, ROOM) == b""
        assert header(image).table_offset > old.table_offset
        assert os.fstat(disk.fileno()).st_size == SIZE
        for size, code in (("none", errno.EINVAL), ("4000000000000", errno.EFBIG)):
            with pytest.raises(OSError) as caught:
                os.setxattr(raw, ROOM, size.encode())
                os.getxattr(raw, ROOM)
            assert caught.value.errno == code
        done = fvdfs("resize", raw, "4T")
        assert (done.code, "see the log" in done.err, done.err.count("\n")) == (2, True, 1)
        os.setxattr(raw, ROOM, str(2 * LARGE).encode())
        assert os.getxattr(raw, ROOM) == b""
        must("resize", raw, str(LARGE))
    assert content(image) == before.ljust(LARGE, b"\0")
    check(image)


def test_a_disk_that_is_closed_while_room_is_made(image: Path) -> None:
    """The move ends there, and the disk is whole."""
    make(image, LAYOUTS["compact small journal"])
    write(image, os.urandom(SIZE), 0)
    before = content(image)
    found: list[OSError] = []

    async def make_room(opened: Image) -> None:
        try:
            await opened.make_room(4 << 30)
        except OSError as error:
            found.append(error)

    async def work(turns: int) -> None:
        opened = await open_image(str(image), Policy(), write=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_room, opened)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            await opened.close()

    for turns in (1, 30, 300):
        trio.run(work, turns)
        assert found.pop().errno == errno.ECANCELED
        assert content(image) == before
        assert fvdfs("check", image).code in (0, 3)
    must("resize", image, str(LARGE))
    assert content(image) == before.ljust(LARGE, b"\0")


def test_a_table_that_is_too_large(image: Path) -> None:
    """One of 1 GiB at most is opened."""
    make(image, COMPACT)
    before = image.read_bytes()
    done = fvdfs("resize", image, "2T")
    assert (done.code, done.err.count("\n"), f"{1 << 40} bytes at most" in done.err) == (1, 1, True)
    assert image.read_bytes() == before


def test_what_is_in_the_way_of_the_record_stays(image: Path) -> None:
    make(image, LAYOUTS["compact no journal"])
    data = bytearray(image.read_bytes())
    data[8191] = 1
    image.write_bytes(data)
    done = fvdfs("resize", image, str(LARGE))
    assert (done.code, "something else" in done.err, done.err.count("\n")) == (1, True, 1)
    assert image.read_bytes()[7680:8192] == data[7680:8192]


def test_layouts_with_room() -> None:
    """Both ways: what the header says afterwards is good, and has the room."""
    for size in (8 * KIB, 64 * KIB, MIB):
        for journal in (0, 4096, 8192, 64 * KIB, MIB):
            for data_file in ("", "vm.data"):
                options = CreateOptions(compact=True, chunk_size=4 * KIB, journal_size=journal, data_file=data_file)
                old = new_header(size, None, options)
                for chunks in (old.table_capacity + 1, 3 * old.table_capacity, 100_000):
                    region = smaller_journal(old, chunks)
                    new = moved_table(old, chunks)
                    if region is not None:
                        new = with_fields(old, journal_offset=region.offset, journal_size=region.size)
                    assert new.table_capacity >= chunks
                    with_fields(new, virtual_disk_size=chunks * 4 * KIB).check("", new.metadata_size)


def test_the_record_of_a_move() -> None:
    fields = {"metadata_size": 1 << 40, "table_offset": 8192, "journal_offset": 0, "journal_size": 0}
    record = moving.encode(fields)
    raw = bytes(moving.PLACE) + record
    assert moving.decode(raw) == fields
    assert not moving.is_moving(raw)
    for at in (0, 9, 43, 500):
        assert not moving.is_record(record[:at] + bytes([record[at] ^ 1]) + record[at + 1 :])
    marked = with_fields(
        new_header(MIB, None, COMPACT), journal_offset=moving.PLACE, journal_size=0, clean_shutdown=0
    ).encode()
    padded = marked.ljust(moving.PLACE, b"\0")
    found = Header.decode(padded + record, "")
    assert {name: getattr(found, name) for name in fields} == fields
    assert found.clean
    for bad in (b"", bytes(512), record[:-1] + b"1"):
        with pytest.raises(FormatError):
            Header.decode(padded + bad, "")


def test_a_disk_that_others_stand_on_is_not_cut(image: Path) -> None:
    make(image, LAYOUTS["compact"])
    must("snapshot", image)
    under = image.with_name("vm@1.fvd")
    done = fvdfs("resize", under, "4K", "--shrink")
    assert (done.code, done.err.count("\n"), "vm.fvd stands on it" in done.err) == (2, 1, True)
    assert len(content(under)) == SIZE
    must("resize", under, "+4K")
    assert content(image) == bytes(SIZE)
    with mounted(image.parent, "-o", "shrink") as mount:
        done = fvdfs("resize", mount.raw("vm@1"), "4K", "--shrink")
        assert (done.code, "vm.fvd stands on it" in done.err) == (2, True)
        with pytest.raises(OSError) as caught:
            os.truncate(mount.raw("vm@1"), 4096)
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(OSError):
            open(mount.raw("vm@1"), "wb").close()
        must("resize", mount.raw("vm"), "8K", "--shrink")
        assert mount.raw("vm").stat().st_size == 8 * KIB


@layouts
def test_a_disk_in_a_mount_while_it_is_written(image: Path, layout: str) -> None:
    make(image, LAYOUTS[layout])
    with mounted(image.parent, "-o", "base_path=/") as mount:
        raw = mount.raw("vm")
        with open(raw, "r+b", buffering=0) as disk:
            stop = threading.Event()
            model = bytearray(raw.read_bytes())
            rounds = 0

            def keep_writing() -> None:
                nonlocal rounds
                while not stop.is_set():
                    at, data = rounds * 77 % 2000 * 512, rounds.to_bytes(8, "little") * 64
                    os.pwrite(disk.fileno(), data, at)
                    model[at : at + 512] = data
                    rounds += 1
                    if not rounds % 50:
                        os.fsync(disk.fileno())
                        os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    back = rounds * 31 % 2000 * 512
                    assert os.pread(disk.fileno(), 512, back) == model[back : back + 512]

            executor = ThreadPoolExecutor(1)
            writer = executor.submit(keep_writing)
            try:
                assert must("resize", raw, f"+{LARGE}").startswith(f"{raw}: 21 MiB")
                must("resize", raw, "+1M")
            finally:
                stop.set()
                writer.result()
                executor.shutdown()
            assert os.fstat(disk.fileno()).st_size == SIZE + LARGE + MIB
            os.pwrite(disk.fileno(), b"far", SIZE + LARGE)
            os.fsync(disk.fileno())
            expected = raw.read_bytes()
            assert expected[:SIZE] == model
        done = fvdfs("resize", raw, "1M")
        assert (done.code, "add --shrink" in done.err) == (2, True)
        done = fvdfs("resize", raw, "1M", "--shrink")
        assert (done.code, "-o shrink" in done.err, done.err.count("\n")) == (2, True, 1)
    assert content(image) == expected
    assert expected[SIZE + LARGE :][:3] == b"far"
    check(image)


def test_what_is_no_raw_file_of_a_mount_is_left_alone(folder: Path) -> None:
    other = folder / "other.raw"
    other.write_bytes(bytes(1000))
    done = fvdfs("resize", other, "1M")
    assert (done.code, "is not a raw file in a mount of fvdfs" in done.err) == (2, True)
    assert other.stat().st_size == 1000


def test_an_image_in_a_mount_is_busy_while_it_is_open(image: Path) -> None:
    make(image, COMPACT)
    with mounted(image.parent) as mount, open(mount.raw("vm"), "r+b"):
        done = fvdfs("resize", image, "+1M")
        assert done.code == 1
        assert "or name the raw file in its mount" in done.err
    must("resize", image, "+1M")


def test_a_mount_shows_the_new_size_of_an_image_that_it_has_not_open(image: Path) -> None:
    make(image, COMPACT)
    with mounted(image.parent) as mount:
        assert mount.raw("vm").stat().st_size == SIZE
        must("resize", image, f"+{LARGE}")
        assert mount.raw("vm").stat().st_size == SIZE + LARGE
        assert mount.raw("vm").read_bytes() == bytes(SIZE + LARGE)


def test_a_data_file_elsewhere_has_to_be_allowed(image: Path, tmp_path: Path) -> None:
    make(image, CreateOptions(data_file="../vm.data"))
    done = fvdfs("resize", image, "2M")
    assert (done.code, "base_path" in done.err, done.err.count("\n")) == (1, True, 1)
    must("resize", image, "2M", "-o", f"base_path={tmp_path}")
    assert (tmp_path / "vm.data").stat().st_size == 2 * MIB


@pytest.mark.parametrize("compact", [False, True])
def test_a_disk_on_a_device(image: Path, tmp_path: Path, compact: bool) -> None:
    """It grows as far as the device does, or, compact, further: the chunks take their places later."""
    (tmp_path / "device").write_bytes(os.urandom(8 * MIB))
    with loop_device(tmp_path / "device") as device:
        options = ["--compact", "--chunk-size", "4K", "--journal-size", "64K"] if compact else []
        must("create", device, "1M", "--force", *options)
        must("resize", device, "6M")
        if compact:
            must("resize", device, "20M")
        else:
            done = fvdfs("resize", device, "20M")
            assert (done.code, "is full" in done.err, done.err.count("\n")) == (1, True, 1)
        must("check", device)
        assert content(device) == bytes((20 if compact else 6) * MIB)


def test_power_cuts_while_the_table_takes_the_front_of_the_journal(tmp_path: Path) -> None:
    """Every state is judged by two readers; the content is that before or after."""
    options = replace(COMPACT, grow_unit=8 * KIB, journal_size=16 * KIB)
    subject = Subject(Layout("compact-outgrown", 13 * 4 * KIB, options))
    (tmp_path / "built").mkdir()
    (tmp_path / "left").mkdir()
    counts = Counts()
    sim = Simulation(subject, subject.build(tmp_path / "built"), tmp_path / "left", Effort.scaled(1), counts)
    with quiet():
        sim.step(sim.open)
        sim.step(sim.write(5000, 9000), sim.flush, sim.write(3000, 700))
        sim.resize(1030 * 4 * KIB)
        assert sim.image.header.journal_size == 12 * KIB
        sim.step(sim.write(1030 * 4 * KIB, 5000), sim.flush, sim.write(9000, 100))
        sim.resize(-1031 * 4 * KIB)
        sim.step(sim.close)
    assert counts.states > 50
