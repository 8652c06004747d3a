"""The FUSE handlers: translate arguments, call the image, translate errors. No policy but `-o sync` and
`-o shrink`.

pyfuse3 runs each request in a task of its own; those for a disk's bytes do not reach it (`device.py`)."""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import json
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileHandleT, FileInfo, FileNameT, FlagT, FUSEError, InodeT, ModeT

from fvdfs import xattrs
from fvdfs.errors import NotPermittedHere, UsageError
from fvdfs.image.copy_range import copy_range
from fvdfs.image.image import Image
from fvdfs.image.map import image_map
from fvdfs.layers.resize import refuse_cut
from fvdfs.logs import recent
from fvdfs.ops import control, moves, snapshots, templates
from fvdfs.ops.answers import error_number
from fvdfs.ops.commits import RegularCommits
from fvdfs.ops.complaints import Complaints
from fvdfs.ops.hot import hot_blocks
from fvdfs.ops.inodes import ROOT_INODE, Attributes, Entry
from fvdfs.ops.kernel_limits import KernelLimits
from fvdfs.ops.merging import Merges
from fvdfs.ops.naming import Naming, Permitted
from fvdfs.ops.openings import Openings
from fvdfs.ops.passthrough import Passthrough
from fvdfs.ops.remembered import TIMES, Opened, Remembered
from fvdfs.ops.requests import DurableWrite, Fsync, InTask, Write, fallocate, seek
from fvdfs.store.base import Pending
from fvdfs.store.host import FALLOC_FL_KEEP_SIZE

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 1.0  # seconds for the kernel to say what it knows; it may have to ask us again
ATTRIBUTE_TIMEOUT = 3600.0  # seconds; the kernel itself drops what its own writes change
# What nobody can do in any mount, and the answer. pyfuse3's own is ENOSYS; it stays where the kernel takes that for
# "do not ask": poll, fsyncdir, access (it checks permissions itself), readlink (there are no links).
NEVER_DONE = {
    "mknod": errno.EPERM,
    "mkdir": errno.EPERM,
    "symlink": errno.EPERM,
    "link": errno.EPERM,
    "rmdir": errno.EPERM,
}


def handler(
    function: Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]]:
    """Give a handler the translation of errors."""

    @functools.wraps(function)
    async def wrapped(self: Filesystem, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await function(self, *args, **kwargs)
        except FUSEError:
            raise  # not from itself: such a circle keeps what was asked until the garbage is collected
        except Exception as error:
            raise self.fuse_error(error, function.__name__) from error

    return wrapped


class Sync(enum.Enum):
    """When a write is made durable, beside every few seconds and at closing."""

    NONE = "none"
    """Never: a flush is answered at once. For disks that may be lost."""
    FLUSH = "flush"
    """Before a flush is answered."""
    ALWAYS = "always"
    """Before each write is answered."""


class Handle(NamedTuple):
    """An opening of a disk."""

    entry: Entry
    writes: bool
    """Whether for writing."""
    through_cache: bool
    """Whether it writes through the kernel's cache."""
    durable: bool
    """Whether its writes are to survive a power cut (O_DSYNC). WRITE says so itself."""


class Filesystem(pyfuse3.Operations):
    """A folder of images as a folder of raw files."""

    enable_acl = True
    """The kernel judges by the ACL, which it asks for where there are permissions for a group: those are its mask."""

    def __init__(
        self,
        openings: Openings,
        *,
        writeback: bool,
        shrink: bool,
        sync: Sync = Sync.FLUSH,
        permitted: Permitted | None = None,
    ) -> None:
        super().__init__()
        self.openings = openings
        self.folder = openings.folder
        self._naming = Naming(self.folder, permitted or Permitted())
        self._merges = Merges(openings)
        self.enable_writeback_cache = writeback and sync is not Sync.ALWAYS
        self._sync = sync
        openings.opened = functools.partial(moves.follow, openings)
        openings.caches.begun = functools.partial(moves.follow_snapshot, openings)
        self._shrink = shrink
        self._images: dict[int, Image] = {}
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, list[Entry]] = {}
        self._last_listing: list[Entry] = []
        self._lost: set[int] = set()
        """Handles of disks that were open when another daemon ended, and could not be opened again."""
        self._unanswered: dict[int, int] = {}
        """By request: the handles that a former daemon has made, which the kernel need not have got."""
        self._next_handle = 1
        self._opening: set[int] = set()
        """Inodes of disks that are being opened."""
        self._suspects = trio.Lock()
        """Held while one is opened that a former daemon was opening when it ended."""
        self.commits = RegularCommits()
        self.mountpoint = b""
        """Where the kernel may be asked what it knows of a disk."""
        self.daemon = b"{}"
        """What the mount says of the process that serves it (`xattrs.DAEMON`)."""
        self.name_successor: Callable[[list[str]], None] = _nobody_goes_on
        """Has another daemon, which this command starts, go on (`kept.py`)."""
        self.complaints = Complaints()
        self.limits = KernelLimits()

    def fuse_error(self, error: BaseException, what: str) -> FUSEError:
        """The answer to a request that failed."""
        return error if isinstance(error, FUSEError) else FUSEError(error_number(error, what, self.complaints))

    # --- attributes -----------------------------------------------------------------------------

    def _file_attributes(self, inode: int, attributes: Attributes) -> EntryAttributes:
        status = attributes.status
        entry = EntryAttributes()
        entry.st_ino = InodeT(inode)
        entry.generation = 0
        entry.entry_timeout = 0
        entry.attr_timeout = 0 if attributes.passed_through else ATTRIBUTE_TIMEOUT
        entry.st_mode = ModeT(stat.S_IFREG | (status.st_mode & 0o777))
        entry.st_nlink = 1
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_rdev = 0
        entry.st_size = attributes.size
        entry.st_blksize = 4096
        entry.st_blocks = -(-attributes.usage // 512)
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = attributes.mtime_ns
        entry.st_ctime_ns = attributes.ctime_ns
        return entry

    async def _folder_attributes(self) -> EntryAttributes:
        status = await self.folder.host.folder_status()
        entry = EntryAttributes()
        entry.st_ino = InodeT(ROOT_INODE)
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        entry.st_mode = ModeT(status.st_mode)
        entry.st_nlink = 2
        entry.st_uid = status.st_uid
        entry.st_gid = status.st_gid
        entry.st_size = status.st_size
        entry.st_blksize = 4096
        entry.st_blocks = status.st_blocks
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        return entry

    @handler
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        if name == b".." or (name == b"." and parent_inode == ROOT_INODE):
            return await self._folder_attributes()
        await self._naming.until_settled(name)
        # "." is what the kernel asks for where it has a file handle, and no inode for it any more.
        entry = await (self.folder.find(parent_inode) if name == b"." else self.folder.lookup(name))
        if entry is None:
            raise FUSEError(errno.ENOENT)
        entry = self.folder.inodes.tell(entry)
        return self._file_attributes(entry.inode, entry.attributes)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self.folder.inodes.forget(inode, count)

    @handler
    async def getattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        if inode == ROOT_INODE:
            return await self._folder_attributes()
        return self._file_attributes(inode, await self.folder.host.of(self.folder.inodes[inode]))

    @handler
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        if inode == ROOT_INODE:
            raise FUSEError(errno.EPERM)
        entry = self.folder.inodes[inode]
        entry.look()  # before the time is set
        if fields.update_size:
            await self._truncate(inode, attr.st_size, by_descriptor=fh is not None)
        try:
            await self._set_file_attributes(entry, attr, fields)
        except FileNotFoundError:
            if entry.image is None:
                raise  # else: removed while open; nobody will look at it again
        return self._file_attributes(inode, await self.folder.host.of(entry, changed_by_us=True))

    async def _set_mode(self, entry: Entry, mode: int) -> None:
        await trio.to_thread.run_sync(os.chmod, entry.path, mode & 0o777, limiter=entry.limiter)

    async def _set_file_attributes(self, entry: Entry, attr: EntryAttributes, fields: pyfuse3.SetattrFields) -> None:
        path, in_thread = entry.path, functools.partial(trio.to_thread.run_sync, limiter=entry.limiter)
        if fields.update_mode:
            await self._set_mode(entry, attr.st_mode)
        if fields.update_uid or fields.update_gid:
            uid = attr.st_uid if fields.update_uid else -1
            gid = attr.st_gid if fields.update_gid else -1
            await in_thread(os.chown, path, uid, gid)
        if fields.update_atime or fields.update_mtime:
            status = await in_thread(os.stat, path)
            times = (
                attr.st_atime_ns if fields.update_atime else status.st_atime_ns,
                attr.st_mtime_ns if fields.update_mtime else status.st_mtime_ns,
            )
            await in_thread(functools.partial(os.utime, path, ns=times))
            if fields.update_mtime:
                if isinstance(entry.passthrough, Passthrough):
                    await in_thread(entry.passthrough.set_mtime, attr.st_mtime_ns)
                entry.mtime.set(attr.st_mtime_ns)
                entry.data_mtime_ns = 0

    async def _truncate(self, inode: int, size: int, *, by_descriptor: bool) -> None:
        entry, _ = await self.openings.open(inode, write=True)
        try:
            assert entry.image is not None
            before = entry.image.size
            await self._resize(entry, entry.image, size)
            entry.misjudged = False  # the answer tells the size
            if by_descriptor or entry.image.size != before:  # truncate(2) to the same size changes nothing
                self._was_written(entry)
        finally:
            await self.openings.close(entry)

    async def _resize(self, entry: Entry, image: Image, size: int) -> None:
        """Raises NotPermittedHere, OSError: EBUSY where others stand on a disk that is to be cut; as `Image.resize`."""
        if entry.is_held_up:
            await moves.activate(self.openings, entry)
        if size < image.size:
            if not self._shrink:
                raise NotPermittedHere("a disk cannot be cut, nor overwritten by cp, here: mount with -o shrink")
            if entry.merging:
                raise OSError(errno.EBUSY, f"{image.name}: what it stands on is being merged into it")
            try:
                await trio.to_thread.run_sync(refuse_cut, os.fsdecode(entry.path), limiter=entry.limiter)
            except UsageError as error:
                raise OSError(errno.EBUSY, str(error)) from error
        await image.resize(size, shrink=self._shrink)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        status = await self.folder.host.space()
        result = pyfuse3.StatvfsData()
        for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail"):
            setattr(result, name, getattr(status, name))
        result.f_namemax = status.f_namemax
        return result

    # --- extended attributes: what fvdfs knows of an image, and what may be asked of it ---------

    @handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        wanted = name.decode(errors="replace")
        if wanted == xattrs.DAEMON:
            return self.daemon
        if wanted in xattrs.ACLS:
            return await self.folder.host.acl(self.folder.path_of(inode), wanted)
        if inode == ROOT_INODE:
            if wanted == xattrs.PID:
                return str(os.getpid()).encode()
            if wanted == xattrs.STATUS:
                policy, folder = self.folder.policy, os.fsdecode(self.folder.path)
                found: dict[str, Any] = {
                    "folder": folder,
                    "allow_url": policy.allowed_urls,
                    "tls_creds": policy.tls_creds,
                }
                found["takeovers"] = self._remembered.state.takeovers
                found |= control.refused(self.folder.refused)
                return json.dumps(found | {"caches": self.openings.caches.status()}).encode()
            if wanted.startswith(xattrs.IMAGES) and (number := wanted.removeprefix(xattrs.IMAGES)).isdecimal():
                return control.page(self.folder.inodes.shown(), int(number[:9]))
            if wanted == xattrs.LOG:
                return recent.text()
            if wanted == xattrs.LAYERS:
                return json.dumps({"merges": self._merges.status()}).encode()
            raise _no_attribute(wanted)
        if wanted == xattrs.ROOM:
            await control.wait_for_room(self.folder.inodes[inode])
            return b""
        if wanted == xattrs.MAP:
            return await self._map(inode)
        if wanted == xattrs.HOT:
            return hot_blocks(self.folder.inodes[inode])
        if wanted == xattrs.STATUS:
            return json.dumps(control.status(self.folder.inodes[inode])).encode()
        if wanted.startswith(xattrs.OWN) and (number := wanted.removeprefix(xattrs.OWN)).isdecimal():
            at = int(number[:9]) * templates.PART
            return self.folder.inodes[inode].own[at : at + templates.PART]
        if wanted in xattrs.PARTS:
            part = control.status(self.folder.inodes[inode]).get(xattrs.PARTS[wanted], "")
            return str(part).encode(errors="surrogateescape")
        raise _no_attribute(wanted)

    async def _map(self, inode: int) -> bytes:
        entry, _ = await self.openings.open(inode, write=False, keep_copies=False)
        try:
            assert entry.image is not None
            entry.look()
            return json.dumps(await image_map(entry.image)).encode()
        finally:
            await self.openings.close(entry)

    @handler
    async def listxattr(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        names = [xattrs.PID, xattrs.STATUS] if inode == ROOT_INODE else [xattrs.STATUS, *xattrs.PARTS]
        hosts = await self.folder.host.names(self.folder.path_of(inode))
        return [name.encode() for name in [*names, *(name for name in xattrs.ACLS if name in hosts)]]

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        wanted = name.decode(errors="replace")
        if wanted in xattrs.ACLS:
            await self._change_acl(inode, lambda path: os.setxattr(path, wanted, value))
        elif inode == ROOT_INODE and wanted == xattrs.LAYERS:
            if ctx.uid not in (0, os.geteuid()):
                raise FUSEError(errno.EPERM)
            self._merges.control(os.fsdecode(value))
        elif inode == ROOT_INODE and wanted == xattrs.UPGRADE:
            if ctx.uid not in (0, os.geteuid()):
                raise FUSEError(errno.EPERM)
            if self._merges.is_busy:
                raise FUSEError(errno.EBUSY)
            self.name_successor(os.fsdecode(value).split("\0")[:-1])
        elif inode == ROOT_INODE or wanted not in xattrs.STEERED:
            raise FUSEError(errno.EOPNOTSUPP)
        else:
            entry, text = self.folder.inodes[inode], value.decode(errors="replace").strip()
            if wanted == xattrs.PREFETCH:
                await control.control_prefetch(self.openings, entry, text)
            elif wanted == xattrs.ROOM:
                await control.begin_room(self.openings, entry, text)
            elif ctx.uid not in (0, os.geteuid(), entry.status.st_uid):  # it is more than to write
                raise FUSEError(errno.EPERM)
            elif wanted == xattrs.SNAPSHOT:
                await snapshots.make_snapshot(self.openings, entry, text)
            else:
                await moves.take_step(self.openings, entry, text)

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        wanted = name.decode(errors="replace")
        if wanted not in xattrs.ACLS:
            raise FUSEError(errno.EOPNOTSUPP)
        await self._change_acl(inode, lambda path: os.removexattr(path, wanted))

    async def _change_acl(self, inode: int, change: Callable[[bytes], None]) -> None:
        """The kernel has made sure that it is the owner, or root, who asks."""
        if inode == ROOT_INODE:
            raise FUSEError(errno.EPERM)
        try:
            await trio.to_thread.run_sync(change, self.folder.path_of(inode))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # nothing that the log should know
                raise FUSEError(error.errno) from None
            raise

    # --- the folder -----------------------------------------------------------------------------

    @handler
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> FileHandleT:
        if inode != ROOT_INODE:
            raise FUSEError(errno.ENOTDIR)
        listing = await self.folder.scan()
        if listing == self._last_listing:
            listing = self._last_listing  # held once, however many have the folder open
        self._last_listing = listing
        handle = self._new_handle()
        self._listings[handle] = listing
        return FileHandleT(handle)

    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings.get(fh)
        if listing is None:  # of a former daemon
            listing = self._listings[fh] = await self.folder.scan()
        for number, listed in enumerate(listing[start_id:], start_id + 1):
            entry = self.folder.inodes.tell(listed)
            attributes = self._file_attributes(entry.inode, entry.attributes)
            if not pyfuse3.readdir_reply(token, FileNameT(entry.name), attributes, number):
                self.folder.inodes.forget(entry.inode, 1)
                break

    async def releasedir(self, fh: FileHandleT) -> None:
        self._listings.pop(fh, None)

    # --- the files ------------------------------------------------------------------------------

    def _new_handle(self) -> int:
        handle = self._next_handle
        self._next_handle += 1
        return handle

    @handler
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        entry = self.folder.inodes.tell(await self._naming.create(name, ctx.uid, ctx.gid, ctx.pid))
        try:
            info = await self._open(entry.inode, flags)
            await self._set_mode(entry, mode)  # not before: its maker may open it whatever it says
        except BaseException:
            self.folder.inodes.forget(entry.inode, 1)
            raise
        return info, self._file_attributes(entry.inode, await self.folder.host.of(entry, changed_by_us=True))

    @handler
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: pyfuse3.RequestContext) -> None:
        await self._naming.remove(name)

    @handler
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._naming.rename(name_old, name_new, flags)

    @handler
    async def open(self, inode: InodeT, flags: FlagT, ctx: pyfuse3.RequestContext) -> FileInfo:
        if self._remembered.state.takeovers and self.folder.inodes.get(inode) is None:
            await self.folder.find(inode)  # the kernel knows it from a former daemon
        if flags & os.O_ACCMODE != os.O_RDONLY:
            await self._naming.open_to_write(self.folder.inodes[inode], ctx.pid)
        return await self._open(inode, flags)

    async def _open(self, inode: InodeT, flags: FlagT) -> FileInfo:
        async with self._given_up_in_time(inode):
            return await self._open_now(inode, flags)

    @contextlib.asynccontextmanager
    async def _given_up_in_time(self, inode: int) -> AsyncIterator[None]:
        """What opens an image that has ended `TIMES` daemons so fails; the others go on. Raises OSError(EIO)."""
        times = self._remembered.state.adopting.get(inode, 0)
        if inode in self._opening:
            yield
            return
        if times >= TIMES:
            raise OSError(errno.EIO, f"{times} processes have ended while they opened it; mount anew to try it again")
        self._opening.add(inode)
        try:
            # One by one, to see whose fault it is.
            async with self._suspects if times else contextlib.nullcontext():
                self._remembered.note("adopting", inode, times + 1)
                yield
        finally:
            self._opening.discard(inode)
            self._remembered.note("adopting", inode, None)

    async def _open_now(self, inode: InodeT, flags: FlagT) -> FileInfo:
        write = flags & os.O_ACCMODE != os.O_RDONLY
        entry, keep_cache = await self.openings.open(inode, write=write)
        try:
            assert entry.image is not None
            if flags & os.O_TRUNC:
                await self._resize(entry, entry.image, 0)
                entry.misjudged = False
                self._was_written(entry)
        except BaseException:
            await self.openings.close(entry)
            raise
        handle = self._new_handle()
        uncached = entry.record.receiving or entry.to_forget
        through_cache = write and not flags & os.O_DIRECT and not uncached
        self._hand_out(handle, Handle(entry, write, through_cache, bool(flags & os.O_DSYNC)))
        self.limits.before_open(is_remote=entry.image.is_remote)
        return FileInfo(fh=FileHandleT(handle), keep_cache=keep_cache, direct_io=uncached)

    def _hand_out(self, fh: int, handle: Handle) -> None:
        assert handle.entry.image is not None
        handle.entry.cached_writers += handle.through_cache
        self._handles[fh] = handle
        self._images[fh] = handle.entry.image

    # What outlives this daemon (`kept.py`).

    @property
    def _remembered(self) -> Remembered:
        return self.folder.inodes.remembered

    def exchanged(self, request: bytes, answer: bytes, /) -> None:
        """INIT was exchanged: the next daemon goes by that."""
        self._remembered.set("request", request.hex())
        self._remembered.set("answer", answer.hex())

    def in_hand(self, unique: int, /) -> None:
        """No request before this one is in hand."""
        if self._remembered.state.oldest != unique:
            self._remembered.set("oldest", unique)

    def opened(self, fh: int, unique: int, /) -> None:
        """The kernel is about to get this handle, as the answer to the request of this number."""
        handle = self._handles.get(fh)
        if handle is None or self._remembered.descriptor < 0:
            return
        entry = handle.entry
        files = [entry.status, *entry.former]
        self._remembered.disk(entry.inode, entry.path, files, shown=self.folder.inodes.shows(entry))
        self._remembered.note("blank", entry.inode, True if entry.blank else None)
        if entry.image is not None:
            self._remembered.note("ends", entry.inode, entry.image.end)
        self._remembered.open(fh, Opened(entry.inode, handle.writes, handle.through_cache, handle.durable, unique))

    def creates(self, unique: int, name: bytes, *, again: bool) -> None:
        """A disk is to be made; `again`: perhaps a former daemon has made it, for the same request."""
        text = name.decode("latin-1")
        if again and self._remembered.state.creating.get(unique) == text:
            self._naming.may_be_made.add(name)
        self._remembered.note("creating", unique, text)

    def created(self, unique: int, /) -> None:
        """That request is about to be answered: the disk was made, or could not be."""
        self._remembered.note("creating", unique, None)

    def go_on(self, takeovers: int) -> None:
        """This daemon is one of several: its handles are others than those of the daemons before."""
        self._next_handle = (takeovers << 32) + 1

    def take_handle(self, fh: int, entry: Entry, opened: Opened) -> None:
        """The kernel has this handle of a disk, from a former daemon; it was opened once more for that."""
        self._hand_out(fh, Handle(entry, opened.writes, opened.through_cache, opened.durable))
        self._unanswered[opened.unique] = fh

    def lose_handle(self, fh: int) -> None:
        """The kernel has this handle of a disk that cannot be opened again."""
        self._lost.add(fh)

    def abandon(self, unique: int, /) -> None:
        """The handle that a former daemon has made for this request is nobody's."""
        fh = self._unanswered.pop(unique, None)
        spawn = self.openings.background.spawn
        if fh is not None and fh in self._handles and spawn is not None:
            spawn(functools.partial(self._give_up, fh))

    async def _give_up(self, fh: int) -> None:
        with contextlib.suppress(FUSEError):  # it is logged
            await self.release(FileHandleT(fh))

    # These take the short path (`device.py`).

    def begin_read(self, fh: int, offset: int, buffer: memoryview, /) -> int | Pending:
        """`Image.begin_read`."""
        self._handles[fh].entry.heat.touched(offset, len(buffer))
        return self._images[fh].begin_read(offset, buffer)

    def begin_write(self, fh: int, offset: int, data: memoryview, /, *, durable: bool) -> Pending:
        """`Image.write`; with `sync=always`, or where the writer asks for it, durable when it has ended."""
        entry = self._handles[fh].entry
        if entry.blank and data != bytes(len(data)):
            entry.blank = False
            self._remembered.note("blank", entry.inode, None)
        entry.heat.touched(offset, len(data))
        return self._change(fh, self._images[fh].begin_write(offset, data), offset + len(data), durable=durable)

    def _change(self, fh: int, pending: Pending, stop: int, *, durable: bool) -> Pending:
        """A change of a disk's bytes up to `stop`; `durable` as for `begin_write`."""
        entry = self._handles[fh].entry
        if entry.is_held_up:
            pending = InTask(functools.partial(self._when_active, entry, pending))
        durable = self._sync is Sync.ALWAYS or (durable and self._sync is Sync.FLUSH)
        write = DurableWrite if durable else Write
        return write(self._handles[fh].entry, pending, self._note_write, beyond=stop > self._images[fh].end)

    async def _when_active(self, entry: Entry, pending: Pending) -> int:
        """A change of a disk that is still its source's."""
        await moves.activate(self.openings, entry)
        return await pending.finish()

    def begin_fallocate(self, fh: int, mode: int, offset: int, length: int, /) -> Pending:
        """`requests.fallocate`, of the bytes from `offset` on."""
        handle = self._handles[fh]
        pending = InTask(functools.partial(fallocate, handle.entry, self._images[fh], mode, offset, length))
        stop = 0 if mode & FALLOC_FL_KEEP_SIZE else offset + length
        return self._change(fh, pending, stop, durable=handle.durable)

    def begin_copy(self, fh: int, offset: int, source_fh: int, source_offset: int, length: int, /) -> Pending:
        """`copy_range`."""
        handle, source = self._handles[fh], self._handles[source_fh]
        handle.entry.blank = False
        self._remembered.note("blank", handle.entry.inode, None)
        for entry in (handle.entry, source.entry):
            entry.look()
        copy = functools.partial(copy_range, self._images[source_fh], source_offset, self._images[fh])
        pending = InTask(functools.partial(copy, offset, length))
        return self._change(fh, pending, offset + length, durable=handle.durable)

    def begin_seek(self, fh: int, offset: int, whence: int, /) -> int | Pending:
        """`requests.seek`."""
        entry, image = self._handles[fh].entry, self._images[fh]
        size = functools.partial(self._kernels_size, entry) if self.enable_writeback_cache else None
        return seek(entry, image, offset, whence, size)

    async def _kernels_size(self, entry: Entry) -> int:
        """The size that the kernel has of a disk, which it need not have told yet; 0 where nobody can ask."""
        path, size = os.path.join(self.mountpoint, entry.name), 0
        with trio.move_on_after(_PATIENCE), contextlib.suppress(OSError):
            inode, found = await trio.to_thread.run_sync(_look, path, limiter=entry.limiter, abandon_on_cancel=True)
            size = found if inode == entry.inode else 0
        return size

    def _note_write(self, entry: Entry) -> None:
        if entry.image is not None:
            self.commits.note_write(entry.image)
        self._was_written(entry)

    def _was_written(self, entry: Entry) -> None:
        if entry.image is not None:
            self._remembered.note("ends", entry.inode, entry.image.end)
        entry.mtime.written(kernel_tells=self.enable_writeback_cache)

    def agreed(self, *, writeback: bool) -> None:
        """What the kernel does is known."""
        self.enable_writeback_cache = writeback

    def backing_of(self, fh: int, /) -> int:
        """What OPEN's answer says of the kernel's own way to the data (`passthrough.py`); 0: there is none."""
        opened = self._handles.get(fh)
        passthrough = opened.entry.passthrough if opened is not None else ""
        return passthrough.number if isinstance(passthrough, Passthrough) else 0

    def begin_fsync(self, fh: int, /) -> Pending | None:
        """`Image.fsync`; None with `sync=none`."""
        return None if self._sync is Sync.NONE else Fsync(self._handles[fh].entry, self._images[fh])

    def answered(self, fh: int, what: str, result: int, nanoseconds: int, /) -> None:
        """A request to an open file was answered."""
        if (handle := self._handles.get(fh)) is not None:
            handle.entry.counters.answered(what, result, nanoseconds)

    def error_number(self, error: Exception, fh: int, what: str, /) -> int:
        """`fuse_error`, of a request to an open file; EBADF where there is none of that handle."""
        image = self._images.get(FileHandleT(fh))
        if image is None and isinstance(error, KeyError):
            return errno.ESTALE if fh in self._lost else errno.EBADF
        number = self.fuse_error(error, f"{image.name}: {what}" if image is not None else what).errno
        if image is not None and number != errno.ENXIO:  # there is no more data, or hole
            self._handles[fh].entry.counters.failed(what)
            if image.committer.failed is not None:
                self._remembered.note("failed", self._handles[fh].entry.inode, image.committer.failed)
        return number

    def set_mtime(self, inode: int, mtime_ns: int, /) -> EntryAttributes | None:
        """Remember the mtime of an image that is open for writing, where the kernel keeps it; else None.

        The host's file system would commit its journal for each, and the file's time changes anyway, by the writes.
        """
        entry = self.folder.inodes.get(inode)
        if not self.enable_writeback_cache or entry is None or entry.image is None or not entry.image.writable:
            return None
        entry.mtime.set(mtime_ns)
        return self._file_attributes(inode, entry.attributes)

    @handler
    async def flush(self, fh: FileHandleT) -> None:
        if fh in self._lost:
            raise FUSEError(errno.ESTALE)
        entry, writes, *_ = self._handles[fh]
        entry.look()
        if entry.blank and entry.settling is None:
            entry.settling = trio.Event()
        if writes and entry.image is not None and self._sync is not Sync.NONE:
            await entry.image.fsync()
            await entry.mtime.store()

    @handler
    async def release(self, fh: FileHandleT) -> None:
        self._remembered.release(fh)
        if fh not in self._handles:  # a former daemon has given it up, or could not open it
            self._lost.discard(fh)
            return
        entry, _, through_cache, _ = self._handles.pop(fh)
        entry.cached_writers -= through_cache
        image = self._images.pop(fh)
        try:
            await self.openings.close(entry)
        finally:
            if entry.image is not image:
                self.commits.forget(image)
            if entry.blank or entry.settling is not None:
                await self._naming.settle(entry)


def _look(path: bytes) -> tuple[int, int]:
    """The inode and the size of a file of this mount. Blocks. Raises OSError.

    Another process asks: a thread of ours would wait for our own answer, which nobody gives any more if we are killed
    meanwhile; and until it has ended, no other daemon can go on (`keeper.py`).
    """
    done = subprocess.run(
        ["stat", "-c", "%i %s", "--", path], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    words = done.stdout.split()
    if done.returncode or len(words) != 2:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)
    return int(words[0]), int(words[1])


def _no_attribute(name: str) -> FUSEError:
    """Why this extended attribute cannot be read.

    libvirt keeps in `trusted.` whose a file was, and does without where it hears that there is no such thing.
    """
    return FUSEError(pyfuse3.ENOATTR if name.startswith("user.") else errno.EOPNOTSUPP)


def _refusal(code: int) -> Callable[..., Coroutine[Any, Any, None]]:
    async def refuse(*_: object) -> None:
        raise FUSEError(code)

    return refuse


for _name, _code in NEVER_DONE.items():
    setattr(Filesystem, _name, _refusal(_code))


def _nobody_goes_on(_command: list[str]) -> None:
    """The mount is not kept."""
    raise FUSEError(errno.EOPNOTSUPP)
