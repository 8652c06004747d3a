"""`fvdfs umount`: nobody is left waiting, nobody is told that images are closed that are not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs import mounts
from fvdfs.commands import umount
from fvdfs.commands.umount import STILL_OPEN
from fvdfs.mounts import mount_at
from fvdfs.store.mountinfo import MountPoint, mount_points
from support import reference
from support.mounts import FVDFS, MIB, Finished, fvdfs, mounted, must, running, wait_for_end, wait_until
from support.namespaces import in_mount_namespace

BUSY_WITH = mounts.busy_with
PID = "user.fvdfs.pid"


@contextlib.contextmanager
def unmounted(*points: Path) -> Iterator[None]:
    """Nothing stays mounted there."""
    try:
        yield
    finally:
        for point in points:
            subprocess.run(["umount", "-l", point], check=False, stderr=subprocess.DEVNULL)


def is_closed_and_holds(image: Path, content: bytes) -> bool:
    return reference.check(image, "fvdfs") == [] and b"".join(reference.read_disk(image))[: len(content)] == content


# --- somebody still has it ----------------------------------------------------------------------


def test_a_bind_mount_keeps_the_images_open(folder: Path, tmp_path: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.touch()
    copy.mkdir()
    for source, target in (("a.raw", disk), ("", copy)):
        with mounted(folder) as mount, unmounted(target):
            subprocess.run(["mount", "--bind", mount.point / source, target], check=True)
            done = fvdfs("umount", mount.point)
            assert (done.code, done.err.count("\n")) == (STILL_OPEN, 1), done.err
            assert f"{target} (mounted)" in done.err
            assert not os.path.ismount(mount.point)
            done = fvdfs("umount", target)
            assert done == Finished(0, "", "")
            wait_for_end(mount.pid)
            mount.pid = 0


def test_another_mount_namespace_keeps_the_images_open(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        with running(*in_mount_namespace("sleep", "1000", keep=(mount.point,))) as other:
            wait_until(lambda: Path(f"/proc/{other.pid}/comm").read_text() == "sleep\n")
            done = fvdfs("umount", mount.point)
            assert (done.code, done.err.count("\n")) == (STILL_OPEN, 1), done.err
            assert f"process {other.pid} (sleep) has {mount.point} in its mount namespace" in done.err
        wait_for_end(mount.pid)
        mount.pid = 0


def test_a_namespace_that_a_test_makes_keeps_no_mount_of_another_test(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with (
        mounted(folder) as kept,
        mounted(other) as mount,
        running(*in_mount_namespace("sleep", "1000", keep=(kept.point,))) as holder,
    ):
        wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n")
        assert [point.path for point in mount_points(str(holder.pid)) if point.is_ours] == [str(kept.point)]
        assert fvdfs("umount", mount.point) == Finished(0, "", "")
        mount.pid = 0


@pytest.mark.parametrize("flags", ["--pid --fork", "--pid --fork --net --ipc --uts"])
def test_a_daemon_in_another_namespace_is_waited_for(folder: Path, tmp_path: Path, flags: str) -> None:
    """Where its process cannot be seen by its number."""
    must("create", folder / "a.fvd", "4M", "--compact")
    point = tmp_path / "point"
    point.mkdir()
    script = '"$@" && exec sleep 1000'
    command: list[str | Path] = ["unshare", *flags.split(), "sh", "-c", script, "sh", *FVDFS, "mount", folder, point]
    with running(*command), unmounted(point):
        wait_until(lambda: os.path.ismount(point))
        content = random.Random(7).randbytes(4 * MIB)
        with open(point / "a.raw", "r+b") as file:
            file.write(content)
        done = fvdfs("umount", point)
        assert (done.code, done.err) == (0, "")
        assert is_closed_and_holds(folder / "a.fvd", content)


def test_umount_from_another_pid_namespace(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        command = ["unshare", "--pid", "--fork", *FVDFS, "umount", str(mount.point)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        wait_for_end(mount.pid)
        mount.pid = 0


def test_who_keeps_it_busy_is_named(folder: Path, tmp_path: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        with running("sh", "-c", f"exec sleep 1000 < {mount.raw('a')}") as reader:
            wait_until(lambda: Path(f"/proc/{reader.pid}/comm").read_text() == "sleep\n")
            done = fvdfs("umount", mount.point)
            assert (done.code, done.err.count("\n")) == (1, 1)
            assert f"process {reader.pid} (sleep) has {mount.raw('a')} open" in done.err
            assert os.path.ismount(mount.point)
        device = subprocess.run(
            ["losetup", "-f", "--show", mount.raw("a")], check=True, capture_output=True, text=True
        ).stdout.strip()
        try:
            done = fvdfs("umount", mount.point)
            assert (done.code, done.err.count("\n")) == (1, 1)
            assert f"{device} is over {mount.raw('a')}" in done.err
        finally:
            subprocess.run(["losetup", "-d", device], check=True)
        wait_until(lambda: fvdfs("umount", mount.point).code == 0)
        mount.pid = 0


@pytest.mark.parametrize("seen", [True, False])
def test_who_uses_it_for_a_moment_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, seen: bool
) -> None:
    """As df(1), or the making of a container, which has a copy of each mount for a moment and no process to be seen."""
    with mounted(folder) as mount, contextlib.ExitStack() as use:
        use.callback(os.close, os.open(mount.point, os.O_RDONLY))
        looks: list[list[str]] = []

        def busy_with(point: MountPoint) -> list[str]:
            looks.append(BUSY_WITH(point))
            use.close()
            return looks[-1] if seen else []

        monkeypatch.setattr(mounts, "busy_with", busy_with)
        assert umount.run(str(mount.point)) == 0
        assert (len(looks[0]), capsys.readouterr().err) == (1, "")
        mount.pid = 0


def test_each_disk_that_is_in_use_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        must("create", folder / f"{name}.fvd", "16M")
    (tmp_path / "inside").mkdir()
    with mounted(folder) as mount:
        subprocess.run(["mkfs.ext4", "-q", mount.raw("c")], check=True)
        machine = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg", "-monitor", "stdio"]
        for name in ("a", "b"):
            machine += ["-drive", f"file={mount.raw(name)},format=raw,if=virtio"]
        with running(*machine, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as qemu:
            assert qemu.stdout is not None
            assert "QEMU" in qemu.stdout.readline()
            subprocess.run(["mount", "-o", "loop", mount.raw("c"), tmp_path / "inside"], check=True)
            try:
                done = fvdfs("umount", mount.point)
            finally:
                subprocess.run(["umount", tmp_path / "inside"], check=True)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert f"process {qemu.pid} (qemu-system-x86) has {mount.raw('a')}, {mount.raw('b')} open" in done.err
        assert f" is over {mount.raw('c')}, and mounted at {tmp_path}/inside" in done.err
        assert "close that first, or take it away from here with --lazy" in done.err
        wait_until(lambda: fvdfs("umount", mount.point).code == 0)
        mount.pid = 0


def test_a_user_is_told_that_only_root_sees_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "ask as root" in umount._busy([])


def test_only_those_who_use_the_mount_are_named(folder: Path, tmp_path: Path) -> None:
    """The kernel gives the number of a mount that is gone to another one."""
    must("create", folder / "a.fvd", "4M")
    (tmp_path / "copy").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    with mounted(folder) as mount, unmounted(tmp_path / "copy", other):
        subprocess.run(["mount", "--bind", mount.point, tmp_path / "copy"], check=True)
        was = mount_at(str(mount.point))
        assert was is not None
        with open(mount.raw("a"), "rb") as file:
            assert [f"process {os.getpid()} " in user for user in mounts.busy_with(was)] == [True]
            assert f"has {file.name} open" in mounts.busy_with(was)[0]
        with open(tmp_path / "copy/a.raw", "rb") as file:
            assert not mounts.busy_with(was), "that is of another mount"
            subprocess.run(["umount", mount.point], check=True)
            (mount.point / "b.raw").touch()
            with open(mount.point / "b.raw", "rb"), contextlib.chdir(mount.point):
                named = mounts.users(dataclasses.replace(was, number=mount_number(mount.point / "b.raw")))
            (mount.point / "b.raw").unlink()
            assert len(named) == 2
            assert "copy (mounted)" in named[0]
            assert f"has {file.name} open" in named[1]
        must("umount", tmp_path / "copy")
        mount.pid = 0


def mount_number(path: Path) -> int:
    """The kernel's number of the mount that the file lies on."""
    with open(path, "rb") as file:
        text = Path(f"/proc/self/fdinfo/{file.fileno()}").read_text()
    return int(text.partition("mnt_id:")[2].split()[0])


@pytest.mark.parametrize(
    "answer", [b"", b"[]", b"{", b"[" * 100_000, b'{"pid": [], "locks": 1}', b'{"pid": %d, "locks": []}' % 10**30]
)
def test_a_mount_may_say_anything_of_its_daemon(
    folder: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's mount that root unmounts, say."""
    answer = answer.replace(b'"pid"', b'"pid_namespace": "%s", "pid"' % os.fsencode(os.readlink("/proc/self/ns/pid")))
    monkeypatch.setattr(mounts, "ask", lambda _: (0, answer))
    with mounted(folder) as mount:
        assert umount.run(str(mount.point)) == STILL_OPEN
        assert "cannot be seen from here" in capsys.readouterr().err
        wait_for_end(mount.pid)
        mount.pid = 0


def test_what_is_not_ours_stays_mounted(folder: Path, tmp_path: Path) -> None:
    point = tmp_path / "other"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    with unmounted(point):
        done = fvdfs("umount", point)
        assert (done.code, done.err) == (2, f"fvdfs: {point}: fvdfs is not mounted there\n")
        assert os.path.ismount(point)


# --- the mount point leads elsewhere ------------------------------------------------------------


@pytest.mark.parametrize("name", ["lazily unmounted", "bind mount", "removed", "mounted over"])
def test_what_was_written_survives_sigterm_wherever_the_mount_is(folder: Path, tmp_path: Path, name: str) -> None:
    must("create", folder / "a.fvd", "4M", "--compact", "--chunk-size", "64K")
    bound = tmp_path / "bound"
    bound.touch()
    image = folder / "a.fvd"
    with mounted(folder) as mount, unmounted(bound):
        if name == "bind mount":
            subprocess.run(["mount", "--bind", mount.raw("a"), bound], check=True)
            descriptor = os.open(bound, os.O_RDWR)
            assert fvdfs("umount", mount.point).code == 1 or not os.path.ismount(mount.point)
        else:
            descriptor = os.open(mount.raw("a"), os.O_RDWR)
        content = random.Random(6).randbytes(3 * MIB)
        os.pwrite(descriptor, content, 0)
        if name == "lazily unmounted":
            subprocess.run(["umount", "-l", mount.point], check=True)
        elif name == "removed":
            image = image.rename(folder / "elsewhere")
        elif name == "mounted over":
            subprocess.run(["mount", "-t", "tmpfs", "none", mount.point], check=True)
            mount.raw("a").write_bytes(b"another file")
        os.kill(mount.pid, signal.SIGTERM)
        wait_for_end(mount.pid)
        mount.pid = 0
        if name == "mounted over":
            assert mount.raw("a").read_bytes() == b"another file", "what is mounted over it was unmounted"
            subprocess.run(["umount", mount.point], check=True)
        with contextlib.suppress(OSError):
            os.close(descriptor)
        subprocess.run(["umount", "-l", mount.point], check=False, stderr=subprocess.DEVNULL)
    assert is_closed_and_holds(image, content)


def test_a_mapping_survives_sigterm_after_its_file_was_closed(folder: Path) -> None:
    import mmap

    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        with open(mount.raw("a"), "r+b") as file:
            memory = mmap.mmap(file.fileno(), MIB)
        memory[:4096] = b"m" * 4096
        subprocess.run(["umount", "-l", mount.point], check=True)
        os.kill(mount.pid, signal.SIGTERM)
        wait_for_end(mount.pid)
        mount.pid = 0
        assert is_closed_and_holds(folder / "a.fvd", b"m" * 4096)


def test_an_old_mount_that_ends_leaves_the_new_one_alone(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    must("create", folder / "b.fvd", "4M")
    with mounted(folder) as mount:
        old = mount.pid
        descriptor = os.open(mount.raw("a"), os.O_RDONLY)
        subprocess.run(["umount", "-l", mount.point], check=True)
        mount.mount()
        os.kill(old, signal.SIGTERM)
        wait_for_end(old)
        assert os.path.ismount(mount.point)
        assert mount.raw("b").read_bytes() == bytes(4 * MIB)
        with contextlib.suppress(OSError):
            os.close(descriptor)


# --- mounting twice, and dead mounts ------------------------------------------------------------


def test_mounting_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    link = tmp_path / "link"
    with mounted(folder) as mount:
        link.symlink_to(mount.point)
        for point in (mount.point, link, f"{mount.point}/", mount.point / ".." / mount.point.name):
            done = fvdfs("mount", folder, point)
            assert (done.code, done.err.count("\n")) == (2, 1), done.err
            assert "fvdfs is mounted there already" in done.err
        mount.umount()
        assert not os.path.ismount(mount.point)


def test_of_many_that_mount_at_once_one_does(folder: Path, tmp_path: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    point = tmp_path / "point"
    point.mkdir()
    with unmounted(point), contextlib.ExitStack() as stack:
        command: list[str | Path] = [*FVDFS, "mount", folder, point]
        processes = [stack.enter_context(running(*command, stderr=subprocess.PIPE, text=True)) for _ in range(5)]
        said = [each.communicate(timeout=60)[1] for each in processes]
        assert sorted(each.returncode for each in processes) == [0, 2, 2, 2, 2], said
        assert sum("mounted there already" in text for text in said) == 4
        must("umount", point)
        assert not os.path.ismount(point)


def test_a_dead_mount_is_called_dead_and_can_be_cleared_away(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        os.kill(mount.pid, signal.SIGKILL)
        wait_for_end(mount.pid)
        mount.pid = 0
        with unmounted(mount.point):
            commands: tuple[list[str | Path], ...] = (
                ["mount", folder, mount.point],
                ["mount", mount.point, folder],
                ["status", mount.point],
                ["status", "--watch", mount.point],
                ["top", mount.point],
                ["prefetch", "start", mount.raw("a")],
                ["map", mount.raw("a")],
                ["info", mount.raw("a")],
            )
            for command in commands:
                done = fvdfs(*command)
                assert done.code in (1, 2), command
                assert done.err.count("\n") == 1, done.err
                assert "has ended; clear it away with: fvdfs umount" in done.err, done.err
            done = fvdfs("umount", mount.point)
            assert (done.code, done.err) == (0, "")
            assert not os.path.ismount(mount.point)


def test_a_mount_that_hangs_is_unmounted_all_the_same(folder: Path) -> None:
    must("create", folder / "a.fvd", "4M")
    with mounted(folder) as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        done = fvdfs("umount", mount.point, timeout=50)
        assert done.code == STILL_OPEN, done.err
        assert "cannot be seen from here" in done.err
        os.kill(mount.pid, signal.SIGCONT)
        wait_for_end(mount.pid)
        mount.pid = 0
