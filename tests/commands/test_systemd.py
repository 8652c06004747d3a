"""examples/systemd, run by a systemd: the first process of a PID namespace, with nothing but a journal beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fvdfs.daemon import notify
from support import reference
from support.mounts import must
from support.namespaces import in_mount_namespace
from support.programs import in_sbin

UNITS = Path(__file__).parents[2] / "examples/systemd"
SYSTEMD = "/lib/systemd/systemd"
needs_systemd = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists(SYSTEMD), reason="needs systemd, and root, who starts it"
)
JOURNAL = {
    "journal.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/systemd/journal/stdout\n"
    "ListenDatagram=/run/systemd/journal/socket\nPassCredentials=yes\nService=journal.service\n",
    "journal.service": "[Unit]\nDefaultDependencies=no\nRequires=journal.socket\n[Service]\nType=notify\n"
    "StandardOutput=null\nExecStart=/lib/systemd/systemd-journald\n",
}
"""Without /dev/log, which would be the host's."""
TEST = """
[Unit]
DefaultDependencies=no
Requires=journal.socket
After=journal.socket
SuccessAction=exit-force
FailureAction=exit-force
[Service]
Type=oneshot
Delegate=yes
ExecStart=/bin/sh -e {script}
StandardOutput=append:{out}
StandardError=inherit
"""
USERS_MANAGER = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User=nobody
Delegate=yes
KillMode=mixed
Environment=XDG_RUNTIME_DIR=/run/user HOME={home} SYSTEMD_UNIT_PATH={home}/.config/systemd/user
ExecStart=/lib/systemd/systemd --user --unit=idle.target
"""


def by_systemd(tmp_path: Path, script: str, more_units: dict[str, str] | None = None) -> list[str]:
    """Run a script under a systemd of its own, in which fvdfs is installed, and fvdfs@.service; what it prints."""
    units, out = tmp_path / "units", tmp_path / "out"
    units.mkdir()
    shutil.copy(UNITS / "fvdfs@.service", units)
    (tmp_path / "script").write_text(script)
    written = {f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in ("sysinit", "basic", "shutdown")}
    written |= {**JOURNAL, **(more_units or {})}
    written["test.service"] = TEST.format(script=tmp_path / "script", out=out)
    for name, text in written.items():
        (units / name).write_text(text)
    boot = f"""
        {in_sbin(tmp_path, "fvdfs")}
        mount -t tmpfs none /run
        mkdir -p /run/systemd/system /etc/fvdfs
        umount -R /sys/fs/cgroup || :
        mount -t cgroup2 none /sys/fs/cgroup
        exec env -i PATH=$PATH container=test SYSTEMD_UNIT_PATH={units} D=$D P=$P \\
            {SYSTEMD} --system --unit=test.service --show-status=no --log-target=console --log-level=warning
    """
    alone = ["unshare", "--pid", "--cgroup", "--fork", "--kill-child", "--mount-proc", "sh", "-c", boot]
    places = {"D": str(tmp_path / "images"), "P": str(tmp_path / "point")}
    done = subprocess.run(
        in_mount_namespace(*alone),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **places},
    )
    said = out.read_text() if out.exists() else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{said}"
    return said.splitlines()


@pytest.fixture
def point(folder: Path) -> Path:
    """A mount point beside a folder with a.fvd."""
    must("create", folder / "a.fvd", "1M")
    path = folder.parent / "point"
    path.mkdir()
    return path


@needs_systemd
def test_a_service_of_the_system(folder: Path, point: Path, tmp_path: Path) -> None:
    """It is ready when it has started, closes its images when it is stopped; programs go on when it is killed."""
    (folder / "bad.fvd").write_bytes(b"no image" * 1024)
    base = folder / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "1M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 120 0 64k", base], check=True, stdout=subprocess.DEVNULL)
    must("create", folder / "b.fvd", "--base", base, "--base-format", "qcow2")
    must("create", folder / "c.fvd", "1M", "--data-file", "c.qcow2", "--data-format", "qcow2")
    script = f"""
        echo "DIR={folder}
MOUNTPOINT={point}
OPTIONS=-o noexec,record_profile,writeback=off" >/etc/fvdfs/disks.conf
        systemctl start fvdfs@disks
        ls {point}
        systemctl show -p StatusText --value fvdfs@disks
        first=$(systemctl show -p MainPID --value fvdfs@disks)
        exec 7<>{point}/a.raw 8<>{point}/c.raw
        printf kept >&8
        kill -9 $first
        until [ $first != $(systemctl show -p MainPID --value fvdfs@disks) ] &&
            systemctl is-active -q fvdfs@disks; do sleep 0.1; done
        ls {point}
        head -c 4 {point}/b.raw; echo
        head -c 4 {point}/c.raw; echo
        printf writ >&7
        systemctl reload fvdfs@disks
        printf ten >&7
        exec 7>&- 8>&-
        systemctl stop fvdfs@disks
        systemctl show -p Result --value fvdfs@disks
        findmnt {point} || echo "nothing is mounted"
        echo DIR=/no/such/folder >>/etc/fvdfs/disks.conf
        systemctl start fvdfs@disks 2>/dev/null || echo "not started"
        systemctl stop fvdfs@disks
        journalctl --sync
        journalctl -u fvdfs@disks -t fvdfs -o json --output-fields=PRIORITY,MESSAGE
    """
    said, disks = by_systemd(tmp_path, script), ["a.raw", "b.raw", "c.raw"]
    (status, *after), journal = said[3:12], said[12:]
    assert (said[:3], after[:3]) == (disks, disks)
    assert status == f"{point} shows the images of {folder}: 0 of 3 disks open"
    content, kept, result, unmounted, refused = after[3:]
    assert (content, kept) == ("xxxx", "kept")
    assert (result, unmounted, refused) == ("success", "nothing is mounted", "not started")
    assert b"".join(reference.read_disk(folder / "a.fvd"))[:7] == b"written"
    assert reference.check(folder / "a.fvd", "fvdfs") == []
    lines = [(line["PRIORITY"], line["MESSAGE"]) for line in map(json.loads, journal)]
    assert ("6", f"{point}: ready; shows the images of {folder}") in lines
    assert any(priority == "6" and "bad.fvd" in text for priority, text in lines), "which is no image"
    assert any(priority == "3" and text.startswith("/no/such/folder: is not a directory") for priority, text in lines)


@needs_systemd
def test_a_service_of_a_user(folder: Path, point: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    units = home / ".config/systemd/user"
    units.mkdir(parents=True)
    shutil.copy(UNITS / "user/fvdfs@.service", units)
    for name in ("idle", "basic", "shutdown"):
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (home / ".config/fvdfs").mkdir()
    (home / ".config/fvdfs/mine.conf").write_text(f"DIR={folder}\nMOUNTPOINT={point}\nOPTIONS=\n")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    for path in (home, folder, point, folder / "a.fvd"):
        shutil.chown(path, 65534)
    script = f"""
        mkdir /run/user; chown nobody /run/user
        trap 'systemctl kill -s KILL manager' EXIT
        systemctl start manager
        as() {{ setpriv --reuid nobody --regid nogroup --clear-groups env XDG_RUNTIME_DIR=/run/user "$@"; }}
        as systemctl --user start fvdfs@mine
        as ls {point}
        as systemctl --user show -p StatusText --value fvdfs@mine
        printf written | as dd of={point}/a.raw conv=notrunc status=none
        as systemctl --user stop fvdfs@mine
        as systemctl --user show -p Result --value fvdfs@mine
        findmnt {point} || echo "nothing is mounted"
    """
    said = by_systemd(tmp_path, script, {"manager.service": USERS_MANAGER.format(home=home)})
    status = f"{point} shows the images of {folder}: 0 of 1 disks open"
    assert said == ["a.raw", status, "success", "nothing is mounted"]
    assert b"".join(reference.read_disk(folder / "a.fvd"))[:7] == b"written"


@needs_systemd
def test_systemd_has_nothing_to_say_of_the_units(tmp_path: Path) -> None:
    program = tmp_path / "fvdfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit, whose in ((UNITS / "fvdfs@.service", "--system"), (UNITS / "user/fvdfs@.service", "--user")):
        copy = tmp_path / "fvdfs@.service"
        copy.write_text(re.sub("^(Exec[A-Za-z]*)=fvdfs", rf"\1={program}", unit.read_text(), flags=re.MULTILINE))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", whose, copy],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_without_a_service_manager_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    notify("READY=1")
