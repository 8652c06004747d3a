"""What commands and the log say on a bad day: which file, in the words of the user."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fvdfs.errors import told
from fvdfs.ops.answers import error_number
from fvdfs.ops.complaints import Complaints
from fvdfs.store.host import open_path
from fvdfs.store.paths import Walker
from support.devices import small_disk
from support.mounts import MIB, fvdfs, mounted, must
from support.servers import nbd_server


def test_an_error_names_the_file_by_its_path(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            with pytest.raises(OSError, match="Text file busy") as caught:
                open_path(str(program), writable=True)
        finally:
            process.kill()
    assert caught.value.filename == str(program)
    with pytest.raises(OSError, match="No data available") as caught:
        Walker().attribute(os.fsencode(program), "user.none")
    assert told(caught.value) == f"{program}: No data available"


def test_the_log_holds_no_byte_strings(caplog: pytest.LogCaptureFixture) -> None:
    error = OSError(errno.EIO, "Input/output error", b"/images/a.fvd")
    assert error_number(error, "read", Complaints()) == errno.EIO
    assert "read: /images/a.fvd: Input/output error" in caplog.text
    assert "b'" not in caplog.text


def test_a_base_behind_a_url(folder: Path) -> None:
    """Its name is shown as it is, and the option that a message names is one of the command's."""
    (folder / "base.raw").write_bytes(b"b" * MIB)
    image = folder / "a.fvd"
    with nbd_server(folder / "base.raw", folder.parent / "socket") as url:
        must("create", image, "-b", url, "-F", "raw")
        refused = json.loads(must("info", image, "--json"))
        assert refused["base_chain"] == [{"name": url, "path": url, "format": "raw"}]
        assert "allow it with -o 'allow_url=" in refused["problems"][0]
        assert "allow it with -o 'allow_url=" in fvdfs("map", image).err
        for words in (["info", "--json"], ["map", "--json"]):
            done = fvdfs(*words, image, "-o", "allow_url=nbd+unix:///")
            assert (done.code, done.err) == (0, "")
            if words[0] == "info":
                assert json.loads(done.out)["problems"] == []


def test_status_of_one_disk_and_of_images_that_do_not_appear(folder: Path) -> None:
    for name in ("a", "b"):
        must("create", folder / f"{name}.fvd", "1M")
    damaged = bytearray((folder / "b.fvd").read_bytes())
    damaged[8:16] = b"\xff" * 8
    (folder / "bad.fvd").write_bytes(damaged)
    for number in range(200):
        (folder / f"{'x' * 100}{number}.fvd").write_bytes(damaged)
    with mounted(folder) as mount:
        [_header, line] = must("status", mount.raw("a")).splitlines()
        assert line.split()[:3] == ["a.raw", "1", "MiB"]
        [image] = json.loads(must("status", "--json", mount.raw("a")))["images"]
        assert image["name"] == "a.raw"
        images = json.loads(must("status", "--json", mount.point))["images"]
        refused = [image for image in images if image["state"] == "refused"]
        assert [image["name"] for image in images[:2]] == ["a.raw", "b.raw"]
        assert refused[-1]["name"] == f"{202 - len(refused)} more images"
        for number in range(200):
            (folder / f"{'x' * 100}{number}.fvd").unlink()
        [_first, _second, line] = must("status", mount.point).splitlines()[1:]
        assert line.split()[:2] == ["bad.fvd", "refused"]
        assert str(folder / "bad.fvd") in line
        (folder / "bad.fvd").unlink()
        assert len(json.loads(must("status", "--json", mount.point))["images"]) == 2


def test_an_image_of_qemus_is_called_that(folder: Path) -> None:
    (folder / "a.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(65536))
    done = fvdfs("info", folder / "a.qcow2")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "a.qcow2: is a qcow2 file, not an FVD image; qemu-img info shows it" in done.err


def test_what_takes_images_says_which_a_raw_file_is(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        raw = mount.raw("a")
        for command, *more in (["info"], ["check"], ["revert"], ["amend", "-F", "raw"]):
            done = fvdfs(command, raw, *more)
            assert (done.code, done.err) == (
                1 if command == "check" else 2,
                f"fvdfs: {raw}: is a raw file in a mount; name its image: {folder}/a.fvd\n",
            )
        assert fvdfs("status", "--watch", raw).err == f"fvdfs: {raw}: is not the mount point: name that\n"
        assert must("snapshots", mount.point) == must("snapshots", folder)


def test_status_of_a_disk_that_is_not_there(folder: Path) -> None:
    (folder / "out.fvd").symlink_to("out.fvd")
    with mounted(folder) as mount:
        for name, why in (
            ("none", "there is no such file"),
            ("out", "does not appear: Too many levels of symbolic links"),
        ):
            done = fvdfs("status", mount.raw(name))
            assert (done.code, done.err) == (2, f"fvdfs: {mount.raw(name)}: {why}\n")


def test_what_a_read_only_mount_does_not_do(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder, "--read-only") as mount:
        raw = mount.raw("a")
        for words in (["snapshot", f"{raw}"], ["resize", f"{raw}", "2M"], ["prefetch", "start", f"{raw}"]):
            done = fvdfs(*words)
            assert done.code in (1, 2)
            assert done.err == f"fvdfs: {raw}: cannot be written: the mount is read-only\n"


def test_a_disk_that_another_mount_has_open(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    (folder.parent / "others").mkdir()
    (folder.parent / "others" / "a.fvd").symlink_to(folder / "a.fvd")
    os.link(folder / "a.fvd", folder.parent / "others" / "b.fvd")
    with mounted(folder) as mount, mounted(folder.parent / "others") as other, open(mount.raw("a"), "r+b"):
        for command in ("snapshot", "map"):
            done = fvdfs(command, other.raw("a"))
            assert done.code == 1
            assert done.err == f"fvdfs: {other.raw('a')}: its image is open in another mount or process; " + (
                "close it there first\n"
            )
        for command, image in (("map", folder.parent / "others" / "b.fvd"), ("flatten", folder / "a.fvd")):
            assert fvdfs(command, image).err.endswith(", or name the raw file in its mount\n")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(os.urandom(MIB))
    folder = tmp_path / "small"
    with small_disk(folder, "256K"):
        must("create", folder / "a.fvd", "--base", tmp_path / "base.raw", "-F", "raw", "--journal-size", "none")
        done = fvdfs("flatten", folder / "a.fvd")
        assert (done.code, done.err) == (1, f"fvdfs: {folder}/a.fvd: No space left on device\n")


def test_a_base_that_is_missing_is_one_line_for_all_on_it(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("clone", folder / "base.raw", "vm", "--into", folder)
    for _ in range(3):
        must("snapshot", folder / "vm.fvd")
    must("clone", folder / "base.raw", "one", "-n", "20", "--into", folder)
    (folder / "base.raw").unlink()
    (folder.parent / "point").mkdir()
    done = fvdfs("mount", folder, folder.parent / "point")
    fvdfs("umount", folder.parent / "point")
    lines = done.err.splitlines()
    assert lines[-1] == f"fvdfs: {folder}: 24 images do not appear; the first are named above"
    assert len(lines) == 11
    assert len(set(lines)) == 11


def test_the_tree_of_one_disk_has_no_loose_ends(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("clone", folder / "base.raw", "a", "b", "--into", folder)
    must("snapshot", folder / "a.fvd", "x.fvd")
    lines = must("snapshots", folder / "a.fvd").splitlines()
    assert [line.partition(".fvd")[0] for line in lines[2:]] == ["└─ a@x", "   └─ a"]


def test_a_command_that_asks_for_the_secret_takes_it(folder: Path) -> None:
    image, secret = folder / "vm.fvd", ["--secret", str(folder / "key")]
    (folder / "key").write_text("secret")
    must("create", image, "4M", "--data-file", "vm.luks", "--data-format", "luks", *secret)
    for words in (["revert", str(image), "monday"], ["freeze", str(image)]):
        done = fvdfs(*words)
        assert (done.code, "--secret FILE" in done.err) == (1, True)
    done = fvdfs("revert", image, "monday", *secret)
    assert (done.code, "has no snapshot monday" in done.err) == (2, True)
    must("freeze", image, *secret)
    must("thaw", image)
    assert fvdfs("thaw", image).err == f"fvdfs: {image}: is not frozen\n"
    with mounted(folder, "-o", f"secret={folder / 'key'}") as mount:
        done = fvdfs("freeze", mount.raw("vm"), *secret)
        assert (done.code, "a mount has its own" in done.err) == (2, True)


def test_a_raw_file_that_no_mount_shows(folder: Path) -> None:
    """It is no disk: what to do with it is said, and where it lies beside an image of its name."""
    raw = folder / "a b.raw"
    raw.write_bytes(bytes(MIB))
    makes = f"fvdfs convert '{raw}' '{folder}/a b.fvd' makes an image of it\n"
    for words in (["map"], ["snapshots"], ["info"], ["check"], ["prefetch", "start"], ["snapshot"]):
        done = fvdfs(*words, raw)
        assert done.code != 0
        assert done.err.endswith(makes), words
        assert done.err.count("\n") == 1
    must("create", folder / "a b.fvd", "1M")
    assert fvdfs("map", raw).err.endswith(f"; its image may be {folder}/a b.fvd\n")
    assert fvdfs("map", "/dev/null.raw").err == "fvdfs: /dev/null.raw: there is no such file\n"


def test_what_to_do_about_images_that_do_not_appear(folder: Path) -> None:
    for name in ("bad", "lost"):
        must("create", folder / f"{name}.fvd", "1M", "--data-file", "auto")
    with open(folder / "bad.fvd", "r+b") as file:
        file.seek(8)
        file.write(b"\xff" * 8)
    (folder / "lost.fvd.data").unlink()
    (folder / "none.fvd").write_bytes(bytes(MIB))
    with mounted(folder) as mount:
        refused = {
            image["name"]: image["failed"] for image in json.loads(must("status", "--json", mount.point))["images"]
        }
        log = mount.log
    advice = {
        "bad.fvd": f"; fvdfs check {folder}/bad.fvd says what is wrong",
        "lost.fvd": "; it holds the disk's data: bring it back",
        "none.fvd": "; fvdfs convert makes one of a disk in another format",
    }
    assert refused.keys() == advice.keys()
    for name, what in advice.items():
        assert refused[name].endswith(what)
        assert f"{refused[name]}\n" in log


def test_a_snapshot_that_is_not_there(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        for name in (folder / "a@no.fvd", mount.point / "a@no.raw"):
            done = fvdfs("delete", name)
            said = f"fvdfs: {folder}/a@no.fvd: there is no such file; fvdfs snapshots {folder} shows which there are\n"
            assert (done.code, done.err) == (2, said)
    assert "record|show, IMAGE" in fvdfs("profile").err
    assert "start|pause|stop" in fvdfs("prefetch").err
