"""One stateful test over every kind of store, through a real mount.

The model is a bytearray; the steps are read, write, flush, grow, close and open again, remount. How
each layout behaves in a crash is `test_stateful.py`'s matter.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from support import reference
from support.devices import device
from support.mounts import MIB, mounted, must
from support.servers import nbd_server

STEPS = int(os.environ.get("FVDFS_STORE_STEPS", "1000"))
STEPS_PER_EXAMPLE = 125
RULES = ("read", "write", "flush", "grow", "reopen")
SIZE = 3 * MIB + 512
BASE_SIZE = 2 * MIB + 1536


class Ground:
    """A folder with one image, made in it by a store's function."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.base = random.Random(1).randbytes(BASE_SIZE)
        (folder / "base.raw").write_bytes(self.base)
        self.mount_options: list[str] = ["-o", f"base_path={folder.parent}:/dev"]
        self.checkable = True
        """Whether the reference reader knows the formats of all files."""

    def create(self, *options: str | Path, where: Path | None = None) -> None:
        must("create", where or self.folder / "disk.fvd", str(SIZE), "--journal-size", "64K", *options, "--force")

    def device(self) -> Path:
        disk = self.stack.enter_context(device(self.folder.parent / "device", 24 * MIB))
        return disk.path


def sparse_file(ground: Ground) -> None:
    ground.create("-b", "base.raw", "--block-size", "16K")


def loop_device(ground: Ground) -> None:
    path = ground.device()
    ground.create("-b", ground.folder / "base.raw", "--block-size", "16K", where=path)
    (ground.folder / "disk.fvd").symlink_to(path)


def compact_in_file(ground: Ground) -> None:
    ground.create("-b", "base.raw", "--block-size", "16K", "--compact", "--chunk-size", "64K")


def compact_on_device(ground: Ground) -> None:
    path = ground.device()
    base = ground.folder / "base.raw"
    ground.create("-b", base, "--block-size", "16K", "--compact", "--chunk-size", "64K", where=path)
    (ground.folder / "disk.fvd").symlink_to(path)


def qcow2_data_file(ground: Ground) -> None:
    options = ["--data-file", "data.qcow2", "--data-format", "qcow2"]
    ground.create("-b", "base.raw", "--block-size", "16K", *options)
    ground.checkable = False


def qcow2_base(ground: Ground) -> None:
    base = ground.folder / "base.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", ground.folder / "base.raw", base], check=True)
    ground.create("-b", "base.qcow2", "-F", "qcow2", "--block-size", "16K")
    ground.checkable = False


def nbd_base(ground: Ground) -> None:
    url = ground.stack.enter_context(nbd_server(ground.folder / "base.raw", ground.folder.parent / "socket"))
    ground.create("-b", url, "--block-size", "16K")
    ground.mount_options += ["-o", "allow_url=nbd+unix:///"]
    ground.checkable = False


STORES = [sparse_file, loop_device, compact_in_file, compact_on_device, qcow2_data_file, qcow2_base, nbd_base]


class Machine(RuleBasedStateMachine):
    """A mounted disk, and what it must hold."""

    prepare: Callable[[Ground], None]
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.scratch = Path(tempfile.mkdtemp())
        self.stack.callback(shutil.rmtree, self.scratch)
        folder = self.scratch / "images"
        folder.mkdir()
        self.ground = Ground(folder, self.stack)
        type(self).prepare(self.ground)
        self.model = bytearray(self.ground.base).ljust(SIZE, b"\0")
        self.mount = self.stack.enter_context(mounted(folder, *self.ground.mount_options))
        self.raw = self.mount.raw("disk")
        self.file = os.open(self.raw, os.O_RDWR)

    def _place(self, near: int, delta: int) -> int:
        return min(max(near * 16384 + delta, 0), len(self.model) - 1)

    @rule(near=st.integers(0, 210), delta=st.integers(-600, 600), length=st.integers(1, 60_000))
    def read(self, near: int, delta: int, length: int) -> None:
        self.counts["read"] += 1
        offset = self._place(near, delta)
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(self.file, length, offset) == self.model[offset : offset + length]

    @rule(
        near=st.integers(0, 210),
        delta=st.integers(-600, 600),
        length=st.one_of(st.integers(1, 1000), st.integers(1, 60_000)),
        seed=st.integers(0, 1 << 20),
    )
    def write(self, near: int, delta: int, length: int, seed: int) -> None:
        self.counts["write"] += 1
        offset = self._place(near, delta)
        data = random.Random(seed).randbytes(length)[: len(self.model) - offset]
        assert os.pwrite(self.file, data, offset) == len(data)
        self.model[offset : offset + len(data)] = data

    @rule()
    def flush(self) -> None:
        self.counts["flush"] += 1
        os.fsync(self.file)

    @rule(sectors=st.integers(1, 40))
    def grow(self, sectors: int) -> None:
        self.counts["grow"] += 1
        if len(self.model) > 4 * MIB - 40 * 512:
            return
        os.truncate(self.file, len(self.model) + sectors * 512)
        self.model.extend(bytes(sectors * 512))

    @rule()
    def reopen(self) -> None:
        self.counts["reopen"] += 1
        os.close(self.file)
        self.file = os.open(self.raw, os.O_RDWR)
        assert self.raw.stat().st_size == len(self.model)

    @rule(lot=st.integers(0, 9))
    def remount(self, lot: int) -> None:
        if lot:
            self.reopen()
            return
        self.counts["remount"] += 1
        os.close(self.file)
        self.mount.remount()
        self.file = os.open(self.raw, os.O_RDWR)
        assert self.raw.read_bytes() == self.model

    def teardown(self) -> None:
        with self.stack:
            assert self.raw.read_bytes() == self.model
            os.close(self.file)
            self.mount.umount()
            if self.ground.checkable:
                image = self.ground.folder / "disk.fvd"
                assert reference.check(image, "fvdfs") == []
                assert b"".join(reference.read_disk(image)) == self.model


@pytest.mark.slow
@pytest.mark.parametrize("store", STORES, ids=lambda store: store.__name__)
def test_every_store(store: Callable[[Ground], None]) -> None:
    counts: Counter[str] = Counter()
    machine = type("StoreMachine", (Machine,), {"prepare": staticmethod(store), "counts": counts})
    profile = settings(
        max_examples=-(-STEPS // STEPS_PER_EXAMPLE),
        stateful_step_count=STEPS_PER_EXAMPLE,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    while counts.total() < STEPS or min(counts[name] for name in RULES) < 20:
        run_state_machine_as_test(machine, settings=profile)
    print(f"{store.__name__}: {counts.total()} steps: {dict(counts)}")
