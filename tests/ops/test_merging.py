"""Layers of disks that programs have open are merged: what is read and written meanwhile, and what kills leave."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from fvdfs.errors import FvdError
from fvdfs.format.creation import CreateOptions
from fvdfs.image import loading
from fvdfs.layers import merging as layers_merging
from fvdfs.layers.newtop import replace
from fvdfs.ops import merging
from fvdfs.ops.control import control_prefetch
from fvdfs.ops.merging import Merge, Merges
from fvdfs.ops.moves import take_step
from fvdfs.ops.snapshots import make_snapshot
from fvdfs.store.host import PUNCH, fallocate
from fvdfs.store.placing import sync_folder
from support import reference
from support.builder import KIB, create
from support.kernel import Kernel
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted_disk, must, running, wait_until
from support.served import BASE, SIZE, Served
from support.steps import killed_before, recorded

LAYOUTS: dict[str, list[str]] = {
    "cow": ["8M", "--base", "base.raw", "--base-format", "raw", "--block-size", "8K", "--journal-size", "64K"],
    "compact cow": ["8M", "--base", "base.raw", "-F", "raw", "--compact", "--chunk-size", "64K", "--copy-on-read"],
    "no journal": ["8M", "--base", "base.raw", "--base-format", "raw", "--journal-size", "none"],
    "data file": ["8M", "--base", "base.raw", "--base-format", "raw", "--data-file", "auto"],
    "plain": ["8M"],
}
DISK = 8 * MIB
CONTENT = random.Random(2).randbytes(5 * MIB)


def disk(tmp_path: Path, layout: str, *options: str) -> contextlib.AbstractContextManager[Mount]:
    """A mount of a folder with vm.fvd."""
    return mounted_disk(tmp_path, CONTENT, LAYOUTS[layout], *options)


def content(path: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(path))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("vm*")}


class Writers:
    """Threads that write and discard, each its own blocks of 4 KiB; what the disk has to hold then."""

    def __init__(self, raw: Path) -> None:
        self.raw = raw
        self.file = os.open(raw, os.O_RDWR)
        self.model = bytearray(os.pread(self.file, DISK, 0))
        self._going_on = True
        self._threads = [threading.Thread(target=self._write, args=(number,)) for number in range(2)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._going_on = False
        for thread in self._threads:
            thread.join()
        assert os.pread(self.file, DISK, 0) == bytes(self.model)
        os.close(self.file)

    def _write(self, number: int) -> None:
        rng = random.Random(number)
        while self._going_on:
            at = (rng.randrange(DISK // 8192) * 2 + number) * 4096
            data = rng.randbytes(64) * 64
            if rng.random() < 0.2:
                data = bytes(4096)
                punch(self.file, at, len(data))
            else:
                os.pwrite(self.file, data, at)
            self.model[at : at + 4096] = data
            if rng.random() < 0.05:
                os.fsync(self.file)
                assert os.pread(self.file, 4096, at) == data


def punch(file: int, at: int, length: int) -> None:
    assert fallocate(file, PUNCH, at, length)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if "cow" in name else pytest.mark.slow) for name in LAYOUTS]
)
def test_writers_go_on(tmp_path: Path, layout: str) -> None:
    """Snapshots are deleted and images committed, from the top and from the middle; each state is as it was."""
    with disk(tmp_path, layout, "-o", "writeback=off") as mount:
        folder, raw = mount.folder, mount.raw("vm")
        states = {}
        with Writers(raw):
            for number in range(1, 7):
                must("snapshot", raw)
                time.sleep(0.05)
                if number > 1:
                    states[number] = content(folder / f"vm@{number}.fvd")
            must("delete", folder / "vm@3.fvd")
            must("delete", raw.with_name("vm@6.raw"))
            must("commit", folder / "vm@5.fvd")  # into 4
            must("commit", folder / "vm.fvd")  # into 5
            assert names(folder) - {"vm.fvd.data"} == {f"vm{name}.fvd" for name in ("", "@1", "@2", "@4", "@5")}
        assert "Traceback" not in mount.log
        last = raw.read_bytes()
        assert content(folder / "vm@2.fvd") == states[2]
        assert content(folder / "vm@4.fvd") == states[5]
        if "--copy-on-read" not in LAYOUTS[layout]:  # else whoever reads one keeps the others busy
            assert mount.raw("vm@4").read_bytes() == states[5]
        for name in ("vm@1", "vm@2", "vm@4", "vm@5"):
            with open(raw, "rb"):
                must("delete", folder / f"{name}.fvd")
        mount.remount()
        assert raw.read_bytes() == last
    assert names(folder) == {"vm.fvd"} | ({"vm.fvd.data"} if layout == "data file" else set())
    assert content(folder / "vm.fvd") == last
    must("check", folder / "vm.fvd")


def test_a_disk_that_grows_meanwhile(tmp_path: Path) -> None:
    with disk(tmp_path, "compact cow") as mount, open(mount.raw("vm"), "r+b", buffering=0) as file:
        for name in ("1", "2"):
            os.pwrite(file.fileno(), name.encode() * MIB, 0)
            must("snapshot", mount.raw("vm"), name)
            os.ftruncate(file.fileno(), DISK + int(name) * MIB)
            os.pwrite(file.fileno(), b"end", DISK + int(name) * MIB - 3)
        must("delete", f"{mount.folder / 'vm.fvd'}@2")
        must("commit", mount.folder / "vm.fvd")
        os.ftruncate(file.fileno(), DISK + 3 * MIB)
        must("commit", mount.folder / "vm.fvd")
        expected = (b"2" * MIB + CONTENT[MIB:]).ljust(DISK + 3 * MIB, b"\0")
        for at in (DISK + MIB, DISK + 2 * MIB):
            expected = expected[: at - 3] + b"end" + expected[at:]
        assert os.pread(file.fileno(), 2 * DISK, 0) == expected
    assert content(mount.folder / "vm.fvd") == content(mount.folder / "vm@1.fvd") == expected
    must("check", mount.folder / "vm.fvd")


def test_time_and_owner_stay(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount:
        raw = mount.raw("vm")
        for _ in range(2):
            raw.chmod(0o640)
            must("snapshot", raw)
        with open(raw, "r+b", buffering=0) as file:
            file.write(b"x" * 4096)
            os.utime(raw, ns=(0, 10**18))
            os.utime(mount.folder / "vm@2.fvd", ns=(0, 10**17))
            inode = raw.stat().st_ino
            for name in ("vm@1.fvd", "vm@2.fvd"):
                must("delete", mount.folder / name)
                assert (raw.stat().st_ino, raw.stat().st_mode & 0o777, raw.stat().st_mtime_ns) == (inode, 0o640, 10**18)
                if name == "vm@1.fvd":
                    assert (mount.folder / "vm@2.fvd").stat().st_mtime_ns == 10**17
    assert (mount.folder / "vm.fvd").stat().st_mtime_ns == 10**18


# --- what is refused ------------------------------------------------------------------------------


def refused(text: str, *words: str | Path, code: int = 2) -> None:
    done = fvdfs(*words)
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert text in done.err


def test_what_is_refused(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount, open(mount.raw("vm"), "r+b"):
        folder = mount.folder
        must("snapshot", mount.raw("vm"))
        must("snapshot", mount.raw("vm"))
        must("create", folder / "clone.fvd", "--base", "vm@1.fvd")
        refused("clone.fvd, vm@2.fvd stand on it", "delete", folder / "vm@1.fvd")
        refused("clone.fvd stands on", "commit", folder / "vm@2.fvd")
        refused("there is no such file", "delete", folder / "vm@7.fvd")
        refused("stands on no FVD image", "commit", folder / "vm@1.fvd")
        refused("close it there first", "revert", folder / "vm.fvd", code=1)
        with open(mount.raw("vm@2"), "rb"):
            refused("close it there first", "delete", mount.raw("vm@2"), code=1)
        assert names(folder) == {"vm.fvd", "vm@1.fvd", "vm@2.fvd"}
        must("delete", mount.raw("vm@2"))


def test_a_table_that_would_have_to_move(tmp_path: Path) -> None:
    """Then nothing has changed, and it is done when the disk is closed."""
    with disk(tmp_path, "compact cow") as mount:
        raw = mount.raw("vm")
        with open(raw, "r+b", buffering=0) as file:
            must("snapshot", raw)
            must("resize", raw, "512G")
            refused("close the disk, and call it again", "delete", mount.folder / "vm@1.fvd")
            os.pwrite(file.fileno(), b"end", (512 << 30) - 3)
        assert names(mount.folder) == {"vm.fvd", "vm@1.fvd"}
        wait_until(lambda: mount.status("vm")["state"] == "closed")
        must("delete", mount.folder / "vm@1.fvd")
        with open(raw, "rb") as reader:
            assert os.pread(reader.fileno(), 8, (512 << 30) - 3) == b"end"
    must("check", mount.folder / "vm.fvd")


def test_the_attribute_takes_no_other_words(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount:
        for words in (b"", b"delete", b"delete ../vm@1.fvd", b"remove vm@1.fvd", b"delete x", b"\xff x.fvd"):
            with pytest.raises(OSError, match="Invalid argument"):
                os.setxattr(mount.point, "user.fvdfs.layers", words)
        os.setxattr(mount.point, "user.fvdfs.layers", b"stop vm@1.fvd")
        assert json.loads(os.getxattr(mount.point, "user.fvdfs.layers")) == {"merges": []}


def test_a_closed_disk_is_changed_by_the_command(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount:
        for _ in range(2):
            must("snapshot", mount.raw("vm"))
        before = mount.raw("vm").read_bytes()
        must("delete", f"{mount.raw('vm')}@2")
        must("commit", mount.raw("vm"))
        assert mount.raw("vm").read_bytes() == before
        found = json.loads(os.getxattr(mount.point, "user.fvdfs.layers"))["merges"]
        assert [merge["state"] for merge in found] == ["closed", "closed"]


# --- what is interrupted ---------------------------------------------------------------------------

MANY, APART = 4000, 16 * KIB  # writes, and bytes between two: to merge them takes a second


@contextlib.contextmanager
def being_deleted(tmp_path: Path) -> Iterator[tuple[Mount, Path, subprocess.Popen[bytes]]]:
    """A disk, open by nobody but the deletion of its snapshot, which is under way; and the command."""
    with disk(tmp_path, "cow") as mount:
        raw = mount.raw("vm")
        with open(raw, "r+b", buffering=0) as file:
            os.truncate(raw, MANY * APART)
            must("snapshot", raw)
            for number in range(MANY):
                os.pwrite(file.fileno(), b"%07d\n" % number * 64, number * APART)
            with running(*FVDFS, "delete", mount.folder / "vm@1.fvd", stderr=subprocess.PIPE) as command:
                wait_until(lambda: not (mount.folder / "vm@1.fvd").exists())
                file.close()
                yield mount, raw, command


def look_at(image: Path) -> None:
    state = content(image)
    expected = bytearray(CONTENT.ljust(MANY * APART, b"\0"))
    for number in range(MANY):
        expected[number * APART : number * APART + 512] = b"%07d\n" % number * 64
    assert state == expected
    must("check", image)


@pytest.mark.parametrize("is_open", [True, False])
def test_ctrl_c_leaves_the_rest_for_the_next_time(tmp_path: Path, is_open: bool) -> None:
    with being_deleted(tmp_path) as (mount, raw, command), contextlib.ExitStack() as opened:
        if is_open:
            opened.enter_context(open(raw, "r+b"))
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
        assert names(mount.folder) == {"vm.fvd", "vm@1.fvd.deleted"}
        must("delete", mount.folder / "vm@1.fvd")
        assert names(mount.folder) == {"vm.fvd"}
    look_at(tmp_path / "images/vm.fvd")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_mount_ends_meanwhile(tmp_path: Path, number: signal.Signals) -> None:
    with being_deleted(tmp_path) as (mount, _, command):
        if number == signal.SIGKILL:
            mount.kill()
        else:
            mount.umount()
        assert command.wait(60) == 1
        assert command.stderr is not None
        assert command.stderr.read().count(b"\n") == 1
        mount.mount()
        assert names(mount.folder) == {"vm.fvd", "vm@1.fvd.deleted"}
        with open(mount.raw("vm"), "rb"):
            must("delete", mount.folder / "vm@1.fvd")
    look_at(tmp_path / "images/vm.fvd")


# --- steps ----------------------------------------------------------------------------------------


class Slow:
    """A call that waits in its thread until it may go on, before the true one."""

    def __init__(self, whole: Callable[..., Any]) -> None:
        self.whole = whole
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Any:
        self.begun.set()
        assert self.may_end.wait(60)
        return self.whole(*arguments)


async def change(served: Served, what: str, name: str) -> None:
    """`fvdfs delete` or `commit`, at once."""
    await Merges(served.filesystem.openings).do(Merge(what, str(served.folder / name)))


def test_flushes_wait_for_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, slow = Served(tmp_path, monkeypatch), Slow(sync_folder)

    async def work(kernel: Kernel, handle: int) -> None:
        await make_snapshot(served.filesystem.openings, served.entry, "")
        await kernel.write(handle, 0, b"w" * 4096)
        monkeypatch.setattr(merging, "sync_folder", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, served, "delete", "a@1.fvd")
            await trio.to_thread.run_sync(slow.begun.wait)
            await kernel.write(handle, 4096, b"x" * 4096)
            assert await kernel.read(handle, 0, 8192) == b"w" * 4096 + b"x" * 4096
            flush = kernel.send_fsync(handle)
            await trio.sleep(0.1)
            assert flush not in kernel.answered
            slow.may_end.set()
            await kernel.answer(flush)

    served.run(work)
    assert [path.name for path in tmp_path.glob("a*")] == ["a.fvd"]
    assert content(tmp_path / "a.fvd")[:8192] == b"w" * 4096 + b"x" * 4096


@pytest.mark.parametrize("what", ["delete", "commit"])
def test_what_is_written_after_it_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Up to the moment of the change, in which writers wait; reads that began before go on."""
    served, slow = Served(tmp_path, monkeypatch), Slow(replace)
    monkeypatch.setattr(merging, "replace", slow)
    copied, may_go_on = trio.Event(), trio.Event()
    whole = layers_merging.merge

    async def merge(*arguments: Any) -> None:
        await whole(*arguments)
        copied.set()
        await may_go_on.wait()

    monkeypatch.setattr(merging, "merge_all", merge)

    async def work(kernel: Kernel, handle: int) -> None:
        expected = bytearray(BASE.ljust(SIZE, b"\0"))
        await kernel.write(handle, 0, b"1" * 8192)
        await make_snapshot(served.filesystem.openings, served.entry, "")
        await kernel.write(handle, 4096, b"2" * 8192)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, served, what, "a@1.fvd" if what == "delete" else "a.fvd")
            await copied.wait()
            with pytest.raises(OSError, match="is being merged"):
                await make_snapshot(served.filesystem.openings, served.entry, "")
            with pytest.raises(OSError, match="is being merged"):
                await control_prefetch(served.filesystem.openings, served.entry, "start")
            with pytest.raises(OSError, match="is being merged"):
                await take_step(served.filesystem.openings, served.entry, "freeze")
            await kernel.write(handle, 100_000, b"3" * 5000)
            await kernel.fallocate(handle, PUNCH, 4096, 4096)
            may_go_on.set()
            await trio.to_thread.run_sync(slow.begun.wait)
            reads = [(at, kernel.send_read(handle, at, 64 * KIB)) for at in range(0, SIZE, 256 * KIB)]
            write = kernel.send_write(handle, 200_000, b"4" * 5000)
            await trio.sleep(0.05)
            assert write not in kernel.answered
            slow.may_end.set()
            await kernel.answer(write)
        expected[:12288] = b"1" * 4096 + bytes(4096) + b"2" * 4096
        expected[100_000:105_000] = b"3" * 5000
        for at, read in reads:
            assert await kernel.answer(read) == expected[at : at + 64 * KIB]
        expected[200_000:205_000] = b"4" * 5000
        for at in range(0, SIZE, 64 * KIB):
            assert await kernel.read(handle, at, 64 * KIB) == expected[at : at + 64 * KIB]
        assert served.entry.image is not None
        assert served.entry.image.dirty is None

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


@pytest.mark.parametrize("what", ["delete", "commit"])
def test_who_stands_on_it_is_looked_at_under_the_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Somebody makes a disk on the snapshot when it was looked at, and is not locked yet."""
    served, whole = Served(tmp_path, monkeypatch), loading.reopen

    async def reopen(*arguments: Any) -> None:
        options = CreateOptions(base_img="a@1.fvd", base_img_fmt="fvd", block_size=4096)
        create(tmp_path / "clone.fvd", SIZE, options, base_length=SIZE)
        await whole(*arguments)

    async def work(kernel: Kernel, handle: int) -> None:
        await make_snapshot(served.filesystem.openings, served.entry, "")
        await kernel.write(handle, 0, b"x" * 4096)
        monkeypatch.setattr(merging, "reopen", reopen)
        with pytest.raises(FvdError, match=r"has just changed|clone.fvd stands on"):
            await change(served, what, "a@1.fvd" if what == "delete" else "a.fvd")
        await kernel.write(handle, 4096, b"y" * 4096)

    served.run(work)
    assert content(tmp_path / "a.fvd")[:8192] == b"x" * 4096 + b"y" * 4096
    assert content(tmp_path / "clone.fvd") == content(tmp_path / "a@1.fvd") == BASE.ljust(SIZE, b"\0")


@pytest.mark.parametrize("what", ["delete", "commit"])
def test_a_failure_leaves_the_disk_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    served, whole = Served(tmp_path, monkeypatch), replace
    name = "a@1.fvd" if what == "delete" else "a.fvd"

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(kernel: Kernel, handle: int) -> None:
        await make_snapshot(served.filesystem.openings, served.entry, "")
        await kernel.write(handle, 0, b"x" * 4096)
        monkeypatch.setattr(merging, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            await change(served, what, name)
        await kernel.write(handle, 4096, b"y" * 4096)
        await kernel.fsync(handle)
        assert await kernel.read(handle, 0, 8192) == b"x" * 4096 + b"y" * 4096
        monkeypatch.setattr(merging, "replace", whole)
        await change(served, what, name)
        assert await kernel.read(handle, 0, 8192) == b"x" * 4096 + b"y" * 4096

    served.run(work)
    assert list(tmp_path.glob(".*")) == []
    assert content(tmp_path / "a.fvd")[:8192] == b"x" * 4096 + b"y" * 4096


# --- kills ----------------------------------------------------------------------------------------

KILLED = {
    "cow": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=4096, journal_size=64 * KIB),
    "compact": CreateOptions(compact=True, chunk_size=64 * KIB, journal_size=64 * KIB),
}
SAMPLES = 7
PLACES = {b"A": 4096, b"B": 300_001, b"C": 900_000, b"D": 1_500_000, b"E": 2_000_001}


@pytest.mark.parametrize(
    ("layout", "what", "where"),
    [
        ("cow", "delete", "top"),
        ("compact", "delete", "middle"),
        ("compact", "commit", "top"),
        ("cow", "commit", "middle"),
    ],
)
def test_a_kill_before_some_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, what: str, where: str
) -> None:
    """What was flushed is there, the other states are as they were, and the command ends what is left."""
    name = {"deletetop": "a@2.fvd", "deletemiddle": "a@1.fvd", "committop": "a.fvd", "commitmiddle": "a@2.fvd"}[
        what + where
    ]

    def work(folder: Path) -> None:
        served = Served(folder, monkeypatch)
        create(folder / "a.fvd", SIZE, KILLED[layout], base_length=len(BASE) if KILLED[layout].base_img else None)
        _write_and_merge(served, what, name)

    (tmp_path / "whole").mkdir()
    calls = recorded(functools.partial(work, tmp_path / "whole"))
    first = [number for number, call in enumerate(calls) if call.startswith("rename")][1]  # after two snapshots
    for step in sorted(random.Random(layout + what + where).sample(range(first + 2, len(calls)), SAMPLES)):
        folder = tmp_path / str(step)
        folder.mkdir()
        assert killed_before(step, functools.partial(work, folder))
        _look(folder, what, name)


def _write_and_merge(served: Served, what: str, name: str) -> None:
    progress = os.open(served.folder / "progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def work(kernel: Kernel, handle: int) -> None:
        async def write(letter: bytes) -> None:
            await kernel.write(handle, PLACES[letter], letter * 5000)
            await kernel.fsync(handle)
            os.write(progress, letter)

        for letter in (b"A", b"B"):
            await write(letter)
            await make_snapshot(served.filesystem.openings, served.entry, "")
        await write(b"C")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(change, served, what, name)
            await write(b"D")
        await write(b"E")

    served.run(work)


def _look(folder: Path, what: str, name: str) -> None:
    promised = (folder / "progress").read_bytes()
    state = content(folder / "a.fvd")
    _expect(state, promised)
    for number, letters in ((1, b"A"), (2, b"AB")):
        path = folder / f"a@{number}.fvd"
        if path.exists() and not (what == "commit" and name in ("a.fvd", "a@2.fvd")):
            _expect(content(path), letters)
            assert b"C" * 5000 not in content(path)
    for path in folder.glob("a*.fvd"):
        done = fvdfs("check", path)
        assert done.code in (0, 3), done.out
    if what == "commit" or (folder / name).exists() or (folder / f"{name}.deleted").exists():
        must(what, folder / name)
    assert content(folder / "a.fvd") == state
    if what == "delete":
        assert {path.name for path in folder.glob("a*")} == {"a.fvd", "a@1.fvd", "a@2.fvd"} - {name}


def _expect(state: bytes, letters: bytes) -> None:
    for letter in letters:
        place = PLACES[bytes([letter])]
        assert state[place : place + 5000] == bytes([letter]) * 5000
