"""`fvdfs clone`: what the clones are, and that there are all of them, or none."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fvdfs.commands.clone import PREFETCH_DELAY, clone_paths
from fvdfs.errors import UsageError
from fvdfs.format.header import Header
from support.devices import small_disk
from support.mounts import FVDFS, MIB, Finished, fvdfs, mounted, must, running, wait_until
from support.servers import nbd_server

CONTENT = random.Random(16).randbytes(MIB)


def header(image: Path) -> Header:
    return Header.decode(image.read_bytes()[:8192], str(image))


def names(folder: Path) -> list[str]:
    """Also of what is left behind."""
    return sorted(os.listdir(folder))


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "store" / "template.raw"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


def refused(done: Finished, words: str, code: int = 2) -> None:
    assert done.code == code, done
    assert words in done.err
    assert done.err.count("\n") == 1


# --- what they are --------------------------------------------------------------------------------


def test_clones_are_disks_of_their_own(folder: Path, template: Path) -> None:
    done = fvdfs("clone", template, "a", "b.fvd", "--into", folder)
    assert done.code == 0
    assert f"a mount of it needs -o base_path={template.parent}" in done.err
    assert names(folder) == ["a.fvd", "b.fvd"]
    found = header(folder / "a.fvd")
    assert (found.base_img, found.base_img_fmt) == (str(template), "raw")
    assert (found.copy_on_read, found.prefetch_start_delay) == (1, PREFETCH_DELAY)
    with mounted(folder, "-o", f"base_path={template.parent}") as mount:
        with open(mount.raw("a"), "r+b") as disk:
            disk.write(b"mine")
        assert mount.raw("a").read_bytes() == b"mine" + CONTENT[4:]
        assert mount.raw("b").read_bytes() == CONTENT
    must("check", folder / "a.fvd")
    assert template.read_bytes() == CONTENT


def test_a_template_in_the_folder_is_named_relative_to_it(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "template.raw").write_bytes(CONTENT)
    assert fvdfs("clone", folder / "sub" / "template.raw", "a", "--into", folder).err == ""
    assert header(folder / "a.fvd").base_img == "sub/template.raw"
    assert fvdfs("clone", "images/sub/template.raw", "images/b", "images/c", cwd=folder.parent).err == ""
    assert header(folder / "c.fvd").base_img == "sub/template.raw"
    with mounted(folder) as mount:
        assert mount.raw("c").read_bytes() == CONTENT


def start_of(path: Path, size: int) -> bytes:
    """Its first bytes; of 20 GiB, which are sparse, no more are read."""
    with open(path, "rb") as file:
        return file.read(size)


def test_a_thousand_take_little_room(folder: Path, template: Path) -> None:
    os.truncate(template, 20 << 30)
    must("clone", template, "vm", "-n", "1000", "--into", folder)
    assert names(folder) == [f"vm-{number:04}.fvd" for number in range(1, 1001)]
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 20 * MIB
    first, last = (start_of(folder / name, 8192) for name in ("vm-0001.fvd", "vm-1000.fvd"))
    assert first == last
    must("check", folder / "vm-1000.fvd")


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    assert clone_paths(["vm"], 2, "dir") == ["dir/vm-0001.fvd", "dir/vm-0002.fvd"]
    assert clone_paths(["vm.fvd"], 10000, "")[-1] == "vm-10000.fvd"
    assert clone_paths(["dir/a", "dir/b.fvd"], None, "") == ["dir/a.fvd", "dir/b.fvd"]
    for given, count, words in (
        (["a", "b"], 3, "-n 3 numbers the clones of one NAME"),
        (["a", "x/b"], None, "lie in one folder"),
        (["a", "a.fvd"], None, "is named twice"),
        ([".fvd"], None, "is not a name"),
        (["nosuch/a"], None, "is not a directory"),
    ):
        with pytest.raises(UsageError, match=words):
            clone_paths(given, count, "")


def test_qcow2(folder: Path, template: Path) -> None:
    qcow2 = folder / "template.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", template, qcow2], check=True)
    done = fvdfs("clone", qcow2, "a", "--into", folder)
    refused(done, f"fvdfs: {qcow2}: looks like qcow2; say what it is: --base-format qcow2, or raw\n")
    must("clone", qcow2, "a", "--into", folder, "-F", "qcow2")
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == CONTENT


def test_url(folder: Path, template: Path, tmp_path: Path) -> None:
    with nbd_server(template, tmp_path / "socket") as url:
        must("clone", url, "a", "b", "--into", folder)
        assert header(folder / "a.fvd").base_img == url
        with mounted(folder, "-o", f"allow_url={url}") as mount:
            assert mount.raw("b").read_bytes() == CONTENT


# --- the profile and the cache --------------------------------------------------------------------


def profile_of(image: Path) -> str:
    return must("profile", "show", image).partition("\n")[2]


def test_a_profile_beside_the_template_or_in_it_or_named(folder: Path, template: Path, tmp_path: Path) -> None:
    (template.parent / "template.raw.profile").write_text("4096 8192\n")
    must("clone", template, "a", "--into", folder)
    assert profile_of(folder / "a.fvd") == "4096 8192\n"
    assert header(folder / "a.fvd").profile_directed_prefetch_start_delay == 0
    must("clone", folder / "a.fvd", "b", "--into", folder)
    assert profile_of(folder / "b.fvd") == "4096 8192\n"
    (tmp_path / "other").write_text("0 4096\n")
    must("clone", folder / "a.fvd", "c", "--into", folder, "--profile", tmp_path / "other")
    assert profile_of(folder / "c.fvd") == "0 4096\n"


def test_clones_stand_on_the_cache_of_the_folder(folder: Path, template: Path) -> None:
    must("create", folder / "cache.fvd", "--base", template, "-F", "raw", "--copy-on-read")
    done = fvdfs("clone", template, "a", "--into", folder)
    assert done.err == f"fvdfs: {folder}/cache.fvd: is a cache of {template}; the clones stand on it\n"
    found = header(folder / "a.fvd")
    assert (found.base_img, found.base_img_fmt) == ("cache.fvd", "fvd")
    assert (found.copy_on_read, found.prefetch_start_delay) == (0, -1)  # the cache does both, for all
    with mounted(folder, "-o", f"base_path={template.parent}") as mount:
        assert mount.raw("a").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other.fvd", ["--copy-on-read"]),  # perhaps a machine's disk
        ("cache.fvd", []),
        ("cache.fvd", ["2M", "--copy-on-read"]),
        ("cache.fvd", ["512K", "--copy-on-read"]),
    ],
)
def test_what_is_no_cache(folder: Path, template: Path, name: str, words: list[str]) -> None:
    must("create", folder / name, *words, "--base", template, "-F", "raw")
    (folder / "broken-cache.fvd").write_bytes(b"nothing")
    must("create", folder / "other-cache.fvd", "1M", "--copy-on-read", "--base", folder / name)
    must("clone", template, "a", "--into", folder)
    assert header(folder / "a.fvd").base_img == str(template)


def test_the_cache_of_a_url(folder: Path, template: Path, tmp_path: Path) -> None:
    with nbd_server(template, tmp_path / "socket") as url:
        must("create", folder / "nbd-cache.fvd", "--base", url, "--copy-on-read")
        must("clone", url, "a", "--into", folder)
        assert header(folder / "a.fvd").base_img == "nbd-cache.fvd"


# --- all or none ----------------------------------------------------------------------------------


def test_a_name_that_is_taken(folder: Path, template: Path) -> None:
    (folder / "vm-0500.fvd").write_bytes(b"somebody's")
    refused(fvdfs("clone", template, "vm", "-n", "600", "--into", folder), "vm-0500.fvd exists already")
    assert names(folder) == ["vm-0500.fvd"]
    assert (folder / "vm-0500.fvd").read_bytes() == b"somebody's"


def test_a_name_that_is_too_long(folder: Path, template: Path) -> None:
    refused(fvdfs("clone", template, "a", "x" * 252, "--into", folder), "File name too long")
    assert names(folder) == []


def test_a_base_name_that_is_too_long(folder: Path, template: Path) -> None:
    url = f"nbd+unix:///?socket={'x' * 1100}"
    assert fvdfs("clone", url, "a", "--into", folder).code == 2
    assert names(folder) == []


def test_a_full_disk(tmp_path: Path, template: Path) -> None:
    folder = tmp_path / "small"
    with small_disk(folder, "1M"):
        refused(fvdfs("clone", template, "vm", "-n", "500", "--into", folder), "none of 500 clones was made", code=1)
        assert names(folder) == []


def test_a_full_file_system_that_allocates_late(tmp_path: Path, template: Path) -> None:
    folder, disk = tmp_path / "small", tmp_path / "disk"
    folder.mkdir()
    with open(disk, "wb") as file:
        file.truncate(2 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-N", "2000", disk], check=True)
    subprocess.run(["mount", "-o", "loop", disk, folder], check=True)
    try:
        before = names(folder)
        done = fvdfs("clone", template, "vm", "-n", "1500", "--into", folder)
        refused(done, "No space left on device", code=1)
        assert names(folder) == before
    finally:
        subprocess.run(["umount", folder], check=True)


def test_ctrl_c(folder: Path, template: Path) -> None:
    """Whenever it comes: all that there are then are whole, and as many as it says."""

    def has_begun(process: subprocess.Popen[str], after: int) -> bool:
        return len(names(folder)) > after or process.poll() is not None

    seen = set()
    for after in range(0, 3000, 270):
        command = [*FVDFS, "clone", str(template), "vm", "-n", "3000", "--into", str(folder)]
        with running(*command, stderr=subprocess.PIPE, text=True) as process:
            wait_until(functools.partial(has_begun, process, after))
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
        made = names(folder)
        assert process.returncode == 130 or not said
        assert f"interrupted: {len(made)} of 3000 clones were made\n" in said or process.returncode == 0
        assert not [name for name in made if ".part" in name]
        assert len(made) in (0, 3000)
        seen.add(len(made))
        for name in made:
            (folder / name).unlink()
    assert 0 in seen


def test_a_template_that_somebody_writes(folder: Path, template: Path) -> None:
    must("create", folder / "disk.fvd", "1M")
    with mounted(folder) as mount, open(mount.raw("disk"), "r+b"):
        refused(fvdfs("clone", folder / "disk.fvd", "a", "--into", folder), "disk.fvd", code=1)
        refused(fvdfs("clone", mount.raw("disk"), "a", "--into", folder), "name the image that it shows")


def test_killed_at_any_moment(folder: Path, template: Path) -> None:
    """What has its name is whole."""
    for after in range(0, 800, 190):
        command = [*FVDFS, "clone", str(template), "vm", "-n", "400", "--into", str(folder)]
        with running(*command, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 30
            while sum(name.startswith("vm") + 1 for name in names(folder)) < after and process.poll() is None:
                assert time.monotonic() < deadline
        for name in names(folder):
            if name.startswith("vm"):
                assert header(folder / name).base_img == str(template)
                assert os.stat(folder / name).st_size == header(folder / name).metadata_size + len(CONTENT)
            (folder / name).unlink()
