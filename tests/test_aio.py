"""Images for programs in Python, in trio's event loop."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import HealthCheck, given, settings

import fvdfs
from fvdfs.format.creation import CreateOptions
from support import reference
from support.builder import KIB, create
from support.mounts import must

SIZE = 512 * KIB
BASE = random.Random(1).randbytes(SIZE // 4) + bytes(SIZE // 4 - 1000)
LAYOUTS = {
    "flat": CreateOptions(),
    "compact": CreateOptions(compact=True, chunk_size=64 * KIB, journal_size=64 * KIB),
    "cow": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB, journal_size=64 * KIB),
    "compact cow": CreateOptions(
        base_img="base.raw",
        base_img_fmt="raw",
        block_size=8 * KIB,
        journal_size=64 * KIB,
        compact=True,
        chunk_size=64 * KIB,
    ),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def make(folder: Path, layout: str = "cow") -> tuple[Path, bytearray]:
    """An image, and what its disk holds."""
    options, image = LAYOUTS[layout], folder / "vm.fvd"
    (folder / "base.raw").write_bytes(BASE)
    create(image, SIZE, options, base_length=len(BASE) if options.base_img else None)
    return image, bytearray((BASE if options.base_img else b"").ljust(SIZE, b"\0"))


def content(image: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(image))


async def check_map(
    disk: fvdfs.aio.Image, model: bytearray, start: int, length: int | None = None, below: bytes = BASE
) -> None:
    """Extents without gaps, of which neighbours differ; holes read as zeros, and what is in the base is as `below`."""
    found = await disk.map(start, length)
    stop = SIZE if length is None else min(start + length, SIZE)
    assert [extent.start for extent in found] == [start, *(extent.stop for extent in found[:-1])][: len(found)]
    assert not found or found[-1].stop == stop
    assert all(one.state != other.state for one, other in itertools.pairwise(found))
    for extent in found:
        held = model[extent.start : extent.stop]
        if extent.state == "hole":
            assert not any(held)
        elif extent.state == "base":
            assert held == below.ljust(SIZE, b"\0")[extent.start : extent.stop]
        else:
            assert extent.state == "stored"


PLACES = st.tuples(st.integers(0, SIZE), st.integers(0, 40 * KIB))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["read", "write", "write", "zero", "map"]), PLACES),
        st.tuples(st.sampled_from(["flush", "reopen", "snapshot", "delete"]), st.just((0, 0))),
    ),
    max_size=20,
)


@layouts
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_a_disk_is_as_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, layout: str, steps: list[tuple[str, tuple[int, int]]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("disk")
    image, model = make(folder, layout)
    states: list[tuple[str, bytes]] = []

    async def run() -> None:
        disk = await fvdfs.aio.open(image, write=True)
        try:
            for number, (step, (start, length)) in enumerate(steps):
                if step == "read":
                    assert await disk.read(start, length) == model[start : start + length]
                elif step == "write":
                    data = random.Random(seed + number).randbytes(min(length, SIZE - start))
                    await disk.write(start, data)
                    model[start : start + len(data)] = data
                elif step == "zero":
                    await disk.zero(start, length)
                    model[start : start + length] = bytes(len(model[start : start + length]))
                elif step == "map":
                    await check_map(disk, model, start, length, states[-1][1] if states else BASE)
                elif step == "flush":
                    await disk.flush()
                elif step == "snapshot":
                    states.append(((await disk.create_snapshot(f"s{number}")).name, bytes(model)))
                elif step == "delete" and states:
                    await disk.delete_snapshot(states.pop(seed % len(states))[0])
                elif step == "reopen":
                    await disk.close()
                    assert content(image) == model
                    disk = await fvdfs.aio.open(image, write=True)
            assert await disk.read(0, SIZE + 1) == model
            assert [snapshot.name for snapshot in await disk.snapshots()] == [name for name, _ in reversed(states)]
            for name, state in states:
                async with await disk.open_snapshot(name) as earlier:
                    assert await earlier.read(0, SIZE) == state
        finally:
            await disk.close()

    trio.run(run)
    assert content(image) == model


async def test_a_map_tells_where_bytes_are(tmp_path: Path) -> None:
    image, model = make(tmp_path)
    async with await fvdfs.aio.open(image, write=True) as disk:
        await disk.write(8 * KIB, b"x" * 16 * KIB)
        await disk.zero(64 * KIB, 8 * KIB)
        model[8 * KIB : 24 * KIB] = b"x" * 16 * KIB
        model[64 * KIB : 72 * KIB] = bytes(8 * KIB)
        await disk.flush()
        found = [(extent.state, extent.start, extent.stop) for extent in await disk.map()]
        assert ("stored", 8 * KIB, 24 * KIB) in found
        assert ("hole", 64 * KIB, 72 * KIB) in found
        assert found[0] == ("base", 0, 8 * KIB)
        await check_map(disk, model, 0)
        assert await disk.map(8 * KIB, 100) == [fvdfs.Extent(8 * KIB, 8 * KIB + 100, "stored")]
        assert await disk.map(SIZE) == await disk.map(0, 0) == []
    shown = json.loads(must("map", "--json", image))
    assert shown["virtual_size"] == SIZE


async def test_neighbours_in_a_map_are_joined(tmp_path: Path) -> None:
    """Chunks that lie apart in the file; a disk that is longer than what is looked at in one turn."""
    image, _ = make(tmp_path, "compact")
    async with await fvdfs.aio.open(image, write=True) as disk:
        for chunk in (2, 1, 3):
            await disk.write(chunk * 64 * KIB, b"x" * 64 * KIB)
        assert [tuple(extent) for extent in await disk.map()] == [
            (0, 64 * KIB, "hole"),
            (64 * KIB, 256 * KIB, "stored"),
            (256 * KIB, SIZE, "hole"),
        ]
    create(tmp_path / "large.fvd", 3 << 30, LAYOUTS["flat"])
    async with await fvdfs.aio.open(tmp_path / "large.fvd") as disk:
        assert await disk.map(5) == [fvdfs.Extent(5, 3 << 30, "hole")]


async def test_what_was_flushed_is_there_after_a_kill(tmp_path: Path) -> None:
    image, model = make(tmp_path, "compact cow")
    script = (
        "import fvdfs, os\n"
        f"disk = fvdfs.open({str(image)!r}, write=True)\n"
        "disk.write(100, b'flushed')\n"
        "disk.flush()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = await trio.run_process([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    model[100:107] = b"flushed"
    assert content(image) == model


async def test_an_open_image_is_locked(tmp_path: Path) -> None:
    image, _ = make(tmp_path)
    async with await fvdfs.aio.open(image, write=True) as disk:
        with pytest.raises(fvdfs.ImageBusy, match="use its raw file in the mount"):
            await fvdfs.aio.open(image)
        assert (await disk.read(0, 10)) == BASE[:10]
    async with await fvdfs.aio.open(image) as one, await fvdfs.aio.open(image) as other:
        assert await one.read(0, 10) == await other.read(0, 10)
        with pytest.raises(fvdfs.ImageBusy):
            await fvdfs.aio.open(image, write=True)


async def test_what_was_opened_to_be_read_is_not_written(tmp_path: Path) -> None:
    image, _ = make(tmp_path)
    before = image.read_bytes()
    async with await fvdfs.aio.open(image) as disk:
        assert not disk.writable
        calls: list[Callable[[], object]] = [lambda: disk.write(0, b"x"), lambda: disk.zero(0, 1), disk.create_snapshot]
        for call in calls:
            with pytest.raises(fvdfs.ReadOnlyImage, match="write=True"):
                await call()  # type: ignore[misc]
        await disk.flush()
    assert image.read_bytes() == before


async def test_a_closed_image_says_so(tmp_path: Path) -> None:
    image, _ = make(tmp_path)
    disk = await fvdfs.aio.open(image, write=True)
    assert repr(disk) == f"<fvdfs image {str(image)!r}, writable>"
    await disk.close()
    await disk.close()
    assert disk.closed
    for call in (disk.flush, disk.snapshots, disk.create_snapshot, disk.map):
        with pytest.raises(ValueError, match="is closed"):
            await call()
    with pytest.raises(ValueError, match="is closed"):
        _ = disk.size


async def test_closing_waits_for_calls(tmp_path: Path) -> None:
    image, model = make(tmp_path)
    disk = await fvdfs.aio.open(image, write=True)
    async with trio.open_nursery() as nursery:
        for at in range(0, SIZE, 32 * KIB):
            nursery.start_soon(disk.write, at + 5, b"y" * 1000)
            model[at + 5 : at + 1005] = b"y" * 1000
        await trio.testing.wait_all_tasks_blocked(0.0)
        await disk.close()
    assert content(image) == model


async def test_nonsense_is_refused(tmp_path: Path) -> None:
    image, _ = make(tmp_path)
    async with await fvdfs.aio.open(image, write=True) as disk:
        with pytest.raises(ValueError, match="must not be negative"):
            await disk.read(-1, 5)
        with pytest.raises(ValueError, match="must not be negative"):
            await disk.zero(5, -1)
        with pytest.raises(fvdfs.UsageError, match="no name of a snapshot"):
            await disk.create_snapshot("a/b")
        assert not disk.closed
        with pytest.raises(fvdfs.UsageError, match="there is no such file"):
            await disk.delete_snapshot("never")
        assert await disk.read(0, 3) == BASE[:3]
        await disk.create_snapshot("one")
        with pytest.raises(fvdfs.UsageError, match="exists already"):
            await disk.create_snapshot("one")
        await disk.write(0, b"still open")
    with pytest.raises(fvdfs.UsageError, match="there is no such file"):
        await fvdfs.aio.open(tmp_path / "nothing.fvd")
    (tmp_path / "other.fvd").write_bytes(b"x" * 10000)
    with pytest.raises(fvdfs.NotFvd):
        await fvdfs.aio.open(tmp_path / "other.fvd")


async def test_names_in_an_image_lead_where_it_is_allowed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "base.raw").write_bytes(BASE)
    image = inside / "vm.fvd"
    create(image, SIZE, CreateOptions(base_img="../outside/base.raw", base_img_fmt="raw"), base_length=len(BASE))
    with pytest.raises(fvdfs.Refused, match="base_path"):
        await fvdfs.aio.open(image)
    for name in ("base_path", "allow_url", "base_format"):
        with pytest.raises(TypeError, match=rf"{name} is a list: {name}=\['/srv'\]"):
            await fvdfs.aio.open(image, **cast("dict[str, Any]", {name: "/srv"}))
    async with await fvdfs.aio.open(image, base_path=[outside]) as disk:
        assert await disk.read(0, 100) == BASE[:100]


async def test_a_snapshot_is_named_as_commands_name_it(tmp_path: Path) -> None:
    image, model = make(tmp_path)
    async with await fvdfs.aio.open(image, write=True) as disk:
        made = await disk.create_snapshot("one")
        await disk.write(0, b"later")
    assert (made.name, made.path, made.size) == ("one", str(tmp_path / "vm@one.fvd"), SIZE)
    async with await fvdfs.aio.open(f"{image}@one") as earlier:
        assert await earlier.read(0, SIZE) == model
    assert "vm@one.fvd" in must("snapshots", image)


async def test_a_working_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    async with await fvdfs.aio.open("vm.fvd", write=True) as disk:
        monkeypatch.chdir("/")
        await disk.create_snapshot()
        assert [snapshot.name for snapshot in await disk.snapshots()] == ["1"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a full file system has to be mounted")
async def test_a_full_disk_is_told_with_its_name(tmp_path: Path) -> None:
    await trio.to_thread.run_sync(
        lambda: subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", tmp_path], check=True)
    )
    try:
        image, _ = make(tmp_path, "flat")
        (tmp_path / "filler").write_bytes(bytes(400 * KIB))
        async with await fvdfs.aio.open(image, write=True) as disk:
            with pytest.raises(OSError, match=str(image)):
                await disk.write(0, b"x" * SIZE)
    finally:
        await trio.to_thread.run_sync(lambda: subprocess.run(["umount", tmp_path], check=True))
