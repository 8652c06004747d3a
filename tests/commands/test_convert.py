"""What commands that make files must not do: destroy what they read, guess, leave half a disk."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fvdfs.commands.convert import Permission, convert
from fvdfs.format.creation import CreateOptions
from support import reference
from support.devices import loop_device, small_disk
from support.mounts import MIB, fvdfs, mounted, must, wait_until

CONTENT = random.Random(12).randbytes(MIB) + bytes(MIB) + random.Random(13).randbytes(MIB)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def refuses(*words: str | Path, code: int = 2) -> str:
    """The one line that a command ends with."""
    done = fvdfs(*words)
    assert done.code == code, done
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err
    return done.err


@pytest.fixture
def chain(folder: Path) -> Path:
    """top.fvd on mid.fvd, which has a data file, on a qcow2 image on base.raw."""
    (folder / "base.raw").write_bytes(CONTENT)
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "low.qcow2")
    must("create", folder / "mid.fvd", "-b", "low.qcow2", "-F", "qcow2", "--data-file", "mid.data")
    must("create", folder / "top.fvd", "-b", "mid.fvd", "-F", "fvd")
    return folder


LAYERS = ("top.fvd", "mid.fvd", "mid.data", "low.qcow2", "base.raw")


@pytest.mark.parametrize("how", ["name", "symlink", "hard link"])
@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_read_is_not_overwritten(chain: Path, layer: str, how: str) -> None:
    """The source, and all that it stands on, by whatever name."""
    target = chain / layer
    if how == "symlink":
        target = chain / "link"
        target.symlink_to(layer)
    elif how == "hard link":
        target = chain / "link"
        target.hardlink_to(chain / layer)
    before = {path.name: path.read_bytes() for path in chain.iterdir()}
    for target_format in ("raw", "fvd", "qcow2"):
        error = refuses("convert", chain / "top.fvd", target, "-O", target_format, "--force")
        assert "would overwrite" in error
    assert "would overwrite" in refuses(
        "convert", chain / "top.fvd", chain / "new.fvd", "--data-file", target.name, "--force"
    )
    assert {path.name: path.read_bytes() for path in chain.iterdir()} == before


def test_a_raw_source_is_not_overwritten(folder: Path) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    assert "would overwrite what is read" in refuses("convert", folder / "t.raw", folder / "t.raw", "--force")
    assert (folder / "t.raw").read_bytes() == CONTENT


def test_create_does_not_overwrite_its_base_or_its_profile(chain: Path) -> None:
    before = {path.name: path.read_bytes() for path in chain.iterdir()}
    for layer in LAYERS[:3]:
        refuses("create", chain / layer, "1M", "-b", "top.fvd", "-F", "fvd", "--force")
        refuses("create", chain / "new.fvd", "-b", "top.fvd", "-F", "fvd", "--data-file", layer, "--force")
    (chain / "link.fvd").symlink_to("base.raw")
    before["link.fvd"] = before["base.raw"]
    refuses("create", chain / "link.fvd", "1M", "-b", "low.qcow2", "-F", "qcow2", "--force")
    profile = chain / "profile.fvd"
    profile.write_text("0 4096\n")
    before["profile.fvd"] = b"0 4096\n"
    refuses("create", profile, "-b", "top.fvd", "-F", "fvd", "--profile", profile, "--force")
    assert {path.name: path.read_bytes() for path in chain.iterdir()} == before


def test_a_loop_device_on_the_source_is_the_source(folder: Path) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    with loop_device(folder / "t.raw") as device, loop_device(folder / "t.raw") as other:
        node = folder / "node"
        os.mknod(node, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
        for source, target in ((folder / "t.raw", device), (device, folder / "t.raw"), (device, node), (device, other)):
            assert "would overwrite" in refuses("convert", source, target, "-O", "raw", "--force")
            refuses("convert", source, target, "-O", "fvd", "--force")
    assert (folder / "t.raw").read_bytes() == CONTENT


def test_what_anybody_has_open_is_not_overwritten(chain: Path) -> None:
    (chain / "other.raw").write_bytes(bytes(MIB))
    with mounted(chain) as mount, open(mount.raw("top"), "r+b"):
        for layer in LAYERS:
            if layer != "low.qcow2":  # QEMU's own
                assert "in use" in refuses(
                    "convert", chain / "other.raw", chain / layer, "-O", "raw", "--force", code=1
                )
        assert "in use" in refuses("create", chain / "new.fvd", "1M", "--data-file", "base.raw", "--force", code=1)
        assert mount.raw("top").read_bytes() == CONTENT
    assert ".part" not in "".join(names(chain))


def test_a_file_under_a_loop_device_is_not_replaced(chain: Path) -> None:
    """The device would go on with the old file, and what is written to it would be lost."""
    target = chain / "other.raw"
    target.write_bytes(CONTENT)
    (chain / "link").hardlink_to(target)
    with loop_device(target) as device:
        for name in ("other.raw", "link"):
            expected = f"{device} is over it; detach that first: losetup -d {device}"
            assert expected in refuses("convert", chain / "base.raw", chain / name, "-O", "raw", "--force", code=1)
            assert expected in refuses("create", chain / "a.fvd", "1M", "--data-file", name, "--force", code=1)
        with loop_device(device) as upper:
            assert f"{upper} is over it" in refuses(
                "convert", chain / "base.raw", device, "-O", "raw", "--force", code=1
            )
    assert target.read_bytes() == CONTENT
    must("convert", chain / "base.raw", target, "--force")


def test_a_file_that_a_program_without_locks_has_open_is_not_replaced(chain: Path) -> None:
    target = chain / "other.raw"
    target.write_bytes(bytes(MIB))
    with target.open("rb") as file, subprocess.Popen(["sleep", "60"], stdin=file) as process:
        file.close()
        try:
            for _ in range(2):
                error = refuses("convert", chain / "base.raw", target, "--force", code=1)
                assert f"process {process.pid} (sleep) has it open; close it there first" in error
            assert target.read_bytes() == bytes(MIB)
        finally:
            process.kill()
    must("convert", chain / "base.raw", target, "--force")


def test_a_file_that_is_opened_while_its_successor_is_made(folder: Path, tmp_path: Path) -> None:
    (folder / "a.raw").write_bytes(b"old")
    with stalled(tmp_path, folder / "a.raw", "--force") as process, (folder / "a.raw").open("rb"):
        (tmp_path / "aside" / "go").touch()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"process {os.getpid()}" in error
    assert (folder / "a.raw").read_bytes() == b"old"
    assert names(folder) == ["a.raw"]


def test_the_data_file_of_another_image_is_not_replaced(chain: Path) -> None:
    """Also where nobody has that image open."""
    must("create", chain / "other.fvd", "1M", "--data-file", "other.data")
    before = {path.name: path.read_bytes() for path in chain.iterdir()}
    expected = f"is the data file of {chain / 'other.fvd'}; choose another name"
    assert expected in refuses("create", chain / "new.fvd", "1M", "--data-file", "other.data", "--force")
    assert expected in refuses("convert", chain / "base.raw", chain / "other.data", "-O", "raw", "--force")
    assert {path.name: path.read_bytes() for path in chain.iterdir()} == before
    must("create", chain / "other.fvd", "2M", "--data-file", "other.data", "--force")


def test_it_is_said_that_images_stand_on_what_is_replaced(chain: Path) -> None:
    expected = f"fvdfs: {chain / 'mid.fvd'}: was the base of {chain / 'top.fvd'}, whose content changes with it\n"
    done = fvdfs("convert", chain / "base.raw", chain / "mid.fvd", "-O", "fvd", "--force")
    assert (done.code, done.err) == (0, expected)
    done = fvdfs("create", chain / "mid.fvd", "1M", "--force")
    assert (done.code, done.err) == (0, expected)
    must("create", chain / "top.fvd", "2M", "--force")
    assert fvdfs("create", chain / "mid.fvd", "2M", "--force").err == ""  # nothing stands on it now


def test_a_picture_overwrites_nothing_but_a_picture(chain: Path) -> None:
    for layer in LAYERS:
        assert "exists already" in refuses("map", chain / "top.fvd", "--png", chain / layer)
    must("map", chain / "top.fvd", "--png", chain / "map.png")
    must("map", chain / "top.fvd", "--png", chain / "map.png")
    assert (chain / "base.raw").read_bytes() == CONTENT


def test_a_picture_overwrites_no_disk(chain: Path) -> None:
    disk = chain / "data.raw"
    content = b"\x89PNG\r\n\x1a\n" + bytes(MIB - 8)  # a guest may have written that
    disk.write_bytes(content)
    assert "exists already" in refuses("map", chain / "top.fvd", "--png", disk)
    with loop_device(disk) as device:
        assert "exists already" in refuses("map", chain / "top.fvd", "--png", device)
    assert disk.read_bytes() == content


def test_a_copy_gives_nobody_more_than_its_source(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(CONTENT)
    source.chmod(0o640)
    theirs, listed = tmp_path / "theirs", tmp_path / "listed"
    theirs.mkdir()
    os.chown(theirs, -1, 60)
    theirs.chmod(0o2755)
    listed.mkdir()
    subprocess.run(["setfacl", "-d", "-m", "u:games:rwx", listed], check=True)
    for folder in (theirs, listed):
        old = folder / "old.raw"
        old.write_bytes(b"old")
        subprocess.run(["setfacl", "-b", old], check=True)
        os.chown(old, -1, 0)
        old.chmod(0o660)
        must("convert", source, folder / "new.raw")
        must("convert", source, old, "--force")
        ours = (folder / "new.raw").stat().st_gid == os.getegid()
        assert stat.S_IMODE((folder / "new.raw").stat().st_mode) == (0o640 if ours else 0o600)
        assert (stat.S_IMODE(old.stat().st_mode), old.stat().st_gid) == (0o660, 0)
        for made in (folder / "new.raw", old):
            assert "system.posix_acl_access" not in os.listxattr(made)


# --- whole, or not at all -----------------------------------------------------------------------


PROGRAM = """
import os, sys
import fvdfs.commands.convert as c, fvdfs.cli
read = c.StoreSide.read
async def slow(self, offset, length):
    if offset:
        open("here", "w").close()
        while not os.path.exists("go"):
            await c.trio.sleep(0.01)
    return await read(self, offset, length)
c.StoreSide.read = slow
fvdfs.cli.entry()
"""


@contextlib.contextmanager
def stalled(tmp_path: Path, *words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion of CONTENT that waits in the middle, until there is a file `go`."""
    aside = tmp_path / "aside"
    aside.mkdir()
    (aside / "source.raw").write_bytes(CONTENT)
    command = [sys.executable, "-c", PROGRAM, "convert", "source.raw", *map(str, words)]
    with subprocess.Popen(command, cwd=aside, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until((aside / "here").exists)
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("target", ["a.raw", "a.fvd", "a.qcow2"])
def test_half_a_disk_never_has_its_name(folder: Path, tmp_path: Path, target: str, how: signal.Signals) -> None:
    (folder / target).write_bytes(b"old")
    with stalled(tmp_path, folder / target, "--force") as process:
        assert (folder / target).read_bytes() == b"old"
        process.send_signal(how)
        _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in error
    assert (folder / target).read_bytes() == b"old"
    if how != signal.SIGKILL:
        assert names(folder) == [target]
    assert not [name for name in names(folder) if name.endswith(".fvd") and name != target]


@pytest.mark.parametrize("words", [["-O", "raw"], ["-O", "qcow2"], ["-O", "fvd"], ["-O", "fvd", "--compact"]])
def test_a_full_disk_leaves_what_was_there(folder: Path, tmp_path: Path, words: list[str]) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    with small_disk(tmp_path / "small", "1M"):
        for force in ([], ["--force"]):
            if force:
                (tmp_path / "small" / "a").write_bytes(b"old")
            error = refuses("convert", folder / "t.raw", tmp_path / "small" / "a", *words, *force, code=1)
            assert "No space left on device" in error
            assert names(tmp_path / "small") == (["a"] if force else [])
        assert (tmp_path / "small" / "a").read_bytes() == b"old"


def test_create_on_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with open(folder / "base.raw", "wb") as base:
        base.truncate(1 << 40)
    with small_disk(tmp_path / "small", "64K"):
        done = fvdfs(
            "create", tmp_path / "small" / "a.fvd", "1T", "--compact", "--data-file", "b", "--chunk-size", "64K"
        )
        assert done.code in (1, 2)
        assert "No space left" in done.err
        assert done.err.count("\n") == 1
        assert names(tmp_path / "small") == []


@pytest.mark.parametrize("layout", [[], ["--compact", "--chunk-size", "64K"]])
def test_half_a_disk_on_a_device_is_none(folder: Path, tmp_path: Path, layout: list[str]) -> None:
    with open(folder / "device", "wb") as file:
        file.truncate(64 * MIB)
    with loop_device(folder / "device") as device:
        must("create", device, "1M")
        with stalled(tmp_path, device, "-O", "fvd", "--force", *layout) as process:
            process.kill()
            process.wait()
        done = fvdfs("check", device)
        assert done.code != 0
        assert "FVD" in done.err + done.out
        (folder / "t.raw").write_bytes(CONTENT)
        must("convert", folder / "t.raw", device, "-O", "fvd", "--force", *layout)
        must("check", device)
        must("convert", "-f", "fvd", device, folder / "back.raw")
        assert (folder / "back.raw").read_bytes() == CONTENT
        must("convert", folder / "t.raw", device, "-O", "raw", "--force")
        with open(device, "rb") as raw:
            assert raw.read(len(CONTENT)) == CONTENT
        must("convert", folder / "t.raw", device, "-O", "qcow2", "--force")
        must("convert", "-f", "qcow2", device, folder / "back.raw", "--force")
        assert (folder / "back.raw").read_bytes() == CONTENT


def test_a_link_stays_one(folder: Path, tmp_path: Path) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    (tmp_path / "real.raw").write_bytes(b"old")
    (folder / "link.raw").symlink_to(tmp_path / "real.raw")
    must("convert", folder / "t.raw", folder / "link.raw", "--force")
    assert (folder / "link.raw").is_symlink()
    assert (tmp_path / "real.raw").read_bytes() == CONTENT
    assert not (tmp_path / "real.raw").is_symlink()


@pytest.mark.parametrize(("source", "expected"), [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644), (0o400, 0o600)])
def test_a_copy_is_no_more_open_than_its_source(folder: Path, source: int, expected: int) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    (folder / "t.raw").chmod(source)
    for name in ("a.raw", "a.fvd", "a.qcow2"):
        must("convert", folder / "t.raw", folder / name)
        assert stat.S_IMODE((folder / name).stat().st_mode) == expected
    must("create", folder / "over.fvd", "-b", "t.raw")
    must("convert", folder / "over.fvd", folder / "flat.raw")
    assert stat.S_IMODE((folder / "flat.raw").stat().st_mode) == expected


def test_what_is_replaced_keeps_its_owner_and_permissions(folder: Path) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    (folder / "a.raw").write_bytes(b"old")
    os.chown(folder / "a.raw", 1234, 2345)
    (folder / "a.raw").chmod(0o620)
    subprocess.run(["setfacl", "-m", "u:65534:r,g::-", folder / "a.raw"], check=True)
    acl = os.getxattr(folder / "a.raw", "system.posix_acl_access")
    must("convert", folder / "t.raw", folder / "a.raw", "--force")
    status = (folder / "a.raw").stat()
    assert (status.st_uid, status.st_gid) == (1234, 2345)
    assert os.getxattr(folder / "a.raw", "system.posix_acl_access") == acl
    assert (folder / "a.raw").read_bytes() == CONTENT


def test_names_in_the_header_are_the_final_ones(folder: Path, tmp_path: Path) -> None:
    (folder / "base.raw").write_bytes(CONTENT)
    must("convert", folder / "base.raw", folder / "a.fvd", "-b", "base.raw", "--data-file", "a.data", "--compact")
    header = reference.Header(folder / "a.fvd")
    assert header.text["data_file"] == "a.data"
    assert header.text["base_img"] == "base.raw"
    assert names(folder) == ["a.data", "a.fvd", "base.raw"]
    must("check", folder / "a.fvd")
    assert b"".join(reference.read_disk(folder / "a.fvd")) == CONTENT
    other = CONTENT[::-1]
    (tmp_path / "other.raw").write_bytes(other)
    must("convert", tmp_path / "other.raw", folder / "a.fvd", "--data-file", "a.data", "--force")
    assert b"".join(reference.read_disk(folder / "a.fvd")) == other


def test_two_that_make_one_name(folder: Path, tmp_path: Path) -> None:
    with stalled(tmp_path, folder / "a.raw") as process:
        (folder / "a.raw").write_bytes(b"somebody else's")
        (tmp_path / "aside" / "go").touch()
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "exists already" in error
    assert (folder / "a.raw").read_bytes() == b"somebody else's"
    assert names(folder) == ["a.raw"]


# --- formats, and where names lead --------------------------------------------------------------


def test_no_format_is_guessed(folder: Path, tmp_path: Path) -> None:
    """What a guest has written into its raw disk stays data."""
    (tmp_path / "secret").write_bytes(b"s" * MIB)
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", folder / "guest.raw")
    done = fvdfs("convert", folder / "guest.raw", folder / "out.raw")
    assert done.code == 0
    assert done.err.count("\n") == 1
    assert "looks like qcow2, but is read as raw; if that is wrong: -f qcow2" in done.err
    size = (folder / "guest.raw").stat().st_size
    assert (folder / "out.raw").read_bytes()[:size] == (folder / "guest.raw").read_bytes()
    must("create", folder / "a.fvd", "1M")
    (folder / "a.fvd").rename(folder / "a.img")
    done = fvdfs("convert", folder / "a.img", folder / "out2.raw")
    assert "looks like fvd" in done.err
    assert (folder / "out2.raw").read_bytes()[:4096] == (folder / "a.img").read_bytes()[:4096]
    must("convert", "-f", "fvd", folder / "a.img", folder / "out3.raw")
    assert (folder / "out3.raw").read_bytes() == bytes(MIB)
    (folder / "no.fvd").write_bytes(CONTENT)
    assert "is not an FVD image" in refuses("convert", folder / "no.fvd", folder / "out4.raw")
    must("convert", "-f", "raw", folder / "no.fvd", folder / "out4.raw")


def test_a_base_is_fvd_by_its_name(folder: Path) -> None:
    must("create", folder / "low.fvd", "1M")
    must("create", folder / "a.fvd", "-b", "low.fvd")
    assert reference.Header(folder / "a.fvd").text["base_img_fmt"] == "fvd"
    (folder / "low.fvd").rename(folder / "low.img")
    assert "looks like fvd; say what it is" in refuses("create", folder / "b.fvd", "-b", "low.img")


@pytest.mark.parametrize("file_format", ["qcow2", "fvd"])
def test_names_in_a_source_lead_no_further_than_in_a_mount(folder: Path, tmp_path: Path, file_format: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret").write_bytes(b"s" * MIB)
    if file_format == "qcow2":
        qemu_img("create", "-f", "qcow2", "-b", tmp_path / "out" / "secret", "-F", "raw", folder / "image")
    else:
        fvdfs("create", folder / "image.fvd", "-b", tmp_path / "out" / "secret")
        (folder / "image.fvd").rename(folder / "image")
    error = refuses("convert", "-f", file_format, folder / "image", folder / "a.raw", code=1)
    assert f"allow it with -o base_path={tmp_path / 'out'}" in error
    assert names(folder) == ["image"]
    allowed = f"base_path={tmp_path / 'out'}"
    must("convert", "-f", file_format, "-o", allowed, folder / "image", folder / "a.raw")
    assert (folder / "a.raw").read_bytes() == b"s" * MIB
    link = tmp_path / "link"
    link.symlink_to(folder / "image")
    must("convert", "-f", file_format, "-o", allowed, link, folder / "b.raw")


def test_a_repair_writes_to_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    """An image may name any file as its data file."""
    (tmp_path / "out").mkdir()
    fvdfs("create", folder / "a.fvd", "1M", "--compact", "--data-file", tmp_path / "out" / "data")
    with open(tmp_path / "out" / "data", "wb") as data:
        data.seek(200 * MIB)
        data.write(CONTENT)
    before = (tmp_path / "out" / "data").read_bytes()
    assert fvdfs("check", folder / "a.fvd").code == 3
    error = refuses("check", folder / "a.fvd", "--repair", code=1)
    assert f"allow it with -o base_path={tmp_path / 'out'}" in error
    assert (tmp_path / "out" / "data").read_bytes() == before
    must("check", folder / "a.fvd", "--repair", "-o", f"base_path={tmp_path / 'out'}")
    assert (tmp_path / "out" / "data").stat().st_size == 0


# --- there and back -----------------------------------------------------------------------------

LAYOUTS = {
    "plain.fvd": [],
    "compact.fvd": ["--compact", "--chunk-size", "64K"],
    "cow.fvd": ["-b", "base.raw", "--block-size", "4K"],
    "compact-cow.fvd": ["-b", "base.raw", "--block-size", "64K", "--compact", "--chunk-size", "128K"],
    "data.fvd": ["--data-file", "data"],
    "compact-data.fvd": ["--data-file", "compact-data", "--compact"],
    "a.qcow2": [],
    "a.raw": [],
}


PAIRS = [(source, list(LAYOUTS)[(at + step) % len(LAYOUTS)]) for at, source in enumerate(LAYOUTS) for step in (1, 3)]


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.slow
def test_both_ways(folder: Path, source: str, target: str) -> None:
    """Sparse content, over a base that has something where the disk has nothing."""
    chance = random.Random(f"{source} {target}")
    content = bytearray(8 * MIB + 512)
    base = bytearray(6 * MIB)
    for disk in (content, base):
        for _ in range(6):
            start = chance.randrange(0, len(disk), 512)
            part = chance.randbytes(min(chance.choice([512, 70_000, 300_000]), len(disk) - start))
            disk[start : start + len(part)] = part
    (folder / "in.raw").write_bytes(content)
    (folder / "base.raw").write_bytes(base)
    os.truncate(folder / "base.raw", 6 * MIB)
    words = ["-f", "qcow2"] if source == "a.qcow2" else []
    must("convert", folder / "in.raw", folder / source, *LAYOUTS[source])
    other = folder / "other"
    other.mkdir()
    (other / "base.raw").write_bytes(base[::-1])
    must("convert", *words, folder / source, other / target, *LAYOUTS[target])
    if target.endswith(".fvd"):
        assert b"".join(reference.read_disk(other / target)) == content
        assert reference.check(other / target, "fvdfs") == []
        must("check", other / target)
    words = ["-f", "qcow2"] if target == "a.qcow2" else []
    must("convert", *words, other / target, folder / "back.raw")
    assert (folder / "back.raw").read_bytes() == content


def test_compression_tells_how_far_it_is(folder: Path) -> None:
    """First all is copied, then all is compressed."""
    (folder / "a.raw").write_bytes(CONTENT)
    told: list[tuple[int, int]] = []
    work = functools.partial(
        convert,
        str(folder / "a.raw"),
        str(folder / "a.qcow2"),
        source_format="",
        target_format="",
        options=CreateOptions(),
        force=False,
        permission=Permission(),
        progress=lambda done, total: told.append((done, total)),
        compress=True,
    )
    assert trio.run(work) == []
    first = told.index((len(CONTENT), len(CONTENT)))
    second = [done for done, _ in told[first + 1 :]]
    assert min(second) < len(CONTENT)
    assert second[-1] == len(CONTENT)
    assert {total for _, total in told} == {len(CONTENT)}
    qemu_img("compare", folder / "a.raw", folder / "a.qcow2")
