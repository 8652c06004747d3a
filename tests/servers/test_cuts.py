"""A network that is cut for half a minute, and disks whose bases are behind it, on servers of several kinds."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.cables import Network
from support.cells import DATA, create, options, read
from support.mounts import MIB, Mount, mounted, wait_until
from support.servers import DiskServer, Https, Ssh

KINDS: dict[str, Callable[[Path, int, Network], DiskServer]] = {"ssh": Ssh, "https": Https}
CUT = 30.0  # seconds; TCP tries again after ever longer times, and by then not for as long again
LIMIT = 10  # seconds until all goes on; a connection is tried each second


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := Network.missing() or Ssh.missing() or Https.missing():
        pytest.skip(reason)
    network = Network()
    yield network
    network.remove()


def is_away(mount: Mount) -> bool:
    return bool(mount.status("vm").get("base_outage"))


@pytest.mark.slow
def test_a_network_that_is_cut(tmp_path: Path, network: Network) -> None:
    """Status says since when, and disks go on as soon as the network is back."""
    with ExitStack() as stack:
        mounts: dict[str, Mount] = {}
        for number, (name, kind) in enumerate(KINDS.items()):
            server = kind(tmp_path / f"{name}-server", 10000 + number, network)
            server.put(DATA)
            stack.callback(server.stop)
            server.start()
            folder = tmp_path / name
            folder.mkdir()
            create(folder, server)
            mounts[name] = stack.enter_context(mounted(folder, "-o", options(server, "on_base_error=wait")))
            stack.enter_context(mounts[name].raw("vm").open("rb"))
            assert read(mounts[name].raw("vm"), 0, 4096) == DATA[:4096]
        network.cut()
        stack.callback(network.join)  # else what still reads would keep the mounts, whatever failed
        began = time.monotonic()
        found: dict[str, bytes] = {}

        def read_of(name: str) -> None:
            found[name] = read(mounts[name].raw("vm"), MIB, 4096)

        readers = [threading.Thread(target=read_of, args=(name,)) for name in mounts]
        for reader in readers:
            reader.start()
        for name, mount in mounts.items():
            wait_until(functools.partial(is_away, mount))
            assert "nothing was heard" in mount.log, name
            assert mount.status("vm")["base_outage"]["since"]
        while time.monotonic() - began < CUT:
            assert not found
            time.sleep(0.1)
        network.join()
        for reader in readers:
            reader.join(LIMIT)
        assert found == dict.fromkeys(KINDS, DATA[MIB : MIB + 4096])
