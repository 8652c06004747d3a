"""Images that go into what they stand on: delete, commit, revert. What they leave at every step, what is refused."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from fvdfs.cli import main
from fvdfs.errors import ImageBusy
from fvdfs.format.creation import CreateOptions
from fvdfs.image.chain import open_alone, open_chain
from fvdfs.image.loading import load_chain, open_image
from fvdfs.image.policy import Policy
from fvdfs.layers.merging import merge
from fvdfs.layers.snapshot import opened_alone
from support import reference
from support.builder import KIB, create
from support.mounts import fvdfs, mounted, must
from support.steps import kills, recorded

SIZE = 512 * KIB
BASE = random.Random(1).randbytes(SIZE // 2 + 1000)
LAYOUTS = {
    "flat": CreateOptions(),
    "cow": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB, journal_size=64 * KIB),
    "compact": CreateOptions(
        base_img="base.raw", base_img_fmt="raw", compact=True, chunk_size=64 * KIB, journal_size=64 * KIB
    ),
    "data file": CreateOptions(data_file="vm.fvd.data"),
    "no journal": CreateOptions(base_img="base.raw", base_img_fmt="raw", journal_size=0),
}
LEAKS = 3
"""What `check` ends with where a kill has left space of no use, as during any change of the size."""
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "vm.fvd"


def change(path: Path, seed: int, size: int = SIZE) -> bytes:
    """Write, zero and perhaps resize at random; what the disk holds then."""

    async def work() -> bytes:
        rng = random.Random(seed)
        disk = await open_image(str(path), Policy(), write=True)
        if size != disk.size:
            await disk.resize(size, shrink=True)
        for _ in range(6):
            start = rng.randrange(size - 40 * KIB)
            await disk.write(start, rng.randbytes(rng.randrange(1, 40 * KIB)))
            start = rng.randrange(size - 100 * KIB)
            await disk.zero(start, start + rng.randrange(1, 100 * KIB))
        found = bytes(await disk.read(0, size))
        await disk.close()
        return found

    return trio.run(work)


def chain(image: Path, layout: str, snapshots: int = 3) -> list[bytes]:
    """vm.fvd with so many snapshots below; the states, that of the disk last."""
    (image.parent / "base.raw").write_bytes(BASE)
    options = LAYOUTS[layout]
    create(image, SIZE, options, base_length=len(BASE) if options.base_img else None)
    states = []
    for number in range(snapshots):
        states.append(change(image, number, SIZE + number % 2 * 64 * KIB))
        must("snapshot", image)
    return [*states, change(image, snapshots)]


def content(path: Path) -> bytes:
    """By an independent reader."""
    return b"".join(reference.read_disk(path))


def names(image: Path) -> list[str]:
    return sorted(path.name for path in image.parent.iterdir() if path.name != "base.raw")


def clean(image: Path, leaks: int = 0) -> None:
    for path in image.parent.glob("*.fvd"):
        done = fvdfs("check", path)
        assert done.code in (0, leaks), done.out


@layouts
@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_snapshot_is_deleted(image: Path, layout: str, gone: int) -> None:
    states = chain(image, layout)
    above = image if gone == 3 else image.with_name(f"vm@{gone + 1}.fvd")
    os.utime(above, ns=(0, 10**18))
    os.chmod(above, 0o640)
    must("delete", image.with_name(f"vm@{gone}.fvd"))
    data = {"vm.fvd.data"} if layout == "data file" else set()
    assert set(names(image)) == {"vm.fvd", "vm@1.fvd", "vm@2.fvd", "vm@3.fvd"} - {f"vm@{gone}.fvd"} | data
    for number in {1, 2, 3} - {gone}:
        assert content(image.with_name(f"vm@{number}.fvd")) == states[number - 1]
    assert content(image) == states[3]
    status = above.stat()
    assert (status.st_mtime_ns, status.st_mode & 0o777) == (10**18, 0o640)
    clean(image)


@layouts
def test_a_chain_is_merged_down_to_one(image: Path, layout: str) -> None:
    states = chain(image, layout, 5)
    for number in (2, 5, 1, 4, 3):
        must("delete", image.with_name(f"vm@{number}.fvd"))
        assert content(image) == states[-1]
    assert names(image) == (["vm.fvd", "vm.fvd.data"] if layout == "data file" else ["vm.fvd"])
    must("check", image)


def test_the_snapshots_of_a_disk_that_was_renamed_are_named_by_their_files(image: Path) -> None:
    states = chain(image, "cow", 2)
    first = image.with_name("vm@1.fvd")
    other = image.rename(image.with_name("new.fvd"))
    refused(["revert", other, "1"], "has no snapshot 1")
    refused(["revert", first.with_name("vm@2.fvd"), first], "new.fvd stands on it")
    refused(["revert", other, image.with_name("base.fvd")], "is no snapshot, whose name would be")
    refused(["revert", other, image.parent.parent / "vm@1.fvd"], "name a snapshot in its folder")
    must("revert", other, first)
    assert content(other) == states[0]


@pytest.mark.slow
def test_a_chain_of_a_hundred_is_made_and_merged(image: Path) -> None:
    states = chain(image, "compact", 100)
    left = set(range(1, 101))
    for number in random.Random(3).sample(sorted(left), len(left)):
        assert main(["delete", str(image.with_name(f"vm@{number}.fvd"))]) == 0
        left.discard(number)
        for kept in random.Random(number).sample(sorted(left), min(2, len(left))):
            assert content(image.with_name(f"vm@{kept}.fvd")) == states[kept - 1]
    assert content(image) == states[-1]
    assert names(image) == ["vm.fvd"]
    clean(image)


def test_a_snapshot_on_which_nothing_stands_goes_with_its_data_file(image: Path) -> None:
    states = chain(image, "data file", 1)
    must("revert", image, "1")
    must("delete", image.with_name("vm@1.fvd"))
    assert names(image) == ["vm.fvd", "vm.fvd.data"]
    assert content(image) == states[0]
    other = image.with_name("x@1.fvd")
    must("create", other, "1M", "--data-file", "auto")
    must("delete", other)
    assert names(image) == ["vm.fvd", "vm.fvd.data"]


@layouts
def test_commit_empties_the_image_into_its_base(image: Path, layout: str) -> None:
    states = chain(image, layout)
    must("commit", image)
    assert content(image) == content(image.with_name("vm@3.fvd")) == states[3]
    must("commit", image.with_name("vm@2.fvd"))
    assert content(image.with_name("vm@1.fvd")) == content(image.with_name("vm@2.fvd")) == states[1]
    assert content(image) == states[3]
    shown = json.loads(must("map", image, "--json"))
    assert sum(cell[0] for cell in shown["cells"]) == 0
    clean(image)


@layouts
def test_revert(image: Path, layout: str) -> None:
    states = chain(image, layout)
    must("revert", image)
    assert content(image) == states[2]
    change(image, 7)
    must("revert", image, "1")
    assert content(image) == states[0]
    for number in (1, 2, 3):
        assert content(image.with_name(f"vm@{number}.fvd")) == states[number - 1]
    clean(image)


@layouts
def test_flatten(image: Path, layout: str) -> None:
    states = chain(image, layout, 2)
    os.utime(image, ns=(0, 10**18))
    must("flatten", image)
    for path in (image.with_name("vm@1.fvd"), image.with_name("vm@2.fvd"), image.with_name("base.raw")):
        path.unlink()
    assert content(image) == states[2]
    assert image.stat().st_mtime_ns == 10**18
    clean(image)
    refused(["flatten", image], "is flat already")


def test_flatten_keeps_holes(image: Path) -> None:
    (image.parent / "base.raw").write_bytes(b"x" * 4096 + bytes(64 << 20))
    must("create", image, "-b", "base.raw", "-F", "raw")
    must("flatten", image)
    assert image.stat().st_blocks < 2048
    assert content(image) == (image.parent / "base.raw").read_bytes()


def test_flatten_through_a_mount(image: Path) -> None:
    states = chain(image, "cow", 1)
    with mounted(image.parent) as mount:
        must("flatten", mount.raw("vm"))
        with open(mount.raw("vm"), "r+b", buffering=0) as file:
            must("snapshot", mount.raw("vm"))
            must("flatten", mount.raw("vm"))
            assert file.read() == states[1]
    image.with_name("vm@1.fvd").unlink()
    image.with_name("vm@2.fvd").unlink()
    assert content(image) == states[1]
    clean(image)


@layouts
def test_rebase_shows_the_same(image: Path, layout: str) -> None:
    """Onto what lies further down, onto something else, and back."""
    states = chain(image, layout, 3)
    other = image.with_name("other.fvd")
    create(other, SIZE // 2 + 4096, CreateOptions(compact=True, chunk_size=64 * KIB))
    change(other, 9, SIZE // 2 + 4096)
    os.utime(image, ns=(0, 10**18))
    for base in ("vm@1.fvd", "other.fvd", "vm@2.fvd"):
        must("rebase", image, "--base", base)
        assert json.loads(must("info", image, "--json"))["base_img"] == base
        assert content(image) == states[3]
        must("check", image)
    assert image.stat().st_mtime_ns == 10**18
    must("delete", image.with_name("vm@3.fvd"))
    assert content(image) == states[3]
    assert content(image.with_name("vm@2.fvd")) == states[1]


def test_rebase_copies_what_differs_alone(image: Path) -> None:
    chain(image, "cow", 0)
    new = bytearray(BASE)
    new[100_000:100_010] = b"x" * 10
    (image.parent / "new.raw").write_bytes(new)
    must("create", image, "-b", "base.raw", "-F", "raw", "--block-size", "4K", "--force")
    must("rebase", image, "-b", "new.raw", "-F", "raw")
    found = json.loads(must("info", image, "--json"))
    assert (found["local_blocks"], found["base_img"]) == (1, "new.raw")
    assert content(image) == BASE.ljust(-(-len(BASE) // 512) * 512, b"\0")


def test_an_unsafe_rebase_changes_the_name_alone(image: Path) -> None:
    states = chain(image, "cow", 1)
    shutil.copy(image.parent / "base.raw", image.parent / "moved.raw")
    unsafe: list[str | Path] = ["rebase", image.with_name("vm@1.fvd"), "-b", "moved.raw", "-F", "raw", "--unsafe"]
    refused(unsafe, "vm.fvd stands on it")
    (image.parent / "base.raw").unlink()
    refused(unsafe[:-1], "if it was moved: fvdfs rebase", code=1)  # cannot be compared
    with mounted(image.parent) as mount:
        assert "if it was moved: fvdfs rebase" in mount.log
        assert not mount.raw("vm").exists()
        must(*unsafe)
        assert mount.raw("vm").read_bytes() == states[1]
    assert content(image.with_name("vm@1.fvd")) == states[0]


def test_what_can_be_no_base(image: Path) -> None:
    chain(image, "cow", 2)
    refused(["rebase", image.with_name("vm@1.fvd"), "-b", "vm.fvd"], "only one of the same format")
    (image.parent / "short.raw").write_bytes(b"x")
    must("create", image.with_name("x.fvd"), "-b", "base.raw", "-F", "raw")
    refused(["rebase", image.with_name("x.fvd"), "-b", "short.raw", "-F", "raw", "--unsafe"], "short.raw has 1")
    refused(["rebase", image.with_name("vm@2.fvd"), "-b", "vm.fvd"], "stands on it")
    refused(["rebase", image, "-b", "missing.fvd"], "No such file")
    refused(["rebase", image, "-b", "base.raw", "-F", "raw"], "only one of the same format")
    must("create", image.with_name("alone.fvd"), "1M")
    refused(["rebase", image.with_name("alone.fvd"), "-b", "vm.fvd"], "stands on nothing")
    long = "x" * 200 + ".fvd"
    (image.parent / ("y" * 200)).mkdir()
    (image.parent / ("y" * 200) / ("z" * 200)).mkdir()
    must("create", image.parent / ("y" * 200) / ("z" * 200) / long, "1M")
    refused(["rebase", image, "-b", f"{'y' * 200}/{'z' * 200}/{long}"], "too long to be changed at once")


# --- kills ----------------------------------------------------------------------------------------


def kill(image: Path, layout: str, words: list[str], look: Callable[[list[bytes]], None], at_least: int) -> None:
    """Kill the command before some of its steps, of which it has `at_least` so many; `look` gets the states before."""
    states = chain(image, layout, 2)
    for _ in kills(image.parent, lambda: main(words), at_least=at_least):
        for path in image.parent.glob("*.fvd"):
            done = fvdfs("check", path)
            assert done.code in (0, LEAKS) or layout == "no journal", done.out
        look(states)


@pytest.mark.parametrize("layout", ["data file", "cow", "compact", "no journal"])
def test_a_kill_during_a_deletion(image: Path, layout: str) -> None:
    """The disk is as it was; the snapshot is there as it was, or is gone. Deleting it again ends it."""
    snapshot = image.with_name("vm@2.fvd")
    resumed = 0

    def look(states: list[bytes]) -> None:
        nonlocal resumed
        assert content(image) == states[2]
        assert content(image.with_name("vm@1.fvd")) == states[0]
        if snapshot.exists():
            assert content(snapshot) == states[1]
        if snapshot.exists() or snapshot.with_name("vm@2.fvd.deleted").exists():
            done = fvdfs("delete", snapshot)
            if layout == "no journal" and "accept_unclean" in done.err:
                return  # as after any crash without a journal
            assert done.code == 0, done.err
            resumed += 1
            left = {"vm.fvd", "vm@1.fvd"} | ({"vm.fvd.data"} if layout == "data file" else set())
            assert set(names(image)) == left
            assert content(image) == states[2]
            clean(image, LEAKS)

    kill(image, layout, ["delete", str(snapshot)], look, 16)
    assert resumed or layout == "no journal"


@pytest.mark.parametrize("layout", ["cow", "compact"])
def test_a_kill_during_a_commit(image: Path, layout: str) -> None:
    def look(states: list[bytes]) -> None:
        assert content(image) == states[2]
        assert content(image.with_name("vm@1.fvd")) == states[0]
        must("commit", image)
        assert content(image) == content(image.with_name("vm@2.fvd")) == states[2]
        assert [path for path in image.parent.glob("vm*") if path.suffix not in (".fvd", ".raw")] == []

    kill(image, layout, ["commit", str(image)], look, 16)


@pytest.mark.parametrize("layout", ["compact", "cow"])
def test_a_kill_during_a_rebase(image: Path, layout: str) -> None:
    bases = set()

    def look(states: list[bytes]) -> None:
        assert content(image) == states[2]
        bases.add(json.loads(must("info", image, "--json"))["base_img"])

    kill(image, layout, ["rebase", str(image), "-b", "vm@1.fvd"], look, 11)
    assert bases == {"vm@1.fvd", "vm@2.fvd"}


@pytest.mark.parametrize("layout", ["compact", "cow"])
def test_a_kill_during_a_flatten(image: Path, layout: str) -> None:
    def look(states: list[bytes]) -> None:
        assert content(image) == states[2]
        assert content(image.with_name("vm@2.fvd")) == states[1]
        if json.loads(must("info", image, "--json"))["base_chain"]:
            must("flatten", image)
            assert content(image) == states[2]

    kill(image, layout, ["flatten", str(image)], look, 11)


@pytest.mark.parametrize("layout", ["cow", "data file"])
def test_a_kill_during_a_revert(image: Path, layout: str) -> None:
    def look(states: list[bytes]) -> None:
        assert content(image) in (states[2], states[0])
        assert content(image.with_name("vm@2.fvd")) == states[1]

    kill(image, layout, ["revert", str(image), "1"], look, 6)


def test_each_step_of_a_deletion_is_stable_before_the_next(image: Path) -> None:
    chain(image, "cow", 1)
    calls = recorded(lambda: main(["delete", str(image.with_name("vm@1.fvd"))]))
    text = " ".join(calls)
    folder = image.parent.name
    before = rf"link vm@1\.fvd vm@1\.fvd\.deleted fsync {folder} .*(fsync|fdatasync) vm\.fvd "
    after = rf".*unlink vm@1\.fvd fsync {folder} "
    after += rf".*(fsync|fdatasync) vm@1\.fvd\.deleted rename vm@1\.fvd\.deleted vm\.fvd fsync {folder}"
    assert re.search(before + after, text), text


def test_each_step_of_a_rebase_is_stable_before_the_next(image: Path) -> None:
    """The name comes last, in a write of its own, and all that was copied is flushed before it."""
    chain(image, "cow", 2)
    calls = recorded(lambda: main(["rebase", str(image), "-b", "vm@1.fvd"]))
    flushes = [number for number, call in enumerate(calls) if "sync" in call]
    writes = [number for number, call in enumerate(calls) if call.startswith("pwrite")]
    assert writes[-2] < flushes[-2] < writes[-1] < flushes[-1]
    assert json.loads(must("info", image, "--json"))["base_img"] == "vm@1.fvd"


# --- refusals -------------------------------------------------------------------------------------


def refused(words: Sequence[str | Path], text: str, code: int = 2) -> None:
    done = fvdfs(*words)
    assert done.code == code, done.err
    assert text in done.err
    assert done.err.count("\n") == 1


def test_what_others_stand_on_stays(image: Path) -> None:
    states = chain(image, "cow", 2)
    clone = image.with_name("clone.fvd")
    must("create", clone, "--base", "vm@2.fvd")
    refused(["delete", image.with_name("vm@2.fvd")], "clone.fvd, vm.fvd stand on it")
    refused(["commit", image], "clone.fvd stands on")
    must("create", image.with_name("on.fvd"), "--base", "vm.fvd")
    refused(["revert", image], "on.fvd stands on it")
    assert content(image) == states[2]
    assert content(clone) == states[1]


def test_an_image_that_cannot_be_read_may_stand_on_anything(image: Path) -> None:
    chain(image, "cow", 1)
    image.with_name("broken.fvd").write_bytes(image.read_bytes()[:1000])
    commands: list[list[str | Path]] = [["delete", image.with_name("vm@1.fvd")], ["commit", image], ["revert", image]]
    for words in commands:
        refused(words, "nobody knows what it stands on", code=1)


def test_an_open_image_is_left_alone(image: Path) -> None:
    chain(image, "cow", 2)
    with mounted(image.parent) as mount, open(mount.raw("vm"), "rb"):
        refused(["revert", image], "by another mount or process", code=1)

    async def work() -> None:  # open elsewhere than in a mount
        disk = await open_image(str(image), Policy(), write=True)
        commands: list[list[str | Path]] = [["delete", image.with_name("vm@2.fvd")], ["commit", image]]
        for words in commands:
            await trio.to_thread.run_sync(refused, words, "by another mount or process", 1)
        await disk.close()

    trio.run(work)
    assert names(image) == ["vm.fvd", "vm@1.fvd", "vm@2.fvd"]


def test_a_snapshot_that_is_written_is_no_state_to_go_back_to(image: Path) -> None:
    states = chain(image, "cow", 2)
    must("rebase", image, "-b", "vm@1.fvd")
    with mounted(image.parent) as mount, open(mount.raw("vm@2"), "r+b"):
        refused(["revert", image, "2"], "open for writing by another mount or process", code=1)
    assert content(image) == states[2]


def test_what_is_no_snapshot(image: Path) -> None:
    chain(image, "cow", 0)
    refused(["delete", image], "to remove a disk: rm")
    refused(["delete", image.with_name("vm@7.fvd")], "there is no such file")
    refused(["commit", image], "stands on no FVD image")
    refused(["revert", image], "stands on no FVD image")
    refused(["revert", image, "7"], "has no snapshot 7")
    link = image.with_name("link.fvd")
    link.symlink_to("vm.fvd")
    refused(["revert", link], "is a link to")
    refused(["commit", link], "is a link to")


def test_a_snapshot_with_a_second_name_stays_as_long_as_something_stands_on_it(image: Path) -> None:
    states = chain(image, "cow", 1)
    os.link(image.with_name("vm@1.fvd"), image.with_name("kept.fvd"))
    refused(["delete", image.with_name("vm@1.fvd")], "is the same file as")
    assert content(image) == states[1]
    assert content(image.with_name("kept.fvd")) == states[0]


def test_what_an_interrupted_snapshot_has_left_is_removed_by_name(image: Path) -> None:
    chain(image, "cow", 0)
    before = content(image)
    os.link(image, image.with_name("vm@1.fvd"))
    must("delete", image.with_name("vm@1.fvd"))
    assert names(image) == ["vm.fvd"]
    assert content(image) == before


@pytest.mark.parametrize("command", ["snapshot", "revert", "commit"])
def test_what_was_replaced_before_it_was_locked_is_not_written(image: Path, command: str) -> None:
    """It is a snapshot by then, or has no name any more: a change of it would be wrong, or lost."""
    chain(image, "flat", 1)
    opened = open_chain(str(image), Policy())
    must(command, image)
    with pytest.raises(ImageBusy, match="replaced while it was opened"):
        trio.run(load_chain, opened)


@pytest.mark.parametrize(("words", "snapshots"), [(["commit"], 1), (["revert"], 0)])
def test_a_snapshot_that_comes_before_the_lock_is_seen(
    image: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], snapshots: int
) -> None:
    states = chain(image, "data file", snapshots)

    def late(path: str, policy: Policy) -> object:
        must("snapshot", path, "late")
        must("resize", path, "+64K")
        return opened_alone(path, policy)

    monkeypatch.setattr(importlib.import_module(f"fvdfs.layers.{words[0]}"), "opened_alone", late)
    assert main([*words, str(image), *(["late"] if words == ["revert"] else [])]) == 0
    longer = states[-1] + bytes(64 * KIB)
    assert content(image) == (longer if words == ["commit"] else states[-1])
    assert content(image.with_name("vm@late.fvd")) == content(image)
    if snapshots:
        assert content(image.with_name("vm@1.fvd")) == states[0]


def test_what_a_deletion_that_has_not_ended_stands_on_stays(image: Path) -> None:
    states = chain(image, "flat", 2)
    going = image.with_name("vm@2.fvd.deleted")
    image.with_name("vm@2.fvd").rename(going)
    must("rebase", image, "-b", going.name, "-F", "fvd", "--unsafe")
    refused(["resize", image.with_name("vm@1.fvd"), "4K", "--shrink"], "stands on it")
    must("delete", image.with_name("vm@1.fvd"))
    assert content(image) == states[-1]
    must("delete", image.with_name("vm@2.fvd"))
    assert content(image) == states[-1]
    assert names(image) == ["vm.fvd"]


@pytest.mark.parametrize("second", [1, 2])
def test_two_deletions_at_once(image: Path, monkeypatch: pytest.MonkeyPatch, second: int) -> None:
    """What one merges into, or from, the other leaves alone."""
    states = chain(image, "flat", 3)
    seen = []

    async def late(*what: Any) -> None:
        seen.append(names(image))
        refused(["delete", image.with_name(f"vm@{second}.fvd")], "close it there first", code=1)
        assert names(image) == seen[0]
        await merge(*what)

    monkeypatch.setattr("fvdfs.layers.delete.merge", late)
    assert main(["delete", str(image.with_name("vm@1.fvd"))]) == 0
    assert seen
    assert content(image) == states[-1]
    for number in (2, 3):
        must("delete", image.with_name(f"vm@{number}.fvd"))
    assert content(image) == states[-1]


def test_an_image_that_comes_before_a_snapshot_is_removed_keeps_it(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = chain(image, "flat", 1)
    must("flatten", image)

    def late(path: str, policy: Policy) -> object:
        must("revert", image, "1")
        return open_alone(path, policy)

    monkeypatch.setattr("fvdfs.layers.delete.open_alone", late)
    assert main(["delete", str(image.with_name("vm@1.fvd"))]) == 1
    assert content(image) == states[0]


def test_what_an_image_that_cannot_be_read_may_stand_on_is_not_cut(image: Path) -> None:
    states = chain(image, "flat", 0)
    image.with_name("cut.fvd").write_bytes(image.read_bytes()[:3000])
    refused(["resize", image, "4K", "--shrink"], "cut.fvd: nobody knows what it stands on", code=1)
    assert content(image) == states[0]


def test_the_longest_name_of_a_snapshot_that_can_be_deleted(image: Path) -> None:
    states = chain(image, "flat", 0)
    name = "x" * (255 - len("vm@.fvd.deleted"))
    refused(["snapshot", image, f"{name}x"], "too long")
    must("snapshot", image, name)
    must("delete", image.with_name(f"vm@{name}.fvd"))
    assert content(image) == states[0]
