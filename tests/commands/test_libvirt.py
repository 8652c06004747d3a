"""examples/libvirt/domain.xml, started by a libvirtd in namespaces of its own, whose QEMU runs as a user of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.mounts import must
from support.namespaces import in_mount_namespace, overlaid
from support.programs import installed

DOMAIN = Path(__file__).parents[2] / "examples/libvirt/domain.xml"
NO_LIBVIRT = (
    "only root may start machines"
    if os.geteuid()
    else next((f"{name} is not installed" for name in ("libvirtd", "virsh") if not shutil.which(name)), "")
)
"""Why there can be no libvirtd here; empty: there can."""
BOOT = bytes.fromhex("31c0 8ec0 8ed8 b80103 b90200 ba8000 bb007c cd13 ba0406 b80020 ef f4")
"""Code of a boot sector, which writes itself to the next sector (int 13h) and switches the machine off (port 604h)."""
SETTINGS = """
user = "libvirt-qemu"
group = "libvirt-qemu"
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
"""


@pytest.mark.skipif(bool(NO_LIBVIRT), reason=NO_LIBVIRT)
@pytest.mark.slow
def test_a_machine_of_libvirt_boots_from_a_disk_and_writes_it(folder: Path, tmp_path: Path) -> None:
    """libvirt gives the disk to the user that QEMU runs as, and takes it back."""
    sector = BOOT.ljust(510, b"\0") + b"\x55\xaa"
    base, domain = folder / "base.raw", tmp_path / "domain.xml"
    base.write_bytes(sector.ljust(1 << 20, b"\0"))
    must("create", folder / "vm.fvd", "--base", base, "--base-format", "raw")
    domain.write_text(DOMAIN.read_text().replace("type='kvm'", "type='qemu'"))
    script = f"""
        {overlaid(tmp_path, "/etc", "/var")}
        PATH={installed(tmp_path / "bin")}:$PATH
        export LIBVIRT_DEFAULT_URI=qemu:///system
        mount -t tmpfs none /run
        mount -t tmpfs none /srv
        ip link set lo up
        mkdir -p /srv/disks /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt
        echo '{SETTINGS}' >/etc/libvirt/qemu.conf
        grep -q ^libvirt-qemu: /etc/passwd || useradd --system --user-group libvirt-qemu
        fvdfs mount {folder} /srv/disks --allow-other
        libvirtd --daemon
        until virsh list >/dev/null 2>&1; do sleep 0.1; done
        virsh create --validate --paused {domain} >&2
        stat -c %U /srv/disks/vm.raw
        ps -o user:20= -p "$(cat /run/libvirt/qemu/vm.pid)"
        virsh resume vm >&2
        while virsh domstate vm >/dev/null 2>&1; do sleep 0.1; done
        stat -c %U /srv/disks/vm.raw
        head -c 1024 /srv/disks/vm.raw >{tmp_path}/written
        fvdfs umount /srv/disks
    """
    alone = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-e", "-c", script]
    with (tmp_path / "said").open("w+") as said:  # a pipe would stay open with libvirtd
        done = subprocess.run(
            in_mount_namespace(*alone), stdin=subprocess.DEVNULL, stdout=said, stderr=said, timeout=200, check=False
        )
    found = (tmp_path / "said").read_text()
    assert done.returncode == 0, found
    users = [line for line in found.splitlines() if line in ("root", "libvirt-qemu")]
    assert users == ["libvirt-qemu", "libvirt-qemu", "root"], found
    assert (tmp_path / "written").read_bytes() == sector * 2
    must("check", folder / "vm.fvd")
