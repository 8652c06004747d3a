"""Bases of which their image does not say what they are, as the original leaves it, and which do not look raw."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from support.mounts import MIB, Finished, fvdfs, mounted, must, wait_for_log
from support.servers import nbd_server

SIZE = 2 * MIB


def set_header(path: Path, **fields: int | str) -> None:
    with path.open("r+b") as file:
        header = Header.decode(file.read(8192), str(path))
        file.seek(0)
        file.write(with_fields(header, **fields).encode())


def header_of(path: Path) -> Header:
    return Header.decode(path.read_bytes()[:HEADER_SIZE], str(path))


def one_line(done: Finished, *texts: str, code: int) -> None:
    assert done.code == code, done
    assert done.err.count("\n") == 1
    for text in texts:
        assert text in done.err


@pytest.fixture(params=["fvd", "qcow2", "vmdk"])
def base_format(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def content(folder: Path, base_format: str) -> bytes:
    """What the image `disk.fvd` holds, whose header does not say what its base, `base`, is."""
    found = random.Random(base_format).randbytes(SIZE)
    raw = folder.parent / "raw"
    raw.write_bytes(found)
    must("convert", "-f", "raw", raw, folder / "base", "-O", base_format)
    must("create", folder / "disk.fvd", "--base", "base", "--base-format", base_format, "--copy-on-read")
    set_header(folder / "disk.fvd", base_img_fmt="")
    return found


def test_it_is_refused_everywhere(folder: Path, base_format: str, content: bytes) -> None:
    image = folder / "disk.fvd"
    before = image.read_bytes()
    how = f"fvdfs amend {image} --base-format {base_format}"
    with mounted(folder) as mount:
        assert os.listdir(mount.point) == []
        wait_for_log(mount, how)
        assert f"-o base_format={base_format}" in mount.log
        assert not mount.raw("disk").exists()
    one_line(fvdfs("convert", "-f", "fvd", image, folder.parent / "out.raw", "-O", "raw"), how, code=1)
    one_line(fvdfs("map", image), how, code=1)
    done = fvdfs("check", image, "--repair")
    assert done.code == 2
    assert f"looks like {base_format}" in done.out
    assert how in done.out
    done = fvdfs("info", image, "--json")
    (problem,) = json.loads(done.out)["problems"]
    assert how in problem
    assert image.read_bytes() == before


def test_the_image_can_be_told(folder: Path, base_format: str, content: bytes) -> None:
    image = folder / "disk.fvd"
    before = image.read_bytes()
    must("amend", image, "--base-format", base_format)
    after = image.read_bytes()
    assert header_of(image).base_img_fmt == base_format
    changed = [at for at in range(0, len(before), 512) if before[at : at + 512] != after[at : at + 512]]
    assert changed == [1024], "more than one sector was written"
    assert fvdfs("check", image).code == 0
    with mounted(folder) as mount:
        assert mount.raw("disk").read_bytes() == content
        with open(mount.raw("disk"), "r+b") as disk:
            disk.write(b"x")
            assert fvdfs("amend", image, "--base-format", "raw").code == 1, "the image is in use"
        mount.remount()
        assert mount.raw("disk").read_bytes() == b"x" + content[1:]


def test_the_mount_can_be_told(folder: Path, base_format: str, content: bytes) -> None:
    image = folder / "disk.fvd"
    with mounted(folder, "-o", f"base_format=vdi:{base_format}") as mount:
        assert mount.raw("disk").read_bytes() == content
        with open(mount.raw("disk"), "r+b") as disk:
            disk.write(b"x")
        mount.remount()
        assert mount.raw("disk").read_bytes() == b"x" + content[1:]
    assert header_of(image).base_img_fmt == ""


def test_it_can_be_raw_after_all(folder: Path, content: bytes) -> None:
    image = folder / "disk.fvd"
    raw = (folder / "base").read_bytes()[:SIZE].ljust(SIZE, b"\0")
    with mounted(folder, "--read-only", "-o", "base_format=raw") as mount:
        assert mount.raw("disk").read_bytes() == raw
    must("amend", image, "--base-format", "raw")
    with mounted(folder, "--read-only") as mount:
        assert mount.raw("disk").read_bytes() == raw


def test_what_looks_raw_is_raw(folder: Path) -> None:
    """Nothing has to be said."""
    content = random.Random(1).randbytes(SIZE)
    (folder / "base").write_bytes(content)
    must("create", folder / "disk.fvd", "--base", "base")
    assert header_of(folder / "disk.fvd").base_img_fmt == ""
    for options in ([], ["-o", "base_format=qcow2"]):
        with mounted(folder, *options) as mount:
            assert mount.raw("disk").read_bytes() == content
    assert fvdfs("check", folder / "disk.fvd").out.endswith("clean\n")


def test_an_image_of_the_original_over_one_of_its_own(folder: Path) -> None:
    """A chain of three, none of which says what its base is."""
    content = random.Random(2).randbytes(SIZE)
    (folder / "base").write_bytes(content)
    must("create", folder / "a.fvd", "--base", "base")
    must("create", folder / "b.fvd", "--base", "a.fvd", "--base-format", "fvd")
    must("create", folder / "c.fvd", "--base", "b.fvd", "--base-format", "fvd")
    for name in "bc":
        set_header(folder / f"{name}.fvd", base_img_fmt="")
    with mounted(folder) as mount:
        assert sorted(os.listdir(mount.point)) == ["a.raw"]
    with mounted(folder, "-o", "base_format=fvd") as mount:
        assert sorted(os.listdir(mount.point)) == ["a.raw", "b.raw", "c.raw"]
        assert mount.raw("c").read_bytes() == content
    one_line(fvdfs("amend", folder / "c.fvd", "-F", "fvd"), f"fvdfs amend {folder}/b.fvd", code=2)
    must("amend", folder / "b.fvd", "-F", "fvd")
    must("amend", folder / "c.fvd", "-F", "fvd")
    assert fvdfs("check", folder / "c.fvd").code == 0


def test_a_base_on_a_server(folder: Path, tmp_path: Path) -> None:
    """It is looked at when the disk is opened."""
    content = random.Random(3).randbytes(SIZE)
    (tmp_path / "raw").write_bytes(content)
    must("convert", "-f", "raw", tmp_path / "raw", tmp_path / "served", "-O", "qcow2")
    with nbd_server(tmp_path / "served", tmp_path / "socket") as url:
        one_line(fvdfs("create", folder / "a.fvd", "-b", url), "say what it is: --base-format qcow2, or raw", code=2)
        must("create", folder / "a.fvd", "-b", url, "-F", "qcow2")
        set_header(folder / "a.fvd", base_img_fmt="")
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            with pytest.raises(OSError, match="Input/output error"):
                mount.raw("a").read_bytes()
            wait_for_log(mount, f"fvdfs amend {folder}/a.fvd --base-format qcow2")
        with mounted(folder, "-o", "allow_url=nbd+unix:///,base_format=qcow2") as mount:
            assert mount.raw("a").read_bytes() == content
        must("amend", folder / "a.fvd", "-F", "qcow2")
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            assert mount.raw("a").read_bytes() == content


def test_creation_asks(folder: Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "base", "1M"], check=True)
    commands: list[list[str | Path]] = [
        ["create", folder / "a.fvd"],
        ["convert", folder / "base", folder / "a.fvd", "-f", "raw"],
    ]
    for command in commands:
        one_line(fvdfs(*command, "-b", "base"), "looks like qcow2", "--base-format qcow2, or raw", code=2)
        assert not (folder / "a.fvd").exists()
    must("create", folder / "a.fvd", "-b", "base", "-F", "raw")
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes()[:4] == b"QFI\xfb"


def test_a_base_that_is_written_to_is_said_to_be_raw(folder: Path) -> None:
    """Its guest could write the header of another format."""
    (folder / "base").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "-b", "base", "--update-base", "writethrough")
    assert header_of(folder / "a.fvd").base_img_fmt == "raw"


def test_what_cannot_be_amended_is_one_line(folder: Path) -> None:
    (folder / "base").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "-b", "base")
    must("create", folder / "plain.fvd", "1M")
    before = (folder / "a.fvd").read_bytes()
    one_line(fvdfs("amend", folder / "a.fvd", "-F", "banana"), "banana: is not known; known are fvd,", code=2)
    one_line(fvdfs("amend", folder / "a.fvd", "-F", "qcow2"), "this is no qcow2 image", code=1)
    one_line(fvdfs("amend", folder / "a.fvd", "-F", "fvd"), "not an FVD image", code=1)
    one_line(fvdfs("amend", folder / "plain.fvd", "-F", "raw"), "has no base image", code=2)
    one_line(fvdfs("amend", folder / "base", "-F", "raw"), "not an FVD image", code=1)
    one_line(fvdfs("mount", folder, folder.parent, "-o", "base_format=banana"), "base_format=banana", code=2)
    assert (folder / "a.fvd").read_bytes() == before
