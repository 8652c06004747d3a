"""`fvdfs doctor`: what works on this host, for this user, what does not, and what to do about it. Blocks.

Each check tries the thing itself where it can: a folder is mounted, a ring of io_uring made. What every mount needs
decides the exit code; the rest makes mounts faster, or opens more formats.
"""

from __future__ import annotations

import glob
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fvdfs.commands.rows import in_columns
from fvdfs.commands.terminal import plain_console
from fvdfs.daemon import run_loop
from fvdfs.store.qemu_words import PROGRAM
from fvdfs.store.uring import use_ring

FEW_DESCRIPTORS = 16384  # each image takes one, and one for each that it stands on
PASSTHROUGH_SINCE = (6, 9)  # Linux
MOUNT_PATIENCE = 60  # seconds
WIDE = 160  # columns, where there is no terminal
MODULES = ("/usr/lib/*/qemu/block-*.so", "/usr/lib*/qemu*/block-*.so")


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one thing."""

    name: str
    works: bool
    found: str
    advice: str = ""
    """What to do, where it does not work."""
    needed: bool = False
    """Whether no mount works without it."""


def run(*, as_json: bool) -> int:
    """Show what works. The exit code: 0, or 1 where something is missing that every mount needs."""
    findings = [check() for check in CHECKS]
    works = all(finding.works for finding in findings if finding.needed)
    if as_json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        cells = [(each.name, _verdict(each), "; ".join(filter(None, (each.found, each.advice)))) for each in findings]
        width = plain_console().width if sys.stdout.isatty() else WIDE
        sys.stdout.write("".join(f"{line}\n" for line in in_columns(cells, width)))
    return 0 if works else 1


def _verdict(finding: Finding) -> str:
    return "works" if finding.works else "MISSING" if finding.needed else "no"


def _kernel() -> Finding:
    return Finding("kernel", True, f"{os.uname().sysname} {os.uname().release}, {os.uname().machine}")


def _fuse() -> Finding:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = "load it: modprobe fuse; a container needs --device /dev/fuse"
        return Finding("/dev/fuse", False, error.strerror or str(error), advice, needed=True)
    return Finding("/dev/fuse", True, "can be opened", needed=True)


def _fusermount() -> Finding:
    program = shutil.which("fusermount3", path=f"/usr/bin:/bin:{os.environ.get('PATH', '')}")
    if program is None:
        return Finding("fusermount3", False, "is not installed", "apt install fuse3", needed=True)
    if os.geteuid() and not os.stat(program).st_mode & 0o4000:
        advice = f"mount as root, or have root run: chmod u+s {program}"
        return Finding("fusermount3", False, f"{program} has not the privilege to mount", advice, needed=True)
    return Finding("fusermount3", True, program, needed=True)


def _fvdfs(*words: str) -> subprocess.CompletedProcess[str]:
    """Raises TimeoutExpired."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    return subprocess.run(
        [sys.executable, "-P", "-m", "fvdfs", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=MOUNT_PATIENCE,
        check=False,
    )


def _mount() -> Finding:
    with tempfile.TemporaryDirectory(prefix="fvdfs-doctor-") as folder:
        images, disks = (os.path.join(folder, name) for name in ("images", "disks"))
        os.mkdir(images)
        os.mkdir(disks)
        try:
            done = _fvdfs("mount", images, disks)
        except subprocess.TimeoutExpired:
            return Finding("mount", False, f"is not ready after {MOUNT_PATIENCE} s", needed=True)
        if done.returncode:
            lines = done.stderr.strip().replace("fvdfs: ", "").splitlines()
            return Finding("mount", False, lines[-1] if lines else f"exit code {done.returncode}", needed=True)
        _fvdfs("umount", disks)
    return Finding("mount", True, "a folder was mounted and unmounted", needed=True)


def _allow_other() -> Finding:
    if not os.geteuid():
        return Finding("--allow-other", True, "root may")
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as file:
            allowed = any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        allowed = False
    if allowed:
        return Finding("--allow-other", True, "/etc/fuse.conf lets users")
    return Finding("--allow-other", False, "is for root alone", "write user_allow_other into /etc/fuse.conf")


def _descriptors() -> Finding:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY or hard >= FEW_DESCRIPTORS:
        return Finding("open files", True, f"up to {hard}" if hard >= 0 else "without a limit")
    advice = "raise it: LimitNOFILE= of the unit, or /etc/security/limits.conf"
    return Finding("open files", False, f"at most {hard}, too few for many images or long chains", advice)


def _io_uring() -> Finding:
    async def try_it() -> bool:
        async with use_ring() as made:
            return made

    if run_loop(try_it):
        return Finding("io_uring", True, "disks are waited for by the kernel")
    advice = "sysctl kernel.io_uring_disabled=0; containers need a seccomp profile with io_uring"
    return Finding("io_uring", False, "the kernel does not give it, or the processor is not x86: slower", advice)


def _passthrough() -> Finding:
    release = os.uname().release
    if tuple(int(part) for part in release.split("-")[0].split(".")[:2]) < PASSTHROUGH_SINCE:
        return Finding(
            "passthrough", False, f"Linux {release} has none: disks with a data file are slower", "Linux 6.9"
        )
    if os.geteuid():
        return Finding("passthrough", False, "is for root alone", "mount as root, where it matters")
    return Finding("passthrough", True, "disks with a raw data file, with -o writeback=off or auto")


def _qemu() -> Finding:
    program = shutil.which(PROGRAM)
    if program is None:
        advice = "apt install qemu-system-common"
        return Finding("QEMU", False, f"{PROGRAM} is missing: bases are raw or FVD files", advice)
    done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return Finding("QEMU", True, f"{(done.stdout.splitlines() or [''])[0]}: qcow2, vmdk, nbd and more")


def _qemu_drivers() -> Finding:
    found = sorted(
        {
            os.path.basename(path).removeprefix("block-").partition(".")[0]
            for name in MODULES
            for path in glob.glob(name)
        }
    )
    if found:
        return Finding("QEMU's drivers", True, ", ".join(found))
    advice = "apt install qemu-block-extra"
    return Finding("QEMU's drivers", False, "no modules: https, ssh, iscsi, nfs, rbd may be missing", advice)


def _read_ahead() -> Finding:
    if os.geteuid():
        return Finding("read-ahead", False, "only root sets the kernel's: long reads are slower", "mount as root")
    return Finding("read-ahead", os.access("/sys/class/bdi", os.W_OK), "of mounts: /sys/class/bdi")


def _log() -> Finding:
    if os.path.exists("/dev/log"):
        return Finding("system's log", True, "/dev/log")
    return Finding("system's log", False, "there is none", "give mounts --log-file FILE")


CHECKS: tuple[Callable[[], Finding], ...] = (
    *(_kernel, _fuse, _fusermount, _mount, _allow_other, _descriptors),
    *(_io_uring, _passthrough, _read_ahead, _qemu, _qemu_drivers, _log),
)
