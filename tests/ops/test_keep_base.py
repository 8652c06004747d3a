"""A disk that moves to a host that has its template: only the rest travels."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.store.host import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from support.fsx import fallocate
from support.mounts import MIB, fvdfs, mounted, must, wait_until
from support.moves import Move, record

TEMPLATE = random.Random(5).randbytes(24 * MIB)
DISK = 32 * MIB
ZEROED = 6 * MIB, 7 * MIB
OWN = random.Random(6).randbytes(MIB)
OWN_AT = (0, 10 * MIB + 512, 30 * MIB)
PUNCH_HOLE = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE


def make_template(folder: Path, fmt: str, content: bytes = TEMPLATE) -> None:
    folder.mkdir(exist_ok=True)
    raw = folder / "template.raw"
    raw.write_bytes(content)
    if fmt != "raw":
        must("convert", raw, folder / f"template.{fmt}", "-O", fmt)
        raw.unlink()


def expected() -> bytearray:
    disk = bytearray(TEMPLATE.ljust(DISK, b"\0"))
    for at in OWN_AT:
        disk[at : at + MIB] = OWN
    disk[ZEROED[0] : ZEROED[1]] = bytes(ZEROED[1] - ZEROED[0])
    return disk


@contextlib.contextmanager
def moving(tmp_path: Path, folder: Path, fmt: str, block_size: str = "512") -> Iterator[Move]:
    make_template(folder, fmt)
    must(
        *("create", folder / "vm.fvd", str(DISK), "--base", f"template.{fmt}", "-F", fmt),
        *("--block-size", block_size),
    )
    with mounted(folder) as source:
        with source.raw("vm").open("r+b") as file:
            for at in OWN_AT[:2]:
                file.seek(at)
                file.write(OWN)
        must("snapshot", source.raw("vm"), "first")
        with source.raw("vm").open("r+b") as file:
            file.seek(OWN_AT[2])
            file.write(OWN)
            file.flush()
            fallocate(file.fileno(), PUNCH_HOLE, ZEROED[0], ZEROED[1] - ZEROED[0])
        yield Move(tmp_path, source)


@pytest.mark.parametrize(("fmt", "there"), [("raw", "fvd"), ("qcow2", "raw"), ("fvd", "qcow2")])
def test_only_what_is_beyond_the_template_travels(tmp_path: Path, folder: Path, fmt: str, there: str) -> None:
    with moving(tmp_path, folder, fmt) as move:
        make_template(move.folder, there)
        disk = expected()
        with move.served():
            must("receive", move.url, move.image, "--keep-base", f"template.{there}", "-F", there)
            with move.target() as target:
                raw = target.raw("vm")
                assert raw.read_bytes() == disk
                assert target.status("vm")["move"] == "receiving"
                with raw.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), b"t" * 4096, 4 * MIB)
                    disk[4 * MIB : 4 * MIB + 4096] = b"t" * 4096
                    assert raw.read_bytes() == disk
                    wait_until(lambda: move.source.status("vm")["move"] == "released", complaint=lambda: target.log)
                    assert raw.read_bytes() == disk
                    status = target.status("vm")
                    assert status["move"] == "local"
                    assert status["base_size"] == len(TEMPLATE)
                    assert status["local_bytes"] < 5 * MIB
        assert not record(move.image).keeps_base
        with move.target() as target:  # nobody serves any more
            assert target.raw("vm").read_bytes() == disk
    checked = fvdfs("check", move.image)
    assert checked.code == 0, checked.out


def test_a_template_that_is_another_is_refused(tmp_path: Path, folder: Path) -> None:
    with moving(tmp_path, folder, "raw") as move, move.served():
        for content in (TEMPLATE[:-1] + b"x", TEMPLATE[:-512], b"x" + TEMPLATE[1:]):
            make_template(move.folder, "raw", content)
            done = fvdfs("receive", move.url, move.image, "--keep-base", "template.raw")
            assert (done.code, "stands on no template" in done.err, done.err.count("\n")) == (2, True, 1), done
        assert fvdfs("receive", move.url, move.image, "--keep-base", "nothing.raw").code == 2
        assert fvdfs("receive", move.url, move.image, "-F", "raw").code == 2
        assert not move.image.exists()


def test_a_template_that_has_changed_since_is_not_used(tmp_path: Path, folder: Path) -> None:
    """All of the disk is copied then."""
    with moving(tmp_path, folder, "raw") as move, move.served():
        make_template(move.folder, "raw")
        must("receive", move.url, move.image, "--keep-base", "template.raw")
        make_template(move.folder, "raw", bytes(len(TEMPLATE)))
        with move.target() as target:
            must("activate", target.raw("vm"))
            with target.raw("vm").open("rb") as file:
                wait_until(lambda: move.source.status("vm")["move"] == "released", complaint=lambda: target.log)
                assert file.read() == expected()
        assert "is not the template of its source any more" in target.log
        assert fvdfs("check", move.image).code == 0


@pytest.mark.parametrize("block_size", ["4096", "1M"])
def test_it_goes_on_after_a_crash(tmp_path: Path, folder: Path, block_size: str) -> None:
    """The target is killed, and its source away for a while; nothing is known of the map then."""
    with moving(tmp_path, folder, "qcow2", block_size) as move:
        make_template(move.folder, "qcow2")
        disk = expected()
        with move.served():
            must("receive", move.url, move.image, "--keep-base", "template.qcow2", "-F", "qcow2")
            with move.target() as target:
                descriptor = os.open(target.raw("vm"), os.O_RDWR)
                os.pwrite(descriptor, b"x" * 512, 12 * MIB)
                os.fsync(descriptor)
                disk[12 * MIB : 12 * MIB + 512] = b"x" * 512
                target.kill()
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                assert record(move.image).state == "active"
        checked = fvdfs("check", move.image)
        assert "base-short" not in checked.out, checked.out
        with move.target() as target:
            with contextlib.suppress(OSError):
                target.raw("vm").read_bytes()
            assert record(move.image).keeps_base
            with move.served():
                descriptor = os.open(target.raw("vm"), os.O_RDWR)
                assert os.pread(descriptor, DISK, 0) == disk
                wait_until(lambda: move.source.status("vm")["move"] == "released", complaint=lambda: target.log)
                target.kill()  # what was copied is stable
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            target.mount()
            assert target.raw("vm").read_bytes() == disk
            must("snapshot", target.raw("vm"))
            assert target.raw("vm").read_bytes() == disk
        assert fvdfs("check", move.image).code == 0


def test_what_it_stands_on_stays_until_all_is_local(tmp_path: Path, folder: Path) -> None:
    """What is missing could be neither in the one nor in the other."""
    with moving(tmp_path, folder, "raw") as move:
        make_template(move.folder, "fvd")
        template = (move.folder / "template.fvd").rename(move.folder / "template@1.fvd")
        with move.served():
            must("receive", move.url, move.image, "--keep-base", template.name, "-F", "fvd")
            with move.target("prefetch_max=16k") as target:
                must("activate", target.raw("vm"))
                expect_to_stay(template, move.image)
                with target.raw("vm").open("r+b"):
                    expect_to_stay(template, move.image)
            assert record(move.image).state == "active"  # nobody has read it, which copies what is read
            expect_to_stay(template, move.image)
            with move.target() as target, target.raw("vm").open("r+b"):
                wait_until(lambda: record(move.image).state == "local", complaint=lambda: target.log)
        must("delete", template)
        with move.target() as target:
            assert target.raw("vm").read_bytes() == expected()
        assert sorted(path.name for path in move.folder.iterdir()) == ["vm.fvd"]


def expect_to_stay(template: Path, image: Path) -> None:
    for words in (("delete", template), ("commit", image), ("revert", image)):
        done = fvdfs(*words)
        assert (done.code, "still follows its source, on top of a template" in done.err) == (2, True), (words, done)
