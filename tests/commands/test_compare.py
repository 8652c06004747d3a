"""`fvdfs compare`: what it says of two disks, next to `qemu-img compare`, and what it reads for that."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from fvdfs.commands.convert import UNIT
from support.mounts import FVDFS, MIB, fvdfs, mounted, must

SIZE = 8 * MIB


def compare(*words: str | Path) -> dict[str, object]:
    """What it says as JSON; the exit code must fit."""
    done = fvdfs("compare", "--json", *words)
    found: dict[str, object] = json.loads(done.out)
    assert done.code == (0 if found["identical"] else 1), done
    return found


def by_qemu(one: Path, other: Path, *words: str) -> tuple[int, int | None]:
    """The exit code of `qemu-img compare`, and the sector that it says differs first."""
    command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", *words, str(one), str(other)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout.partition("mismatch at offset ")[2].partition("!")[0]
    return done.returncode, int(said) // 512 if said else None


def sparse_disk(path: Path, seed: int, size: int = SIZE) -> bytes:
    """A raw disk with data, zeros that are stored, and holes; its content."""
    source, content = random.Random(seed), bytearray(size)
    with open(path, "wb") as file:
        file.truncate(size)
        for _ in range(8):
            start = source.randrange(0, size, 4096)
            data = source.choice((source.randbytes, bytes))(min(source.randrange(1, 300_000), size - start))
            content[start : start + len(data)] = data
            file.seek(start)
            file.write(data)
    return bytes(content)


@pytest.mark.parametrize("seed", range(6))
def test_it_says_what_qemu_img_says(folder: Path, seed: int) -> None:
    one, other = folder / "one.raw", folder / "other.raw"
    source = random.Random(seed)
    content = sparse_disk(one, seed)
    changed = bytearray(content)
    for _ in range(seed % 3):
        changed[source.randrange(SIZE)] ^= 1 + source.randrange(255)
    changed += bytes(source.choice((0, 512, MIB))) + bytes([0] * 511 + [source.randrange(2)])
    with open(other, "wb") as file:  # without a hole
        file.write(changed)
    for words in ((), ("-s",)):
        code, sector = by_qemu(one, other, *words)
        found = compare(*words, one, other)
        first = found["first_difference"]
        assert (code == 0) is found["identical"]
        assert sector == (None if first is None else int(str(first)) // 512)
    padded = content + bytes(len(changed) - len(content))
    expected = next((at for at, (a, b) in enumerate(zip(padded, changed, strict=True)) if a != b), None)
    assert compare(one, other)["first_difference"] == expected
    assert compare(other, one)["first_difference"] == expected


def test_what_it_prints(folder: Path) -> None:
    (folder / "a.raw").write_bytes(b"x" * 1024)
    (folder / "b.raw").write_bytes(b"x" * 1024 + bytes(1024))
    (folder / "c.raw").write_bytes(b"x" * 1023 + b"y")

    def said(*words: str) -> tuple[int, str]:
        done = fvdfs("compare", *words, cwd=folder)
        assert not done.err
        return done.code, done.out

    sizes = "a.raw has 1024 bytes, b.raw 2048\n"
    assert said("a.raw", "a.raw") == (0, "the disks are the same\n")
    assert said("a.raw", "b.raw") == (0, f"the disks are the same, but for zeros at the end: {sizes}")
    assert said("-s", "a.raw", "b.raw") == (1, f"the disks differ in size: {sizes}")
    assert said("a.raw", "c.raw") == (1, "the disks differ, first at byte 1023\n")


@pytest.mark.parametrize("layout", [(), ("--compact",), ("--data-file", "auto")])
def test_disks_of_all_formats(folder: Path, layout: tuple[str, ...]) -> None:
    raw, image, qcow2 = folder / "a.raw", folder / "a.fvd", folder / "a.qcow2"
    content = bytearray(sparse_disk(raw, 7))
    must("convert", raw, image, *layout)
    must("convert", raw, qcow2)
    assert compare(raw, image)["identical"]
    assert compare(image, qcow2, "-F", "qcow2")["identical"]
    assert compare(qcow2, raw, "-f", "qcow2")["identical"]
    content[-1] ^= 1
    raw.write_bytes(content)
    assert compare(image, raw)["first_difference"] == SIZE - 1
    assert compare(raw, qcow2, "-F", "qcow2")["first_difference"] == SIZE - 1


@pytest.mark.parametrize("base_format", ["raw", "qcow2", "fvd"])
def test_what_both_stand_on_is_not_read(folder: Path, base_format: str) -> None:
    """But for the units in which one of them has something of its own."""
    content = sparse_disk(folder / "t.raw", 3)
    base = f"base.{base_format}"
    must("convert", folder / "t.raw", folder / base)
    for name in ("one", "other"):
        must("create", folder / f"{name}.fvd", "-b", base, "-F", base_format)
    with mounted(folder) as mount:
        for name, data in (("one", b"\xaa" * 4096), ("other", content[:512] + b"\xaa" * 3584)):
            with open(mount.raw(name), "r+b", buffering=0) as file:
                file.write(data)
        for name in ("one", "other"):
            with open(mount.raw(name), "r+b", buffering=0) as file:
                file.seek(5 * MIB)
                file.write(b"both")
    found = compare(folder / "one.fvd", folder / "other.fvd")
    assert found["first_difference"] == next(at for at in range(512) if content[at] != 0xAA)
    with mounted(folder) as mount, open(mount.raw("other"), "r+b", buffering=0) as file:
        file.write(b"\xaa" * 512)
    found = compare(folder / "one.fvd", folder / "other.fvd")
    assert found == {"identical": True, "first_difference": None, "sizes": [SIZE, SIZE], "read": 4 * UNIT}
    below = compare(folder / "other.fvd", folder / base, "-F", base_format)
    assert below["first_difference"] == 0
    assert int(str(below["read"])) <= 4 * UNIT


def test_holes_are_not_read(folder: Path) -> None:
    for name in ("a.raw", "b.raw"):
        with open(folder / name, "wb") as file:
            file.truncate(1 << 40)
            file.seek(1 << 39)
            file.write(b"x")
    found = compare(folder / "a.raw", folder / "b.raw")
    assert (found["identical"], found["read"]) == (True, 2 * UNIT)
    os.truncate(folder / "a.raw", 512)
    found = compare(folder / "a.raw", folder / "b.raw")
    assert (found["first_difference"], found["read"]) == (1 << 39, UNIT)


def test_the_first_of_many_differences_is_told(folder: Path) -> None:
    """Whichever worker is the first to find one."""
    content = random.Random(5).randbytes(SIZE)
    (folder / "a.raw").write_bytes(content)
    for first in (0, 65_535, 65_536, MIB - 1, 3 * MIB + 77):
        (folder / "b.raw").write_bytes(content[:first] + bytes(byte ^ 255 for byte in content[first:]))
        assert compare(folder / "a.raw", folder / "b.raw")["first_difference"] == first


def failed(*words: str | Path) -> str:
    done = fvdfs("compare", *words)
    assert (done.code, done.err.count("\n"), done.out) == (2, 1, ""), done
    return done.err


def test_what_cannot_be_compared_is_no_difference(folder: Path) -> None:
    """Exit code 2, whatever it is that fails."""
    (folder / "a.raw").write_bytes(bytes(MIB))
    must("create", folder / "vm.fvd", "1M", "-b", "a.raw", "-F", "raw")
    assert "No such file" in failed(folder / "a.raw", folder / "nosuch")
    assert "No such file" in failed(folder / "nosuch", folder / "a.raw")
    assert "-F banana: is not known" in failed(folder / "a.raw", folder / "a.raw", "-F", "banana")
    assert "not an FVD image" in failed(folder / "a.raw", folder / "a.raw", "-f", "fvd")
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as file:
        file.write(b"x")
        assert "vm.fvd: open for writing" in failed(folder / "vm.fvd", folder / "a.raw")
        assert compare(mount.raw("vm"), folder / "a.raw")["first_difference"] == 0
    must("convert", folder / "a.raw", folder / "cut.fvd")
    os.truncate(folder / "cut.fvd", 100_000)
    assert "was cut" in failed(folder / "a.raw", folder / "cut.fvd")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*FVDFS, "compare", folder / "a.raw", folder / "vm.fvd"], stdout=full, stderr=-1, check=False
        )
    assert (done.returncode, b"standard output" in done.stderr) == (2, True)
