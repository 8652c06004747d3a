"""`fvdfs migrate`: a machine moves with its disk by one command, and whatever ends that, one host has the disk."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from fvdfs.format.mailbox import Question, Wish
from fvdfs.format.migration import Incoming, Target
from support.devices import small_disk
from support.machines import Machine, is_there, started_by
from support.migrations import Ground, ended, far_side_of, slow_down, there, under_way
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, wait_for_end, wait_until
from support.moves import Client, number, record


def test_a_machine_moves_with_its_disk(ground: Ground, here: Machine) -> None:
    assert "wrote" in here.qemu_io("write -P 1 0 4k")
    done = ground.migrate(*ground.with_machine())
    assert (done.code, done.err) == (0, ""), done
    assert [word for word in ("served", "received", "stood still", "QEMU here has ended") if word not in done.out] == []
    assert there(ground).state == "running"
    assert "read 4096/4096" in there(ground).qemu_io("read -P 1 0 4k")
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")
    assert (ground.source.status("vm")["move"], ground.target.status("vm")["move"]) == ("released", "local")
    assert not is_there(ground.here)
    assert not ground.is_served
    again = ground.migrate(*ground.with_machine())
    assert (again.code, "moved" in again.out) == (0, True), again
    with pytest.raises(OSError, match="Read-only"):
        ground.source.raw("vm").open("r+b").close()


def test_disks_without_a_machine(ground: Ground) -> None:
    must("create", ground.source.folder / "data.fvd", "8M")
    with ground.source.raw("data").open("r+b") as file:
        file.write(b"y" * MIB)
    done = ground.migrate(disks=("vm", "data"))
    assert (done.code, done.err) == (0, ""), done
    for name, byte in (("vm", b"x"), ("data", b"y")):
        assert ground.source.status(name)["move"] == "released"
        assert ground.target.raw(name).read_bytes()[:MIB] == byte * MIB
        assert fvdfs("check", ground.folder / f"{name}.fvd").code == 0
    assert not ground.is_served


def test_a_template_stays_where_it_is(ground: Ground) -> None:
    for folder in (ground.source.folder, ground.folder):
        (folder / "template.raw").write_bytes(b"t" * 4 * MIB)
    must("create", ground.source.folder / "clone.fvd", "8M", "--base", "template.raw")
    with ground.source.raw("clone").open("r+b") as file:
        file.write(b"y" * MIB)
    done = ground.migrate("--keep-base", "template.raw", disks=("clone",))
    assert (done.code, done.err) == (0, ""), done
    assert ground.source.status("clone")["move"] == "released"
    assert ground.target.status("clone")["local_bytes"] == MIB
    assert ground.target.raw("clone").read_bytes() == (b"y" * MIB + b"t" * 3 * MIB).ljust(8 * MIB, b"\0")


def test_a_template_that_differs_in_a_byte_is_refused(ground: Ground) -> None:
    """One that no sample shows."""
    for folder, byte in ((ground.source.folder, b"t"), (ground.folder, b"u")):
        with (folder / "template.raw").open("wb") as file:
            file.truncate(64 * MIB)
            file.seek(41 * MIB + 70000)
            file.write(byte)
    must("create", ground.source.folder / "clone.fvd", "64M", "--base", "template.raw")
    done = ground.migrate("--keep-base", "template.raw", disks=("clone",))
    assert (done.code, done.err.count("\n"), "is another file" in done.err) == (2, 1, True), done
    assert [ground.source.status("clone")["move"], os.listdir(ground.folder)] == ["", ["template.raw"]]
    done = ground.migrate("--keep-base", "template.raw", "--trust-base", disks=("clone",))
    assert (done.code, done.err) == (0, ""), done


def test_a_template_that_has_another_name_here(ground: Ground) -> None:
    """Of it a sample is compared, which is told."""
    for path in (ground.source.folder / "ours.raw", ground.folder / "template.raw"):
        path.write_bytes(b"t" * 4 * MIB)
    must("create", ground.source.folder / "clone.fvd", "8M", "--base", "ours.raw")
    done = ground.migrate("--keep-base", "template.raw", disks=("clone",))
    assert (done.code, done.err.count("\n"), "a sample is compared" in done.err) == (0, 1, True), done


def test_a_template_that_the_target_does_not_allow(ground: Ground) -> None:
    elsewhere = ground.tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (ground.source.folder, elsewhere):
        (folder / "template.raw").write_bytes(b"t" * 4 * MIB)
    must("create", ground.source.folder / "clone.fvd", "8M", "--base", "template.raw")
    done = ground.migrate("--keep-base", elsewhere / "template.raw", disks=("clone",))
    assert (done.code, "does not appear: " in done.err, "base_path" in done.err) == (2, True, True), done
    ground.expect_as_before("clone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_machine_moves_leaves_all_as_before(
    ground: Ground, here: Machine, number: signal.Signals
) -> None:
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        process.send_signal(number)
        code, err = ended(process)
    assert (code, "not moved; all is as before" in err) == (130, True), err
    ground.expect_as_before()
    assert here.state == "running"
    assert "wrote" in here.qemu_io("write -P 1 0 4k")


@pytest.mark.parametrize("step", ["to 127.0.0.1", "served", "received"])
def test_ctrl_c_before_the_machine_moves(ground: Ground, here: Machine, step: str) -> None:
    slow_down(here)
    with under_way(ground, step) as process:
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
    ground.expect_as_before()
    assert here.state == "running"
    assert "wrote" in here.qemu_io("write -P 1 0 4k")


@pytest.mark.parametrize("how", ["it waits", "in the background", pytest.param("deaf", marks=pytest.mark.slow)])
def test_ctrl_c_before_the_machine_has_come(ground: Ground, here: Machine, how: str) -> None:
    """It was started, and has no monitor yet: it must not come, or stay, later."""
    begun, gate, disk = ground.tmp_path / "begun", ground.tmp_path / "gate", ground.tmp_path / "disk"
    os.mkfifo(gate)
    disk.write_bytes(bytes(MIB))  # that stays, so that it is not for want of one that the machine ends
    starting = f"echo $$ >{begun}.new; mv {begun}.new {begun}; : <{gate}; {started_by(ground.there, disk)}"
    if how == "in the background":
        starting = f"sh -c {shlex.quote(starting)} &"
    elif how == "deaf":
        starting = f"trap '' TERM; {starting}"
    words = ["--qmp", str(ground.here), "--qmp-target", str(ground.there), "--start", starting]
    with under_way(ground, "received", *words) as process:
        wait_until(begun.exists)
        process.send_signal(signal.SIGINT)
        if how == "in the background":
            gate.write_bytes(b"")
        code, err = ended(process)
    assert (code, err.count("\n"), "not moved; all is as before" in err) == (130, 1, True), err
    wait_for_end(int(begun.read_text()))
    ground.expect_as_before()
    assert here.state == "running"


def test_ctrl_c_after_the_machine_has_moved(ground: Ground, here: Machine) -> None:
    with under_way(ground, "the machine runs at") as process:
        process.send_signal(signal.SIGINT)
        code, err = ended(process)
    assert (code, "127.0.0.1 has vm.raw" in err) == (130, True), err
    assert "wrote" in there(ground).qemu_io("write -P 2 0 4k")
    wait_until(lambda: ground.source.status("vm")["move"] == "released")
    wait_until(lambda: not ground.is_served)
    assert ground.migrate(*ground.with_machine()).code == 0
    assert not is_there(ground.here)


def test_the_target_ends_while_the_machine_moves(ground: Ground, here: Machine) -> None:
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        there(ground).kill()
        code, err = ended(process)
    assert (code, "not moved; all is as before" in err) == (1, True), err
    ground.expect_as_before()
    assert here.state == "running"


@pytest.mark.parametrize("handed_over", [False, True])
def test_the_target_ends_at_the_switch_over(ground: Ground, here: Machine, *, handed_over: bool) -> None:
    """It ran there, and had not got its disk: perhaps was it on its way."""
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        far_side = far_side_of(process)
        os.kill(far_side, signal.SIGSTOP)
        here("migrate-set-parameters", max_bandwidth=1 << 30)
        wait_until(lambda: here.state == "postmigrate")
        wait_until(lambda: there(ground).state == "running")
        there(ground).kill()
        if handed_over:
            into = record(ground.folder / "vm.fvd").incoming
            assert into is not None
            step = f"handover {into.epoch} {into.number} target"
            os.setxattr(ground.source.raw("vm"), "user.fvdfs.move", step.encode())
        os.kill(far_side, signal.SIGCONT)
        code, err = ended(process)
    assert (code, "not moved; all is as before" in err) == (1, True), err
    ground.expect_as_before()
    assert here.state == "running"
    assert "wrote" in here.qemu_io("write -P 1 0 4k")


def test_qemu_cancels(ground: Ground, here: Machine) -> None:
    slow_down(here)
    with under_way(ground, "QEMU sends") as process:
        here("migrate_cancel")
        code, err = ended(process)
    assert (code, "the migration was cancelled" in err) == (1, True), err
    ground.expect_as_before()
    assert here.state == "running"


def test_what_does_not_fit_is_said_before_anything_is_done(ground: Ground, here: Machine) -> None:
    raw, place = str(ground.source.raw("vm")), f"127.0.0.1:{ground.target.point}"
    how = ["--ssh", "env", "--program", f"{sys.executable} -m fvdfs"]
    qmp = ["--qmp", str(ground.here), "--qmp-target", str(ground.there)]
    for words, said in (
        ([raw, place, *how, *qmp], "allow_url=nbd://127.0.0.1/"),
        ([raw, f"127.0.0.1:{ground.tmp_path}", *how, *qmp, "--listen", ground.listen], "is not mounted there"),
        ([raw, "127.0.0.1:target", *how], "HOST:DIR"),
        ([raw, "nowhere.invalid:/target", *how], "--ssh 'ssh nowhere.invalid'"),
        ([raw, place, *how, "--qmp", str(ground.here)], "--qmp-target"),
        ([raw, place, *how, "--listen", ground.listen], "a machine runs on it; move it, too (--qmp"),
        ([raw, place, *how, *qmp, "--ssh", "/nowhere", "--listen", ground.listen], "/nowhere"),
        ([raw, place, *how, *qmp, "--ssh", "false", "--listen", ground.listen], "the connection has ended"),
        ([raw, place, *how, "--qmp", raw, "--qmp-target", raw, "--listen", ground.listen], "Unix socket"),
        ([raw[:-4], place, *how], "raw file"),
    ):
        done = fvdfs("migrate", *words)
        assert (done.code in (1, 2), done.err.count("\n"), said in done.err) == (True, 1, True), (words, done)
        ground.expect_as_before()
    (ground.folder / "vm.fvd").write_bytes(b"somebody's")
    done = ground.migrate(*qmp)
    assert (done.code, done.err.count("\n"), "exists already" in done.err) == (2, 1, True), done
    assert (ground.folder / "vm.fvd").read_bytes() == b"somebody's"
    assert os.listdir(ground.folder) == ["vm.fvd"]


def test_the_disk_of_somebody_else(nobody: list[str]) -> None:
    """In a mount that others do not reach, and in one that they do."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        (folder := Path(name, "images")).mkdir()
        must("create", folder / "vm.fvd", "1M")
        for options, said in ((), "root has mounted it: ask as root"), (("--allow-other",), "its owner, root, or root"):
            with mounted(folder, *options) as mount:
                command = [*nobody, *FVDFS, "migrate", str(mount.raw("vm")), "127.0.0.1:/target", "--ssh", "env"]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert (done.returncode in (1, 2), done.stdout, done.stderr.count("\n")) == (True, "", 1), done
                assert said in done.stderr
                assert mount.status("vm")["move"] == ""


@pytest.mark.parametrize(
    ("program", "said"), [("no-such-program", "--program"), ("sh -c 'exit 2'", "the same version at both hosts")]
)
def test_fvdfs_is_not_there_or_is_another(ground: Ground, program: str, said: str) -> None:
    done = ground.migrate("--program", program)
    assert (done.code, said in done.err.splitlines()[-1]) == (1, True), done
    ground.expect_as_before()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_there_is_no_room(ground: Ground, here: Machine) -> None:
    """What the machine would notice as a full disk, after it has moved."""
    small = ground.tmp_path / "small"
    with small_disk(small, "2M"), mounted(small, "-o", f"allow_url=nbd://{ground.listen}/") as ground.target:
        done = ground.migrate(*ground.with_machine())
        assert (done.code, done.out) == (2, ""), done
        assert f"{small}: has room for" in done.err
        ground.expect_as_before()
    assert here.state == "running"


def test_a_machine_that_was_started_and_does_not_wait_is_ended(ground: Ground, here: Machine) -> None:
    start = started_by(ground.there, ground.target.raw("vm")).replace("-incoming defer", "")
    done = ground.migrate("--qmp", ground.here, "--qmp-target", ground.there, "--start", start)
    assert (done.code, "start it with -incoming defer" in done.err) == (2, True), done
    ground.expect_as_before()
    assert here.state == "running"


def test_a_paused_machine_stays_paused(ground: Ground, here: Machine) -> None:
    here("stop")
    done = ground.migrate(*ground.with_machine())
    assert (done.code, done.err, "paused as it was" in done.out) == (0, "", True), done
    assert there(ground).state == "paused"


def test_nobody_else_is_given_the_disk(ground: Ground) -> None:
    """Whoever asks first, from when it is served on."""
    stranger = Incoming(Target.RECEIVING, "", "7" * 32)
    with under_way(ground, "served at", "--listen", ground.listen) as process:
        process.send_signal(signal.SIGSTOP)
        epoch = ground.source.status("vm")["move_epoch"]
        question = Question.of(replace(stranger, epoch=epoch), Wish.HAND_OVER, number(), "stranger")
        answer = Client(f"nbd://{ground.listen}/vm").ask(question)
        assert (answer.done, answer.later) == (False, False)
        assert "another target" in answer.text
        process.send_signal(signal.SIGCONT)
        code, err = ended(process)
    assert code == 0, err
    gone, come = record(ground.source.folder / "vm.fvd").outgoing, record(ground.folder / "vm.fvd").incoming
    assert gone is not None
    assert come is not None
    assert gone.target == come.number


def test_disks_of_any_layout(ground: Ground) -> None:
    """While a backup reads them: compact ones, with a snapshot, with a file of data."""
    folder = ground.source.folder
    must("create", folder / "compact.fvd", "8M", "--compact", "--chunk-size", "1M")
    must("create", folder / "snap.fvd", "8M")
    must("create", folder / "split.fvd", "8M", "--data-file", "auto")
    names = ("compact", "snap", "split")
    for name in names:
        with ground.source.raw(name).open("r+b") as file:
            file.write(b"1" * MIB)
            if name == "snap":
                must("snapshot", ground.source.raw(name))
            file.seek(5 * MIB)
            file.write(b"2" * MIB)
    expected = b"1" * MIB + bytes(4 * MIB) + b"2" * MIB + bytes(2 * MIB)
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(ground.source.raw(name).open("rb")) for name in names]
        assert [reader.read(4096) for reader in readers] == [expected[:4096]] * 3
        done = ground.migrate(disks=names)
        assert (done.code, done.err) == (0, ""), done
        assert [reader.read() for reader in readers] == [expected[4096:]] * 3
    for name in names:
        assert ground.target.raw(name).read_bytes() == expected
        assert ground.source.status(name)["move"] == "released"
        assert fvdfs("check", ground.folder / f"{name}.fvd").code == 0
