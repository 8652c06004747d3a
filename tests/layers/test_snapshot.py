"""Snapshots of disks that are not open: what they leave, at every step, and what is refused."""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
from pathlib import Path

import pytest
import trio

from fvdfs.cli import main
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import Header
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from support import reference
from support.builder import KIB, create
from support.mounts import fvdfs, must
from support.steps import kills, recorded

SIZE = 512 * KIB
BASE = random.Random(1).randbytes(SIZE // 2 + 1000)
COW = CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB, journal_size=64 * KIB)
LAYOUTS = {
    "flat": CreateOptions(),
    "cow": COW,
    "compact": CreateOptions(compact=True, chunk_size=64 * KIB, journal_size=64 * KIB),
    "data file": CreateOptions(data_file="vm.data"),
    "no journal": CreateOptions(base_img="base.raw", base_img_fmt="raw", journal_size=0),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "vm.fvd"


def make(image: Path, options: CreateOptions) -> None:
    (image.parent / "base.raw").write_bytes(BASE)
    create(image, SIZE, options, base_length=len(BASE) if options.base_img else None)


def write(path: Path, data: bytes, offset: int, *, crash: bool = False) -> None:
    async def work() -> None:
        image = await open_image(str(path), Policy(), write=True)
        await image.write(offset, data)
        if crash:
            await image.fsync()
            os._exit(0)
        await image.close()

    if not crash:
        trio.run(work)
        return
    child = os.fork()
    if not child:
        trio.run(work)
    os.waitpid(child, 0)


def content(path: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(path))


def header(path: Path) -> Header:
    return Header.decode(path.read_bytes()[:8192], str(path))


def others(image: Path) -> list[str]:
    return sorted(path.name for path in image.parent.glob("*@*.fvd"))


def parts(image: Path) -> list[str]:
    return sorted(path.name for path in image.parent.glob(".*.part"))


@layouts
def test_a_snapshot_keeps_the_state(image: Path, layout: str) -> None:
    make(image, LAYOUTS[layout])
    write(image, b"one" * 1000, 5000)
    before = content(image)
    assert must("snapshot", image).strip() == str(image.with_name("vm@1.fvd"))
    assert content(image) == before
    write(image, b"two" * 1000, 6000)
    after = content(image)
    assert after[6000:9000] == b"two" * 1000
    assert after[:6000] == before[:6000]
    assert content(image.with_name("vm@1.fvd")) == before
    must("snapshot", image)
    write(image, b"three", SIZE - 5)
    assert content(image.with_name("vm@2.fvd")) == after
    for name in ("vm", "vm@1", "vm@2"):
        must("check", image.with_name(f"{name}.fvd"))
    assert parts(image) == []


@layouts
def test_what_was_not_closed_is_replayed_first(image: Path, layout: str) -> None:
    make(image, LAYOUTS[layout])
    write(image, b"one" * 1000, 5000, crash=True)
    os.utime(image, ns=(0, 10**18))
    done = fvdfs("snapshot", image)
    if layout == "no journal":
        assert done.code == 1
        assert "accept_unclean" in done.err
        assert others(image) == []
        return
    assert done.code == 0, done.err
    old = header(image.with_name("vm@1.fvd"))
    assert old.clean
    assert content(image)[5000:8000] == b"one" * 1000
    assert image.with_name("vm@1.fvd").stat().st_mtime_ns == image.stat().st_mtime_ns == 10**18


@layouts
def test_a_kill_before_any_step(image: Path, layout: str) -> None:
    """Afterwards there is the state before or after, clean, and the next snapshot and delete find their way."""
    make(image, LAYOUTS[layout])
    write(image, b"one" * 1000, 5000)
    before = content(image)
    made = 0
    for _ in kills(image.parent, lambda: main(["snapshot", str(image)]), at_least=6):
        assert content(image) == before
        must("check", image)
        left = others(image)
        if header(image).base_img == "vm@1.fvd":
            made += 1
            assert content(image.with_name("vm@1.fvd")) == before
        elif left:
            assert left == ["vm@1.fvd"]
            assert os.path.samefile(image, image.with_name("vm@1.fvd"))
            assert "the same file as vm@1.fvd" in must("snapshots", image)
            assert must("snapshot", image).endswith("vm@1.fvd\n")
            assert content(image) == before
            assert header(image).base_img == "vm@1.fvd"
    assert made > 0


def test_each_step_is_stable_before_the_next(image: Path) -> None:
    make(image, COW)
    calls = [re.sub(r"\.vm\.fvd\.\w+\.part", "PART", call) for call in recorded(lambda: main(["snapshot", str(image)]))]
    folder = image.parent.name
    order = ["fsync PART", "link vm.fvd vm@1.fvd", f"fsync {folder}", "rename PART vm.fvd", f"fsync {folder}"]
    assert calls[-5:] == order
    assert max(n for n, call in enumerate(calls) if call.startswith("pwrite")) < len(calls) - 5


def test_what_an_interrupted_one_left_is_removed_where_the_next_has_a_name(image: Path) -> None:
    make(image, COW)
    os.link(image, image.with_name("vm@1.fvd"))
    must("snapshot", image, "other")
    assert others(image) == ["vm@other.fvd"]


def test_a_snapshot_that_cannot_be_renamed_leaves_nothing(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(image, COW)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    assert main(["snapshot", str(image)]) == 1
    assert others(image) == []
    assert parts(image) == []


def test_the_new_top_is_laid_out_as_the_old_one(image: Path) -> None:
    options = CreateOptions(
        base_img="base.raw", base_img_fmt="raw", block_size=1536, compact=True, chunk_size=12 * KIB, grow_unit=24 * KIB
    )
    make(image, options)
    must("snapshot", image)
    old, new = header(image.with_name("vm@1.fvd")), header(image)
    for field in ("block_size", "compact_image", "chunk_size", "storage_grow_unit", "journal_size"):
        assert getattr(new, field) == getattr(old, field), field
    assert (new.base_img, new.base_img_fmt, new.base_img_size) == ("vm@1.fvd", "fvd", SIZE)
    assert new.copy_on_read == 0
    assert new.prefetch_start_delay == -1
    assert new.clean


def test_a_plain_image_gets_blocks_that_guests_write(image: Path) -> None:
    make(image, CreateOptions())
    must("snapshot", image)
    assert header(image).block_size == 4096


def test_copies_are_left_to_the_old_image(image: Path) -> None:
    make(image, CreateOptions(base_img="base.raw", base_img_fmt="raw", copy_on_read=True, prefetch_delay=1))
    must("snapshot", image)
    assert (header(image).copy_on_read, header(image).prefetch_start_delay) == (0, -1)
    old = header(image.with_name("vm@1.fvd"))
    assert (old.copy_on_read, old.prefetch_start_delay) == (1, 1)


def test_nothing_of_the_base_is_needed(image: Path) -> None:
    make(image, COW)
    (image.parent / "base.raw").unlink()
    must("snapshot", image)
    assert header(image).base_img == "vm@1.fvd"


def test_owner_mode_access_list_and_time(image: Path) -> None:
    make(image, COW)
    os.chown(image, 12, 34)
    os.chmod(image, 0o640)
    subprocess.run(["setfacl", "-m", "u:7:r", image], check=True)
    os.utime(image, ns=(0, 123_456_789_000))
    acl = os.getxattr(image, "system.posix_acl_access")
    must("snapshot", image)
    status = image.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o640)
    assert os.getxattr(image, "system.posix_acl_access") == acl
    assert status.st_mtime_ns == 123_456_789_000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_an_image_of_somebody_else_is_left_to_him(image: Path, tmp_path: Path) -> None:
    make(image, COW)
    os.chmod(tmp_path, 0o777)
    os.chown(image, 12, 34)
    os.chmod(image, 0o666)

    def as_other() -> None:
        for parent in image.parents:
            if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
                os.chmod(parent, parent.stat().st_mode | 0o011)
        os.setgroups([])
        os.setresgid(99, 99, 99)
        os.setresuid(99, 99, 99)

    child = os.fork()
    if not child:
        as_other()
        os._exit(main(["snapshot", str(image)]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert others(image) == []
    assert parts(image) == []


@pytest.mark.parametrize("name", ["", "a/b", "a\nb", "x" * 250])
def test_what_is_no_name(image: Path, name: str) -> None:
    make(image, COW)
    done = fvdfs("snapshot", image, name)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert others(image) == []


def test_a_name_that_is_taken(image: Path) -> None:
    make(image, COW)
    must("snapshot", image, "x")
    done = fvdfs("snapshot", image, "x")
    assert (done.code, "exists already" in done.err) == (2, True)


def test_numbers_go_on_behind_the_highest(image: Path) -> None:
    make(image, COW)
    must("snapshot", image, "7")
    must("snapshot", image, "daily")
    assert must("snapshot", image).endswith("vm@8.fvd\n")


def refused(image: Path, text: str, code: int = 2) -> None:
    before = image.read_bytes()
    done = fvdfs("snapshot", image)
    assert done.code == code, done.err
    assert text in done.err
    assert done.err.count("\n") == 1
    assert others(image) == []
    assert parts(image) == []
    assert image.read_bytes() == before


def test_a_link_is_refused(image: Path) -> None:
    make(image, COW)
    link = image.with_name("link.fvd")
    link.symlink_to(image)
    refused(link, f"is a link to {image}")


def test_a_base_of_others_is_refused(image: Path) -> None:
    make(image, COW)
    create(image.with_name("clone.fvd"), SIZE, CreateOptions(base_img="vm.fvd", base_img_fmt="fvd"), base_length=SIZE)
    refused(image, "clone.fvd stands on it")


def test_a_cache_that_writes_to_its_base_is_refused(image: Path) -> None:
    make(image, CreateOptions(base_img="base.raw", base_img_fmt="raw", update_base="writeback"))
    refused(image, "--update-base")


def test_encrypted_data_is_refused(image: Path) -> None:
    make(image, COW)
    key = image.with_name("key")
    key.write_text("secret")
    must("create", image, "1M", "--data-file", "vm.luks", "--data-format", "luks", "--secret", key, "--force")
    refused(image, "is encrypted")


def test_an_open_image_is_busy(image: Path) -> None:
    make(image, COW)

    async def work() -> None:
        disk = await open_image(str(image), Policy(), write=True)
        try:
            done = await trio.to_thread.run_sync(fvdfs, "snapshot", image)
        finally:
            await disk.close()
        assert done.code == 1
        assert "open for writing by another mount" in done.err

    trio.run(work)
    assert others(image) == []
