"""A share that does not answer: bindfs, stopped. What lies on it waits; all else goes on, and the mount can end.

Nobody here may wait for ever: what touches a mount is another process with a time limit, and the share goes on in
the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fvdfs.ops.looks import MOST_THREADS
from fvdfs.store.mountinfo import mount_points
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_for_end, wait_for_log, wait_until

DATA = random.Random(9).randbytes(MIB)
LIMIT = 30  # seconds; far more than anything takes that does not hang


class Share:
    """A folder behind a program that can be stopped."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self._process = process

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    for name in ("behind", "share"):
        (tmp_path / name).mkdir()
    (tmp_path / "behind" / "base.raw").write_bytes(DATA * 16)
    with subprocess.Popen(["bindfs", "-f", tmp_path / "behind", tmp_path / "share"]) as process:
        wait_until(lambda: any(point.path == f"{tmp_path}/share" for point in mount_points()))
        share = Share(tmp_path / "share", process)
        try:
            yield share
        finally:
            share.go_on()
            subprocess.run(["umount", "-l", share.path], check=True)
            process.wait(LIMIT)


@contextlib.contextmanager
def mounted_beside(folder: Path, share: Share, *options: str) -> Iterator[Mount]:
    """The folder, mounted; the share goes on before it is unmounted."""
    with mounted(folder, "-o", f"base_path={share.path}", *options) as mount:
        try:
            yield mount
        finally:
            share.go_on()


@contextlib.contextmanager
def many(*commands: Sequence[str | Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes side by side, which end in the end."""
    with contextlib.ExitStack() as stack:
        null = subprocess.DEVNULL
        yield [stack.enter_context(subprocess.Popen(command, stdout=null, stderr=null)) for command in commands]


def run(*command: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)


def names(mount: Mount) -> list[str]:
    done = run("ls", mount.point)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()


def must_work(mount: Mount, name: str) -> None:
    """The disk is read and written, and flushed."""
    assert len(run("cat", mount.raw(name)).stdout) == MIB
    arguments = ("bs=64K", "count=4", "conv=notrunc,fsync")
    assert run("dd", "if=/dev/urandom", f"of={mount.raw(name)}", *arguments).returncode == 0


def threads(mount: Mount) -> int:
    return len(os.listdir(f"/proc/{mount.pid}/task"))


def two_images(folder: Path, share: Share) -> None:
    must("create", folder / "slow.fvd", "--base", share.path / "base.raw", "--copy-on-read")
    must("create", folder / "other.fvd", "1M")


def test_looks_at_an_image_are_not_waited_for(folder: Path, share: Share) -> None:
    two_images(folder, share)
    with mounted_beside(folder, share) as mount:
        assert names(mount) == ["other.raw", "slow.raw"]
        share.stop()
        os.utime(folder / "slow.fvd")
        with many(*[("stat", mount.raw("slow"))] * 60) as looking:
            assert names(mount) == ["other.raw", "slow.raw"], "it is shown as it was"
            must_work(mount, "other")
            for process in looking:
                assert process.wait(LIMIT) == 0
        assert threads(mount) < 40
        assert fvdfs("status", mount.point, timeout=LIMIT).code == 0
        assert mount.log.count("slow.fvd: no answer within") == 1
        share.go_on()
        assert run("cmp", "-n", str(16 * MIB), mount.raw("slow"), share.path / "base.raw").returncode == 0


def test_a_mount_is_ready_though_a_share_hangs(folder: Path, share: Share) -> None:
    two_images(folder, share)
    share.stop()
    with mounted_beside(folder, share) as mount:
        assert names(mount) == ["other.raw"]
        must_work(mount, "other")
        assert b"Input/output error" in run("stat", mount.raw("slow")).stderr
        share.go_on()
        wait_until(lambda: names(mount) == ["other.raw", "slow.raw"])


def test_many_images_on_one_share_that_hangs(folder: Path, share: Share) -> None:
    two_images(folder, share)
    for number in range(200):
        os.link(folder / "slow.fvd", folder / f"more{number}.fvd")
    share.stop()
    with mounted_beside(folder, share) as mount:
        assert names(mount) == ["other.raw"]
        with many(*[("stat", mount.raw(f"more{number}")) for number in range(100)]):
            must_work(mount, "other")
            assert threads(mount) < MOST_THREADS / 2
            share.go_on()
        wait_until(lambda: len(names(mount)) == 202)


def test_requests_that_hang_leave_room_for_others(folder: Path, share: Share) -> None:
    """More than libfuse has tasks, and more than the kernel lets read ahead by default."""
    two_images(folder, share)
    with mounted_beside(folder, share) as mount, open(mount.raw("other"), "rb"):
        share.stop()
        parts = [("dd", f"if={mount.raw('slow')}", "bs=256K", "count=1", f"skip={at % 64}") for at in range(120)]
        with many(*parts) as readers:
            for _ in range(3):
                must_work(mount, "other")
            assert names(mount) == ["other.raw", "slow.raw"]
            assert any(reader.poll() is None for reader in readers)
            share.go_on()
            for reader in readers:
                assert reader.wait(LIMIT) == 0


def test_a_search_for_holes_that_hangs_keeps_no_writer_waiting(folder: Path, share: Share) -> None:
    """The kernel has all writes to the disk wait until it is answered: after a while, that all is data."""
    two_images(folder, share)
    search = f"import os; print(os.lseek(os.open('{folder}.mnt/slow.raw', os.O_RDONLY), 1, os.SEEK_HOLE))"
    with mounted_beside(folder, share) as mount:
        block = os.open(mount.raw("slow"), os.O_RDWR | os.O_DIRECT)
        share.stop()
        with subprocess.Popen([sys.executable, "-S", "-c", search], stdout=subprocess.PIPE) as seeking:
            wait_until(lambda: b"seek" in stack_of(seeking.pid))
            write = (
                "dd",
                "if=/dev/urandom",
                f"of={mount.raw('slow')}",
                "bs=1M",
                "count=1",
                "conv=notrunc",
                "oflag=direct",
            )
            assert run(*write).returncode == 0
            must_work(mount, "other")
            assert seeking.communicate(timeout=LIMIT)[0] == b"16777216\n"
        os.close(block)


def stack_of(pid: int) -> bytes:
    """Where in the kernel a process is."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stack").read_bytes()
    return b""


@pytest.mark.slow
def test_a_mount_ends_though_an_image_hangs(folder: Path, share: Share) -> None:
    """What was written is saved, other images are closed, and readers are let go."""
    two_images(folder, share)
    with mounted_beside(folder, share) as mount:
        block = 1 << 16
        file = os.open(mount.raw("slow"), os.O_RDWR)
        os.pwrite(file, DATA[:block], 8 * MIB)
        must_work(mount, "other")
        share.stop()
        with many(*[("dd", f"if={mount.raw('slow')}", "bs=64K", "count=1", f"skip={n}") for n in range(20)]):
            os.kill(mount.pid, signal.SIGTERM)
            wait_for_end(mount.pid, 90)
        mount.pid = 0
        with contextlib.suppress(OSError):
            os.close(file)
        wait_for_log(mount, "slow.fvd: cannot be closed, since something that it needs does not answer")
        assert "nothing that was written is lost" in mount.log
        assert not any(point.path == str(mount.point) for point in mount_points())
        share.go_on()
        assert "clean" in must("check", folder / "other.fvd")
        mount.mount()
        with open(mount.raw("slow"), "rb") as disk:
            disk.seek(8 * MIB)
            assert disk.read(block) == DATA[:block]
            disk.seek(0)
            assert disk.read(MIB) == DATA


def test_a_mount_with_an_image_that_hangs_can_be_killed(folder: Path, share: Share) -> None:
    two_images(folder, share)
    with mounted_beside(folder, share) as mount:
        share.stop()
        with many(*[("dd", f"if={mount.raw('slow')}", "bs=64K", "count=1", f"skip={n}") for n in range(20)]):
            must_work(mount, "other")
            mount.kill()


def test_an_image_on_a_share_that_hangs_keeps_no_other_from_being_committed(folder: Path, share: Share) -> None:
    """Nobody flushes: it is done every few seconds."""
    must("create", share.path / "own.fvd", "1M", "--compact", "--chunk-size", "64K")
    os.symlink(share.path / "own.fvd", folder / "own.fvd")
    must("create", folder / "other.fvd", "1M", "--compact", "--chunk-size", "64K")
    with mounted_beside(folder, share, "-o", "writeback=off") as mount:
        own, other = os.open(mount.raw("own"), os.O_RDWR), os.open(mount.raw("other"), os.O_RDWR)
        os.write(own, DATA[:4096])
        share.stop()
        before = (folder / "other.fvd").read_bytes()[: 64 << 10]
        os.write(other, DATA[:4096])
        wait_until(lambda: (folder / "other.fvd").read_bytes()[: 64 << 10] != before)
        mount.kill()
        for descriptor in (own, other):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_log_file_on_a_share_that_hangs(folder: Path, share: Share) -> None:
    """Lines are lost, and counted; nobody waits for them."""
    must("create", folder / "other.fvd", "1M")
    point = folder.parent / "images.mnt"
    point.mkdir()
    log = share.path / "log"
    must("mount", folder, point, "--log-file", log)
    try:
        (folder / "bad.fvd").write_bytes(b"FVD" + bytes(4096))
        run("stat", point / "bad.raw")
        wait_until(lambda: "bad.fvd" in log.read_text())
        share.stop()
        for number in range(5):
            (folder / f"bad{number}.fvd").write_bytes(b"FVD" + bytes(4096))
        assert run("ls", point).stdout == b"other.raw\n"
        assert len(run("cat", point / "other.raw").stdout) == MIB
        share.go_on()

        def goes_on() -> bool:
            (folder / f"late{os.urandom(4).hex()}.fvd").write_bytes(b"FVD" + bytes(4096))
            run("ls", point)
            return "late" in log.read_text()

        wait_until(goes_on)
        assert "could not be written" in log.read_text()
    finally:
        share.go_on()
        must("umount", point)


@pytest.mark.slow
def test_the_folder_itself_on_a_share_that_hangs(tmp_path: Path, share: Share) -> None:
    (share.path / "images").mkdir()
    must("create", share.path / "images" / "a.fvd", "1M")
    point = tmp_path / "mnt"
    point.mkdir()
    log = tmp_path / "log"
    must("mount", share.path / "images", point, "--log-file", log)
    pid = int(os.getxattr(point, "user.fvdfs.pid"))
    try:
        assert run("ls", point).stdout == b"a.raw\n"
        assert run("df", point).returncode == 0
        share.stop()
        for command in (("ls", point), ("stat", point), ("stat", point / "a.raw"), ("df", point)):
            assert run(*command).returncode == 0, command
        with many(*[("stat", point / f"no{number}.raw") for number in range(20)]):
            os.kill(pid, signal.SIGTERM)
            wait_for_end(pid, 90)
    finally:
        share.go_on()
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)
