"""One kind of error has one exit code, whatever the command: the rows of the table, in all commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.devices import small_disk
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, running
from support.servers import nbd_server

ROOT = Path(__file__).parents[2]
ERRORS = {"check": 1, "compare": 2}
"""Commands that end with what they have found; any error of theirs has this code."""


def all_commands() -> set[str]:
    return {line.split()[0] for line in fvdfs("--help").out.splitlines() if re.match(" {4}[a-z]", line)}


OF_IMAGES = """
    info X; check X; map X; amend X -F raw; convert X o.raw; measure X; compare X X; compare a.fvd X; diff X
    export X --since s o.fvd; snapshot X; commit X; flatten X; rebase X -b a.fvd; revert X; snapshots X; resize X 2M
    freeze X; thaw X; release X; abandon X; profile show X; profile record X; clone X b; create c.fvd -b X -F fvd
"""
OTHERS = """
    restore X a.fvd; delete X; status X; umount X; top X; prefetch start X; serve X --unix s; mount X point; mount . X
    activate X; migrate X h:/d; upgrade X; create c.fvd -b a.fvd -F fvd --profile X; info a.fvd --secret X
    map a.fvd --tls-creds X
"""


def commands(text: str, name: str) -> list[list[str]]:
    found = [shlex.split(command) for command in re.split("[;\n]", text) if command.strip()]
    return [[name if word == "X" else word for word in words] for words in found]


def wrong(code: int, words: list[list[str]], said: str = "") -> list[str]:
    """What of these ends with another code, or without one line that says this."""
    found = []
    for command in words:
        done = fvdfs(*command)
        if done.code != ERRORS.get(command[0], code) or said not in done.err or done.err.count("\n") != 1:
            found.append(f"{shlex.join(command)}: {done.code}: {done.err}")
    return found


@pytest.fixture
def images(folder: Path) -> Iterator[Path]:
    """A folder with an image, in which commands run."""
    must("create", folder / "a.fvd", "1M")
    (folder / "point").mkdir()
    here = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(here)


def test_all_commands_are_tried() -> None:
    assert len(all_commands()) > 30
    assert {command for [command, *_] in commands(OF_IMAGES + OTHERS, "X")} | {"doctor", "receive"} == all_commands()


def test_0_is_done(images: Path) -> None:
    for command in commands(
        "info X; check X; map X; measure X; compare X X; diff X; snapshots X; convert X o.raw", "a.fvd"
    ):
        assert fvdfs(*command).code == 0


def test_2_words_that_make_no_sense(images: Path) -> None:
    assert wrong(2, [[command, "--banana"] for command in sorted(all_commands())]) == []
    assert wrong(2, [[command, ""] for command in sorted(all_commands())], "is empty") == []


def test_2_names_of_nothing(images: Path) -> None:
    assert wrong(2, commands(OF_IMAGES + OTHERS, "nosuch.fvd")) == []
    assert sorted(os.listdir()) == ["a.fvd", "point"]


def test_2_files_that_exist(images: Path) -> None:
    text = "create X 1M; convert X X; clone X a; convert a.fvd X -O qcow2; create b.fvd 1M --data-file X"
    assert wrong(2, commands(text, "a.fvd")) == []


def test_1_damaged(images: Path) -> None:
    damaged = bytearray((images / "a.fvd").read_bytes())
    damaged[8:16] = b"\xff" * 8
    (images / "bad.fvd").write_bytes(damaged)
    others = [command for command in commands(OF_IMAGES, "bad.fvd") if command[0] != "check"]
    assert wrong(1, others, "virtual_disk_size=") == []
    assert fvdfs("check", "bad.fvd").code == 2  # the image is corrupt: that is what it has found


def test_1_in_use(images: Path) -> None:
    must("create", "b.fvd", "-b", "a.fvd", "-F", "fvd")
    text = """check X; convert X o.raw; measure X; compare X X; diff X; amend X -F fvd; flatten X; rebase X -b a.fvd
        commit X; revert X; resize X 2M; freeze X; snapshot X; profile record X; create X 1M --force"""
    with mounted(images) as mount, open(mount.raw("b"), "r+b") as disk:
        disk.write(b"x")
        assert wrong(1, [command for command in commands(text, "b.fvd") if command[0] != "commit"]) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_1_a_read_only_mount(images: Path) -> None:
    must("create", "b.fvd", "-b", "a.fvd", "-F", "fvd")
    with mounted(images, "--read-only") as mount:
        text = "resize X 2M; snapshot X; prefetch start X; flatten X; freeze X"
        assert wrong(1, commands(text, str(mount.raw("b"))), "the mount is read-only") == []


def test_1_no_permission() -> None:
    folder = Path(tempfile.mkdtemp(prefix="fvdfs-test-"))
    try:
        folder.chmod(0o777)
        for name, mode in (("a", 0o666), ("closed", 0), ("closed@s", 0)):
            must("create", folder / f"{name}.fvd", "1M")
            (folder / f"{name}.fvd").chmod(mode)
        (folder / "point").mkdir(0o777)
        (folder / "own").mkdir(0o700)
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        text = (
            OF_IMAGES + "info a.fvd --secret X; create own/b.fvd 1M; mount own point; mount . own; delete closed@s.fvd"
        )
        found = []
        for command in commands(text, "closed.fvd"):
            done = subprocess.run([*drop, *FVDFS, *command], cwd=folder, capture_output=True, text=True, check=False)
            is_told = re.search("permission denied", done.stderr, re.IGNORECASE) and "Errno" not in done.stderr
            if done.returncode != ERRORS.get(command[0], 1) or not is_told:
                found.append(f"{command}: {done.returncode}: {done.stderr}")
        assert found == []
    finally:
        shutil.rmtree(folder)


def test_1_no_space(images: Path, tmp_path: Path) -> None:
    (images / "base.raw").write_bytes(os.urandom(MIB))
    with small_disk(tmp_path / "small", "300K"):
        must("create", tmp_path / "small" / "b.fvd", "-b", images / "base.raw", "-F", "raw", "--journal-size", "none")
        text = "convert base.raw X/o.raw; convert base.raw X/o.fvd; convert base.raw X/o.qcow2; flatten X/b.fvd"
        words = [[word.replace("X", str(tmp_path / "small")) for word in one] for one in commands(text, "")]
        assert wrong(1, words, "No space left on device") == []


def test_1_a_server_that_is_away(images: Path, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(os.urandom(MIB))
    with nbd_server(tmp_path / "base.raw", tmp_path / "socket") as url:
        must("create", "b.fvd", "-b", url, "-F", "raw")
    text = "convert X o.raw; measure X; compare X a.fvd; clone X c; create c.fvd -b X -F raw"
    assert wrong(1, commands(text, url)) == []
    text = "map X; convert X o.raw; measure X; compare X a.fvd; flatten X"
    assert wrong(1, [[*command, "-o", "allow_url=nbd+unix:///"] for command in commands(text, "b.fvd")]) == []


def test_130_interrupted(images: Path) -> None:
    """While they wait for a server that says nothing."""
    for line in ("convert X o.raw", "measure X", "compare X a.fvd", "clone X c"):
        with socket.create_server(("127.0.0.1", 0)) as server:  # a client of the one before may have come once more
            [command] = commands(line, f"nbd://127.0.0.1:{server.getsockname()[1]}/")
            with running(*FVDFS, *command, stderr=subprocess.PIPE) as process:
                connection, _ = server.accept()
                process.send_signal(signal.SIGINT)
                _, said = process.communicate(timeout=60)
                connection.close()
            assert (command[0], process.returncode) == (command[0], 130), said
            assert said in (b"", b"fvdfs: interrupted: 0 of 1 clones were made\n")
    assert sorted(os.listdir()) == ["a.fvd", "point"]


def test_the_page_tells_what_help_tells() -> None:
    page = (ROOT / "docs/commands.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    codes = dict(re.findall(r"^\| `?(\w+)`? \| (.+) \|$", page, re.MULTILINE))
    told = dict(re.findall(r"^  (\w+) +(.+)$", fvdfs("--help").out.partition("exit codes:")[2], re.MULTILINE))
    assert len(told) == 8
    assert codes == told
