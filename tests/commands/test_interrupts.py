"""Ctrl-C, and other signals that end a command, at any time: nothing left behind, and never a traceback.

FVDFS_INTERRUPTS sets at how many lines each command meets Ctrl-C, FVDFS_INTERRUPTS_SEED has other ones tried.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import support
from support.mounts import FVDFS, MIB, must

TIMES = int(os.environ.get("FVDFS_INTERRUPTS", "24"))
SEED = os.environ.get("FVDFS_INTERRUPTS_SEED", "0")
CONTENT = random.Random(5).randbytes(MIB)
COMMANDS = {
    "create": ["create", "new.fvd", "-b", "base.raw", "--data-file", "new.data"],
    "clone": ["clone", "base.raw", "new", "-n", "3"],
    "convert to fvd": ["convert", "base.raw", "new.fvd"],
    "convert to qcow2": ["convert", "top.fvd", "new.qcow2"],
    "convert from qcow2": ["convert", "-f", "qcow2", "low.qcow2", "new.fvd"],
    "measure": ["measure", "base.raw", "-b", "base.raw", "-F", "raw"],
    "compare": ["compare", "base.raw", "low.qcow2", "-F", "qcow2"],
    "diff": ["diff", "top.fvd", "--since", "base.raw"],
    "export": ["export", "top.fvd", "--since", "base.raw", "new.fvd"],
    "export to qcow2": ["export", "top.fvd", "--since", "base.raw", "new.qcow2"],
    "restore": ["restore", "old.qcow2", "copy.fvd"],
    "map": ["map", "top.fvd", "--png", "new.png"],
    "info": ["info", "top.fvd"],
    "check": ["check", "top.fvd"],
    "commit": ["commit", "over.fvd"],
    "revert": ["revert", "over.fvd"],
    "flatten": ["flatten", "over.fvd"],
    "rebase": ["rebase", "over.fvd", "-b", "same.fvd"],
    "snapshot": ["snapshot", "top.fvd"],
    "amend": ["amend", "top.fvd", "-F", "raw"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all commands."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "base.raw").write_bytes(CONTENT)
    must("create", folder / "top.fvd", "-b", "base.raw", "--base-format", "raw", "--journal-size", "64K")
    for name, base in (
        ("low@1", ["-b", "base.raw", "-F", "raw"]),
        ("same", ["-b", "base.raw", "-F", "raw"]),
        ("over", ["-b", "low@1.fvd"]),
    ):
        must("create", folder / f"{name}.fvd", *base, "--journal-size", "64K")
    source = [folder / "base.raw", folder / "low.qcow2"]
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *source], check=True)
    must("export", folder / "top.fvd", "--since", folder / "base.raw", folder / "old.qcow2")
    must("convert", folder / "base.raw", folder / "copy.fvd", "--compact", "--journal-size", "64K")
    return folder


@pytest.fixture
def folder(folder: Path, made: Path) -> Path:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder


def signalled(
    folder: Path, words: list[str], *, times: int, number: str = "SIGINT", function: str = ""
) -> list[tuple[int, str, list[str]]]:
    """How the command ended, for a signal at each of so many lines."""
    program = [sys.executable, "-m", "support.interrupts", number, str(times), SEED, function, *words]
    path = [str(Path(support.__file__).parent.parent), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run(program, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True)
    found: list[tuple[int, str, list[str]]] = [tuple(run) for run in json.loads(done.stdout)]
    assert len(found) > times / 2
    return found


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_at_any_line(folder: Path, command: str) -> None:
    words = COMMANDS[command]
    for code, said, left in signalled(folder, words, times=TIMES):
        assert code in (130, -signal.SIGINT), said  # by the signal itself: before the command has begun
        assert "Traceback" not in said
        assert "fvdfs: " not in said or words[0] == "clone"  # which says how many it has made
        assert not [name for name in left if ".part" in name or name.startswith("no ")]


def test_ctrl_c_where_trio_starts_a_task(folder: Path) -> None:
    """Called by a task of ours, trio's own code is not guarded against it."""
    ended = signalled(folder, COMMANDS["convert to fvd"], function="spawn_impl", times=12)
    assert {code for code, _, _ in ended} == {130}
    assert {said for _, said, _ in ended} == {""}
    assert not [name for _, _, left in ended for name in left if ".part" in name]


CLOSING = """
import signal, socket, trio
from fvdfs import daemon
close = socket.socket.close
def interrupted(self):
    close(self)
    signal.raise_signal(signal.SIGINT)
socket.socket.close = interrupted
try:
    daemon.run_loop(trio.lowlevel.checkpoint)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_where_trio_closes_the_socket_that_signals_are_written_to() -> None:
    done = subprocess.run([sys.executable, "-c", CLOSING], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


@pytest.mark.parametrize("function", ["_make", "_rename_all", "discard"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_where_files_get_their_names(folder: Path, number: str, function: str) -> None:
    """Both of the old files are there, or both of the new ones, and nothing else."""
    must("create", folder / "new.fvd", "2M", "--data-file", "new.data")
    ends = (130,) if number == "SIGINT" else (-signal.SIGTERM,)
    ended = signalled(folder, [*COMMANDS["create"], "--force"], number=number, function=function, times=12)
    for code, said, left in ended:
        assert code in (*ends, 0), said
        assert "Traceback" not in said
        assert left in ([], ["new.data", "new.fvd"]), said


def test_nothing_is_imported_before_ctrl_c_is_silent() -> None:
    """`__main__` sees to that, and Python imports the package first."""
    program = "import sys; before = {*sys.modules}; import fvdfs; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "fvdfs\n"


@pytest.mark.slow
def test_ctrl_c_at_random_times(folder: Path) -> None:
    with open(folder / "base.raw", "r+b") as base:
        for at in range(0, 64 * MIB, MIB):
            base.seek(at)
            base.write(CONTENT)
    before = sorted(path.name for path in folder.iterdir())
    moments = random.Random(7)
    for target in ["new.raw", "new.fvd", "new.qcow2"] * 8:
        command = [*FVDFS, "convert", "base.raw", target]
        with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0.1, 1.0))
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        if "Traceback" not in said or re.search(r'/fvdfs/(\w+/)*\w+\.py"', said):  # else Python had not begun yet
            assert process.returncode in (0, 130, -signal.SIGINT), said
            assert said == ""
        if (folder / target).exists():
            (folder / target).unlink()
        assert sorted(path.name for path in folder.iterdir()) == before
