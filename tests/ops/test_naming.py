"""Disks that are made, renamed and removed through a mount: `-o create`, `remove`, `new_base`, `new_layout`."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.format.header import Header
from fvdfs.store.placing import give_name
from support.devices import small_disk
from support.mounts import MIB, Mount, fvdfs, mounted, must, running, wait_for_log, wait_until
from support.reference import read_disk
from support.servers import nbd_server

CONTENT = random.Random(7).randbytes(2 * MIB)
TEMPLATE = random.Random(8).randbytes(3 * MIB)
LAYOUTS = ("flat", "compact")


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    with mounted(folder, "-o", "create,remove") as mount:
        yield mount


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "store" / "template.raw"
    path.parent.mkdir()
    path.write_bytes(TEMPLATE)
    return path


def standing_on(template: Path, *more: str) -> tuple[str, str]:
    return "-o", ",".join([f"create,remove,base_path={template.parent},new_base={template}", *more])


def header(image: Path) -> Header:
    with open(image, "rb") as file:
        return Header.decode(file.read(8192), str(image))


def images(folder: Path) -> list[str]:
    """All files: also what is left behind."""
    return sorted(os.listdir(folder))


def error_of(call: object, *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.errno or 0


def make(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL))


# --- making ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_make_disks(folder: Path, tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    os.truncate(source, 4 * MIB)
    with mounted(folder, "-o", f"create,new_layout={layout}") as mount:
        subprocess.run(["cp", "--sparse=always", source, mount.raw("copied")], check=True)
        subprocess.run(["truncate", "-s", "1G", mount.raw("truncated")], check=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", mount.raw("made"), "8M"], check=True)
        subprocess.run(["touch", mount.raw("touched")], check=True)
        mount.raw("written").write_bytes(b"x" * 512)
        sizes = {path.name: path.stat().st_size for path in mount.point.iterdir()}
        assert mount.raw("copied").read_bytes() == source.read_bytes()
        assert "ERROR" not in mount.log
    assert sizes == {
        "copied.raw": 4 * MIB,
        "truncated.raw": 1 << 30,
        "made.raw": 8 * MIB,
        "touched.raw": 0,
        "written.raw": 512,
    }
    assert images(folder) == [f"{name}.fvd" for name in ("copied", "made", "touched", "truncated", "written")]
    for name in images(folder):
        must("check", folder / name)
        assert header(folder / name).compact == (layout == "compact")
        assert os.stat(folder / name).st_blocks * 512 < 3 * MIB
    assert b"".join(read_disk(folder / "copied.fvd")) == source.read_bytes()


def test_a_new_disk_has_the_mode_that_its_maker_says(mount: Mount) -> None:
    descriptor = os.open(mount.raw("a"), os.O_CREAT | os.O_RDWR, 0o440)
    os.write(descriptor, CONTENT)
    os.close(descriptor)
    for path in (mount.raw("a"), mount.folder / "a.fvd"):
        assert os.stat(path).st_mode & 0o777 == 0o440


def test_what_cannot_be_made(folder: Path, mount: Mount) -> None:
    (folder / "broken.fvd").write_bytes(b"somebody's")
    assert error_of(make, mount.point / "a.txt") == errno.EPERM
    assert error_of(make, mount.point / ".raw") == errno.EPERM
    assert error_of(make, mount.raw("broken")) == errno.EEXIST
    assert error_of(make, mount.raw("x" * 252)) == errno.ENAMETOOLONG
    assert "only files NAME.raw can be made here" in mount.log
    assert images(folder) == ["broken.fvd"]


def test_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with small_disk(folder, "64K"), mounted(folder, "-o", "create") as mount:
        (folder / "full").write_bytes(bytes(64 << 10))
        assert error_of(make, mount.raw("a")) == errno.ENOSPC
        assert images(folder) == ["full"]


def test_not_permitted_is_one_line_in_the_log(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    must("create", folder / "b.fvd", "1M")
    with mounted(folder) as mount:
        assert error_of(make, mount.raw("c")) == errno.EPERM
        assert error_of(os.unlink, mount.raw("a")) == errno.EPERM
        assert error_of(os.rename, mount.raw("a"), mount.raw("c")) == errno.EPERM
        assert error_of(os.truncate, mount.raw("a"), 512) == errno.EPERM
        lines = [line.partition("ERROR ")[2] for line in mount.log.splitlines() if "ERROR " in line]
        assert lines == [
            "a disk cannot be made here: mount with -o create",
            "a disk cannot be removed here: mount with -o remove",
            "a disk cannot be renamed here: mount with -o create",
            "a disk cannot be cut, nor overwritten by cp, here: mount with -o shrink",
        ]
    with mounted(folder, "-o", "create") as mount:
        assert error_of(os.rename, mount.raw("a"), mount.raw("b")) == errno.EPERM
        assert "cannot be replaced by another one here: mount with -o remove" in mount.log
    assert images(folder) == ["a.fvd", "b.fvd"]


# --- clones of a template -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_holds_nothing_but_zeros_becomes_a_clone(folder: Path, template: Path, layout: str) -> None:
    (template.parent / "template.raw.profile").write_text("4096 8192\n")
    with mounted(folder, *standing_on(template, f"new_layout={layout}")) as mount:
        for _ in range(10):  # whoever looks after the close sees it
            subprocess.run(["touch", mount.raw("touched")], check=True)
            assert mount.raw("touched").stat().st_size == len(TEMPLATE)
            assert mount.raw("touched").read_bytes() == TEMPLATE
            mount.raw("touched").unlink()
        subprocess.run(["touch", mount.raw("touched")], check=True)
        subprocess.run(["truncate", "-s", "40M", mount.raw("longer")], check=True)
        assert mount.raw("longer").read_bytes() == TEMPLATE.ljust(40 * MIB, b"\0")
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", mount.raw("shorter"), "1M"], check=True)
        assert mount.raw("shorter").read_bytes() == TEMPLATE[:MIB]
        with open(mount.raw("shorter"), "r+b") as disk:
            disk.write(b"mine")
        assert "ERROR" not in mount.log
    found = header(folder / "touched.fvd")
    assert (found.base_img, found.copy_on_read, found.compact) == (str(template), 1, layout == "compact")
    assert must("profile", "show", folder / "touched.fvd").endswith("\n4096 8192\n")
    assert images(folder) == ["longer.fvd", "shorter.fvd", "touched.fvd"]
    for name in images(folder):
        must("check", folder / name)


def test_what_somebody_has_written_is_what_he_has_written(folder: Path, template: Path, tmp_path: Path) -> None:
    """Zeros, too, that a copy need not write: the new disk had none of the template when it began."""
    source = tmp_path / "source"
    source.write_bytes(b"end".rjust(MIB, b"\0"))
    os.truncate(source, 2 * MIB)
    with mounted(folder, *standing_on(template)) as mount:
        subprocess.run(["cp", "--sparse=always", source, mount.raw("a")], check=True)
        assert mount.raw("a").read_bytes() == source.read_bytes()
        script = f"(true; sleep 0.2; printf late; head -c 508 /dev/zero) > {mount.raw('b')}"
        subprocess.run(["sh", "-c", script], check=True)  # a child closes it before anything was written
        assert mount.raw("b").read_bytes() == b"late".ljust(512, b"\0")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_program_that_opens_its_new_disk_once_more_finds_it_empty(
    folder: Path, template: Path, tmp_path: Path, layout: str
) -> None:
    """`qemu-img convert` makes its target, closes it, opens it again, and leaves out what is zeros in the source."""
    source = tmp_path / "source"
    source.write_bytes(b"end".rjust(MIB, b"\0"))
    os.truncate(source, 2 * MIB)
    with mounted(folder, *standing_on(template, f"new_layout={layout}")) as mount:
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", source, mount.raw("a")], check=True)
        assert mount.raw("a").read_bytes() == source.read_bytes()
        subprocess.run(["truncate", "-s", "2M", mount.raw("b")], check=True)
        with open(mount.raw("b"), "r+b") as disk:  # another program: it is the clone's user
            assert disk.read() == TEMPLATE[: 2 * MIB]
        with open(mount.raw("c"), "xb") as disk:
            disk.truncate(2 * MIB)
        assert mount.raw("c").read_bytes() == TEMPLATE[: 2 * MIB]
        with open(mount.raw("c"), "r+b") as disk:
            assert disk.read() == bytes(2 * MIB)
        assert mount.raw("c").read_bytes() == TEMPLATE[: 2 * MIB]  # it still holds nothing but zeros
        with open(mount.raw("d"), "xb") as disk:
            disk.truncate(2 * MIB)
        subprocess.run(["dd", "if=/dev/zero", f"of={mount.raw('d')}", "bs=512", "count=1", "conv=notrunc"], check=True)
        with open(mount.raw("d"), "r+b") as disk:  # somebody has written to it meanwhile
            assert disk.read() == bytes(512) + TEMPLATE[512 : 2 * MIB]
        with open(mount.raw("e"), "xb") as disk:
            disk.truncate(2 * MIB)
        must("clone", folder / "e.fvd", "f", "--into", folder)
        with open(mount.raw("e"), "r+b") as disk:  # another disk stands on it meanwhile
            assert disk.read() == TEMPLATE[: 2 * MIB]
        assert "ERROR" not in mount.log
    assert images(folder) == [f"{name}.fvd" for name in "abcdef"]
    for name in images(folder):
        must("check", folder / name)


def test_a_template_in_qcow2_and_at_a_url(folder: Path, template: Path, tmp_path: Path) -> None:
    qcow2 = folder / "template.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", template, qcow2], check=True)
    with mounted(folder, "-o", f"create,new_base={qcow2},base_format=qcow2") as mount:
        make(mount.raw("a"))
        assert mount.raw("a").read_bytes() == TEMPLATE
    assert header(folder / "a.fvd").base_img == "template.qcow2"
    with nbd_server(template, tmp_path / "socket") as url:
        words = "create,new_base=" + url.replace(",", "\\,")
        with mounted(folder, "-o", f"{words},allow_url={url}") as mount:
            make(mount.raw("b"))
            assert mount.raw("b").read_bytes() == TEMPLATE


def test_clones_stand_on_the_cache(folder: Path, template: Path) -> None:
    must("create", folder / "cache.fvd", "--base", template, "-F", "raw", "--copy-on-read")
    with mounted(folder, *standing_on(template)) as mount:
        make(mount.raw("a"))
        assert mount.raw("a").read_bytes() == TEMPLATE
    assert header(folder / "a.fvd").base_img == "cache.fvd"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("new_base={0}", "is for new disks, which need -o create"),
        ("new_layout=compact", "is for new disks, which need -o create"),
        ("create,new_layout=round", "must be flat or compact"),
        ("create,new_base=/nosuch", "No such file"),
        ("create,new_base={0}", "outside the folder of the images; allow it with -o base_path="),
        ("create,new_base={1},base_path=/", "looks like qcow2; say what it is: -o base_format=qcow2, or raw"),
        ("create,new_base=nbd://localhost:1/", "allow it with -o allow_url="),
        ("create,new_base=nosuch://localhost/", "is not known"),
        ("create,new_base=nbd+unix:///?socket=/nosuch,allow_url=nbd+unix:///", "/nosuch"),
    ],
)
def test_what_makes_no_sense(folder: Path, template: Path, tmp_path: Path, options: str, words: str) -> None:
    (tmp_path / "point").mkdir()
    qcow2 = template.parent / "template.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M"], check=True)
    done = fvdfs("mount", folder, tmp_path / "point", "-o", options.format(template, qcow2))
    assert done.code == (1 if "socket" in options else 2), done.err  # a server that is away is no mistake of the user's
    assert len([line for line in done.err.splitlines() if "qemu-storage-daemon:" not in line]) == 1, done.err
    assert words in done.err


# --- renaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["mount", "folder"])
@pytest.mark.parametrize("taken", [False, True])
def test_an_open_disk_has_another_name(folder: Path, where: str, taken: bool) -> None:
    """Whoever has it open goes on, and whoever opens the new name gets the same disk."""
    must("create", folder / "a.fvd", "2M")
    if taken:
        must("create", folder / "b.fvd", "1M")
    with mounted(folder, "-o", "create,remove") as mount, open(mount.raw("a"), "r+b", buffering=0) as disk:
        number = os.fstat(disk.fileno()).st_ino
        if taken:
            assert mount.raw("b").stat().st_size == MIB
        disk.write(b"before")
        if where == "mount":
            os.rename(mount.raw("a"), mount.raw("b"))
        else:
            os.rename(folder / "a.fvd", folder / "b.fvd")
        disk.write(b" and after")
        assert os.listdir(mount.point) == ["b.raw"]
        assert not mount.raw("a").exists()
        assert mount.raw("b").stat().st_ino == os.fstat(disk.fileno()).st_ino == number
        with open(mount.raw("b"), "r+b") as other:
            assert other.read(16) == b"before and after"
            other.write(b"!")
        assert mount.status("b")["image"] == str(folder / "b.fvd")
        os.chmod(disk.fileno(), 0o600)
        os.fsync(disk.fileno())
        make(mount.raw("a"))  # another disk
        assert mount.raw("a").stat().st_size == 0
        assert disk.read(1) == b"!"
        assert "ERROR" not in mount.log
    assert os.stat(folder / "b.fvd").st_mode & 0o777 == 0o600
    assert b"".join(read_disk(folder / "b.fvd")).startswith(b"before and after!\0")
    assert images(folder) == ["a.fvd", "b.fvd"]
    must("check", folder / "b.fvd")


def test_a_closed_disk_has_another_name(folder: Path, mount: Mount) -> None:
    mount.raw("a").write_bytes(CONTENT)
    number = mount.raw("a").stat().st_ino
    os.rename(mount.raw("a"), mount.raw("b"))
    assert mount.raw("b").stat().st_ino == number
    assert mount.raw("b").read_bytes() == CONTENT
    assert images(folder) == ["b.fvd"]
    make(mount.raw("a"))
    assert error_of(lambda: give_name(str(mount.raw("a")), str(mount.raw("b")), replace=False)) == errno.EEXIST
    (folder / "hidden.fvd").write_bytes(b"somebody's")
    assert error_of(os.rename, mount.raw("a"), mount.raw("hidden")) == errno.EEXIST
    assert (folder / "hidden.fvd").read_bytes() == b"somebody's"
    (folder / "hidden.fvd").unlink()
    os.rename(mount.raw("b"), mount.raw("b"))
    assert error_of(os.rename, mount.raw("a"), mount.point / "a.txt") == errno.EPERM
    assert error_of(os.rename, mount.raw("a"), mount.raw("x" * 252)) == errno.ENAMETOOLONG
    assert error_of(os.rename, mount.raw("nosuch"), mount.raw("c")) == errno.ENOENT
    assert images(folder) == ["a.fvd", "b.fvd"]


def test_a_disk_takes_the_place_of_another_one(folder: Path, mount: Mount) -> None:
    must("create", folder / "b.fvd", "1M", "--data-file", "auto")
    mount.raw("a").write_bytes(CONTENT)
    with open(mount.raw("b"), "r+b", buffering=0) as old:
        old.write(b"old")
        os.rename(mount.raw("a"), mount.raw("b"))
        assert mount.raw("b").read_bytes() == CONTENT
        old.seek(0)
        assert old.read(3) == b"old"
    assert images(folder) == ["b.fvd"]


# --- removing, and the ground of others -----------------------------------------------------------


def test_a_disk_is_removed_with_its_data(folder: Path, mount: Mount) -> None:
    must("create", folder / "a.fvd", "1M", "--data-file", "auto")
    must("create", folder / "b.fvd", "1M", "--data-file", "shared")
    must("create", folder / "c.fvd", "1M")
    with open(mount.raw("a"), "r+b", buffering=0) as disk:
        os.unlink(mount.raw("a"))
        assert not mount.raw("a").exists()
        disk.write(CONTENT[:4096])
        disk.seek(0)
        assert disk.read(4096) == CONTENT[:4096]
        make(mount.raw("a"))
    assert images(folder) == ["a.fvd", "b.fvd", "c.fvd", "shared"]
    must("create", folder / "d.fvd", "1M", "--base", "shared", "-F", "raw")
    os.unlink(mount.raw("b"))
    os.unlink(mount.raw("c"))
    assert images(folder) == ["a.fvd", "d.fvd", "shared"]
    assert error_of(os.unlink, mount.raw("c")) == errno.ENOENT


def test_the_ground_of_others_stays(folder: Path, mount: Mount) -> None:
    must("create", folder / "low.fvd", "1M")
    must("create", folder / "top.fvd", "--base", "low.fvd")
    make(mount.raw("new"))
    assert error_of(os.unlink, mount.raw("low")) == errno.EBUSY
    assert error_of(os.rename, mount.raw("low"), mount.raw("other")) == errno.EBUSY
    assert error_of(os.rename, mount.raw("new"), mount.raw("low")) == errno.EBUSY
    assert f"{folder}/low.fvd: top.fvd stands on it" in mount.log
    os.rename(mount.raw("top"), mount.raw("renamed"))
    os.unlink(mount.raw("renamed"))
    os.unlink(mount.raw("low"))
    assert images(folder) == ["new.fvd"]


def test_a_disk_that_is_renamed_again_and_again_while_it_is_used(folder: Path) -> None:
    must("create", folder / "a0.fvd", "1M")
    with mounted(folder, "-o", "create") as mount, open(mount.raw("a0"), "r+b", buffering=0) as disk:
        for number in range(20):
            folder_of = mount.point if number % 2 else folder
            suffix = ".raw" if number % 2 else ".fvd"
            os.rename(folder_of / f"a{number}{suffix}", folder_of / f"a{number + 1}{suffix}")
            os.pwrite(disk.fileno(), bytes([number] * 512), number * 512)
            if number % 3:
                assert os.listdir(mount.point) == [f"a{number + 1}.raw"]
        wait_until(mount.raw("a20").exists)
        assert "ERROR" not in mount.log
    assert b"".join(read_disk(folder / "a20.fvd"))[: 20 * 512] == b"".join(bytes([n] * 512) for n in range(20))


def test_a_template_that_is_gone(folder: Path, template: Path) -> None:
    """A clone needs nothing of it before it is read."""
    with mounted(folder, *standing_on(template)) as mount:
        template.unlink()
        make(mount.raw("a"))
        assert not mount.raw("a").exists() or error_of(mount.raw("a").read_bytes) == errno.EIO
        wait_for_log(mount, str(template))


def test_a_mount_that_is_killed_leaves_whole_disks(folder: Path, template: Path) -> None:
    with mounted(folder, *standing_on(template)) as mount:
        for round in range(2):
            script = f"for i in $(seq 100); do : > {mount.point}/r{round}-$i.raw; done"
            with running("sh", "-c", script, stderr=subprocess.DEVNULL):
                wait_until(lambda: len(os.listdir(folder)) > 20 * (round + 1))  # noqa: B023  it ends before the next
                mount.kill()
            mount.mount()
            shown = {name.removesuffix(".raw") for name in os.listdir(mount.point)}
            made = {name.removesuffix(".fvd") for name in os.listdir(folder) if not name.startswith(".")}
            assert shown == made
            assert {mount.raw(name).stat().st_size for name in sorted(made)[:-1]} <= {0, len(TEMPLATE)}


@pytest.mark.parametrize("first", ["a", "b"])
def test_another_image_has_the_old_name_at_once(folder: Path, first: str) -> None:
    must("create", folder / "a.fvd", "2M")
    must("create", folder / "new.fvd", "1M")
    with mounted(folder) as mount, open(mount.raw("a"), "r+b", buffering=0) as disk:
        number = os.fstat(disk.fileno()).st_ino
        disk.write(b"mine")
        os.rename(folder / "a.fvd", folder / "b.fvd")
        os.rename(folder / "new.fvd", folder / "a.fvd")
        for name in (first, *{"a", "b"} - {first}):
            assert mount.raw(name).stat().st_size == (MIB if name == "a" else 2 * MIB)
            with open(mount.raw(name), "r+b") as other:
                assert other.read(4) == (b"mine" if name == "b" else bytes(4))
        assert mount.raw("b").stat().st_ino == number
        assert "ERROR" not in mount.log
