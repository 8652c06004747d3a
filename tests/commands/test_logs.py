"""Where the log of a mount goes: a file, syslog, a terminal, the journal, and always into memory."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fvdfs import logs
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, running, wait_for_end, wait_until
from support.namespaces import in_mount_namespace, overlaid

LISTENER = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
    listener.bind("/dev/log")
    print("listening", flush=True)
    while True:
        print(listener.recv(9999).decode(), flush=True)
"""


@pytest.fixture
def point(folder: Path) -> Path:
    """A mount point beside a folder with a.fvd, and bad.fvd, which is none."""
    must("create", folder / "a.fvd", "1M")
    (folder / "bad.fvd").write_bytes(b"\xa9\xf5\x43\x51" * 1024)
    path = folder.parent / "point"
    path.mkdir()
    return path


def test_the_last_lines_can_be_asked_for(folder: Path, point: Path) -> None:
    """Whatever becomes of the log itself."""
    with mounted(folder, "--log-file", "/dev/full") as mount:
        lines = must("status", "--log", mount.point).splitlines()
        assert any(" ERROR " in line and "bad.fvd" in line for line in lines)
        assert lines[-1].endswith(f" INFO {mount.point}: ready; shows the images of {folder}")
        assert fvdfs("status", "--log", folder).code == 2


def test_so_many_last_lines_as_an_attribute_holds() -> None:
    recent = logs._Recent()
    for number in range(3000):
        recent.handle(logging.makeLogRecord({"msg": f"line {number} " + "x" * (number % 9000), "levelno": 20}))
    text = recent.text()
    assert 50_000 < len(text) <= logs.MOST_KEPT
    assert b"line 2999 " in text.splitlines()[-1]


def test_in_the_foreground_it_says_when_it_is_ready(folder: Path, point: Path) -> None:
    with running(*FVDFS, "mount", "-f", folder, point, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while "ready" not in (lines or [""])[-1]:
            lines.append(process.stderr.readline())
        assert lines[-1] == f"fvdfs: {point}: ready; shows the images of {folder}\n"
        assert sorted(os.listdir(point)) == ["a.raw"]
        process.terminate()
        assert process.wait(30) == 0


def test_a_service_manager_is_told(folder: Path, point: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind(f"\0fvdfs-test-{os.getpid()}")
        environment = {**os.environ, "NOTIFY_SOCKET": f"@fvdfs-test-{os.getpid()}"}
        with running(*FVDFS, "mount", "-f", folder, point, env=environment, stderr=subprocess.DEVNULL) as process:
            told = ""
            while "READY=1" not in told:
                told += manager.recv(9999).decode() + "\n"
            assert f"STATUS={point} shows the images of {folder}" in told
            assert os.listdir(point) == ["a.raw"]
            process.terminate()
            while "closing images" not in told:
                told += manager.recv(9999).decode() + "\n"
            assert "STOPPING=1" in told
            assert process.wait(30) == 0


def test_a_service_manager_is_told_how_many_disks_are_open(folder: Path, point: Path) -> None:
    (folder / "base.raw").write_bytes(os.urandom(16 * MIB))
    cow = ["-b", "base.raw", "-F", "raw", "--copy-on-read", "--prefetch-delay", "1"]
    must("create", folder / "b.fvd", *cow)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind(f"\0fvdfs-test-{os.getpid()}")
        environment = {**os.environ, "NOTIFY_SOCKET": f"@fvdfs-test-{os.getpid()}"}

        def wait_for(text: str) -> None:
            while text not in manager.recv(9999).decode().splitlines()[-1]:
                pass

        words = (*FVDFS, "mount", "-f", str(folder), str(point), "-o", "prefetch_max=100K")
        with running(*words, env=environment, stderr=subprocess.DEVNULL) as process:
            wait_for(f"{folder}: 0 of 2 disks open")
            with open(point / "b.raw", "r+b"):
                wait_for(f"{folder}: 1 of 2 disks open, 1 being copied")
                with open(point / "a.raw", "rb"):
                    wait_for(f"{folder}: 2 of 2 disks open, 1 being copied")
            wait_for(f"{folder}: 0 of 2 disks open")
            process.terminate()
            assert process.wait(30) == 0


@pytest.mark.parametrize("words", [["--syslog", "--log-file", "LOG"], [], ["--syslog", "-f"]])
def test_syslog(folder: Path, point: Path, words: list[str]) -> None:
    words = [str(folder.parent / "log") if word == "LOG" else word for word in words]
    script = f"""
        {overlaid(folder.parent, "/dev")}
        {sys.executable} -c '{LISTENER}' >{folder.parent}/syslog & listener=$!
        until grep -q listening {folder.parent}/syslog; do sleep 0.02; done
        "$@" &
        until [ -e {point}/a.raw ]; do sleep 0.02; done
        until grep -q ready {folder.parent}/syslog; do sleep 0.02; done
        umount {point}
        until grep -q unmounted {folder.parent}/syslog; do sleep 0.02; done
        kill $listener
    """
    command = ["sh", "-ec", script, "sh", *FVDFS, "mount", str(folder), str(point), *words]
    done = subprocess.run(in_mount_namespace(*command), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 143), done.stderr
    said = (folder.parent / "syslog").read_text()
    assert f"INFO {point}: ready; shows the images of {folder}" in said
    assert any(line.startswith("<27>fvdfs[") and "bad.fvd" in line for line in said.splitlines())
    if "--log-file" in words:
        assert "bad.fvd" in (folder.parent / "log").read_text()


@pytest.mark.skipif(os.path.exists("/dev/log"), reason="somebody logs here")
def test_without_a_syslog_it_is_refused(folder: Path, point: Path) -> None:
    done = fvdfs("mount", folder, point, "--syslog")
    assert (done.code, "no journal or syslog runs here; give --log-file" in done.err) == (2, True)


def test_lines_for_the_journal_have_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    assert logs.leveled("a\nb", logging.ERROR) == "<3>a\n<3>b"
    assert logs.leveled("a", logging.WARNING) == "<4>a"
    read_end, write_end = os.pipe()
    status = os.fstat(write_end)
    for text, expected in (("", False), ("1:2", False), (f"{status.st_dev}:{status.st_ino}", True), (":", False)):
        monkeypatch.setenv("JOURNAL_STREAM", text)
        assert logs.to_journal(write_end) == expected
    os.close(read_end)
    os.close(write_end)
    assert not logs.to_journal(write_end)


def test_a_dead_mount_is_replaced(folder: Path, point: Path) -> None:
    must("mount", folder, point)
    pid = int(os.getxattr(point, "user.fvdfs.pid"))
    with running("sh", "-c", "cd $0; exec sleep 1000", point) as sleeper:
        wait_until(lambda: Path(f"/proc/{sleeper.pid}/comm").read_text() == "sleep\n")
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        done = fvdfs("mount", folder, point)
        assert (done.code, "or mount with --replace" in done.err) == (2, True)
        must("mount", folder, point, "--replace")
        assert os.listdir(point) == ["a.raw"]
        done = fvdfs("mount", folder, point, "-o", "replace")
        assert (done.code, "is mounted there already" in done.err) == (2, True), "a living one is not replaced"
        must("umount", point)
    assert not os.path.ismount(point)
