"""`fvdfs create` and `fvdfs info`: what is made, what is shown, what is refused."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fvdfs.errors import ImageError
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import DEFAULT_PROFILE_ROOM, HEADER_SIZE
from fvdfs.logs import LogFormatter
from support import reference
from support.golden import GOLDEN, MANIFEST, extract
from support.mounts import MIB, fvdfs, mounted, must

SWITCHES = {"compact_image": "--compact", "copy_on_read": "--copy-on-read"}
OPTIONS = {
    "block_size": "--block-size",
    "chunk_size": "--chunk-size",
    "storage_grow_unit": "--grow-unit",
    "data_file": "--data-file",
    "data_file_fmt": "--data-format",
    "prefetch_start_delay": "--prefetch-delay",
    "detect_sparse_hole": "--detect-holes",
}
# What the original changed in the header after creation.
LATER = ("clean_shutdown", "all_data_in_fvd_img")


def arguments(entry: dict[str, Any]) -> list[str]:
    """The options of `create` for those that a golden image was made with."""
    result = []
    for name, value in entry["options"].items():
        if name in SWITCHES:
            result.append(SWITCHES[name])
        elif name == "prefetch_start_delay" and value == -1:
            pass  # never: the default
        elif name == "journal_size":
            result += ["--journal-size", "none" if str(value) == "-1" else str(value)]
        else:
            result += [OPTIONS[name], str(value)]
    if entry["base_size"] is not None:
        result += ["--base", "base.raw"]
    return result


@pytest.mark.parametrize("entry", MANIFEST, ids=[entry["name"] for entry in MANIFEST])
def test_create_writes_the_header_of_the_original(entry: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    golden.mkdir()
    theirs = extract(entry["name"], golden)
    if entry["base_size"] is not None:
        with open(folder / "base.raw", "wb") as base:
            base.truncate(entry["base_size"])
            base.seek(0)
            base.write(b"x" * min(entry["base_size"], MIB))
    image = folder / "disk.fvd"
    must("create", image, str(entry["virtual_size"]), *arguments(entry))
    ours = reference.Header(image)
    expected = reference.Header(theirs)
    for name in (*reference.NAMES,):
        if name in ours.text:
            assert ours.text[name] == expected.text[name], name
        elif name == "metadata_size" and entry["base_size"] is not None:
            assert ours.metadata_size == expected.metadata_size + DEFAULT_PROFILE_ROOM
        elif name == "metadata_size":
            assert ours.metadata_size == -(-expected.metadata_size // 4096) * 4096
        elif name not in LATER:
            assert getattr(ours, name) == getattr(expected, name), name
    odd = expected.metadata_size % 4096  # such images are no longer made
    if not entry["crashed"] and not entry["booted"] and entry["base_size"] is None and not odd:
        with open(image, "rb") as one, open(theirs, "rb") as other:
            assert one.read(HEADER_SIZE) == other.read(HEADER_SIZE)
    assert reference.check(image, "fvdfs") == []


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5Q", "10Q", "1KB", "0x10", "²"])
def test_what_is_no_size(text: str, folder: Path) -> None:
    done = fvdfs("create", folder / "a.fvd", "--", text)
    assert done.code == 2
    assert not list(folder.iterdir())


def test_the_size_comes_from_the_base(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"b" * 1000)
    must("create", folder / "a.fvd", "-b", "base.raw")
    assert json.loads(must("info", folder / "a.fvd", "--json"))["virtual_disk_size"] == 1024
    assert b"".join(reference.read_disk(folder / "a.fvd")) == b"b" * 1000 + bytes(24)


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    image, data = folder / "a.fvd", folder / "data"
    image.write_bytes(b"precious")
    done = fvdfs("create", image, "1M")
    assert done.code == 2
    assert "--force" in done.err
    assert image.read_bytes() == b"precious"
    must("create", image, "1M", "--force")
    data.write_bytes(b"precious")
    assert fvdfs("create", folder / "b.fvd", "1M", "--data-file", "data").code == 2
    assert data.read_bytes() == b"precious"
    assert not (folder / "b.fvd").exists()
    must("create", folder / "b.fvd", "1M", "--data-file", "data", "--force")
    assert b"".join(reference.read_disk(folder / "b.fvd")) == bytes(MIB)


def test_force_leaves_nothing_of_what_was_there(folder: Path) -> None:
    image = folder / "a.fvd"
    image.write_bytes(b"old" * MIB)
    must("create", image, "2M", "--force")
    assert b"".join(reference.read_disk(image)) == bytes(2 * MIB)


def test_force_does_not_take_an_image_in_use(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount, open(mount.raw("a"), "r+b"):
        done = fvdfs("create", folder / "a.fvd", "2M", "--force")
        assert done.code == 1
        assert "in use" in done.err
        assert mount.raw("a").stat().st_size == MIB


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["1M", "--block-size", "4K"], "--block-size needs a base"),
        (["1M", "--copy-on-read"], "--copy-on-read needs a base"),
        (["1M", "--chunk-size", "4K"], "need --compact"),
        (["1M", "-b", "base.raw", "--compact", "--detect-holes", "4K"], "does not go with --compact"),
        ([], "say how large"),
        (["0"], "must be a multiple of 512, and more than 0"),
        (["1M", "-b", "missing"], "No such file"),
        (["1M", "-b", "base.raw", "-F", "qcow99"], "format qcow99 is not known"),
        (["1M", "-b", "x" * 1024], "File name too long"),
        (["1M", "-b", "./" * 520 + "base.raw"], "base_img is 1048 bytes long; the format has room for 1023"),
        (["1M", "--data-file", "a.fvd"], "must be different files"),
        (["8000P"], "at most 4611686018427387904"),
    ],
)
def test_what_cannot_be_is_one_line(folder: Path, extra: list[str], message: str) -> None:
    (folder / "base.raw").write_bytes(bytes(4096))
    done = fvdfs("create", folder / "a.fvd", *extra)
    assert done.code in (1, 2)
    assert message in done.err, done.err
    assert done.err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["base.raw"]


def test_detected_holes_are_local_and_take_no_space(folder: Path) -> None:
    chance = random.Random(4)
    content = bytearray(chance.randbytes(2 * MIB + 512))
    for start, stop in ((0, 65536), (300_000, 500_000), (MIB, MIB + 65536), (2 * MIB - 20_000, 2 * MIB + 512)):
        content[start:stop] = bytes(stop - start)
    (folder / "base.raw").write_bytes(content)
    must("create", folder / "a.fvd", "-b", "base.raw", "--block-size", "4K", "--detect-holes", "60000")
    image = reference.Image(folder / "a.fvd")
    unit = 61440
    expected = [not any(content[block // 15 * unit : (block // 15 + 1) * unit]) for block in range(513)]
    assert [image.bit(block) for block in range(513)] == expected
    assert sum(expected) == 15 + 3 * 15 + 3
    image.close()
    assert b"".join(reference.read_disk(folder / "a.fvd")) == content
    assert (folder / "a.fvd").stat().st_blocks * 512 < 200_000


def test_holes_of_a_base_are_not_read(folder: Path) -> None:
    """Of one this large, to read them would take hours."""
    with open(folder / "base.raw", "wb") as base:
        base.truncate(4 << 40)
        base.seek(3 << 40)
        base.write(b"x")
    must("create", folder / "a.fvd", "-b", "base.raw", "--block-size", "64K", "--detect-holes", "2G", timeout=120)
    facts = json.loads(must("info", folder / "a.fvd", "--json"))
    assert facts["base_blocks"] - facts["local_blocks"] == (2 << 30) // 65536
    facts = json.loads(must("map", folder / "a.fvd", "--json"))
    assert sum(cell[1] for cell in facts["cells"]) == 2 << 30


def test_info_shows_the_chain_and_what_is_local(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"b" * MIB)
    must("create", folder / "mid.fvd", "-b", "base.raw")
    must("create", folder / "top.fvd", "-b", "mid.fvd", "-F", "fvd", "--block-size", "64K")
    with mounted(folder) as mount, open(mount.raw("top"), "r+b") as file:
        file.write(b"x" * 3 * 65536)
    facts = json.loads(must("info", folder / "top.fvd", "--json"))
    assert facts["clean"] is True
    assert facts["local_blocks"] == 3
    assert facts["base_blocks"] == 16
    assert [base["name"] for base in facts["base_chain"]] == ["mid.fvd", "base.raw"]
    assert facts["allocated"] == (folder / "top.fvd").stat().st_blocks * 512
    text = must("info", folder / "top.fvd")
    assert "18.8% of the base, 192 KiB of 1 MiB; 18.8% of the disk (3 of 16 blocks)" in text
    for name in reference.NAMES:
        assert name in facts
        assert f"\n{name}" in text


def test_info_of_a_broken_image(folder: Path) -> None:
    (folder / "base.raw").write_bytes(b"b" * MIB)
    must("create", folder / "a.fvd", "-b", "base.raw")
    (folder / "base.raw").unlink()
    facts = json.loads(must("info", folder / "a.fvd", "--json"))
    assert len(facts["problems"]) == 1
    assert facts["block_size"] == 512
    done = fvdfs("info", GOLDEN / "manifest.json")
    assert done.code == 1
    assert "not an FVD image" in done.err


def test_info_of_an_image_in_use(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M", "--compact", "--chunk-size", "64K")
    os.link(folder / "a.fvd", folder.parent / "b.fvd")  # of which no mount says that it has it open
    with mounted(folder) as mount, open(mount.raw("a"), "r+b"):
        facts = json.loads(must("info", folder.parent / "b.fvd", "--json"))
        assert "open for writing" in facts["problems"][0]
        assert facts["virtual_size"] == MIB


HOSTILE = "b\udcff\n\x1b[31m"  # bytes that are no text, another line, a word to the terminal


def test_names_in_an_image_do_nothing_to_the_terminal(folder: Path) -> None:
    header = new_header(MIB, MIB, CreateOptions(base_img=HOSTILE))
    (folder / "disk.fvd").write_bytes(header.encode().ljust(header.metadata_size, b"\0"))
    command = [sys.executable, "-m", "fvdfs", "info", str(folder / "disk.fvd")]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=strict, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("base_img "))
    assert line.endswith("  b\\udcff\\n\\x1b[31m")


def test_names_in_an_image_do_nothing_to_the_log(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    for message in (HOSTILE, str(ImageError("disk.fvd", HOSTILE))):
        handler.emit(logging.LogRecord("fvdfs", logging.WARNING, "", 0, "%s", (message,), None))
    handler.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["WARNING b\\udcff\\n\\x1b[31m", "WARNING disk.fvd: b\\udcff\\n\\x1b[31m"]
