"""Where data is stored: on devices with and without a file system's help, and zeros that need no place."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fvdfs.store.host import open_path
from support import reference
from support.devices import OLD, Device, device
from support.guest import boot, build_initrd
from support.guest import run as run_program
from support.mounts import MIB, fvdfs, mounted, must, wait_for_log, wait_until


def write_at(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LAYOUTS = {
    "plain": [],
    "compact": ["--compact", "--chunk-size", "64K", "--journal-size", "64K"],
    "cow": ["--base", "BASE", "--block-size", "64K", "--journal-size", "64K"],
    "cow with holes": ["--base", "BASE", "--block-size", "4K", "--journal-size", "64K", "--detect-holes", "64K"],
    "compact cow": ["--base", "BASE", "--compact", "--chunk-size", "128K", "--block-size", "8K"],
}


@pytest.mark.parametrize("where", ["image on a device", "data on a device"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_a_former_owner_shows(folder: Path, tmp_path: Path, layout: str, where: str) -> None:
    chance = random.Random(layout)
    base = bytearray(chance.randbytes(2 * MIB))
    base[MIB : MIB + 300_000] = bytes(300_000)
    (folder / "base.raw").write_bytes(base)
    options = [str(folder / "base.raw") if option == "BASE" else option for option in LAYOUTS[layout]]
    size = 4 * MIB
    content = bytearray(bytes(base) + bytes(2 * MIB)) if "cow" in layout else bytearray(size)
    with device(tmp_path / "disk.img", 32 * MIB) as disk:
        if where == "image on a device":
            image = folder / "disk.fvd"
            assert fvdfs("create", disk.path, str(size), *options).err.count("--force") == 1
            must("create", disk.path, str(size), *options, "--force")
            os.symlink(disk.path, image)
        else:
            image = folder / "disk.fvd"
            must("create", image, str(size), *options, "--data-file", disk.path, "--force")
        with mounted(folder, "-o", f"base_path={disk.path}") as mount:
            raw = mount.raw("disk")
            assert raw.read_bytes() == content
            for _ in range(40):
                offset, data = chance.randrange(size - 9000), chance.randbytes(chance.randrange(1, 9000))
                write_at(raw, offset, data)
                content[offset : offset + len(data)] = data
            assert raw.read_bytes() == content
            mount.remount()
            assert raw.read_bytes() == content
            mount_options = mount.raw("disk").stat()
            assert mount_options.st_size == size
        assert OLD[:16] not in raw_content(image)
        assert raw_content(image) == content
        assert reference.check(image) == []


async def test_a_device_is_zeroed_beside_what_is_still_in_memory(tmp_path: Path) -> None:
    """The kernel refuses to give up a page of a claimed device that is not on the disk yet."""
    with device(tmp_path / "disk.img", MIB) as disk:
        store = open_path(str(disk.path), writable=True)
        store.claim_device()
        await store.pwrite(b"kept" * 150, 4000)
        await store.zero(4608, 8192)
        found = bytearray(16384)
        await store.pread(memoryview(found), 0)
        await store.aclose()
    old = (OLD * 1000)[:16384]
    assert found[4000:4600] == b"kept" * 150
    assert found[:4000] == old[:4000]
    assert found[4608:12800] == bytes(8192)
    assert found[12800:] == old[12800:]


def raw_content(image: Path) -> bytes:
    return b"".join(reference.read_disk(image))


def grow_script(path: Path, disk: Device, code: int = 0) -> Path:
    """A program that grows the loop device as it is told, and keeps a record."""
    path.write_text(
        f'#!/bin/sh\necho asked for $1 on $2\necho "$1 $2" >> {path}.log\n'
        f"truncate -s +$1 {disk.backing} && losetup -c {disk.path}\nexit {code}\n"
    )
    path.chmod(0o755)
    return path


def test_a_device_grows_by_the_command_that_the_mount_allows(folder: Path, tmp_path: Path) -> None:
    with device(tmp_path / "disk.img", 8 * MIB) as disk:
        script = grow_script(tmp_path / "grow", disk)
        stored = f"{script} --"  # one word more, and no shell: `--` reaches the script as its first argument
        image = folder / "disk.fvd"
        os.symlink(disk.path, image)
        must(
            "create", disk.path, "64M", "--compact", "--chunk-size", "1M", "--grow-unit", "8M", "--journal-size", "64K",
            "--grow-command", stored, "--force",
        )  # fmt: skip
        with mounted(folder, "-o", "writeback=off") as mount:
            write_at(mount.raw("disk"), 0, b"1" * 6 * MIB)
            assert 6 * MIB < mount.raw("disk").stat().st_blocks * 512 < 7 * MIB
            with pytest.raises(OSError, match="No space"):
                write_at(mount.raw("disk"), 6 * MIB, b"2" * 6 * MIB)
            assert f"({stored}) with -o grow_command=stored" in mount.log
            # Nothing else is lost, and writing works again after space was added.
            assert mount.raw("disk").read_bytes()[: 6 * MIB] == b"1" * 6 * MIB
            disk.grow(16 * MIB)
            write_at(mount.raw("disk"), 6 * MIB, b"2" * 6 * MIB)
        assert not Path(f"{script}.log").exists(), "a command of the image was run without leave"
        with mounted(folder, "-o", f"grow_command={script}") as mount:
            for at in range(12, 48, 4):
                write_at(mount.raw("disk"), at * MIB, b"%d" % (at % 10) * 4 * MIB)
            wait_for_log(mount, f"grow: asked for {8 * MIB} on {disk.path}")
        records = Path(f"{script}.log").read_text().splitlines()
        assert len(records) >= 4
        assert set(records) == {f"{8 * MIB} {disk.path}"}
        expected = b"1" * 6 * MIB + b"2" * 6 * MIB
        expected += b"".join(b"%d" % (at % 10) * 4 * MIB for at in range(12, 48, 4)) + bytes(16 * MIB)
        assert raw_content(image) == expected
        assert reference.check(image, "fvdfs") == []


def test_a_stored_command_is_split_into_words_and_no_shell_runs(folder: Path, tmp_path: Path) -> None:
    with device(tmp_path / "disk.img", 8 * MIB) as disk:
        script = tmp_path / "grow it"
        script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit 3\n')
        script.chmod(0o755)
        os.symlink(disk.path, folder / "disk.fvd")
        must(
            "create", disk.path, "64M", "--compact", "--journal-size", "64K", "--force",
            "--grow-command", f"'{script}' 'a b' ; touch {tmp_path}/pwned",
        )  # fmt: skip
        with mounted(folder, "-o", "grow_command=stored,writeback=off") as mount:
            with pytest.raises(OSError, match="No space"):
                write_at(mount.raw("disk"), 0, b"x" * 16 * MIB)
            assert "failed with code 3" in mount.log
        words = (tmp_path / "words").read_text().splitlines()
        assert words[:4] == ["a b", ";", "touch", f"{tmp_path}/pwned"]
        assert words[-1] == str(disk.path)
        assert not (tmp_path / "pwned").exists()


def test_while_a_device_grows_others_go_on(folder: Path, tmp_path: Path) -> None:
    with device(tmp_path / "disk.img", 4 * MIB) as disk:
        began, may_end = tmp_path / "began", tmp_path / "may-end"
        script = tmp_path / "slow"
        script.write_text(
            f"#!/bin/sh\ntouch {began}\nwhile [ ! -e {may_end} ]; do sleep 0.05; done\n"
            f"truncate -s +$1 {disk.backing} && losetup -c {disk.path}\n"
        )
        script.chmod(0o755)
        os.symlink(disk.path, folder / "disk.fvd")
        must("create", disk.path, "64M", "--compact", "--journal-size", "64K", "--force")
        with mounted(folder, "-o", f"grow_command={script},writeback=off") as mount:
            raw = mount.raw("disk")
            write_at(raw, 0, b"0" * 2 * MIB)
            waiting = threading.Thread(target=write_at, args=(raw, 8 * MIB, b"8" * 4 * MIB))
            waiting.start()
            try:
                wait_until(began.exists)
                descriptor = os.open(raw, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    assert os.pread(descriptor, 4, MIB) == b"0000"
                finally:
                    os.close(descriptor)
                assert waiting.is_alive()
            finally:
                may_end.touch()
                waiting.join(timeout=20)
            assert raw.read_bytes()[8 * MIB : 12 * MIB] == b"8" * 4 * MIB


def test_a_device_in_use_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with device(tmp_path / "disk.img", 16 * MIB) as disk:
        subprocess.run(["mkfs.ext4", "-q", "-F", disk.path], check=True)
        point = tmp_path / "fs"
        point.mkdir()
        subprocess.run(["mount", disk.path, point], check=True)
        try:
            done = fvdfs("create", disk.path, "1M", "--force")
            assert done.code == 1
            assert "the device is in use" in done.err
        finally:
            subprocess.run(["umount", point], check=True)
        done = fvdfs("create", disk.path, "100M", "--force")
        assert "the device has 16777216 bytes" in done.err


@pytest.mark.slow
def test_a_guest_fills_a_device_that_grows(folder: Path, tmp_path: Path) -> None:
    """A compact image on a loop device of 1 GiB grows five times while the guest writes."""
    backing = tmp_path / "disk.img"
    backing.touch()
    os.truncate(backing, 1024 * MIB)
    loop = Path(run_program("losetup", "-f", "--show", str(backing)).strip())
    try:
        disk = Device(loop, backing)
        script = grow_script(tmp_path / "grow", disk)
        os.symlink(loop, folder / "disk.fvd")
        must("create", loop, "4G", "--compact", "--grow-unit", "64M", "--journal-size", "1M")
        initrd = build_initrd(
            tmp_path,
            "mount -t ext4 /dev/vda /mnt || { mkdir -p /mnt; mount -t ext4 /dev/vda /mnt; }\n"
            "for n in 1 2 3 4 5 6 7; do dd if=/dev/urandom of=/mnt/seed bs=1M count=4 2>/dev/null\n"
            "  for m in $(seq 48); do cat /mnt/seed; done > /mnt/file$n; md5sum /mnt/seed > /mnt/sum$n\n"
            "  cp /mnt/seed /mnt/seed$n; done\n"
            "sync; umount /mnt\n",
            extra_modules=["ext4"],
        )
        with mounted(folder, "-o", f"grow_command={script}") as mount:
            raw = mount.raw("disk")
            subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", raw], check=True)
            boot(raw, initrd, cache="none", timeout=240)
            mount.remount()
            subprocess.run(["e2fsck", "-f", "-n", raw], check=True, capture_output=True)
            point = tmp_path / "fs"
            point.mkdir()
            subprocess.run(["mount", "-o", "loop,ro", raw, point], check=True)
            try:
                for number in range(1, 8):
                    seed = (point / f"seed{number}").read_bytes()
                    with open(point / f"file{number}", "rb") as file:
                        for _ in range(48):
                            assert file.read(len(seed)) == seed
                        assert file.read(1) == b""
            finally:
                subprocess.run(["umount", point], check=True)
        assert len(Path(f"{script}.log").read_text().splitlines()) >= 5
        assert reference.check(folder / "disk.fvd", "fvdfs") == []
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)


# --- zeros --------------------------------------------------------------------------------------

ZERO_LAYOUTS = {
    "plain": [],
    "compact": ["--compact", "--chunk-size", "64K"],
    "cow": ["--base", "base.raw", "--block-size", "64K"],
    "compact cow": ["--base", "base.raw", "--compact", "--chunk-size", "64K", "--block-size", "64K"],
}


@pytest.mark.parametrize("mode", ["off", "on", "punch"])
@pytest.mark.parametrize("layout", ZERO_LAYOUTS)
def test_zeros_are_stored_only_where_they_must_be(folder: Path, layout: str, mode: str) -> None:
    base = random.Random(6).randbytes(2 * MIB)
    (folder / "base.raw").write_bytes(base)
    must("create", folder / "a.fvd", "16M", *ZERO_LAYOUTS[layout], "--journal-size", "64K")
    content = bytearray((base if "cow" in layout else bytes(2 * MIB)) + bytes(14 * MIB))
    with mounted(folder, "-o", f"detect_zeroes={mode}") as mount:
        raw = mount.raw("a")
        empty = raw.stat().st_blocks * 512
        write_at(raw, 4 * MIB, bytes(4 * MIB))
        after_zeros = raw.stat().st_blocks * 512
        assert (after_zeros - empty < MIB) == (mode != "off")
        write_at(raw, 8 * MIB, b"x" * 4 * MIB)
        write_at(raw, MIB - 5000, bytes(300_000))  # over the base, unaligned: has to hide it
        content[MIB - 5000 : MIB - 5000 + 300_000] = bytes(300_000)
        content[8 * MIB : 12 * MIB] = b"x" * 4 * MIB
        full = raw.stat().st_blocks * 512
        write_at(raw, 9 * MIB + 100, bytes(2 * MIB))
        content[9 * MIB + 100 : 11 * MIB + 100] = bytes(2 * MIB)
        freed = full - raw.stat().st_blocks * 512
        assert (freed > MIB) == (mode == "punch")
        assert raw.read_bytes() == content
        mount.remount()
        assert raw.read_bytes() == content
    assert raw_content(folder / "a.fvd") == content
    assert reference.check(folder / "a.fvd", "fvdfs") == []


def test_a_full_device_is_an_error_of_the_write_only(folder: Path, tmp_path: Path) -> None:
    with device(tmp_path / "disk.img", 4 * MIB) as disk:
        os.symlink(disk.path, folder / "disk.fvd")
        must("create", disk.path, "64M", "--compact", "--chunk-size", "64K", "--journal-size", "64K", "--force")
        with mounted(folder, "-o", "writeback=off") as mount:
            descriptor = os.open(mount.raw("disk"), os.O_RDWR)
            try:
                with pytest.raises(OSError) as caught:
                    for at in range(0, 64 * MIB, 65536):
                        os.pwrite(descriptor, b"z" * 65536, at)
                assert caught.value.errno == errno.ENOSPC
                os.fsync(descriptor)
                assert os.pwrite(descriptor, b"again", 0) == 5, "what has its place can still be written"
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        content = raw_content(folder / "disk.fvd")
        assert content[:10] == b"againzzzzz"
        assert reference.check(folder / "disk.fvd", "fvdfs") == []


# --- writing to the base ------------------------------------------------------------------------


def cache_image(folder: Path, mode: str) -> tuple[Path, bytearray]:
    """An image that shall keep its base up to date; and what the base holds."""
    base = random.Random(7).randbytes(2 * MIB + 512)
    (folder / "base.raw").write_bytes(base)
    must("create", folder / "a.fvd", "3M", "-b", "base.raw", "--block-size", "16K", "--update-base", mode)
    return folder / "base.raw", bytearray(base)


def scribble(mount_file: Path, content: bytearray, seed: int, *, sync: bool) -> None:
    """Write to a disk whose first part is `content`, which follows."""
    chance = random.Random(seed)
    descriptor = os.open(mount_file, os.O_RDWR)
    try:
        for _ in range(50):
            offset, data = chance.randrange(2 * MIB + 3000), chance.randbytes(chance.randrange(1, 40_000))
            os.pwrite(descriptor, data, offset)
            data = data[: max(0, len(content) - offset)]
            content[offset : offset + len(data)] = data
        if sync:
            os.fsync(descriptor)
    finally:
        with suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize("mode", ["writethrough", "writeback"])
def test_the_base_follows_its_cache(folder: Path, mode: str) -> None:
    base, content = cache_image(folder, mode)
    with mounted(folder, "-o", "allow_base_write") as mount:
        scribble(mount.raw("a"), content, 1, sync=True)
        if mode == "writethrough":
            assert base.read_bytes() == content
        mount.remount()
        assert base.read_bytes() == content
        assert mount.raw("a").read_bytes()[: len(content)] == content
        descriptor = os.open(mount.raw("a"), os.O_RDWR)
        try:
            os.pwrite(descriptor, b"later" * 1000, 50_000)
            content[50_000:55_000] = b"later" * 1000
            os.fsync(descriptor)
            deadline = time.monotonic() + 20
            while base.read_bytes() != content:
                assert time.monotonic() < deadline, "the background does not write back"
                time.sleep(0.2)
        finally:
            os.close(descriptor)
    assert base.read_bytes() == content
    assert reference.check(folder / "a.fvd", "fvdfs") == []


@pytest.mark.parametrize("mode", ["writethrough", "writeback"])
def test_a_killed_cache_still_reaches_its_base(folder: Path, mode: str) -> None:
    base, content = cache_image(folder, mode)
    with mounted(folder, "-o", "allow_base_write") as mount:
        for seed in range(3):
            descriptor = os.open(mount.raw("a"), os.O_RDWR)
            scribble(mount.raw("a"), content, seed, sync=True)
            mount.kill()
            with suppress(OSError):
                os.close(descriptor)
            if mode == "writethrough":
                assert base.read_bytes() == content
            mount.mount()
            assert mount.raw("a").read_bytes()[: len(content)] == content
        with open(mount.raw("a"), "r+b"):
            pass
        mount.umount()
        assert base.read_bytes() == content


def test_no_base_is_written_without_leave(folder: Path) -> None:
    base, content = cache_image(folder, "writethrough")
    before = bytes(content)
    with mounted(folder) as mount:
        scribble(mount.raw("a"), content, 1, sync=True)
        assert mount.raw("a").read_bytes()[: len(content)] == content
        assert "write_updates_base_img=writethrough, but the base stays as it is" in mount.log
    assert base.read_bytes() == before
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes()[: len(content)] == content


def test_two_caches_never_write_one_base(folder: Path) -> None:
    cache_image(folder, "writethrough")
    must("create", folder / "b.fvd", "-b", "base.raw", "--update-base", "writethrough")
    with (
        mounted(folder, "-o", "allow_base_write") as mount,
        open(mount.raw("a"), "r+b"),
        pytest.raises(OSError, match="busy"),
    ):
        open(mount.raw("b"), "r+b")
