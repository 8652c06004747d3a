"""mount(8), umount(8) and /etc/fstab. Each test is a script in a mount namespace of its own, with programs in /sbin."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from fvdfs.commands.umount import STILL_OPEN
from fvdfs.errors import UsageError
from fvdfs.mountoptions import without_those_of_mount8
from fvdfs.programs import FAILED, NO_SENSE
from support import reference
from support.mounts import fvdfs, must, wait_for_end
from support.namespaces import in_mount_namespace
from support.programs import in_sbin

ALL_OF_MOUNT8 = (
    "nofail,_netdev,noatime,nodev,nosuid,suid,nosuid,exec,noexec,auto,noauto,nouser,x-systemd.requires=network.target,"
    "comment=disks,default_permissions,relatime,lazytime,async"
)


@pytest.fixture
def point(folder: Path) -> Path:
    """A mount point beside a folder with a.fvd."""
    must("create", folder / "a.fvd", "1M")
    path = folder.parent / "point"
    path.mkdir()
    return path


def run(folder: Path, script: str, helpers: Sequence[str] = ("mount.fuse.fvdfs",)) -> subprocess.CompletedProcess[str]:
    """Run a script as root, with D the folder, P the mount point beside it, F a file for an fstab."""
    prepared = in_sbin(folder.parent, *helpers) + script
    places = {"D": str(folder), "P": str(folder.parent / "point"), "F": str(folder.parent / "fstab")}
    return subprocess.run(
        in_mount_namespace("sh", "-c", prepared),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **places},
    )


def done(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.parametrize("kind", ["fuse.fvdfs", "fvdfs"])
def test_mount_and_umount(folder: Path, point: Path, kind: str) -> None:
    script = """
        mount -t KIND $D $P -o noexec,noatime,allow_other
        findmnt -n -o SOURCE,FSTYPE,OPTIONS $P
        printf 'some text' | dd of=$P/a.raw conv=notrunc status=none
        umount $P
        fvdfs check $D/a.fvd
    """
    [found, checked] = done(run(folder, script.replace("KIND", kind), (f"mount.{kind}", "fvdfs")))
    source, fs_type, options = found.split()
    assert (source, fs_type) == (str(folder), "fuse.fvdfs")
    assert {"noexec", "noatime", "nosuid", "nodev", "allow_other", "rw"} <= set(options.split(","))
    assert "clean" in checked


def test_without_a_program_of_our_own_in_sbin(folder: Path, point: Path) -> None:
    """By mount.fuse, which looks for fvdfs where the system's programs are."""
    script = "mount -t fuse.fvdfs $D $P -o ro; ls $P; umount $P; mount -t fuse fvdfs#$D $P; ls $P; umount $P"
    assert done(run(folder, script, ("fvdfs",))) == ["a.raw", "a.raw"]


def test_every_line_of_an_fstab(folder: Path, point: Path) -> None:
    script = f"""
        echo "$D $P fuse.fvdfs {ALL_OF_MOUNT8.replace("noauto,", "")} 0 0" >$F
        echo "/no/such/folder $P/.. fuse.fvdfs nofail 0 0" >>$F
        mount -a -T $F
        mount -a -T $F
        ls $P
        findmnt -n -o OPTIONS $P
        umount $P
    """
    names, options = done(run(folder, script))
    assert names == "a.raw"
    assert {"noexec", "noatime", "nosuid"} <= set(options.split(","))


def test_a_user_may_mount_what_fstab_permits(folder: Path, point: Path) -> None:
    script = """
        chmod 777 $D $P; chmod 666 $D/a.fvd; chown nobody $P
        echo "$D $P fuse.fvdfs noauto,user,nofail 0 0" >$F
        mount --bind $F /etc/fstab
        setpriv --reuid nobody --clear-groups sh -ec 'mount $P; ls $P; findmnt -n -o OPTIONS $P; umount $P; ls $P'
    """
    opened_up = [
        path for path in (folder, *folder.parents) if path.stat().st_mode & 0o005 != 0o005 and path != Path("/")
    ]
    names, options = done(run(folder, "".join(f"chmod a+rx {path}\n" for path in opened_up) + script))
    assert names == "a.raw"
    assert {"noexec", "nosuid", "nodev", "user_id=65534"} <= set(options.split(","))


REFUSED = {
    "mount -t fuse.fvdfs $D $P -o uid=5": (FAILED, "chown or chmod"),
    "mount -t fuse.fvdfs $D $P -o umask=022": (FAILED, "chown or chmod"),
    "mount -t fuse.fvdfs $D $P -o banana": (FAILED, "-o banana: unknown"),
    "mount -t fuse.fvdfs /no/such/folder $P": (FAILED, "/no/such/folder: is not a directory; make it first"),
    "/sbin/mount.fuse.fvdfs $D": (NO_SENSE, "usage: DIR MOUNTPOINT"),
    "/sbin/mount.fuse.fvdfs $D $P -q": (NO_SENSE, "option -q not recognized; usage"),
    "mount -t fuse.fvdfs $D $P; mount -o remount,ro $P": (FAILED, "unmount it, and mount it with others"),
}


@pytest.mark.parametrize("script", REFUSED)
def test_what_is_refused(folder: Path, point: Path, script: str) -> None:
    code, message = REFUSED[script]
    result = run(folder, f"trap 'umount $P 2>/dev/null || :' EXIT\ncode=0; {{ {script}; }} || code=$?; exit $code")
    assert (result.returncode, message in result.stderr) == (code, True), result.stderr
    assert result.stderr.count("fvdfs: ") == 1


def test_letters_of_mount(folder: Path, point: Path) -> None:
    script = """
        mount -f -t fuse.fvdfs $D $P; ls $P
        mount -s -v -t fuse.fvdfs $D $P -o banana; umount $P
        mount -r -t fuse.fvdfs $D $P; findmnt -n -o VFS-OPTIONS $P; umount $P
    """
    mounted, options = done(run(folder, script))
    assert mounted == f"fvdfs: {folder} mounted on {point}."
    assert options.split(",")[0] == "ro"


def test_umount_lazy_leaves_images_open_until_nobody_uses_them(folder: Path, point: Path) -> None:
    must("mount", folder, point)
    pid = int(os.getxattr(point, "user.fvdfs.pid"))
    with open(point / "a.raw", "r+b", buffering=0) as disk:
        assert fvdfs("umount", point).code == 1
        result = fvdfs("umount", "--lazy", point)
        assert (result.code, "its images stay open until that ends" in result.err) == (STILL_OPEN, True)
        assert not os.path.ismount(point)
        disk.write(b"written")
    wait_for_end(pid)
    assert b"".join(reference.read_disk(folder / "a.fvd"))[:7] == b"written"


@pytest.mark.parametrize(
    ("text", "ours", "kernels"),
    [
        (ALL_OF_MOUNT8, [], ["noatime", "nodev", "nosuid", "suid", "nosuid", "exec", "noexec"]),
        ("sync", ["sync=always"], []),
        ("sync=none,user=me,X-mount.mkdir", ["sync=none"], []),
        (r"base_path=/a\,b:/c,ro,nodev", [r"base_path=/a\,b:/c", "ro"], ["nodev"]),
    ],
)
def test_options_of_mount8(text: str, ours: list[str], kernels: list[str]) -> None:
    assert without_those_of_mount8([text]) == (ours, kernels)


def test_sloppy_leaves_out_what_is_unknown() -> None:
    assert without_those_of_mount8(["banana,ro"], sloppy=True) == (["ro"], [])
    with pytest.raises(UsageError):
        without_those_of_mount8(["remount"], sloppy=True)
