"""`fvdfs snapshot --freeze`: a guest is frozen for the snapshot, and thawed whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from fvdfs.commands import freeze
from fvdfs.commands.freeze import while_frozen
from fvdfs.errors import FvdError, UsageError
from fvdfs.qmp import CommandRefused, Connection, NoAnswer, somebody_listens
from support.agent import FakeAgent, fake_agent
from support.mounts import FVDFS, fvdfs, mounted, must, wait_until

WHOLE = ["sync-delimited", "fsfreeze-status", "fsfreeze-freeze", "sync-delimited", "fsfreeze-thaw"]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    for name in ("SYNC_TIME", "FREEZE_TIME", "THAW_TIME", "WORK_TIME"):
        monkeypatch.setattr(freeze, name, 0.3)
    with fake_agent(tmp_path / "qga") as found:
        yield found


def frozen(agent: FakeAgent) -> list[bool]:
    """Whether the guest was, while the work was done."""
    seen = []
    while_frozen(str(agent.path), lambda: seen.append(agent.frozen))
    return seen


def test_the_guest_is_frozen_for_the_work_and_no_longer(agent: FakeAgent) -> None:
    assert frozen(agent) == [True]
    assert not agent.frozen
    assert agent.calls == WHOLE


def test_what_the_agent_has_left_to_say_to_others_is_skipped(agent: FakeAgent) -> None:
    agent.greeting = b'rest of it"}\n{"return": {}}\n\xff{"return": 1}\n{"retu'
    assert frozen(agent) == [True]


def test_work_that_fails(agent: FakeAgent) -> None:
    def fail() -> NoReturn:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        while_frozen(str(agent.path), fail)
    assert agent.calls == WHOLE
    assert not agent.frozen


def test_work_that_takes_too_long(agent: FakeAgent) -> None:
    with pytest.raises(NoAnswer, match=r"thawed after 0.3 s"):
        while_frozen(str(agent.path), lambda: time.sleep(2))
    assert not agent.frozen


def test_a_guest_that_freezes_late_is_thawed_then(agent: FakeAgent) -> None:
    def late(_peer: socket.socket) -> bool:
        time.sleep(0.5)
        return True

    agent.before["guest-fsfreeze-freeze"] = late
    with pytest.raises(NoAnswer, match=r"qga: no answer$"):
        frozen(agent)
    assert agent.calls == WHOLE
    assert not agent.frozen


def test_an_agent_that_loses_its_connection_is_thawed_by_another(agent: FakeAgent) -> None:
    def lose(peer: socket.socket) -> bool:
        agent.frozen = True
        peer.shutdown(socket.SHUT_RDWR)
        return False

    agent.before["guest-fsfreeze-freeze"] = lose
    with pytest.raises(NoAnswer, match="has closed the connection"):
        frozen(agent)
    assert agent.calls == WHOLE
    assert not agent.frozen


def refuse(peer: socket.socket) -> bool:
    peer.sendall(json.dumps({"error": {"class": "GenericError", "desc": "is disabled"}}).encode() + b"\n")
    return False


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("guest-fsfreeze-status", "fsfreeze-status: is disabled$"),
        ("guest-fsfreeze-freeze", "fsfreeze-freeze: is disabled$"),
        ("guest-fsfreeze-thaw", "fsfreeze-thaw: is disabled; the guest may be frozen still"),
    ],
)
def test_an_agent_that_refuses(agent: FakeAgent, command: str, error: str) -> None:
    agent.before[command] = refuse
    with pytest.raises(CommandRefused, match=error):
        frozen(agent)
    assert agent.frozen is (command == "guest-fsfreeze-thaw")


def test_a_guest_that_somebody_else_has_frozen_stays_so(agent: FakeAgent) -> None:
    agent.frozen = True
    with pytest.raises(UsageError, match="is frozen already"):
        frozen(agent)
    assert agent.frozen


@pytest.mark.parametrize("says", [b"", b"x" * 100, b"\xff\n", b'\xff{"return": 5}\n', b"\xff[1]\n", b"\xff{}\n\xff"])
def test_what_is_no_agent(agent: FakeAgent, says: bytes) -> None:
    def say(peer: socket.socket) -> bool:
        peer.sendall(says)
        return False

    agent.before["guest-sync-delimited"] = say
    with pytest.raises(NoAnswer, match="start qemu-guest-agent in the guest"):
        frozen(agent)


def test_a_message_without_end(agent: FakeAgent) -> None:
    def say(peer: socket.socket) -> bool:
        while True:
            peer.sendall(bytes(1 << 20))

    agent.before["guest-sync-delimited"] = say
    with pytest.raises(NoAnswer, match=r"without an end|no answer"):
        frozen(agent)


def test_events_are_no_answers(agent: FakeAgent) -> None:
    def tell(peer: socket.socket) -> bool:
        peer.sendall(b'{"event": "RESUME"}\n')
        return True

    agent.before["guest-fsfreeze-status"] = tell
    with Connection(str(agent.path)) as connection:
        assert connection.call("guest-fsfreeze-status", 1) == "thawed"


@pytest.mark.parametrize("kind", ["missing", "file", "nobody", "long"])
def test_nobody_listens(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 200 if kind == "long" else "qga")
    if kind == "file":
        path.touch()
    if kind == "nobody":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    with pytest.raises(UsageError, match="name the Unix socket of a QEMU that runs"):
        while_frozen(str(path), lambda: None)


def test_who_does_not_accept_yet_is_waited_for(tmp_path: Path) -> None:
    """Its queue is full of somebody who looked whether it listens."""
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as threads:
        listening.bind(path)
        listening.listen(0)
        assert somebody_listens(path)
        connecting = threads.submit(Connection, path)
        with pytest.raises(TimeoutError):
            connecting.result(0.1)
        for _ in range(2):
            listening.accept()[0].close()
        with connecting.result(10):
            pass


def test_an_agent_without_an_end_is_told(agent: FakeAgent) -> None:
    """One line each, so that nobody has to guess which time has passed."""
    agent.before["guest-fsfreeze-status"] = lambda _peer: False
    with pytest.raises(FvdError) as caught:
        frozen(agent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"])
def test_a_signal(tmp_path: Path, number: signal.Signals, when: str) -> None:
    """While the guest freezes it is thawed; while it thaws, it is."""
    program = f"import sys, time; sys.path[:0] = {sys.path!r}; from fvdfs.commands.freeze import while_frozen; "
    program += f"while_frozen({str(tmp_path / 'qga')!r}, lambda: None)"
    with fake_agent(tmp_path / "qga") as agent:
        begun = []

        def wait(_peer: socket.socket) -> bool:
            begun.append(when)
            time.sleep(0.4)
            return True

        agent.before[when] = wait
        with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: bool(begun))
            os.kill(process.pid, number)
            process.wait(60)
        assert agent.calls == WHOLE
        assert not agent.frozen


def test_a_snapshot_of_a_frozen_guest(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder) as mount, fake_agent(tmp_path / "qga") as agent:
        made = []

        def look(_peer: socket.socket) -> bool:
            made.append((folder / "vm@1.fvd").exists())
            return True

        agent.before["guest-fsfreeze-freeze"] = agent.before["guest-fsfreeze-thaw"] = look
        with open(mount.raw("vm"), "r+b"):
            assert must("snapshot", mount.raw("vm"), "--freeze", agent.path).strip() == str(folder / "vm@1.fvd")
        assert made == [False, True]
        agent.calls.clear()
        for disk, name in ((folder / "vm.fvd", "x"), (mount.raw("vm"), "a/b")):
            done = fvdfs("snapshot", disk, name, "--freeze", agent.path)
            assert (done.code, done.err.count("\n")) == (2, 1)
        assert agent.calls == []  # a mistake costs the guest nothing


def test_ctrl_c_in_a_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    must("create", folder / "vm.fvd", "4M")
    with mounted(folder) as mount, fake_agent(tmp_path / "qga") as agent:
        begun = []

        def wait(_peer: socket.socket) -> bool:
            begun.append(1)
            time.sleep(0.3)
            return True

        agent.before["guest-fsfreeze-freeze"] = wait
        words = [*FVDFS, "snapshot", str(mount.raw("vm")), "--freeze", str(agent.path)]
        with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
            wait_until(lambda: bool(begun))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr is not None
            assert process.stderr.read() == b""
        assert not agent.frozen
        assert not (folder / "vm@1.fvd").exists()
