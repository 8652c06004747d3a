"""`fvdfs measure`: it says what `fvdfs convert` then takes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from fvdfs.commands.measure import PAGE, SEGMENT, PageStore
from support.mounts import MIB, fvdfs, must

SIZE = 40 * MIB + 512
LAYOUTS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "compact": ("--compact",),
    "small chunks": ("--compact", "--chunk-size", "24K"),
    "no journal": ("--compact", "--journal-size", "none"),
    "data file": ("--data-file", "new.data"),
    "compact data file": ("--data-file", "new.data", "--compact"),
    "base": ("-b", "base.raw", "-F", "raw"),
    "compact over a base": ("-b", "base.raw", "-F", "raw", "--compact", "--chunk-size", "64K"),
    "holes found": ("-b", "base.raw", "-F", "raw", "--detect-holes", "64K"),
    "over an image": ("-b", "base.fvd", "-F", "fvd", "--block-size", "24K"),
}


def pages_with_data(path: Path) -> int:
    """Bytes of the file's pages that are stored; without what the file system needs to find them."""
    found = set()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        at, size = 0, os.fstat(descriptor).st_size
        while at < size:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            found |= set(range(start // PAGE, -(-at // PAGE)))
    except OSError:  # nothing but a hole is left
        pass
    finally:
        os.close(descriptor)
    return len(found) * PAGE


@pytest.fixture
def source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A disk with data, stored zeros and holes, and a base with some of it."""
    monkeypatch.chdir(folder)
    rng = random.Random(4)
    path = folder / "source.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for _ in range(25):
            file.seek(rng.randrange(0, SIZE - 300_000) // 512 * 512)
            file.write(rng.choice((rng.randbytes, rng.randbytes, bytes))(rng.randrange(1, 300_000)))
    base = bytearray(path.read_bytes()[: 30 * MIB])
    base[5 * MIB : 6 * MIB] = rng.randbytes(MIB)
    (folder / "base.raw").write_bytes(base)
    must("convert", "base.raw", "base.fvd")
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_convert_takes(source: Path, layout: str) -> None:
    found = json.loads(must("measure", source, "--json", *LAYOUTS[layout]))
    must("convert", source, "new.fvd", *LAYOUTS[layout])
    files = [path for path in (Path("new.fvd"), Path("new.data")) if path.exists()]
    assert found["required"] == sum(map(pages_with_data, files))
    info = json.loads(must("info", "new.fvd", "--json"))
    metadata = info["metadata_size"]
    unit = info["chunk_size"] or 512
    assert found["fully-allocated"] == metadata + -(-info["virtual_disk_size"] // unit) * unit
    used = info["allocated_chunks"] * unit if info["compact_image"] else info["virtual_disk_size"]
    assert found["device"] == used + (0 if len(files) > 1 else metadata)
    assert {path.name for path in source.parent.iterdir()} >= {"source.raw", "base.raw", "base.fvd"}


def test_a_raw_disk(source: Path) -> None:
    found = json.loads(must("measure", source, "--json", "-O", "raw"))
    must("convert", source, "new.raw")
    assert found == {"required": pages_with_data(Path("new.raw")), "fully-allocated": SIZE, "device": SIZE}
    must("convert", source, "source.qcow2")
    assert json.loads(must("measure", "source.qcow2", "-f", "qcow2", "--json", "-O", "raw")) == found
    lines = must("measure", "source.qcow2", "-f", "qcow2", "-O", "raw").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["required", "fully allocated", "on a device"]


def test_nothing_is_made(source: Path) -> None:
    before = sorted(source.parent.iterdir())
    must("measure", source, "--compact", "--data-file", "auto")
    assert sorted(source.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("-O", "qcow2"), "of others: qemu-img measure"),
        (("-O", "raw", "--compact"), "do not go with the format raw"),
        (("--data-file", "x", "--data-format", "qcow2"), "raw data files only"),
        (("-f", "banana"), "is not known"),
        (("-b", "nosuch", "-F", "raw"), "No such file"),
        (("--chunk-size", "1M"), "need --compact"),
    ],
)
def test_what_is_refused(source: Path, words: tuple[str, ...], text: str) -> None:
    done = fvdfs("measure", source, *words)
    assert (done.code, done.err.count("\n"), done.out) == (2, 1, "")
    assert text in done.err


async def test_pages_are_noted() -> None:
    """Against a set of pages."""
    rng = random.Random(2)
    size = 3 * SEGMENT * PAGE
    store, written = PageStore(8 * PAGE), set[int]()
    await store.resize(size)
    kept = bytearray(8 * PAGE)
    for _ in range(300):
        start = rng.choice((rng.randrange(size), rng.randrange(12 * PAGE)))
        length = min(rng.choice((1, 512, PAGE, 70_000, SEGMENT * PAGE)), size - start)
        if rng.random() < 0.6:
            length = min(length, 70_000)
            data = rng.randbytes(length)
            await store.pwrite(data, start)
            written |= set(range(start // PAGE, -(-(start + length) // PAGE)))
            kept[start : start + length] = data[: max(0, len(kept) - start)]
        else:
            await store.zero(start, length)
            written -= set(range(-(-start // PAGE), (start + length) // PAGE))
            kept[start : start + length] = bytes(max(0, min(length, len(kept) - start)))
        assert store.usage() == len(written) * PAGE
        at = rng.randrange(size)
        end, hole = await store.extent(at, size)
        assert at < end <= size
        assert {page in written for page in range(at // PAGE, min(-(-end // PAGE), at // PAGE + 100))} == {not hole}
        found = bytearray(8 * PAGE)
        assert await store.pread(memoryview(found), 0) == len(found)
        assert found == kept
