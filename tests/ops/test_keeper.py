"""A mount that outlives its daemon (`-o keep`): real mounts, whose daemons are killed under programs that use disks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fvdfs import mounts
from fvdfs.commands import umount
from fvdfs.ops.remembered import TIMES
from fvdfs.xattrs import UPGRADE
from support import keptwriter
from support.mounts import MIB, RELEASE, Mount, mounted, must, running, wait_for_end, wait_for_log, wait_until

READ = """
import mmap, os, sys
disk, page = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
print(flush=True)
os.preadv(disk, [page], 1 << 20)
print(page[:].hex())
"""
LAYOUTS = {
    "plain": [],
    "based": ["--base", "base.raw"],
    "copying": ["--base", "base.raw", "--prefetch-delay", "1", "--copy-on-read"],
    "bare": ["--base", "base.raw", "--journal-size", "none"],
    "compact": ["--base", "base.raw", "--compact"],
    "chunks": ["--compact"],
    "apart": ["--data-file", "apart.data"],
    "both": ["--base", "base.raw", "--compact", "--data-file", "both.data", "--journal-size", "none"],
}
SIZE = 4 * MIB
KILLS = 3
OPEN = (sys.executable, "-c", "import sys; open(sys.argv[1], 'rb')")


def make_disks(folder: Path) -> None:
    folder.mkdir()
    (folder / "base.raw").write_bytes(random.Random(1).randbytes(SIZE))
    for name, words in LAYOUTS.items():
        size = [] if "--base" in words else [str(SIZE)]
        must("create", folder / f"{name}.fvd", *size, *words)


def kill(mount: Mount, then: Callable[[], object] = lambda: None) -> None:
    """End the daemon, do something, and wait for the next one."""
    former = mount.pid
    os.kill(former, signal.SIGKILL)
    wait_for_end(former)
    then()
    wait_until(lambda: int(os.getxattr(mount.point, "user.fvdfs.pid")) != former)
    mount.pid = int(os.getxattr(mount.point, "user.fvdfs.pid"))


@contextlib.contextmanager
def writers(mount: Mount, models: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A program for each disk that uses it; at the end they end, and must have found all right."""
    started = {}
    with contextlib.ExitStack() as stack:
        for seed, name in enumerate(LAYOUTS):
            command = [sys.executable, keptwriter.__file__, str(mount.raw(name)), str(models / name), str(seed)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started[name] = process
        for process in started.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        yield started
        complaints = {name: process.communicate()[1] for name, process in started.items()}
        said = [text.splitlines()[-1] for text in complaints.values() if text]
        assert not said, "; ".join(said)
        assert [process.returncode for process in started.values()] == [0] * len(started)


@pytest.mark.parametrize("writeback", ["on", "off"])
def test_no_program_notices_that_the_daemon_is_killed(tmp_path: Path, writeback: str) -> None:
    make_disks(tmp_path / "images")
    with mounted(tmp_path / "images", "-o", f"keep,writeback={writeback},sync=flush") as mount:
        with writers(mount, tmp_path):
            for _ in range(KILLS):
                kill(mount)
        assert mount.log.count("is taken over") == KILLS
        assert json.loads(must("status", mount.point, "--json"))["takeovers"] == KILLS
        mount.remount()
        for name in LAYOUTS:
            assert mount.raw(name).read_bytes().rstrip(b"\0") == (tmp_path / name).read_bytes().rstrip(b"\0"), name
    for name in LAYOUTS:
        assert "clean" in must("check", tmp_path / "images" / f"{name}.fvd")
    assert not [line for line in mount.log.splitlines() if " ERROR " in line or "go on using" in line]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A kept mount of a disk over a base, in which disks may be made and removed."""
    folder = tmp_path_factory.mktemp("kept") / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(random.Random(1).randbytes(SIZE))
    must("create", folder / "vm.fvd", "--base", "base.raw")
    with mounted(folder, "-o", "keep,create,remove,writeback=off") as mount:
        yield mount


def remembered(pid: int, what: str) -> list[tuple[int, Any]]:
    """What a daemon has remembered of this kind: keys and values, in their order."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "fvdfs-state" in os.readlink(link):
                lines = [json.loads(line) for line in link.read_text().splitlines()]
                return [(line["key"], line["value"]) for line in lines if line["what"] == what and "key" in line]
    return []


def is_adopting(pid: int, inode: int, times: int) -> bool:
    """Whether a daemon opens a disk that so many have tried to open."""
    return [value for key, value in remembered(pid, "adopting") if key == inode][-1:] == [times]


def keepers(mount: Mount) -> list[int]:
    """The processes that keep the mount."""
    return [pid for pid, words in processes(mount) if any(word.endswith(b"/keeper.py") for word in words)]


def daemon(mount: Mount, former: int) -> int:
    """The process that goes on, though it need not answer yet."""
    found: list[int] = []

    def look() -> list[int]:
        found[:] = [pid for pid, words in processes(mount) if pid != former and words[1:3] == [b"-P", b"-m"]]
        return found

    wait_until(look)
    return found[0]


def processes(mount: Mount) -> Iterator[tuple[int, list[bytes]]]:
    """Those with the mount point in their command line, which is what they are told with."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(mount.point) in words:
                yield int(process.name), words


def test_what_was_asked_and_not_answered_is_done(kept: Mount) -> None:
    """The daemon is stopped, so that requests wait in its hands, or for it; then it is killed."""
    os.kill(kept.pid, signal.SIGSTOP)
    work = "import os, sys; d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL); os.write(d, b'x' * 5000)"
    command = [sys.executable, "-c", work, str(kept.raw("made"))]
    with running(*command) as process, open(kept.folder / "vm.fvd", "rb"):
        kill(kept)
        assert process.wait(30) == 0
    assert kept.raw("made").read_bytes() == b"x" * 5000 + bytes(120)
    kept.raw("made").unlink()
    with pytest.raises(PermissionError):
        (kept.point / "no disk").touch()
    made = dict(remembered(kept.pid, "creating"))
    assert made
    assert {*made.values()} == {None}, "what is over is forgotten"


def test_a_disk_that_was_removed_while_open_is_lost_and_no_other(kept: Mount) -> None:
    kept.raw("gone").touch()
    gone = os.open(kept.raw("gone"), os.O_RDWR)
    with open(kept.raw("vm"), "r+b", 0) as vm:
        os.write(gone, bytes(4096))
        kept.raw("gone").unlink()
        kept.raw("gone").touch()  # another one
        vm.write(b"here")
        kill(kept)
        with pytest.raises(OSError, match="Stale"):
            os.pwrite(gone, b"x", 0)
        with pytest.raises(OSError, match="Stale"):
            os.close(gone)
        assert os.pread(vm.fileno(), 4, 0) == b"here"
    assert kept.raw("gone").stat().st_size == 0
    kept.raw("gone").unlink()


def test_a_renamed_disk_and_a_snapshot_are_found_again(kept: Mount) -> None:
    with open(kept.raw("vm"), "r+b", 0) as vm:
        vm.write(b"before")
        kept.raw("vm").rename(kept.raw("other"))
        must("snapshot", kept.raw("other"), "kept")
        os.pwrite(vm.fileno(), b"after!", 0)
        kill(kept)
        assert os.pread(vm.fileno(), 6, 0) == b"after!"
        assert os.fstat(vm.fileno()).st_ino == kept.raw("other").stat().st_ino
        kept.raw("other").rename(kept.raw("vm"))
        os.pwrite(vm.fileno(), b"last", 6)
        kill(kept)
        os.fsync(vm.fileno())
    assert kept.raw("vm").read_bytes()[:10] == b"after!last"
    assert "may be lost" not in kept.log


def test_a_keeper_that_is_killed_is_replaced(kept: Mount) -> None:
    (keeper,) = keepers(kept)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: [other for other in keepers(kept) if other != keeper])
    with open(kept.raw("vm"), "rb", 0) as vm:
        wait_for_log(kept, "the keeper of this mount was ended")
        kill(kept)
        assert len(vm.read(4096)) == 4096


def test_without_both_the_mount_is_dead(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with mounted(tmp_path / "images", "-o", "keep") as mount:
        wait_until(lambda: keepers(mount))
        (keeper,) = keepers(mount)
        os.kill(keeper, signal.SIGSTOP)
        os.kill(mount.pid, signal.SIGKILL)
        os.kill(keeper, signal.SIGKILL)
        wait_for_end(keeper)
        with pytest.raises(OSError, match=r"not connected|abort"):
            mount.point.stat()
        mount.clear()


def test_a_daemon_that_cannot_start_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with mounted(tmp_path / "images", "-o", "keep") as mount:
        wait_until(lambda: keepers(mount))
        (keeper,) = keepers(mount)
        mount.folder.rename(tmp_path / "elsewhere")
        mount.folder.write_bytes(b"no folder")
        (tmp_path / "elsewhere").chmod(0)
        mount.log_file.unlink()
        mount.log_file.mkdir()  # a log that cannot be opened: no daemon starts
        os.kill(mount.pid, signal.SIGKILL)
        wait_for_end(keeper, 60)
        with pytest.raises(OSError, match=r"not connected|abort"):
            mount.point.stat()
        mount.log_file.rmdir()
        mount.clear()


def test_the_keeper_ends_with_the_mount(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with mounted(tmp_path / "images", "-o", "keep") as mount:
        wait_until(lambda: keepers(mount))
        (keeper,) = keepers(mount)
        kill(mount)
    wait_for_end(keeper)
    with mounted(tmp_path / "images"):
        pass


def test_unmounting_waits_for_the_daemon_that_closes_the_images(tmp_path: Path) -> None:
    """The one that was asked is killed meanwhile."""
    (tmp_path / "images").mkdir()
    must("create", tmp_path / "images/vm.fvd", str(SIZE))
    with mounted(tmp_path / "images", "-o", "keep,writeback=off") as mount:
        wait_until(lambda: keepers(mount))
        (keeper,) = keepers(mount)
        place = mounts.mount_at(str(mount.point))
        assert place is not None
        watched = umount._Daemon(place)
        with mount.raw("vm").open("r+b", 0) as vm:
            vm.write(b"here")
            os.kill(keeper, signal.SIGSTOP)
            os.kill(mount.pid, signal.SIGKILL)
            mounts.umount(place, lazy=True)
            wait_for_end(mount.pid)
            mount.pid = 0
            ended = watched._has_ended()
            os.kill(keeper, signal.SIGCONT)
        assert not ended
        wait_until(watched._has_ended)
        watched.close()
        assert "clean" in must("check", mount.folder / "vm.fvd")
    wait_for_end(keeper)


def test_a_signal_to_stop_waits_until_all_is_taken_over(tmp_path: Path) -> None:
    """What was written last is not committed before."""
    folder, socket = tmp_path / "images", tmp_path / "nbd.sock"
    folder.mkdir()
    (tmp_path / "base").write_bytes(bytes(SIZE))
    nbdkit = ["nbdkit", "-f", "-r", "-U", str(socket), "file", str(tmp_path / "base")]
    with running(*nbdkit, stderr=subprocess.DEVNULL) as server:
        wait_until(socket.exists)
        must("create", folder / "far.fvd", "--base", f"nbd+unix:///?socket={socket}", "-F", "raw")
        with mounted(folder, "-o", "keep,allow_url=nbd+unix:///,writeback=off") as mount:
            far = os.open(mount.raw("far"), os.O_RDWR)
            inode = os.fstat(far).st_ino
            os.write(far, b"here" * 1024)
            server.send_signal(signal.SIGSTOP)
            os.kill(mount.pid, signal.SIGKILL)
            mount.pid = daemon(mount, mount.pid)
            wait_until(lambda: is_adopting(mount.pid, inode, 1))
            os.kill(mount.pid, signal.SIGTERM)
            wait_for_log(mount, "signal SIGTERM")
            server.send_signal(signal.SIGCONT)
            wait_for_end(mount.pid)
            with contextlib.suppress(OSError):
                os.close(far)
            mount.mount()
            assert mount.raw("far").read_bytes()[:4096] == b"here" * 1024


@contextlib.contextmanager
def served_base(tmp_path: Path, data: bytes, options: str = "") -> Iterator[tuple[Mount, subprocess.Popen[Any]]]:
    """A kept mount of far.fvd, over a base with these bytes on a server, and of vm.fvd without a base; the server."""
    folder, socket = tmp_path / "images", tmp_path / "nbd.sock"
    folder.mkdir()
    (tmp_path / "base").write_bytes(data)
    nbdkit = ["nbdkit", "-f", "-r", "-U", str(socket), "file", str(tmp_path / "base")]
    with running(*nbdkit, stderr=subprocess.DEVNULL) as server:
        wait_until(socket.exists)
        must("create", folder / "far.fvd", "--base", f"nbd+unix:///?socket={socket}", "-F", "raw")
        must("create", folder / "vm.fvd", str(SIZE))
        with mounted(folder, "-o", f"keep,allow_url=nbd+unix:///{options}") as mount:
            yield mount, server


@pytest.mark.parametrize("resends", [True, False], ids=["6.9", "older"])
def test_a_read_that_is_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resends: bool) -> None:
    """It comes again; where the kernel cannot do that, it fails, and nothing waits for ever."""
    if not resends:
        monkeypatch.setenv("FVDFS_NO_RESEND", "1")
    elif RELEASE < (6, 9):
        pytest.skip("the kernel does not send requests again")
    data = random.Random(1).randbytes(SIZE)
    with (
        served_base(tmp_path, data, ",on_base_error=wait") as (mount, server),
        open(mount.raw("far"), "rb"),
        open(mount.raw("vm"), "r+b", 0) as vm,
    ):
        server.send_signal(signal.SIGSTOP)
        command = [sys.executable, "-c", READ, str(mount.raw("far"))]
        with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "\n"
            state = Path(f"/proc/{reader.pid}/stat")
            wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "D")
            mount.status("vm")  # what is answered came after the read
            if not resends:
                os.setxattr(mount.point, UPGRADE, b"/bin/true\0")
                wait_for_log(mount, "no other daemon can go on, so this one does: some requests have no answer")
            kill(mount, lambda: server.send_signal(signal.SIGCONT))
            vm.write(b"x" * 4096)
            os.fsync(vm.fileno())
            out, err = reader.communicate(timeout=60)
            if resends:
                assert out.strip() == data[1 << 20 : (1 << 20) + 4096].hex()
            else:
                assert "Input/output error" in err


def test_who_opens_what_ends_one_daemon_after_the_other_is_told(tmp_path: Path) -> None:
    """A base whose server does not answer holds up whoever opens the disk; another disk is opened meanwhile."""
    with served_base(tmp_path, bytes(SIZE)) as (mount, server):
        inode = mount.raw("far").stat().st_ino
        server.send_signal(signal.SIGSTOP)
        with running(*OPEN, str(mount.raw("far")), stderr=subprocess.PIPE, text=True) as reader:
            pid = mount.pid
            for number in range(1, TIMES + 1):
                wait_until(functools.partial(is_adopting, pid, inode, number))
                os.kill(pid, signal.SIGKILL)
                pid = daemon(mount, pid)
            assert "Input/output error" in reader.communicate(timeout=60)[1]
        mount.pid = int(os.getxattr(mount.point, "user.fvdfs.pid"))
        assert mount.raw("vm").read_bytes() == bytes(SIZE)
        server.send_signal(signal.SIGCONT)


def test_a_disk_that_ends_one_daemon_after_the_other_is_given_up(tmp_path: Path) -> None:
    """A base whose server does not answer holds each daemon up while it opens the disk again."""
    with served_base(tmp_path, bytes(SIZE)) as (mount, server):
        far = os.open(mount.raw("far"), os.O_RDONLY)
        inode = os.fstat(far).st_ino
        with open(mount.raw("vm"), "r+b", 0) as vm:
            vm.write(b"here")
            server.send_signal(signal.SIGSTOP)
            pid = mount.pid
            for number in range(1, TIMES + 2):
                os.kill(pid, signal.SIGKILL)
                pid = daemon(mount, pid)
                if number <= TIMES:
                    wait_until(functools.partial(is_adopting, pid, inode, number))
            mount.pid = int(os.getxattr(mount.point, "user.fvdfs.pid"))
            assert os.pread(vm.fileno(), 4, 0) == b"here"
            with pytest.raises(OSError, match="Stale"):
                os.pread(far, 4096, 0)
            server.send_signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            os.close(far)
