"""A disk that moves to a host that has its template: only the rest travels."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.format.migration import PLACE, SIZE, Record
from fvdfs.store.host import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from support.fsx import fallocate
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until
from support.moves import serving

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


def record(image: Path) -> Record:
    with image.open("rb") as file:
        file.seek(PLACE)
        return Record.decode(file.read(SIZE), str(image))


class Move:
    """A source that stands on a template and a snapshot of it, and the folder of a target."""

    def __init__(self, tmp_path: Path, source: Mount) -> None:
        self.source = source
        self.folder = tmp_path / "target"
        self.folder.mkdir()
        self.image = self.folder / "vm.fvd"
        self.url = ""

    @contextlib.contextmanager
    def target(self, *options: str) -> Iterator[Mount]:
        with mounted(self.folder, "-o", ",".join(["allow_url=nbd+unix:///", *options])) as mount:
            yield mount

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        with serving(self.source) as socket:
            self.url = f"nbd+unix:///vm?socket={socket}"
            yield


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
