"""The keeper of a mount (`-o keep`): a process that outlives the one that serves it, and starts the next one.

Who holds the descriptor of /dev/fuse holds the mount: the kernel lets requests wait as long as any process has it. So a
process that is as small as Python allows has it as well, with what the next daemon must have, by names:

    fvdfs-fuse         the descriptor of /dev/fuse
    fvdfs-claim        the directory that the mount covers, locked (`mounts.Claim`)
    fvdfs-state-N      a file in memory: what INIT settled, what is open (`ops/remembered.py`); the highest N counts
    fvdfs-backing-I    what the kernel reads and writes by itself of inode I (`ops/passthrough.py`)

The words between the two are systemd's, which can have the keeper's part where fvdfs is a service of its own
(sd_notify(3), FileDescriptorStoreMax=):

- The daemon sends `FDSTORE=1` and `FDNAME=…` with descriptors, `FDSTOREREMOVE=1` and `FDNAME=…`, and `READY=1`. The
  keeper's socket is one that both have, in place of NOTIFY_SOCKET.
- `COMMAND=…` is a word of ours: what starts the next daemon from now on, words that end with a zero byte, as
  hexadecimal digits (`fvdfs upgrade`). If that one ends before it is ready, or is not in `PATIENCE`, the former command
  counts again.
- The next daemon has them from descriptor 3 on, named by LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID
  (sd_listen_fds(3)), and with the keeper's socket as `fvdfs-keeper`.

The keeper waits until the daemon's process is gone, with every thread and with what the kernel was doing for it: then
its locks are free, and two never have an image at once. If there is no `fvdfs-fuse` any more, the mount has ended, and
so does the keeper. Else it starts the next daemon, at once; after one that has failed (it never was ready, or not for
long) it waits, longer each time, and after `FAILURES` of them in a row it says so in the log and lets go of
everything: then the mount is dead, as if there were no keeper. It has no other way to be reached than its socket.

This file is run as a program by itself, and imports next to nothing:

    python -I -S keeper.py SOCKET PIDFD PID DIRECTORY LOG -- PROGRAM ARGUMENT...
"""

from __future__ import annotations

import _socket
import fcntl
import os
import select
import signal
import sys
import time

OURS = "fvdfs-"
FUSE, CLAIM, STATE, BACKING = "fvdfs-fuse", "fvdfs-claim", "fvdfs-state-", "fvdfs-backing-"
SOCKET = "fvdfs-keeper"
FIRST = 3  # SD_LISTEN_FDS_START
FORMER = "FVDFS_FORMER"
"""The variable that tells the next daemon how the one before ended."""
FAILURES = 8
SHORT = 1.0  # seconds; a daemon that ends so soon after it was ready has failed
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_IGNORED = (*ENDING, signal.SIGPIPE)
"""It ends when the mount does."""
PATIENCE = 30.0  # seconds
_MESSAGE = 1 << 18  # bytes
_MOST = 16  # descriptors in one message
_INT = 4


class Keeper:
    """What one daemon has handed over, and who that is."""

    def __init__(self, channel: int, pidfd: int, pid: int, folder: str, log: str, command: list[str]) -> None:
        """`channel`: our end of the socket, which `pidfd`, a process, has the other end of."""
        self._channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, channel)
        self._pidfd = pidfd
        self._pid = pid
        self._folder = folder
        self._log = log
        self._commands = [command]
        """What starts the next daemon is the last one; before it, what is known to work."""
        self._held: dict[str, int] = {}
        self._ready = time.monotonic()
        self._started = False
        self._failures = 0

    def run(self) -> None:
        """Keep the mount until it is gone, or is given up."""
        while True:
            how = self._wait()
            if FUSE not in self._held:
                return
            if len(self._commands) > 1 and self._started and not self._ready:
                self._commands.pop()
                self._say(f"{how}, and has never been ready: the former version goes on")
                self._start(how)
                continue
            failed = not self._ready or time.monotonic() - self._ready < SHORT
            self._failures = self._failures + 1 if failed else 0
            if self._failures >= FAILURES:
                self._say(f"{how}; {FAILURES} in a row have failed: the mount is given up")
                return
            if self._failures > 1:
                time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (self._failures - 2)))
            self._start(how)

    def _wait(self) -> str:
        """Take what the daemon hands over until it has ended; how it has."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        ended = False
        while not ended:
            found = poll.poll(None if self._ready else PATIENCE * 1000)
            ended = self._pidfd in [descriptor for descriptor, _ in found]
            if not found and len(self._commands) > 1:
                os.kill(self._pid, signal.SIGKILL)
            elif not self._receive():
                poll.unregister(self._channel.fileno())
                break
        while not ended and not poll.poll():
            pass
        os.close(self._pidfd)
        self._channel.close()
        return self._reap()

    def _receive(self) -> bool:
        """Take all messages that have come; False where no more can."""
        while True:
            try:
                data, extra, _, _ = self._channel.recvmsg(
                    _MESSAGE, _socket.CMSG_SPACE(_MOST * _INT), _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            found = [
                int.from_bytes(part[at : at + _INT], sys.byteorder)
                for _, _, part in extra
                for at in range(0, len(part) // _INT * _INT, _INT)
            ]
            self._obey(dict(line.partition("=")[::2] for line in data.decode().split("\n")), found)

    def _obey(self, words: dict[str, str], descriptors: list[int]) -> None:
        name = words.get("FDNAME", "")
        if "READY" in words:
            self._ready = time.monotonic()
            if self._started:
                self._commands = self._commands[-1:]
        if "COMMAND" in words:
            command = bytes.fromhex(words["COMMAND"]).decode("utf-8", "surrogateescape").split("\0")[:-1]
            self._commands = [self._commands[0], command]
        if ("FDSTORE" in words or "FDSTOREREMOVE" in words) and name in self._held:
            os.close(self._held.pop(name))
        if "FDSTORE" in words and name and descriptors:
            self._held[name] = descriptors.pop(0)
        for descriptor in descriptors:
            os.close(descriptor)

    def _reap(self) -> str:
        """How the daemon has ended, as far as we are told: the first is not our child."""
        try:
            _, status = os.waitpid(self._pid, 0)
        except ChildProcessError:
            return f"process {self._pid} has ended"
        code = os.waitstatus_to_exitcode(status)
        by = f"was ended by signal {-code}" if code < 0 else f"has ended with exit code {code}"
        return f"process {self._pid} {by}"

    def _start(self, how: str) -> None:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        passed = {**self._held, SOCKET: theirs.fileno()}
        pid = os.fork()
        if not pid:
            become(self._commands[-1], passed, self._folder, how)
        theirs.close()
        self._channel, self._pid, self._pidfd, self._ready = ours, pid, os.pidfd_open(pid), 0.0
        self._started = True

    def _say(self, text: str) -> None:
        """Say it in the log of the mount."""
        try:
            if self._log:
                line = f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 CRITICAL keeper: {text}\n"
                flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
                log = os.open(self._log, flags)
                try:
                    os.write(log, line.encode(errors="surrogateescape"))
                finally:
                    os.close(log)
            else:
                system = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
                system.connect("/dev/log")
                system.send(f"<26>fvdfs[{os.getpid()}]: CRITICAL keeper: {text}".encode())
        except OSError:
            pass


def become(command: list[str], passed: dict[str, int], folder: str, how: str) -> None:
    """Be the next daemon: this process ends. Signals wait until it can obey them (`daemon.note_signals`)."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        for ignored in _IGNORED:
            signal.signal(ignored, signal.SIG_DFL)
        os.environ["LISTEN_FDS"] = str(len(passed))
        os.environ["LISTEN_FDNAMES"] = ":".join(passed)
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ[FORMER] = how
        # First out of the way of each other, then in order.
        above = [_above(descriptor, FIRST + len(passed)) for descriptor in passed.values()]
        for number, descriptor in enumerate(above, FIRST):
            os.dup2(descriptor, number)
        try:
            os.chdir(folder)
        except OSError:
            os.chdir("/")
        os.execv(command[0], command)
    finally:
        os._exit(127)


def _above(descriptor: int, lowest: int) -> int:
    """Another number for it, which is not closed by exec until dup2 has given it its own."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def main() -> None:
    """The program."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    channel, pidfd, pid, folder, log, _, *command = sys.argv[1:]
    Keeper(int(channel), int(pidfd), int(pid), folder, log, command).run()


if __name__ == "__main__":
    main()
