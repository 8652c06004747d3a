"""Random operations on mounted disks of every layout (`support.fsx`), and that they find what is wrong.

FVDFS_FSX_OPS sets how many operations each disk gets, FVDFS_FSX_SEED has other ones tried.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support import fsx
from support.devices import device
from support.fakes import SECTOR
from support.mounts import MIB, NO_PASSTHROUGH, PASSED_THROUGH, Mount, fvdfs, mounted, must

KIB = 1024
FEW = 250  # operations, where nobody asks for more
OPS = int(os.environ.get("FVDFS_FSX_OPS", str(FEW)))
SEED = os.environ.get("FVDFS_FSX_SEED", "")
pytestmark = pytest.mark.timeout(300 + OPS / 25)  # seconds; a busy machine does 25 operations in one
SIZE = 2 * MIB
LIMIT = 4 * MIB
BASE = MIB + 300 * KIB + 777  # bytes
CHUNK = 64 * KIB
OVER_BASE = ("--base", "base.raw", "--base-format", "raw")
COMPACT = ("--compact", "--chunk-size", str(CHUNK))
LITTLE_MORE = ("--grow-unit", "64K", "--journal-size", "1M")  # than its data: what a small image takes
PAGE = 4096  # bytes; what the size of a disk that is passed through is a multiple of, and its direct I/O, on any disk


LEAKED = 3  # exit code of `check`: what a shrink frees of a device is used again only behind the highest chunk


@dataclass(frozen=True)
class Layout:
    """How a disk is made."""

    options: tuple[str, ...] = ()
    middle: tuple[str, ...] = ()
    """The options of an image between it and the base."""
    device: int = 0
    """Bytes of the block device that it is on; 0: in a file."""
    passed: bool = False
    """The kernel reads and writes it by itself, without the write-back cache."""


LAYOUTS = {
    "flat": Layout(),
    "flat-cow": Layout(OVER_BASE),
    "flat-cow-small-blocks": Layout((*OVER_BASE, "--block-size", "4K", "--copy-on-read")),
    "compact": Layout(COMPACT),
    "compact-cow": Layout((*OVER_BASE, *COMPACT)),
    "compact-cow-no-journal": Layout((*OVER_BASE, *COMPACT, "--journal-size", "none")),
    "data-file": Layout(("--data-file", "auto"), passed=True),
    "compact-data-file": Layout(("--data-file", "auto", *COMPACT)),
    "qcow2": Layout(("--data-file", "data.qcow2", "--data-format", "qcow2")),
    "flat-device": Layout(device=32 * MIB),
    "compact-device": Layout(COMPACT, device=32 * MIB),
    # With room for a few chunks more than the disk has: what was discarded is used again.
    "compact-device-full": Layout((*COMPACT, *LITTLE_MORE), device=6 * MIB),
    "compact-device-full-cow": Layout((*OVER_BASE, *COMPACT, *LITTLE_MORE), device=6 * MIB),
    "chain": Layout(("--base", "middle.fvd"), middle=OVER_BASE),
    "compact-chain": Layout(("--base", "middle.fvd", *COMPACT), middle=(*OVER_BASE, *COMPACT)),
}
MODES = {
    "writeback": "writeback=on",
    "no-writeback": "writeback=off",
    "writeback-no-ring": "writeback=on,io_uring=off",
    "no-writeback-no-ring": "writeback=off,io_uring=off",
}


def write_base(path: Path) -> None:
    """Data and holes, of an odd length."""
    rng = random.Random(1)
    with open(path, "wb") as file:
        for at in range(0, BASE, 200 * KIB):
            file.seek(at)
            file.write(rng.randbytes(rng.randrange(1, 150 * KIB)))
        file.truncate(BASE)


def create(folder: Path, layout: Layout, stack: ExitStack) -> None:
    """The image disk.fvd, and what it stands on."""
    image = folder / "disk.fvd"
    write_base(folder / "base.raw")
    if layout.middle:
        must("create", folder / "middle.fvd", str(SIZE - MIB // 2), *layout.middle)
    if layout.device:
        soiled = stack.enter_context(device(folder.parent / "device", layout.device))
        options = [str(folder / "base.raw") if option == "base.raw" else option for option in layout.options]
        must("create", soiled.path, str(SIZE), *options, "--force")
        image.symlink_to(soiled.path)
    else:
        must("create", image, str(SIZE), *layout.options)


@contextmanager
def served(folder: Path, name: str, mode: str) -> Iterator[tuple[Mount, fsx.Target]]:
    """The disk, mounted, and what it may do."""
    layout = LAYOUTS[name]
    passed = layout.passed and PASSED_THROUGH in MODES[mode] and not NO_PASSTHROUGH
    with ExitStack() as stack:
        create(folder, layout, stack)
        options = f"{MODES[mode]},shrink,base_path=/"
        mount = stack.enter_context(mounted(folder, "-o", options, passes="disk" if passed else ""))
        limit = SIZE if name == "flat-device" else LIMIT  # which is as long as it is made
        unit = PAGE if passed else 1
        target = fsx.Target(
            mount.raw("disk"),
            limit,
            sector=SECTOR,
            direct=max(SECTOR, unit),
            whole=unit,
            chunk=CHUNK,
            maps_hide=True,
            refuses=frozenset({"allocate", "allocate_keep"} if name == "qcow2" else ()),  # QEMU reserves no space
        )
        yield mount, target


@pytest.mark.parametrize("mode", MODES if OPS > FEW else list(MODES)[::3])
@pytest.mark.parametrize("name", LAYOUTS)
def test_anything_in_any_order(folder: Path, name: str, mode: str) -> None:
    seed = zlib.crc32(f"{SEED} {name} {mode}".encode())
    with served(folder, name, mode) as (mount, target):
        counts = fsx.exercise(target, OPS, seed)
        assert counts.total() == OPS
        content = target.path.read_bytes()
        assert "Traceback" not in mount.log
        mount.remount()
        assert target.path.read_bytes() == content
        mount.umount()
        checked = fvdfs("check", folder / "disk.fvd", "-o", "base_path=/")
        assert checked.code == 0 or (checked.code == LEAKED and name.startswith("compact-device")), checked


# --- that it finds what is wrong ------------------------------------------------------------------

Call = Callable[..., Any]


def a_byte_more(real: Call) -> Call:
    return lambda descriptor, mode, offset, length: real(descriptor, mode, offset, length + bool(mode & fsx.PUNCH_HOLE))


def sizes_not_kept(real: Call) -> Call:
    return lambda descriptor, mode, offset, length: real(descriptor, mode & ~(mode == 1), offset, length)


def a_hole_too_long(real: Call) -> Call:
    return lambda descriptor, at, what: real(descriptor, at, what) + (what == os.SEEK_DATA)


def no_holes_in_the_end(real: Call) -> Call:
    return lambda descriptor, at, what: real(descriptor, at, what) - (what == os.SEEK_HOLE)


def a_write_elsewhere(real: Call) -> Call:
    return lambda descriptor, pieces, offset: real(descriptor, pieces, offset - offset % 8192 % 4096 // 2048 * 512)


def a_copy_elsewhere(real: Call) -> Call:
    return lambda source, target, length, at, to: real(source, target, length, at, max(to - 1, 0))


def no_end_of_truncation(real: Call) -> Call:
    return lambda descriptor, size: real(descriptor, size + 1)


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (fsx, "fallocate", a_byte_more),
        (fsx, "fallocate", sizes_not_kept),
        (os, "lseek", a_hole_too_long),
        (os, "lseek", no_holes_in_the_end),
        (os, "pwritev", a_write_elsewhere),
        (os, "copy_file_range", a_copy_elsewhere),
        (os, "ftruncate", no_end_of_truncation),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, fault: Callable[[Call], Call]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with pytest.raises(fsx.Mismatch, match="seed 1, operation"):
        fsx.exercise(fsx.Target(file, 2 * MIB), 1000, 1)


def test_a_file_of_the_host_is_right(tmp_path: Path) -> None:
    """The model is that of a plain file; and the same seed does the same."""
    found = []
    for name in ("one", "two"):
        file = tmp_path / name
        file.write_bytes(bytes(MIB))
        counts = fsx.exercise(fsx.Target(file, 2 * MIB), 500, 2)
        assert set(counts) == set(fsx.WEIGHTS)
        found.append((counts, file.read_bytes()))
    assert found[0] == found[1]
