"""Hosts that die, links that are cut and servers that end, before, while and after a disk moves from one to another.

A host is a network namespace; it dies when all that runs there is killed at once and its link is cut, and is back when
its folder is mounted and served again. A program that writes a log stands for the machine (`support/logwriter.py`).
After each failure

- what was acknowledged is there, and nothing that is read is old;
- who may not write cannot, whatever tries to;
- status and records tell the state, and the command that docs/migration.md names leads out of it.

FVDFS_MOVES: how often each failure is tried, each time at another moment; 0: some are tried once. FVDFS_MOVES_SEED has
other moments chosen.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fvdfs.format.migration import PLACE, SIZE, Record, Target
from support import logwriter
from support.guest import drive
from support.hosts import Host, joined_hosts, needs_hosts
from support.logwriter import BAD, BLOCK, BLOCKS, FAILED
from support.mounts import FVDFS, Mount, must, wait_until
from support.witness import Machine as Guest
from support.witness import Witness, follow, move

MOVES = int(os.environ.get("FVDFS_MOVES", "0"))
SEED = os.environ.get("FVDFS_MOVES_SEED", "")
SLOWLY = "prefetch_max=8M"  # so that a disk follows for two seconds
CRAWLING = "prefetch_max=1M"
PORT = 10809
NAMES = "vm", "back"
"""Of disks; each is served at a port of its own."""
LONG = 120  # seconds; far more than anything takes

pytestmark = needs_hosts
often = pytest.mark.parametrize("turn", range(MOVES))
always = pytest.mark.parametrize("turn", range(max(1, MOVES)))


class Site:
    """A host with a folder of disks, mounted and served."""

    def __init__(self, host: Host, work: Path) -> None:
        self.host = host
        self.fvdfs, self.must = host.fvdfs, host.must
        self.folder = work / f"host{host.number}"
        self.folder.mkdir()
        self._servers: dict[str, subprocess.Popen[str]] = {}
        self._errors = work / f"host{host.number}.serve"
        self._stack = contextlib.ExitStack()
        self.mount: Mount

    def begin(self, *options: str, sources: tuple[Site, ...] = ()) -> None:
        """Mount, with these options."""
        urls = [f"allow_url=nbd://{site.host.address}:{PORT + len(name)}/" for site in sources for name in NAMES]
        words = [word for option in (*urls, *options) for word in ("-o", option)]
        self.mount = self._stack.enter_context(self.host.mounted(self.folder, *words))

    def hurry(self) -> None:
        """Disks follow as fast as they can, from now on."""
        slow = [at for at, word in enumerate(self.mount.options) if word in (SLOWLY, CRAWLING)]
        if slow and not self._servers:
            options = self.mount.options
            self.mount.options = (*options[: slow[0] - 1], *options[slow[0] + 1 :])
            self.mount.remount()

    def raw(self, name: str = "vm") -> Path:
        return self.mount.raw(name)

    def status(self, name: str = "vm") -> dict[str, Any]:
        return self.mount.status(name)

    def record(self, name: str = "vm") -> Record:
        """What the image says."""
        with (self.folder / f"{name}.fvd").open("rb") as file:
            file.seek(PLACE)
            return Record.decode(file.read(SIZE), name)

    def serve(self, name: str = "vm") -> None:
        with self._errors.open("a") as errors:
            command = (*FVDFS, "serve", self.raw(name), "--listen", f"{self.host.address}:{PORT + len(name)}")
            server = self.host.popen(*command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert server.stdout is not None
        assert server.stdout.readline() == f"{self.url(name)}\n", self._errors.read_text()
        self._servers[name] = server

    def url(self, name: str = "vm") -> str:
        return f"nbd://{self.host.address}:{PORT + len(name)}/{name}"

    def end_server(self, name: str = "vm") -> None:
        server = self._servers.pop(name)
        server.kill()
        server.wait(LONG)
        assert server.stdout is not None
        server.stdout.close()

    def die(self, turn: int = 1) -> None:
        """Nobody hears of it, in every second turn; else the system is left, and ends the connections."""
        self.host.crash()
        if turn % 2 == 0:
            self.host.link.join(self.host)
        for name in list(self._servers):
            self.end_server(name)
        self.mount.clear()

    def come_back(self, *served: str) -> None:
        self.host.link.join(self.host)
        self.mount.mount()
        for name in served:
            self.serve(name)

    def close(self) -> None:
        for name in list(self._servers):
            self.end_server(name)
        self._stack.close()


class Machine:
    """Writes its log on one host or another."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._process: subprocess.Popen[str] | None = None

    @property
    def last(self) -> int:
        return logwriter.acknowledged(self.journal)

    def begin(self, site: Site, name: str = "vm") -> None:
        program = (sys.executable, "-P", logwriter.__file__, site.raw(name), self.journal)
        self._process = site.host.popen(*program, stdout=subprocess.PIPE, text=True)

    def run(self, site: Site, name: str = "vm") -> None:
        """Start it; it has written something."""
        before = self.last
        self.begin(site, name)
        self.goes_on(before)

    def goes_on(self, before: int | None = None) -> None:
        """It writes something more."""
        before = self.last if before is None else before
        process = self._process
        assert process is not None
        wait_until(lambda: self.last > before or process.poll() is not None, LONG)
        assert process.poll() is None, self.end()

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        code, said = self.end()
        assert code == 0, said

    def end(self) -> tuple[int, str]:
        """How it ends: its exit code, and what it says."""
        process, self._process = self._process, None
        assert process is not None
        said, _ = process.communicate(timeout=LONG)
        assert process.returncode != BAD, said
        return process.returncode, said.strip()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self.end()

    def run_once(self, site: Site) -> None:
        self.run(site)
        self.stop()

    def died(self) -> None:
        """Its host did."""
        self.end()

    def cannot_run(self, site: Site, name: str = "vm", why: str = "EROFS") -> None:
        other = Machine(self.journal)
        other.begin(site, name)
        assert other.end() == (FAILED, why)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


class World:
    """Hosts, and a disk on the first, whose machine has run."""

    def __init__(self, work: Path, hosts: Sequence[Host]) -> None:
        self.sites = [Site(host, work) for host in hosts]
        self.a, self.b, self.c = self.sites
        self.machine = Machine(work / "journal")
        must("create", self.a.folder / "vm.fvd", str(BLOCKS * BLOCK))
        self.a.begin(sources=(self.b,))
        logwriter.fill(self.a.raw())
        self.a.serve()
        self.machine.run(self.a)

    def receive(self, *options: str) -> None:
        """The second host can take the disk over."""
        self.b.must("receive", self.a.url(), self.b.folder / "vm.fvd")
        self.b.begin(*options, sources=(self.a,))

    def move(self, *options: str) -> None:
        """It runs there."""
        self.receive(*options)
        self.machine.stop()
        self.machine.run(self.b)
        assert self.b.status()["move"] in ("active", "local")
        self.cannot_write(self.a)

    def cannot_write(self, site: Site) -> None:
        """Nobody writes the disk there."""
        with pytest.raises(OSError, match="Read-only"):
            os.close(os.open(site.raw(), os.O_RDWR))
        assert site.record().obstacle
        assert site.status()["move"] in ("frozen", "moved", "released")
        done = site.fvdfs("thaw", site.raw())
        assert "go on there" in done.err, done.err

    def ends_well(self, site: Site, source: Site, name: str = "vm", source_name: str = "vm") -> None:
        """All gets there, and the source is released; what was acknowledged is there, on a disk that needs nobody."""
        self.machine.goes_on()
        self.machine.stop()
        site.hurry()
        with open(site.raw(name), "r+b"):  # it follows faster while nobody else uses the link
            wait_until(lambda: source.status(source_name)["move"] == "released", LONG)
        assert site.status(name)["move"] == "local"
        source.die()
        assert logwriter.problems(site.raw(name), self.machine.journal) == []
        self.machine.run(site, name)
        self.machine.stop()
        site.mount.umount()
        done = site.fvdfs("check", site.folder / f"{name}.fvd")
        assert done.code == 0, done

    def close(self) -> None:
        self.machine.close()
        for site in self.sites:
            site.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with joined_hosts(3) as (hosts, _):
        world = World(tmp_path, hosts)
        try:
            yield world
        finally:
            world.close()


def wait_some_time(turn: int, most: float) -> None:
    """Until the moment of the failure."""
    caller = sys._getframe(1).f_code.co_name
    time.sleep(random.Random(f"{SEED} {caller} {turn}").uniform(0, most))


# --- the source's host ----------------------------------------------------------------------------------


@often
def test_the_source_dies_before_it_has_moved(world: World, turn: int) -> None:
    """As without a move: its machine goes on there when it is back. The target has kept nothing."""
    a, b, machine = world.a, world.b, world.machine
    world.receive()
    before = (b.folder / "vm.fvd").read_bytes()
    wait_some_time(turn, 1)
    a.die(turn)
    machine.died()
    done = b.fvdfs("activate", b.raw())
    assert done.code == 1
    assert "cannot be reached" in done.err or "does not answer" in done.err, done.err
    assert b.status()["move"] == "receiving"
    assert b.status()["move_refused"]
    assert (b.folder / "vm.fvd").read_bytes() == before
    a.come_back()
    machine.run(a)
    assert a.status()["move"] == "serving"
    a.serve()
    machine.stop()
    assert logwriter.problems(a.raw(), machine.journal) == []
    machine.run(b)
    world.cannot_write(a)
    world.ends_well(b, a)


@often
def test_the_source_dies_while_it_is_asked(world: World, turn: int) -> None:
    """Whatever it had done by then: either its record says that it has moved, or its machine goes on there."""
    a, b, machine = world.a, world.b, world.machine
    world.receive()
    machine.stop()
    asking = b.host.popen(*FVDFS, "activate", b.raw(), stderr=subprocess.PIPE)
    wait_some_time(turn, 0.8)
    a.die(turn)
    asking.communicate(timeout=LONG)
    is_active, has_moved = b.record().state == "active", a.record().state == "moved"
    assert has_moved or not is_active
    assert (asking.returncode == 0) == is_active
    a.come_back("vm")
    if has_moved:
        world.cannot_write(a)
        machine.cannot_run(a)
    else:
        machine.run(a)
        assert "a machine runs on it" in b.fvdfs("activate", b.raw()).err
        machine.stop()
    machine.run(b)
    world.cannot_write(a)
    world.ends_well(b, a)


@pytest.mark.parametrize(
    ("on_base_error", "turn"), [(mode, turn) for mode in ("wait", "eio") for turn in range(MOVES)] or [("wait", 0)]
)
def test_the_source_dies_while_the_target_follows(world: World, on_base_error: str, turn: int) -> None:
    """It comes back frozen. Meanwhile what needs it waits, or fails."""
    a, b, machine = world.a, world.b, world.machine
    world.move(SLOWLY, f"on_base_error={on_base_error}")
    with open(b.raw(), "rb"):
        wait_some_time(turn, 1.5)
        a.die(turn)
        wait_until(lambda: b.status()["base_outage"] or b.status()["move"] == "local", LONG)
        if is_following := b.status()["move"] == "active":
            if on_base_error == "eio":
                assert machine.end() == (FAILED, "EIO")
            says_why(b)
        a.come_back("vm")
        world.cannot_write(a)
        machine.cannot_run(a)
        if is_following:
            wait_until(lambda: has_source(b), LONG)
            if on_base_error == "eio":
                machine.run(b)
    world.ends_well(b, a)


def says_why(site: Site) -> None:
    """The status says since when the source is away, and why."""
    outage = site.status()["base_outage"]
    assert outage["until"] is None
    assert outage["since"]
    assert outage["reason"]


def has_source(site: Site) -> bool:
    """Whether the source is back, or was, and is not needed any more."""
    outage = site.status()["base_outage"]
    return outage is None or outage["until"] is not None


# --- the target's host ----------------------------------------------------------------------------------


@often
def test_the_target_dies_before_it_has_taken_over(world: World, turn: int) -> None:
    """The source goes on. The target is back as it was; or its image is removed."""
    a, b, machine = world.a, world.b, world.machine
    world.receive()
    reading = b.host.popen("dd", f"if={b.raw()}", "of=/dev/null", "bs=4096", "iflag=direct", stderr=subprocess.DEVNULL)
    wait_some_time(turn, 1)
    b.die(turn)
    reading.wait(LONG)
    machine.goes_on()
    b.come_back()
    assert b.status()["move"] == "receiving"
    assert b.record().receiving
    machine.goes_on()
    if turn % 2:
        b.mount.umount()
        (b.folder / "vm.fvd").unlink()
        b.must("receive", a.url(), b.folder / "vm.fvd")
        b.mount.mount()
    machine.stop()
    machine.run(b)
    world.cannot_write(a)
    world.ends_well(b, a)


@always
def test_the_target_dies_while_it_asks(world: World, turn: int) -> None:
    """If the source has moved by then, the next write at the target has the disk; else its machine goes on there."""
    a, b, machine = world.a, world.b, world.machine
    world.receive()
    machine.stop()
    asking = b.host.popen(*FVDFS, "activate", b.raw(), stderr=subprocess.DEVNULL)
    wait_some_time(turn, 0.8)
    b.die(turn)
    asking.wait(LONG)
    is_active, has_moved = b.record().state == "active", a.record().state == "moved"
    assert has_moved or not is_active
    b.come_back()
    if a.status()["move"] == "moved":  # it may have seen the question just now
        world.cannot_write(a)
        machine.cannot_run(a)
    else:
        machine.run(a)
        machine.stop()
    machine.run(b)
    world.cannot_write(a)
    world.ends_well(b, a)


@often
def test_the_target_dies_while_it_follows(world: World, turn: int) -> None:
    """It has the disk: what was acknowledged there is there when it is back."""
    a, b, machine = world.a, world.b, world.machine
    world.move(SLOWLY)
    wait_some_time(turn, 2)
    b.die(turn)
    machine.died()
    world.cannot_write(a)
    machine.cannot_run(a)
    b.come_back()
    assert b.record().state in ("active", "local")
    machine.run(b)
    world.ends_well(b, a)


@always
def test_the_target_is_given_up_after_it_has_taken_over(world: World, turn: int) -> None:
    """The source goes on with what was there at the switch-over. The target never reads what that writes then."""
    a, b, machine = world.a, world.b, world.machine
    world.receive(SLOWLY)
    machine.stop()
    before, disk = machine.last, read_all(a.raw())
    b.must("activate", b.raw())
    wait_some_time(turn, 0.5)
    b.die(turn)
    world.cannot_write(a)
    a.must("thaw", "--lose-writes", a.raw())
    machine.run(a)
    machine.stop()
    assert machine.last > before
    wait_until(lambda: a.status()["move"] == "serving")
    b.come_back()
    assert b.record().state == "active"
    with contextlib.suppress(OSError), open(b.raw(), "rb", buffering=0) as file:
        for block in range(0, BLOCKS, 16):
            assert os.pread(file.fileno(), BLOCK, block * BLOCK) == disk[block * BLOCK : (block + 1) * BLOCK]
    b.mount.umount()
    assert logwriter.problems(a.raw(), machine.journal) == []


def read_all(raw: Path) -> bytes:
    return subprocess.run(
        ["dd", f"if={raw}", "bs=1M", "iflag=direct", "status=none"], capture_output=True, check=True
    ).stdout


# --- the link and the server ----------------------------------------------------------------------------


@often
@pytest.mark.parametrize("on_base_error", ["wait", "eio"])
@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_link_is_cut_for_a_while(world: World, seconds: int, on_base_error: str, turn: int) -> None:
    """What needs the source stands still and goes on; where that takes long, and is not to be waited for, it fails."""
    a, b, machine = world.a, world.b, world.machine
    world.move(CRAWLING, f"on_base_error={on_base_error}")
    with open(b.raw(), "rb"):
        wait_some_time(turn, 1)
        a.host.link.cut(a.host)
        time.sleep(seconds)  # what is tried is the time itself
        if seconds > 10:
            says_why(b)
        if seconds > 10 and on_base_error == "eio":
            assert machine.end() == (FAILED, "EIO")
        a.host.link.join(a.host)
        if machine.is_running:
            machine.goes_on()
        else:
            wait_until(lambda: has_source(b), LONG)
            machine.run(b)
    world.cannot_write(a)
    world.ends_well(b, a)


@often
@pytest.mark.slow
@pytest.mark.parametrize("on_base_error", ["wait", "eio"])
def test_the_link_is_cut_for_good(world: World, on_base_error: str, turn: int) -> None:
    """Nothing old is read at the target, and it can be unmounted; the source has the disk as it was handed over."""
    a, b, machine = world.a, world.b, world.machine
    world.receive(CRAWLING, f"on_base_error={on_base_error}")
    machine.stop()
    (kept := machine.journal.with_name("kept")).write_text(machine.journal.read_text())
    machine.run(b)
    with open(b.raw(), "rb"):
        wait_some_time(turn, 1)
        a.host.link.cut(a.host)
        wait_until(lambda: b.status()["base_outage"], LONG)
        if on_base_error == "eio":
            assert machine.end() == (FAILED, "EIO")
        says_why(b)
    if machine.is_running:
        machine.kill()
    b.mount.umount()
    assert b.record().state == "active"
    world.cannot_write(a)
    a.must("thaw", "--lose-writes", a.raw())
    assert logwriter.problems(a.raw(), kept) == []
    Machine(kept).run_once(a)


@often
def test_the_server_is_killed(world: World, turn: int) -> None:
    """Before, while and after the disk moves: what it gives follows from the record."""
    a, b, machine = world.a, world.b, world.machine
    world.receive(SLOWLY, "on_base_error=wait")
    a.end_server()
    machine.goes_on()
    assert b.fvdfs("activate", b.raw()).code == 1
    a.serve()
    machine.stop()
    asking = b.host.popen(*FVDFS, "activate", b.raw(), stderr=subprocess.DEVNULL)
    wait_some_time(turn, 0.8)
    a.end_server()
    a.serve()
    asking.wait(LONG)
    machine.run(b)
    world.cannot_write(a)
    a.end_server()
    world.cannot_write(a)
    machine.cannot_run(a)
    a.serve()
    machine.goes_on()
    world.ends_well(b, a)


# --- several targets, and several moves -----------------------------------------------------------------


@often
def test_two_targets_want_it_at_once(world: World, turn: int) -> None:
    a, b, machine = world.a, world.b, world.machine
    world.receive(SLOWLY)
    world.c.must("receive", a.url(), world.c.folder / "vm.fvd")
    world.c.begin(sources=(a,))
    machine.stop()
    both = [site.host.popen(*FVDFS, "activate", site.raw(), stderr=subprocess.DEVNULL) for site in (b, world.c)]
    if turn % 2:
        wait_some_time(turn, 0.8)
        a.end_server()
        a.serve()
    codes = [process.wait(LONG) for process in both]
    states = [site.record().state for site in (b, world.c)]
    assert sorted(states) in (["active", "receiving"], ["local", "receiving"], ["receiving", "receiving"])
    assert codes == [int(state == "receiving") for state in states]
    target, into = a.status()["move_target"], b.record().incoming
    assert into is not None
    has_it, other = (b, world.c) if into.number == target else (world.c, b)
    machine.run(has_it)
    world.cannot_write(a)
    assert "has moved to another target" in other.fvdfs("activate", other.raw()).err
    machine.cannot_run(other, why="EIO")
    world.ends_well(has_it, a)


@often
def test_it_goes_back_to_the_first_host_while_it_still_follows(world: World, turn: int) -> None:
    """Whose old image is still there, and is what the other stands on."""
    a, b, machine = world.a, world.b, world.machine
    world.move(CRAWLING, "on_base_error=wait")
    wait_some_time(turn, 1)
    b.serve()
    a.must("receive", b.url(), a.folder / "back.fvd")
    wait_until(lambda: a.raw("back").exists())
    machine.goes_on()
    machine.stop()
    machine.run(a, "back")
    world.cannot_write(a)
    world.cannot_write(b)
    machine.cannot_run(b)
    machine.goes_on()
    machine.stop()
    with open(a.raw("back"), "r+b"):
        wait_until(lambda: b.status()["move"] == "released", LONG)
        wait_until(lambda: a.status()["move"] == "released", LONG)
    b.die()
    a.end_server()
    a.mount.umount()
    (a.folder / "vm.fvd").unlink()
    a.mount.mount()
    assert logwriter.problems(a.raw("back"), machine.journal) == []


@always
def test_it_goes_on_to_a_third_host_while_it_still_follows(world: World, turn: int) -> None:
    """It reads through the second what that has not copied. The second is released, and then it releases the first."""
    a, b, c, machine = world.a, world.b, world.c, world.machine
    world.move(CRAWLING, "on_base_error=wait")
    wait_some_time(turn, 0.3)
    b.serve()
    c.must("receive", b.url(), c.folder / "vm.fvd")
    c.begin("on_base_error=wait", sources=(b,))
    machine.stop()
    into = b.record().incoming
    assert into is not None
    assert (into.epoch, into.number) == (a.status()["move_epoch"], a.status()["move_target"])
    was_local = into.state is Target.LOCAL
    machine.run(c)
    for site in (a, b):
        world.cannot_write(site)
        machine.cannot_run(site)
    if turn % 2:
        b.die(turn)
        b.come_back("vm")
        world.cannot_write(b)
    machine.goes_on()
    first, second = a.status()["move"], b.status()["move"]
    assert (first, second) in (("moved", "moved"), ("moved", "released"), ("released", "released")) or was_local
    machine.stop()
    with open(c.raw(), "r+b"):
        wait_until(lambda: b.status()["move"] == "released", LONG)
        wait_until(lambda: a.status()["move"] == "released", LONG)
    a.die()
    b.die()
    assert logwriter.problems(c.raw(), machine.journal) == []
    machine.run(c)
    machine.stop()


# --- with guests ----------------------------------------------------------------------------------------


class GuestWorld:
    """Two hosts, and a guest on the first, whose disk the second can take over."""

    MIB, FILES = 32, 16
    STOPS = "none,rerror=stop,werror=stop"
    """The machine stands still at an error, and goes on when it is told to."""

    def __init__(self, work: Path, hosts: Sequence[Host]) -> None:
        self.a, self.b = (Site(host, work) for host in hosts)
        self.witness = Witness(work, self.MIB, percent=60, files=self.FILES)
        self.source: Guest

    def begin(self, *options: str) -> None:
        """It runs on the first; `options` of the mount of the second."""
        must("create", self.a.folder / "vm.fvd", f"{self.witness.size}M")
        self.a.begin()
        self.witness.fill(self.a.raw())
        self.a.serve()
        self.b.must("receive", self.a.url(), self.b.folder / "vm.fvd")
        self.b.begin(*options, sources=(self.a,))
        self.source = self.witness.boot(self.a.host, drive(self.a.raw(), self.STOPS))
        self.source.wait_for(5)

    def incoming(self) -> tuple[Guest, str]:
        """A machine at the target that waits, and where it waits."""
        where = f"tcp:{self.b.host.address}:4444"
        return self.witness.boot(self.b.host, drive(self.b.raw(), self.STOPS), incoming=where), where

    def ends_well(self, *machines: Guest) -> None:
        """All gets to the target; no guest has seen anything wrong, and the disk holds what they have flushed."""
        machines[-1].wait_for(5)
        wait_until(lambda: self.a.status()["move"] == "released", LONG)
        machines[-1].monitor("stop")
        machines[-1].kill()
        self.a.die()
        self.holds_the_log_of(*machines)
        self.b.mount.umount()
        assert self.b.fvdfs("check", self.b.folder / "vm.fvd").code == 0

    def holds_the_log_of(self, *machines: Guest) -> None:
        """The target's disk is right, and none of what the guest has flushed is missing."""
        course, found = follow(*machines), self.witness.check(self.b.raw())
        assert course.is_right, course
        assert course.filed > 0
        self.witness.check_files(self.b.raw(), course)
        records = re.search("records=([0-9]+)", found)
        assert records is not None
        assert int(records[1]) > course.ticks[-1].sequence

    def close(self) -> None:
        for site in (self.a, self.b):
            site.host.crash()
            site.close()


@contextlib.contextmanager
def guest_world(work: Path, *options: str) -> Iterator[GuestWorld]:
    with joined_hosts(2) as (hosts, _):
        world = GuestWorld(work, hosts)
        try:
            world.begin(*options)
            yield world
        finally:
            world.close()


def go_on(machine: Guest) -> None:
    """Have it go on, if it has stopped at an error."""
    if machine.monitor("query-status")["status"] == "io-error":
        machine.monitor("cont")


def more(machine: Guest, ticks: int) -> None:
    machine.wait_for(len(machine.ticks) + ticks, LONG)


@pytest.mark.slow
@always
def test_a_guest_whose_source_dies_at_the_switch_over(tmp_path: Path, turn: int) -> None:
    """It stands still until the source is back, and goes on."""
    with guest_world(tmp_path, SLOWLY, "on_base_error=wait") as world:
        there, where = world.incoming()
        move(world.source, where)
        wait_some_time(turn, 0.3)
        world.a.die(turn)
        if turn % 3 == 1:
            time.sleep(40)  # longer than a first write waits
        world.a.come_back("vm")
        go_on(there)
        more(there, 5)
        world.ends_well(world.source, there)


@pytest.mark.slow
@often
def test_a_guest_whose_migration_is_cancelled(tmp_path: Path, turn: int) -> None:
    """It goes on as if nothing had been, and can be moved again."""
    with guest_world(tmp_path) as world:
        there, where = world.incoming()
        world.source.monitor("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
        world.source.monitor("migrate", uri=where)
        wait_some_time(turn, 2)
        world.source.monitor("migrate_cancel")
        wait_until(lambda: world.source.monitor("query-migrate")["status"] == "cancelled", LONG)
        there.kill()
        more(world.source, 3)
        assert world.a.status()["move"] == "serving"
        assert world.b.status()["move"] == "receiving"
        assert world.b.status()["local_bytes"] == 0
        there, where = world.incoming()
        move(world.source, where)
        world.ends_well(world.source, there)


@pytest.mark.slow
@often
def test_a_guest_whose_link_is_cut_while_its_disk_follows(tmp_path: Path, turn: int) -> None:
    """Its machine stops at the first error, and goes on when it is told to."""
    with guest_world(tmp_path, SLOWLY) as world:
        there, where = world.incoming()
        move(world.source, where)
        there.wait_for(1)
        wait_until(lambda: world.b.status()["move"] == "active", LONG)  # else each write asks for the disk for 30 s
        wait_some_time(turn, 1)
        world.a.host.link.cut(world.a.host)
        wait_until(lambda: there.monitor("query-status")["status"] == "io-error", LONG)
        says_why(world.b)
        world.a.host.link.join(world.a.host)
        wait_until(lambda: has_source(world.b), LONG)
        there.monitor("cont")
        more(there, 5)
        world.ends_well(world.source, there)


@pytest.mark.slow
@often
def test_a_guest_whose_host_loses_power_while_its_disk_follows(tmp_path: Path, turn: int) -> None:
    """What it had flushed there is there."""
    with guest_world(tmp_path, SLOWLY) as world:
        there, where = world.incoming()
        move(world.source, where)
        there.wait_for(1)
        wait_some_time(turn, 2)
        world.b.die(turn)
        world.b.come_back()
        world.holds_the_log_of(world.source, there)
