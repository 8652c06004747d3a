"""What else may be done to a disk that moves: each command in each state works, or says why not."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio

from fvdfs.format.mailbox import Wish
from fvdfs.format.migration import PLACE, Incoming, Outgoing, Record, Source, Target
from fvdfs.store.locations import parse_location
from fvdfs.store.source import ask
from support.mounts import Mount, fvdfs, mounted, must, wait_until
from support.moves import serving

CONTENT = bytes(range(251)) * 4096
ALLOW = ("-o", "allow_url=nbd+unix:///")
E, T = "a" * 16, "b" * 32
OUTGOING = {
    state.value: Outgoing(state, E, *((T, "gamma") if state in (Source.MOVED, Source.RELEASED) else ()))
    for state in Source
}
# Commands, with IMAGE, RAW, OTHER (an image) and NEW (a path that is free).
CHANGES = {
    "snapshot": "snapshot IMAGE",
    "flatten": "flatten IMAGE -o allow_url=nbd+unix:///",
    "rebase": "rebase IMAGE --base OTHER.raw -F raw -o allow_url=nbd+unix:///",
    "rebase --unsafe": "rebase IMAGE --base OTHER.raw -F raw --unsafe",
    "resize": "resize IMAGE 8M",
    "amend": "amend IMAGE --base-format raw",
    "check --repair": "check IMAGE --repair",
}
IN_MOUNT = {
    "snapshot": "snapshot RAW",
    "flatten": "flatten RAW",
    "resize": "resize RAW 8M",
    "prefetch start": "prefetch start RAW",
}
UNDER = {"clone": "clone IMAGE clone --into FOLDER", "create": "create NEW --base IMAGE -F fvd"}
LOOKS = {
    "info": "info IMAGE",
    "map": "map IMAGE -o allow_url=nbd+unix:///",
    "check": "check IMAGE",
    "snapshots": "snapshots IMAGE",
    "measure": "measure IMAGE -o allow_url=nbd+unix:///",
}
ALL_REFUSED = dict.fromkeys(CHANGES, False)
FROZEN = "frozen"
# Which changes work; all that look do. The words of a refusal.
TABLE: dict[str, tuple[dict[str, bool], bool, str]] = {
    "receiving": (ALL_REFUSED, False, "it is being received: fvdfs activate"),
    "abandoned": (ALL_REFUSED, False, "fvdfs abandon"),
    "active": (
        dict.fromkeys(CHANGES, True) | {"rebase": False, "rebase --unsafe": False},
        True,
        "follows its source, and can stand on nothing else until all is local: fvdfs flatten",
    ),
    "frozen": (ALL_REFUSED, True, FROZEN),
    "moved": (ALL_REFUSED, True, FROZEN),
    "released": (ALL_REFUSED, True, "which has all of it: this image may be removed"),
}


BRIEFLY = ("abandoned", "frozen", "released")
"""States in which the same is refused, for the same reason, as in another one: only some commands are tried."""


class Disks:
    """A source that is served, and images of a target in every state."""

    def __init__(self, top: Path, source: Mount) -> None:
        self.source = source
        self.kept, self.folder = top / "kept", top / "there"
        for folder in (self.kept, self.folder):
            folder.mkdir()
        url = f"nbd+unix:///vm?socket={source.folder.parent / 'nbd'}"
        must("receive", url, self.kept / "receiving.fvd")
        into = record(self.kept / "receiving.fvd").incoming
        assert into is not None
        trio.run(functools.partial(ask, parse_location(url), "", into, Wish.HAND_OVER, 3.0))
        self.into = Incoming(Target.ACTIVE, into.epoch, into.secret)
        self._keep("active", Record(self.into))
        self._keep("abandoned", Record(Incoming(Target.ABANDONED, into.epoch, into.secret)))
        for name, outgoing in OUTGOING.items():
            self._keep(name, Record(self.into, outgoing))
        (self.kept / "other.raw").write_bytes(bytes(4 << 20))

    def _keep(self, name: str, record: Record) -> None:
        path = self.kept / f"{name}.fvd"
        shutil.copy(self.kept / "receiving.fvd", path)
        with path.open("r+b") as file:
            file.seek(PLACE)
            file.write(record.encode())

    def fresh(self, state: str) -> Path:
        """The image, alone in its folder."""
        for path in self.folder.iterdir():
            path.unlink()
        shutil.copy(self.kept / f"{state}.fvd", self.folder / "vm.fvd")
        return self.folder / "vm.fvd"

    def words(self, command: str, raw: Path | None = None) -> Sequence[str]:
        places = {"IMAGE": self.folder / "vm.fvd", "FOLDER": self.folder, "NEW": self.folder / "new.fvd", "RAW": raw}
        places["OTHER.raw"] = self.kept / "other.raw"
        return [str(places.get(word, word)) for word in command.split()]


def record(image: Path) -> Record:
    with image.open("rb") as file:
        return Record.at(file.read(16384), str(image))


@contextlib.contextmanager
def served(top: Path) -> Iterator[Disks]:
    folder = top / "images"
    folder.mkdir()
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder) as source:
        with source.raw("vm").open("r+b") as disk:
            disk.write(CONTENT)
        with serving(source):
            yield Disks(top, source)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    """For tests whose source stays as it is."""
    with served(tmp_path_factory.mktemp("moves")) as disks:
        yield disks


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with served(tmp_path) as found:
        yield found


@pytest.mark.parametrize("state", TABLE)
def test_each_command_in_each_state(shared: Disks, state: str) -> None:
    disks = shared
    works, carries, words = TABLE[state]
    image = disks.fresh(state)
    before = image.read_bytes()
    for name, command in (CHANGES | UNDER | LOOKS).items():
        if state in BRIEFLY and name not in ("snapshot", "rebase --unsafe", "clone", "info"):
            continue
        expected = works.get(name, carries if name in UNDER else True)
        done = fvdfs(*disks.words(command))
        assert (done.code == 0) == expected, f"{name}: {done.err}"
        if not expected:
            assert words in done.err, f"{name}: {done.err}"
            assert done.err.count("\n") == 1
        if name in LOOKS or not expected:
            assert image.read_bytes() == before, f"{name} changed it"
        elif name != "snapshot":
            assert record(image).incoming == disks.into
        image = disks.fresh(state)
    with mounted(disks.folder, *ALLOW) as mount:
        for name, command in IN_MOUNT.items():
            if works.get(name, state == "active") or (state, name) == ("receiving", "resize"):
                continue  # the latter takes it over, as a write does
            done = fvdfs(*disks.words(command, mount.raw("vm")))
            assert (done.code != 0, words in done.err) == (True, True), f"{name}: {done.err}"
        assert record(image) == record(disks.kept / f"{state}.fvd")


@pytest.mark.parametrize("in_mount", [True, False])
def test_the_source_is_told_whatever_a_disk_that_follows_has_become(disks: Disks, in_mount: bool) -> None:
    """A snapshot of it goes on to copy, and then tells the source."""
    image = disks.fresh("active")
    with contextlib.ExitStack() as stack:
        if not in_mount:
            must("snapshot", image)
        target = stack.enter_context(mounted(disks.folder, *ALLOW))
        disk = stack.enter_context(target.raw("vm").open("r+b", buffering=0))
        if in_mount:
            must("snapshot", target.raw("vm"))
        assert record(disks.folder / "vm@1.fvd").incoming == disks.into
        disk.write(b"written")
        wait_until(lambda: disks.source.status("vm")["move"] == "released")
        assert record(disks.folder / "vm@1.fvd").state == "local"
        assert not record(image)
        assert target.raw("vm").read_bytes()[: len(CONTENT)] == b"written" + CONTENT[7:]


def test_a_disk_that_was_flattened_tells_its_source_when_it_is_mounted(disks: Disks) -> None:
    image = disks.fresh("active")
    must("flatten", image, *ALLOW)
    with mounted(disks.folder, *ALLOW) as target, target.raw("vm").open("r+b"):
        wait_until(lambda: disks.source.status("vm")["move"] == "released")
        assert target.status("vm")["move"] == "local"
        assert target.raw("vm").read_bytes()[: len(CONTENT)] == CONTENT


@pytest.mark.parametrize("in_mount", [True, False])
def test_layers_of_a_disk_that_is_served_change_no_move(tmp_path: Path, in_mount: bool) -> None:
    """A target that has begun to receive it gets it; a snapshot says no more that it is served."""
    image = tmp_path / "images" / "vm.fvd"
    image.parent.mkdir()
    must("create", image, "4M")
    serves = Record(None, OUTGOING["serving"])

    def run(*words: str | Path) -> None:
        must(*words)
        assert record(image) == serves, words

    must("snapshot", image)
    with image.open("r+b") as file:
        file.seek(PLACE)
        file.write(serves.encode())
    with contextlib.ExitStack() as stack:
        disk: Path = image
        if in_mount:
            mount = stack.enter_context(mounted(image.parent))
            disk = mount.raw("vm")
            stack.enter_context(disk.open("rb"))
        run("snapshot", disk)
        run("commit", disk)
        run("delete", image.parent / "vm@2.fvd" if not in_mount else f"{disk}@2")
        run("snapshot", disk)
        if in_mount:
            assert mount.status("vm")["move_epoch"] == E
    run("revert", image, "2")


def test_check_finds_what_was_kept_too_early(shared: Disks) -> None:
    disks = shared
    image = disks.fresh("active")
    must("flatten", image, *ALLOW)
    assert fvdfs("check", image).code == 0
    kept = disks.fresh("active")
    with mounted(disks.folder, *ALLOW) as target, target.raw("vm").open("r+b", buffering=0) as disk:
        disk.write(b"x" * 4096)
    with kept.open("r+b") as file:
        file.seek(PLACE)
        file.write(record(disks.kept / "receiving.fvd").encode())
    done = fvdfs("check", kept)
    assert "kept while the disk could be written at its source" in done.out + done.err
    assert done.code
