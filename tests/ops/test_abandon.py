"""A move is given up at its target: the source goes on, and the target never writes."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fvdfs.commands import receive
from fvdfs.format.mailbox import Wish
from fvdfs.store.locations import parse_location
from fvdfs.store.source import ask
from support.mounts import Mount, fvdfs, mounted, must, wait_until
from support.moves import record, serving

CONTENT = bytes(range(251)) * 4096


@pytest.fixture
def source(folder: Path) -> Iterator[Mount]:
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder) as mount:
        with mount.raw("vm").open("r+b") as disk:
            disk.write(CONTENT)
        yield mount


@pytest.fixture
def image(tmp_path: Path, source: Mount) -> Path:
    """Of a target."""
    there = tmp_path / "there"
    there.mkdir()
    with serving(source) as socket:
        must("receive", f"nbd+unix:///vm?socket={socket}", there / "vm.fvd")
    return there / "vm.fvd"


ALLOWED = ("-o", "allow_url=nbd+unix:///")


def have_it_moved(source: Mount, image: Path) -> None:
    """The target has asked for the disk, and ends before it knows the answer."""
    into = record(image).incoming
    assert into is not None
    url = f"nbd+unix:///vm?socket={source.folder.parent / 'nbd'}"
    trio.run(functools.partial(ask, parse_location(url), "", into, Wish.HAND_OVER, 3.0))
    assert source.status("vm")["move"] == "moved"


def write(raw: Path) -> None:
    with raw.open("r+b", buffering=0) as disk:
        disk.write(b"written")


@pytest.mark.parametrize("is_mounted", [True, False])
@pytest.mark.parametrize("has_moved", [True, False])
def test_the_source_goes_on(source: Mount, image: Path, has_moved: bool, is_mounted: bool) -> None:
    with serving(source):
        epoch = source.status("vm")["move_epoch"]
        if has_moved:
            have_it_moved(source, image)
            assert fvdfs("thaw", source.raw("vm")).code == 2
        if is_mounted:
            with mounted(image.parent, *ALLOWED) as target:
                raw = target.raw("vm")
                with raw.open("r+b", buffering=0) as disk:
                    must("abandon", raw)
                    must("abandon", raw)
                    assert target.status("vm")["move"] == "abandoned"
                    with pytest.raises(OSError) as caught:
                        disk.write(b"no")
                    assert caught.value.errno == errno.EROFS
                with pytest.raises(OSError):
                    write(raw)
                for words in (("activate", raw), ("freeze", raw), ("serve", raw, "--unix", image.parent / "s")):
                    done = fvdfs(*words)
                    assert (bool(done.code), "fvdfs abandon" in done.err) == (True, True), done.err
        else:
            must("abandon", image)
        wait_until(lambda: source.status("vm")["move"] == "serving")
        assert (source.status("vm")["move_epoch"] == epoch) == (not has_moved)
        write(source.raw("vm"))
        with mounted(image.parent, *ALLOWED) as target:
            assert target.raw("vm").read_bytes()[:7] == b"written"  # nothing is kept of what it was
            assert fvdfs("activate", target.raw("vm")).code
    assert record(image).abandoned
    assert fvdfs("check", image).code == 0
    image.unlink()


def test_a_source_that_cannot_be_told_is_told_later(source: Mount, image: Path) -> None:
    with serving(source):
        have_it_moved(source, image)
    with mounted(image.parent, *ALLOWED) as target:
        done = fvdfs("abandon", target.raw("vm"))
        assert done.code == 1
        assert "given up for good here, but the source could not be told" in done.err
        assert "fvdfs thaw --lose-writes, which loses nothing" in done.err
        assert target.status("vm")["move"] == "abandoned"
    assert "could not be told" in fvdfs("abandon", image).err
    assert source.status("vm")["move"] == "moved"
    with serving(source):
        must("abandon", image)
        wait_until(lambda: source.status("vm")["move"] == "serving")
        write(source.raw("vm"))


def test_what_has_been_taken_over_is_not_given_up(source: Mount, image: Path) -> None:
    with serving(source), mounted(image.parent, *ALLOWED) as target:
        write(target.raw("vm"))
        done = fvdfs("abandon", target.raw("vm"))
        assert (done.code, "has been taken over: go on here" in done.err) == (2, True)
        assert source.status("vm")["move"] == "moved"
        assert fvdfs("abandon", source.raw("vm")).code == 2


def test_the_source_is_told_only_of_what_is_stable(source: Mount, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could be written there, and after a crash here."""
    happened: list[str] = []
    fsync, number = os.fsync, image.stat().st_ino

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        if os.fstat(descriptor).st_ino == number and record(image).abandoned:
            happened.append("stable")

    async def tell(*_: object) -> None:
        happened.append("told")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(receive, "tell_of_end", tell)
    assert receive.run_abandon(str(image)) == 0
    assert happened == ["stable", "told"]
