"""`fvdfs migrate` once more: of a machine that has come by it, of a move that was broken off, beside another one."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.hosts import joined_hosts, needs_hosts
from support.machines import Machine, is_there, machine, started_by
from support.migrations import Ground, ended, far_side_of, slow_down, there, under_way, wait_for_step
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, wait_for_end, wait_until
from support.tls import make_keys

NO_MACHINE = ["--ssh", "env"]
"""Words that change nothing."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a tmpfs")


def test_a_machine_that_came_by_a_move_moves_on(ground: Ground, here: Machine, free_port: int) -> None:
    """QEMU there says that its migration has completed: that by which it came."""
    assert ground.migrate(*ground.with_machine()).code == 0
    third = ground.tmp_path / "third"
    third.mkdir()
    qmp = ground.tmp_path / "third.qmp"
    with mounted(third, "-o", f"allow_url=nbd://127.0.0.1:{free_port}/") as mount:
        start = started_by(qmp, mount.raw("vm"))
        done = fvdfs(
            "migrate", ground.target.raw("vm"), f"127.0.0.1:{mount.point}", "--ssh", "env", "--program",
            f"{sys.executable} -m fvdfs", "--listen", f"127.0.0.1:{free_port}", "--qmp", ground.there,
            "--qmp-target", qmp, "--start", start,
        )  # fmt: skip
        try:
            assert (done.code, done.err) == (0, ""), done
            assert "wrote" in Machine(qmp).qemu_io("write -P 2 0 4k")
            assert (ground.target.status("vm")["move"], mount.status("vm")["move"]) == ("released", "local")
            assert not is_there(ground.there)
        finally:
            if is_there(qmp):
                Machine(qmp).kill()


def capabilities(here: Machine) -> dict[str, bool]:
    return {each["capability"]: each["state"] for each in here("query-migrate-capabilities")}


@pytest.mark.parametrize("had", [False, True])
def test_the_machine_has_its_capabilities_back(ground: Ground, here: Machine, *, had: bool) -> None:
    slow_down(here)
    here("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": had}])
    before = capabilities(here)
    with under_way(ground, "QEMU sends") as process:
        assert capabilities(here)["return-path"]
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
    assert capabilities(here) == before


def test_another_command_for_the_same_disk_leaves_the_first_alone(ground: Ground, here: Machine) -> None:
    must("create", ground.source.folder / "data.fvd", "8M")
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        for disks in (("vm",), ("data", "vm")):
            done = ground.migrate(*ground.with_machine(), disks=disks)
            assert (done.code, done.err.count("\n"), "another fvdfs migrate" in done.err) == (2, 1, True), done
        here("migrate-set-parameters", max_bandwidth=1 << 30)
        assert ended(process) == (0, "")
    assert ground.source.status("vm")["move"] == "released"


def test_a_disk_that_is_named_twice(ground: Ground) -> None:
    done = ground.migrate(disks=("vm", "vm"))
    assert (done.code, done.err.count("\n"), "two disks have the same name" in done.err) == (2, 1, True), done
    ground.expect_as_before()


def server_of(process: subprocess.Popen[Any]) -> int:
    """That which the command has started; it has the command line of the command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    other = far_side_of(process)
    return next(int(pid) for pid in children if int(pid) != other)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)


@contextlib.contextmanager
def at_step(ground: Ground, here: Machine, step: str) -> Iterator[subprocess.Popen[Any]]:
    """The command, which has just told this step; where QEMU sends the machine it does for as long as it is slow."""
    if step == "QEMU sends":
        slow_down(here)
    with under_way(ground, step) as process:
        yield process


@pytest.mark.parametrize("step", ["received", "QEMU sends", "the machine runs at"])
def test_the_server_is_killed(ground: Ground, here: Machine, step: str) -> None:
    with at_step(ground, here, step) as process:
        kill(server_of(process))
        if step == "QEMU sends":
            here("migrate-set-parameters", max_bandwidth=1 << 30)
        code, err = ended(process)
    assert (code, "another one is started" in err) == (0, True), err
    assert there(ground).state == "running"
    assert ground.source.status("vm")["move"] == "released"
    assert ground.target.raw("vm").read_bytes()[: 4 * MIB] == b"x" * 4 * MIB
    wait_until(lambda: not ground.is_served)


@pytest.mark.parametrize("step", ["served", "received", "QEMU sends", "the machine was sent", "the machine runs at"])
def test_the_command_is_killed(ground: Ground, here: Machine, step: str) -> None:
    """The far end goes on as far as it can; the same command again does the rest."""
    with at_step(ground, here, step) as process:
        far_side = far_side_of(process)
        kill(process.pid)
        if step == "QEMU sends":
            done = ground.migrate(*ground.with_machine())
            assert (done.code, done.err.count("\n"), "migrate_cancel" in done.err) == (2, 1, True), done
            here("migrate_cancel")
            here("migrate-set-parameters", max_bandwidth=1 << 30)
        wait_for_end(far_side)
    again = ground.migrate(*ground.with_machine())
    assert (again.code, again.err) == (0, ""), again
    assert there(ground).state == "running"
    assert "read 4096/4096" in there(ground).qemu_io("read -P 120 4096 4k")
    assert (ground.source.status("vm")["move"], ground.target.status("vm")["move"]) == ("released", "local")
    assert not is_there(ground.here)
    wait_until(lambda: not ground.is_served)


@pytest.mark.parametrize("step", ["received", "QEMU sends", "the machine runs at"])
def test_the_far_end_is_killed(ground: Ground, here: Machine, step: str) -> None:
    with at_step(ground, here, step) as process:
        kill(far_side_of(process))
        code, err = ended(process)
    assert code == 1, err
    if step == "the machine runs at":
        assert "127.0.0.1 has vm.raw" in err
        assert ground.migrate(*ground.with_machine()).code == 0
        assert ground.source.status("vm")["move"] == "released"
        assert not is_there(ground.here)
    else:
        assert "not moved; all is as before" in err, err
        assert here.state == "running"
        assert "wrote" in here.qemu_io("write -P 1 0 4k")
        assert ground.source.status("vm")["move"] == ""
    wait_until(lambda: not ground.is_served)


def test_the_machine_here_is_killed_once_it_has_gone(ground: Ground, here: Machine) -> None:
    """The one at the target runs, and has not got its disk: it is the only one that is left."""
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        os.kill(far_side_of(process), signal.SIGSTOP)
        here("migrate-set-parameters", max_bandwidth=1 << 30)
        wait_until(lambda: here.state == "postmigrate")
        wait_until(lambda: there(ground).state == "running")
        os.kill(process.pid, signal.SIGSTOP)
        here.kill()
        os.kill(far_side_of(process), signal.SIGCONT)
        os.kill(process.pid, signal.SIGCONT)
        code, err = ended(process)
    assert there(ground).state == "running", err
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")
    wait_until(lambda: ground.source.status("vm")["move"] == "released")
    wait_until(lambda: not ground.is_served)
    assert "127.0.0.1 has vm.raw" in err, (code, err)


@pytest.fixture
def with_tls(ground: Ground) -> Iterator[list[str | Path]]:
    """Words for the command; the mount at the target asks by TLS."""
    keys, folder = make_keys(ground.tmp_path / "keys") / "x509", ground.tmp_path / "secure"
    folder.mkdir()
    with mounted(folder, "-o", f"allow_url=nbds://{ground.listen}/,tls_creds={keys}") as ground.target:
        ground.folder = folder
        yield ["--tls-creds", keys]


def test_the_command_is_killed_where_the_disks_go_through_tls(ground: Ground, with_tls: list[str | Path]) -> None:
    """That they are served, only the target can see."""
    with under_way(ground, "received", *map(str, with_tls)) as process:
        far_side = far_side_of(process)
        kill(process.pid)
        wait_for_end(far_side)
    again = ground.migrate(*with_tls)
    assert (again.code, again.err, "is served already" in again.out) == (0, "", True), again
    assert (ground.source.status("vm")["move"], ground.target.status("vm")["move"]) == ("released", "local")
    assert ground.target.raw("vm").read_bytes()[: 4 * MIB] == b"x" * 4 * MIB
    wait_until(lambda: not ground.is_served)


def test_disks_of_which_one_cannot_move_yet(ground: Ground) -> None:
    """It is told which is where; the same command again goes on."""
    must("create", ground.source.folder / "data.fvd", "8M")
    process: subprocess.Popen[Any]
    with under_way(ground, "served", disks=("vm", "data")) as process:
        os.kill(far_side_of(process), signal.SIGSTOP)
        with machine(ground.here, ground.source.raw("data")):
            os.kill(far_side_of(process), signal.SIGCONT)
            code, err = ended(process)
        assert (code, "127.0.0.1 has vm.raw:" in err, "to be used here: data.raw." in err) == (1, True, True), err
    assert ground.source.status("data")["move"] == "serving"
    again = ground.migrate(disks=("vm", "data"))
    assert (again.code, again.err) == (0, ""), again
    assert [ground.source.status(name)["move"] for name in ("vm", "data")] == ["released", "released"]


def test_the_port_is_taken(ground: Ground) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(ground.listen.partition(":")[2])))
        other.listen()
        done = ground.migrate()
        assert (done.code, "--listen ADDR:PORT" in done.err, "all is as before" in done.err) == (1, True, True), done
    ground.expect_as_before()
    assert ground.migrate().code == 0


@contextlib.contextmanager
def small_target(ground: Ground) -> Iterator[Path]:
    """The target's folder is on a file system of its own, and disks follow for some seconds."""
    folder = ground.tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", folder], check=True)
    try:
        with mounted(folder, "-o", f"allow_url=nbd://{ground.listen}/,prefetch_max=1M") as ground.target:
            ground.folder = folder
            yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@needs_root
def test_the_target_is_full_while_it_follows(ground: Ground) -> None:
    """That is told, once; with more room it goes on."""
    with small_target(ground) as folder:
        with under_way(ground, "has taken", *NO_MACHINE) as process:
            assert process.stderr is not None
            with (folder / "other").open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
                while other.write(bytes(MIB)):
                    pass
            assert "vm.raw: does not copy: " in (line := process.stderr.readline())
            assert os.strerror(errno.ENOSPC) in line
            (folder / "other").unlink()
            assert ended(process) == (0, "")
        assert ground.source.status("vm")["move"] == "released"
        assert ground.target.raw("vm").read_bytes()[: 4 * MIB] == b"x" * 4 * MIB


@needs_root
def test_the_target_takes_no_image(ground: Ground, here: Machine) -> None:
    with small_target(ground) as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        done = ground.migrate(*ground.with_machine())
        assert (done.code, "Read-only" in done.err, "all is as before" in done.err) == (1, True, True), done
        assert done.err.count("\n") == 2, done
        assert list(folder.iterdir()) == []
    assert ground.source.status("vm")["move"] == ""
    assert here.state == "running"
    wait_until(lambda: not ground.is_served)


def test_the_disk_is_resized_while_the_machine_moves(ground: Ground, here: Machine) -> None:
    """By QEMU, which the target cannot know of: the machine goes on here, and moves with its new size the next time.

    Where that comes while the disk follows, it grows there.
    """
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        here("block_resize", node_name="disk", size=40 * MIB)
        code, err = ended(process)
    assert (code, "by now, and not" in err, "not moved; all is as before" in err) == (1, True, True), err
    ground.expect_as_before()
    assert here.state == "running"
    here("migrate-set-parameters", max_bandwidth=1 << 30)
    with under_way(ground, "the machine runs at") as process:
        there(ground)("block_resize", node_name="disk", size=48 * MIB)
        assert ended(process) == (0, "")
    assert "wrote" in there(ground).qemu_io("write -P 7 44M 4k")
    assert "verification failed" not in there(ground).qemu_io("read -P 0 30M 14M")
    assert "verification failed" not in there(ground).qemu_io("read -P 120 0 4M")
    assert (ground.source.status("vm")["move"], ground.target.status("vm")["move"]) == ("released", "local")


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_machine_that_is_paused(ground: Ground, here: Machine, *, interrupted: bool) -> None:
    """It stays so, wherever it is then."""
    here("stop")
    if interrupted:
        slow_down(here)
        with under_way(ground, "QEMU sends") as process:
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130
        ground.expect_as_before()
        assert here.state == "paused"
        return
    done = ground.migrate(*ground.with_machine())
    assert (done.code, done.err) == (0, ""), done
    assert there(ground).state == "paused"
    assert not is_there(ground.here)
    there(ground)("cont")
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")


@needs_root
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_mount_is_killed_while_the_disk_follows(ground: Ground, side: str) -> None:
    """It is told in a few lines; once it is mounted again, the same command goes on."""
    with small_target(ground):
        mount = getattr(ground, side)
        with under_way(ground, "has taken", *NO_MACHINE) as process:
            mount.kill()
            code, err = ended(process)
        assert (code in (1, 2), "127.0.0.1 has vm.raw" in err, "Traceback" in err) == (True, True, False), err
        assert err.count("\n") <= 4, err
        mount.mount()
        again = ground.migrate()
        assert again.code == 0, again
        assert ground.source.status("vm")["move"] == "released"
        assert ground.target.raw("vm").read_bytes()[: 4 * MIB] == b"x" * 4 * MIB
        wait_until(lambda: not ground.is_served)


@needs_hosts
def test_what_it_waits_for_is_told_once_and_that_it_is_back(tmp_path: Path, folder: Path) -> None:
    """The link is cut: the far end does not answer, then it does, and the disk cannot be read yet."""
    must("create", folder / "vm.fvd", "4M")
    (there := tmp_path / "there").mkdir()
    with joined_hosts(2) as ((a, b), link), contextlib.ExitStack() as stack:
        source = stack.enter_context(a.mounted(folder))
        options = ("-o", f"allow_url=nbd://{a.address}/,prefetch_max=1M,on_base_error=wait")
        target = stack.enter_context(b.mounted(there, *options))
        with source.raw("vm").open("r+b") as file:
            file.write(b"x" * 4 * MIB)
        how = ("--ssh", shlex.join(b.on()), "--program", shlex.join(map(str, FVDFS)), "--listen", a.address)
        words = (*FVDFS, "migrate", source.raw("vm"), f"{b.address}:{target.point}", *how)
        process = a.popen(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        wait_for_step(process, "has taken")
        link.cut(b)
        os.kill(far_side_of(process), signal.SIGSTOP)
        assert f"{b.address}: has not answered since " in process.stderr.readline()
        assert "base lost since" in must("status", target.point)
        os.kill(far_side_of(process), signal.SIGCONT)
        assert f"{b.address}: answers again, after " in process.stderr.readline()
        assert f"{b.address}: vm.raw: cannot be read from here since " in process.stderr.readline()
        link.join(b)
        wait_for_step(process, "vm.raw: goes on")
        assert ended(process) == (0, "")
        assert source.status("vm")["move"] == "released"


def test_a_host_that_only_ssh_knows(ground: Ground, here: Machine) -> None:
    """By an alias: QEMU cannot go there by it."""
    words = ground.words(*ground.with_machine())
    words[2] = words[2].replace("127.0.0.1", "known-to-ssh.invalid")
    done = fvdfs(*words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done
    assert "--migrate-uri" in done.err
    ground.expect_as_before()
