"""The hosts of tests that need several: they reach each other, a link can be cut, a guest tells how it fares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.guest import CommandError, drive
from support.hosts import Host, joined_hosts, needs_hosts, two_hosts
from support.mounts import MIB, must, wait_until
from support.witness import Witness, follow, move

pytestmark = needs_hosts

ECHO = """
import socket, sys
with socket.create_server((sys.argv[1], 7)) as server:
    print("ready", flush=True)
    while True:
        client, _ = server.accept()
        with client:
            while data := client.recv(1 << 20):
                client.sendall(data)
"""
ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 7), float(sys.argv[3])) as server:
    asked, found = bytes(int(sys.argv[2])), 0
    server.sendall(asked)
    while found < len(asked):
        found += len(server.recv(1 << 20))
"""


def echoing(host: Host) -> None:
    process = host.popen(sys.executable, "-c", ECHO, host.address, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def reaches(host: Host, other: Host, size: int = 1000, timeout: float = 20) -> bool:
    return host.run(sys.executable, "-c", ASK, other.address, str(size), str(timeout)).code == 0


def test_hosts_reach_each_other_until_the_link_is_cut(folder: Path) -> None:
    with two_hosts() as (source, target, link):
        echoing(target)
        assert reaches(source, target, MIB)
        sent, back = link.bytes()
        assert MIB < sent < 1.1 * MIB
        assert MIB < back < 1.1 * MIB
        assert not reaches(source, source), "each is a host of its own"
        link.cut()
        assert not reaches(source, target, timeout=0.3)
        link.join()
        assert reaches(source, target)
        must("create", folder / "vm.fvd", "1M")
        with target.mounted(folder) as mount:
            namespace = Path(f"/proc/{mount.pid}/ns/net").stat()
            assert namespace.st_ino == target.namespace.stat().st_ino
            assert mount.raw("vm").read_bytes() == bytes(MIB)


def test_a_host_crashes_and_comes_back(folder: Path) -> None:
    with joined_hosts(3, delay_us=0) as ((one, two, three), link):
        echoing(two)
        echoing(three)
        must("create", folder / "vm.fvd", "1M")
        with two.mounted(folder) as mount:
            two.crash()
            mount.clear()
            assert not reaches(one, two, timeout=0.3)
            assert reaches(one, three)
            link.join(two)
            assert not reaches(one, two), "refused: nothing runs there"
            echoing(two)
            assert reaches(three, two)
            mount.mount()
    assert not any(host.namespace.exists() for host in (one, two, three))


def test_a_guest_tells_what_it_went_through(tmp_path: Path) -> None:
    """Over a file that both hosts have, with a move; and one that finds other data than it wrote."""
    raw = tmp_path / "disk.raw"
    witness = Witness(tmp_path, 16)
    witness.fill(raw)
    with two_hosts() as (source, target, _):
        here = witness.boot(source, drive(raw, cache="none"))
        here.wait_for(3)
        address = f"tcp:{target.address}:4444"
        there = witness.boot(target, drive(raw, cache="none"), incoming=address)
        assert move(here, address)["downtime"] > 0
        there.wait_for(3)
        course = follow(here, there)
        assert course.is_right, course
        assert len(course.ticks) >= 6
        assert 0 < course.gap < 10
        there.monitor("stop")
        assert "wrong=0 failed=0" in witness.check(raw)
        witness.reset(raw)  # what it wrote is gone
        there.monitor("cont")
        wait_until(lambda: not follow(here, there).is_right)
        with pytest.raises(CommandError, match="WRONG"):
            there.monitor("stop")
            witness.check(raw)
