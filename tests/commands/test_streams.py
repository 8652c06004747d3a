"""`fvdfs convert` from standard input, to standard output, and to what a server gives."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
from pathlib import Path

import pytest

from support.mounts import FVDFS, MIB, fvdfs, must, running, wait_until
from support.servers import nbd_server

CONTENT = random.Random(5).randbytes(MIB) + bytes(3 * MIB) + random.Random(6).randbytes(MIB + 512)


@pytest.fixture
def disk(folder: Path) -> Path:
    """vm.fvd, with this content."""
    (folder / "vm.raw").write_bytes(CONTENT)
    must("convert", folder / "vm.raw", folder / "vm.fvd")
    return folder / "vm.fvd"


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_to_a_pipe(disk: Path) -> None:
    done = subprocess.run([*FVDFS, "convert", disk, "-"], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (CONTENT, b"")


@pytest.mark.parametrize("before", [b"", b"before"])
@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_to_a_file(disk: Path, before: bytes, mode: str) -> None:
    """It gets holes, unless it is open to be appended to; what stands before in it stays."""
    target = disk.parent / "out"
    with open(target, mode, buffering=0) as file:
        file.write(before)
        subprocess.run([*FVDFS, "convert", disk, "-"], stdout=file, check=True)
        subprocess.run(["echo", "after"], stdout=file, check=True)
    assert target.read_bytes() == before + CONTENT + b"after\n"
    if mode == "wb":
        assert allocated(target) < 3 * MIB


@pytest.mark.parametrize("name", ["new.raw", "new.fvd", "new.qcow2"])
@pytest.mark.parametrize("through", ["pipe", "file"])
def test_from_standard_input(folder: Path, name: str, through: str) -> None:
    (folder / "vm.raw").write_bytes(CONTENT)
    if through == "pipe":
        subprocess.run([*FVDFS, "convert", "-", folder / name], input=CONTENT, check=True)
    else:
        with open(folder / "vm.raw", "rb") as file:
            subprocess.run([*FVDFS, "convert", "-", folder / name], stdin=file, check=True)
    formats = ["-f", "qcow2"] if name.endswith("qcow2") else []
    must("compare", *formats, folder / name, folder / "vm.raw")
    assert allocated(folder / name) < 3 * MIB
    assert sorted(os.listdir(folder)) == sorted([name, "vm.raw"])
    assert (folder / name).stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022)) or through == "file"


def test_through_both(folder: Path) -> None:
    done = subprocess.run([*FVDFS, "convert", "-", "-"], input=CONTENT, capture_output=True, check=True, cwd=folder)
    assert done.stdout == CONTENT
    assert os.listdir(folder) == []


def test_a_large_hole_takes_no_time(folder: Path) -> None:
    """Neither to write it nor to pass it by; to read it would take hours."""
    with open(folder / "large.raw", "wb") as file:
        file.truncate(4 << 40)
        file.seek(3 << 40)
        file.write(b"x" * 4096)
    must("convert", folder / "large.raw", folder / "large.fvd")
    with open(folder / "out", "wb") as out:
        subprocess.run([*FVDFS, "convert", folder / "large.fvd", "-"], stdout=out, check=True, timeout=60)
    assert (folder / "out").stat().st_size == 4 << 40
    assert allocated(folder / "out") < MIB


def test_an_interrupt_leaves_nothing(folder: Path) -> None:
    with running(*FVDFS, "convert", "-", folder / "new.fvd", stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(CONTENT)
        process.stdin.flush()
        wait_until(lambda: any("deleted" in os.readlink(f) for f in Path(f"/proc/{process.pid}/fd").iterdir()))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert os.listdir(folder) == []


def test_nobody_who_reads_is_one_line(disk: Path) -> None:
    with running(*FVDFS, "convert", disk, "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (1, b"fvdfs: standard output: Broken pipe\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-", "x.fvd", "-f", "qcow2"], "standard input is raw"),
        (["vm.fvd", "-", "-O", "qcow2"], "standard output gets a raw disk"),
        (["vm.fvd", "-", "--compact"], "options of FVD images do not go with the format raw"),
        (["vm.fvd", "-", "-c"], "--compress: is for new images"),
        (["vm.fvd", "nbd://127.0.0.1/x"], "--force"),
        (["vm.fvd", "nbd://127.0.0.1/x", "-O", "qcow2", "--force"], "is raw"),
        (["vm.fvd", "https://127.0.0.1/x", "--force"], "must be a file or a device of this host"),
    ],
)
def test_what_makes_no_sense(disk: Path, words: list[str], message: str) -> None:
    done = fvdfs("convert", *words, cwd=disk.parent)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_no_terminal(disk: Path) -> None:
    ours, theirs = pty.openpty()
    for words in (["-", "x.fvd"], ["vm.fvd", "-"]):
        command = [*FVDFS, "convert", *words]
        done = subprocess.run(
            command, cwd=disk.parent, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False
        )
        assert done.returncode == 2
        assert b"is a terminal" in done.stderr
    os.close(ours)
    os.close(theirs)


def test_to_a_server(disk: Path) -> None:
    """All of it is the disk then, whatever was there; of what is like it nothing is written."""
    export = disk.parent / "export.raw"
    export.write_bytes(random.Random(7).randbytes(len(CONTENT)))
    with nbd_server(export, disk.parent / "socket", read_only=False) as url:
        must("convert", "--force", disk, url)
        must("compare", disk, url)
    assert export.read_bytes() == CONTENT
    os.truncate(export, MIB)
    with nbd_server(export, disk.parent / "another", read_only=False) as url:
        done = fvdfs("convert", "--force", disk, url)
        assert (done.code, done.err) == (2, f"fvdfs: {url}: has {MIB} bytes, {len(CONTENT)} are needed\n")


# --- what else it takes -------------------------------------------------------------------------


def test_compressed(folder: Path) -> None:
    content = b"to be compressed. " * (MIB // 18) + bytes(MIB) + random.Random(8).randbytes(MIB)
    (folder / "vm.raw").write_bytes(content + bytes(-len(content) % 512))
    must("convert", folder / "vm.raw", folder / "vm.fvd")
    must("convert", "-c", folder / "vm.fvd", folder / "vm.qcow2")
    must("compare", folder / "vm.fvd", folder / "vm.qcow2", "-F", "qcow2")
    subprocess.run(["qemu-img", "check", folder / "vm.qcow2"], check=True, capture_output=True)
    assert allocated(folder / "vm.qcow2") < 1.6 * MIB
    assert sorted(os.listdir(folder)) == ["vm.fvd", "vm.qcow2", "vm.raw"]
    done = fvdfs("convert", "-c", folder / "vm.fvd", folder / "vm.qcow2")
    assert (done.code, "--force" in done.err) == (2, True)
    done = fvdfs("convert", "-c", folder / "vm.fvd", folder / "new.fvd")
    assert (done.code, "--compress" in done.err) == (2, True)


def test_with_a_profile(folder: Path) -> None:
    (folder / "base.raw").write_bytes(CONTENT)
    (folder / "profile").write_text("0 65536\n")
    must(
        "convert",
        folder / "base.raw",
        folder / "vm.fvd",
        "-b",
        "base.raw",
        "-F",
        "raw",
        "--profile",
        folder / "profile",
    )
    assert must("profile", "show", folder / "vm.fvd").splitlines()[-1] == "0 65536"
    done = fvdfs("convert", folder / "base.raw", folder / "b.fvd", "--profile", folder / "profile")
    assert (done.code, done.err) == (2, "fvdfs: --profile needs a base image: give --base\n")
