"""Snapshots of disks that programs have open, through a mount: what they read and write, and what kills leave."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import mmap
import os
import random
import threading
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import trio

from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import Header
from fvdfs.layers import newtop
from fvdfs.layers import snapshot as layers_snapshot
from fvdfs.ops import snapshots
from fvdfs.ops.snapshots import make_snapshot
from fvdfs.store.host import HostFile
from support import reference
from support.builder import KIB, create
from support.kernel import Kernel
from support.mounts import MIB, Mount, fvdfs, mounted, mounted_disk, must, needs_passthrough, wait_until
from support.served import BASE, CTX, ROOT, SIZE, Served
from support.steps import kills

LAYOUTS: dict[str, list[str]] = {
    "plain": ["4M"],
    "cow": ["4M", "--base", "base.raw", "--base-format", "raw", "--block-size", "8K", "--journal-size", "64K"],
    "compact": ["4M", "--compact", "--chunk-size", "64K", "--journal-size", "64K"],
    "compact cow": ["4M", "--base", "base.raw", "-F", "raw", "--compact", "--chunk-size", "64K", "--copy-on-read"],
    "no journal": ["4M", "--base", "base.raw", "--base-format", "raw", "--journal-size", "none"],
    "data file": ["4M", "--base", "base.raw", "--base-format", "raw", "--data-file", "auto"],
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
CONTENT = random.Random(2).randbytes(2 * MIB)


def disk(tmp_path: Path, layout: str, *options: str) -> contextlib.AbstractContextManager[Mount]:
    """A mount of a folder with vm.fvd."""
    return mounted_disk(tmp_path, CONTENT, LAYOUTS[layout], *options)


def content(path: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(path))


def write(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def header(path: Path) -> Header:
    return Header.decode(path.read_bytes()[:8192], str(path))


@pytest.mark.parametrize("writeback", ["on", "off"])
@layouts
def test_who_has_the_disk_open_goes_on(tmp_path: Path, layout: str, writeback: str) -> None:
    with disk(tmp_path, layout, "-o", f"writeback={writeback}") as mount:
        raw = mount.raw("vm")
        direct = mmap.mmap(-1, 8192)
        states = []
        with open(raw, "r+b", buffering=0) as file, open(raw, "rb", buffering=0) as reader:
            straight = os.open(raw, os.O_RDWR | os.O_DIRECT)
            for number in range(1, 4):
                os.pwrite(file.fileno(), b"%d" % number * 9000, number * 100_000)
                before = os.pread(reader.fileno(), 8 * MIB, 0)
                states.append(before)
                assert must("snapshot", raw).strip() == str(mount.folder / f"vm@{number}.fvd")
                assert os.pread(reader.fileno(), 8 * MIB, 0) == before
                assert raw.read_bytes() == before
                assert os.preadv(straight, [direct], 96 * KIB) == 8192
                assert direct[:] == before[96 * KIB : 104 * KIB]
                direct[:] = b"d" * 8192
                os.pwritev(straight, [direct], 512 * KIB + number * 8192)
                os.fsync(straight)
            os.ftruncate(file.fileno(), 5 * MIB)
            os.pwrite(file.fileno(), b"end", 5 * MIB - 3)
            last = os.pread(reader.fileno(), 8 * MIB, 0)
            assert len(last) == 5 * MIB
            os.close(straight)
        if "--copy-on-read" not in LAYOUTS[layout]:  # else whoever reads one keeps the others busy
            for number, state in enumerate(states, 1):
                assert mount.raw(f"vm@{number}").read_bytes() == state
        mount.remount()
        assert raw.read_bytes() == last
    for number, state in enumerate(states, 1):
        path = mount.folder / f"vm@{number}.fvd"
        assert header(path).clean
        assert content(path) == state
        must("check", path)
    assert content(mount.folder / "vm.fvd") == last
    must("check", mount.folder / "vm.fvd")
    assert [path.name for path in mount.folder.glob(".*")] == []


@layouts
def test_a_closed_disk(tmp_path: Path, layout: str) -> None:
    with disk(tmp_path, layout) as mount:
        raw = mount.raw("vm")
        write(raw, b"one" * 1000)
        before, mtime = raw.read_bytes(), raw.stat().st_mtime_ns
        must("snapshot", raw, "first")
        assert raw.read_bytes() == before
        assert raw.stat().st_mtime_ns == mtime
        assert mount.raw("vm@first").stat().st_mtime_ns == mtime
        write(raw, b"two")
        assert mount.raw("vm@first").read_bytes() == before
        assert json.loads(os.getxattr(raw, "user.fvdfs.status"))["snapshot"] == str(mount.folder / "vm@first.fvd")


def test_the_disk_keeps_its_inode_and_its_name(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount, open(mount.raw("vm"), "r+b", buffering=0) as file:
        inode = os.fstat(file.fileno()).st_ino
        must("snapshot", mount.raw("vm"))
        for _ in range(3):
            assert sorted(os.listdir(mount.point)) == ["vm.raw", "vm@1.raw"]
            assert mount.raw("vm").stat().st_ino == inode
        file.write(b"x" * 4096)
        with open(mount.raw("vm"), "rb") as again:
            assert again.read(10) == b"x" * 10


def test_the_snapshot_is_read_only_while_the_disk_is_open(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount, open(mount.raw("vm"), "r+b"):
        must("snapshot", mount.raw("vm"))
        with pytest.raises(OSError, match="busy") as caught:
            mount.raw("vm@1").open("r+b")
        assert caught.value.errno == errno.EBUSY
        must("info", mount.folder / "vm@1.fvd")
        must("check", mount.folder / "vm@1.fvd")  # nobody writes it any more
        assert fvdfs("check", "--repair", mount.folder / "vm.fvd").code == 1  # in use


def test_many_snapshots_under_writers(tmp_path: Path) -> None:
    """Each sector of a snapshot holds what was answered before it was asked for, or what came since."""
    sectors, rounds = 64, 12
    with disk(tmp_path, "compact cow", "-o", "writeback=off") as mount:
        raw = mount.raw("vm")
        done = [0] * sectors
        going_on = True

        def write(first: int) -> None:
            rng = random.Random(first)
            file = os.open(raw, os.O_RDWR)
            generation = 0
            while going_on:
                generation += 1
                number = rng.randrange(first, sectors, 2)
                os.pwrite(file, b"%011d\n" % generation * 342, number * 64 * KIB + 7 * 4096)
                done[number] = generation
                if rng.random() < 0.1:
                    os.fsync(file)
            os.close(file)

        writers = [threading.Thread(target=write, args=(first,)) for first in range(2)]
        for writer in writers:
            writer.start()
        bounds = []
        try:
            for _ in range(rounds):
                bounds.append(list(done))
                must("snapshot", raw)
        finally:
            going_on = False
            for writer in writers:
                writer.join()
        assert "Traceback" not in mount.log
    for number, before in enumerate(bounds, 1):
        state = content(mount.folder / f"vm@{number}.fvd")
        for sector in range(sectors):
            at = sector * 64 * KIB + 7 * 4096
            text = state[at : at + 11]
            generation = int(text) if text.isdigit() else 0
            assert before[sector] <= generation, (number, sector)
            if generation:
                assert state[at : at + 4104] == (b"%011d\n" % generation * 342)
    for number in range(1, rounds + 1):
        must("check", mount.folder / f"vm@{number}.fvd")
    must("check", mount.folder / "vm.fvd")


@needs_passthrough
def test_what_the_kernel_writes_by_itself_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    must("create", folder / "vm.fvd", "4M", "--data-file", "auto")
    with mounted(folder, "-o", "writeback=off") as mount:
        write(mount.raw("vm"), b"x" * 4 * MIB)
        with open(mount.raw("vm"), "r+b"):
            done = fvdfs("snapshot", mount.raw("vm"))
            assert done.code == 2
            assert f"close the disk, then: fvdfs snapshot {folder / 'vm.fvd'}" in done.err
        must("snapshot", folder / "vm.fvd")
        assert mount.raw("vm").read_bytes() == b"x" * 4 * MIB


def test_what_is_refused(tmp_path: Path) -> None:
    with disk(tmp_path, "cow") as mount:
        must("create", mount.folder / "clone.fvd", "--base", "vm.fvd")
        for words, code, text in (
            (["vm", "a/b"], 2, "is no name"),
            (["vm"], 2, "clone.fvd stands on it"),
        ):
            done = fvdfs("snapshot", mount.raw(words[0]), *words[1:])
            assert (done.code, done.err.count("\n")) == (code, 1)
            assert text in done.err
    with mounted(mount.folder, "--read-only") as mount:
        done = fvdfs("snapshot", mount.raw("clone"))
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "cannot be written" in done.err
    assert list(mount.folder.glob("*@*")) == []


def test_another_file_system_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "x.raw").touch()
    done = fvdfs("snapshot", tmp_path / "x.raw")
    assert done.code == 2
    assert "is not a raw file in a mount of fvdfs" in done.err


def test_the_snapshot_goes_on_copying_from_its_base(tmp_path: Path) -> None:
    """On read, and by prefetching. The new top copies nothing; another image on the snapshot finds what is there."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(CONTENT)
    base = ["--base", "base.raw", "--base-format", "raw", "--compact", "--copy-on-read", "--prefetch-delay", "1000"]
    must("create", folder / "vm.fvd", "4M", *base)
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as file:

        def cache() -> dict[str, Any]:
            found = json.loads(os.getxattr(mount.point, "user.fvdfs.status"))["caches"]
            return next(dict(entry) for entry in found if entry["name"] == "vm@1.fvd")

        file.read(64 * KIB)
        assert mount.status("vm")["state"] == "waiting"
        must("snapshot", mount.raw("vm"))
        assert mount.status("vm")["local_bytes"] == 0
        local = cache()["local_bytes"]
        assert cache()["state"] == "waiting"
        file.seek(MIB)
        assert file.read(128 * KIB) == CONTENT[MIB : MIB + 128 * KIB]
        wait_until(lambda: cache()["local_bytes"] >= local + 128 * KIB)
        must("create", folder / "other.fvd", "--base", "vm@1.fvd")
        assert mount.raw("other").read_bytes() == CONTENT.ljust(4 * MIB, b"\0")
        assert mount.status("vm")["local_bytes"] == 0
        must("snapshot", mount.raw("vm"))
        assert cache()["disks"] == 1
    for name in ("vm", "vm@1", "vm@2", "other"):
        must("check", folder / f"{name}.fvd")
        assert content(folder / f"{name}.fvd") == CONTENT.ljust(4 * MIB, b"\0")


def test_only_the_owner_makes_snapshots(tmp_path: Path) -> None:
    with disk(tmp_path, "cow", "--allow-other") as mount:
        mount.raw("vm").chmod(0o666)
        for uid, made in ((99, False), (0, True)):
            child = os.fork()
            if not child:
                os.setresuid(uid, uid, uid)
                try:
                    os.setxattr(mount.raw("vm"), "user.fvdfs.snapshot", b"")
                except PermissionError:
                    os._exit(1)
                os._exit(0)
            assert (os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0) is made


# --- steps ----------------------------------------------------------------------------------------


class Slow:
    """A call that waits in its thread until it may go on."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.begun.set()
        assert self.may_end.wait(60)


def test_flushes_wait_for_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, slow = Served(tmp_path, monkeypatch), Slow()
    monkeypatch.setattr(snapshots, "sync_folder", slow)

    async def work(kernel: Kernel, handle: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_snapshot, served.filesystem.openings, served.entry, "")
            await trio.to_thread.run_sync(slow.begun.wait)
            await kernel.write(handle, 0, b"x" * 4096)
            assert await kernel.read(handle, 0, 4096) == b"x" * 4096
            flush = kernel.send_fsync(handle)
            await trio.sleep(0.1)
            assert flush not in kernel.answered
            slow.may_end.set()
            await kernel.answer(flush)

    served.run(work)
    assert content(tmp_path / "a.fvd")[:4096] == b"x" * 4096
    assert content(tmp_path / "a@1.fvd")[:4096] == BASE[:4096]


def test_reads_and_writes_do_not_wait_for_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the files are made, before the moment of the change, nothing waits at all."""
    served, slow, whole = Served(tmp_path, monkeypatch), Slow(), layers_snapshot.add_name

    def add_name(*arguments: Any) -> None:
        slow()
        whole(*arguments)

    monkeypatch.setattr(layers_snapshot, "add_name", add_name)

    async def work(kernel: Kernel, handle: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_snapshot, served.filesystem.openings, served.entry, "")
            await trio.to_thread.run_sync(slow.begun.wait)
            await kernel.write(handle, 0, b"x" * 4096)
            assert await kernel.read(handle, 0, 4096) == b"x" * 4096
            await kernel.fsync(handle)
            slow.may_end.set()

    served.run(work)
    assert content(tmp_path / "a@1.fvd")[:4096] == b"x" * 4096


def test_what_comes_at_the_moment_of_the_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image has its new name, and still takes no writes: they wait. Whoever looks it up finds the same disk."""
    served, slow, whole = Served(tmp_path, monkeypatch), Slow(), newtop.replace

    def replace(*arguments: Any) -> None:
        whole(*arguments)
        slow()

    monkeypatch.setattr(snapshots, "replace", replace)

    async def work(kernel: Kernel, handle: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_snapshot, served.filesystem.openings, served.entry, "")
            await trio.to_thread.run_sync(slow.begun.wait)
            writes = [kernel.send_write(handle, at, b"x" * 4096) for at in (0, SIZE)]  # one of them grows the disk
            assert await kernel.read(handle, 0, 4096) == BASE[:4096]
            found = await served.filesystem.lookup(ROOT, pyfuse3.FileNameT(b"a.raw"), CTX)
            assert found.st_ino == served.inode
            assert not set(writes) & set(kernel.answers)
            slow.may_end.set()
            for write in writes:
                await kernel.answer(write)
        found = await served.filesystem.lookup(ROOT, pyfuse3.FileNameT(b"a.raw"), CTX)
        assert (found.st_ino, found.st_size) == (served.inode, SIZE + 4096)
        assert await kernel.read(handle, 0, 4096) == b"x" * 4096

    served.run(work)
    assert content(tmp_path / "a@1.fvd") == BASE.ljust(SIZE, b"\0")
    assert content(tmp_path / "a.fvd") == b"x" * 4096 + BASE[4096:].ljust(SIZE - 4096, b"\0") + b"x" * 4096


def test_reads_that_have_to_wait_find_each_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in the page cache; some reads begin before the snapshot, and end after it."""
    served = Served(tmp_path, monkeypatch)
    monkeypatch.setattr(HostFile, "pread_nowait", lambda *_: False)

    async def work(kernel: Kernel, handle: int) -> None:
        expected = bytearray(BASE.ljust(SIZE, b"\0"))
        for number in range(3):
            for at in (number * 8192, SIZE - 4096 * (number + 1)):
                expected[at : at + 4096] = b"%d" % number * 4096
                await kernel.write(handle, at, bytes(expected[at : at + 4096]))
            early = [(at, kernel.send_read(handle, at, 64 * KIB)) for at in range(0, SIZE, 256 * KIB)]
            await make_snapshot(served.filesystem.openings, served.entry, "")
            for at, read in early:
                assert await kernel.answer(read) == expected[at : at + 64 * KIB]
            for at in range(0, SIZE, 64 * KIB):
                assert await kernel.read(handle, at, 64 * KIB) == expected[at : at + 64 * KIB]
        assert await kernel.seek(handle, SIZE // 2, os.SEEK_DATA) == SIZE - 3 * 4096

    served.run(work, flags=os.O_RDWR | os.O_DIRECT)


@pytest.mark.parametrize("step", ["write_top", "add_name", "replace"])
def test_a_failure_leaves_the_disk_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    served = Served(tmp_path, monkeypatch)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layers_snapshot if step == "add_name" else snapshots, step, fail)

    async def work(kernel: Kernel, handle: int) -> None:
        await kernel.write(handle, 0, b"x" * 4096)
        with pytest.raises(OSError, match="No space left"):
            await make_snapshot(served.filesystem.openings, served.entry, "")
        assert "No space left" in served.entry.refused
        await kernel.write(handle, 4096, b"y" * 4096)
        await kernel.fsync(handle)

    served.run(work)
    assert sorted(os.listdir(tmp_path)) == ["a.fvd", "base.raw"]
    assert header(tmp_path / "a.fvd").base_img == "base.raw"
    assert content(tmp_path / "a.fvd")[:8192] == b"x" * 4096 + b"y" * 4096


def test_names_that_cannot_be_made_stable_end_all_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(tmp_path, monkeypatch)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(snapshots, "sync_folder", fail)

    async def work(kernel: Kernel, handle: int) -> None:
        with pytest.raises(OSError, match="Input/output error"):
            await make_snapshot(served.filesystem.openings, served.entry, "")
        with pytest.raises(OSError, match="Input/output error"):
            await kernel.fsync(handle)

    served.run(work)


# --- kills ----------------------------------------------------------------------------------------

KILLED = {
    "cow": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=4096, journal_size=64 * KIB),
    "compact": CreateOptions(compact=True, chunk_size=64 * KIB, journal_size=64 * KIB),
    "no journal": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=4096, journal_size=0),
}
PLACES = {b"A": 4096, b"B": 300_001, b"C": 900_000}


@pytest.mark.parametrize("layout", KILLED)
def test_a_kill_before_any_step(folder: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    served = Served(folder, monkeypatch)
    create(folder / "a.fvd", SIZE, KILLED[layout], base_length=len(BASE) if KILLED[layout].base_img else None)
    for _ in kills(folder, functools.partial(_write_and_snapshot, served), at_least=30):
        _look(folder, layout)


def _write_and_snapshot(served: Served) -> None:
    progress = os.open(served.folder / "progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def work(kernel: Kernel, handle: int) -> None:
        for letter, place in PLACES.items():
            await kernel.write(handle, place, letter * 5000)
            await kernel.fsync(handle)
            os.write(progress, letter)
            await make_snapshot(served.filesystem.openings, served.entry, "")

    served.run(work)


def _look(folder: Path, layout: str) -> None:
    promised = (folder / "progress").read_bytes() if (folder / "progress").exists() else b""
    top = folder / "a.fvd"
    names = sorted(path.name for path in folder.glob("a*.fvd"))
    for path in folder.glob("a*.fvd"):
        done = fvdfs("check", path)
        leaks = 3  # a crash leaves them, whatever was going on
        assert done.code in (0, leaks) or layout == "no journal", (names, done.out)
    _expect(content(top), promised)
    for number, letter in enumerate(PLACES, 1):
        path = folder / f"a@{number}.fvd"
        if path.exists() and not os.path.samefile(path, top):
            state = content(path)
            later = b"".join(PLACES)[number:]
            _expect(state, b"".join(PLACES)[:number])
            for other in later:
                assert bytes([other]) * 5000 not in state, (number, letter)


def _expect(state: bytes, letters: bytes) -> None:
    for letter in letters:
        place = PLACES[bytes([letter])]
        assert state[place : place + 5000] == bytes([letter]) * 5000
