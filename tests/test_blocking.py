"""Images for programs in Python without an event loop: threads, Ctrl-C, what a program leaves that does not close."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

import fvdfs
from fvdfs.format.creation import CreateOptions
from support import reference
from support.builder import KIB, create
from support.mounts import fvdfs as command
from support.mounts import mounted, must

ROOT = Path(__file__).parent.parent
SIZE = 512 * KIB
BASE = random.Random(1).randbytes(SIZE // 2)
COW = CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "base.raw").write_bytes(BASE)
    create(tmp_path / "vm.fvd", SIZE, COW, base_length=len(BASE))
    return tmp_path / "vm.fvd"


def content(image: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(image))


def loops() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fvdfs"]


def python(script: str, *, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, cwd=cwd, timeout=60, check=False
    )


def test_every_call_is_there(image: Path) -> None:
    with fvdfs.open(image, write=True) as disk:
        assert (disk.path, disk.size, disk.writable, disk.closed) == (str(image), SIZE, True, False)
        assert disk.read(10, 20) == BASE[10:30]
        disk.write(0, bytearray(b"hello"))
        disk.zero(100, 50)
        disk.flush()
        made = disk.create_snapshot()
        disk.write(0, memoryview(b"later"))
        assert disk.snapshots() == [made]
        with disk.open_snapshot(made.name) as earlier:
            assert earlier.read(0, 5) == b"hello"
            assert not earlier.writable
        assert disk.map(0, 512) == [fvdfs.Extent(0, 512, "stored")]
        disk.delete_snapshot(made.name)
        assert disk.snapshots() == []
        assert disk.read(0, 5) == b"later"
        assert "writable" in repr(disk)
    assert disk.closed
    assert "closed" in repr(disk)
    disk.close()
    for call in (disk.flush, disk.snapshots, lambda: disk.open_snapshot("1")):
        with pytest.raises(ValueError, match="is closed"):
            call()
    assert content(image) == b"later" + BASE[5:100] + bytes(50) + BASE[150:] + bytes(SIZE - len(BASE))
    assert not loops()


def test_all_calls_are_those_of_aio() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(fvdfs.aio.Image) ^ public(fvdfs.Image) == {"of_snapshot", "path"}  # where it is no property


def test_threads_share_an_image(image: Path) -> None:
    model = bytearray(content(image))
    pieces = {at: random.Random(at).randbytes(3000) for at in range(0, SIZE - 4096, 4096)}
    with fvdfs.open(image, write=True) as disk, ThreadPoolExecutor(8) as pool:

        def work(at: int) -> bool:
            disk.write(at + 7, pieces[at])
            if at % 32768 == 0:
                disk.flush()
            return disk.read(at + 7, 3000) == pieces[at]

        assert all(pool.map(work, pieces))
    for at, data in pieces.items():
        model[at + 7 : at + 3007] = data
    assert content(image) == model


def test_a_thread_may_open_and_close(image: Path) -> None:
    def work() -> bytes:
        with fvdfs.open(image, write=True) as disk:
            disk.create_snapshot()
            return disk.read(0, 10)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == BASE[:10]


def test_it_serves_no_program_with_an_event_loop(image: Path) -> None:
    async def run() -> None:
        fvdfs.open(image)

    with pytest.raises(RuntimeError, match=r"await fvdfs\.aio\.open"):
        trio.run(run)
    assert not loops()


def test_an_error_of_opening_leaves_nothing(image: Path) -> None:
    with pytest.raises(fvdfs.UsageError, match="there is no such file"):
        fvdfs.open(image.parent / "nothing.fvd")
    assert not loops()


def test_errors_are_those_of_fvdfs() -> None:
    from fvdfs import errors

    kinds = {
        name for name, found in vars(errors).items() if isinstance(found, type) and found.__module__ == errors.__name__
    }
    named = {name for name in fvdfs.__all__ if isinstance(getattr(fvdfs, name), type)}
    assert kinds - named == {"NotPermittedHere"}, "which is an answer of a mount"
    assert set(fvdfs.__all__) <= set(dir(fvdfs))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(fvdfs, "no" + "thing")


def test_an_exception_closes(image: Path) -> None:
    script = "import fvdfs\nwith fvdfs.open('vm.fvd', write=True) as disk:\n    disk.write(0, b'kept')\n    1 / 0"
    done = python(script, cwd=image.parent)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    assert content(image)[:6] == b"kept" + BASE[4:6]
    assert '"clean": true' in must("info", "--json", image)


WAITING = """
import fvdfs, sys
with fvdfs.open('vm.fvd', write=True) as disk:
    disk.write(0, b'kept')
    print('ready', flush=True)
    while True:
        disk.read(0, 100000)
"""


def test_an_interrupt_closes(image: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=image.parent
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=60)
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert content(image)[:6] == b"kept" + BASE[4:6]
    assert '"clean": true' in must("info", "--json", image)


@pytest.mark.parametrize("end", ["", "del disk", "raise SystemExit"])
def test_a_program_that_does_not_close_ends(image: Path, end: str) -> None:
    script = f"import fvdfs\ndisk = fvdfs.open('vm.fvd', write=True)\ndisk.write(0, b'kept')\ndisk.flush()\n{end}"
    done = python(script, cwd=image.parent, options=("-W", "always"))
    assert done.returncode == 0
    if end.startswith("del"):
        assert "ResourceWarning" in done.stderr
    assert content(image)[:6] == b"kept" + BASE[4:6]


def test_what_nobody_refers_to_is_closed(image: Path) -> None:
    disk = fvdfs.open(image, write=True)
    (loop,) = loops()
    disk.write(0, b"kept")
    with pytest.warns(ResourceWarning, match=r"vm\.fvd: was not closed"):
        del disk
    loop.join(60)
    assert content(image)[:6] == b"kept" + BASE[4:6]


def test_a_forked_process_is_told(image: Path) -> None:
    with fvdfs.open(image) as disk:
        child = os.fork()
        if not child:
            signal.alarm(60)  # ends it, should it wait for a thread that it does not have
            try:
                disk.read(0, 1)
            except RuntimeError as error:
                os._exit(7 if "open it here again" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert disk.read(0, 10) == BASE[:10]


def test_a_loop_that_cannot_begin_says_why(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Callable[..., object]) -> None:
        raise OSError(24, "too many open files")

    monkeypatch.setattr("fvdfs.blocking.run_loop", fail)
    with pytest.raises(OSError, match="too many open files"):
        fvdfs.open(image)


def test_a_disk_of_a_mount_is_busy(image: Path) -> None:
    with mounted(image.parent) as mount, open(mount.raw("vm"), "r+b"):
        for path in (image, mount.raw("vm")):
            with pytest.raises(fvdfs.ImageBusy, match="use its raw file in the mount"):
                fvdfs.open(path, write=True)
    with fvdfs.open(image) as disk:
        assert disk.read(0, 10) == BASE[:10]
        refused = command("resize", image, "1M")
        assert refused.code == 1
        assert "by another mount or process" in refused.err


def test_a_base_of_another_format(tmp_path: Path) -> None:
    """It needs QEMU, which ends with the thread that started it."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "512K"], check=True)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x61 0 64k", tmp_path / "base.qcow2"],
        check=True,
        capture_output=True,
    )
    must("create", tmp_path / "vm.fvd", "512K", "--base", "base.qcow2", "--base-format", "qcow2")
    with ThreadPoolExecutor(1) as pool:
        disk = pool.submit(fvdfs.open, tmp_path / "vm.fvd", write=True).result()
    with disk:
        assert disk.read(65530, 10) == b"a" * 6 + bytes(4)
        disk.write(10, b"mine")
    assert content_of(tmp_path / "vm.fvd", 20) == b"a" * 10 + b"mine" + b"a" * 6


def content_of(image: Path, length: int) -> bytes:
    with fvdfs.open(image) as disk:
        return disk.read(0, length)


# ---- the package ----


def test_importing_the_package_imports_nothing(tmp_path: Path) -> None:
    script = "import sys; before = set(sys.modules); import fvdfs; print(*sorted(set(sys.modules) - before))"
    done = python(script, cwd=tmp_path)
    assert [name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names] == ["fvdfs"]
    assert "asyncio" not in done.stdout


USER = """
import fvdfs


def sizes(paths: list[str]) -> dict[str, int]:
    found = {}
    for path in paths:
        try:
            with fvdfs.open(path, allow_url=["nbd://host/"]) as disk:
                found[path] = sum(extent.stop - extent.start for extent in disk.map() if extent.state == "stored")
        except fvdfs.ImageBusy as error:
            print(error.image, error.reason)
    return found


def keep(disk: fvdfs.Image, data: memoryview) -> fvdfs.Snapshot:
    disk.write(0, data)
    return disk.create_snapshot("before")


async def first(path: str) -> bytes:
    async with await fvdfs.aio.open(path) as disk:
        extents: list[fvdfs.Extent] = await disk.map()
        print(extents)
        return await disk.read(0, 512)
"""
WRONG = {
    "fvdfs.open(5)": "arg-type",
    "fvdfs.open('x').read(0)": "call-arg",
    "fvdfs.open('x').write(0, 'text')": "arg-type",
    "fvdfs.nothing": "attr-defined",
    "print(fvdfs.open('x').snapshots()[0].nothing)": "attr-defined",
}


def test_the_package_is_typed(tmp_path: Path) -> None:
    """For a program of a user, by mypy --strict."""
    lines = [f"{line}\n" for line in WRONG]
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "wrong.py").write_text("import fvdfs\n\n" + "".join(lines))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--no-incremental",
            "--follow-imports=silent",
            "user.py",
            "wrong.py",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        check=False,
    )
    found = [line.rpartition("[")[2].rstrip("]") for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "error:" in line] == ["wrong.py"] * len(WRONG)
    assert found == [*WRONG.values()], done.stdout


def test_the_example_does_what_it_says(image: Path) -> None:
    (image.parent / "file").write_bytes(b"z" * 5000)
    before = content(image)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/python/patch.py", image, "1000", image.parent / "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "5000 bytes at 1000; " in done.stdout
    assert content(image) == before[:1000] + b"z" * 5000 + before[6000:]
    assert content(image.parent / "vm@1.fvd") == before
    refused = subprocess.run(
        [sys.executable, ROOT / "examples/python/patch.py", "nothing.fvd", "0", image],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (1, "patch: nothing.fvd: there is no such file\n")
