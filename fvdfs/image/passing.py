"""The kernel as a user of an image's data: it reads and writes the data file by itself (passthrough).

It tells nobody of its writes. So while it may write

- every commit flushes the data (`Committer.unseen_writes`);
- the header says that the image is not closed, and a disk of such an image is as long as its data file
  (`Header.length_counts`): a write past the end makes the one longer, and so the other, also after a crash;
- the disk's size is looked up in the file wherever it is asked for, and the header gets it at closing.

The file ends where the last write past the end did, perhaps inside a sector: an append continues there. Only when the
disk is cut, grown or closed does the file get whole sectors.

For flat images without metadata, whose data begins its file (`ops/passthrough.py` decides).
"""

from __future__ import annotations

from fvdfs.alloc.flat import FlatStorage
from fvdfs.format.header import SECTOR, round_up
from fvdfs.image.core import Core
from fvdfs.store.host import HostFile


async def let_write(core: Core) -> None:
    """The kernel may write from now on. Raises OSError."""
    if not core.committer.unseen_writes:
        if not _goes_on(core):
            await core.storage.prepare(0, core.size)
        await core.committer.begin_unseen_writes()


def _goes_on(core: Core) -> bool:
    """Whether the kernel has the data since a former process, and may be writing to it."""
    return isinstance(core.data, HostFile) and core.data.file_lock.was_lent


def follow_length(core: Core, length: int) -> None:
    """The data file has `length` bytes now. Not while the size is being changed."""
    if not core.committer.unseen_writes or core.committer.failed is not None:
        return
    assert isinstance(core.storage, FlatStorage)
    size = round_up(length, SECTOR)
    if size < core.size:
        core.committer.fail(f"{core.data.name} has {length} bytes instead of {core.size}: it was cut")
    elif length > core.end or not core.storage.is_whole:
        core.storage.has_grown(length, size)
        core.size, core.end = size, length


async def reach(core: Core, end: int) -> None:
    """Have the data file reach this far, as a write by the kernel does, which keeps others off. Raises OSError."""
    await core.data.resize(end)
    follow_length(core, end)


async def look_at_length(core: Core) -> None:
    """The size is going to be changed, and nobody writes past the end meanwhile: the kernel sees to it."""
    if core.committer.unseen_writes:
        follow_length(core, await core.data.size())


async def settle(core: Core) -> None:
    """Have the header tell the disk's size, before it says that the image is closed. Raises OSError."""
    if core.header.length_counts:
        await make_whole(core)
        await core.committer.commit()  # the length of the data, before the header that names it
        await core.committer.change_header(virtual_disk_size=core.size)


async def recover_length(core: Core) -> None:
    """The image was not closed, and is going to be written. Raises OSError."""
    if core.header.length_counts and not _goes_on(core):
        await settle(core)
        await core.committer.close()


async def make_whole(core: Core) -> None:
    """Have the data file end with a whole sector. Raises OSError."""
    if core.committer.unseen_writes or core.header.length_counts:
        await core.storage.prepare(0, core.size)
