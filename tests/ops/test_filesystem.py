"""The handlers without a mount: called as pyfuse3 calls them, over images in a folder."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
from pyfuse3 import EntryAttributes, FileHandleT, FUSEError

from fvdfs import xattrs
from fvdfs.errors import FormatError, FvdError, ImageBusy, NotPermitted, ReadOnlyImage, Refused
from fvdfs.format.creation import CreateOptions
from fvdfs.image.policy import Policy
from fvdfs.ops.background import Background
from fvdfs.ops.complaints import LINES
from fvdfs.ops.filesystem import NEVER_DONE, Filesystem, Sync
from fvdfs.ops.folder import Folder
from fvdfs.ops.inodes import ROOT_INODE
from fvdfs.ops.openings import Openings
from support.builder import KIB, create
from support.served import CTX

SIZE = 64 * KIB
ROOT: Any = ROOT_INODE


def new_filesystem(
    folder: Path, *, writable: bool = True, writeback: bool = True, shrink: bool = False, sync: Sync = Sync.FLUSH
) -> Filesystem:
    """Of a folder; it may lack images."""
    openings = Openings(Folder(str(folder), Policy(writable=writable, roots=(str(folder),))), Background())
    return Filesystem(openings, writeback=writeback, shrink=shrink, sync=sync)


@pytest.fixture
def images(folder: Path) -> Path:
    """A folder with one image, `a.fvd`, and what is none."""
    create(folder / "a.fvd", SIZE, CreateOptions(compact=True, chunk_size=4096, grow_unit=4096))
    (folder / "b.fvd").write_bytes(b"no image")
    return folder


@pytest.fixture
def filesystem(images: Path) -> Filesystem:
    return new_filesystem(images)


async def looked_up(filesystem: Filesystem, name: bytes = b"a.raw") -> EntryAttributes:
    return await filesystem.lookup(ROOT, pyfuse3.FileNameT(name), CTX)


@asynccontextmanager
async def opened(filesystem: Filesystem, flags: int = os.O_RDWR) -> AsyncIterator[FileHandleT]:
    """The image of the folder."""
    attributes = await looked_up(filesystem)
    info = await filesystem.open(attributes.st_ino, pyfuse3.FlagT(flags), CTX)
    try:
        yield info.fh
    finally:
        await filesystem.release(info.fh)


async def answer(call: Any) -> int:
    """The error that a request is answered with."""
    with pytest.raises(FUSEError) as caught:
        await call
    return caught.value.errno


def attributes_to_set(**values: int) -> tuple[EntryAttributes, Any]:
    """What SETATTR brings: the attributes, and which of them count."""
    attributes = EntryAttributes()
    for name, value in values.items():
        setattr(attributes, name, value)
    updates = {f"update_{name}": False for name in ("size", "mode", "uid", "gid", "atime", "mtime", "ctime")}
    updates |= {f"update_{name.removeprefix('st_').removesuffix('_ns')}": True for name in values}
    return attributes, SimpleNamespace(**updates)


# --- what there is ----------------------------------------------------------------------------------


async def test_an_image_is_a_raw_file(filesystem: Filesystem) -> None:
    attributes = await looked_up(filesystem)
    assert attributes.st_size == SIZE
    assert stat.S_ISREG(attributes.st_mode)
    assert attributes.st_nlink == 1
    assert (await filesystem.getattr(attributes.st_ino, CTX)).st_ino == attributes.st_ino != ROOT
    for name in (b".", b".."):
        assert (await looked_up(filesystem, name)).st_ino == ROOT
    assert stat.S_ISDIR((await filesystem.getattr(ROOT, CTX)).st_mode)


@pytest.mark.parametrize(
    ("name", "code"),
    [(b"b.raw", errno.ENOENT), (b"a.fvd", errno.ENOENT), (b"c.raw", errno.ENOENT), (b"n" * 256, errno.ENAMETOOLONG)],
)
async def test_what_is_not_there(filesystem: Filesystem, name: bytes, code: int) -> None:
    assert await answer(looked_up(filesystem, name)) == code


async def test_a_listing_goes_on_where_it_ended(
    images: Path, filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("c", "d"):
        create(images / f"{name}.fvd", SIZE, CreateOptions())
    replies: list[tuple[bytes, int]] = []

    def reply(token: object, name: bytes, attributes: EntryAttributes, next_id: int) -> bool:
        if len(replies) == 2:
            return False  # the kernel's buffer is full
        replies.append((name, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = await filesystem.opendir(ROOT, CTX)
    await filesystem.readdir(handle, 0, CTX)
    assert replies == [(b"a.raw", 1), (b"c.raw", 2)]
    replies.clear()
    await filesystem.readdir(handle, 2, CTX)
    assert replies == [(b"d.raw", 3)]
    await filesystem.releasedir(handle)
    inode = (await looked_up(filesystem)).st_ino
    assert await answer(filesystem.opendir(inode, CTX)) == errno.ENOTDIR


@pytest.mark.parametrize("call", NEVER_DONE)
async def test_what_nobody_can_do(filesystem: Filesystem, call: str) -> None:
    assert await answer(getattr(filesystem, call)(ROOT, b"a.raw", CTX)) == NEVER_DONE[call]


async def test_attributes_tell_what_is_known_of_an_image(filesystem: Filesystem) -> None:
    inode = (await looked_up(filesystem)).st_ino
    names = [name.decode() for name in await filesystem.listxattr(inode, CTX)]
    assert names[:1] == [xattrs.STATUS]
    for name in names:
        assert isinstance(await filesystem.getxattr(inode, name.encode(), CTX), bytes)
    assert json.loads(await filesystem.getxattr(inode, xattrs.STATUS.encode(), CTX))["state"] == "closed"
    assert json.loads(await filesystem.getxattr(inode, xattrs.MAP.encode(), CTX))
    assert await filesystem.getxattr(ROOT, xattrs.PID.encode(), CTX) == str(os.getpid()).encode()
    for of in (ROOT, inode):
        assert await answer(filesystem.getxattr(of, b"user.other", CTX)) == pyfuse3.ENOATTR
        assert await answer(filesystem.getxattr(of, b"trusted.other", CTX)) == errno.EOPNOTSUPP
        assert await answer(filesystem.setxattr(of, b"user.other", b"", CTX)) == errno.EOPNOTSUPP
        assert await answer(filesystem.removexattr(of, b"user.other", CTX)) == errno.EOPNOTSUPP
    assert await answer(filesystem.setxattr(inode, xattrs.PREFETCH.encode(), b"faster", CTX)) == errno.EINVAL


# --- opening, and changes ---------------------------------------------------------------------------


async def test_a_mount_that_only_reads_opens_nothing_for_writing(images: Path) -> None:
    filesystem = new_filesystem(images, writable=False)
    inode = (await looked_up(filesystem)).st_ino
    assert await answer(filesystem.open(inode, pyfuse3.FlagT(os.O_WRONLY), CTX)) == errno.EROFS
    async with opened(filesystem, os.O_RDONLY):
        pass
    assert filesystem.openings.unclosed() == []


async def test_an_image_is_closed_with_its_last_handle(filesystem: Filesystem) -> None:
    async with opened(filesystem) as first:
        async with opened(filesystem, os.O_RDONLY) as second:
            assert first != second
            assert len(filesystem.openings.unclosed()) == 1
        assert len(filesystem.openings.unclosed()) == 1
        await filesystem.flush(first)
    assert filesystem.openings.unclosed() == []


@pytest.mark.parametrize("shrink", [True, False])
async def test_a_disk_shrinks_only_where_the_mount_allows_it(images: Path, shrink: bool) -> None:
    filesystem = new_filesystem(images, shrink=shrink)
    inode = (await looked_up(filesystem)).st_ino

    async def truncate(size: int) -> int:
        return (await filesystem.setattr(inode, *attributes_to_set(st_size=size), None, CTX)).st_size

    assert await truncate(SIZE + 1) == SIZE + 512
    if shrink:
        assert await truncate(1000) == 1024
        async with opened(filesystem, os.O_RDWR | os.O_TRUNC):
            assert (await filesystem.getattr(inode, CTX)).st_size == 0
    else:
        assert await answer(truncate(1000)) == errno.EPERM
        assert await answer(filesystem.open(inode, pyfuse3.FlagT(os.O_RDWR | os.O_TRUNC), CTX)) == errno.EPERM
    assert filesystem.openings.unclosed() == []


async def test_a_change_of_attributes_is_one_of_the_image(images: Path, filesystem: Filesystem) -> None:
    inode = (await looked_up(filesystem)).st_ino
    changed = await filesystem.setattr(
        inode, *attributes_to_set(st_mode=stat.S_IFREG | 0o4640, st_mtime_ns=12345), None, CTX
    )
    assert changed.st_mode == stat.S_IFREG | 0o640, "no set-uid bit shows"
    assert changed.st_mtime_ns == 12345 == (images / "a.fvd").stat().st_mtime_ns
    assert await answer(filesystem.setattr(ROOT, *attributes_to_set(st_mode=0o700), None, CTX)) == errno.EPERM


@pytest.mark.parametrize("writeback", [True, False])
async def test_the_time_of_change_is_only_remembered_while_the_image_is_written(images: Path, writeback: bool) -> None:
    filesystem = new_filesystem(images, writeback=writeback)
    inode = (await looked_up(filesystem)).st_ino
    assert filesystem.set_mtime(inode, 5) is None, "closed"
    async with opened(filesystem, os.O_RDONLY):
        assert filesystem.set_mtime(inode, 5) is None
    async with opened(filesystem):
        remembered = filesystem.set_mtime(inode, 5)
        assert (remembered is not None and remembered.st_mtime_ns == 5) is writeback
    assert ((images / "a.fvd").stat().st_mtime_ns == 5) is writeback


async def test_an_image_that_was_resized_elsewhere_is_stale(images: Path, filesystem: Filesystem) -> None:
    inode = (await looked_up(filesystem)).st_ino
    create(images / "other", SIZE // 2, CreateOptions())
    os.replace(images / "other", images / "a.fvd")
    assert await answer(filesystem.open(inode, pyfuse3.FlagT(os.O_RDONLY), CTX)) == errno.ESTALE
    assert (await looked_up(filesystem)).st_size == SIZE // 2


# --- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FUSEError(errno.EXDEV), errno.EXDEV, ""),
        (OSError(errno.ENOENT, "gone"), errno.ENOENT, ""),
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC, "getattr: full"),
        (ImageBusy("a", "is in use"), errno.EBUSY, "a: is in use"),
        (ReadOnlyImage("a", "failed"), errno.EROFS, "a: failed"),
        (NotPermitted("a", "no", errno.EACCES), errno.EACCES, "a: no"),
        (Refused("a", "leads out"), errno.EACCES, "a: leads out"),
        (FormatError("a", "is damaged"), errno.EIO, "a: is damaged"),
        (FvdError("odd"), errno.EIO, "odd"),
        (OSError("without a number"), errno.EIO, "getattr: unforeseen error"),
        (ZeroDivisionError("division"), errno.EIO, "getattr: unforeseen error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
async def test_errors_are_translated(
    filesystem: Filesystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    code: int,
    line: str,
) -> None:
    inode = (await looked_up(filesystem)).st_ino
    caplog.clear()

    def fails(_: object) -> Callable[[], None]:
        raise error

    monkeypatch.setattr(filesystem.folder.host, "of", fails)
    assert await answer(filesystem.getattr(inode, CTX)) == code
    assert [record.getMessage() for record in caplog.records] == ([line] if line else [])
    assert [bool(record.exc_info) for record in caplog.records] == ([line.endswith("unforeseen error")] if line else [])


async def test_an_error_that_comes_again_and_again_is_a_few_lines(
    filesystem: Filesystem, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3 * LINES):
        filesystem.fuse_error(OSError(errno.EIO, f"at {number}"), "read")
    assert len(caplog.records) == LINES
