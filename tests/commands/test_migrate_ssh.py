"""`fvdfs migrate` by a real ssh, and by what may stand in its place: it talks, asks, hangs or dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machines import Machine, is_there, started_by
from support.migrations import Ground, child_of, ended, slow_down, there, under_way
from support.mounts import FVDFS, running, wait_until
from support.sshd import needs_sshd, ssh_host

ROOT = Path(__file__).parents[2]
PROGRAM = f"env PYTHONPATH={ROOT} {sys.executable} -m fvdfs"


@pytest.fixture
def ssh(tmp_path: Path, free_port: int) -> Iterator[str]:
    with ssh_host(tmp_path / "ssh", free_port, says="echo Welcome.; printf 'You have mail. '") as found:
        yield found


def by(ground: Ground, ssh: str) -> list[str]:
    how = ["--ssh", ssh, "--program", PROGRAM, "--qmp", str(ground.here), "--qmp-target", str(ground.there)]
    return [*how, "--start", started_by(ground.there, ground.target.raw("vm")).replace("2>&1", "")]


@needs_sshd
def test_a_machine_moves_by_ssh(ground: Ground, here: Machine, ssh: str) -> None:
    """One whose shell greets."""
    with under_way(ground, "done", *by(ground, ssh)) as process:
        assert ended(process) == (0, "")
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")


@needs_sshd
def test_the_connection_is_cut_while_the_machine_moves(ground: Ground, here: Machine, ssh: str) -> None:
    slow_down(here)
    with under_way(ground, "QEMU sends", *by(ground, ssh)) as process:
        os.kill(child_of(process, b"ssh"), signal.SIGKILL)
        code, err = ended(process)
    assert (code, "not moved; all is as before" in err) == (1, True), err
    wait_until(lambda: not list(ground.folder.iterdir()))  # fvdfs there notices by itself
    ground.expect_as_before()
    assert here.state == "running"
    assert "wrote" in here.qemu_io("write -P 1 0 4k")


@needs_sshd
def test_the_connection_is_cut_after_the_machine_has_moved(ground: Ground, here: Machine, ssh: str) -> None:
    with under_way(ground, "the machine runs at", *by(ground, ssh)) as process:
        os.kill(child_of(process, b"ssh"), signal.SIGKILL)
        code, err = ended(process)
    assert (code, "127.0.0.1 has vm.raw" in err) == (1, True), err
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")
    assert ground.migrate(*by(ground, ssh)).code == 0
    assert ground.source.status("vm")["move"] == "released"
    assert not is_there(ground.here)
    wait_until(lambda: not ground.is_served)


@pytest.mark.parametrize(
    ("ssh", "said"),
    [
        ("sh -c 'echo no shell for you'", "it says 'no shell for you'"),
        ("sh -c 'printf %s no\\ shell'", "it says 'no shell'"),
        ("sh -c 'echo 1; echo [2]; echo null; echo \"x\"'", "it says"),
        ("sh -c 'exec 0<&-; sleep 0.1'", "the connection has ended"),
    ],
)
def test_something_else_than_fvdfs_answers(ground: Ground, ssh: str, said: str) -> None:
    done = ground.migrate("--ssh", ssh)
    assert (done.code, done.err.count("\n"), said in done.err) == (1, 1, True), done
    ground.expect_as_before()


def test_ctrl_c_while_ssh_asks_for_a_password(ground: Ground) -> None:
    """It waits for somebody, hears nothing of the end of stdin, and does not end by itself."""
    asks = ground.tmp_path / "asks"
    with running(
        *FVDFS,
        *ground.words("--ssh", f"sh -c 'trap : HUP; touch {asks}; exec sleep 1000'"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(asks.exists)
        process.send_signal(signal.SIGINT)
        assert ended(process) == (130, "")
    ground.expect_as_before()


def test_the_machine_that_is_started_has_nothing_of_the_command(ground: Ground, here: Machine) -> None:
    """Its stderr is not ssh's, which would not end before the machine."""
    start = started_by(ground.there, ground.target.raw("vm")).replace("2>&1", "")
    words = ["--qmp", str(ground.here), "--qmp-target", str(ground.there), "--start", start]
    with under_way(ground, "done", *words) as process:
        assert ended(process) == (0, "")  # at the end of stderr, whoever has it
    assert there(ground).state == "running"


@pytest.mark.parametrize(
    "start", ["echo no such machine >&2; exit 3", "echo >&2; printf 'no such machine' >&2; exit 3"]
)
def test_it_is_told_why_the_machine_does_not_start(ground: Ground, here: Machine, start: str) -> None:
    done = ground.migrate("--qmp", ground.here, "--qmp-target", ground.there, "--start", start)
    assert (done.code, "exit code 3: no such machine\n" in done.err) == (2, True), done
    ground.expect_as_before()
    assert here.state == "running"


def test_it_is_told_why_the_machine_does_not_come(ground: Ground, here: Machine) -> None:
    """Another one is started than runs here."""
    start = started_by(ground.there, ground.target.raw("vm")).replace("2>&1", "").replace("-m 64", "-m 32")
    done = ground.migrate("--qmp", ground.here, "--qmp-target", ground.there, "--start", start)
    assert (done.code, "load of migration failed" in done.err) == (1, True), done
    ground.expect_as_before()
    assert here.state == "running"
