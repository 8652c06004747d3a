"""Paths that lead back into the mount: refused, before a thread of ours waits for our own process for ever.

Whatever goes wrong here would leave processes that nobody can kill: so what touches a mount is another process with a
time limit, and in the end the connection to the kernel is aborted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from fvdfs.store import paths
from fvdfs.store.mountinfo import mount_points
from fvdfs.store.paths import Walker
from support.devices import loop_device
from support.mounts import MIB, Mount, fuse_connection, fvdfs, must, wait_for_end, wait_for_log


def abort(point: Path) -> None:
    """End a mount, whoever waits for it, and clear it away."""
    for mount in mount_points():
        if mount.path == str(point):
            with fuse_connection(mount.device) as connection, contextlib.suppress(OSError):
                (connection / "abort").write_text("1")
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)


@contextlib.contextmanager
def mounted_at(folder: Path, point: Path, *options: str) -> Iterator[Mount]:
    """The folder, mounted; aborted at the end, if need be."""
    point.mkdir(parents=True, exist_ok=True)
    mount = Mount(folder, point, folder.parent / f"{folder.name}.log", options=options)
    done = fvdfs("mount", folder, point, "--log-file", mount.log_file, *options, timeout=30)
    assert done.code == 0, done.err
    mount.pid = int(os.getxattr(point, "user.fvdfs.pid"))
    try:
        yield mount
    finally:
        try:
            if mount.pid:
                must("umount", point, timeout=60)
        finally:
            abort(point)


def read(path: Path, timeout: float = 20) -> int:
    """The exit code of a process that reads the file; it must end."""
    return subprocess.run(["cat", path], capture_output=True, timeout=timeout, check=False).returncode


def name_in_header(image: Path, **fields: str) -> None:
    with open(image, "r+b") as file:
        header = with_fields(Header.decode(file.read(HEADER_SIZE), str(image)), **fields)
        file.seek(0)
        file.write(header.encode())


def must_be_refused(mount: Mount, name: str, why: str) -> None:
    """The image does not appear, and says why; the others go on; the process can be killed."""
    assert read(mount.raw(name)) != 0
    wait_for_log(mount, why)
    assert f"{name}.raw" not in subprocess.run(["ls", mount.point], capture_output=True, text=True, timeout=20).stdout
    assert read(mount.raw("other")) == 0
    os.kill(mount.pid, signal.SIGKILL)
    wait_for_end(mount.pid)
    mount.pid = 0


@pytest.fixture
def images(folder: Path) -> Path:
    """Images whose disks others are going to stand on."""
    for name in ("a", "other"):
        must("create", folder / f"{name}.fvd", "1M")
    (folder / "base.raw").write_bytes(bytes(MIB))
    for name in ("over", "over-fvd"):
        must("create", folder / f"{name}.new.fvd", "--base", folder / "base.raw")
    must("create", folder / "apart.new.fvd", "1M", "--data-file", "base.raw", "--force")
    return folder


@pytest.mark.parametrize(
    ("image", "fields"),
    [
        ("over", {"base_img": "mnt/a.raw"}),
        ("over", {"base_img": "link/a.raw"}),
        ("over", {"base_img": "mnt/../mnt/no.raw"}),
        ("over", {"base_img": "mnt"}),
        ("over", {"base_img": "mnt/a.raw", "base_img_fmt": "qcow2"}),
        ("over-fvd", {"base_img": "mnt/a.raw", "base_img_fmt": "fvd"}),
        ("apart", {"data_file": "mnt/a.raw"}),
        ("over", {"base_img": "nbd+unix:///?socket=mnt/socket"}),
    ],
    ids=["name", "link", "dots", "root", "qcow2", "fvd", "data-file", "socket"],
)
def test_a_name_that_leads_into_the_own_mount(images: Path, image: str, fields: dict[str, str]) -> None:
    (images / "mnt").mkdir()
    (images / "link").symlink_to("mnt")
    if "socket" in fields.get("base_img", ""):
        fields = {"base_img": f"nbd+unix:///?socket={images}/mnt/socket"}
    with mounted_at(images, images / "mnt", "-o", "allow_url=nbd+unix:///") as mount:
        name_in_header(images / f"{image}.new.fvd", **{"base_img_fmt": "raw"} | fields)
        os.rename(images / f"{image}.new.fvd", images / "bad.fvd")
        must_be_refused(mount, "bad", "leads into this mount itself")


def test_an_image_that_is_a_link_into_the_own_mount(images: Path) -> None:
    with mounted_at(images, images / "mnt") as mount:
        (images / "bad.fvd").symlink_to(images / "mnt" / "a.raw")
        must_be_refused(mount, "bad", "bad.fvd: leads into this mount itself")


def test_a_mount_point_that_is_named_as_an_image(images: Path) -> None:
    with mounted_at(images, images / "bad.fvd") as mount:
        must_be_refused(mount, "bad", "bad.fvd: leads into this mount itself")


def test_a_loop_device_on_a_file_of_the_own_mount(images: Path, tmp_path: Path) -> None:
    with mounted_at(images, tmp_path / "mnt", "-o", "base_path=/dev") as mount, loop_device(mount.raw("a")) as device:
        name_in_header(images / "over.new.fvd", base_img=str(device), base_img_fmt="raw")
        os.rename(images / "over.new.fvd", images / "bad.fvd")
        assert read(mount.raw("bad")) != 0
        wait_for_log(mount, "leads into this mount itself")
        assert read(mount.raw("other")) == 0


def test_a_file_system_on_a_disk_of_the_own_mount(images: Path, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    with mounted_at(images, tmp_path / "mnt", "-o", f"base_path={tmp_path}") as mount:
        subprocess.run(["mkfs.ext4", "-q", mount.raw("a")], check=True, timeout=60)
        with loop_device(mount.raw("a")) as device:
            subprocess.run(["mount", device, tmp_path / "inside"], check=True, timeout=60)
            try:
                (tmp_path / "inside" / "base.raw").write_bytes(bytes(4096))
                name_in_header(images / "over.new.fvd", base_img=f"{tmp_path}/inside/base.raw", base_img_fmt="raw")
                os.rename(images / "over.new.fvd", images / "bad.fvd")
                assert read(mount.raw("bad")) != 0
                wait_for_log(mount, "leads into this mount itself")
                assert read(mount.raw("other")) == 0
            finally:
                subprocess.run(["umount", tmp_path / "inside"], check=True, timeout=60)


def test_another_program_that_shows_the_own_mount(images: Path, tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    with mounted_at(images, tmp_path / "mnt", "-o", f"base_path={tmp_path}") as mount:
        subprocess.run(["bindfs", mount.point, tmp_path / "shown"], check=True, timeout=30)
        try:
            name_in_header(images / "over.new.fvd", base_img=f"{tmp_path}/shown/a.raw", base_img_fmt="raw")
            os.rename(images / "over.new.fvd", images / "bad.fvd")
            must_be_refused(mount, "bad", "leads into this mount itself")
        finally:
            subprocess.run(["umount", "-l", tmp_path / "shown"], check=True)


def test_two_mounts_that_lead_to_each_other(tmp_path: Path) -> None:
    options = ("-o", f"base_path={tmp_path}")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / "base.raw").write_bytes(bytes(MIB))
        must("create", tmp_path / name / "other.fvd", "1M")
        must("create", tmp_path / name / "bad.new.fvd", "--base", tmp_path / "base.raw")
    with (
        mounted_at(tmp_path / "one", tmp_path / "mnt1", *options) as first,
        mounted_at(tmp_path / "two", tmp_path / "mnt2", *options) as second,
    ):
        for name, other in (("one", second), ("two", first)):
            name_in_header(tmp_path / name / "bad.new.fvd", base_img=str(other.raw("bad")), base_img_fmt="raw")
            os.rename(tmp_path / name / "bad.new.fvd", tmp_path / name / "bad.fvd")
        for mount in (first, second):
            assert read(mount.raw("bad")) != 0
            wait_for_log(mount, "a mount of fvdfs: name the image itself")
            assert read(mount.raw("other")) == 0
        for mount in (first, second):
            os.kill(mount.pid, signal.SIGKILL)
            wait_for_end(mount.pid)
            mount.pid = 0


# --- refused at once ------------------------------------------------------------------------------


def must_not_mount(folder: Path, point: Path, why: str, *options: str) -> None:
    done = fvdfs("mount", folder, point, *options, timeout=30)
    try:
        assert done.code == 2, done
        assert why in done.err
        assert done.err.count("\n") == 1, done.err
        assert not any(mount.path == str(point) for mount in mount_points())
    finally:
        abort(point)


def test_a_mount_point_above_the_images(images: Path) -> None:
    must_not_mount(images, images.parent, "would be hidden by the mount")
    must_not_mount(images, images, "hidden")


def test_a_mount_point_above_the_images_by_another_name(images: Path, tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    subprocess.run(["mount", "--bind", images, tmp_path / "same"], check=True)
    try:
        with mounted_at(tmp_path / "same", images) as mount:  # still reached by the other name
            assert read(mount.raw("other")) == 0
    finally:
        subprocess.run(["umount", "-l", tmp_path / "same"], check=True)


@pytest.mark.parametrize("option", ["base_path={}", "secret={}/key", "tls_creds={}", "grow_command={}/grow"])
def test_an_option_that_leads_below_the_mount_point(images: Path, tmp_path: Path, option: str) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    for name in ("key", "keys.psk", "grow"):
        (point / name).write_text("#!/bin/sh\n")
        (point / name).chmod(0o700)
    must_not_mount(images, point, "would be hidden by the mount", "-o", option.format(point))


def test_a_log_file_below_the_mount_point(images: Path, tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    must_not_mount(images, point, "would be hidden by the mount", "--log-file", str(point / "log"))


def test_a_folder_inside_a_mount_of_fvdfs(images: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    with mounted_at(images, tmp_path / "mnt") as mount:
        must_not_mount(mount.point, tmp_path / "again", "a mount of fvdfs")
        must_not_mount(mount.point, tmp_path / "again", "a mount of fvdfs", "-o", "keep")


def test_a_check_leaves_no_thread_behind_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it end the look that it is a part of."""
    monkeypatch.setattr(paths, "is_share", lambda device: True)
    walker, thread = Walker(own_device=0), threading.get_ident()
    walker.check(str(tmp_path))
    assert not walker.is_at_share(thread)
    with walker.looking():
        walker.enter(1)
        walker.check(str(tmp_path))
        assert walker.is_at_share(thread)
    assert not walker.is_at_share(thread)
