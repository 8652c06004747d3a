"""The process that serves a mount: signals, streams, descriptors, and what it does when nobody listens."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands.create import create_image
from fvdfs.format.creation import CreateOptions
from support import reference
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, running, wait_for_end, wait_for_log, wait_until

HARMLESS = ["SIGHUP", "SIGPIPE", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGTTOU"]
PID = "user.fvdfs.pid"


@pytest.fixture
def point(folder: Path) -> Iterator[Path]:
    """A mount point; what is mounted there at the end is unmounted."""
    must("create", folder / "a.fvd", "1M")
    path = folder.parent / "point"
    path.mkdir()
    yield path
    while os.path.ismount(path) or is_dead(path):
        subprocess.run(["umount", "-l", path], check=True)


def is_dead(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError:
        return True
    return False


@contextlib.contextmanager
def in_foreground(folder: Path, point: Path, *options: str, **how: object) -> Iterator[subprocess.Popen[Any]]:
    """`mount -f`, in a process that is ended whatever happens."""
    with running(*FVDFS, "mount", "-f", folder, point, *options, **how) as process:
        try:
            wait_until(lambda: os.path.ismount(point) and os.listdir(point))
            yield process
        finally:
            process.terminate()
            process.wait(30)


# --- signals ------------------------------------------------------------------------------------


def test_signals_that_mean_nothing_do_nothing(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount, open(mount.raw("a"), "r+b", buffering=0) as file:
        for number in [*(getattr(signal, name) for name in HARMLESS), signal.SIGRTMIN, signal.SIGRTMAX]:
            os.kill(mount.pid, number)
            file.write(b"x")
            os.fsync(file)
        assert os.listdir(mount.point) == ["a.raw"]


def test_signals_mean_the_same_in_the_foreground(folder: Path, point: Path) -> None:
    with in_foreground(folder, point) as process:
        for name in HARMLESS:
            process.send_signal(getattr(signal, name))
            assert os.listdir(point) == ["a.raw"]
        process.send_signal(signal.SIGQUIT)
        assert process.wait(30) == 0
    assert not os.path.ismount(point)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_a_signal_to_stop_is_obeyed_whatever_the_caller_ignored_or_blocked(
    folder: Path, point: Path, name: str
) -> None:
    number = getattr(signal, name)

    def block() -> None:
        signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})

    subprocess.run([*FVDFS, "mount", folder, point], check=True, preexec_fn=block)
    pid = int(os.getxattr(point, PID))
    with open(point / "a.raw", "r+b", buffering=0) as file:
        file.write(b"unflushed")
        os.kill(pid, number)
        wait_for_end(pid)
        with contextlib.suppress(OSError):
            file.close()
    assert not os.path.ismount(point)
    assert reference.check(folder / "a.fvd", "fvdfs") == []
    assert b"".join(reference.read_disk(folder / "a.fvd"))[:9] == b"unflushed"


def test_sighup_opens_the_log_file_anew(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        (folder / "first.fvd").write_bytes(b"no image" * 1024)
        os.listdir(mount.point)
        wait_for_log(mount, "first.fvd")
        old = mount.log_file.rename(mount.log_file.with_suffix(".1"))
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(mount.log_file.exists)
        (folder / "second.fvd").write_bytes(b"no image" * 1024)
        os.listdir(mount.point)
        wait_for_log(mount, "second.fvd")
        assert "second.fvd" not in old.read_text()
        # Where it cannot be opened, the old one is kept.
        mount.log_file.rename(old)
        mount.log_file.mkdir()
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(lambda: "cannot be opened again" in old.read_text())
        (folder / "third.fvd").write_bytes(b"no image" * 1024)
        os.listdir(mount.point)
        wait_until(lambda: "third.fvd" in old.read_text())
        mount.log_file.rmdir()


def test_a_disk_is_no_log(folder: Path, point: Path) -> None:
    disk = folder / "base.raw"
    disk.write_bytes(bytes(MIB))
    before = [path.read_bytes() for path in (folder / "a.fvd", disk)]
    for path in (folder / "a.fvd", disk):
        done = fvdfs("mount", folder, point, "--log-file", path)
        assert (done.code, "is no log" in done.err) == (2, True)
        assert not os.path.ismount(point)
    with mounted(folder) as mount:
        mount.log_file.rename(folder.parent / "log.1")
        mount.log_file.symlink_to(disk)
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(lambda: "is no log" in (folder.parent / "log.1").read_text())
    assert [path.read_bytes() for path in (folder / "a.fvd", disk)] == before


def test_sighup_does_not_lead_the_log_into_the_mount(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        old = mount.log_file.rename(mount.log_file.with_suffix(".1"))
        mount.log_file.symlink_to(mount.raw("a"))
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(lambda: "leads into this mount itself" in old.read_text())
        mount.log_file.unlink()
        assert mount.raw("a").read_bytes() == bytes(MIB)


# --- before it is ready -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_who_stops_the_command_before_the_mount_is_ready_leaves_no_mount(folder: Path, point: Path, name: str) -> None:
    """At many moments: whenever it is too late, the mount is there, and whole."""
    for delay in range(12):
        with running(*FVDFS, "mount", folder, point, stderr=subprocess.PIPE) as process:
            time.sleep(0.05 * delay)
            process.send_signal(getattr(signal, name))
            _, err = process.communicate(timeout=60)
        assert b"Traceback" not in err or name == "SIGINT"  # while Python itself starts
        if process.returncode == 0:
            assert os.listdir(point) == ["a.raw"]
            must("umount", point)
            break
        assert not is_dead(point)
        assert not os.path.ismount(point)
        assert not processes_that_serve(point)


def processes_that_serve(point: Path) -> list[str]:
    """What was started as a mount there and still runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"mount" in words and os.fsencode(point) in words:
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_the_process_itself_at_any_moment_leaves_no_dead_mount(
    folder: Path, point: Path, name: str
) -> None:
    for delay in range(12):
        with running(*FVDFS, "mount", "-f", folder, point, stderr=subprocess.DEVNULL) as process:
            time.sleep(0.1 + 0.05 * delay)
            process.send_signal(getattr(signal, name))
            if name in ("SIGHUP", "SIGUSR1"):
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
            process.wait(60)
        assert not is_dead(point)
        assert not os.path.ismount(point)


def test_a_command_that_was_killed_does_not_take_the_mount_with_it(folder: Path, point: Path) -> None:
    """Stopped right away, so that it is killed before the other process can tell it anything."""
    with running(*FVDFS, "mount", folder, point, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: len(processes_that_serve(point)) == 2 or process.poll() is not None)
    wait_until(lambda: os.path.ismount(point) and not is_dead(point))
    assert os.listdir(point) == ["a.raw"]
    must("umount", point)


# --- streams and descriptors --------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("foreground", [False, True])
def test_closed_streams_do_no_harm(folder: Path, point: Path, closed: tuple[int, ...], foreground: bool) -> None:
    log = folder.parent / "log"

    def close() -> None:
        for number in closed:
            os.close(number)

    command: list[str | Path] = [*FVDFS, "mount", folder, point, "--log-file", log]
    if foreground:
        command.append("-f")
    with running(*command, preexec_fn=close) as process:
        wait_until(lambda: os.path.ismount(point) and os.listdir(point) == ["a.raw"])
        pid = int(os.getxattr(point, PID))
        for number in closed:
            assert os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/null"
        (folder / "bad.fvd").write_bytes(b"no image" * 1024)
        assert os.listdir(point) == ["a.raw"]
        subprocess.run([*FVDFS, "umount", point], check=True, preexec_fn=close)
        assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()


def test_nobody_waits_for_the_mount_that_gave_it_a_descriptor(folder: Path, point: Path) -> None:
    reader, writer = os.pipe()
    done = subprocess.run(
        [*FVDFS, "mount", folder, point],
        stdout=writer,
        stderr=writer,
        pass_fds=[writer],
        check=False,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 0
    os.set_blocking(reader, False)
    assert os.read(reader, 1000) == b"", "somebody still has the other end"
    os.close(reader)
    must("umount", point)


def test_a_reader_of_messages_that_ends_does_not_end_the_mount(folder: Path, point: Path) -> None:
    with in_foreground(folder, point, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
        for number in range(3):
            (folder / f"bad{number}.fvd").write_bytes(b"\xa9\xf5\x43\x51" * 1024)
            assert os.listdir(point) == ["a.raw"]
        must("umount", point)
        assert process.wait(30) == 0


def test_a_reader_of_messages_that_sleeps_does_not_stop_the_mount(folder: Path, point: Path) -> None:
    """A pipe holds 64 KiB; these are more."""
    with in_foreground(folder, point, stderr=subprocess.PIPE) as process:
        for number in range(40):
            name = "n" * 100 + f"{number}.fvd"
            for _ in range(20):
                (folder / name).write_bytes(os.urandom(4) * 2000)
                os.listdir(point)
                (folder / name).unlink()
                os.listdir(point)
        must("umount", point)
        assert process.wait(30) == 0
        assert process.stderr is not None
        process.stderr.close()


def test_a_log_that_cannot_be_written_does_not_end_the_mount(folder: Path, point: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with in_foreground(folder, point, "--log-file", "/dev/full", stderr=full) as process:
        os.close(full)
        (folder / "bad.fvd").write_bytes(b"\xa9\xf5\x43\x51" * 1024)
        assert os.listdir(point) == ["a.raw"]
        must("umount", point)
        assert process.wait(30) == 0


@pytest.mark.parametrize("foreground", [False, True])
def test_the_mount_outlives_its_terminal(folder: Path, point: Path, foreground: bool) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execv(FVDFS[0], [*FVDFS, "mount", str(folder), str(point), *(["-f"] if foreground else [])])
    wait_until(lambda: os.path.ismount(point) and os.listdir(point) == ["a.raw"])
    if not foreground:
        os.waitpid(pid, 0)
    os.close(terminal)  # the session gets SIGHUP, and writing to the terminal is EIO
    (folder / "bad.fvd").write_bytes(b"\xa9\xf5\x43\x51" * 1024)
    for _ in range(3):
        assert os.listdir(point) == ["a.raw"]
        time.sleep(0.1)
    must("umount", point)
    if foreground:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_commands_are_filters_like_any_other(folder: Path, point: Path) -> None:
    must("mount", folder, point)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*FVDFS, "status", point], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE
    assert done.stderr == b""
    must("umount", point)


def test_what_the_process_creates_is_not_writable_for_all(folder: Path, point: Path) -> None:
    log = folder.parent / "log"
    subprocess.run([*FVDFS, "mount", folder, point, "--log-file", log], check=True, umask=0)
    assert log.stat().st_mode & 0o777 == 0o644
    must("umount", point)


def test_a_child_that_the_caller_does_not_wait_for(folder: Path, point: Path) -> None:
    """SIGCHLD ignored, as some services leave it: no child could be waited for."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    mount = ["mount", str(folder), str(point)]
    for command, code in ((mount, 0), (mount, 2), (["umount", str(point)], 0)):
        done = subprocess.run([*FVDFS, *command], preexec_fn=ignore, check=False, stderr=subprocess.DEVNULL)
        assert done.returncode == code


# --- limits -------------------------------------------------------------------------------------


def limited(soft: int, hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_low_soft_limit_of_descriptors_is_raised(folder: Path, point: Path) -> None:
    subprocess.run([*FVDFS, "mount", folder, point], check=True, preexec_fn=lambda: limited(20, 4096))
    pid = int(os.getxattr(point, PID))
    assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] == 4096
    must("umount", point)


def test_too_few_descriptors_are_called_that(folder: Path, point: Path) -> None:
    """An image that takes more than there are is not gone, nor broken; the others work."""
    create_image(str(folder / "deep0.fvd"), MIB, CreateOptions())
    for number in range(1, 60):
        options = CreateOptions(base_img=f"deep{number - 1}.fvd", base_img_fmt="fvd")
        create_image(str(folder / f"deep{number}.fvd"), None, options)
    log = folder.parent / "log"
    command = [*FVDFS, "mount", str(folder), str(point), "--log-file", str(log)]
    subprocess.run(command, check=True, preexec_fn=lambda: limited(50, 50))
    with pytest.raises(OSError) as caught:
        open(point / "deep59.raw", "rb")
    assert caught.value.errno == errno.EMFILE
    assert (point / "a.raw").read_bytes() == bytes(MIB)
    assert {"a.raw", "deep0.raw"} <= set(os.listdir(point))
    assert len([line for line in log.read_text().splitlines() if "Too many open files" in line]) == 1
    must("umount", point)
