"""`fvdfs upgrade`: programs go on while another daemon takes over, with other options; or the former one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands.upgrade import FIXED
from fvdfs.xattrs import DAEMON, STATUS, UPGRADE
from support import keptwriter
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted, must, running, wait_for_log, wait_until

OLD = "base_path=/srv,prefetch_max=7M"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(b"base" * MIB)
    must("create", folder / "vm.fvd", "--base", "base.raw", "--copy-on-read")
    with mounted(folder, "-o", f"keep,noexec,writeback=off,{OLD}") as mount:
        yield mount
        mount.pid = identity(mount)["pid"]


def identity(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.getxattr(mount.point, DAEMON))
    return found


def options_of(mount: Mount) -> set[str]:
    command = identity(mount)["command"]
    return {command[at + 1] for at, word in enumerate(command) if word == "-o"}


def test_programs_go_on(mount: Mount, tmp_path: Path) -> None:
    before = identity(mount)
    command = [sys.executable, keptwriter.__file__, str(mount.raw("vm")), str(tmp_path / "model"), "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        for turn in range(5):
            done = fvdfs("upgrade", mount.point, *(["-o", f"prefetch_max={turn}M"] if turn else []))
            assert (done.code, done.err) == (0, ""), done
        said = writer.communicate()[1]
        assert (writer.returncode, said) == (0, "")
    after = identity(mount)
    assert (after["takeovers"], after["pid"] != before["pid"]) == (5, True)
    assert options_of(mount) == {"base_path=/srv", "prefetch_max=4M", "keep", "writeback=off", "noexec"}
    assert mount.raw("vm").read_bytes().rstrip(b"\0") == (tmp_path / "model").read_bytes().rstrip(b"\0")
    assert " ERROR " not in mount.log


def test_what_qemu_has_open_goes_on_in_the_same_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under systemd, which has nothing to do here. A signal to stop that comes meanwhile is obeyed."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    monkeypatch.setenv("FDSTORE", "9")
    folder, point, log = tmp_path / "images", tmp_path / "point", tmp_path / "log"
    folder.mkdir()
    point.mkdir()
    must("create", folder / "vm.fvd", "1M", "--data-file", "data.qcow2", "--data-format", "qcow2")
    mount = Mount(folder, point, log)
    command: list[str | Path] = [*FVDFS, "mount", "-f", "--log-file", log, "-o", "keep,writeback=off", folder, point]
    try:
        with running(*command) as process:
            wait_until(lambda: mount.raw("vm").exists())
            with mount.raw("vm").open("r+b", buffering=0) as file:
                file.write(b"before")
                for turn in range(2):
                    must("upgrade", point)
                    assert (identity(mount)["takeovers"], identity(mount)["pid"]) == (turn + 1, process.pid)
                    assert children(process.pid).count("qemu-storage-da") == 1, "one of the former process is left"
                    file.write(b" and after")
                file.seek(0)
                assert file.read(26) == b"before and after and after"
            os.setxattr(point, UPGRADE, "".join(f"{word}\0" for word in identity(mount)["command"]).encode())
            environment = Path(f"/proc/{process.pid}/environ")
            wait_until(lambda: b"fvdfs-state-3" in environment.read_bytes())
            process.terminate()
            assert process.wait(60) == 0
        assert " ERROR " not in mount.log
    finally:
        subprocess.run(["umount", "-l", point], capture_output=True, check=False)
    assert "clean" in must("check", folder / "vm.fvd")


def children(pid: int) -> list[str]:
    """What the children of a process run."""
    found = subprocess.run(["ps", "-o", "comm=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_what_is_asked_for_holds(mount: Mount) -> None:
    for host in ("here", "there"):
        must("upgrade", mount.point, "-o", f"allow_url=nbd://{host}/")
    assert json.loads(os.getxattr(mount.point, STATUS))["allow_url"] == ["nbd://here/", "nbd://there/"]


def test_a_version_that_cannot_start_leaves_the_former_one(mount: Mount) -> None:
    before = identity(mount)
    with mount.raw("vm").open("r+b", buffering=0) as file:
        file.write(b"before")
        words = f"{sys.executable}\0-c\0import sys; sys.exit('no')\0".encode()
        os.setxattr(mount.point, UPGRADE, words)
        wait_until(lambda: identity(mount)["takeovers"] == 1)
        file.write(b" and after")
        file.seek(0)
        assert file.read(16) == b"before and after"
    wait_for_log(mount, "has never been ready: the former version goes on")
    assert identity(mount)["command"] == before["command"]
    must("upgrade", mount.point)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *((("-o", option), f"-o {option.partition('=')[0]}: ") for option in ("nokeep", "ro", "writeback=on", "nodev")),
        (("-o", "nonsense"), "nonsense"),
        (("-o", "secret=/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before(mount: Mount, words: tuple[str, ...], said: str) -> None:
    done = fvdfs("upgrade", mount.point, *words)
    assert (done.code != 0, said in done.err, done.err.count("\n")) == (True, True, 1), done
    assert identity(mount)["takeovers"] == 0


def test_each_option_that_stays_is_known() -> None:
    done = fvdfs("mount", "--help")
    assert [name for name in FIXED if name not in done.out] == []


def test_a_mount_that_is_not_kept(folder: Path) -> None:
    with mounted(folder) as mount:
        done = fvdfs("upgrade", mount.point)
        assert (done.code, "mount it with -o keep" in done.err, done.err.count("\n")) == (2, True, 1), done
    done = fvdfs("upgrade", mount.point)
    assert (done.code, "not mounted there" in done.err) == (2, True), done


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who can be another user")
def test_another_user_cannot(folder: Path) -> None:
    with mounted(folder, "-o", "keep,allow_other") as mount:
        before = identity(mount)
        write = f"import os; os.setxattr({str(mount.point)!r}, {UPGRADE!r}, b'/bin/true\\0')"
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", write]
        folder.chmod(0o777)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "PermissionError" in done.stderr) == (1, True), done.stderr
        assert identity(mount) == before
