"""`fvdfs serve`: what other hosts read of a disk that is in use here, and how they ask for it."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.format.mailbox import Question, Wish
from fvdfs.format.migration import Incoming, Target
from fvdfs.store import filelock
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted, must, needs_passthrough, running, wait_for_end, wait_until
from support.moves import Client, number, serving

SECRET, OTHER_SECRET = "1" * 32, "2" * 32


@pytest.fixture
def mount(folder: Path) -> Iterator[Mount]:
    must("create", folder / "vm.fvd", "16M")
    with mounted(folder) as found:
        yield found


def qemu_io(socket: Path, export: str, *commands: str, write: bool = False) -> str:
    words = ["qemu-io", *([] if write else ["-r"]), "-f", "raw", f"nbd+unix:///{export}?socket={socket}"]
    for command in commands:
        words += ["-c", command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def data_bytes(socket: Path, export: str) -> int:
    """Bytes that it does not call zeros."""
    words = ["qemu-img", "map", "--output=json", "-f", "raw", f"nbd+unix:///{export}?socket={socket}"]
    extents = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return sum(extent["length"] for extent in extents if not extent["zero"])


def has_export(socket: Path, export: str) -> bool:
    return "read 512/512" in qemu_io(socket, export, "read 0 512")


def question(wish: Wish, epoch: str, name: str = "beta", secret: str = SECRET) -> Question:
    """That of a target."""
    return Question.of(Incoming(Target.RECEIVING, epoch, secret), wish, number(), name)


def test_it_gives_what_the_disk_is_now_with_its_holes(mount: Mount) -> None:
    raw = mount.raw("vm")
    with serving(mount) as socket:
        descriptor = os.open(raw, os.O_RDWR | os.O_DIRECT)  # as a machine does
        buffer = mmap.mmap(-1, 4096)
        for n in range(1, 6):
            buffer[:] = bytes([n]) * 4096
            os.pwrite(descriptor, buffer, 4096 * n)
            assert "read 512/512" in qemu_io(socket, "vm", f"read -P {n} {4096 * n} 512")
            assert data_bytes(socket, "vm") == 4096 * n
        os.close(descriptor)
        with open(raw, "r+b", buffering=0) as cached:
            for n in range(1, 6):
                os.pwrite(cached.fileno(), bytes([n + 100]) * 4096, MIB)
                assert "read 512/512" in qemu_io(socket, "vm", f"read -P {n + 100} {MIB} 512")
        assert "Permission denied" in qemu_io(socket, "vm", "write 0 512", write=True)
        assert not has_export(socket, "other")
    assert fvdfs("serve", raw, "--unix", socket, "--listen", "127.0.0.1").code == 2
    assert fvdfs("serve", raw).code == 2
    assert fvdfs("serve", mount.folder / "vm.fvd", "--unix", socket).code == 2
    assert fvdfs("serve", raw, "--listen", "127.0.0.1:1x").code == 2


def test_it_is_handed_over_once_and_only_without_a_machine(mount: Mount) -> None:
    raw = mount.raw("vm")
    with serving(mount) as socket:
        epoch = mount.status("vm")["move_epoch"]
        wish = question(Wish.HAND_OVER, epoch)
        with running("qemu-io", "-f", "raw", "-n", raw, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as machine:
            assert machine.stdin is not None
            assert machine.stdout is not None
            machine.stdin.write(b"write -P 7 0 4k\n")
            machine.stdin.flush()
            machine.stdout.readline()
            answer = Client.at(socket).ask(wish)
            assert (answer.done, answer.later) == (False, True)
            assert "a machine runs on it" in answer.text
            assert not has_export(socket, f"vm/{epoch}")
        answer = Client.at(socket).ask(question(Wish.HAND_OVER, "0" * 16))
        assert (answer.done, answer.later) == (False, False)
        assert Client.at(socket).ask(question(Wish.HAND_OVER, epoch)).done
        assert "read 512/512" in qemu_io(socket, f"vm/{epoch}", "read -P 7 0 512")
        assert Client.at(socket).ask(question(Wish.HAND_OVER, epoch)).done
        answer = Client.at(socket).ask(question(Wish.HAND_OVER, epoch, "gamma", OTHER_SECRET))
        assert "has moved to another target, beta" in answer.text
        words = ["qemu-io", "-f", "raw", "-r", "-c", "reopen -w", str(raw)]
        again = subprocess.run(words, capture_output=True, text=True, check=False)
        assert "Read-only" in again.stderr + again.stdout
    mount.remount()
    with serving(mount) as socket:
        assert has_export(socket, f"vm/{epoch}")
        assert Client.at(socket).ask(question(Wish.RELEASE, epoch)).done
        assert mount.status("vm")["move"] == "released"
        must("thaw", raw, "--lose-writes")
        wait_until(lambda: mount.status("vm")["move"] == "serving")
        wait_until(lambda: not has_export(socket, f"vm/{epoch}"))
        assert mount.status("vm")["move_epoch"] != epoch
        assert "is over" in Client.at(socket).ask(question(Wish.HAND_OVER, epoch)).text
        with raw.open("r+b") as file:
            file.write(b"again")


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_another_daemon_takes_the_place_of_one_that_has_died(mount: Mount, tmp_path: Path) -> None:
    raw, path = mount.raw("vm"), tmp_path / "nbd"
    command = (*FVDFS, "serve", raw, "--unix", path)
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        assert server.stdout.readline()
        epoch = mount.status("vm")["move_epoch"]
        for wish in (None, question(Wish.HAND_OVER, epoch)):
            os.kill(children(server.pid)[0], signal.SIGKILL)
            assert "has ended, and is started again: killed by signal 9" in server.stderr.readline()
            assert "runs again" in server.stderr.readline()
            assert has_export(path, "vm")
            assert has_export(path, f"vm/{epoch}") == (mount.status("vm")["move"] == "moved")
            if wish is not None:
                assert Client.at(path).ask(wish).done
                assert "beta asks to hand over: done" in server.stderr.readline()
        os.kill(children(server.pid)[0], signal.SIGKILL)
        wait_until(lambda: has_export(path, f"vm/{epoch}"))
        again = fvdfs("serve", raw, "--unix", tmp_path / "other")
        assert (again.code, again.err) == (1, f"fvdfs: {raw}: is served already; end that fvdfs serve first\n")
        done = fvdfs("umount", mount.point)
        assert done.code == 1
        assert "is busy: " in done.err
        assert f"process {server.pid}" in done.err
        daemon = children(server.pid)[0]
        server.kill()
        wait_for_end(daemon)
    mount.umount()


def test_systemd_gives_it_a_socket(mount: Mount, tmp_path: Path, free_port: int) -> None:
    raw = mount.raw("vm")
    assert "--systemd: is for a service with one socket" in fvdfs("serve", raw, "--systemd").err
    assert fvdfs("serve", raw, "--systemd", "--listen", "127.0.0.1").code == 2
    for address, url in (
        (f"127.0.0.1:{free_port}", f"nbd://127.0.0.1:{free_port}/vm"),
        (tmp_path / "nbd", f"nbd+unix:///vm?socket={tmp_path / 'nbd'}"),
    ):
        activate = ("systemd-socket-activate", "-l", address, "-E", "PYTHONPATH", "-E", "PATH", *FVDFS)
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        with running(*map(str, activate), "serve", raw, "--systemd", **how) as server:
            assert server.stdout is not None
            words = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", url]

            def is_read(words: list[str] = words) -> bool:
                return "512/512" in subprocess.run(words, capture_output=True, text=True, check=False).stdout

            wait_until(is_read)
            assert server.stdout.readline() == f"{url}\n"
            os.kill(children(server.pid)[0], signal.SIGKILL)
            wait_until(is_read)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0


@needs_passthrough
def test_a_disk_that_the_kernel_writes_by_itself_is_not_served(folder: Path) -> None:
    must("create", folder / "vm.fvd", "16M", "--data-file", "auto")
    with mounted(folder, "-o", "writeback=off", passes="vm") as mount:
        assert "-o writeback=on" in fvdfs("serve", mount.raw("vm"), "--unix", folder.parent / "nbd").err


def test_it_ends_with_the_mount_that_it_serves_from(mount: Mount, tmp_path: Path) -> None:
    """One that takes its place at once is another one: what is exported is open in the first."""
    command = (*FVDFS, "serve", mount.raw("vm"), "--unix", tmp_path / "nbd")
    with running(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        server.send_signal(signal.SIGSTOP)  # so that it sees nothing of the time between
        wait_until(lambda: "State:\tT" in Path(f"/proc/{server.pid}/status").read_text())
        mount.kill()
        mount.mount()
        server.send_signal(signal.SIGCONT)
        assert server.wait(30)
        assert server.stderr is not None
        assert "start fvdfs serve again" in server.stderr.read()
    with serving(mount):
        assert mount.status("vm")["move"] == "serving"


def is_kept_from_machines(raw: Path) -> bool:
    with raw.open("rb") as file:
        return filelock.FileLock(file.fileno(), str(raw))._is_held(filelock._OWN)


def test_a_thaw_is_over_when_a_machine_can_start(mount: Mount, tmp_path: Path) -> None:
    raw = mount.raw("vm")
    command = (*FVDFS, "serve", raw, "--unix", tmp_path / "nbd")
    with running(*command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        must("freeze", raw)
        words = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(raw)]
        wait_until(lambda: is_kept_from_machines(raw))
        server.send_signal(signal.SIGSTOP)
        with running(*FVDFS, "thaw", raw) as thawing:
            wait_until(lambda: not mount.status("vm")["move"])
            with pytest.raises(subprocess.TimeoutExpired):
                thawing.wait(0.5)
            server.send_signal(signal.SIGCONT)
            assert thawing.wait(30) == 0
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert "wrote 512/512" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGHUP, 0), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_nothing_is_left_of_it(mount: Mount, number: signal.Signals, code: int) -> None:
    """However it ends; a closed terminal ends it, too."""
    temporary, socket = mount.folder.parent / "temporary", mount.folder.parent / "nbd"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    words = [*FVDFS, "serve", str(mount.raw("vm")), "--unix", str(socket)]
    with running(*words, stdout=subprocess.PIPE, env=environment) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        server.send_signal(number)
        assert server.wait(30) == code
    assert list(temporary.iterdir()) == []


def test_a_signal_while_it_starts_ends_it_without_a_word(mount: Mount) -> None:
    """The mount does not answer meanwhile."""
    words = [*FVDFS, "serve", str(mount.raw("vm")), "--unix", str(mount.folder.parent / "nbd")]
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        with running(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            waits = Path(f"/proc/{server.pid}/wchan")
            wait_until(lambda: "request_wait_answer" in waits.read_text())
            server.send_signal(signal.SIGTERM)
            os.kill(mount.pid, signal.SIGCONT)
            assert (*server.communicate(timeout=60), server.returncode) == ("", "", 0)
    finally:
        os.kill(mount.pid, signal.SIGCONT)
