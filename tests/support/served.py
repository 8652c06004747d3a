"""The requests of a kernel to an image that is open through the handlers, without a mount."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest

from fvdfs.format.creation import CreateOptions
from fvdfs.image.policy import Policy
from fvdfs.ops.background import Background
from fvdfs.ops.device import Device
from fvdfs.ops.filesystem import Filesystem, Sync
from fvdfs.ops.folder import Folder
from fvdfs.ops.inodes import ROOT_INODE, Entry
from fvdfs.ops.openings import Openings
from fvdfs.store.uring import use_ring
from support.builder import KIB, create
from support.kernel import Kernel, Libfuse, run_device

SIZE = 4096 * KIB
BASE = random.Random(1).randbytes(SIZE // 2)
ROOT: Any = ROOT_INODE
CTX: Any = SimpleNamespace(uid=os.geteuid(), gid=os.getegid(), pid=os.getpid())
"""Who asks."""
Work = Callable[[Kernel, int], Awaitable[None]]


class Served:
    """An image, half of it over a base, open through the handlers; and who asks for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "base.raw").write_bytes(BASE)
        create(folder / "a.fvd", SIZE, CreateOptions(base_img="base.raw", block_size=4096), base_length=len(BASE))
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.device: Device
        self.libfuse: Libfuse
        self.inode = 0
        self.entry: Entry
        self.filesystem: Filesystem

    def run(self, work: Work, *, sync: Sync = Sync.FLUSH, ring: bool = False, flags: int = os.O_RDWR) -> None:
        """Have `work` ask; it gets the handle of the image, which is opened with these flags."""
        openings = Openings(Folder(str(self.folder), Policy(roots=(str(self.folder),))), Background())
        self.filesystem = filesystem = Filesystem(openings, writeback=True, shrink=False, sync=sync)

        async def with_image(kernel: Kernel, device: Device, libfuse: Libfuse) -> None:
            self.device, self.libfuse = device, libfuse
            attributes = await filesystem.lookup(ROOT, pyfuse3.FileNameT(b"a.raw"), CTX)
            self.inode = attributes.st_ino
            info = await filesystem.open(attributes.st_ino, pyfuse3.FlagT(flags), CTX)
            self.entry = openings.folder.inodes[self.inode]
            await work(kernel, info.fh)
            await filesystem.release(info.fh)

        async def with_ring(kernel: Kernel, device: Device, libfuse: Libfuse) -> None:
            async with use_ring():
                await with_image(kernel, device, libfuse)

        run_device(filesystem, with_ring if ring else with_image, self.monkeypatch)


def failing(code: int) -> Callable[..., Awaitable[Any]]:
    async def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail
