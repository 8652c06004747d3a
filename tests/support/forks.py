"""Runs the program again and again at the price of one start: each run is a fork of a process that has imported it.

`python -m fvdfs` takes more time to import what a command needs than most commands then take. Here one process imports
all of the package, and waits in `_serve`. A run is a process of its own all the same, which begins as
`fvdfs/__main__.py` does, and ends as any Python program but for one thing: it does not take its modules apart, which
would copy all memory that it shares with the process it is a fork of, and takes longer than most commands.

That each command imports what it needs, and ends well, is for tests that start `support.mounts.FVDFS`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 128 << 10  # bytes of a request
_CHUNK = 64 << 10  # bytes


def _environment() -> dict[str, str]:
    """What a program is started with, without what pytest changes for each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


class _Server:
    def __init__(self) -> None:
        self.environment = _environment()
        import fvdfs

        where = Path(fvdfs.__file__).parents[1]
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno()), str(where)]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])

    def run(self, words: Sequence[str], cwd: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """As subprocess.run, with text that is captured. Raises TimeoutExpired."""
        ends = [os.pipe() for _ in range(3)]
        try:
            request = json.dumps([cwd, *words]).encode()
            socket.send_fds(self._channel, [request], [write for _, write in ends])
        finally:
            for _, write in ends:
                os.close(write)
        try:
            out, err, report = self._read([read for read, _ in ends], words, time.monotonic() + timeout)
        finally:
            for read, _ in ends:
                os.close(read)
        _, code = report.split()
        return subprocess.CompletedProcess([*words], int(code), out.decode(), err.decode())

    def _read(self, pipes: list[int], words: Sequence[str], deadline: float) -> list[bytes]:
        """What comes out of each of them, until all have ended."""
        found = dict.fromkeys(pipes, b"")
        with selectors.DefaultSelector() as selector:
            for pipe in pipes:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    pid = int(found[pipes[2]].split()[0])
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    raise subprocess.TimeoutExpired([*words], deadline)
                for key, _ in ready:
                    data = os.read(key.fd, _CHUNK)
                    found[key.fd] += data
                    if not data:
                        selector.unregister(key.fd)
        return list(found.values())

    def end(self) -> None:
        self._channel.close()
        self._process.wait()


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.end)
    return server


def run(words: Sequence[str], cwd: str | Path = ".", timeout: float = 60) -> subprocess.CompletedProcess[str] | None:
    """Run `fvdfs` with these words; None where that must not be a fork, as the environment is another one by now."""
    server = _server()
    return server.run(words, os.path.abspath(cwd), timeout) if server.environment == _environment() else None


# --- the process that is forked -------------------------------------------------------------------


def _serve(channel: socket.socket) -> list[str]:
    """Fork at each request, for ever; returns in the forks: the words of the command."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, _LONGEST, 3)
        if not request:
            os._exit(0)
        if not os.fork():
            channel.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            report = descriptors.pop()
            pid = os.fork()
            if pid:
                for descriptor in descriptors:
                    os.close(descriptor)
                os.write(report, b"%d " % pid)
                os.write(report, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os._exit(0)
            os.close(report)
            for number, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            words: list[str]
            cwd, *words = json.loads(request)
            os.chdir(cwd)
            return words
        for descriptor in descriptors:
            os.close(descriptor)


class _Ending:
    """What a run does last: it ends with its exit code, before modules are taken apart."""

    def __init__(self) -> None:
        """Before all modules that have something to do at the end: what is registered first is called last."""
        self.code = 1  # of a traceback
        atexit.register(self._end)

    def _end(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    ending = _Ending()
    sys.path.insert(0, sys.argv[2])
    import fvdfs

    for module in pkgutil.walk_packages(fvdfs.__path__, "fvdfs."):
        importlib.import_module(module.name)  # `fvdfs.__main__`, too, which does what it does before a command begins
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the commands
    gc.freeze()
    sys.argv = ["fvdfs", *_serve(channel)]
    from fvdfs.cli import entry

    try:
        entry()
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        ending.code = ended.code
        raise


if __name__ == "__main__":
    main()
