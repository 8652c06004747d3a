"""A disk that comes from another host: what is read of it before and after it is taken over, and who may write."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from fvdfs.format.mailbox import Wish
from fvdfs.image.tree import Tree
from fvdfs.store.locations import parse_location
from fvdfs.store.source import ask
from support import machines
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted, must, running, wait_until
from support.moves import Move, record

SIZE_OF_DISK = 16 * MIB
CONTENT = random.Random(3).randbytes(4 * MIB)


@pytest.fixture
def move(tmp_path: Path, folder: Path) -> Iterator[Move]:
    must("create", folder / "vm.fvd", str(SIZE_OF_DISK))
    with mounted(folder) as source:
        with source.raw("vm").open("r+b") as file:
            file.write(CONTENT)
        yield Move(tmp_path, source)


def write_direct(raw: Path, at: int, byte: int) -> None:
    descriptor = os.open(raw, os.O_RDWR | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, 4096)
        buffer[:] = bytes([byte]) * 4096
        assert os.pwrite(descriptor, buffer, at) == 4096
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def machine(raw: Path) -> Iterator[None]:
    """A program with QEMU's locks has it open for writing."""
    with running("qemu-io", "-f", "raw", "-n", raw, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"read 0 512\n")
        process.stdin.flush()
        process.stdout.readline()
        yield


@pytest.mark.parametrize("options", ["writeback=on", "writeback=off"])
def test_nothing_is_kept_before_and_all_is_right_afterwards(move: Move, options: str) -> None:
    source = move.source.raw("vm")
    with move.served():
        move.receive()
        before = move.image.read_bytes()
        with move.target(options) as target:
            raw = target.raw("vm")
            assert raw.stat().st_size == SIZE_OF_DISK
            with open(raw, "rb", buffering=0) as reader, open(raw, "r+b", buffering=0) as writer:
                with machine(source):
                    for byte in (1, 2, 3):
                        write_direct(source, 8192, byte)
                        assert os.pread(reader.fileno(), 512, 8192) == bytes([byte]) * 512
                        assert os.pread(writer.fileno(), 512, 8192) == bytes([byte]) * 512
                        assert raw.read_bytes()[8192:12288] == bytes([byte]) * 4096
                    if options == "writeback=on":
                        done = fvdfs("activate", raw)
                        assert (done.code, "a machine runs on it" in done.err) == (1, True), done.err
                        assert fvdfs("prefetch", "start", raw).code
                        assert fvdfs("snapshot", raw).code
                        assert fvdfs("freeze", raw).code
                        assert fvdfs("serve", raw, "--unix", move.folder / "s").code
                assert target.status("vm")["move"] == "receiving"
                assert target.status("vm")["local_bytes"] == 0
                assert move.image.read_bytes() == before
                write_direct(source, 8192, 4)
                os.pwrite(writer.fileno(), b"t" * 4096, 0)
                assert os.pread(reader.fileno(), 8192, 4096) == CONTENT[4096:8192] + b"\4" * 4096
                assert move.source.status("vm")["move"] in ("moved", "released")
                assert target.status("vm")["move"] in ("active", "local")
                with pytest.raises(OSError, match="Read-only"):
                    write_direct(source, 8192, 5)
                wait_until(lambda: move.source.status("vm")["move"] == "released")
                assert target.status("vm")["move"] == "local"
    with move.target() as target:  # nobody serves any more
        expected = b"t" * 4096 + CONTENT[4096:8192] + b"\4" * 4096 + CONTENT[12288:]
        assert target.raw("vm").read_bytes() == expected.ljust(SIZE_OF_DISK, b"\0")
    assert fvdfs("check", move.image).code == 0


def test_both_ends_tell_how_far_it_is_and_what_nobody_uses_is_copied_across_restarts(move: Move) -> None:
    def told(mount: Mount) -> str:
        return " ".join(must("status", mount.point).split())

    with move.served():
        move.receive()
        assert "offered to other hosts by fvdfs serve" in told(move.source)
        assert "offered to other hosts" in must("info", move.source.folder / "vm.fvd")
        with move.target("prefetch_max=512K") as target:
            assert "it is being received" in told(target)
            write_direct(target.raw("vm"), 0, 1)
            first = "copies first what its source used last, its source is needed until all is local"
            wait_until(lambda: first in told(target))
            assert "which does not have all of it yet" in told(move.source)
            must("prefetch", "stop", target.raw("vm"))
            wait_until(lambda: not target.status("vm")["open"])
            stopped = "its source is needed until all is local; it is copied while a program has it open"
            assert stopped in told(target)
            target.remount()
            wait_until(lambda: target.status("vm")["open"])
            assert fvdfs("check", move.image).code == 0
            (again := move.folder.with_name("again")).symlink_to(move.folder)
            with mounted(again, "-o", "allow_url=nbd+unix:///") as other:  # it gives way to who writes it there
                write_direct(other.raw("vm"), 4096, 2)
                wait_until(lambda: move.source.status("vm")["move"] == "released", timeout=60)
            wait_until(lambda: target.status("vm")["move"] == "local")
            assert "its source" not in told(target)
            for text in (told(move.source), must("info", move.source.folder / "vm.fvd")):
                assert "which has all of it: this image may be removed" in text


def test_it_is_taken_over_by_one_target_only(move: Move) -> None:
    with move.served():
        move.receive()
        move.receive("other")
        with move.target() as target:
            must("activate", target.raw("vm"))
            must("activate", target.raw("vm"))
            done = fvdfs("activate", target.raw("other"))
            assert "has moved to another target" in done.err
            with pytest.raises(OSError) as caught:
                write_direct(target.raw("other"), 0, 1)
            assert caught.value.errno == errno.EIO
            assert target.status("other")["move"] == "receiving"
            assert fvdfs("activate", target.raw("vm")).code == 0
            write_direct(target.raw("vm"), 0, 1)


def test_it_is_given_to_the_target_that_the_server_names(move: Move) -> None:
    with move.served():
        for name in ("vm", "other"):
            move.receive(name)
    number = json.loads(must("info", "--json", move.image))["move"]["number"]
    assert number in must("info", move.image)
    done = fvdfs("serve", move.source.raw("vm"), "--unix", move.folder / "s", "--for", "nobody")
    assert (done.code, done.err.count("\n")) == (2, 1)
    with move.served("--for", number), move.target() as target:
        done = fvdfs("activate", target.raw("other"))
        assert "kept for another target" in done.err
        must("activate", target.raw("vm"))
        assert target.status("vm")["move"] in ("active", "local")


def test_a_mount_that_does_not_allow_the_source_says_so(move: Move) -> None:
    with move.served():
        move.receive()
        with mounted(move.folder) as target:
            done = fvdfs("activate", target.raw("vm"))
            assert (done.code, "does not appear: " in done.err, "allow_url=" in done.err) == (2, True, True), done
            assert "there is no such file" in fvdfs("activate", target.raw("nothing")).err
        assert "exists already; choose another name, or remove it" in fvdfs("receive", move.url, move.image).err


def test_an_epoch_that_is_over_is_refused(move: Move) -> None:
    with move.served():
        move.receive()
        must("freeze", move.source.raw("vm"))
        must("thaw", move.source.raw("vm"))
        wait_until(lambda: move.source.status("vm")["move"] == "serving")
        with move.target() as target:
            assert "receive the disk again" in fvdfs("activate", target.raw("vm")).err
            write_direct(move.source.raw("vm"), 0, 9)
            assert target.raw("vm").read_bytes()[:4096] == b"\t" * 4096


def test_source_and_target_end_and_come_back(move: Move) -> None:
    """A server that is gone before the switch-over, a mount that is killed after it, a server that is started anew."""
    with move.served():
        move.receive()
    with move.target() as target:
        assert "cannot be taken over" in target.log or fvdfs("activate", target.raw("vm")).code
        assert target.raw("vm").stat().st_size == SIZE_OF_DISK
        assert record(move.image).receiving
        with move.served():
            raw = target.raw("vm")
            descriptor = os.open(raw, os.O_RDWR)
            os.pwrite(descriptor, b"x" * 512, 12 * MIB)
            os.fsync(descriptor)
            target.kill()
            with contextlib.suppress(OSError):
                os.close(descriptor)
            assert record(move.image).state == "active"
            move.source.status("vm")
        target.mount()
        move.source.remount()
        with move.served():
            wait_until(lambda: target.raw("vm").exists())
            data = target.raw("vm").read_bytes()
            assert data[: len(CONTENT)] == CONTENT
            assert data[12 * MIB : 12 * MIB + 512] == b"x" * 512
            write_direct(target.raw("vm"), 0, 1)


def test_an_answer_that_got_lost_is_asked_for_again(move: Move) -> None:
    """The source has moved, and the target that asked has ended before it knew."""
    with move.served():
        move.receive()
        into = record(move.image).incoming
        assert into is not None
        trio.run(ask, parse_location(move.url), "", into, Wish.HAND_OVER, 3.0)
        assert move.source.status("vm")["move"] == "moved"
        assert record(move.image).receiving
        with move.target() as target:
            write_direct(target.raw("vm"), 4096, 7)
            assert target.status("vm")["move"] == "active"
            assert target.raw("vm").read_bytes()[:8192] == CONTENT[:4096] + b"\7" * 4096


def test_the_first_write_waits_for_a_machine_that_is_about_to_end(move: Move) -> None:
    with move.served():
        move.receive()
        with move.target() as target:
            done = threading.Event()

            def write() -> None:
                write_direct(target.raw("vm"), 4096, 7)
                done.set()

            with machine(move.source.raw("vm")):
                writer = threading.Thread(target=write)
                writer.start()
                said = "has asked its source for the disk since "
                wait_until(lambda: said in (remark := target.status("vm")["move_remark"]) and "machine runs" in remark)
                assert not done.is_set()
                write_direct(move.source.raw("vm"), 0, 8)
            assert done.wait(30)
            writer.join()
            assert target.raw("vm").read_bytes()[:8192] == b"\x08" * 4096 + b"\7" * 4096


def test_the_first_write_waits_for_a_source_that_is_away(move: Move) -> None:
    """With on_base_error=wait; meanwhile whoever waits can be killed."""
    with move.served():
        move.receive()
    with move.target("on_base_error=wait") as target:
        raw = target.raw("vm")
        write = ("dd", "if=/dev/zero", f"of={raw}", "bs=4096", "seek=1", "count=1", "oflag=direct", "conv=notrunc")
        with running(*write, stderr=subprocess.DEVNULL) as killed:
            wait_until(lambda: target.status("vm").get("base_outage"))
            killed.kill()
            assert killed.wait(30) == -signal.SIGKILL
        assert record(move.image).receiving
        with running(*write, stderr=subprocess.DEVNULL) as writer:
            wait_until(lambda: target.status("vm").get("base_outage"))
            assert writer.poll() is None
            with move.served():
                assert writer.wait(30) == 0
                assert target.status("vm")["move"] in ("active", "local")
                assert raw.read_bytes()[:12288] == CONTENT[:4096] + bytes(4096) + CONTENT[8192:12288]


def qmp_qemu(work: Path, name: str, raw: Path, *more: str) -> list[str | Path]:
    """A machine without a guest, whose disk its monitor reads and writes."""
    node = f"driver=raw,node-name=disk,file.driver=file,file.filename={raw},file.cache.direct=on"
    return [
        *(
            "stdbuf",
            "-oL",
            "qemu-system-x86_64",
            "-M",
            "q35",
            "-m",
            "32",
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "tcg",
        ),
        *("-blockdev", node, "-device", "virtio-blk-pci,drive=disk,id=d0", "-no-shutdown"),
        *("-qmp", f"unix:{work / name},server=on,wait=off", *more),
    ]


class Monitor:
    """Of a QEMU."""

    def __init__(self, path: Path, output: Path) -> None:
        self._output = output
        wait_until(path.exists)
        self._socket = socket.socket(socket.AF_UNIX)
        wait_until(lambda: self._socket.connect_ex(str(path)) == 0)
        self._lines = self._socket.makefile()
        json.loads(self._lines.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> dict[str, Any]:
        request = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            answer: dict[str, Any] = json.loads(self._lines.readline())
            if "event" not in answer:
                return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def qemu_io(self, command: str) -> str:
        """What the machine's disk does; QEMU prints that."""
        before = len(self._output.read_text())
        words = f'qemu-io -d /machine/peripheral/d0/virtio-backend "{command}"'
        assert self("human-monitor-command", command_line=words) == {"return": ""}
        return self._output.read_text()[before:]


def test_a_machine_moves_and_its_disk_follows(move: Move, tmp_path: Path) -> None:
    with move.served(), contextlib.ExitStack() as stack:
        move.receive()
        target = stack.enter_context(move.target())
        moves_by = f"unix:{tmp_path / 'ram'}"
        monitors = []
        for name, raw, more in (("a", move.source.raw("vm"), ()), ("b", target.raw("vm"), ("-incoming", moves_by))):
            output = stack.enter_context(open(tmp_path / f"{name}.out", "w"))
            stack.enter_context(running(*qmp_qemu(tmp_path, f"{name}.qmp", raw, *more), stdout=output))
            monitors.append(Monitor(tmp_path / f"{name}.qmp", tmp_path / f"{name}.out"))
        source, there = monitors
        stack.callback(source.close)
        stack.callback(there.close)
        assert "wrote" in source.qemu_io("write -P 1 0 4k")
        source("migrate", uri=moves_by)
        wait_until(lambda: source("query-migrate")["return"]["status"] == "completed")
        wait_until(lambda: there("query-status")["return"]["status"] == "running")
        assert "read 4096/4096" in there.qemu_io("read -P 1 0 4k")
        assert "wrote" in there.qemu_io("write -P 2 4k 4k")
        assert target.status("vm")["move"] in ("active", "local")
        assert 'Failed to get "write" lock' in str(source("cont"))
        assert "read 4096/4096" in there.qemu_io("read -P 1 0 4k")
        assert "read 4096/4096" in there.qemu_io("read -P 2 4k 4k")
        wait_until(lambda: move.source.status("vm")["move"] == "released")
        assert "read 4096/4096" in there.qemu_io("read -P 2 4k 4k")


def test_it_is_taken_over_as_soon_as_the_machine_runs(move: Move, tmp_path: Path) -> None:
    """By QEMU's own word, without a write; a machine that never comes gets nothing."""
    by = f"unix:{tmp_path / 'ram'}"
    with move.served(), contextlib.ExitStack() as stack:
        move.receive()
        target = stack.enter_context(move.target())
        here = stack.enter_context(machines.machine(tmp_path / "here", move.source.raw("vm")))
        incoming = (tmp_path / "there", target.raw("vm"), "-incoming", by)
        activate = (*FVDFS, "activate", target.raw("vm"), "--qmp", tmp_path / "there")
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with machines.machine(*incoming) as there, running(*activate, **how) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith("waiting for the machine")
            there.kill()
            _, err = waiting.communicate(timeout=60)
            assert (waiting.returncode, err.count("\n"), "was not taken over" in err) == (1, 1, True), err
        assert target.status("vm")["move"] == "receiving"
        with machines.machine(*incoming) as there, running(*activate, **how) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline().startswith("waiting for the machine")
            assert target.status("vm")["move"] == "receiving"
            here("migrate", uri=by)
            assert waiting.wait(60) == 0
            assert there.state == "running"
            assert target.status("vm")["move"] in ("active", "local")


def test_nothing_stands_on_what_is_being_received(move: Move) -> None:
    with move.served():
        move.receive()
        done = fvdfs("create", move.folder / "top.fvd", "--base", "vm.fvd", "-F", "fvd")
        assert done.code
        assert "is being received" in done.err
        assert fvdfs("receive", move.url.replace("/vm?", "/nothing?"), move.folder / "x.fvd").code == 2
        assert fvdfs("receive", move.url, move.image).code == 2
        assert fvdfs("receive", "image.raw", move.folder / "x.fvd").code == 2
        assert sorted(path.name for path in move.folder.iterdir()) == ["vm.fvd"]
        assert Tree(str(move.folder)).at(str(move.image)) is not None


def test_a_host_between_two_that_is_not_mounted_any_more_releases_the_first(move: Move) -> None:
    with move.served():
        move.receive()
        with move.target("prefetch_max=16k") as target:
            write_direct(target.raw("vm"), 0, 7)
            must("freeze", target.raw("vm"))
            step = f"handover {target.status('vm')['move_epoch']} {'7' * 32} gamma"
            os.setxattr(target.raw("vm"), "user.fvdfs.move", step.encode())
    done = fvdfs("release", move.image)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "could not be told: " in done.err
    assert "fvdfs release" in done.err
    assert (record(move.image).state, move.source.status("vm")["move"]) == ("released", "moved")
    with move.served():
        must("release", move.image)
        assert move.source.status("vm")["move"] == "released"
        must("release", move.image)
    must("thaw", "--lose-writes", move.image)
    assert fvdfs("release", move.image).code == 2


@pytest.mark.parametrize("keep_base", [False, True])
def test_info_needs_no_source(move: Move, keep_base: bool) -> None:
    template = move.folder / "template.raw"
    more = ("--keep-base", template.name, "-F", "raw") if keep_base else ()
    if keep_base:
        (move.source.folder / template.name).write_bytes(CONTENT)
        template.write_bytes(CONTENT)
        must(
            "create", move.source.folder / "vm.fvd", str(SIZE_OF_DISK), "--base", template.name, "-F", "raw", "--force"
        )
        wait_until(lambda: move.source.raw("vm").read_bytes()[: len(CONTENT)] == CONTENT)
    with move.served():
        must("receive", move.url, move.image, *more)
        before = json.loads(must("info", "--json", move.image))
        with move.target("prefetch_max=16k") as target:
            write_direct(target.raw("vm"), 0, 7)
    after = json.loads(must("info", "--json", move.image))
    for found, state in ((before, "receiving"), (after, "active")):
        assert (found["problems"], found["move"]["state"], found["move"]["source"]) == ([], state, move.url)
        assert found["base_chain"][0]["name"] == (template.name if keep_base else move.url)
    assert before["local_blocks"] == 0
    assert 0 < after["local_blocks"] < after["base_blocks"]
    assert move.url in must("info", move.image)


@pytest.mark.parametrize("served_anew", [False, True])
@pytest.mark.parametrize("change", [MIB, -MIB])
def test_a_source_that_has_another_size_by_now(move: Move, change: int, *, served_anew: bool) -> None:
    """It is not taken over: what it has more would be nowhere, once its image is removed."""

    def resize() -> None:
        move.source.umount()
        must("resize", move.source.folder / "vm.fvd", str(SIZE_OF_DISK + change), *(["--shrink"] if change < 0 else []))
        move.source.mount()

    def activate() -> None:
        with move.target() as target:
            done = fvdfs("activate", target.raw("vm"))
            assert done.code in (1, 2), done
            assert ("fvdfs abandon this one" if served_anew else "size has changed") in done.err
            assert done.err.count("\n") == 1
            assert target.status("vm")["move"] == "receiving"
            must("abandon", target.raw("vm"))
            assert move.source.status("vm")["move"] == "serving"

    if served_anew:
        with move.served():
            move.receive()
        resize()
        with move.served():
            activate()
    else:
        with move.served():
            move.receive()
            with move.source.raw("vm").open("r+b") as file:
                file.truncate(SIZE_OF_DISK + abs(change))
            activate()
    write_direct(move.source.raw("vm"), 0, 1)
