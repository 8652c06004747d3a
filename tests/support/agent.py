"""A guest agent (qemu-ga) at a Unix socket, as far as file systems are frozen by it; and ones that misbehave."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class FakeAgent:
    """Answers one connection after the other, as QEMU has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False
        self.calls: list[str] = []
        self.greeting = b""
        """What it says to whoever connects: the rest of an answer to somebody else."""
        self.before: dict[str, Callable[[socket.socket], bool]] = {}
        """By command: what it does before, and whether it goes on as it should."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen(1)

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                peer, _ = self._listening.accept()
                with peer, contextlib.suppress(OSError):
                    peer.sendall(self.greeting)
                    self._talk(peer)

    def _talk(self, peer: socket.socket) -> None:
        rest = b""
        while data := peer.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if b"\xff" in line:
                    line = line.partition(b"\xff")[2]
                    peer.sendall(b'{"error": {"class": "GenericError", "desc": "Invalid JSON"}}\n')
                request = json.loads(line)
                command = request["execute"]
                self.calls.append(command.removeprefix("guest-"))
                if command not in self.before or self.before[command](peer):
                    peer.sendall(self._answer(command, request.get("arguments", {})))

    def _answer(self, command: str, arguments: dict[str, Any]) -> bytes:
        if command == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"
        if command == "guest-fsfreeze-status":
            return json.dumps({"return": "frozen" if self.frozen else "thawed"}).encode() + b"\n"
        was, self.frozen = self.frozen, command == "guest-fsfreeze-freeze"
        return json.dumps({"return": int(was is not self.frozen)}).encode() + b"\n"

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@contextlib.contextmanager
def fake_agent(path: Path) -> Iterator[FakeAgent]:
    """One that runs in a thread."""
    agent = FakeAgent(path)
    thread = threading.Thread(target=agent.serve, daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.close()
        thread.join(10)
