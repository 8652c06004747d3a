"""New files that take their names when they are whole, and the files that must not be overwritten.

Whatever a command makes is made here. A new file is written in its final folder, under a name that no mount
shows, and is renamed when all of it is on stable storage; until then what has that name is untouched. Where
the command fails, is interrupted or ended by a signal, only what was there is left; after a SIGKILL or a
power cut, perhaps also a file `.NAME.*.part`.

A device cannot be renamed. It is written in place, and who fills it sees to it that it is no image before it
is a whole one.

What has the name already is overwritten only where the user said so, and never while anybody has it open (it stays
locked until it is replaced; `in_use` finds users without locks), nor where the command reads it, be it by another
name, through a loop device, or as a part of a device. All calls block.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType, TracebackType

from fvdfs.commands.in_use import refuse_open, with_all_below
from fvdfs.daemon import complain, interrupting
from fvdfs.errors import UsageError
from fvdfs.image.migration import refuse_needed
from fvdfs.image.tree import Tree, identity_at
from fvdfs.store.base import Store
from fvdfs.store.host import DEVICE, HostFile, Identity, identity_of, open_host_file
from fvdfs.store.placing import acl, give_name, make_unnamed, remove_acl, sync_folder, take_permissions
from fvdfs.store.qemu_store import host_files

_ENDING = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGPIPE,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGXCPU,
)
"""Signals that end a process by default, or by a KeyboardInterrupt. (In an event loop that is trio's own affair.)"""
_NEW_FILE_MODE = 0o666  # what open(2) is asked for, before the umask
_libc = ctypes.CDLL(None, use_errno=True)


class NewFile:
    """A file, or device, that a command makes."""

    def __init__(self, path: str, final: str, place: str, store: HostFile, old: HostFile | None) -> None:
        self.path = path
        """As the user named it."""
        self.final = final
        """The same, behind all links."""
        self.place = place
        """Where it lies until it gets its name."""
        self.store = store
        """The new file, open for writing."""
        self.old = old
        """What is there now, locked; None: nothing."""
        self.is_device = store.fixed_size
        self.is_written = False
        """Whether it is closed already (`NewFiles.written`)."""

    def check_room(self, size: int) -> None:
        """Raise UsageError where it is a device of fewer bytes."""
        if self.is_device and (have := self.store.size_now()) < size:
            raise UsageError(f"{self.path}: the device has {have} bytes, {size} are needed")

    def let_go(self) -> None:
        """Close a device, so that somebody else can open it, who then has to sync it as well."""
        if self.is_device:
            self.store.close()

    def close(self) -> None:
        self.store.close()
        if self.old is not None:
            self.old.close()


class NewFiles:
    """The files that one command makes, which take their names together. A context manager.

    `force`: files that exist may be replaced; what replaces one gets its owner and permissions. `mode`: the most
    permissions that other new files get. With fewer than all, as for a copy (`permissions`), what the folder would
    give to its group, or by an access list, is not given either.
    """

    def __init__(self, *, force: bool, mode: int = _NEW_FILE_MODE) -> None:
        self.force = force
        self._is_copy = mode != _NEW_FILE_MODE
        self._mode = mode & ~_umask()
        self.files: list[NewFile] = []
        """In the order in which they were added."""
        self.have_names = False
        """Whether they are published."""
        self._sync = -1  # a descriptor of the file system whose files are made stable together
        self._read: dict[Identity, str] = {}
        self._below_read: dict[Identity, str] = {}
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | signal.Handlers] = {}
        self._undisturbed = False  # whether signals that end us have to wait
        self._noted: list[int] = []
        """The signals that came; the first is obeyed."""

    def __enter__(self) -> NewFiles:
        if threading.current_thread() is threading.main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                if handler is signal.SIG_DFL or handler is signal.default_int_handler:
                    self._handlers[number] = handler
                    signal.signal(number, self._end)
            interrupting.append(self._end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.discard()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._end in interrupting:
            interrupting.remove(self._end)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self._noted.append(number)
        if self._undisturbed:
            return
        for file in self.files:
            _remove(file)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    @contextlib.contextmanager
    def _in_one_go(self) -> Iterator[None]:
        """No signal ends us in the middle of this. (The handler runs in the main thread, this perhaps in another.)"""
        self._undisturbed = True
        try:
            yield
        finally:
            self._undisturbed = False
            if self._noted:
                signal.raise_signal(self._noted[0])

    @property
    def unnamed(self) -> tuple[tuple[str, str], ...]:
        """For `Policy.unnamed`: the path that each is to have, and where it lies now."""
        return tuple((file.path, file.place) for file in self.files)

    def protect(self, stores: Iterable[Store]) -> None:
        """These are read: neither they nor what they stand on may be written."""
        for store in stores:
            for file in host_files(store):
                self.protect_identity(file.identity, file.name)

    def protect_file(self, path: str) -> None:
        """The same for the file of this name, if there is one."""
        if identity := identity_at(path):
            self.protect_identity(identity, path)

    def protect_identity(self, identity: Identity, name: str) -> None:
        """The same for a file that is closed again; `name` is for messages."""
        self._read.setdefault(identity, name)
        for part in with_all_below(identity):
            self._below_read.setdefault(part, name)

    def add(self, path: str) -> NewFile:
        """A new, empty file that will be `path`; or the device of this name, as it is.

        Raises UsageError where that must not be, ImageBusy, OSError.
        """
        final = os.path.realpath(path)
        if not path or path.endswith("/"):
            raise UsageError(f"{path or repr(path)}: is not a name of a file")
        try:
            old = self._open_old(path, final)
            if old is not None and old.fixed_size:
                self.files.append(NewFile(path, final, path, old, None))
            else:
                with self._in_one_go():
                    self.files.append(self._make(path, final, old))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR):
                raise UsageError(f"{path}: {error.strerror}") from error
            raise OSError(error.errno, f"{path}: {error.strerror}") from error
        return self.files[-1]

    def look_at_images(self) -> None:
        """What images in its folder make of a file that is to be replaced: their base changes, which is said.

        Raises UsageError where it is the data file of another one.
        """
        replaced = [(file.old or file.store).identity for file in self.files]
        for file in self.files:
            if file.old is None:
                continue
            for image, part in Tree(os.path.dirname(file.final)).users(file.old.identity):
                if image.identity in replaced:
                    continue
                if part == "data file":
                    raise UsageError(f"{file.path}: is the data file of {image.path}; choose another name")
                complain(f"{file.path}: was the base of {image.path}, whose content changes with it")

    def _open_old(self, path: str, final: str) -> HostFile | None:
        """What is there, open and locked; None: nothing. Raises UsageError, ImageError, OSError."""
        try:
            handle = os.open(final, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
                raise UsageError(f"{path}: neither a regular file nor a block device")
            if not stat.S_ISBLK(status.st_mode) and not self.force:
                raise UsageError(f"{path} exists already; choose another name, or --force to overwrite it")
            self._refuse_what_is_read(path, identity_of(status))
            old = open_host_file(handle, path, writable=True)
        finally:
            os.close(handle)
        try:
            old.lock(exclusive=True)
            old.claim_device()
            refuse_open(path, old.identity)
            refuse_needed(old)
        except BaseException:
            old.close()
            raise
        return old

    def _refuse_what_is_read(self, path: str, identity: Identity) -> None:
        """Raise UsageError where the file is read, or made already."""
        for file in self.files:
            if identity == (file.store if file.old is None else file.old).identity:
                raise UsageError(f"{path} and {file.path} must be different files")
        # Two parts of one device are two devices, but two loop devices over one file are one file.
        shared = [part for part in with_all_below(identity)[1:] if part in self._read or part[0] != DEVICE]
        for part in (identity, *shared):
            if name := self._below_read.get(part):
                what = "what" if name == path else f"{name}, which"
                raise UsageError(f"{path}: this would overwrite {what} is read; choose another name")

    def _make(self, path: str, final: str, old: HostFile | None) -> NewFile:
        try:
            descriptor, place = make_unnamed(final)
            try:
                return NewFile(path, final, place, HostFile(descriptor, path, writable=True), old)
            except BaseException:
                os.close(descriptor)
                os.unlink(place)
                raise
        except BaseException:
            if old is not None:
                old.close()
            raise

    def written(self, file: NewFile) -> None:
        """Close a file that nothing more is written to: of many, not all need be open at once.

        `publish` makes all of them stable by one call, in which a local file system is much faster than file by
        file. So they must lie on one. Raises OSError.
        """
        _set_permissions(file, self._mode, is_copy=self._is_copy)
        descriptor = file.store.fileno()
        if file.store.may_hang:
            os.fsync(descriptor)
        elif self._sync < 0:
            self._sync = os.dup(descriptor)
        file.is_written = True
        file.store.close()

    def _make_stable(self, files: Iterable[NewFile]) -> None:
        for file in files:
            if not file.is_written:
                _set_permissions(file, self._mode, is_copy=self._is_copy)
                os.fsync(file.store.fileno())
        # A descriptor from before a failed write is told of the failure.
        if self._sync >= 0 and _libc.syncfs(self._sync):
            code = ctypes.get_errno()
            raise OSError(code, f"{os.path.dirname(self.files[0].final)}: {os.strerror(code)}")

    def publish(self) -> None:
        """Make them stable, and give them their names, the last of them last.

        Raises UsageError where somebody else has taken a name meanwhile, ImageBusy where somebody has opened what is to
        be replaced, OSError; what was there then has its name again, and what is new is still to be discarded.
        """
        new = [file for file in self.files if not file.is_device]
        self._make_stable(new)
        for file in new:
            if file.old is not None and identity_at(file.final) != file.old.identity:
                raise UsageError(f"{file.path}: was replaced by somebody else meanwhile")
            if file.old is not None:
                refuse_open(file.path, file.old.identity)
        # Of several, half of the old and half of the new would be neither: the old ones go first.
        aside = [file for file in new if file.old is not None] if len(new) > 1 else []
        with self._in_one_go():
            _rename_all(new, aside)
            self.have_names = True
            for file in new:
                self.files.remove(file)
                file.close()
            for file in aside:
                os.unlink(_aside(file))
        for folder in sorted({os.path.dirname(file.final) for file in new}):
            sync_folder(folder)

    def discard(self) -> None:
        """Remove the files that have no name yet."""
        for file in self.files:
            _remove(file)
            file.close()
        self.files.clear()
        if self._sync >= 0:
            sync, self._sync = self._sync, -1
            os.close(sync)


def permissions(files: Iterable[HostFile]) -> int:
    """The most permissions of a copy of what these hold: whoever may not read them may not read the copy."""
    mode = _NEW_FILE_MODE
    for file in files:
        status = os.fstat(file.fileno())
        bits = status.st_mode & _NEW_FILE_MODE
        if status.st_gid != os.getegid() or acl(file.fileno()):  # its group's rights are not for ours
            bits = bits & 0o606 | (bits & 0o006) << 3
        mode &= bits | 0o600
    return mode


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _set_permissions(file: NewFile, mode: int, *, is_copy: bool) -> None:
    """Give a new file the permissions of what it replaces, or those of a new file."""
    descriptor = file.store.fileno()
    new = os.fstat(descriptor)
    if file.old is None:
        if is_copy:
            remove_acl(descriptor)
            if new.st_gid != os.getegid():  # the folder's group
                mode = mode & 0o606 | (mode & 0o006) << 3
        os.fchmod(descriptor, mode)
        return
    try:
        take_permissions(descriptor, file.old.fileno())
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # Owner or group stay ours, or the list is lost: no more than everybody had.
        mode = stat.S_IMODE(os.fstat(file.old.fileno()).st_mode)
        os.fchmod(descriptor, mode & 0o606 & ~_umask() | 0o600)


def _aside(file: NewFile) -> str:
    """Where what the file replaces lies for a moment."""
    return f"{file.place}.old"


def _rename_all(files: Sequence[NewFile], aside: Sequence[NewFile]) -> None:
    """Move what these replace `aside`, then give all their names; where that fails, undo it."""
    with contextlib.ExitStack() as undo:
        for file in reversed(aside):
            os.rename(file.final, _aside(file))
            undo.callback(_if_possible, os.rename, _aside(file), file.final)
        for file in files:
            _rename(file, replace=file.old is not None and file not in aside)
            if file.old is None or file in aside:
                undo.callback(_if_possible, os.unlink, file.final)
        undo.pop_all()


def _if_possible(call: Callable[..., None], *paths: str) -> None:
    with contextlib.suppress(OSError):
        call(*paths)


def _rename(file: NewFile, *, replace: bool) -> None:
    try:
        give_name(file.place, file.final, replace=replace)
    except FileExistsError:
        raise UsageError(f"{file.path} exists already; somebody else has made it meanwhile") from None
    except OSError as error:
        raise OSError(error.errno, f"{file.path}: {error.strerror}") from error


def _remove(file: NewFile) -> None:
    if not file.is_device:
        with contextlib.suppress(OSError):
            os.unlink(file.place)
