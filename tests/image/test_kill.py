"""The process that serves a mount is killed at random moments under load, and nothing is lost that was promised.

`killwriter.py` writes sectors that say when they were written, and notes before each write what it is about to do,
and after each fsync that it was answered. After the kill each sector must hold what was promised or something that
was written later, both as an independent reader of the image sees it and through a new mount. What was seen once
counts as promised from then on: a later kill must not bring back what is older.

The second part has ext4 instead, on a loop device over the disk, which discards what it frees: a file system notices
if what it flushed is not there.

FVDFS_KILLS sets how often each layout is killed, FVDFS_KILLS_SEED has other moments tried.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import killwriter, reference
from support.guest import find_program
from support.killwriter import SECTOR, generation_of, sector
from support.mounts import MIB, PASSED_THROUGH, Mount, mounted, must, needs_passthrough, wait_for_end

KILLS = int(os.environ.get("FVDFS_KILLS", "1"))
SEED = os.environ.get("FVDFS_KILLS_SEED", "0")
MANY = 8  # kills of a layout
KILLS_PER_IMAGE = 8
DISK = 6 * MIB
BASE = 4 * MIB + 3 * SECTOR

_COW = ["--base", "base.raw", "--base-format", "raw"]
LAYOUTS: dict[str, tuple[list[str], str]] = {
    "plain": ([], ""),
    "cow": ([*_COW, "--block-size", "64K"], ""),
    "cow, tiny journal": ([*_COW, "--block-size", "512", "--journal-size", "4K"], ""),
    "compact": (["--compact", "--chunk-size", "32K", "--journal-size", "64K"], ""),
    "compact cow": ([*_COW, "--compact", "--block-size", "8K", "--chunk-size", "64K", "--journal-size", "64K"], ""),
    "data file": ([*_COW, "--data-file", "a.data", "--compact", "--chunk-size", "32K"], "writeback=off"),
    "copy-on-read, prefetching": (
        [*_COW, "--block-size", "16K", "--copy-on-read", "--prefetch-delay", "1", "--compact", "--chunk-size", "64K"],
        "prefetch_max=4M",
    ),
    "no journal": ([*_COW, "--block-size", "4K", "--journal-size", "none"], "accept_unclean"),
    "passed through": (["--data-file", "auto"], PASSED_THROUGH),
}
layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=needs_passthrough if "through" in name else ()) for name in LAYOUTS]
)


def mounted_as(layout: str, folder: Path) -> AbstractContextManager[Mount]:
    """The folder, with the options of the layout."""
    options = LAYOUTS[layout][1]
    return mounted(folder, *(["-o", options] if options else []), passes="a" if "through" in layout else "")


@dataclass
class Ledger:
    """What each sector may hold: the generations not older than the last that was promised or seen.

    A generation of zeros counts as negative. A sector past the end of the disk holds zeros, as one in a gap that
    nobody has written does: generation 0.
    """

    journal: Path
    base_sectors: int
    legal: list[list[int]] = field(default_factory=lambda: [[0] for _ in range(DISK // SECTOR)])
    writes: int = 0
    promises: int = 0
    _at: int = 0

    def catch_up(self) -> None:
        """Take in what the journal has got since the last time; its writer is dead."""
        if not self.journal.exists():
            return
        with open(self.journal, "rb") as file:
            file.seek(self._at)
            text = file.read()
        self._at += len(text)
        pending: dict[str, list[tuple[int, int, int]]] = {}
        for line in text.decode().splitlines():
            kind, thread, *rest = line.split()
            if kind in "wz":
                first, count, generation = map(int, rest)
                if kind == "z":
                    generation = -generation
                self.writes += 1
                self.legal += [[0] for _ in range(len(self.legal), first + count)]
                pending.setdefault(thread, []).append((first, count, generation))
                for number in range(first, first + count):
                    self.legal[number].append(generation)
            else:
                self.promises += 1
                for first, count, generation in pending.pop(thread, []):
                    for number in range(first, first + count):
                        self._promise(number, generation)

    def _promise(self, number: int, generation: int) -> None:
        legal = self.legal[number]
        if generation in legal:  # else a later one was promised already
            del legal[: legal.index(generation)]

    def problems(self, disk: bytes, who: str) -> list[str]:
        """What is wrong with the disk's content, which must not become older from now on."""
        size = len(self.legal) * SECTOR
        assert DISK <= len(disk) <= size, f"{who}: the disk has {len(disk)} bytes"
        disk = disk.ljust(size, b"\0")
        found = []
        for number, legal in enumerate(self.legal):
            content = disk[number * SECTOR : (number + 1) * SECTOR]
            if len(legal) == 1 and content == self._content(number, legal[0]):
                continue
            generation = self._oldest(number, content)
            if generation is None:
                what = "zeros" if content == bytes(SECTOR) else generation_of(number, content)
                found.append(f"{who}: sector {number} holds {what}, not one of {legal}")
            else:
                self._promise(number, generation)
        return found

    def _oldest(self, number: int, content: bytes) -> int | None:
        """The oldest legal generation that looks like this; None: there is none."""
        legal = self.legal[number]
        return next((generation for generation in legal if content == self._content(number, generation)), None)

    def _content(self, number: int, generation: int) -> bytes:
        if generation > 0 or (generation == 0 and number < self.base_sectors):
            return sector(number, generation)
        return bytes(SECTOR)


def new_image(folder: Path, options: list[str]) -> Ledger:
    """An image over a base, if these options name one, of which nothing has been written."""
    folder.mkdir()
    base_sectors = BASE // SECTOR if "--base" in options else 0
    (folder / "base.raw").write_bytes(b"".join(sector(number, 0) for number in range(BASE // SECTOR)))
    must("create", folder / "a.fvd", str(DISK), *options)
    return Ledger(folder.parent / f"{folder.name}.promises", base_sectors)


def kill_under_load(mount: Mount, ledger: Ledger, rng: random.Random) -> None:
    """Have a program write to the disk, and kill the mount some time after its first write."""
    arguments = [str(mount.raw("a")), str(ledger.journal), str(rng.randrange(1 << 30)), str(ledger.writes)]
    writer = subprocess.Popen([sys.executable, "-I", "-S", killwriter.__file__, *arguments])
    try:
        enough = size_of(ledger.journal) + rng.choice([1, 300, 1000, 3000])  # about 100 bytes a promise
        while size_of(ledger.journal) < enough:
            assert writer.poll() is None, "the disk cannot be written"
            time.sleep(0.0005)
        time.sleep(rng.choice([0, 0, rng.uniform(0, 0.02), rng.uniform(0, 0.6)]))
        mount.kill()
        assert writer.wait(60) == 0
    finally:
        writer.kill()
        writer.wait()
    ledger.catch_up()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def serious(image: Path) -> list[str]:
    """What the independent checker finds wrong with an image that nobody closed, but for that."""
    return [problem for problem in reference.check(image, "fvdfs") if "clean_shutdown" not in problem]


def kill_often(tmp_path: Path, layout: str, kills: int) -> None:
    """Kill a mount as often as that, and say how much was at stake."""
    options = LAYOUTS[layout][0]
    rng = random.Random(f"{SEED} {layout}")
    writes = promises = 0
    for start in range(0, kills, KILLS_PER_IMAGE):
        folder = tmp_path / f"images{start}"
        ledger = new_image(folder, options)
        image = folder / "a.fvd"
        with mounted_as(layout, folder) as mount:
            for number in range(start, min(start + KILLS_PER_IMAGE, kills)):
                where = f"{layout}, kill {number} of seed {SEED}"
                kill_under_load(mount, ledger, rng)
                assert serious(image) == [], where
                found = b"".join(reference.read_disk(image))
                problems = ledger.problems(found, "the reference")
                assert not problems, f"{where}: {len(problems)} sectors lost: {problems[:5]}"
                mount.mount()
                assert mount.raw("a").read_bytes() == found, f"{where}: the mount shows something else"
                if rng.random() < 0.2:
                    with open(mount.raw("a"), "r+b"):
                        pass
                    mount.umount()
                    assert reference.check(image, "fvdfs") == [], where
                    assert ledger.problems(b"".join(reference.read_disk(image)), "closed") == [], where
                    mount.mount()
            with open(mount.raw("a"), "r+b"):
                pass
        assert reference.check(image, "fvdfs") == [], layout
        assert ledger.problems(b"".join(reference.read_disk(image)), "closed") == [], layout
        writes += ledger.writes
        promises += ledger.promises
    print(f"{layout}: {kills} kills, {writes} writes, {promises} promises, nothing lost")
    assert promises or kills < KILLS_PER_IMAGE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_was_flushed_is_lost(tmp_path: Path, layout: str) -> None:
    kill_often(tmp_path, layout, KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_was_flushed_is_lost_in_many_kills(tmp_path: Path, layout: str) -> None:
    kill_often(tmp_path, layout, max(MANY, KILLS))


def test_without_flushes_something_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So these tests would see a flush that did nothing."""
    monkeypatch.setitem(LAYOUTS, "no flush", (LAYOUTS["cow"][0], "sync=none"))
    with pytest.raises(AssertionError, match="sectors lost"):
        kill_often(tmp_path, "no flush", 3 * KILLS_PER_IMAGE)


def test_the_ledger_sees_what_is_lost(tmp_path: Path) -> None:
    """The judge itself: a promise that was broken, a mixture of two writes, and bytes of nobody are found."""
    ledger = Ledger(tmp_path / "promises", 0)
    disk = bytearray(DISK)
    ledger.journal.write_text("w 0 3 2 1\ns 0\nw 0 3 1 2\nw 1 40 1 3\n")
    ledger.catch_up()
    assert [problem.split()[2] for problem in ledger.problems(bytes(disk), "x")] == ["3", "4"]
    disk[3 * SECTOR : 5 * SECTOR] = sector(3, 2) + sector(4, 1)
    assert ledger.problems(bytes(disk), "x") == []
    disk[3 * SECTOR : 4 * SECTOR] = sector(3, 1)
    assert len(ledger.problems(bytes(disk), "x")) == 1, "what was seen became older"
    disk[3 * SECTOR : 4 * SECTOR] = sector(3, 2)[:256] + sector(3, 1)[256:]
    assert len(ledger.problems(bytes(disk), "x")) == 1
    disk[3 * SECTOR : 4 * SECTOR] = sector(3, 2)
    disk[40 * SECTOR] = 1
    assert len(ledger.problems(bytes(disk), "x")) == 1
    disk[40 * SECTOR] = 0
    with ledger.journal.open("a") as journal:
        journal.write("z 0 3 1 4\n")
    ledger.catch_up()
    assert ledger.problems(bytes(disk), "x") == [], "zeros that were not flushed"
    disk[3 * SECTOR : 4 * SECTOR] = bytes(SECTOR)
    assert ledger.problems(bytes(disk), "x") == []
    disk[3 * SECTOR : 4 * SECTOR] = sector(3, 2)
    assert len(ledger.problems(bytes(disk), "x")) == 1, "what was seen as zeros became older"
    disk[3 * SECTOR : 4 * SECTOR] = bytes(SECTOR)
    with ledger.journal.open("a") as journal:
        journal.write(f"w 0 {DISK // SECTOR} 1 5\ns 0\nw 0 {DISK // SECTOR + 2} 1 6\n")
    ledger.catch_up()
    assert len(ledger.problems(bytes(disk), "x")) == 1, "the disk became shorter"
    disk += sector(DISK // SECTOR, 5)
    assert ledger.problems(bytes(disk), "x") == []
    disk += bytes(SECTOR) + sector(DISK // SECTOR + 2, 6)
    assert ledger.problems(bytes(disk), "x") == []
    assert len(ledger.problems(bytes(disk[:-SECTOR]), "x")) == 1, "what was seen is no longer there"


# --- ext4 on the disk ---------------------------------------------------------------------------

EXT4_LAYOUTS = ("plain", "cow", "compact cow", "no journal", pytest.param("passed through", marks=needs_passthrough))
EXT4_DISK = "24M"


class Ext4:
    """A file system on a disk, written to through a loop device; it discards what becomes free."""

    def __init__(self, mount: Mount, point: Path) -> None:
        self._raw = mount.raw("a")
        self._point = point
        self._device = ""

    def __enter__(self) -> Path:
        done = subprocess.run(["losetup", "-f", "--show", self._raw], check=True, capture_output=True, text=True)
        self._device = done.stdout.strip()
        try:
            options = ["-t", "ext4", "-o", "errors=continue,discard"]
            subprocess.run(["mount", *options, self._device, self._point], check=True)
        except BaseException:
            subprocess.run(["losetup", "-d", self._device], check=False)
            raise
        return self._point

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", self._point], check=True, capture_output=True)
        subprocess.run(["losetup", "-d", self._device], check=True)


def write_files(folder: Path, kept: dict[str, bytes], rng: random.Random, until: float) -> None:
    """Make, replace and remove files, until the disk fails or it is time; `kept` are those that were flushed."""
    with contextlib.suppress(OSError):
        while time.monotonic() < until:
            name = f"f{rng.randrange(40)}"
            path = folder / name
            if name in kept and rng.random() < 0.3:
                del kept[name]
                path.unlink()
                continue
            kept.pop(name, None)
            data = rng.randbytes(rng.choice([10, 5_000, 60_000]))
            with open(path, "wb") as file:
                file.write(data)
                if rng.random() < 0.4:
                    file.flush()
                    os.fsync(file.fileno())
                    kept[name] = data


def is_sound(disk: Path) -> None:
    """Replay the file system's journal; then nothing at all may be wrong with it."""
    done = subprocess.run([find_program("e2fsck"), "-p", disk], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    done = subprocess.run([find_program("e2fsck"), "-fn", disk], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def load_until_killed(mount: Mount, files: Path, kept: dict[str, bytes], rng: random.Random) -> None:
    """Write files, and have the mount killed meanwhile."""
    seconds = rng.uniform(0.02, 0.8)
    timer = threading.Timer(seconds, os.kill, (mount.pid, signal.SIGKILL))
    timer.start()
    write_files(files, kept, rng, time.monotonic() + seconds + 0.1)
    timer.join()
    subprocess.run(["umount", "-l", mount.point], check=True)
    wait_for_end(mount.pid)
    mount.pid = 0


def kill_ext4_often(tmp_path: Path, layout: str, kills: int) -> None:
    options = LAYOUTS[layout][0]
    rng = random.Random(f"{SEED} ext4 {layout}")
    folder = tmp_path / "images"
    point = tmp_path / "ext4"
    folder.mkdir()
    point.mkdir()
    (folder / "base.raw").write_bytes(bytes(BASE))
    must("create", folder / "a.fvd", EXT4_DISK, *options)
    kept: dict[str, bytes] = {}
    flushed = 0
    with mounted_as(layout, folder) as mount:
        subprocess.run([find_program("mkfs.ext4"), "-q", "-F", mount.raw("a")], check=True)
        for _ in range(kills):
            with Ext4(mount, point) as files:
                for name, data in kept.items():
                    assert (files / name).read_bytes() == data, f"{name} was flushed"
                load_until_killed(mount, files, kept, rng)
            flushed += len(kept)
            mount.mount()
            is_sound(mount.raw("a"))
    assert reference.check(folder / "a.fvd", "fvdfs") == []
    print(f"ext4, {layout}: {kills} kills, {flushed} flushed files looked at")


@pytest.mark.parametrize("layout", EXT4_LAYOUTS[2:])
def test_ext4_on_a_loop_device_survives(tmp_path: Path, layout: str) -> None:
    kill_ext4_often(tmp_path, layout, KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXT4_LAYOUTS)
def test_ext4_on_a_loop_device_survives_many_kills(tmp_path: Path, layout: str) -> None:
    kill_ext4_often(tmp_path, layout, max(MANY, KILLS))
