"""What of a mount outlives its daemon (`-o keep`): who holds it meanwhile, and how the next daemon takes it over.

The holder is the keeper (`keeper.py`), which the daemon starts once the mount is ready, and again where somebody has
ended it, or systemd's file descriptor store. Both take descriptors by name, and the next daemon begins with those
(`daemon.inherited`). What these do not say is in `remembered.Remembered`.

The next daemon, in this order:

1. It has libfuse answer INIT once more, and goes by the answer that the kernel got then (`device.Device`).
2. It opens every image that the kernel has a handle of, under the same inode number and with its locks (`adopt`). The
   former daemon's process is gone, and with it its locks, and what it had in hand. Where an image cannot be opened any
   more (it was removed while it was open), requests to it fail with ESTALE; nothing else does. So is an image that has
   ended `TIMES` daemons while they opened it: one that takes more memory than there is, say.
3. It asks the kernel to send again what was not answered (FUSE_NOTIFY_RESEND), and answers it, as `device` says.

An unforeseen error ends the daemon, and not the mount: the next one takes it over. So does the one that `fvdfs
upgrade` asks for (`Kept.hand_over`): then the daemon itself says who is next, finishes what it has in hand, and ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import trio

from fvdfs import daemon, keeper, mounts
from fvdfs.errors import FvdError, ImageBusy, printable, told
from fvdfs.ops.device import Device
from fvdfs.ops.filesystem import Filesystem
from fvdfs.ops.folder import Folder
from fvdfs.ops.inodes import Entry, raw_name
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.remembered import TIMES, Disk, Remembered, path_of
from fvdfs.store import filelock
from fvdfs.store.host import identity_of
from fvdfs.store.qemu_daemon import STOP_TIMEOUT
from fvdfs.store.qemu_words import PROGRAM

log = logging.getLogger(__name__)

AGAIN = 5  # times that an image is opened which something of the former daemon's still holds
PAUSE = 0.5  # seconds between two
COMMIT_PATIENCE = 10.0  # seconds for commits before another daemon is to go on
ANSWER_PATIENCE = 2.0  # seconds for what is in hand then; the next one does the rest
_SEND_PATIENCE = 1.0  # seconds until a keeper that is stopped takes what it is sent
_HANDED_OVER = "the daemon before has handed it over"


class Kept:
    """Of one mount, in the daemon that serves it."""

    def __init__(self, inherited: daemon.Inherited | None, command: Sequence[str], folder: str, log_file: str) -> None:
        """`command`: what starts the next daemon, in this folder; none: nothing is kept. Raises OSError."""
        self.remembered = Remembered()
        self._command = command
        self._folder = folder
        self._log_file = log_file
        self._descriptors: dict[str, int] = {}
        self._channel: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._by_systemd = bool(command) and daemon.stores_descriptors()
        self._stored = 0
        self.successor: list[str] = []
        """The command of a daemon that somebody wants to have instead of this one."""
        self.successor_named = trio.Event()
        self.is_over = False
        """Whether the mount is to end: then nobody goes on."""
        self.taken_over = inherited is not None and keeper.FUSE in inherited.descriptors
        self.is_held = self.taken_over
        """Whether somebody holds the mount, who starts the next daemon."""
        self.how = inherited.how if inherited is not None else ""
        """How the former daemon has ended."""
        if inherited is not None and self.taken_over:
            self._take(inherited.descriptors)

    @property
    def is_wanted(self) -> bool:
        """Whether the mount is to outlive this process."""
        return bool(self._command)

    def _take(self, descriptors: dict[str, int]) -> None:
        states = {
            int(name.removeprefix(keeper.STATE)): descriptor
            for name, descriptor in descriptors.items()
            if name.startswith(keeper.STATE)
        }
        for name in [name for name in descriptors if name.startswith(keeper.STATE)]:
            del descriptors[name]
        if keeper.SOCKET in descriptors:
            self._channel = socket.socket(fileno=descriptors.pop(keeper.SOCKET))
            self._channel.settimeout(_SEND_PATIENCE)
        self._descriptors = descriptors
        self.remembered.take_up(states)
        self._store_state()
        for number in states:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={keeper.STATE}{number}")

    # --- descriptors ------------------------------------------------------------------------------

    @property
    def kernel(self) -> int:
        """The descriptor of /dev/fuse that was taken over."""
        return self._descriptors[keeper.FUSE]

    def claim(self) -> mounts.Claim | None:
        """The directory that the mount covers, taken over."""
        descriptor = self._descriptors.get(keeper.CLAIM)
        return None if descriptor is None else mounts.Claim(descriptor, locked=True)

    def begin(self, kernel: int, claim: mounts.Claim | None) -> None:
        """It was mounted: these are to be kept. Raises OSError."""
        if not self.is_wanted:
            return
        self._descriptors[keeper.FUSE] = kernel
        if claim is not None:
            self._descriptors[keeper.CLAIM] = claim.descriptor
        self.remembered.begin()

    def lend(self) -> None:
        """Have the locks of what the kernel got from a former process be ours."""
        for inode in self.remembered.state.backings:
            if (kept := self.backing(inode)) is not None:
                status = os.fstat(kept[1])
                filelock.lent_before[status.st_dev, status.st_ino] = kept[1]

    def keep_backing(self, inode: int, number: int, descriptor: int) -> None:
        """The kernel reads and writes this file by itself, which it has by this number."""
        if self.remembered.descriptor >= 0:
            self._descriptors[f"{keeper.BACKING}{inode}"] = descriptor
            self._store(f"{keeper.BACKING}{inode}", descriptor)
            self.remembered.note("backings", inode, number)

    def forget_backing(self, inode: int) -> bool:
        """No longer; whether somebody else had it, who closes it now."""
        descriptor = self._descriptors.get(f"{keeper.BACKING}{inode}")
        for identity in [identity for identity, lent in filelock.lent_before.items() if lent == descriptor]:
            del filelock.lent_before[identity]
        self._remove(f"{keeper.BACKING}{inode}")
        self.remembered.note("backings", inode, None)
        return descriptor is not None

    def backing(self, inode: int) -> tuple[int, int] | None:
        """The number and the descriptor of what the kernel got of an inode."""
        number = self.remembered.state.backings.get(inode)
        descriptor = self._descriptors.get(f"{keeper.BACKING}{inode}")
        return None if number is None or descriptor is None else (number, descriptor)

    def _store_state(self) -> None:
        former, self._stored = self._stored, self.remembered.number
        self._store(f"{keeper.STATE}{self._stored}", self.remembered.descriptor)
        if former:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={keeper.STATE}{former}")

    def _store(self, name: str, descriptor: int) -> None:
        # Else systemd would let go of a mount that is gone, though what was written last is not committed yet.
        self._send(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", descriptor)

    def _remove(self, name: str) -> None:
        if self._descriptors.pop(name, None) is not None:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, text: str, *descriptors: int) -> None:
        if self._by_systemd:
            daemon.notify(text, *descriptors)
        elif self._channel is not None:
            with contextlib.suppress(OSError):
                socket.send_fds(self._channel, [text.encode()], descriptors)

    # --- the keeper -------------------------------------------------------------------------------

    async def run(self, ending: trio.Event) -> None:
        """Have a keeper, one after the other, until the mount is to end."""
        if not self.is_wanted:
            return
        if self._by_systemd:
            self._store_all()
            return
        pause = keeper.FIRST_WAIT
        while not ending.is_set():
            if self._channel is None and not self._start():
                return
            assert self._channel is not None
            self._send("READY=1")
            since = trio.current_time()
            await trio.lowlevel.wait_readable(self._channel)  # it sends nothing: it has ended
            self._channel.close()
            self._channel = None
            self.is_held = False
            if self._child is not None:
                await trio.to_thread.run_sync(self._child.wait)
            log.warning("the keeper of this mount was ended by somebody; another one is started")
            failed = trio.current_time() - since < keeper.SHORT
            pause = min(keeper.LONGEST_WAIT, 2 * pause) if failed else keeper.FIRST_WAIT
            await trio.sleep(pause if failed else 0)

    def _start(self) -> bool:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pidfd = os.pidfd_open(os.getpid())
            try:
                words = [str(theirs.fileno()), str(pidfd), str(os.getpid()), self._folder, self._log_file, "--"]
                self._child = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(keeper.__file__), *words, *self._command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), pidfd],
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                log.error("no keeper can be started, the mount ends with this process: %s", error)
                ours.close()
                return False
            finally:
                os.close(pidfd)
        self._channel = ours
        ours.settimeout(_SEND_PATIENCE)
        self._store_all()
        return True

    def _store_all(self) -> None:
        """The mount itself last: whoever has that has all."""
        self._stored = 0
        self._store_state()
        for name in sorted(self._descriptors, key=lambda name: name == keeper.FUSE):
            self._store(name, self._descriptors[name])
        self.is_held = True

    def name_successor(self, command: list[str]) -> None:
        """Have another daemon, which this command starts, go on. Raises OSError where nobody would start it, or one
        is about to already.
        """
        if not self._by_systemd and self._channel is None:
            raise OSError(errno.EOPNOTSUPP, "this mount is not kept")
        if self.successor_named.is_set():
            raise OSError(errno.EBUSY, "another daemon is about to go on")
        self.successor = command
        self.successor_named.set()

    def hand_over(self) -> NoReturn:
        """Have the successor go on; this process ends. Raises OSError where nobody would start it."""
        if self._by_systemd:  # for which it must be the same process
            daemon.note_signals()
            daemon.end_children(PROGRAM, STOP_TIMEOUT)  # they have locks
            logging.shutdown()
            passed = {**self._descriptors, f"{keeper.STATE}{self._stored}": self.remembered.descriptor}
            signal.pthread_sigmask(signal.SIG_BLOCK, keeper.ENDING)
            for number in daemon.noted:  # they came meanwhile
                signal.raise_signal(number)
            keeper.become(self.successor, passed, self._folder, _HANDED_OVER)
        if self._channel is None:
            raise OSError(errno.EPIPE, "its keeper has just ended")
        words = "".join(f"{word}\0" for word in self.successor).encode("utf-8", "surrogateescape")
        self._channel.send(b"COMMAND=" + words.hex().encode())
        logging.shutdown()
        os._exit(0)

    def end(self) -> None:
        """The mount has ended, or is about to: nobody is to take it over."""
        claim = self._descriptors.get(keeper.CLAIM)
        for name in sorted(self._descriptors, key=lambda name: name != keeper.FUSE):  # the mount itself first
            self._remove(name)
        self._send(f"FDSTOREREMOVE=1\nFDNAME={keeper.STATE}{self._stored}")
        if claim is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(claim, fcntl.LOCK_UN)  # the keeper may have it a moment longer


async def hand_over_when_asked(kept: Kept, filesystem: Filesystem, device: Device) -> None:
    """Once somebody wants another daemon (`fvdfs upgrade`), finish what is in hand, and let that one go on."""
    while True:
        await kept.successor_named.wait()
        log.info("another daemon is to go on: %s", shlex.join(kept.successor))
        with trio.move_on_after(COMMIT_PATIENCE):
            async with trio.open_nursery() as nursery:
                for entry in filesystem.folder.inodes.open():
                    nursery.start_soon(_commit, entry)
        if kept.is_over:
            return
        try:
            if not await device.finish(ANSWER_PATIENCE):
                raise OSError(errno.EBUSY, "some requests have no answer, and this kernel does not send them again")
            if not kept.is_over:
                kept.hand_over()
        except OSError as error:
            log.error("no other daemon can go on, so this one does: %s", error.strerror)
        kept.successor_named = trio.Event()
        device.go_on()


async def _commit(entry: Entry) -> None:
    """So that the next daemon has little to do; it does what is not done here."""
    try:
        if entry.image is not None:
            await entry.image.fsync()
    except OSError as error:
        log.error("%s: %s", printable(os.fsdecode(entry.path)), told(error))


# --- taking over ----------------------------------------------------------------------------------


async def adopt(filesystem: Filesystem, remembered: Remembered) -> None:
    """Open again what the kernel has handles of. What cannot be opened is logged, and stays lost."""
    state = remembered.state
    filesystem.go_on(state.takeovers)
    suspects = dict(state.adopting)
    left = [number for number, file in state.files.items() if not file.is_settled]
    async with trio.open_nursery() as nursery:
        for inode, disk in [*state.disks.items()]:
            if inode not in suspects:
                nursery.start_soon(_adopt, filesystem, remembered, inode, disk)
    for inode in suspects:  # one by one, to see whose fault it is
        if inode in state.disks:
            await _adopt(filesystem, remembered, inode, state.disks[inode])
    for number in left:
        await _settle(filesystem, remembered, number)


async def _settle(filesystem: Filesystem, remembered: Remembered, number: int) -> None:
    """Have what the former daemon has not committed of a file be in it; nobody had it open, or to read it only."""
    file = remembered.state.files.get(number)
    if file is None or any(
        entry.image is not None and entry.image.writable and identity_of(entry.status) == tuple(file.identity)
        for entry in filesystem.folder.inodes.open()
    ):
        return
    path, entry = file.path, None
    try:
        entry = await filesystem.folder.lookup(raw_name(os.path.basename(os.fsencode(path))))
        if entry is not None and not (entry.image is not None and entry.image.writable):
            await _patiently(functools.partial(filesystem.openings.open, entry.inode, write=True))
            await filesystem.openings.close(entry)
    except (OSError, FvdError) as error:
        log.error("%s: %s", printable(path), told(error))
    if (entry is None or entry.image is None) and number in remembered.state.files:
        log.error("%s: what was written last may be lost", printable(path))
        remembered.note("files", number, None)


async def _adopt(filesystem: Filesystem, remembered: Remembered, inode: int, disk: Disk) -> None:
    state, folder = remembered.state, filesystem.folder
    handles = {fh: opened for fh, opened in state.opened.items() if opened.inode == inode}
    times = state.adopting.get(inode, 0)
    try:
        if times >= TIMES:
            raise OSError(errno.EIO, f"{times} processes have ended while they tried")
        remembered.note("adopting", inode, times + 1)
        entry = await _find(folder, inode, disk)
        entry.blank = state.blank.get(inode, False)
        for fh, opened in handles.items():
            await _patiently(functools.partial(filesystem.openings.open, inode, write=opened.writes))
            filesystem.take_handle(fh, entry, opened)
        assert entry.image is not None or not handles
        if entry.image is not None:
            # A write past it that was not answered has grown the disk, or not; it comes again.
            if not isinstance(entry.passthrough, Passthrough):
                entry.image.end = min(entry.image.size, state.ends.get(inode, entry.image.size))
            if failed := state.failed.get(inode, ""):
                entry.image.committer.fail(failed)
    except Exception as error:  # a defect that shows in one disk is not to end all
        expected = isinstance(error, OSError | FvdError)
        reason = told(error) if isinstance(error, OSError | FvdError) else "an error"
        name = printable(os.fsdecode(path_of(disk)))
        log.error("%s: was open and cannot be opened again: %s", name, reason, exc_info=not expected)
        for fh in handles:
            filesystem.lose_handle(fh)
    if times < TIMES:
        remembered.note("adopting", inode, None)


async def _find(folder: Folder, inode: int, disk: Disk) -> Entry:
    """The entry of a disk that was open. Raises OSError, FvdError."""
    path = path_of(disk)
    seen = await trio.to_thread.run_sync(folder.look_again, path)
    if [seen.status.st_dev, seen.status.st_ino] not in disk.files:
        raise OSError("it was removed or replaced")
    return folder.inodes.adopt(inode, path, seen, shown=disk.shown)


async def _patiently(opening: Callable[[], Awaitable[object]]) -> None:
    """Open an image. Raises OSError, FvdError."""
    for _ in range(AGAIN):
        try:
            await opening()
            return
        except ImageBusy:
            await trio.sleep(PAUSE)
    await opening()
