"""Any commands of layers in any order, on disks that are open in a mount or not, against a model.

After each, every image is read, by the independent reader and, where nothing stands on it, through the mount.
FVDFS_STATEFUL_STEPS sets how many are done at least; FVDFS_STATEFUL_SEED has other ones tried.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import seed
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fvdfs.check.check import check_image, render
from fvdfs.commands import clone as clone_command
from fvdfs.commands import compare as compare_command
from fvdfs.commands import diff as diff_command
from fvdfs.commands import export as export_command
from fvdfs.commands import layers
from fvdfs.commands import rebase as rebase_command
from fvdfs.commands import resize as resize_command
from fvdfs.commands import restore as restore_command
from fvdfs.commands import snapshot as snapshot_command
from fvdfs.errors import FvdError, ImageBusy, UsageError
from fvdfs.format.creation import CreateOptions
from fvdfs.layers.snapshot import MARK, stem_of
from fvdfs.sizes import NewSize
from fvdfs.store.host import PUNCH, fallocate
from support import reference
from support.builder import KIB, create
from support.crash import quiet
from support.mounts import Mount, mounted, wait_until
from support.stateful import machine_settings

STEPS = int(os.environ.get("FVDFS_STATEFUL_STEPS", "500"))
SEED = os.environ.get("FVDFS_STATEFUL_SEED", "")
STEPS_PER_EXAMPLE = 40
SECTOR = 512
SIZE = 160 * KIB
MAX_SIZE = 600 * KIB
MOST = 8
"""Images in the folder."""
BASE = random.Random(1).randbytes(SIZE // 2 + 1000)
PATIENCE = 10.0  # seconds in which the mount closes what programs have closed
COW = CreateOptions(base_img="base.raw", base_img_fmt="raw", block_size=8 * KIB, journal_size=16 * KIB)
LAYOUTS = (
    CreateOptions(),
    COW,
    CreateOptions(compact=True, chunk_size=16 * KIB, journal_size=16 * KIB),
    CreateOptions(
        base_img="base.raw", base_img_fmt="raw", block_size=1536, compact=True, chunk_size=4 * KIB, journal_size=8 * KIB
    ),
    CreateOptions(base_img="base.raw", base_img_fmt="raw", journal_size=0),
    CreateOptions(base_img="base.raw", base_img_fmt="raw", copy_on_read=True, data_file="a.fvd.data"),
)


@dataclass
class Image:
    """What the model knows of one."""

    content: bytes
    base: str
    """The name of the FVD image that it stands on; empty: none."""


which = st.integers(0, 1 << 16)
seeds = st.integers(0, 1 << 30)


class Machine(RuleBasedStateMachine):
    """A folder with images, and a mount of it. Images are known by the names of their files without .fvd."""

    mount: Mount
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.mount.folder
        self.images: dict[str, Image] = {}
        self.open: dict[str, int] = {}
        self.fresh = 0
        self.seen: dict[str, object] = {}
        """What each image held when it was last read, and the times of its files."""

    @initialize(layout=st.sampled_from(LAYOUTS), data=seeds)
    def start(self, layout: CreateOptions, data: int) -> None:
        (self.folder / "base.raw").write_bytes(BASE)
        content = BASE if layout.base_img else b""
        create(self.path("a"), SIZE, layout, base_length=len(BASE) if layout.base_img else None)
        self.images["a"] = Image(content.ljust(SIZE, b"\0"), "")
        self._write("a", data)

    def teardown(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)
        self.open.clear()
        try:
            self.seen.clear()
            for name in self.images:
                self._read(name)
                self._wait(functools.partial(self._check, name))
        finally:
            for path in list(self.folder.iterdir()):
                path.unlink()

    # --- the model ---

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.fvd"

    def children(self, name: str) -> list[str]:
        return [other for other, image in self.images.items() if image.base == name]

    def chain(self, name: str) -> list[str]:
        """The image, and what it stands on, from the top."""
        found = [name]
        while base := self.images[found[-1]].base:
            found.append(base)
        return found

    def in_use(self, *names: str) -> bool:
        """Whether the mount has one of them open."""
        return any(name in self.chain(disk) for disk in self.open for name in names)

    def tops(self) -> list[str]:
        return [name for name in self.images if not self.children(name)]

    def pick(self, number: int, names: list[str]) -> str:
        return names[number % len(names)]

    def pick_mostly(self, number: int, fits: Callable[[str], object]) -> str:
        """One that fits, or now and then any. Where there is none, a snapshot is made first."""
        fitting = [name for name in self.images if fits(name)]
        if not fitting and len(self.images) < MOST and number % 5:
            self._snapshot(self.pick(number // 5, self.tops()), by_mount=bool(number % 2))
            fitting = [name for name in self.images if fits(name)]
        return self.pick(number // 5, fitting if fitting and number % 5 else list(self.images))

    # --- what is done ---

    def _wait(self, work: Callable[[], object]) -> None:
        """Do what needs the images closed, as soon as the mount has closed them."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                work()
                return
            except ImageBusy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def run(self, kind: str, work: Callable[[], int], *, code: int = 0) -> str:
        """Do what has to be done; what it prints."""
        self.counts[kind] += 1
        said = io.StringIO()

        def once() -> None:
            said.truncate(said.seek(0))
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), quiet():
                assert work() == code

        self._wait(once)
        return said.getvalue()

    def refused(self, kind: str, work: Callable[[], int], error: type[FvdError]) -> None:
        """Do what must not be done."""
        self.counts[f"{kind} refused"] += 1
        with quiet(), contextlib.redirect_stderr(io.StringIO()), pytest.raises(FvdError) as caught:
            work()
        if not isinstance(caught.value, error):
            raise caught.value

    def attempt(self, kind: str, work: Callable[[], int]) -> bool:
        """Do to a disk that is open what its mount may refuse, or do; whether it has."""
        try:
            with quiet(), contextlib.redirect_stderr(io.StringIO()):
                work()
        except FvdError:
            self.counts[f"{kind} while open refused"] += 1
            return False
        self.counts[f"{kind} while open"] += 1
        return True

    def _check(self, name: str) -> None:
        with quiet():
            report = check_image(str(self.path(name)))
        if any("in use" in text or "open for writing" in text for text in report.errors):
            raise ImageBusy(name, report.errors[0])
        assert report.exit_code == 0, render(report)
        header = reference.Header(self.path(name))
        bits_mean_nothing = header.all_data_in_fvd_img and header.text["base_img"]
        problems = reference.check(self.path(name), "fvdfs")
        assert [p for p in problems if not (bits_mean_nothing and "'s tail is" in p)] == [], name

    def _write(self, name: str, data: int) -> None:
        """Write, and perhaps punch, through the mount."""
        self.counts["write"] += 1
        rng = random.Random(data)
        content = bytearray(self.images[name].content)
        descriptor = self.open.get(name, -1)
        own = os.open(self.mount.raw(name), os.O_RDWR) if descriptor < 0 else descriptor
        try:
            for _ in range(rng.randrange(1, 4)):
                start = rng.randrange(len(content))
                length = min(rng.choice((1, 512, 5000, 40_000)), len(content) - start)
                if rng.random() < 0.3:
                    assert fallocate(own, PUNCH, start, length)
                    content[start : start + length] = bytes(length)
                else:
                    new = rng.choice((rng.randbytes, bytes))(length)
                    assert os.pwrite(own, new, start) == length
                    content[start : start + length] = new
        finally:
            if descriptor < 0:
                os.close(own)
        self.images[name].content = bytes(content)

    def _look(self) -> None:
        """Compare all that there is with the model."""
        expected = {f"{name}.fvd" for name in self.images}
        assert {path.name for path in self.folder.glob("*.fvd")} == expected
        assert {path.name for path in self.mount.point.iterdir()} == {f"{name}.raw" for name in self.images}
        for descriptor in self.open.values():
            os.fsync(descriptor)
        for name in self.tops():
            assert self.mount.raw(name).read_bytes() == self.images[name].content, f"{name} in the mount"
        for name, image in self.images.items():
            assert self._base_of(name) == image.base, name
            self._read(name)

    def _read(self, name: str) -> None:
        """Compare an image with the model by the reference reader, if a file of it has changed since."""
        content = self.images[name].content
        paths = [*map(self.path, self.chain(name)), *sorted(self.folder.glob("*.data"))]
        status = [path.stat() for path in paths]
        key = content, [(each.st_ino, each.st_mtime_ns, each.st_ctime_ns) for each in status]
        if self.seen.get(name) != key:
            assert b"".join(reference.read_disk(self.path(name))) == content, f"{name} by the reference reader"
            self.seen[name] = key

    def _base_of(self, name: str) -> str:
        header = reference.Header(self.path(name))
        base = "" if header.all_data_in_fvd_img else header.text["base_img"]
        return stem_of(base) if base.endswith(".fvd") else ""

    # --- rules ---

    @rule(number=which, data=seeds)
    def write(self, number: int, data: int) -> None:
        self._write(self.pick(number, self.tops()), data)
        self._look()

    @rule(number=which)
    def open_or_close(self, number: int) -> None:
        name = self.pick(number, self.tops())
        if name in self.open:
            os.close(self.open.pop(name))
        else:
            self.open[name] = os.open(self.mount.raw(name), os.O_RDWR)

    @rule(number=which, by_mount=st.booleans())
    def snapshot(self, number: int, by_mount: bool) -> None:
        name = self.pick_mostly(number, lambda each: not self.children(each))
        if len(self.images) >= MOST:
            return
        if self.children(name):
            self.refused("snapshot", lambda: snapshot_command.run(str(self.path(name)), ""), UsageError)
            return
        self._snapshot(name, by_mount=by_mount)
        self._look()

    def _snapshot(self, name: str, *, by_mount: bool) -> None:
        by_mount |= name in self.open
        disk = self.mount.raw(name) if by_mount else self.path(name)
        said = self.run("snapshot", lambda: snapshot_command.run(str(disk), f"{self._number()}"))
        new = stem_of(os.path.basename(said.strip()))
        image = self.images[name]
        self.images[new] = Image(image.content, image.base)
        image.base = new

    def _number(self) -> int:
        self.fresh += 1
        return self.fresh

    @rule(number=which)
    def delete(self, number: int) -> None:
        name = self.pick_mostly(
            number, lambda each: MARK in each and len(self.children(each)) < 2 and not self.in_use(each)
        )
        users = self.children(name)

        def work() -> int:
            return layers.run_delete(str(self.path(name)), options=(), secret="")

        if MARK not in name or len(users) > 1:
            self.refused("delete", work, UsageError)
        elif len(self.images) > 1 and (
            self.attempt("delete", work) if self.in_use(name, *users) else self.run("delete", work) or True
        ):
            for user in users:
                self.images[user].base = self.images[name].base
            del self.images[name]
        self._look()

    @rule(number=which, other=which)
    def revert(self, number: int, other: int) -> None:
        name = self.pick_mostly(
            number, lambda each: self.images[each].base and not self.children(each) and not self.in_use(each)
        )
        snapshots = [each[len(name) + 1 :] for each in self.images if each.startswith(f"{name}{MARK}")]
        to = self.pick(other, ["", *snapshots])

        def work() -> int:
            return layers.run_revert(str(self.path(name)), to)

        under = f"{name}{MARK}{to}" if to else self.images[name].base
        if self.children(name):
            self.refused("revert", work, UsageError)
        elif self.in_use(name):
            self.refused("revert", work, ImageBusy)
        elif not under:
            self._wait(lambda: self.refused("revert", work, UsageError))
        elif under in self.open:
            self.refused("revert", work, ImageBusy)
        else:
            self.run("revert", work)
            self.images[name] = Image(self.images[under].content, under)
        self._look()

    @rule(number=which)
    def commit(self, number: int) -> None:
        name = self.pick_mostly(number, lambda each: self.images[each].base and not self.in_use(each))
        base = self.images[name].base

        def work() -> int:
            return layers.run_commit(str(self.path(name)), options=(), secret="")

        if not base:
            self._wait(lambda: self.refused("commit", work, UsageError))
        elif len(self.children(base)) > 1:
            self._wait(lambda: self.refused("commit", work, FvdError))
        elif self.attempt("commit", work) if self.in_use(name) else self.run("commit", work) or True:
            self.images[base].content = self.images[name].content
        self._look()

    @rule(number=which, other=which)
    def rebase(self, number: int, other: int) -> None:
        name = self.pick_mostly(number, lambda each: self.images[each].base and not self.in_use(each))
        base = self.pick(other, list(self.images))

        def work() -> int:
            return rebase_command.run(
                str(self.path(name)), base=f"{base}.fvd", base_format="", unsafe=False, options=(), secret=""
            )

        if not self.images[name].base or name in self.chain(base):
            self.refused("rebase", work, UsageError)
        elif self.in_use(name):
            self.refused("rebase", work, ImageBusy)
        elif base not in self.open:
            self.run("rebase", work)
            self.images[name].base = base
        self._look()

    @rule(number=which, by_mount=st.booleans())
    def flatten(self, number: int, by_mount: bool) -> None:
        name = self.pick_mostly(number, lambda each: self.images[each].base)
        if not self.images[name].base or (self.in_use(name) and name not in self.open):
            return
        by_mount |= name in self.open
        disk = self.mount.raw(name) if by_mount else self.path(name)
        self.run("flatten", lambda: layers.run_flatten(str(disk), options=(), secret=""))
        self.images[name].base = ""
        self._look()

    @rule(number=which, sectors=st.integers(1, MAX_SIZE // SECTOR), by_mount=st.booleans())
    def resize(self, number: int, sectors: int, by_mount: bool) -> None:
        size = sectors * SECTOR
        name = self.pick_mostly(number, lambda each: not self.children(each))
        if self.in_use(name) and name not in self.open:
            return
        by_mount |= name in self.open
        disk = self.mount.raw(name) if by_mount else self.path(name)
        old = self.images[name].content

        def work() -> int:
            return resize_command.run(str(disk), NewSize(size, added=False), shrink=True, options=(), secret="")

        if size < len(old) and self.children(name):
            self._wait(lambda: self.refused("resize", work, UsageError))
        else:
            self.run("grow" if size > len(old) else "shrink", work)
            self.images[name].content = old[:size].ljust(size, b"\0")
        self._look()

    @rule(number=which)
    def clone(self, number: int) -> None:
        template = self.pick(number, list(self.images))
        if len(self.images) >= MOST or template in self.open:
            return
        new = f"c{self._number()}"
        self.run(
            "clone",
            lambda: clone_command.run(
                str(self.path(template)),
                [new],
                count=None,
                into=str(self.folder),
                base_format="",
                profile="",
                secret="",
            ),
        )
        assert self._base_of(new) == template
        assert self.mount.raw(new).read_bytes() == self.images[template].content
        wait_until(lambda: not self._base_of(new))  # all of it was read, and copied
        self.images[new] = Image(self.images[template].content, "")
        self._look()

    @rule(number=which, block=st.sampled_from((512, 4096, 7680)), chunk=st.sampled_from((0, 0, 8192)))
    def overlay(self, number: int, block: int, chunk: int) -> None:
        """One more image on one that may have others on it."""
        under = self.pick(number, list(self.images))
        if len(self.images) >= MOST or under in self.open:
            return
        self.counts["overlay"] += 1
        new, content = f"o{self._number()}", self.images[under].content
        options = CreateOptions(
            base_img=f"{under}.fvd",
            base_img_fmt="fvd",
            block_size=block,
            compact=chunk > 0,
            chunk_size=chunk,
            journal_size=8 * KIB,
        )
        create(self.path(new), len(content), options, base_length=len(content))
        self.images[new] = Image(content, under)
        self._look()

    @rule(number=which)
    def rename(self, number: int) -> None:
        name, new = self.pick(number, list(self.images)), f"d{self._number()}"
        self.counts["rename"] += 1
        if self.children(name):
            with pytest.raises(OSError):
                self.mount.raw(name).rename(self.mount.raw(new))
        else:
            self.mount.raw(name).rename(self.mount.raw(new))
            self.images[new] = self.images.pop(name)
            if name in self.open:
                self.open[new] = self.open.pop(name)
        self._look()

    @rule(number=which)
    def remove(self, number: int) -> None:
        name = self.pick(number, list(self.images))
        if len(self.images) == 1:
            return
        self.counts["remove"] += 1
        if self.children(name):
            with pytest.raises(OSError):
                self.mount.raw(name).unlink()
        else:
            self.mount.raw(name).unlink()
            del self.images[name]
            if name in self.open:
                os.close(self.open.pop(name))
        self._look()

    @rule(number=which, earlier=which)
    def backup(self, number: int, earlier: int) -> None:
        """What has changed since a state below is told, exported, and put onto a copy of that."""
        name = self.pick_mostly(number, lambda each: self.images[each].base and not self.in_use(each))
        below = self.chain(name)[1:]
        if not below or self.in_use(name):
            return
        since = self.pick(earlier, below)
        now, before = self.images[name].content, self.images[since].content
        told = self.run(
            "diff",
            lambda: diff_command.run(
                str(self.path(name)), since=str(self.path(since)), as_json=True, options=(), secret=""
            ),
        )
        patched = bytearray(before[: len(now)].ljust(len(now), b"\0"))
        for extent in json.loads(told)["extents"]:
            start, stop = extent["start"], extent["start"] + extent["length"]
            assert extent["data"] or not any(now[start:stop])
            patched[start:stop] = now[start:stop]
        assert patched == now
        export, copy = self.folder / "x.fvd", self.folder / "copy.raw"
        self.run(
            "export",
            lambda: export_command.run(
                str(self.path(name)),
                str(export),
                since=str(self.path(since)),
                target_format="",
                backing=export_command.Backing("", "fvd"),
                options=(),
                force=False,
                secret="",
            ),
        )
        assert b"".join(reference.read_disk(export)) == now
        copy.write_bytes(before)
        self.run(
            "restore",
            lambda: restore_command.run(
                str(export), str(copy), target_format="raw", options=(), force=False, secret=""
            ),
        )
        assert copy.read_bytes() == now
        assert check_image(str(export)).exit_code == 0
        export.unlink()
        copy.unlink()
        self._look()

    @rule(number=which, other=which, strict=st.booleans())
    def compare(self, number: int, other: int, strict: bool) -> None:
        first, second = self.pick(number, list(self.images)), self.pick(other, list(self.images))
        if self.in_use(first, second) or first == second:
            return
        a, b = self.images[first].content, self.images[second].content
        size = max(len(a), len(b))
        same = a == b if strict else a.ljust(size, b"\0") == b.ljust(size, b"\0")
        names = (str(self.path(first)), str(self.path(second)))
        self.run(
            "compare",
            lambda: compare_command.run(names, ("", ""), strict=strict, as_json=False, options=(), secret=""),
            code=0 if same else 1,
        )


@pytest.mark.slow
def test_layers(folder: Path) -> None:
    profile = machine_settings(STEPS // STEPS_PER_EXAMPLE, STEPS_PER_EXAMPLE)
    counts: Counter[str] = Counter()
    with mounted(folder, "-o", "create,remove,shrink") as mount:
        machine: type[Machine] = type("LayersMachine", (Machine,), {"mount": mount, "counts": counts})
        chosen = seed(zlib.crc32(f"{SEED} layers".encode()))(machine)
        run_state_machine_as_test(chosen, settings=profile)
    print(f"{counts.total()} operations: {dict(counts)}")
    assert counts.total() >= STEPS // 2
