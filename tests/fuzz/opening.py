"""Fuzz target that opens whole images: metadata of any kind, then reads, writes, a flush, and the end.

The image is built in memory from a template whose header, bitmap, table and journal are spoiled. Where
it opens, what it reads must be what the reference reader reads; where it can be written, it must read
as written, and so it must after it is opened again, whether it was closed or its process was killed
right after a flush.

The stores are as strict as files of the host: offsets have 63 bits, a file may be longer than its data,
and nobody asks for more bytes at a time than the file or the request has.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import trio

from fuzz.layouts import HEADERS, RAW_HEADERS, patch
from fuzz.parsers import check_header, some_entry, some_records
from fuzz.source import Source
from fvdfs.cow.planner import Zeroes
from fvdfs.errors import FvdError
from fvdfs.format.header import Header, with_fields
from fvdfs.image.image import Image
from fvdfs.store.base import Buffer
from fvdfs.store.host import MAX_FILE_SIZE
from support import reference
from support.builder import load
from support.fakes import MemoryStore

IMAGE = "disk.fvd"
MAX_DATA = 1 << 20  # what a file takes at most; there is no space for more
MAX_REQUEST = 64 << 10
WHOLE = 256 << 10  # disks up to this size are read from begin to end

_BASE = (bytes(range(256)) + bytes(512) + b"base" * 64) * 200
_BELOW = with_fields(HEADERS[1], base_img="raw", base_img_fmt="raw", base_img_size=30 * 512)


class StrictStore(MemoryStore):
    """A file of the host, as far as what it permits: sparse, of bounded space."""

    def __init__(self, data: Buffer, name: str, limit: int = 0) -> None:
        super().__init__(data, name)
        self.length = len(self.data)
        self.largest = max(self.length, MAX_REQUEST, limit)

    def _check(self, offset: int, length: int) -> None:
        assert length <= self.largest, f"{length} bytes were asked for at once"
        assert offset >= 0

    def _read(self, buffer: memoryview, offset: int) -> int:
        super()._read(buffer, offset)
        return max(0, min(len(buffer), self.length - offset))

    def pread_nowait(self, buffer: memoryview, offset: int) -> bool:
        self._check(offset, len(buffer))
        if self.slow or offset + len(buffer) > self.length:
            return False
        self._read(buffer, offset)
        return True

    async def pread(self, buffer: memoryview, offset: int) -> int:
        self._check(offset, len(buffer))
        return await super().pread(buffer, offset)

    def _write(self, data: Buffer, offset: int) -> None:
        self._check(offset, len(data))
        assert offset <= MAX_FILE_SIZE
        if self.fixed_size and offset + len(data) > self.length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if offset + len(data) > MAX_DATA:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        super()._write(data, offset)
        self.length = max(self.length, offset + len(data))

    def _resize(self, size: int) -> None:
        assert size >= 0
        if size > MAX_FILE_SIZE:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if self.fixed_size:
            if size > self.length:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        del self.data[size:]
        self.length = size

    async def zero(self, offset: int, length: int, *, writes: bool = True) -> None:
        await self._wait("pwrite")
        stop = min(offset + length, len(self.data))
        if offset < stop:
            self.data[offset:stop] = bytes(stop - offset)

    async def size(self) -> int:
        await self._wait("size")
        return self.length

    def content(self) -> bytes:
        """All its bytes, if that are not too many; else those that were written."""
        return bytes(self.data.ljust(min(self.length, MAX_DATA), b"\0"))


class HeldPath:
    """A path for the reference reader, in a folder of stores."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        self._files = files
        self._name = name

    @property
    def parent(self) -> HeldPath:
        return self

    def __truediv__(self, name: str) -> HeldPath:
        return HeldPath(self._files, name)

    def resolve(self, *, strict: bool) -> HeldPath:
        return self

    def open(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._files[self._name])


class Folder(dict[str, StrictStore]):
    """Stores by the names of their files; whatever the image calls its base and its data, it is there."""

    def __init__(self, header: Header, files: dict[str, bytes]) -> None:
        base = "below" if header.base_img_fmt == "fvd" else "raw"
        names = {IMAGE: IMAGE, "raw": "raw", header.base_img: base}
        if header.data_file not in names:
            names[header.data_file] = "data"
        self.files = {name: files[which] for name, which in names.items() if name}
        largest = max(len(data) for data in self.files.values())
        super().__init__({name: StrictStore(data, name, largest) for name, data in self.files.items()})

    def again(self) -> Folder:
        """The same files as they are now, opened anew."""
        other = Folder.__new__(Folder)
        other.files = {}
        for name, store in self.items():
            other[name] = StrictStore(store.data, name, store.largest)
            other[name].length = store.length
            other[name].fixed_size = store.fixed_size
        return other


def _build(source: Source) -> dict[str, bytes]:
    """The files: the image, what it may have for data, and what it may stand on."""
    kind = source.byte()
    template = HEADERS[kind % len(HEADERS)]
    raw = bytearray(RAW_HEADERS[kind % len(HEADERS)])
    if source.byte() & 1:
        raw[4300:4304] = bytes(4)  # clean_shutdown
    room = 24 * 4096
    image = bytearray(template.metadata_size + (0 if template.data_file else room))
    patch(source, raw, len(image))
    image[: len(raw)] = raw
    if template.has_base:
        bits = source.take(source.byte() % 10)
        image[template.bitmap_offset : template.bitmap_offset + len(bits)] = bits
    if template.compact:
        entries = [some_entry(source) for _ in range(source.byte() % 12)]
        entries = [entry % 48 if source.byte() < 250 else entry for entry in entries]
        table = b"\xff" * 4096
        table = struct.pack(f"<{len(entries)}I", *entries) + table[4 * len(entries) :]
        image[template.table_offset : template.table_offset + 4096] = table
    if template.journal_size:
        for sector in range(source.byte() % 4):
            at = template.journal_offset + sector * 512
            image[at : at + 512] = some_records(source, template)
    pattern = bytes([65 + source.byte() % 8]) * 3000 + b"0123456789" * 100
    if not template.data_file:
        image[template.metadata_size :] = (pattern * 25)[:room]
    if source.byte() > 230:
        del image[source.number(2) * 2 :]
    below = _BELOW.encode().ljust(_BELOW.metadata_size, b"\0") + b"below" * 5000
    return {IMAGE: bytes(image), "data": (pattern * 25)[: source.byte() * 512], "raw": _BASE, "below": below}


def _os_error(error: OSError) -> int:
    assert error.errno, f"an error without a number: {error!r}"
    return error.errno


async def _read_all(image: Image) -> bytes | None:
    """The whole disk, or None where it is too large or a part of it is damaged."""
    if image.size > WHOLE:
        for offset in (0, image.size // 2, image.size - 600, image.header.base_img_size - 100, image.size):
            try:
                data = await image.read(max(0, offset), 1000)
            except OSError as error:
                _os_error(error)
            else:
                assert len(data) == max(0, min(1000, image.size - max(0, offset)))
        return None
    parts = []
    whole = True
    for offset in range(0, image.size, MAX_REQUEST):
        try:
            parts.append(await image.read(offset, MAX_REQUEST))
        except OSError as error:
            assert _os_error(error) == errno.EIO or image.header.data_offset > 1 << 61
            whole = False
    return b"".join(parts) if whole else None


def _reference_reads(folder: Folder, image: Image) -> bytes | None:
    """What the reference reader makes of it; None where it accepts less, or knows it is damaged."""
    header = image.header
    length = len(folder.files[IMAGE])
    if header.bitmap_size > length or bool(header.bitmap_size) != header.has_base or not header.base_img_size >= 0:
        return None
    if image.damage:
        return None
    if header.data_offset > 1 << 40 or header.journal_size > length:
        return None
    try:
        other = reference.Image(cast(Path, HeldPath(folder.files, IMAGE)))
    except ValueError:
        return None
    if any("used twice" in text for text in other.reports):
        return None
    data = other.read(0, header.virtual_disk_size)
    other.close()
    return data


class _Session:
    """Operations on an open image, and the disk as it must be; None once nobody can say."""

    def __init__(self, source: Source, image: Image, disk: bytearray | None, *, foreign_journal: bool) -> None:
        """`foreign_journal`: of a clean image has anything in its journal, which nobody has looked at yet."""
        self.source = source
        self.foreign_journal = foreign_journal
        self.image = image
        self.disk = disk
        self.flushed = disk[:] if disk is not None else None

    def _place(self) -> int:
        size = self.image.size
        kind = self.source.byte() % 8
        if kind == 0:
            return max(0, size - self.source.byte())
        if kind == 1:
            return max(0, self.image.header.base_img_size - self.source.byte())
        return self.source.number(2) * (1 if kind < 6 else 3) % max(1, size)

    async def step(self) -> None:
        """One operation, as the source decides."""
        kind = self.source.byte() % 9
        try:
            if kind < 4:
                await self._write(self._place())
            elif kind == 4:
                await self.image.fsync()
                self.flushed = self.disk[:] if self.disk is not None else None
            elif kind == 5:
                await self._read(self._place())
            elif kind == 6:
                await self._resize()
            elif kind == 7:
                await self._write(self.image.size + self.source.byte() * 100)
            else:
                self.image.zeroes = self.source.pick((Zeroes.OFF, Zeroes.ON, Zeroes.PUNCH))
        except OSError as error:
            _os_error(error)
            self.disk = None

    async def _write(self, offset: int) -> None:
        length = self.source.byte() * (1 if self.source.byte() < 128 else 97)
        data = bytes(length) if self.source.byte() > 200 else bytes([self.source.byte()]) * length
        await self.image.write(offset, data)
        if self.disk is not None and length:
            self.disk.extend(bytes(max(0, (offset + length + 511) // 512 * 512 - len(self.disk))))
            self.disk[offset : offset + length] = data
            if len(self.disk) > WHOLE:
                self.disk = None

    async def _read(self, offset: int) -> None:
        length = self.source.byte() * 50
        data = await self.image.read(offset, length)
        if self.disk is not None:
            assert data == self.disk[offset : offset + length]

    async def _resize(self) -> None:
        image = self.image
        size = self.source.number(2) * 3
        if self.source.byte() > 220 and not image.header.compact:
            size = max(0, self.source.size(image.size))
            size = min(size, MAX_FILE_SIZE)
        old_size = image.size
        await image.resize(size, shrink=True)
        size = (size + 511) // 512 * 512
        assert image.size == size
        if self.disk is None or size > WHOLE:
            self.disk = None
            return
        del self.disk[size:]
        self.disk.extend(bytes(size - len(self.disk)))
        if size != old_size:
            self.flushed = self.disk[:]


async def open_image(data: bytes) -> bool:
    """One input: build it, open it, use it, end it, and open what is left. Whether it could be opened."""
    source = Source(data)
    files = _build(source)
    try:
        header = Header.decode(files[IMAGE], IMAGE)
        header.check(IMAGE, len(files[IMAGE]))
    except FvdError:
        return False
    folder = Folder(header, files)
    kind = source.byte()
    for store in folder.values():
        store.slow = kind & 3 == 3
        store.fixed_size = kind > 230
    try:
        image = await load(folder)
    except FvdError as error:
        # The header has been accepted; what stands below it always opens.
        raise AssertionError(f"refused after its header was accepted: {error}") from error
    assert image.usage() >= 0
    disk = await _read_all(image)
    if disk is not None:
        assert len(disk) == image.size
        assert image.size == header.virtual_disk_size or header.length_counts
        expected = _reference_reads(folder, image)
        assert expected is None or disk == expected, "the reference reader reads something else"
    try:
        await image.begin_writing(accept_unclean=bool(source.byte() & 1))
    except FvdError:
        await image.close()
        return True
    except OSError as error:
        _os_error(error)
        await image.close()
        return True
    region = header.journal_region
    foreign = header.clean and region is not None and any(files[IMAGE][region.offset : region.end])
    session = _Session(source, image, bytearray(disk) if disk is not None else None, foreign_journal=foreign)
    for _ in range(source.byte() % 9):
        await session.step()
    await _end(source, session, folder)
    return True


async def _end(source: Source, session: _Session, folder: Folder) -> None:
    image = session.image
    kind = source.byte() % 3
    expected = session.disk
    try:
        if kind == 0:
            await image.close()
        elif kind == 1:
            await image.fsync()
    except OSError as error:
        _os_error(error)
        expected = None
    if kind == 2 and session.flushed != expected:
        expected = None
    if kind != 0 and session.foreign_journal:
        expected = None
    again = folder.again()
    store = again[IMAGE]
    length = store.length
    header = Header.decode(bytes(store.data[:8192]), IMAGE)
    header.check(IMAGE, length)
    check_header(header, length)
    other = await load(again)
    found = await _read_all(other)
    if expected is not None:
        assert found == bytes(expected), "what is left is not what was written"
    await other.close()


class _Worker:
    """Runs inputs one after the other in one trio run, in a thread of its own: a run for each would take longer."""

    def __init__(self) -> None:
        self._inputs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[bool | BaseException] = queue.SimpleQueue()
        threading.Thread(target=trio.run, args=(self._work,), daemon=True).start()

    async def _work(self) -> None:
        while True:
            data = self._inputs.get()  # nothing else runs here, so it may block
            try:
                self._results.put(await open_image(data))
            except BaseException as error:
                self._results.put(error)

    def run(self, data: bytes) -> bool:
        self._inputs.put(data)
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result


_worker: list[_Worker] = []


def fuzz_opening(data: bytes) -> bool:
    """`open_image`, for callers without trio."""
    if not _worker:
        _worker.append(_Worker())
    return _worker[0].run(data)
