"""Opening an image with all that it stands on: data file, base image, the base's base.

What names inside an image may lead to, `policy` says.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import trio

from fvdfs.alloc.chunked import ChunkedStorage, Spawn
from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.growth import grow_command
from fvdfs.alloc.table import Table, TooDamaged, decode_entries
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.cow.writethrough import MODES
from fvdfs.errors import (
    FormatError,
    ImageBusy,
    ImageError,
    NotPermitted,
    UnsupportedFeature,
)
from fvdfs.format import journal
from fvdfs.format.header import (
    HEADER_SIZE,
    HEADER_SPACE,
    SECTOR,
    TABLE_ENTRY_SIZE,
    UNALLOCATED,
    Header,
    Region,
    round_up,
)
from fvdfs.image.commit import Committer
from fvdfs.image.core import Core, usage_of
from fvdfs.image.image import Image
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS, HostStore, Policy, looks_like, resolve
from fvdfs.store.base import Store, pread_exactly
from fvdfs.store.host import HostFile, open_as_permitted
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import BASE_FORMATS, FORMATS, RAW

log = logging.getLogger(__name__)

MAX_REGION = 1 << 30  # bytes; bitmap and table are held in memory, the journal is read at a replay
_PIECE = 1 << 20  # bytes of metadata that are read at a time
_REPORTED_RECORDS = 10  # bad journal records that are logged one by one
ASKING_TIME = 1.0  # seconds that another process may take to stop writing
ASKING_INTERVAL = 0.02  # seconds between attempts to lock


@dataclass(slots=True)
class Layer:
    """An FVD image of a chain, its files open, nothing but its header read."""

    path: str
    meta: HostFile
    data: HostStore
    header: Header
    raw_header: bytes
    base_format: str = ""
    """The base's format, once somebody has looked: the header need not state it."""

    def usage(self) -> int:
        """Bytes that the image takes, metadata and data. Blocks."""
        return usage_of(self.header, self.meta, self.data, self._allocated_chunks)

    def _allocated_chunks(self) -> int:
        region = self.header.table_region
        assert region is not None
        table = bytearray(region.size)
        self.meta.pread_now(memoryview(table), region.offset)
        entries = decode_entries(memoryview(table)[: self.header.chunks * TABLE_ENTRY_SIZE])
        return len(entries) - entries.count(UNALLOCATED)

    def close(self) -> None:
        """Close its files. Blocks."""
        self.meta.close()
        if self.data is not self.meta:
            self.data.close()

    def check_unchanged(self) -> None:
        """Once the image is locked: raise ImageBusy where its header has changed since it was read. Blocks.

        Only a changed `clean_shutdown` is taken over.
        """
        raw = bytearray(len(self.raw_header))
        self.meta.pread_now(memoryview(raw), 0)
        if raw == self.raw_header:
            return
        header = Header.decode(bytes(raw), self.path)
        if replace(header, clean_shutdown=self.header.clean_shutdown) != self.header:
            raise ImageBusy(self.path, "it was changed while it was opened; try again")
        self.header, self.raw_header = header, bytes(raw)


@dataclass(slots=True)
class Chain:
    """An image and the images it stands on, from the top; `base` is what is under the last, if anything."""

    layers: list[Layer]
    base: HostStore | None
    policy: Policy

    def stores(self) -> list[HostStore]:
        """Every open file of the chain, once."""
        found: list[HostStore] = []
        for layer in self.layers:
            found += [layer.meta] if layer.data is layer.meta else [layer.meta, layer.data]
        return found + ([self.base] if self.base is not None else [])

    def close(self) -> None:
        """Close every file. Blocks."""
        for store in self.stores():
            store.close()

    async def aclose(self) -> None:
        """Close every file."""
        for store in self.stores():
            await store.aclose()


def open_chain(path: str, policy: Policy, *, top_only: bool = False) -> Chain:
    """Open the files of the image at `path`, and read and check their headers. Blocks.

    `top_only`: the image's own file alone, for a look at its header. Raises ImageError with one line
    that names image, field and value; OSError only for `path` itself; NoAnswer.
    """
    chain = Chain([], None, policy)
    try:
        for part in _descend(path, policy, top_only=top_only):
            if isinstance(part, Layer):
                chain.layers.append(part)
            else:
                chain.base = part
    except BaseException:
        chain.close()
        raise
    return chain


Judged = dict[tuple[tuple[int, int], str], Exception | None]
"""What is wrong with an image, or None: by its file, and by the folder that its names are relative to."""


def look_at_chain(path: str, policy: Policy, judged: Judged) -> tuple[int, int]:
    """Size and usage, in bytes, of the image at `path`, which can be opened with all that it stands on. Blocks.

    One layer is open at a time. What was found is kept in `judged`, so that of many images on one base the base
    is looked at once. Raises as `open_chain`.
    """
    found = None
    error: Exception | None = None
    passed = []
    try:
        for part in _descend(path, replace(policy, writable=False)):
            if not isinstance(part, Layer):
                part.close()
                break
            try:
                found = found or (part.header.virtual_disk_size, part.usage())
                key = part.meta.identity, os.path.dirname(part.path)
            finally:
                part.close()
            if key in judged:
                error = judged[key]
                break
            passed.append(key)
    except (ImageError, OSError) as caught:
        error = caught
    judged.update(dict.fromkeys(passed, error))
    if error is not None:
        raise error.with_traceback(None)
    assert found is not None
    return found


def _descend(path: str, policy: Policy, *, top_only: bool = False) -> Iterator[Layer | HostStore]:
    """The layers of an image from the top, then the base under the last, if any; the caller closes each."""
    above: dict[tuple[int, int], str] = {}
    last: Layer | None = None
    store = _open_top(path, policy)
    while True:
        writable = policy.writable and last is None
        try:
            if store.identity in above:
                assert last is not None
                names = " on ".join([*above.values(), path])
                raise FormatError(last.path, f"base_img={last.header.base_img}: the chain is a loop: {names}")
            above[store.identity] = path
            last = _open_layer(path, store, policy, writable=writable, with_data=not top_only)
        except BaseException:
            store.close()
            raise
        yield last
        header = last.header
        if not header.has_base or top_only:
            return
        last.base_format = header.base_img_fmt or unstated_base_format(path, header, policy)
        through = writable and _writes_base(last, policy)
        if last.base_format != FVD_FORMAT:
            stated = last.base_format if header.base_img_fmt or last.base_format != RAW else ""
            yield open_named(path, "base_img", header.base_img, stated, policy, writable=through)
            return
        below = open_named(path, "base_img", header.base_img, "", policy, writable=False)
        if not isinstance(below, HostFile):
            below.close()
            raise UnsupportedFeature(path, f"base_img={header.base_img}: an FVD image must be a file of this host")
        store = below
        path = resolve(path, header.base_img)


def _writes_base(layer: Layer, policy: Policy) -> bool:
    """Whether writes to this image are to reach its base, and may; says so where they do not."""
    header = layer.header
    if header.write_updates_base_img not in MODES:
        return False
    wish = f"write_updates_base_img={header.write_updates_base_img}"
    if not policy.base_writable:
        log.warning("%s: %s, but the base stays as it is: allow it with -o allow_base_write", layer.path, wish)
        return False
    if layer.base_format == FVD_FORMAT:
        log.warning("%s: %s, but the base is an FVD image: it stays as it is", layer.path, wish)
        return False
    return True


def _open_top(path: str, policy: Policy) -> HostFile:
    handle = policy.walker.open(policy.place(path))
    try:
        return _open_handle(handle, path, policy, writable=policy.writable)
    finally:
        os.close(handle)


def _open_handle(handle: int, path: str, policy: Policy, *, writable: bool) -> HostFile:
    file = open_as_permitted(handle, path, writable=writable)
    file.file_lock.with_qemu = policy.qemu_locks
    return file


def open_named(image: str, field: str, name: str, file_format: str, policy: Policy, *, writable: bool) -> HostStore:
    """Open what a field of an image names, if the policy allows; a `QemuStore` is not started yet.

    Raises Refused, UnsupportedFeature, ImageError, NoAnswer.
    """
    if file_format not in RAW_FORMATS or not is_local(name):
        if file_format and file_format not in FORMATS:
            known = ", ".join(BASE_FORMATS)
            raise UnsupportedFeature(image, f"{field}_fmt={file_format}: is not known; known are {known}")
        return QemuStore(image, field, name, file_format, policy, writable=writable)
    handle, path = policy.open_file(image, field, name)
    try:
        return _open_handle(handle, path, policy, writable=writable)
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise ImageError(image, f"{field}={name}: {path}: {reason}") from error
    finally:
        os.close(handle)


def _open_layer(path: str, meta: HostFile, policy: Policy, *, writable: bool, with_data: bool) -> Layer:
    raw = bytearray(HEADER_SPACE)
    count = meta.pread_now(memoryview(raw), 0)
    header = Header.decode(bytes(raw[:count]), path)
    header.check(path, meta.size_now())
    for region in header.regions():
        if region.size > MAX_REGION:
            raise UnsupportedFeature(
                path, f"its {region.name} has {region.size} bytes; fvdfs uses {MAX_REGION} at the most"
            )
    data: HostStore = meta
    if header.data_file and with_data:
        data = open_named(path, "data_file", header.data_file, header.data_file_fmt, policy, writable=writable)
        if data.identity == meta.identity:
            data.close()
            raise FormatError(path, f"data_file={header.data_file}: this is the image itself")
    return Layer(path, meta, data, header, bytes(raw))


def _look_at_size(layer: Layer, size: int) -> None:
    header = layer.header
    if size < header.base_size - SECTOR + 1:
        log.warning(
            "%s: base_img=%s is %d bytes long, base_img_size says %d: what is missing reads as zeros",
            layer.path,
            header.base_img,
            size,
            header.base_size,
        )


def unstated_base_format(path: str, header: Header, policy: Policy) -> str:
    """The base's format of the image at `path`, whose header does not state it. Blocks.

    Of a base that is no file of this host, `QemuStore.start` finds it out. Raises UnstatedFormat, and as `open_named`.
    """
    if not is_local(header.base_img):
        return RAW
    base = open_named(path, "base_img", header.base_img, "", policy, writable=False)
    try:
        assert isinstance(base, HostFile)
        shown = looks_like(base)
    finally:
        base.close()
    return policy.unstated_format(path, "base_img", header.base_img, shown) if shown else RAW


async def load_chain(chain: Chain, spawn: Spawn | None = None) -> Image:
    """Lock the files of the chain for reading, read all metadata, replay journals in memory.

    `spawn`: see `Core`. Takes over the files, also where it fails. Only from the main thread. Raises ImageBusy,
    ImageError, UsageError where a program is missing, OSError.
    """
    try:
        for store in chain.stores():
            if isinstance(store, QemuStore):
                await store.start()
        await lock_for_reading(chain.stores(), chain.layers)
        if chain.base is not None:
            _look_at_size(chain.layers[-1], await chain.base.size())
        base: Image | Store | None = chain.base
        for layer in reversed(chain.layers):
            base = await load_image(
                layer.path, layer.header, layer.raw_header, layer.meta, layer.data, base, chain.policy, spawn
            )
    except BaseException:
        await chain.aclose()
        raise
    assert isinstance(base, Image)
    return base


async def lock_for_reading(stores: Sequence[HostStore], layers: Sequence[Layer] = ()) -> None:
    """Lock all for reading, then check that the headers of these layers are as they were read.

    Who writes to one of them only to keep copies is asked to stop, for `ASKING_TIME`. Raises ImageBusy, OSError.
    """
    deadline = trio.current_time() + ASKING_TIME
    while True:
        try:
            await trio.to_thread.run_sync(_lock_for_reading_now, stores, layers)
            return
        except ImageBusy:
            if trio.current_time() > deadline or not await trio.to_thread.run_sync(_ask, stores):
                raise
        await trio.sleep(ASKING_INTERVAL)


def _lock_for_reading_now(stores: Sequence[HostStore], layers: Sequence[Layer]) -> None:
    for store in stores:
        store.lock(exclusive=False)
    for layer in layers:
        layer.check_unchanged()


def _ask(stores: Sequence[HostStore]) -> bool:
    """Ask whoever holds a lock to let us in; False where there are no such locks."""
    try:
        for store in stores:
            if isinstance(store, HostFile):
                store.file_lock.ask()
    except OSError:
        return False
    return True


def is_asked_for(image: Image) -> bool:
    """Whether somebody wants to read what `lock_for_writing` has locked. May wait for a server. Raises OSError."""
    return any(isinstance(store, HostFile) and store.file_lock.is_asked_for() for store in _written(image))


async def load_image(
    name: str,
    header: Header,
    raw_header: bytes,
    meta: Store,
    data: Store,
    base: Image | Store | None,
    policy: Policy,
    spawn: Spawn | None = None,
) -> Image:
    """The image over these stores, its metadata read and its journal replayed in memory."""
    bitmap = table = None
    command = grow_command(name, policy.grow_command, header.add_storage_cmd)
    storage: FlatStorage | ChunkedStorage
    if header.has_base:
        bits = await pread_exactly(meta, bitmap_bytes(header.blocks), header.bitmap_offset)
        bitmap = Bitmap(bits, header.blocks)
    if header.compact:
        region = header.table_region
        assert region is not None
        storage_size = await data.size() - header.data_offset
        table = await _load_table(name, meta, region, header.chunks, max(0, storage_size // header.chunk_size))
        storage = ChunkedStorage(
            data,
            table,
            data_offset=header.data_offset,
            chunk_size=header.chunk_size,
            grow_unit=header.storage_grow_unit,
            size=header.virtual_disk_size,
            grow_command=command,
            window=header.chunk_window,
            spawn=spawn,
        )
    else:
        storage = FlatStorage(data, header.data_offset, header.virtual_disk_size, command)
    skipped = not header.clean and await _replay(name, header, meta, bitmap, table)
    if table is not None:
        table.replay_done()
        if table.damaged:
            log.error("%s: %s", name, table.damage)
    raw = raw_header[: round_up(HEADER_SIZE, SECTOR)]
    committer = Committer(header, raw, meta, data, bitmap, table, journal_is_bad=skipped)
    return Image(
        name=name,
        committer=committer,
        meta=meta,
        data=data,
        base=base,
        storage=storage,
        bitmap=bitmap,
        table=table,
        zeroes=policy.zeroes,
        spawn=spawn,
    )


async def _load_table(name: str, meta: Store, region: Region, chunks: int, storage_chunks: int) -> Table:
    entries = decode_entries(b"")
    for at in range(0, region.size, _PIECE):
        size = min(_PIECE, region.size - at)
        entries += decode_entries(await pread_exactly(meta, size, region.offset + at))
    try:
        return Table(entries, chunks, storage_chunks)
    except TooDamaged:
        raise FormatError(name, "chunk table: most of it cannot be right; see what fvdfs check says of it") from None


async def _replay(name: str, header: Header, meta: Store, bitmap: Bitmap | None, table: Table | None) -> bool:
    """Apply the journal to bitmap and table in memory; whether a record had to be skipped."""
    region = header.journal_region
    if region is None:
        if header.has_metadata:
            log.warning("%s: clean_shutdown=0 and no journal: its metadata may be incomplete", name)
        return False
    skipped: list[journal.Skipped] = []
    for at in range(0, region.size, _PIECE):
        size = min(_PIECE, region.size - at)
        data = bytes(await pread_exactly(meta, size, region.offset + at))
        skipped += journal.replay(data, header, bitmap, table, at // SECTOR)
    for report in skipped[:_REPORTED_RECORDS]:
        log.warning("%s: %s", name, report)
    if len(skipped) > _REPORTED_RECORDS:
        log.warning("%s: %d more journal records skipped", name, len(skipped) - _REPORTED_RECORDS)
    log.info("%s: was not closed; its journal has been replayed", name)
    return bool(skipped)


async def lock_for_writing(image: Image) -> None:
    """Make the locks on the image's own files exclusive, all or none.

    Raises ImageBusy, or NotPermitted where the files are not open for writing.
    """
    await trio.to_thread.run_sync(_lock_for_writing, image.name, _written(image))


async def unlock_for_writing(image: Image) -> None:
    """Make the locks shared again. Raises OSError."""
    stores = [store for store in _written(image) if isinstance(store, HostStore)]
    await trio.to_thread.run_sync(lambda: [store.lock(exclusive=False) for store in stores])


def _written(image: Image) -> list[Store]:
    """What an image that is open for writing may write to."""
    stores: list[Store] = [image.meta] if image.data is image.meta else [image.meta, image.data]
    if image.base_may_be_written:
        assert image.base is not None
        assert not isinstance(image.base, Core)
        stores.append(image.base)
    return stores


def _lock_for_writing(name: str, stores: list[Store]) -> None:
    locked: list[HostStore] = []
    try:
        for store in stores:
            if not store.writable:
                denied = (isinstance(store, HostStore) and store.denied) or errno.EACCES
                reason = f"no permission to write to it ({os.strerror(denied)})"
                raise NotPermitted(store.name, reason, denied)
            if isinstance(store, HostStore):
                store.lock(exclusive=True)
                locked.append(store)
                store.claim_device()
    except (ImageError, OSError) as error:
        for store in locked:
            store.lock(exclusive=False)
        if isinstance(error, ImageBusy) and error.image != name:
            raise ImageBusy(name, str(error)) from error
        raise


async def open_image(path: str, policy: Policy, *, write: bool = False) -> Image:
    """Open the image at `path`, for tools that need no mount. Errors as the functions above."""
    image = await load_chain(open_chain(path, policy))
    if write:
        try:
            await lock_for_writing(image)
            await image.begin_writing(accept_unclean=policy.accept_unclean)
        except BaseException:
            await image.close()
            raise
    return image


async def open_other(name: str, file_format: str, policy: Policy, *, writable: bool) -> QemuStore:
    """Open an image of another format, for tools that need no mount. Only from the main thread.

    Raises ImageError, UsageError where a program is missing, OSError.
    """
    short = os.path.basename(name) if is_local(name) else name  # a path starts at the folder of the first name
    store = QemuStore(name, "image", short, file_format, policy, writable=writable)
    try:
        await store.start()
    except BaseException:
        await store.aclose()
        raise
    return store
