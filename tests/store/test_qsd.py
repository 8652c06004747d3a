"""Stores behind a real qemu-storage-daemon: every format, real servers, and daemons that are killed."""

from __future__ import annotations

import contextlib
import errno
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from fvdfs.errors import (
    FormatError,
    FvdError,
    ImageBusy,
    ImageError,
    Refused,
    UnstatedFormat,
    UnsupportedFeature,
    UsageError,
)
from fvdfs.store import qemu_daemon, qemu_files, qemu_supervisor
from fvdfs.store.base import Store, next_data
from fvdfs.store.host import HostFile
from fvdfs.store.qemu_daemon import StorageDaemon
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.qemu_supervisor import Supervisor
from support.mounts import running, wait_until
from support.namespaces import in_mount_namespace
from support.qsd import Inside, named, opened

MIB = 1 << 20
SIZE = 8 * MIB
TESTS = Path(__file__).parents[1]


async def refused(store: QemuStore, error: type[FvdError], why: str = "") -> str:
    """It cannot be opened; what it says."""
    try:
        with pytest.raises(error, match=why) as caught:
            await store.start()
        return str(caught.value)
    finally:
        await store.aclose()


async def content(store: Store, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(await store.size() - offset if length is None else length)
    count = await store.pread(memoryview(data), offset)
    return bytes(data[:count])


def qemu_img(*arguments: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def leftovers() -> list[str]:
    with open("/proc/self/mounts") as mounts:
        return [line for line in mounts if "/fvdfs-" in line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the images; nothing may be left when the test has ended."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    images = tmp_path / "images"
    images.mkdir()
    descriptors = set(os.listdir("/proc/self/fd"))
    yield images
    assert list(temporary.iterdir()) == []
    assert [line for line in leftovers() if str(temporary) in line] == []
    left = set(os.listdir("/proc/self/fd")) - descriptors
    names = []
    for fd in left:
        with contextlib.suppress(OSError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    assert [name for name in names if str(tmp_path) in name] == []


@pytest.fixture
def data(folder: Path) -> bytes:
    """What the images hold, random with holes; also as `data.raw`."""
    parts = [random.Random(n).randbytes(MIB) if n % 3 else bytes(MIB) for n in range(SIZE // MIB)]
    (folder / "data.raw").write_bytes(b"".join(parts))
    return b"".join(parts)


# ---- Formats ----


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("qcow2", ""),
        ("qcow2", "compat=0.10,cluster_size=4096"),
        ("qcow", ""),
        ("qed", ""),
        ("vmdk", ""),
        ("vmdk", "subformat=streamOptimized"),
        ("vdi", ""),
        ("vhdx", ""),
        ("vpc", "force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
        ("parallels", ""),
    ],
)
async def test_base_in_every_format(folder: Path, data: bytes, file_format: str, options: str) -> None:
    qemu_img("convert", "-O", file_format, *(["-o", options] if options else []), folder / "data.raw", folder / "image")
    before = (folder / "image").read_bytes()
    async with opened(folder, "image", file_format) as store:
        assert not store.writable
        assert not store.fixed_size
        assert await store.size() == SIZE
        assert await content(store) == data
        assert await content(store, SIZE - 10, 100) == data[-10:]
        assert store.usage() == (folder / "image").stat().st_blocks * 512
        status = (folder / "image").stat()
        assert store.identity == (status.st_dev, status.st_ino)
        if "fixed" not in options and file_format not in ("vhdx", "vpc", "parallels"):
            assert await next_data(store, 3 * MIB, 4 * MIB) == 4 * MIB
        assert await next_data(store, 3 * MIB, 4 * MIB + 1) <= 4 * MIB
        assert not store.pread_nowait(memoryview(bytearray(10)), 0)
    assert (folder / "image").read_bytes() == before


async def test_chain_of_backing_files(folder: Path, data: bytes) -> None:
    (folder / "lower").mkdir()
    (folder / "data.raw").rename(folder / "lower" / "data.raw")
    qemu_img("create", "-f", "qcow2", "-b", "data.raw", "-F", "raw", folder / "lower" / "middle")
    qemu_img("create", "-f", "qcow2", "-b", "lower/middle", "-F", "qcow2", folder / "top", f"{SIZE + MIB}")
    await trio.run_process(["qemu-io", "-c", "write -P 7 1M 64k", folder / "lower" / "middle"], capture_stdout=True)
    await trio.run_process(["qemu-io", "-c", "write -P 9 1088k 64k", folder / "top"], capture_stdout=True)
    expected = data[:MIB] + b"\7" * 65536 + b"\11" * 65536 + data[MIB + 131072 :] + bytes(MIB)
    async with opened(folder, "top", "qcow2") as store:
        assert await content(store) == expected
        await trio.to_thread.run_sync(store.lock, False)
    async with opened(folder, "top", "qcow2", writable=True) as store:
        assert store.writable
        await store.pwrite(b"new", 5)
        await store.flush()
        assert await content(store, 0, 10) == data[:5] + b"new" + data[8:10]
    assert (folder / "lower" / "data.raw").read_bytes() == data


async def test_external_data_file(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder}/ext.raw,data_file_raw=on", folder / "image", "4M")
    async with opened(folder, "image", "qcow2", writable=True) as store:
        before = store.usage()
        await store.pwrite(b"x" * MIB, MIB)
        await store.flush()
        assert store.usage() >= before + MIB
    assert (folder / "ext.raw").read_bytes()[MIB : 2 * MIB] == b"x" * MIB


async def test_writable_qcow2_against_a_model(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", str(SIZE))
    model = bytearray(SIZE)
    rng = random.Random(4)
    for _ in range(3):
        async with opened(folder, "disk", "qcow2", writable=True) as store:
            assert await content(store) == model

            async def change(store: QemuStore = store) -> None:
                for _ in range(40):
                    offset, length = rng.randrange(SIZE - 300_000), rng.randrange(1, 300_000)
                    kind = rng.randrange(4)
                    if kind == 0:
                        assert await content(store, offset, length) == model[offset : offset + length]
                    elif kind == 1:
                        model[offset : offset + length] = bytes(length)
                        await store.zero(offset, length)
                    elif kind == 2:
                        await store.flush()
                    else:
                        new = rng.randbytes(length)
                        model[offset : offset + length] = new
                        await store.pwrite(new, offset)

            await change()
            assert await content(store) == model
            await store.flush()
    assert "No errors" in qemu_img("check", folder / "disk")


async def test_calls_at_the_same_time(folder: Path) -> None:
    """Reads while others write: the daemon must not mix up its requests."""
    qemu_img("create", "-f", "qcow2", folder / "disk", str(SIZE))
    async with opened(folder, "disk", "qcow2", writable=True) as store:

        async def work(n: int) -> None:
            base = n * MIB
            for turn in range(20):
                block = bytes([n * 20 + turn]) * 100_000
                await store.pwrite(block, base)
                assert await content(store, base, len(block)) == block
                if turn % 7 == 0:
                    await store.flush()

        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(work, n)


@pytest.mark.parametrize("options", ["", "compat=0.10", "data_file=FOLDER/raw,data_file_raw=on"])
async def test_space_is_given_back(folder: Path, options: str) -> None:
    words = ["-o", options.replace("FOLDER", str(folder))] if options else []
    qemu_img("create", "-f", "qcow2", *words, folder / "disk", str(SIZE))
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        await store.pwrite(b"x" * 4 * MIB, 0)
        await store.flush()
        full = store.usage()
        await store.zero(MIB - 100, 2 * MIB + 200, writes=False)
        await store.flush()
        assert await next_data(store, MIB, 3 * MIB) == 3 * MIB
        assert store.usage() <= full - 2 * MIB + 64 * 1024  # a cluster of tables
        assert await content(store, 0, 4 * MIB) == b"x" * (MIB - 100) + bytes(2 * MIB + 200) + b"x" * (MIB - 100)


@pytest.mark.parametrize("file_format", ["qcow2", "vmdk", "vdi", "qed"])
async def test_zeros_take_no_space_where_nothing_is(folder: Path, file_format: str) -> None:
    qemu_img("create", "-f", file_format, folder / "disk", "1T" if file_format == "qcow2" else str(SIZE))
    async with opened(folder, "disk", file_format, writable=True) as store:
        await store.pwrite(b"x" * MIB, MIB)
        await store.flush()
        before = store.usage()
        size = await store.size()
        if file_format != "qcow2":
            with pytest.raises(OSError, match="gives no space of it back") as caught:
                await store.zero(0, size, writes=False)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert await content(store, MIB, MIB) == b"x" * MIB
        await store.zero(0, size)
        await store.flush()
        assert store.usage() <= before
        assert await content(store, 0, 4 * MIB) == bytes(4 * MIB)


async def test_growing(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        await store.pwrite(b"x" * 5000, 3 * MIB + 5)
        assert await store.size() == 3 * MIB + 5120  # whole sectors
        assert await content(store, MIB, 2 * MIB + 5) == bytes(2 * MIB + 5)
        await store.resize(5 * MIB + 1)
        assert await store.size() == 5 * MIB + 512
        await store.resize(MIB)
        assert await store.size() == MIB
        await store.zero(2 * MIB, 10)
        await store.flush()
    assert json.loads(qemu_img("info", "--output=json", folder / "disk"))["virtual-size"] == MIB


async def test_format_that_cannot_grow(folder: Path) -> None:
    qemu_img("create", "-f", "vdi", folder / "disk", "1M")
    async with opened(folder, "disk", "vdi", writable=True) as store:
        await store.pwrite(b"x", MIB - 1)
        for attempt in (store.pwrite(b"x", MIB), store.resize(2 * MIB)):
            with pytest.raises(OSError, match="ends at 1048576 bytes") as caught:
                await attempt
            assert caught.value.errno == errno.ENOSPC
        assert await content(store, MIB - 1) == b"x"


# ---- What is refused ----


@pytest.mark.parametrize("option", ["backing", "data"])
async def test_names_that_lead_out_are_seen_before_qemu_sees_them(folder: Path, tmp_path: Path, option: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(MIB))
    if option == "backing":
        qemu_img("create", "-f", "qcow2", "-b", "../secret", "-F", "raw", folder / "disk")
    else:
        qemu_img("create", "-f", "qcow2", "-o", f"data_file={secret}", folder / "disk", "1M")
    store = named(folder, "disk", "qcow2")
    await refused(store, Refused, f"leads to {secret}")


async def test_names_that_appear_after_the_look(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the image had been changed between our look at its header and QEMU's."""
    secret = tmp_path / "secret"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={secret}", folder / "disk", "1M")
    monkeypatch.setattr(qemu_files, "references", lambda *_: [])
    store = named(folder, "disk", "qcow2")
    await refused(store, Refused, f"QEMU open {secret}")


async def test_backing_file_that_appears_after_the_look(
    folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu_img("create", "-f", "qcow2", "-b", folder / "data.raw", "-F", "raw", folder / "disk")
    monkeypatch.setattr(qemu_files, "references", lambda *_: [])
    async with opened(folder, "disk", "qcow2") as store:
        assert await content(store) == bytes(SIZE)


def test_fifo_and_device_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="base_img=fifo: neither a regular file nor a block device"):
        named(folder, "fifo", "qcow2")
    with pytest.raises(Refused):
        named(folder, "zero", "qcow2")
    with pytest.raises(ImageError, match=r"base_img=.*nothing: No such file"):
        named(folder, "nothing", "qcow2")


def test_urls_are_judged(folder: Path) -> None:
    with pytest.raises(Refused, match="base_img=nbd://h/x"):
        named(folder, "nbd://h/x", "raw", "nbd://h/y")
    with pytest.raises(Refused, match="base_img=https://h/"):
        named(folder, 'json:{"driver":"raw","file":{"driver":"https","url":"https://h/"}}', "")
    with pytest.raises(UnsupportedFeature, match=r"image\.fvd: base_img=gopher://h/: gopher:// is not known"):
        named(folder, "gopher://h/", "raw")
    with pytest.raises(ImageError, match="it says vdi, and the image qcow2"):
        named(folder, 'json:{"driver":"vdi","file":{"driver":"file","filename":"x"}}', "qcow2")


async def test_loop_of_backing_files(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "a", "1M")
    qemu_img("create", "-f", "qcow2", "-b", "a", "-F", "qcow2", folder / "b")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", folder / "a")
    store = named(folder, "a", "qcow2")
    await refused(store, FormatError, "backing=a: the chain is a loop")


async def test_long_chain(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "0", "1M")
    for n in range(1, 40):
        qemu_img("create", "-f", "qcow2", "-u", "-b", str(n - 1), "-F", "qcow2", folder / str(n), "1M")
    store = named(folder, "39", "qcow2")
    await refused(store, FormatError, "more than 32 backing files")


async def test_other_format_than_stated(folder: Path) -> None:
    qemu_img("create", "-f", "vdi", folder / "disk", "1M")
    store = named(folder, "disk", "qcow2")
    await refused(store, FormatError, "this is no qcow2 image, it looks like vdi")


async def test_a_format_that_nobody_states_is_not_guessed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("create", "-f", "vdi", folder / "inner", "1M")
    qemu_img("create", "-f", "qcow", "-b", "inner", "-F", "vdi", folder / "disk", "1M")  # it notes no format
    await refused(named(folder, "disk", "qcow"), UnstatedFormat, "disk: backing=inner looks like vdi, but no format")
    for formats, first in ((("raw",), b"<<<"), (("raw", "vdi"), bytes(3)), (("vdi",), bytes(3))):
        monkeypatch.setattr(Inside, "base_formats", formats)
        async with opened(folder, "disk", "qcow") as store:
            assert (await content(store, 0, 3)) == first
    monkeypatch.setattr(Inside, "base_formats", ("qcow2",))
    await refused(named(folder, "disk", "qcow"), UnstatedFormat, "looks like vdi")


async def test_an_image_is_written_by_one_store(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    async with opened(folder, "disk", "qcow2", writable=True):
        await refused(named(folder, "disk", "qcow2"), ImageBusy, f"{folder}/disk: open for writing by another mount")


async def test_broken_image(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    header = bytearray((folder / "disk").read_bytes())
    header[40:48] = b"\xff" * 8  # where the L1 table is
    (folder / "disk").write_bytes(header)
    store = named(folder, "disk", "qcow2")
    assert "\n" not in await refused(store, ImageError, r"disk: QEMU cannot open it: [^/\n]*L1 table")


# ---- Missing programs ----


async def test_missing_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    store = named(folder, "disk", "qcow2")
    monkeypatch.setenv("PATH", "/nonexistent")
    await refused(store, UsageError, r"qemu-storage-daemon is needed .* apt install qemu-system-common")


async def test_missing_driver(folder: Path) -> None:
    """With no modules to load, as without the package that holds them."""
    inside = 'mount -t tmpfs none /usr/lib/*-linux-gnu*/qemu && exec "$@"'
    hide = ["sh", "-c", inside, "sh"]
    if (await trio.run_process(in_mount_namespace(*hide, "true"), capture_stderr=True, check=False)).returncode:
        pytest.skip("QEMU's modules cannot be hidden here")
    script = (
        "import sys, trio; sys.path[:0] = sys.argv[2:]; from pathlib import Path; from support.qsd import opened\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1]), 'ftp://h/x', 'raw', 'ftp://h'): pass\n"
        "trio.run(main)"
    )
    command = in_mount_namespace(*hide, sys.executable, "-c", script, folder, TESTS)
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert "UsageError: ftp://h/x: QEMU lacks the driver for this: apt install qemu-block-extra" in done.stderr.decode()


# ---- Servers ----


@contextlib.contextmanager
def nbdkit(*arguments: str | Path) -> Iterator[None]:
    with running("nbdkit", "--foreground", "--exit-with-parent", *arguments):
        yield


async def reachable(family: socket.AddressFamily, address: str | tuple[str, int]) -> None:
    with trio.fail_after(60):
        while True:
            with socket.socket(family) as client:
                if client.connect_ex(address) == 0:
                    return
            await trio.sleep(0.01)


@contextlib.asynccontextmanager
async def nbd_server(where: Path | int, *arguments: str | Path) -> AsyncIterator[None]:
    """nbdkit on a socket, or on a port of this machine, once it answers."""
    if isinstance(where, int):
        with nbdkit("--port", str(where), "--ip-addr", "127.0.0.1", *arguments):
            await reachable(socket.AF_INET, ("127.0.0.1", where))
            yield
    else:
        with nbdkit("--unix", where, *arguments):
            await reachable(socket.AF_UNIX, str(where))
            yield


@pytest.mark.parametrize("kind", ["tcp", "unix", "json"])
async def test_base_on_an_nbd_server(folder: Path, data: bytes, free_port: int, kind: str) -> None:
    path = folder / "socket"
    server = {"type": "unix", "path": str(path)}
    names = {
        "tcp": f"nbd://127.0.0.1:{free_port}/any",
        "unix": f"nbd+unix:///any?socket={path}",
        "json": "json:" + json.dumps({"driver": "raw", "file": {"driver": "nbd", "server": server}}),
    }
    async with (
        nbd_server(free_port if kind == "tcp" else path, "--readonly", "file", folder / "data.raw"),
        opened(folder, names[kind], "raw", f"nbd://127.0.0.1:{free_port}", "nbd+unix:///") as store,
    ):
        assert await store.size() == SIZE
        assert await content(store) == data
        assert store.fixed_size
        assert store.usage() == 0
        assert await next_data(store, 0, MIB) == 0  # a device's holes may hold anything
        assert isinstance(store.identity, str)
        store.lock(False)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_backing_file_on_an_nbd_server(folder: Path, data: bytes, free_port: int, kind: str) -> None:
    """Of a local image; where it is stands in that image's header."""
    path = folder / "socket"
    url = f"nbd://127.0.0.1:{free_port}" if kind == "tcp" else f"nbd+unix:///?socket={path}"
    async with nbd_server(free_port if kind == "tcp" else path, "--readonly", "file", folder / "data.raw"):
        qemu_img("create", "-f", "qcow2", "-b", url, "-F", "raw", folder / "middle")
        qemu_img("create", "-f", "qcow2", "-b", "middle", "-F", "qcow2", folder / "disk")
        async with opened(folder, "disk", "qcow2", url, writable=True) as store:
            await store.pwrite(b"new", 1000)
            assert await content(store) == data[:1000] + b"new" + data[1003:]


async def test_data_on_an_nbd_server_that_is_away_for_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "socket"
    arguments = ["--unix", str(path), "file", str(folder / "disk")]
    (folder / "disk").write_bytes(bytes(MIB))
    with contextlib.ExitStack() as first:
        first.enter_context(nbdkit(*arguments))
        await reachable(socket.AF_UNIX, str(path))
        async with opened(folder, f"nbd+unix:///?socket={path}", "raw", "nbd+unix:///", writable=True) as store:
            await store.pwrite(b"one", 1000)
            await store.zero(1001, 1)
            await store.flush()
            with pytest.raises(OSError, match="cannot extend it") as caught:
                await store.pwrite(b"xy", MIB - 1)
            assert caught.value.errno == errno.ENOSPC
            await store.resize(MIB // 2)
            assert await store.size() == MIB
            first.close()
            path.unlink()
            with contextlib.ExitStack() as second:

                async def come_back() -> None:
                    await trio.sleep(0.5)
                    second.enter_context(nbdkit(*arguments))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(come_back)
                    assert await content(store, 999, 5) == b"\0o\0e\0"
                await store.flush()
                await store.pwrite(b"two", 5000)
                second.close()
                path.unlink()
                second.enter_context(nbdkit(*arguments))
                await reachable(socket.AF_UNIX, str(path))  # QEMU finds it by itself
                with pytest.raises(OSError, match="may be lost"):  # by the server
                    await store.flush()
                await store.pwrite(b"two", 5000)
                await store.flush()
                second.close()
                monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.3)
                with pytest.raises(OSError, match="its server is away") as caught:
                    await content(store, MIB // 2, 5)
                assert caught.value.errno == errno.EIO
    assert (folder / "disk").read_bytes()[5000:5003] == b"two"


async def test_what_a_server_may_have_lost_is_told_though_it_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may have found it by then, and it takes a flush of what it knows nothing of."""
    path = folder / "socket"
    (folder / "disk").write_bytes(bytes(MIB))

    async def flush_well(daemon: StorageDaemon) -> bool:
        return True

    monkeypatch.setattr(Supervisor, "_flush_last", staticmethod(flush_well))
    async with contextlib.AsyncExitStack() as first:
        await first.enter_async_context(nbd_server(path, "file", folder / "disk"))
        async with opened(folder, f"nbd+unix:///?socket={path}", "raw", "nbd+unix:///", writable=True) as store:
            await store.pwrite(b"lost", 1000)
            await first.aclose()
            path.unlink()
            async with nbd_server(path, "file", folder / "disk"):
                await content(store, MIB // 2, 10)
                with pytest.raises(OSError, match="may be lost"):
                    await store.flush()
                await store.flush()


async def test_a_flush_of_a_local_file_that_failed_is_told_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its base is on a server, which may be what failed, and though the next flush ends well."""
    path = folder / "socket"
    (folder / "base").write_bytes(bytes(MIB))
    url = f"nbd+unix:///?socket={path}"
    async with nbd_server(path, "--readonly", "file", folder / "base"):
        qemu_img("create", "-f", "qcow2", "-b", url, "-F", "raw", folder / "disk")
        async with opened(folder, "disk", "qcow2", "nbd+unix:///", writable=True) as store:
            await store.pwrite(b"lost", 1000)
            monkeypatch.setattr(StorageDaemon, "is_connected", False)
            flush = HostFile.flush

            async def fail_once(file: HostFile) -> None:
                monkeypatch.setattr(HostFile, "flush", flush)
                raise OSError(errno.EIO, "the disk has lost a page")

            monkeypatch.setattr(HostFile, "flush", fail_once)
            with pytest.raises(OSError, match="may be lost"):
                await store.flush()
            await store.flush()


async def test_nbd_server_that_is_not_there(folder: Path, free_port: int) -> None:
    store = named(folder, f"nbd://127.0.0.1:{free_port}", "raw", "nbd://")
    await refused(store, FvdError, "refused")


async def test_server_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_daemon, "START_TIMEOUT", 0.5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        name = f"nbd+unix:///?socket={folder}/socket"
        store = named(folder, name, "raw", "nbd+unix:///")
        await refused(store, ImageError, "no answer within")
        store = named(folder, name, "raw", "nbd+unix:///")
        with trio.move_on_after(0.2) as scope:
            await store.start()
        assert scope.cancelled_caught
        await store.aclose()


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A server of files that knows ranges, which QEMU needs."""

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        file = Path(self.directory) / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        body = file.read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), int(match[2] or len(body) - 1) + 1) if match else (0, len(body))
        self.send_response(206 if match else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(min(stop, len(body)) - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{min(stop, len(body)) - 1}/{len(body)}")
        self.end_headers()
        if with_body:
            self.wfile.write(body[start:stop])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    class Handler(RangeHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


async def test_base_on_the_web(folder: Path, data: bytes, web: str) -> None:
    async with opened(folder, f"{web}/data.raw", "raw", web) as store:
        assert await content(store) == data
    store = named(folder, f"{web}/nothing", "raw", web)
    await refused(store, ImageError, r"/nothing: the server has no such file \(404\)")


async def test_qcow2_on_the_web_with_what_it_refers_to(folder: Path, data: bytes, web: str) -> None:
    qemu_img("create", "-f", "qcow2", "-b", "data.raw", "-F", "raw", folder / "good")
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", folder / "bad", "1M")
    async with opened(folder, f"{web}/good", "qcow2", web) as store:
        assert await content(store) == data
    for prefix, name, reason in [
        (web, "bad", "leads to /etc/shadow"),
        (f"{web}/good", "good", "backing=http.*data.raw is not allowed"),
    ]:
        other = named(folder, f"{web}/{name}", "qcow2", prefix)
        await refused(other, Refused, reason)


# ---- Daemons that die ----


async def test_killed_under_reads(folder: Path, data: bytes) -> None:
    qemu_img("convert", "-O", "qcow2", folder / "data.raw", folder / "disk")
    async with opened(folder, "disk", "qcow2") as store:
        stop = False
        reads = [0] * 6

        async def read(seed: int) -> None:
            rng = random.Random(seed)
            while not stop:
                offset = rng.randrange(SIZE - 200_000)
                assert await content(store, offset, 200_000) == data[offset : offset + 200_000]
                reads[seed] += 1

        async with trio.open_nursery() as nursery:
            for seed in range(6):
                nursery.start_soon(read, seed)
            for _ in range(4):
                pid = store.pid
                os.kill(pid, signal.SIGKILL)
                with trio.fail_after(60):
                    while store.pid == pid:
                        await content(store, 0, 10)
                    at_least = [n + 2 for n in reads]  # so that each has begun a read on the new one
                    while any(n < least for n, least in zip(reads, at_least, strict=True)):
                        await content(store, 0, 10)
                assert gone(pid)
            stop = True
        last = store.pid
        await store.flush()  # nothing was written, so nothing was lost
    assert gone(last)


async def test_killed_with_unflushed_writes(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", str(SIZE))
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        await store.pwrite(b"stable", 0)
        await store.flush()
        os.kill(store.pid, signal.SIGKILL)
        await store.flush()
        for change in (store.pwrite(b"lost", MIB), store.zero(0, 100), store.resize(2 * SIZE)):
            await store.pwrite(b"stable", 0)
            await store.flush()
            await change
            os.kill(store.pid, signal.SIGKILL)
            results: list[int] = []

            async def flush(results: list[int] = results) -> None:
                try:
                    await store.flush()
                    results.append(0)
                except OSError as error:
                    results.append(error.errno or -1)

            async with trio.open_nursery() as nursery:  # all who wait are told
                nursery.start_soon(flush)
                nursery.start_soon(flush)
            assert results == [errno.EIO] * 2
            await store.flush()
        await store.pwrite(b"again", MIB)  # a write that finds it dead is done again, and told apart
        os.kill(store.pid, signal.SIGKILL)
        await store.pwrite(b"again", MIB)
        with pytest.raises(OSError, match="may be lost"):
            await store.flush()
        await store.pwrite(b"again", MIB)
        await store.flush()
        assert await content(store, MIB, 5) == b"again"
    assert "Leaked" not in qemu_img("check", "-r", "all", folder / "disk").rpartition("repaired")[2]
    async with opened(folder, "disk", "qcow2") as store:
        assert await content(store, MIB, 5) == b"again"


async def test_restart_that_fails(folder: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("convert", "-O", "qcow2", folder / "data.raw", folder / "disk")
    async with opened(folder, "disk", "qcow2") as store:
        path = os.environ["PATH"]
        starts = 0
        start = StorageDaemon.start

        async def count(self: StorageDaemon, options: Sequence[dict[str, object]], *, writable: bool) -> None:
            nonlocal starts
            starts += 1
            await start(self, options, writable=writable)

        monkeypatch.setattr(StorageDaemon, "start", count)
        monkeypatch.setenv("PATH", "/nonexistent")
        os.kill(store.pid, signal.SIGKILL)

        async def read() -> None:
            with pytest.raises(OSError, match=r"cannot be started again.*apt install") as caught:
                await content(store, 0, 10)
            assert caught.value.errno == errno.EIO

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(read)
        assert starts == 1
        await read()
        monkeypatch.setenv("PATH", path)
        assert await content(store) == data
    with pytest.raises(OSError) as caught:
        await store.flush()
    assert caught.value.errno == errno.EBADF


async def test_hung_daemon_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu_daemon, "STOP_TIMEOUT", 0.3)
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        os.kill(store.pid, signal.SIGSTOP)
        pid = store.pid
    assert gone(pid)


async def test_cancelled_reader_of_a_dead_daemon(folder: Path, data: bytes) -> None:
    qemu_img("convert", "-O", "qcow2", folder / "data.raw", folder / "disk")
    async with opened(folder, "disk", "qcow2") as store:
        for delay in (0.0, 0.002, 0.01, 0.02):
            os.kill(store.pid, signal.SIGKILL)
            with trio.move_on_after(delay):
                await content(store, 0, 10)
            assert await content(store, 0, 10) == data[:10]


def test_daemon_ends_with_its_parent(folder: Path, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    script = (
        "import sys, trio, tempfile; sys.path[:0] = [sys.argv[2]]; from pathlib import Path\n"
        "from support.qsd import opened\n"
        "tempfile.tempdir = sys.argv[3]\n"
        "async def main():\n"
        "    async with opened(Path(sys.argv[1]), 'disk', 'qcow2', writable=True) as store:\n"
        "        await store.pwrite(b'x' * 100000, 0)\n"
        "        print(store.pid, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)"
    )
    arguments = [str(folder), str(TESTS), str(tmp_path / "tmp")]
    with subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        parent.wait()
        wait_until(lambda: gone(pid))
    wait_until(lambda: subprocess.run(["qemu-img", "check", folder / "disk"], capture_output=True).returncode == 0)


async def test_nothing_is_unlocked_while_a_daemon_lives(folder: Path) -> None:
    qemu_img("create", "-f", "qcow2", folder / "disk", "1M")
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        for file in store.host_files:
            file.close()  # as when this process dies
        await refused(named(folder, "disk", "qcow2"), ImageBusy, "by another mount")
        await store.pwrite(b"x", 0)


async def test_locks(folder: Path, data: bytes) -> None:
    qemu_img("create", "-f", "qcow2", "-b", "data.raw", "-F", "raw", folder / "disk")
    async with opened(folder, "disk", "qcow2", writable=True) as store:
        store.claim_device()
        await refused(named(folder, "disk", "qcow2"), ImageBusy, "by another mount")
        async with opened(folder, "data.raw", "raw"):
            pass
        await refused(named(folder, "data.raw", "raw", writable=True), ImageBusy, "in use by another mount")


async def test_what_a_killed_process_left_is_removed_later(folder: Path, data: bytes) -> None:
    """Only the folders that it had made, and no new ones: a daemon may be starting there."""
    temporary = folder.parent / "tmp"
    old = time.time() - 3600
    for name, files in (("abandoned", "disk pid"), ("begun", "disk"), ("new", "disk"), ("ours", "disk x")):
        (temporary / f"fvdfs-{name}").mkdir()
        for file in files.split():
            (temporary / f"fvdfs-{name}" / file).touch()
        if name != "new":
            os.utime(temporary / f"fvdfs-{name}", (old, old))
    (temporary / "fvdfs-link").symlink_to(folder)
    qemu_img("convert", "-O", "qcow2", folder / "data.raw", folder / "image")
    async with opened(folder, "image", "qcow2"):
        assert sorted(os.listdir(temporary)) == ["fvdfs-link", "fvdfs-new", "fvdfs-ours"]
    shutil.rmtree(temporary)
    temporary.mkdir()
