"""Locks of files: fvdfs against QEMU, real programs on both sides, and the lock bytes themselves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.errors import ImageBusy
from fvdfs.image.chain import open_chain
from fvdfs.image.loading import load_chain, open_image
from fvdfs.image.policy import Policy
from fvdfs.store import filelock
from fvdfs.store.host import HostFile, open_path
from support.devices import loop_device
from support.mounts import MIB, fvdfs, mounted, must, wait_until

REFUSED_BY_US = "by QEMU, qemu-storage-daemon or another program with QEMU's image locks; close it there first"
OWN = f"{0x7FFF_4656_4400_0000}-{0x7FFF_4656_4400_0000}"
READS = {"100-100", "201-201", "203-203"}
WRITES = {"100-101", "103-103", "201-201", "203-203"}


def locks_of(path: Path) -> list[tuple[str, str]]:
    """Kind and bytes of each lock on a file."""
    status = os.stat(path)
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sorted((line[3], f"{line[6]}-{line[7]}") for line in lines if line[5] == where)


def is_kept_from_writers(path: Path) -> bool:
    """Whether QEMU, which opens an image's backing files one after the other, has come to this one."""
    ranges = [where.split("-") for _, where in locks_of(path)]
    return any(int(first) <= 201 <= int(last) for first, last in ranges if last.isdigit())


def qemu_io(path: Path, command: str = "write 0 512") -> str:
    """What QEMU complains of; empty where it did it."""
    words = ["-r"] if command.startswith("read") else []
    line = ["qemu-io", *words, "-f", "raw", "-c", command, str(path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else done.stderr + done.stdout


def qemu_may_have(path: Path) -> bool:
    """Whether QEMU can open it for writing."""
    return subprocess.run(["qemu-io", "-f", "raw", "-c", "read 0 512", path], capture_output=True).returncode == 0


def qcow2(path: Path, *words: str) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path], check=True)


@contextlib.contextmanager
def held_by_qemu(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """QEMU has a raw file open, for writing unless `-r`."""
    with subprocess.Popen(
        ["qemu-io", *words, "-f", "raw", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("read 0 512\n")
        program.stdin.flush()
        assert any("read 512/512" in line for line in program.stdout)
        yield program
        with contextlib.suppress(BrokenPipeError):
            program.stdin.close()


@contextlib.contextmanager
def virtual_machine(path: Path, file_format: str) -> Iterator[None]:
    """A machine that is about to start from an image."""
    drive = f"file={path},format={file_format},if=virtio"
    line = [
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-accel",
        "tcg",
        "-display",
        "none",
        "-nodefaults",
        "-S",
        "-drive",
        drive,
    ]
    program = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: program.poll() is not None or ("READ", "100-101") in locks_of(path))
        assert program.poll() is None, program.communicate()[1]
        yield
    finally:
        program.terminate()
        program.communicate()


def below(folder: Path, what: str) -> Path:
    """Make disk `a`, and say which file below it is meant."""
    (folder / "base.raw").write_bytes(bytes(MIB))
    if what == "data file":
        must("create", folder / "a.fvd", "1M", "--data-file", "data.raw")
        return folder / "data.raw"
    if what == "image":
        must("create", folder / "a.fvd", "1M")
        return folder / "a.fvd"
    if what == "base":
        must("create", folder / "a.fvd", "-b", "base.raw")
    elif what == "base of a base":
        must("create", folder / "middle.fvd", "-b", "base.raw")
        must("create", folder / "a.fvd", "-b", "middle.fvd", "-F", "fvd")
    elif what == "data file of a base":
        must("create", folder / "middle.fvd", "1M", "--data-file", "middle.raw")
        must("create", folder / "a.fvd", "-b", "middle.fvd", "-F", "fvd")
        return folder / "middle.raw"
    elif what == "raw base by QEMU":
        must("create", folder / "a.fvd", "-b", "file:base.raw", "-F", "raw")
    elif what == "backing file of a qcow2 base":
        qcow2(folder / "top.qcow2", "-b", f"{folder}/base.raw", "-F", "raw")
        must("create", folder / "a.fvd", "-b", "top.qcow2", "-F", "qcow2")
    else:
        assert what == "data file of a qcow2 base"
        subprocess.run(["truncate", "-s", "1M", folder / "qdata.raw"], check=True)
        qcow2(folder / "top.qcow2", "-o", f"size=1M,data_file={folder}/qdata.raw,data_file_raw=on")
        must("create", folder / "a.fvd", "-b", "top.qcow2", "-F", "qcow2")
        return folder / "qdata.raw"
    return folder / "base.raw"


BELOW = [
    "image",
    "base",
    "data file",
    "base of a base",
    "data file of a base",
    "raw base by QEMU",
    "backing file of a qcow2 base",
    "data file of a qcow2 base",
]


@pytest.mark.parametrize("what", BELOW)
def test_neither_writes_what_the_other_has_open(folder: Path, what: str) -> None:
    file = below(folder, what)
    with mounted(folder) as mount:
        for mode in ("rb", "r+b"):
            with open(mount.raw("a"), mode):
                assert '"write" lock' in qemu_io(file), mode
                assert what == "image" or qemu_io(file, "read 0 512") == ""
        wait_until(lambda: not locks_of(file))
        with held_by_qemu(file):
            for mode in ("rb", "r+b"):
                with pytest.raises(OSError) as refused:
                    open(mount.raw("a"), mode)
                assert refused.value.errno == errno.EBUSY
        assert f"{file}: open for writing {REFUSED_BY_US}" in mount.log
        with open(mount.raw("a"), "r+b") as raw:
            assert raw.write(b"now") == 3


def test_an_image_that_qemu_reads_is_not_written(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M", "--data-file", "data.raw")
    qcow2(folder / "top.qcow2", "-b", f"{folder}/data.raw", "-F", "raw")
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(mounted(folder))
        stack.enter_context(virtual_machine(folder / "top.qcow2", "qcow2"))
        wait_until(lambda: is_kept_from_writers(folder / "data.raw"))
        stack.enter_context(open(mount.raw("a"), "rb"))
        assert ("READ", OWN) in locks_of(folder / "data.raw")
        with pytest.raises(OSError) as refused:
            open(mount.raw("a"), "r+b")
        assert refused.value.errno == errno.EBUSY
        assert f"data.raw: in use {REFUSED_BY_US}" in mount.log
        assert ("WRITE", OWN) not in locks_of(folder / "a.fvd") + locks_of(folder / "data.raw")
    # (A lock of whoever failed would have stopped the next one.)
    with mounted(folder) as mount, open(mount.raw("a"), "r+b"):
        pass


def test_qemu_that_closes_just_now_is_waited_for(folder: Path) -> None:
    file = below(folder, "base")
    with mounted(folder) as mount, held_by_qemu(file) as program:
        assert program.stdin is not None
        for _ in range(5):  # on a busy machine it may take longer than an opening waits
            ending = threading.Timer(0.2, program.stdin.close)
            ending.start()
            with contextlib.suppress(OSError), open(mount.raw("a"), "rb"):
                break
            ending.join()
        else:
            pytest.fail(mount.log)


def test_many_read_one_base(folder: Path, tmp_path: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a", "b"):
        must("create", folder / f"{name}.fvd", "-b", "base.raw")
        must("create", other / f"{name}.fvd", "-b", str(folder / "base.raw"))
    qcow2(folder / "top.qcow2", "-b", f"{folder}/base.raw", "-F", "raw")
    with (
        virtual_machine(folder / "top.qcow2", "qcow2"),
        held_by_qemu(folder / "base.raw", "-r"),
        mounted(folder) as one,
        mounted(other, "-o", f"base_path={folder}") as two,
        open(one.raw("a"), "r+b"),
        open(one.raw("b"), "r+b"),
        open(two.raw("a"), "r+b"),
        open(two.raw("b"), "rb"),
    ):
        assert qemu_io(folder / "base.raw", "read 0 512") == ""
        assert '"write" lock' in qemu_io(folder / "base.raw")


def test_locks_are_left_out_where_the_user_says_so(folder: Path, tmp_path: Path) -> None:
    file = below(folder, "backing file of a qcow2 base")
    must("create", folder / "b.fvd", "-b", "base.raw")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("b.fvd", "base.raw"):
        os.symlink(folder / name, other / name)
    with (
        mounted(folder, "-o", "locking=off") as mount,
        mounted(other, "-o", f"base_path={folder},locking=off") as second,
        held_by_qemu(file),
        open(mount.raw("a"), "r+b"),
        open(mount.raw("b"), "r+b"),
    ):
        assert qemu_io(file) == ""
        with pytest.raises(OSError, match="busy"):
            open(second.raw("b"), "r+b")  # fvdfs's own locks are there
    assert fvdfs("mount", folder, mount.point, "-o", "locking=maybe").code == 2


def test_a_virtual_machine_on_a_disk_of_the_mount(folder: Path) -> None:
    file = below(folder, "base")
    with mounted(folder) as mount, virtual_machine(mount.raw("a"), "raw"):
        assert '"write" lock' in qemu_io(file)
        assert '"write" lock' in qemu_io(mount.raw("a"))


def test_a_device_that_qemu_has_open(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(32 * MIB))
    with loop_device(disk) as device:
        with held_by_qemu(device):
            done = fvdfs("create", device, "8M", "--journal-size", "1M")
            assert (done.code, done.err.count("\n")) == (1, 1)
            assert REFUSED_BY_US in done.err
        must("create", device, "8M", "--journal-size", "1M")
        os.symlink(device, folder / "a.fvd")
        with mounted(folder, "-o", f"base_path={device.parent}") as mount:
            with open(mount.raw("a"), "r+b"):
                assert "lock" in qemu_io(device)
            wait_until(lambda: qemu_may_have(device))  # the mount closes it a moment after the program
            with held_by_qemu(device), pytest.raises(OSError, match="busy"):
                open(mount.raw("a"), "rb")


@pytest.mark.parametrize(
    "words",
    [
        ["check", "a.fvd"],
        ["check", "a.fvd", "--repair"],
        ["map", "a.fvd"],
        ["convert", "-f", "fvd", "a.fvd", "new.raw"],
        ["create", "new.fvd", "-b", "base.raw", "--detect-holes", "64K"],
    ],
)
def test_commands_respect_what_qemu_writes(folder: Path, words: list[str]) -> None:
    file = below(folder, "base")
    words = [str(folder / word) if word.partition(".")[0] in ("a", "new") else word for word in words]
    with held_by_qemu(file):
        done = fvdfs(*words)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert f"base.raw: open for writing {REFUSED_BY_US}" in done.err
        assert not (folder / "new.fvd").exists()
    assert fvdfs(*words).code == 0


def test_commands_that_write_leave_alone_what_qemu_has_open(folder: Path) -> None:
    file = below(folder, "base")
    (folder / "new.fvd").write_bytes(b"somebody's" * 100)
    commands: list[tuple[str, list[str | Path]]] = [
        ("a.fvd", ["check", folder / "a.fvd", "--repair"]),
        ("a.fvd", ["profile", "record", folder / "a.fvd"]),
        ("new.fvd", ["create", folder / "new.fvd", "1M", "--force"]),
    ]
    for target, words in commands:
        before = (folder / target).read_bytes()
        with held_by_qemu(folder / target):
            done = fvdfs(*words)
        assert (done.code, done.err.count("\n")) == (1, 1), words
        assert f"{target}: in use {REFUSED_BY_US}" in done.err
        assert (folder / target).read_bytes() == before
    with held_by_qemu(file):
        assert "open for writing by QEMU" in must("info", folder / "a.fvd")


# --- the bytes ----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(bytes(4096))
    return found


@contextlib.contextmanager
def opened(path: Path, *, writable: bool = True) -> Iterator[HostFile]:
    file = open_path(str(path), writable=writable)
    try:
        yield file
    finally:
        file.close()


def test_the_bytes_that_are_locked(path: Path) -> None:
    with opened(path) as file, opened(path, writable=False) as other:
        for exclusive in (False, True, True, False, False, True):
            file.lock(exclusive)
            own = [("WRITE" if exclusive else "READ", OWN)]
            assert locks_of(path) == sorted([*own, *(("READ", at) for at in (WRITES if exclusive else READS))])
        with pytest.raises(ImageBusy, match="open for writing by another mount or process"):
            other.lock(False)
        file.lock(False)
        other.lock(False)
        with pytest.raises(ImageBusy, match="in use by another mount or process"):
            file.lock(True)
    assert locks_of(path) == []


@pytest.mark.parametrize(
    ("at", "reading", "writing"),
    [
        (100, True, True),
        (101, False, False),
        (102, True, True),
        (103, False, False),
        (200, False, False),
        (201, True, False),
        (202, True, True),
        (203, True, False),
    ],
)
def test_who_excludes_whom(path: Path, at: int, reading: bool, writing: bool) -> None:
    """As in QEMU: what is used must not be refused, and what is refused must not be used."""
    with opened(path) as file, open(path, "rb") as qemu:
        fcntl.fcntl(qemu, 37, filelock._LOCK.pack(fcntl.F_RDLCK, 0, at, 1, 0))
        for exclusive, may in ((False, reading), (True, writing)):
            before = locks_of(path)
            if may:
                file.lock(exclusive)
                continue
            with pytest.raises(ImageBusy, match="by QEMU"):
                file.lock(exclusive)
            assert locks_of(path) == before


def test_a_file_system_without_locks_is_one_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    with opened(path) as file, caplog.at_level(logging.WARNING):
        file.lock(False)
        assert len(caplog.records) == 1
        assert "has no locks" in caplog.text


def test_where_a_lock_would_forbid_writing_the_header_there_is_only_our_own(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "type_of_file_system", lambda fd: 0xFF534D42)
    with opened(path) as file:
        file.lock(True)
        assert locks_of(path) == [("WRITE", OWN)]


def test_the_type_of_a_file_system() -> None:
    with open("/proc/self/stat", "rb") as file:
        assert filelock.type_of_file_system(file.fileno()) == 0x9FA0
    assert filelock.type_of_file_system(-1) == 0


async def test_an_image_that_changes_while_it_is_opened(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    chain = open_chain(str(folder / "a.fvd"), Policy())
    image = await open_image(str(folder / "a.fvd"), Policy(), write=True)  # another mount has it, and closes it now
    await image.resize(2 * MIB)
    await image.close()
    with pytest.raises(ImageBusy, match="it was changed while it was opened"):
        await load_chain(chain)
