"""Nothing that a user or a disk can do to a command ends in a traceback: one line, and an exit code."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fvdfs import mounts
from fvdfs.cli import main
from fvdfs.errors import ImageError, leading
from support.devices import small_disk
from support.mounts import FVDFS, MIB, fvdfs, mounted, must

CONTENT = bytes(range(256)) * 1024
CALLS = [
    "chmod",
    "fchmod",
    "fchown",
    "fdatasync",
    "fstat",
    "fsync",
    "ftruncate",
    "getxattr",
    "listdir",
    "lseek",
    "lstat",
]
CALLS += ["open", "preadv", "pwrite", "read", "readlink", "rename", "setxattr", "stat", "unlink", "write"]
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)  # by turns


@pytest.fixture
def images(folder: Path) -> Path:
    (folder / "base.raw").write_bytes(CONTENT)
    (folder / "t.raw").write_bytes(CONTENT)
    must("create", folder / "low.fvd", "-b", "base.raw", "--data-file", "data", "--journal-size", "64K")
    must(
        "create",
        folder / "a.fvd",
        "-b",
        "low.fvd",
        "-F",
        "fvd",
        "--compact",
        "--chunk-size",
        "64K",
        "--grow-unit",
        "64K",
        "--journal-size",
        "64K",
    )
    (folder / "profile").write_text("0 4096\n")
    return folder


COMMANDS: dict[str, list[str]] = {
    "create": ["create", "new.fvd", "-b", "low.fvd", "-F", "fvd", "--profile", "profile"],
    "create over": ["create", "low.fvd", "1M", "--data-file", "data", "--force", "--compact"],
    "clone": ["clone", "low.fvd", "new", "-n", "2"],
    "create holes": ["create", "new.fvd", "-b", "base.raw", "--detect-holes", "64K", "--data-file", "new"],
    "info": ["info", "a.fvd"],
    "info json": ["info", "a.fvd", "--json"],
    "map": ["map", "a.fvd"],
    "map json": ["map", "a.fvd", "--json"],
    "map png": ["map", "a.fvd", "--png", "map.png"],
    "map html": ["map", "a.fvd", "--html", "map.html"],
    "check": ["check", "a.fvd"],
    "check repair": ["check", "broken.fvd", "--repair"],
    "amend": ["amend", "a.fvd", "-F", "fvd"],
    "convert raw": ["convert", "a.fvd", "new.raw"],
    "convert fvd": ["convert", "t.raw", "new.fvd", "-b", "low.fvd", "-F", "fvd", "--data-file", "new", "--compact"],
    "convert over": ["convert", "t.raw", "a.fvd", "--force"],
    "profile record": ["profile", "record", "a.fvd"],
    "profile show": ["profile", "show", "profile"],
}


class Failing:
    """Calls of the system by fvdfs, of which one fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.fail_at = -1
        self.error = 0
        self.failed = ""
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        monkeypatch.setattr(fcntl, "fcntl", self._wrapped("fcntl", fcntl.fcntl))

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("fvdfs"):
                self.count += 1
                if self.count == self.fail_at:
                    self.failed = f"{name}, called by {caller}"
                    raise OSError(self.error, os.strerror(self.error))
            return call(*args, **named)

        return wrapped

    def arm(self, number: int, error: int) -> None:
        self.count, self.fail_at, self.error, self.failed = 0, number, error, ""


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_each_call_that_fails_is_one_line(
    images: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And leaves no half of a file: the files are there as they were, or as they were to be."""
    monkeypatch.chdir(images)
    (images / "broken.fvd").write_bytes((images / "a.fvd").read_bytes())
    with open(images / "broken.fvd", "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.truncate(file.tell() + MIB)
        file.seek(-512, os.SEEK_END)
        file.write(b"x" * 512)
    before = state(images)
    # One process stands for all that `in_use` looks at: the same calls are made for each.
    everybody = mounts.processes
    monkeypatch.setattr(mounts, "processes", lambda: everybody()[:1])
    failing = Failing(monkeypatch)
    words = COMMANDS[name]

    def reset() -> None:
        for path in images.iterdir():
            if path.name not in before:
                path.unlink()
        for old, content in before.items():
            if not (images / old).exists() or (images / old).read_bytes() != content:
                (images / old).write_bytes(content)

    assert main(words) in (0, 3), capfd.readouterr().err
    calls = failing.count
    made = set(state(images)) - set(before)
    reset()
    capfd.readouterr()
    assert calls
    for number in range(1, calls + 1):
        error = ERRORS[number % len(ERRORS)]
        failing.arm(number, error)
        code = main(words)
        failed = failing.failed
        failing.arm(-1, 0)
        printed = capfd.readouterr()
        where = f"call {number}: {failed}, errno {error}: {code}: {printed.err}"
        assert "Traceback" not in printed.err + printed.out, where
        assert code in (0, 1, 2, 3), where
        assert not [file for file in os.listdir(images) if ".part" in file and "unlink" not in failed], where
        if code and words[0] != "check":
            assert printed.err.splitlines()[-1].startswith("fvdfs: "), where
        if words[0] in ("create", "convert", "map") and code:
            now = state(images)
            for new in made:
                # That a folder could not be synced is told when all has its name already.
                assert new not in now or "fsync" in failed or "open" in failed, where
            if not any(call in failed for call in ("fsync", "open", "unlink")):
                assert {file: now.get(file) for file in before} == before, where
        reset()


def run(words: list[str], cwd: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FVDFS, *words], cwd=cwd, text=True, timeout=60, check=False, **how)


OUTPUT = [
    ["info", "a.fvd"],
    ["info", "a.fvd", "--json"],
    ["map", "a.fvd"],
    ["map", "a.fvd", "--json"],
    ["check", "a.fvd"],
]
OUTPUT += [
    ["check", "a.fvd", "--json"],
    ["profile", "show", "profile"],
    ["--help"],
    ["create", "--help"],
    ["--version"],
]


@pytest.mark.parametrize("words", OUTPUT, ids=" ".join)
def test_output_that_cannot_be_written(images: Path, words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run(words, images, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, "fvdfs: standard output: No space left on device\n")
    shell = ["bash", "-c", 'exec "$@" >&-', "bash"]
    done = subprocess.run([*shell, *FVDFS, *words], cwd=images, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "fvdfs: standard output: Bad file descriptor\n")
    with open("/dev/full", "w") as full:
        done = run(words, images, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0
    assert done.stdout


def test_a_reader_that_is_gone(images: Path) -> None:
    script = '"$@" | true; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *FVDFS, "info", images / "a.fvd"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""


def test_errors_where_nobody_listens(images: Path) -> None:
    for redirection in (">/dev/full 2>&1", ">&- 2>&-", "2>&-"):
        command = f'"$@" {redirection}'
        for words, code in ((["info", "missing"], 2), (["create", "base.raw", "1M"], 2), (["nonsense"], 2)):
            done = subprocess.run(["bash", "-c", command, "bash", *FVDFS, *words], cwd=images, check=False)
            assert done.returncode == code, (redirection, words)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_of_a_terminal(images: Path, encoding: str) -> None:
    name = os.fsdecode(b"n\xff\xc3\xa9[red].fvd")
    (images / "a.fvd").rename(images / name)
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "COLUMNS": "100"}
    for words in (["info"], ["info", "--json"], ["map"], ["map", "--json"], ["check"], ["check", "--json"]):
        done = subprocess.run([*FVDFS, words[0], name, *words[1:]], cwd=images, env=environment, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        done.stdout.decode(encoding)
    bar = subprocess.run([*FVDFS, "map", name], cwd=images, env=environment, capture_output=True, check=True).stdout
    assert ("░" if encoding == "utf-8" else "-") * 64 in bar.decode(encoding)
    with mounted(images) as mount:
        for words in (["status", str(mount.point)], ["status", "--json", str(mount.point)]):
            done = subprocess.run([*FVDFS, *words], env=environment, capture_output=True)
            assert (done.returncode, done.stderr) == (0, b"")
            assert b"[red]" in done.stdout
    done = subprocess.run([*FVDFS, "info", "missing\udcff"], cwd=images, env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_names_that_are_no_text(folder: Path) -> None:
    base, image, data, copy = (os.fsdecode(name) for name in (b"b\xff", b"i\xfe.fvd", b"d\xfd", b"c\xfc.fvd"))
    (folder / base).write_bytes(CONTENT)
    must("create", folder / image, "-b", base, "--data-file", data)
    must("check", folder / image)
    must("convert", folder / image, folder / copy)
    must("convert", folder / copy, folder / os.fsdecode(b"q\xfb.qcow2"))
    must("convert", "-f", "qcow2", folder / os.fsdecode(b"q\xfb.qcow2"), folder / "out.raw")
    assert (folder / "out.raw").read_bytes() == CONTENT


ODD: dict[str, Callable[[Path], object]] = {
    "folder": lambda path: path.mkdir(),
    "fifo": lambda path: os.mkfifo(path),
    "device": lambda path: os.mknod(path, 0o20600, os.makedev(1, 5)),
    "loop": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.touch(),
    "short": lambda path: path.write_bytes(b"\xa9\xf5\x43\x51"),
    "noise": lambda path: path.write_bytes(b"\xa9\xf5\x43\x51\1\0\0\0" + bytes(range(256)) * 100),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", ODD)
def test_things_that_are_no_images(folder: Path, kind: str) -> None:
    (folder / "t.raw").write_bytes(CONTENT)
    for name in ("odd.fvd", "odd.raw"):
        ODD[kind](folder / name)
        for words in (
            ["info", name],
            ["map", name],
            ["map", "t.raw", "--png", name],
            ["check", name],
            ["check", name, "--repair"],
            ["amend", name, "-F", "raw"],
            ["create", "new.fvd", "-b", name],
            ["create", "new.fvd", "-b", name, "-F", "fvd"],
            ["create", "new.fvd", "-b", name, "-F", "qcow2"],
            ["create", "new.fvd", "1M", "-b", "t.raw", "-F", "raw", "--profile", name],
            ["create", f"{name}/new.fvd", "1M"],
            ["convert", name, "new.raw"],
            ["convert", "-f", "qcow2", name, "new.raw"],
            ["convert", "t.raw", f"{name}/new.raw"],
            ["profile", "show", name],
            ["profile", "record", name],
            ["status", name],
            ["prefetch", "start", name],
            ["mount", name, folder.name],
            ["umount", name],
        ):
            done = fvdfs(*words, cwd=folder)
            assert "Traceback" not in done.err, (words, done.err)
            assert done.code in (0, 1, 2, 3), (words, done)
            if done.code and words[0] != "check":
                assert done.err.count("\n") == 1, (words, done.err)
            (folder / "new.fvd").unlink(missing_ok=True)
            (folder / "new.raw").unlink(missing_ok=True)


def test_what_may_not_be_read(images: Path, nobody: list[str]) -> None:
    for path in (images, *images.iterdir()):
        path.chmod(0o600 if path.is_file() else 0o700)
    point = images.parent / "point"
    point.mkdir()
    for words in [
        *COMMANDS.values(),
        ["mount", ".", str(point)],
        ["mount", str(images), str(point)],
        ["status", str(images)],
    ]:
        done = subprocess.run([*nobody, *FVDFS, *words], cwd=images, capture_output=True, text=True, check=False)
        assert done.returncode in (1, 2), (words, done)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1, (words, done.stderr)
        assert "/proc/" not in done.stderr


def test_a_mount_of_another_user(images: Path, nobody: list[str]) -> None:
    with mounted(images) as mount:
        words = [*nobody, *FVDFS, "umount", str(mount.point)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "root has mounted it; unmount as root" in done.stderr
        assert os.path.ismount(mount.point)
        done = subprocess.run([*nobody, *FVDFS, "map", mount.raw("a")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "root has mounted it: ask as root, or have it mounted with --allow-other" in done.stderr


def test_a_file_of_another_user(nobody: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        Path(name, "locked.fvd").touch(mode=0o600)
        done = subprocess.run(
            [*nobody, *FVDFS, "info", "locked.fvd"], capture_output=True, text=True, check=False, cwd=name
        )
        said = "fvdfs: locked.fvd: Permission denied; it belongs to root, and this is nobody\n"
        assert (done.returncode, done.stderr) == (1, said)


def test_a_full_disk(images: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", "1M"):
        small = tmp_path / "small"
        for name in ("low.fvd", "base.raw", "data", "a.fvd"):
            subprocess.run(["cp", "--sparse=always", images / name, small / name], check=True)
        must("create", small / "c.fvd", "1M", "--compact", "--journal-size", "none", "--chunk-size", "4K")
        with open(small / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):
            while True:
                os.write(filler.fileno(), bytes(4096))
        for words in (
            ["create", "new.fvd", "1M", "--compact"],
            ["convert", "base.raw", "new.fvd"],
            ["map", "a.fvd", "--png", "map.png"],
            ["profile", "record", "a.fvd"],
            ["check", "a.fvd", "--repair"],
        ):
            done = run(words, small, capture_output=True)
            assert "Traceback" not in done.stderr
            assert done.returncode in (0, 1, 2)
            assert done.stderr.count("\n") == (done.returncode != 0), (words, done)
        assert not [name for name in os.listdir(small) if name.endswith(".part") or name.startswith("new")]


@pytest.mark.parametrize("words", [["check", "a.fvd"], ["info", "a.fvd"], ["create", "n.fvd", "-b", "base.raw"]])
def test_an_interrupt_anywhere(images: Path, words: list[str]) -> None:
    """Wherever it comes, nothing but the exit code tells of it."""
    for step in range(8):
        with subprocess.Popen(
            [*FVDFS, *words], cwd=images, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                process.wait(0.1 + step * 0.03)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT)  # the last: before it can say so
        assert error == b""
        (images / "n.fvd").unlink(missing_ok=True)
        assert not [name for name in os.listdir(images) if name.endswith(".part")]


def test_the_one_error_of_a_group() -> None:
    image, system, defect = ImageError("a", "b"), OSError(5, "c"), KeyError("d")
    assert leading(image) is image
    assert leading(ExceptionGroup("", [ExceptionGroup("", [system]), image])) is system
    assert leading(ExceptionGroup("", [system, defect])) is defect
    assert isinstance(leading(BaseExceptionGroup("", [defect, KeyboardInterrupt()])), KeyboardInterrupt)


def test_attributes_of_somebody_else(folder: Path) -> None:
    path = folder / "a.raw"
    path.write_bytes(CONTENT)
    for value in (b"nonsense", b"7"):
        for name in ("status", "map", "pid"):
            os.setxattr(path, f"user.fvdfs.{name}", value)
            os.setxattr(folder, f"user.fvdfs.{name}", value)
        for words in (["map", "a.raw"], ["status", "."], ["prefetch", "start", "a.raw"]):
            done = fvdfs(words[0], *words[1:-1], folder / words[-1])
            assert "Traceback" not in done.err
            assert done.code in (0, 2), done
