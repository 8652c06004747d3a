"""`fvdfs diff`, `export` and `restore`: what has changed since a snapshot, carried to a copy of that."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fvdfs.format.note import NOTE_OFFSET
from support import reference
from support.devices import loop_device, small_disk
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted, must, running

SIZE = 24 * MIB


def refuses(*words: str | Path, code: int = 2) -> str:
    """The one line that a command ends with."""
    done = fvdfs(*words)
    assert (done.code, done.err.count("\n"), done.out) == (code, 1, ""), done
    return done.err


def diff(disk: str | Path, *words: str | Path) -> list[tuple[int, int, bool]]:
    """The changes (start, stop, data), which are in order and not adjacent to others of their kind."""
    found = [
        (extent["start"], extent["start"] + extent["length"], extent["data"])
        for extent in json.loads(must("diff", disk, "--json", *words))["extents"]
    ]
    for (_, stop, data), (start, _, other) in pairwise(found):
        assert stop < start or (stop == start and data is not other)
    return found


def change(mount: Mount, name: str, seed: int, *, count: int = 12) -> None:
    """Write data and zeros, and discard, at random places of a disk."""
    source = random.Random(seed)
    with open(mount.raw(name), "r+b", buffering=0) as disk:
        size = os.fstat(disk.fileno()).st_size
        for number in range(count):
            start = source.randrange(0, size // 512) * 512
            length = min(source.choice((512, 4096, 70_000, 300_000)), size - start)
            if number % 3 == 2:
                done = subprocess.run(
                    ["fallocate", "-p", "-o", str(start), "-l", str(length), mount.raw(name)], check=False
                )
                assert done.returncode == 0
            else:
                disk.seek(start)
                disk.write(source.choice((source.randbytes, source.randbytes, bytes))(length))


def contents(mount: Mount, *names: str) -> list[bytes]:
    return [mount.raw(name).read_bytes() for name in names]


LAYOUTS: dict[str, tuple[str, ...]] = {
    "flat": (),
    "compact": ("--compact", "--chunk-size", "64K"),
    "data file": ("--data-file", "auto"),
    "large blocks": ("--block-size", "24K"),
}


def states(folder: Path, layout: str = "flat", sizes: tuple[int, int, int] = (SIZE, SIZE, SIZE)) -> list[bytes]:
    """vm.fvd on vm@tue.fvd on vm@mon.fvd on t.raw; the content of mon, tue and the disk."""
    with open(folder / "t.raw", "wb") as file:
        file.truncate(sizes[0])
        file.write(random.Random(1).randbytes(3 * MIB))
        file.seek(16 * MIB)
        file.write(random.Random(2).randbytes(3 * MIB))
    base, found = "t.raw", []
    with mounted(folder) as mount:
        for number, name in enumerate(("vm@mon", "vm@tue", "vm")):
            kind = ("-F", "raw") if base == "t.raw" else ("-F", "fvd")
            must("create", folder / f"{name}.fvd", str(sizes[number]), "-b", base, *kind, *LAYOUTS[layout])
            base = f"{name}.fvd"
            change(mount, name, number)
            found += contents(mount, name)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diff_lists_what_has_changed(folder: Path, layout: str) -> None:
    """All that differs, and of zeros only what reads as zeros; unchanged blocks are no part of it."""
    mon, tue, now = states(folder, layout)
    for disk, since, old, new in (
        ("vm.fvd", "tue", tue, now),
        ("vm.fvd", "mon", mon, now),
        ("vm.fvd@tue", "mon", mon, tue),
        ("vm@tue.fvd", folder / "vm@mon.fvd", mon, tue),
    ):
        found = diff(folder / disk, "--since", since)
        assert found
        patched = bytearray(old)
        for start, stop, data in found:
            assert data or not any(new[start:stop])
            patched[start:stop] = new[start:stop]
        assert patched == new
        assert sum(stop - start for start, stop, _ in found) < 5 * MIB
    assert {data for _, _, data in diff(folder / "vm.fvd", "--since", "mon")} == {True, False}
    everything = bytearray(SIZE)
    for start, stop, data in diff(folder / "vm.fvd"):
        assert data
        everything[start:stop] = now[start:stop]
    assert everything == now
    assert diff(folder / "vm.fvd", "--since", folder / "t.raw")


def test_diff_in_words(folder: Path) -> None:
    must("create", folder / "vm@mon.fvd", "1M")
    must("create", folder / "vm.fvd", "-b", "vm@mon.fvd", "-F", "fvd")
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as disk:
        disk.write(b"x" * 4096)
    assert must("diff", folder / "vm.fvd", "--since", "mon") == (
        f"{0:>16} {4096:>14}  data\ndata: 4 KiB (4096 bytes); zeros: 0 bytes\n"
    )
    assert must("diff", folder / "vm.fvd@mon") == "data: 0 bytes; zeros: 0 bytes\n"


def exported(folder: Path, kind: str, disk: str = "vm.fvd", since: str = "tue") -> Path:
    """What has changed, in a folder of its own."""
    target = folder.parent / f"backup-{since}.{kind}"
    must("export", folder / disk, "--since", since, target)
    return target


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fvd", "qcow2"])
def test_what_is_exported_is_restored(folder: Path, layout: str, kind: str) -> None:
    """Onto copies in all formats; and once more onto what has been restored."""
    _, _, now = states(folder, layout)
    export = exported(folder, kind)
    assert export.stat().st_blocks * 512 < 8 * MIB
    copies = folder.parent
    must("convert", folder / "vm@tue.fvd", copies / "copy.raw")
    must("convert", folder / "vm@tue.fvd", copies / "copy.fvd", "--compact", "--chunk-size", "64K")
    must("convert", folder / "vm@tue.fvd", copies / "copy.qcow2")
    shutil.copy(folder / "vm@tue.fvd", copies / "same.fvd")
    for name, words in (("copy.raw", ()), ("copy.fvd", ()), ("copy.qcow2", ("-O", "qcow2"))):
        for _ in range(2):
            must("restore", export, copies / name, *words)
        must("compare", folder / "vm.fvd", copies / name, *(("-F", "qcow2") if words else ()))
    assert (copies / "copy.raw").read_bytes() == now
    assert must("check", copies / "copy.fvd").endswith("clean\n")
    subprocess.run(["qemu-img", "check", "-q", copies / "copy.qcow2"], check=True)


def test_an_overlay_is_an_image_like_others(folder: Path) -> None:
    """For fvdfs, for the reader of the original's format, and for QEMU, over a raw copy that it names."""
    _, tue, now = states(folder)
    must("export", folder / "vm.fvd", "--since", "tue", folder / "new.fvd")
    must("compare", folder / "new.fvd", folder / "vm.fvd")
    assert must("check", folder / "new.fvd").endswith("clean\n")
    assert b"".join(reference.read_disk(folder / "new.fvd")) == now
    assert "what of vm.fvd has changed since vm@tue.fvd" in must("info", folder / "new.fvd")
    must("export", folder / "vm.fvd", "--since", "tue", folder / "new.qcow2")
    (folder / "vm@tue.raw").write_bytes(tue)
    subprocess.run(["qemu-img", "check", "-q", folder / "new.qcow2"], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", folder / "new.qcow2", folder / "all.raw"], check=True)
    assert (folder / "all.raw").read_bytes() == now
    with open(folder / "new.fvd", "r+b") as file:  # the note is damaged
        file.seek(NOTE_OFFSET + 40)
        file.write(b"~~~~")
    assert "header-padding" in must("check", folder / "new.fvd")
    assert "damaged" in refuses("restore", folder / "new.fvd", folder / "all.raw", code=1)


def test_a_chain_of_backups(folder: Path) -> None:
    """Each night what the day has changed: QEMU reads the last of them, and they restore one after the other."""
    mon, _, now = states(folder)
    backups = folder.parent
    (backups / "mon.raw").write_bytes(mon)
    must("export", folder / "vm.fvd@tue", "--since", "mon", backups / "tue.qcow2", "-b", "mon.raw")
    must("export", folder / "vm.fvd", "--since", "tue", backups / "wed.qcow2", "-b", "tue.qcow2", "-F", "qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "raw", backups / "wed.qcow2", backups / "all.raw"], check=True)
    assert (backups / "all.raw").read_bytes() == now
    shutil.copy(backups / "mon.raw", backups / "copy.raw")
    assert "copy.raw: is not vm@tue.fvd" in refuses("restore", backups / "wed.qcow2", backups / "copy.raw")
    assert (backups / "copy.raw").read_bytes() == mon
    must("restore", backups / "tue.qcow2", backups / "copy.raw")
    must("restore", backups / "wed.qcow2", backups / "copy.raw")
    assert (backups / "copy.raw").read_bytes() == now


@pytest.mark.parametrize("kind", ["fvd", "qcow2"])
@pytest.mark.parametrize("size", [SIZE + 5 * MIB + 512, SIZE - 5 * MIB - 512])
def test_a_disk_of_another_size(folder: Path, kind: str, size: int) -> None:
    _, tue, now = states(folder, sizes=(SIZE, SIZE, size))
    export = exported(folder, kind)
    for target in ("copy.raw", "copy.fvd"):
        must("convert", folder / "vm@tue.fvd", folder.parent / target)
        must("restore", export, folder.parent / target)
        must("compare", "-s", folder / "vm.fvd", folder.parent / target)
    assert (folder.parent / "copy.raw").read_bytes() == now
    (folder.parent / "half.raw").write_bytes(tue + bytes(max(0, size - SIZE)))  # it had grown when it was interrupted
    must("restore", export, folder.parent / "half.raw")
    assert (folder.parent / "half.raw").read_bytes() == now


def test_a_device_and_a_raw_file_in_a_mount(folder: Path) -> None:
    """What follows the earlier state on a device becomes zeros, as far as the disk has grown."""
    size = SIZE + 5 * MIB
    _, tue, now = states(folder, sizes=(SIZE, SIZE, size))
    export, backing = exported(folder, "qcow2"), folder.parent / "backing"
    with open(backing, "wb") as file:
        file.write(tue + b"\xa5" * (size + MIB - SIZE))
    with loop_device(backing) as device:
        must("restore", export, device)
        assert device.read_bytes() == now + b"\xa5" * MIB
    (folder / "more").mkdir()
    must("convert", folder / "vm@tue.fvd", folder / "more/copy.fvd")
    with mounted(folder / "more") as mount:
        must("restore", export, mount.raw("copy"))
        assert mount.raw("copy").read_bytes() == now
    with open(backing, "r+b") as file:
        file.truncate(SIZE)
    with loop_device(backing) as device:
        assert f"{size} are needed" in refuses("restore", export, device, code=1)


def test_a_disk_that_has_grown_by_terabytes(folder: Path) -> None:
    """The zeros behind its former end take nothing."""
    must("create", folder / "vm@mon.fvd", "8M")
    must("create", folder / "vm.fvd", "4T", "-b", "vm@mon.fvd", "-F", "fvd")
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as disk:
        disk.seek(2 << 40)
        disk.write(b"x" * 4096)
    (folder / "copy.raw").write_bytes(bytes(8 * MIB))
    for kind in ("fvd", "qcow2"):
        export = exported(folder, kind, since="mon")
        assert export.stat().st_blocks * 512 < MIB
        must("restore", export, folder / "copy.raw")
        must("compare", "-s", folder / "vm.fvd", folder / "copy.raw")


def test_nights_of_a_machine_that_runs(folder: Path) -> None:
    """Snapshots by fvdfs, exports while the disk is written, restored in turn."""
    must("create", folder / "vm.fvd", "24M", "--compact", "--chunk-size", "64K")
    backups, nights = folder.parent, ["mon", "tue", "wed", "thu"]
    found = []
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as disk:
        for number, night in enumerate(nights):
            change(mount, "vm", number)
            must("snapshot", mount.raw("vm"), night)
            found += contents(mount, "vm")
            disk.seek(number * 512)
            disk.write(b"x" * 512)  # it goes on
            if number:
                before = nights[number - 1]
                target = backups / f"{night}.{'qcow2' if number % 2 else 'fvd'}"
                must("export", mount.point / f"vm.raw@{night}", "--since", before, target)
                assert diff(folder / f"vm@{night}.fvd", "--since", before)
        must("convert", folder / "vm@mon.fvd", backups / "copy.raw")
    for number, night in enumerate(nights[1:], 1):
        (export,) = backups.glob(f"{night}.*")
        must("restore", export, backups / "copy.raw")
        assert (backups / "copy.raw").read_bytes() == found[number]
    later = next(backups.glob("tue.*"))
    assert "is not vm@mon.fvd" in refuses("restore", later, backups / "copy.raw")


def test_files_of_another_user(folder: Path) -> None:
    """Nobody reads or writes by these commands what he could not otherwise. Who may not read the disk reads no copy."""
    states(folder)
    export = exported(folder, "qcow2")
    (folder / "vm@mon.fvd").chmod(0o640)
    must("export", folder / "vm.fvd", "--since", "tue", folder / "new.qcow2")
    assert (folder / "new.qcow2").stat().st_mode & 0o777 == 0o640
    shared = Path(tempfile.mkdtemp(prefix="fvdfs-test-"))
    try:
        shared.chmod(0o755)
        for name in ("t.raw", "vm@mon.fvd", "vm@tue.fvd", "vm.fvd"):
            shutil.copy(folder / name, shared)
        shutil.copy(export, shared / "export.qcow2")
        (shared / "export.qcow2").chmod(0o644)
        (shared / "vm.fvd").chmod(0o600)
        shutil.copy(shared / "vm@tue.fvd", shared / "copy.fvd")
        (shared / "copy.raw").write_bytes(bytes(SIZE))
        for path in shared.iterdir():
            if path.name not in ("vm.fvd", "export.qcow2"):
                path.chmod(0o644)
        for words in (
            ("diff", "vm.fvd", "--since", "tue"),
            ("export", "vm.fvd", "--since", "tue", "new.qcow2"),
            ("export", "vm@tue.fvd", "--since", "mon", "new.qcow2"),
            ("restore", "export.qcow2", "copy.raw"),
            ("restore", "export.qcow2", "copy.fvd"),
            ("compare", "vm.fvd", "vm.fvd"),
        ):
            paths = [str(shared / word) if "." in word else word for word in words]
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *FVDFS, *paths]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
            assert done.stderr.startswith("fvdfs: ")
            assert "ermission" in done.stderr
            assert (done.returncode, done.stderr.count("\n")) == (2 if words[0] == "compare" else 1, 1), done
        assert must("diff", shared / "vm.fvd", "--since", "tue")
    finally:
        shutil.rmtree(shared)


def test_a_running_disk(folder: Path) -> None:
    """Its snapshots are exported; of itself it is said what to do."""
    _, tue, _ = states(folder)
    with mounted(folder) as mount, open(mount.raw("vm"), "r+b", buffering=0) as disk:
        disk.write(b"not yet in a snapshot")
        assert diff(mount.point / "vm.raw@tue", "--since", "mon") == diff(folder / "vm.fvd@tue", "--since", "mon")
        must("export", folder / "vm.fvd@tue", "--since", "mon", folder / "tue.qcow2")
        for name in (folder / "vm.fvd", mount.raw("vm")):
            for words in (("diff", name), ("export", name, folder / "new.qcow2")):
                error = refuses(*words, "--since", "tue", code=1)
                assert f"fvdfs snapshot MOUNTPOINT/vm.raw NAME) and name that, {folder}/vm.fvd@NAME" in error
        disk.seek(0)
        assert disk.read(9) == b"not yet i"
    must("convert", folder / "vm@mon.fvd", folder / "copy.raw")
    must("restore", folder / "tue.qcow2", folder / "copy.raw")
    assert (folder / "copy.raw").read_bytes() == tue


def test_what_is_refused(folder: Path) -> None:
    _, tue, _ = states(folder)
    vm, export = folder / "vm.fvd", exported(folder, "qcow2")
    for words, text in (
        (("diff", folder / "nosuch.fvd"), "there is no such file"),
        (("diff", f"{vm}@nosuch"), "there is no file"),
        (("diff", vm, "--since", "nosuch"), "there is no file"),
        (("diff", vm, "--since", vm), "is " + str(vm) + " itself"),
        (("diff", f"{vm}@mon", "--since", "tue"), "does not stand on"),
        (("export", vm, "--since", "mon", folder / "new"), "--format fvd or qcow2"),
        (("export", vm, "--since", "mon", folder / "new.qcow2", "-F", "raw"), "give --base"),
        (("export", vm, "--since", "mon", folder / "vm@tue.fvd", "--force"), "would overwrite"),
        (("export", vm, "--since", "mon", export), "exists already"),
        (("export", vm, "--since", "mon", folder, "--format", "qcow2"), "is a file"),
        (("restore", export, folder / "nosuch.raw"), "there is no such file"),
        (("restore", export, folder / "vm@tue.fvd"), "is the base of"),
        (("restore", export, folder / "t.raw"), "is the base of"),
        (("restore", export, export, "-O", "raw"), "is the export itself"),
        (("restore", folder / "t.raw", folder / "t.raw"), "is neither an FVD nor a qcow2 image"),
        (("restore", vm, export, "-O", "qcow2"), "fvdfs export has not made"),
    ):
        assert text in refuses(*words)
    copy = folder.parent / "copy.raw"
    copy.write_bytes(tue[: -512 * 9])
    assert f"has {SIZE - 512 * 9} bytes, and not {SIZE}" in refuses("restore", export, copy)
    changed = [(start, stop) for start, stop, _ in diff(vm, "--since", "tue")]
    unchanged = [(stop, start) for (_, stop), (start, _) in pairwise(changed)]
    for parts in (changed, unchanged):  # either is enough
        start, stop = max(parts, key=lambda part: part[1] - part[0])
        other = bytearray(tue)
        other[start:stop] = random.Random(start).randbytes(stop - start)
        (folder / "other.raw").write_bytes(other)
        assert "nothing was written" in refuses("restore", export, folder / "other.raw")
        assert (folder / "other.raw").read_bytes() == other
    must("restore", "--force", export, folder / "other.raw")


def test_the_base_that_is_chosen(folder: Path) -> None:
    _, tue, now = states(folder)
    (folder / "copy.raw").write_bytes(tue)
    must("export", folder / "vm.fvd", "--since", "tue", folder / "new.fvd", "-b", "copy.raw", "-F", "raw")
    assert b"".join(reference.read_disk(folder / "new.fvd")) == now
    must("restore", folder / "new.fvd", folder / "copy.raw")  # the only one that stands on it
    assert (folder / "copy.raw").read_bytes() == now


def test_a_base_of_another_size_is_refused(folder: Path) -> None:
    states(folder)
    (folder / "small.raw").write_bytes(bytes(MIB))
    before = sorted(folder.iterdir())
    error = refuses("export", folder / "vm.fvd", "--since", "tue", folder / "new.fvd", "-b", "small.raw", "-F", "raw")
    assert "another size than the earlier state" in error
    assert sorted(folder.iterdir()) == before


def test_a_full_disk(folder: Path) -> None:
    """An export leaves nothing, and a restore is finished once there is room."""
    _, _, now = states(folder)
    export = exported(folder, "qcow2", since="mon")
    point = folder.parent / "small"
    with small_disk(point, "1M") as resize:
        error = refuses("export", folder / "vm.fvd", "--since", "mon", point / "new.qcow2", code=1)
        assert "No space left" in error
        assert not list(point.iterdir())
        resize("64M")
        must("convert", folder / "vm@mon.fvd", point / "copy.raw")
        used = os.statvfs(point)
        resize(str((used.f_blocks - used.f_bfree) * used.f_bsize + 200_000))
        assert "No space left" in refuses("restore", export, point / "copy.raw", code=1)
        resize("64M")
        must("restore", export, point / "copy.raw")
        assert (point / "copy.raw").read_bytes() == now


@pytest.mark.parametrize("target", ["copy.raw", "copy.fvd", "copy.qcow2"])
def test_a_restore_that_was_killed_is_repeated(folder: Path, target: str) -> None:
    """At any moment; each time it begins on what the last one has left."""
    must("create", folder / "vm@mon.fvd", "64M")
    must("create", folder / "vm.fvd", "-b", "vm@mon.fvd", "-F", "fvd")
    with mounted(folder) as mount:
        for name in ("vm@mon", "vm"):
            with open(mount.raw(name), "r+b", buffering=0) as disk:
                disk.write(random.Random(name).randbytes(64 * MIB))
    export, copy = exported(folder, "fvd", since="mon"), folder.parent / target
    must("convert", folder / "vm@mon.fvd", copy)
    words = ["-O", "qcow2"] if target.endswith("qcow2") else []
    moments = random.Random(3)
    for _ in range(6):
        with running(*FVDFS, "restore", export, copy, *words, stderr=subprocess.DEVNULL) as process:
            time.sleep(moments.uniform(0.3, 0.9))
            process.send_signal(moments.choice((signal.SIGKILL, signal.SIGINT)))
            process.wait(30)
    must("restore", export, copy, *words)
    must("compare", folder / "vm.fvd", copy, *(["-F", "qcow2"] if words else []))
