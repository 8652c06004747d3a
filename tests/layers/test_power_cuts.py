"""Power cuts while layers change: several files and their names, with every order in which these may become stable.

FVDFS_CUTS=1 has about every state tried, of all layouts; FVDFS_CUTS_SEED has other ones tried.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from fvdfs.check.check import check_image, render
from fvdfs.commands import layers, migration
from fvdfs.commands import rebase as rebase_command
from fvdfs.commands import resize as resize_command
from fvdfs.commands import snapshot as snapshot_command
from fvdfs.errors import FvdError
from fvdfs.format.creation import CreateOptions
from fvdfs.format.migration import PLACE, Incoming, Outgoing, Record, Target
from fvdfs.format.migration import Source as MoveState
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.layers.snapshot import MARK
from fvdfs.ops import moves
from fvdfs.ops.snapshots import make_snapshot
from fvdfs.sizes import NewSize
from fvdfs.store.host import HostFile, open_path
from support import reference
from support.builder import KIB, create
from support.crash import quiet
from support.crash_mutants import changed
from support.cuts import NEVER, SECTOR, Recording, State, recorded, take, try_cuts
from support.kernel import Kernel
from support.served import Served

Command = Callable[[Path], int]
"""What a user runs in a folder: its exit code."""
EFFORT = float(os.environ.get("FVDFS_CUTS", "0.15"))
SEED = os.environ.get("FVDFS_CUTS_SEED", "")
OFTEN = ("compact cow", "data file")
OPEN = ("cow", "compact", "no journal") if EFFORT >= 1 else ("compact cow",)
"""Layouts that are tried with little effort, too."""
SIZE = 96 * KIB
BASE = random.Random(1).randbytes(SIZE // 2 + 1000)
LAYOUTS = {
    "flat": CreateOptions(),
    "cow": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=4 * KIB, journal_size=4 * KIB),
    "compact": CreateOptions(compact=True, chunk_size=8 * KIB, journal_size=8 * KIB),
    "compact cow": CreateOptions(
        base_img="base.raw", base_img_fmt="raw", block_size=1536, compact=True, chunk_size=4 * KIB, journal_size=4 * KIB
    ),
    "data file": CreateOptions(
        base_img="base.raw", base_img_fmt="raw", block_size=4 * KIB, journal_size=4 * KIB, data_file="vm.fvd.data"
    ),
    "no journal": CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=4 * KIB, journal_size=0),
}
LEAKS = 3
"""What `check` ends with where a crash has left space of no use."""


def after(work: Callable[[], int]) -> str:
    """What a command says that has failed; empty: it has not."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), quiet():
        try:
            code = work()
        except (FvdError, OSError) as error:
            return f"{error}"
    assert code == 0
    return ""


def change(path: Path, seed: int, size: int = SIZE, *, closed: bool = True) -> None:
    """Write, zero and perhaps resize at random. Unless `closed`, the process is killed after a flush."""

    async def work() -> None:
        rng = random.Random(seed)
        disk = await open_image(str(path), Policy(), write=True)
        if size != disk.size:
            await disk.resize(size, shrink=True)
        for _ in range(4):
            start = rng.randrange(size - 10 * KIB)
            await disk.write(start, rng.randbytes(rng.randrange(1, 10 * KIB)))
            start = rng.randrange(size - 20 * KIB)
            await disk.zero(start, start + rng.randrange(1, 20 * KIB))
        await disk.fsync()
        if not closed:
            os._exit(0)
        await disk.close()

    if closed:
        trio.run(work)
        return
    child = os.fork()
    if not child:
        with quiet():
            trio.run(work)
    assert not os.waitpid(child, 0)[1]


def content(path: Path) -> bytes:
    """What the independent reader finds; of the disk, what both find."""
    found = b"".join(reference.read_disk(path))
    if MARK in path.name:
        return found

    async def read() -> bytes:
        image = await open_image(str(path), Policy(writable=False))
        try:
            return bytes(await image.read(0, image.size))
        finally:
            await image.close()

    with quiet():
        assert trio.run(read) == found, f"{path.name}: the readers differ"
    return found


class Folder:
    """What a cut has left, and what was there before."""

    def __init__(self, path: Path, layout: str, before: dict[str, bytes]) -> None:
        self.path = path
        self.layout = layout
        self.before = before
        """The content of each image."""
        self.image = path / "vm.fvd"
        self.ended = False
        """Whether the command had ended before the cut: its result stays."""

    def at(self, name: str) -> Path:
        return self.path / name

    def shows(self, name: str, *states: str) -> None:
        """An image shows what one of these has shown before."""
        assert content(self.at(name)) in [self.before[state] for state in states], f"{name} shows something else"

    def check(self) -> None:
        """All images are right."""
        names = {path.name for path in self.path.glob("*.fvd")}
        below = {reference.Header(self.at(name)).text["base_img"] for name in names}
        for name in names - below:  # which are checked along with what stands on them
            with quiet():
                report = check_image(str(self.at(name)))
            found = render(report)
            is_unclean = self.layout == "no journal" and "clean_shutdown" in found
            assert report.exit_code in (0, LEAKS) or is_unclean, f"{name}: {found}"

    def again(self, command: Command) -> bool:
        """The command succeeds, and leaves all right; False: the image has no journal, and the user is asked."""
        failure = after(lambda: command(self.path))
        if self.layout == "no journal" and "accept_unclean" in failure:
            return False
        assert not failure
        self.check()
        return True

    def holds(self, *names: str) -> None:
        """These are there, and beside them at most a data file that was used before, and parts."""
        found = {path.name for path in self.path.iterdir()}
        assert {name for name in found if not name.startswith(".") and not name.endswith((".data", ".raw"))} == {
            *names,
            "vm@0.fvd",
        }

    def stands_on(self, name: str) -> str:
        """The name of the base of an image."""
        header = reference.Header(self.at(name))
        return "" if header.all_data_in_fvd_img else header.text["base_img"]


@dataclass(frozen=True)
class Case:
    """A command in the folder with vm.fvd over vm@2.fvd over vm@1.fvd, and what has to hold after a cut."""

    command: Command
    look: Callable[[Folder], None]
    layouts: tuple[str, ...] = tuple(LAYOUTS)


def snapshot(folder: Path) -> int:
    return snapshot_command.run(str(folder / "vm.fvd"), "")


def delete(folder: Path) -> int:
    return layers.run_delete(str(folder / "vm@2.fvd"), options=(), secret="")


def delete_the_last(folder: Path) -> int:
    return layers.run_delete(str(folder / "vm@0.fvd"), options=(), secret="")


def commit(folder: Path) -> int:
    return layers.run_commit(str(folder / "vm.fvd"), options=(), secret="")


def rebase(folder: Path) -> int:
    image = str(folder / "vm.fvd")
    return rebase_command.run(image, base="vm@1.fvd", base_format="", unsafe=False, options=(), secret="")


def flatten(folder: Path) -> int:
    return layers.run_flatten(str(folder / "vm.fvd"), options=(), secret="")


def revert(folder: Path) -> int:
    return layers.run_revert(str(folder / "vm.fvd"), "1")


def resize(size: int) -> Command:
    return lambda folder: resize_command.run(
        str(folder / "vm.fvd"), NewSize(size, added=False), shrink=True, options=(), secret=""
    )


def freeze(folder: Path) -> int:
    return migration.run_freeze(str(folder / "vm.fvd"))


def thaw(folder: Path) -> int:
    return migration.run_thaw(str(folder / "vm.fvd"), lose_writes=True)


def after_snapshot(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    new = folder.at("vm@3.fvd")
    if folder.stands_on("vm.fvd") == "vm@3.fvd":
        folder.shows("vm@3.fvd", "vm.fvd")
    else:
        assert not folder.ended
        if new.exists():
            assert os.path.samefile(new, folder.image)
        if folder.again(snapshot):
            assert folder.stands_on("vm.fvd") == "vm@3.fvd"
            folder.shows("vm@3.fvd", "vm.fvd")
            folder.holds("vm.fvd", "vm@1.fvd", "vm@2.fvd", "vm@3.fvd")
    folder.shows("vm.fvd", "vm.fvd")
    folder.shows("vm@2.fvd", "vm@2.fvd")


def after_delete(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    folder.shows("vm@1.fvd", "vm@1.fvd")
    if folder.at("vm@2.fvd").exists():
        folder.shows("vm@2.fvd", "vm@2.fvd")
    if folder.at("vm@2.fvd").exists() or folder.at("vm@2.fvd.deleted").exists():
        assert not folder.ended
        if not folder.again(delete):
            return
        folder.shows("vm.fvd", "vm.fvd")
    folder.holds("vm.fvd", "vm@1.fvd")


def after_delete_of_the_last(folder: Folder) -> None:
    """Nothing stands on it."""
    folder.shows("vm.fvd", "vm.fvd")
    if folder.at("vm@0.fvd").exists():
        assert not folder.ended
        folder.shows("vm@0.fvd", "vm@0.fvd")
        folder.again(delete_the_last)
        folder.shows("vm.fvd", "vm.fvd")


def after_commit(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    folder.shows("vm@1.fvd", "vm@1.fvd")
    if folder.ended:
        folder.shows("vm@2.fvd", "vm.fvd")
    if folder.again(commit):
        folder.shows("vm.fvd", "vm.fvd")
        folder.shows("vm@2.fvd", "vm.fvd")
        folder.holds("vm.fvd", "vm@1.fvd", "vm@2.fvd")


def after_rebase(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    assert folder.stands_on("vm.fvd") in (("vm@1.fvd",) if folder.ended else ("vm@1.fvd", "vm@2.fvd"))
    for name in ("vm@1.fvd", "vm@2.fvd"):
        folder.shows(name, name)
    if folder.again(rebase):
        assert folder.stands_on("vm.fvd") == "vm@1.fvd"
        folder.shows("vm.fvd", "vm.fvd")


def after_flatten(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    folder.shows("vm@2.fvd", "vm@2.fvd")
    assert not (folder.ended and folder.stands_on("vm.fvd"))
    if folder.stands_on("vm.fvd") and folder.again(flatten):
        assert folder.stands_on("vm.fvd") == ""
        folder.shows("vm.fvd", "vm.fvd")


def after_revert(folder: Folder) -> None:
    reverted = folder.stands_on("vm.fvd") == "vm@1.fvd"
    assert reverted or not folder.ended
    folder.shows("vm.fvd", "vm@1.fvd" if reverted else "vm.fvd")
    for name in ("vm@1.fvd", "vm@2.fvd"):
        folder.shows(name, name)
    if folder.again(revert):
        folder.shows("vm.fvd", "vm@1.fvd")
        folder.holds("vm.fvd", "vm@1.fvd", "vm@2.fvd")


def after_resize(size: int) -> Callable[[Folder], None]:
    def look(folder: Folder) -> None:
        old = folder.before["vm.fvd"]
        found, smaller = content(folder.image), min(len(old), size)
        assert len(found) in ((size,) if folder.ended else (len(old), size))
        assert found[:smaller] == old[:smaller]
        for at in range(smaller, len(found), SECTOR):  # is going, or is new
            assert found[at : at + SECTOR] in (bytes(SECTOR), old[at : at + SECTOR])
        if folder.again(resize(size)):
            assert content(folder.image) == old[:size].ljust(size, b"\0")
        folder.shows("vm@2.fvd", "vm@2.fvd")

    return look


def record_of(image: Path) -> Record:
    return Record.at(image.read_bytes(), image.name)


def after_freeze(folder: Folder) -> None:
    folder.shows("vm.fvd", "vm.fvd")
    if record_of(folder.image):
        assert reference.Header(folder.image).clean_shutdown
    else:
        assert not folder.ended
    if folder.again(freeze):
        assert record_of(folder.image).state == "frozen"
        folder.shows("vm.fvd", "vm.fvd")
        assert not after(lambda: thaw(folder.path))
        folder.shows("vm.fvd", "vm.fvd")


GROWN, CUT = 5 * 1024 * KIB, 32 * KIB
CASES = {
    "snapshot": Case(snapshot, after_snapshot),
    "delete": Case(delete, after_delete),
    "delete the last": Case(delete_the_last, after_delete_of_the_last, ("cow", "data file")),
    "commit": Case(commit, after_commit),
    "rebase": Case(rebase, after_rebase),
    "flatten": Case(flatten, after_flatten),
    "revert": Case(revert, after_revert, ("cow", "compact", "data file")),
    "freeze": Case(freeze, after_freeze),
    "grow": Case(resize(GROWN), after_resize(GROWN)),
    "shrink": Case(resize(CUT), after_resize(CUT)),
}


def chain(folder: Path, layout: str) -> None:
    """vm.fvd over vm@2.fvd over vm@1.fvd, each of another size, and vm@0.fvd, on which nothing stands.

    vm.fvd was not closed by its last user, but was flushed.
    """
    (folder / "base.raw").write_bytes(BASE)
    options, base, length = LAYOUTS[layout], "base.raw", len(BASE)
    for number, name in enumerate(("vm@0.fvd", "vm@1.fvd", "vm@2.fvd", "vm.fvd")):
        size = SIZE + (number - 2) * 4 * KIB
        if number > 1:
            options = replace(
                options,
                base_img=base,
                base_img_fmt="fvd",
                block_size=options.block_size or 4 * KIB,
                journal_size=4 * KIB if options.journal_size is None else options.journal_size,
            )
        if options.data_file:
            options = replace(options, data_file=f"{name}.data")
        create(folder / name, size, options, base_length=length if options.base_img else None)
        change(folder / name, number, size, closed=name != "vm.fvd" or layout == "no journal")
        if number:
            base, length = name, size


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Where states are put: in memory, where a flush costs nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@functools.cache
def built(layout: str) -> tuple[State, dict[str, bytes]]:
    """The folder that a command finds, and the content of each image."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chain(folder, layout)
        return take(folder), {path.name: content(path) for path in folder.glob("*.fvd")}


def recording_of(case: Case, layout: str, scratch: Path) -> tuple[Recording, Folder]:
    """What the command does, and the folder in which to look at what cuts leave."""
    folder = scratch / "images"
    folder.mkdir(exist_ok=True)
    state, before = built(layout)
    state.put(folder)
    with recorded(folder) as recording:
        assert not after(lambda: case.command(folder))
    return recording, Folder(folder, layout, before)


def explore(name: str, layout: str, scratch: Path, effort: float) -> int:
    """Cut the power in a command, and look at what is left: how many states there are."""
    case = CASES[name]
    recording, folder = recording_of(case, layout, scratch)

    def look(at: int) -> None:
        folder.ended = at == NEVER
        folder.check()
        case.look(folder)

    seed = zlib.crc32(f"{SEED} {name} {layout}".encode())
    return try_cuts(
        recording, folder.path, look, limit=round(40 * effort), randoms=max(3, round(3 * effort)), seed=seed
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name, case in CASES.items() for layout in (case.layouts if EFFORT >= 1 else OFTEN)],
)
def test_every_cut(scratch: Path, name: str, layout: str) -> None:
    """What a cut leaves is the state before or after, and the command can be done again."""
    print(f"{name}, {layout}: {explore(name, layout, scratch, EFFORT)} states")


NUMBERS = "e" * 16, "1" * 32
"""Epoch and target of a move, or the secret of that."""


def explore_hand_over(scratch: Path, monkeypatch: pytest.MonkeyPatch, layout: str, effort: float) -> int:
    """The same for a disk that is open, and written, and handed over to another host."""
    path, served = open_disk(scratch, monkeypatch, layout)
    created = Record(None, Outgoing(MoveState.SERVING, NUMBERS[0]))
    put_record(path / "a.fvd", created)
    told: list[int] = []
    flushed: list[int] = []

    async def work(kernel: Kernel, handle: int) -> None:
        await kernel.write(handle, PLACES[b"A"], b"A" * 5000)
        await kernel.fsync(handle)
        flushed.append(recording.now())
        await kernel.write(handle, PLACES[b"B"], b"B" * 5000)
        await moves.take_step(served.filesystem.openings, served.entry, f"handover {' '.join(NUMBERS)} beta")
        told.append(recording.now())

    with quiet(), recorded(path) as recording:
        served.run(work)

    def look(at: int) -> None:
        record, found = record_of(path / "a.fvd"), content(path / "a.fvd")
        Folder(path, layout, {}).check()
        if record.handed_over:
            assert reference.Header(path / "a.fvd").clean_shutdown
            expect(found, b"AB")
            return
        assert record == created
        assert at < told[0], "it was told to the target"
        expect(found, b"A" if at >= flushed[0] else b"")

    return try_cuts(recording, path, look, limit=round(100 * effort), randoms=max(2, round(6 * effort)), seed=1)


def explore_take_over(scratch: Path, monkeypatch: pytest.MonkeyPatch, effort: float) -> int:
    """The same for a disk that is taken over from another host by its first write."""
    path, served = open_disk(scratch, monkeypatch, "cow")
    shutil.copy(path / "base.raw", path / "frozen.raw")
    put_record(path / "a.fvd", Record(Incoming(Target.RECEIVING, *NUMBERS)))
    promised: list[tuple[int, bytes]] = []

    async def say_yes(*_: object, **__: object) -> None:
        pass

    def open_source(image: str, *_: object, **__: object) -> HostFile:
        return open_path(os.path.join(os.path.dirname(image), "frozen.raw"), writable=False)

    monkeypatch.setattr(moves, "ask", say_yes)
    monkeypatch.setattr(moves, "open_named", open_source)

    async def work(kernel: Kernel, handle: int) -> None:
        for letter, place in PLACES.items():
            await kernel.write(handle, place, letter * 5000)
            await kernel.fsync(handle)
            promised.append((recording.now(), letter))

    with quiet(), recorded(path) as recording:
        served.run(work)

    def look(at: int) -> None:
        image = path / "a.fvd"
        assert set(reference.check(image, "fvdfs")) <= {"the header's padding is not zero"}, "it has a record"
        found = b"".join(reference.read_disk(image))
        stable = b"".join(letter for time, letter in promised if time <= at)
        expect(found, stable)
        if record_of(image).receiving:
            assert not stable
            assert found == BASE.ljust(SIZE, b"\0"), "something is kept of what the source may yet change"

    return try_cuts(recording, path, look, limit=round(100 * effort), randoms=max(2, round(6 * effort)), seed=1)


def open_disk(scratch: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> tuple[Path, Served]:
    path = scratch / "open"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    served = Served(path, monkeypatch)
    (path / "base.raw").write_bytes(BASE)
    options = LAYOUTS[layout]
    create(path / "a.fvd", SIZE, options, base_length=len(BASE) if options.base_img else None)
    return path, served


def put_record(image: Path, record: Record) -> None:
    with image.open("r+b") as file:
        file.seek(PLACE)
        file.write(record.encode())


@pytest.mark.parametrize("layout", ("cow", "compact", "data file") if EFFORT >= 1 else ("compact cow",))
def test_a_disk_that_is_handed_over(scratch: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Once the target was told, it is frozen after every cut; what is frozen has all that was answered."""
    print(f"handed over, {layout}: {explore_hand_over(scratch, monkeypatch, layout, EFFORT)} states")


def test_a_disk_that_is_taken_over(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every cut nothing was kept of a disk that is still its source's."""
    print(f"taken over: {explore_take_over(scratch, monkeypatch, EFFORT)} states")


def test_a_step_of_a_move_that_was_killed_is_stable_once_it_was_repeated(scratch: Path) -> None:
    (folder := scratch / "killed").mkdir()
    image = folder / "vm.fvd"
    create(image, SIZE, CreateOptions())
    with recorded(folder) as recording:
        file = open_path(str(image), writable=True)
        file.pwrite_now(Record(None, Outgoing(MoveState.FROZEN, NUMBERS[0])).encode(), PLACE)
        file.close()
        assert not after(lambda: freeze(folder))

    def look(at: int) -> None:
        assert record_of(image).state == "frozen" or at < NEVER

    try_cuts(recording, folder, look, limit=100, randoms=3, seed=1)


PLACES = {b"A": 4096, b"B": 20_001, b"C": 60_000}


def explore_open(scratch: Path, monkeypatch: pytest.MonkeyPatch, layout: str, effort: float) -> int:
    """The same for three snapshots of a disk that is open and written."""
    path, served = open_disk(scratch, monkeypatch, layout)
    promised: list[tuple[int, bytes]] = []

    async def work(kernel: Kernel, handle: int) -> None:
        for letter, place in PLACES.items():
            await kernel.write(handle, place, letter * 5000)
            await kernel.fsync(handle)
            promised.append((recording.now(), letter))
            await make_snapshot(served.filesystem.openings, served.entry, "")

    with quiet(), recorded(path) as recording:
        served.run(work)

    def look(at: int) -> None:
        folder = Folder(path, layout, {})
        folder.check()
        stable = b"".join(letter for time, letter in promised if time <= at)
        expect(content(path / "a.fvd"), stable)
        for number in range(1, len(PLACES) + 1):
            under = path / f"a@{number}.fvd"
            if under.exists() and not os.path.samefile(under, path / "a.fvd"):
                before = b"".join(PLACES)[:number]
                expect(content(under), before)
                assert not any(bytes([later]) * 100 in content(under) for later in b"".join(PLACES)[number:])
            assert under.exists() or at < NEVER

    seed = zlib.crc32(f"{SEED} {layout}".encode())
    return try_cuts(recording, path, look, limit=round(100 * effort), randoms=max(2, round(3 * effort)), seed=seed)


@pytest.mark.parametrize("layout", OPEN)
def test_snapshots_of_an_open_disk(scratch: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """What was flushed is in the disk, and each snapshot holds what was written before, and nothing later."""
    print(f"open, {layout}: {explore_open(scratch, monkeypatch, layout, EFFORT)} states")


def expect(found: bytes, letters: bytes) -> None:
    """These are where they were written."""
    for letter in letters:
        place = PLACES[bytes([letter])]
        assert found[place : place + 5000] == bytes([letter]) * 5000, f"{letter:c} is not there"


NEWTOP, SNAPSHOT, DELETE = "fvdfs.layers.newtop", "fvdfs.layers.snapshot", "fvdfs.layers.delete"
REBASE, COMMIT, RECORD = "fvdfs.layers.rebase", "fvdfs.image.commit", "fvdfs.image.migration"
FOLDER = "sync_folder(os.path.dirname(image))"
NO_FLUSH = ("fvdfs.store.flushing", "Flusher._flush_now", "os.fdatasync(self._fd)", "pass")
MUTANTS: dict[tuple[str, str], list[tuple[str, str, str, str]]] = {
    ("snapshot", "cow"): [
        (NEWTOP, "write_top", "os.fsync(descriptor)", "pass"),
        (SNAPSHOT, "add_name", f"            os.unlink(path)\n    {FOLDER}", "            os.unlink(path)"),
        (SNAPSHOT, "make_snapshot", f"            {FOLDER}", "            pass"),
    ],
    ("delete", "data file"): [
        (DELETE, "_merge", "os.link(path, going)\n        sync_folder(folder)", "os.link(path, going)"),
        (DELETE, "_merge", "os.unlink(path)\n        sync_folder(folder)", "os.unlink(path)"),
        (
            DELETE,
            "_merge",
            "os.rename(going, user.path)\n                sync_folder(folder)",
            "os.rename(going, user.path)",
        ),
        (DELETE, "_merge", "await _rename_base(upper, os.path.basename(going))", "pass"),
    ],
    ("delete the last", "data file"): [
        (DELETE, "_remove", "sync_folder(os.path.dirname(path))", "remove_data_file(data_file)"),
    ],
    ("commit", "data file"): [
        (NEWTOP, "write_top", "os.fsync(descriptor)", "pass"),
        (NEWTOP, "replace_by_new", FOLDER, "pass"),
    ],
    ("rebase", "compact cow"): [
        (COMMIT, "Committer.change_header", "await self._flush(self._meta)", "pass"),
        (
            REBASE,
            "rebase",
            "await image.committer.checkpoint(clear_journal=True)",
            "await image.committer.change_header(base_img=name)",
        ),
    ],
    ("flatten", "compact cow"): [
        (COMMIT, "Committer.release_base", "await self._commit(checkpoint=True)", "pass"),
    ],
    ("freeze", "data file"): [
        (RECORD, "write_record", "os.fsync(file.fileno())", "pass"),
    ],
    ("grow", "data file"): [NO_FLUSH],
    ("shrink", "compact cow"): [NO_FLUSH],
    ("revert", "data file"): [(NEWTOP, "replace_by_new", FOLDER, "pass")],
}
"""Of a command and a layout: a module, a function, what of its text is replaced by what, which must be found."""

OPEN_MUTANTS = [
    ("fvdfs.ops.snapshots", "_make", "sync_folder, os.path.dirname(path)", "os.path.dirname, path"),
    (SNAPSHOT, "add_name", f"            os.unlink(path)\n    {FOLDER}", "            os.unlink(path)"),
]
"""The same of snapshots of an open disk."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "number"),
    [(case, number) for case, all_ in MUTANTS.items() for number in range(len(all_))][:: 1 if EFFORT >= 1 else 5],
)
def test_a_mutant_is_found(scratch: Path, case: tuple[str, str], number: int) -> None:
    """A flush that is left out, or a step too early."""
    (mutant,) = changed([MUTANTS[case][number]])
    with mutant.applied(), pytest.raises(Exception) as found:
        explore(*case, scratch, 1)
    print(f"{mutant.name}: {found.value} {found.value.__notes__[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(OPEN_MUTANTS) if EFFORT >= 1 else 1))
def test_a_mutant_of_the_open_disk_is_found(scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (mutant,) = changed([OPEN_MUTANTS[number]])
    with mutant.applied(), pytest.raises(Exception) as found:
        explore_open(scratch, monkeypatch, "cow", 1)
    print(f"{mutant.name}: {found.value} {found.value.__notes__[0]}")


HAND_OVER_MUTANTS = [
    (RECORD, "write_record", "os.fsync(file.fileno())", "pass"),
    ("fvdfs.ops.moves", "_change", "await _freeze(openings, entry, image)", "pass"),
    ("fvdfs.image.image", "Image.freeze", "await self.stop_writing()", "self.writable = False"),
]
"""The same of a disk that is handed over."""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(HAND_OVER_MUTANTS)))
def test_a_mutant_of_a_hand_over_is_found(scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (mutant,) = changed([HAND_OVER_MUTANTS[number]])
    with mutant.applied(), pytest.raises(AssertionError) as found:
        explore_hand_over(scratch, monkeypatch, "cow", 1)
    print(f"{mutant.name}: {found.value} {found.value.__notes__[0]}")
