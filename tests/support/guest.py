"""Run programs, and boot small Linux guests under QEMU, for the tests.

A guest is Debian's cloud kernel with a busybox initrd that runs one shell script:

    initrd = build_initrd(tmp_path, "echo hello > /dev/vda")
    log = boot(disk, initrd, cache="none", timeout=60)
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGES = {
    "blkdiscard": "util-linux",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "fallocate": "util-linux",
    "fio": "fio",
    "fstrim": "util-linux",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "modprobe": "kmod",
    "mount": "mount",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "tar": "tar",
    "umount": "mount",
    "xfs_repair": "xfsprogs",
}
"""The Debian package that has each program."""

_KERNEL_PACKAGE = "linux-image-cloud-amd64"
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_TAIL = 4000


class CommandError(Exception):
    """A program failed or did not end in time, or a guest did not finish its script."""


class MissingProgram(Exception):
    """A program the tests need is not installed."""


def find_program(name: str) -> str:
    """The full path of a program."""
    path = shutil.which(name, path=_SEARCH_PATH)
    if path is None:
        package = PACKAGES.get(name, name)
        raise MissingProgram(f"{name} is not installed: it is in the Debian package {package}")
    return path


def run(
    program: str,
    *arguments: str | os.PathLike[str],
    check: bool = True,
    timeout: float = 60,
    cwd: Path | None = None,
    stdin: bytes = b"",
) -> str:
    """Run a program; return what it wrote to standard output and standard error.

    A non-zero exit status (with `check`) raises CommandError with the end of the output, as
    does a program that has not ended after `timeout` seconds, which is killed.
    """
    command = [find_program(program), *(os.fspath(argument) for argument in arguments)]
    # Files, not pipes: a child stuck in the kernel must not hold up the test that gives up on it.
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        source.write(stdin)
        source.seek(0)
        process = subprocess.Popen(command, stdin=source, stdout=sink, stderr=sink, cwd=cwd, start_new_session=True)
        status: int | None = None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                _kill(process)
        sink.seek(0)
        output = sink.read().decode(errors="replace")
    if status is None or (check and status != 0):
        what = f"not done after {timeout:g} s" if status is None else f"exit status {status}"
        raise CommandError(f"{shlex.join(command)}: {what}\n{output[-_TAIL:]}")
    return output


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def find_kernel() -> tuple[Path, str]:
    """The newest installed cloud kernel's image, and its version."""
    found = [(image, image.name.removeprefix("vmlinuz-")) for image in Path("/boot").glob("vmlinuz-*-cloud-amd64")]
    usable = [(image, version) for image, version in found if _modules_directory(version).is_dir()]
    if not usable:
        raise MissingProgram(
            "there is no /boot/vmlinuz-*-cloud-amd64 with its modules in /lib/modules:"
            f" they are in the Debian package {_KERNEL_PACKAGE}"
        )
    return max(usable, key=lambda item: [int(part) for part in re.findall(r"\d+", item[1])])


def _modules_directory(version: str) -> Path:
    return Path("/lib/modules", version)


def _module_files(version: str, modules: Iterable[str]) -> list[Path]:
    """The files of these modules and of all they need, in the order to load them."""
    files: dict[Path, None] = {}
    for module in modules:
        for line in run("modprobe", "-S", version, "--show-depends", module).splitlines():
            action, _, rest = line.partition(" ")
            if action == "insmod":
                files[Path(rest.split()[0])] = None
            elif action != "builtin":
                raise CommandError(f"modprobe --show-depends {module} printed: {line}")
    return list(files)


_INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc /sys /tmp
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do
    insmod "$module" || echo "cannot load $module"
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do
    sleep 0.1
    tries=$((tries + 1))
done
echo GUEST-START
sh -eu /script
echo "GUEST-EXIT $?"
sync
poweroff -f
"""


def build_initrd(dir: Path, init_script: str, extra_modules: Iterable[str] = (), programs: Iterable[Path] = ()) -> Path:
    """Make an initrd in the directory `dir` whose guest runs a shell script; return its path.

    The script runs under `sh -eu` with all of busybox in PATH and with /dev, /proc and /sys
    mounted; the disk is /dev/vda. The guest powers off when the script ends. `extra_modules`
    names kernel modules to load besides those of the disk ("ext4", say); `programs`, linked statically, are in PATH.
    """
    _, version = find_kernel()
    root = dir / "initrd.d"
    if root.exists():
        shutil.rmtree(root)
    (root / "bin").mkdir(parents=True)
    (root / "modules").mkdir()
    for program in (Path(find_program("busybox")), *programs):
        shutil.copy(program, root / "bin")
    modules = ["virtio_pci", "virtio_blk", *extra_modules]
    for number, module in enumerate(_module_files(version, modules)):
        content = module.read_bytes()
        if module.suffix == ".xz":
            content = lzma.decompress(content)
        (root / f"modules/{number:03d}-{module.name.removesuffix('.xz')}").write_bytes(content)
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    (root / "script").write_text(init_script)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    initrd = dir / "initrd.cpio"
    run(
        "cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "-O", initrd,
        cwd=root,
        stdin="".join(f"{name}\n" for name in names).encode(),
    )  # fmt: skip
    shutil.rmtree(root)
    return initrd


def drive(disk: Path, cache: str) -> list[str]:
    """QEMU's arguments for a raw file as a virtio disk; `cache` is the cache mode, further options may follow it."""
    name = str(disk).replace(",", ",,")
    return ["-drive", f"file={name},format=raw,if=virtio,cache={cache}"]


def boot_arguments(disk: Path, initrd: Path, cache: str) -> list[str | Path]:
    """QEMU's arguments to boot a guest with a raw file as its disk; `cache` as in `drive`."""
    kernel, _ = find_kernel()
    # Always emulated: that /dev/kvm can be opened does not mean that guests run under it.
    return [
        "-accel", "tcg", "-cpu", "max", "-m", "256", "-nographic", "-no-reboot", "-nic", "none",
        "-kernel", kernel,
        "-initrd", initrd,
        "-append", "console=ttyS0 panic=-1 quiet no_timer_check",
        *drive(disk, cache),
    ]  # fmt: skip


def boot(
    disk: Path,
    initrd: Path,
    *,
    cache: str,
    timeout: float,
    extra_args: Sequence[str] = (),
    check: bool = True,
) -> str:
    """Boot a guest with a raw file as its disk; return its console log when it has powered off.

    `cache` as in `drive` ("none,aio=native").
    CommandError, with the end of the log, is raised if the guest is not off after `timeout`
    seconds (it is killed then) or, with `check`, if its kernel panicked or its script did not
    end with exit status 0. `extra_args` are further arguments for QEMU, such as more drives (/dev/vdb, ...).
    """
    output = run("qemu-system-x86_64", *boot_arguments(disk, initrd, cache), *extra_args, timeout=timeout)
    log = output.replace("\r", "")
    finished = re.search(r"^GUEST-EXIT 0$", log, re.MULTILINE)
    if check and ("Kernel panic" in log or not finished):
        raise CommandError(f"the guest did not finish its script:\n{log[-_TAIL:]}")
    return log
