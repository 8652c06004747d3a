"""`fvdfs check` as a program, on what is mounted, and on what only programs can make."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.check.findings import Kind
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import HEADER_SPACE, Header, with_fields
from support.builder import IMAGE, create, read_files
from support.damage import BY_NAME, COMPACT, CORRUPTION, COW, DATA_FILE, UNALLOCATED, Good, check, kinds, run
from support.mounts import MIB, fvdfs, mounted, must

CREATED = {
    "plain": ["3M"],
    "over a base": ["3M", "-b", "base.raw"],
    "compact": ["3M", "--compact", "--chunk-size", "64K"],
    "compact, over a base": ["-b", "base.raw", "--compact", "--block-size", "4K"],
    "compact, in a data file": ["3M", "--compact", "--data-file", "data.raw", "--journal-size", "none"],
    "holes": ["3M", "-b", "base.raw", "--detect-holes", "64K"],
    "large": ["20T", "--compact"],
    "large, over a base": ["10T", "-b", "base.raw", "--block-size", "512", "--data-file", "data.raw"],
    "over an empty base": ["1M", "-b", "empty"],
    "with a bitmap of 768 MiB": ["-b", "vast", "--block-size", "512"],
}


@pytest.mark.parametrize("name", CREATED)
def test_a_new_image_is_clean(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB) + b"b" * MIB)
    (folder / "empty").touch()
    (folder / "vast").touch()
    os.truncate(folder / "vast", 3 << 40)
    must("create", folder / "a.fvd", *CREATED[name])
    assert run(capsys, folder / "a.fvd") == (0, f"{folder / 'a.fvd'}: clean\n")


def test_what_is_in_use_is_busy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    must("create", folder / "a.fvd", "1M", "--compact")
    must("create", folder / "b.fvd", "1M", "-b", "a.fvd", "-F", "fvd")
    with mounted(folder) as mount:
        with open(mount.raw("a"), "r+b") as file:
            file.write(b"x")
            for name, options in (("a", []), ("a", ["--repair"]), ("b", [])):
                done = fvdfs("check", folder / f"{name}.fvd", *options)
                assert done.code == 1
                assert done.err.count("\n") == 1
                assert "in use" in done.err or "open for writing" in done.err
                assert not done.out
        mount.remount()
        with open(mount.raw("a"), "rb") as file:
            file.read(1)
            assert run(capsys, folder / "a.fvd")[0] == 0
            assert fvdfs("check", folder / "a.fvd", "--repair").code == 1


def test_the_program(folder: Path) -> None:
    """Exit codes and streams of the real program."""
    good = Good(BY_NAME[COMPACT], folder)
    assert fvdfs("check", good.path).code == 0
    good.clear_journal()
    good.set_entry(good.allocated()[2], UNALLOCATED)
    done = fvdfs("check", good.path)
    assert (done.code, done.err) == (3, "")
    assert "1 leak; 1 repairable with --repair\n" in done.out
    good.set_entry(0, 0x7FFFFFFF)
    done = fvdfs("check", good.path)
    assert done.code == 2
    assert "1 corruption, 2 leaks; 1 repairable with --repair\n" in done.out or "1 corruption, 1 leak; " in done.out
    done = fvdfs("check", good.path, "--repair")
    assert done.code == 3
    assert "[repaired: takes them as never written]" in done.out
    assert "1 repaired; left: " in done.out
    done = fvdfs("check", good.path, "--repair")
    assert done.code == 0
    assert "repaired; " in done.out


def test_other_formats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base and a data file that QEMU opens; the data is repaired through it."""
    (folder / "base.raw").write_bytes(random.Random(3).randbytes(MIB))
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "base.raw", folder / "base.qcow2"], check=True
    )
    path = folder / "a.fvd"
    must("create", path, "-b", "base.qcow2", "-F", "qcow2", "--compact", "--chunk-size", "64K", "--block-size", "64K",
         "--data-file", "data.qcow2", "--data-format", "qcow2")  # fmt: skip
    with mounted(folder) as mount, open(mount.raw("a"), "r+b") as file:
        file.write(b"x" * 5 * 65536)
    report = check(capsys, path)
    assert report["findings"] == []
    assert report["chain"][1] == {"image": str(folder / "base.qcow2"), "format": "qcow2", "size": MIB}
    header = Header.decode(path.read_bytes()[:HEADER_SPACE], "")
    with path.open("r+b") as image:
        image.seek(header.journal_offset)
        image.write(bytes(header.journal_size))
        image.seek(header.table_offset + 4)
        image.write(struct.pack("<II", 0, 0x7FFFFFF0))
    assert kinds(check(capsys, path)) == {Kind.CHUNK_SHARED, Kind.CHUNK_BEYOND_STORAGE, Kind.CHUNK_LEAKED}
    report = check(capsys, path, "--repair")
    assert report["errors"] == []
    assert report["left"][CORRUPTION] == 0
    with mounted(folder) as mount:
        content = b"x" * 2 * 65536 + bytes(65536) + b"x" * 2 * 65536
        assert mount.raw("a").read_bytes()[: 5 * 65536] == content
    (folder / "base.qcow2").write_bytes(b"x" * MIB)
    assert Kind.BASE_UNUSABLE in kinds(check(capsys, path))


def test_a_program_that_is_missing_is_no_fault_of_the_image(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Good(BY_NAME[COW], folder)
    good.put(base_img_fmt="qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base.raw", "2M"], check=True)
    monkeypatch.setenv("PATH", str(folder))
    report = check(capsys, good.path, "--repair")
    assert report["exit_code"] == 1
    assert "apt install" in report["errors"][0]
    assert kinds(report) == {Kind.BASE_UNCHECKED}


HOSTILE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
from fvdfs.cli import main
sys.exit(main(["check", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("name", ["journal", "table", "bitmap", "storage"])
@pytest.mark.parametrize("options", [[], ["--repair"]], ids=["look", "repair"])
def test_holes_of_terabytes_take_neither_time_nor_memory(name: str, options: list[str], folder: Path) -> None:
    size = 8 << 40
    path = folder / IMAGE
    start = 1 << 20
    header = create(path, MIB, CreateOptions(compact=True, chunk_size=4096, journal_size=4096))
    match name:
        case "journal":
            changes = {"journal_offset": start, "journal_size": 4 << 40, "metadata_size": 5 << 40}
        case "table":
            changes = {"table_offset": start, "virtual_disk_size": 128 << 40, "chunk_size": 1 << 20,
                       "metadata_size": 1 << 40}  # fmt: skip
        case "bitmap":
            header = create(path, MIB, CreateOptions(base_img="base.raw", block_size=512), base_length=MIB)
            (folder / "base.raw").touch()
            os.truncate(folder / "base.raw", 4 << 40)
            changes = {"bitmap_offset": start, "virtual_disk_size": 2 << 40, "base_img_size": 2 << 40,
                       "bitmap_size": 1 << 29, "metadata_size": 2 << 40, "journal_size": 0}  # fmt: skip
        case _:
            changes = {"virtual_disk_size": 4 << 40, "chunk_size": 1 << 40, "storage_grow_unit": 1 << 40}
    with path.open("r+b") as file:
        file.write(with_fields(header, **changes).encode())
        file.truncate(size)
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, str(path), "--json", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["exit_code"] == done.returncode
    assert path.stat().st_blocks * 512 < 64 * MIB


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder, on a file system that cannot be written to."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_file_that_cannot_be_written(folder: Path) -> None:
    good = Good(BY_NAME[COMPACT], folder)
    good.put(clean_shutdown=0)
    files = read_files(folder)
    with read_only(folder):
        done = fvdfs("check", good.path, "--repair")
        assert done.code == 1
        assert "Read-only file system" in done.err
        assert fvdfs("check", good.path).code == 0
    assert read_files(folder) == files


def test_a_data_file_that_cannot_be_written(folder: Path) -> None:
    good = Good(BY_NAME[DATA_FILE], folder)
    other = folder / "data"
    other.mkdir()
    (folder / "disk.data").rename(other / "disk.data")
    good.put(data_file="data/disk.data", clean_shutdown=0)
    with read_only(other):
        done = fvdfs("check", good.path, "--repair")
        assert (done.code, done.out) == (1, "")
        assert f"{other / 'disk.data'}: no permission to write to it" in done.err
        assert fvdfs("check", good.path).code == 0
    assert fvdfs("check", good.path, "--repair").code == 0
