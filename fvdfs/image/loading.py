"""Loading an image: its chain is locked, its metadata read, its journal replayed in memory."""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import AsyncIterator, Sequence

import trio

from fvdfs.alloc.chunked import ChunkedStorage, Spawn
from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.growth import grow_command
from fvdfs.alloc.table import Table, TooDamaged, decode_entries
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.errors import FormatError, ImageBusy
from fvdfs.format import journal
from fvdfs.format.header import HEADER_SIZE, HEADER_SPACE, PAGE, SECTOR, Header, Region, round_up
from fvdfs.image.bases import Bases, Key
from fvdfs.image.chain import Chain, Layer, open_alone, open_chain
from fvdfs.image.commit import Committer
from fvdfs.image.core import Core, damaged_layers
from fvdfs.image.exchange import close_former, take_parts
from fvdfs.image.following import check_source, put_source_below
from fvdfs.image.image import Image
from fvdfs.image.locking import lock_for_reading, lock_for_writing, unlock_for_writing
from fvdfs.image.migration import refuse_moved
from fvdfs.image.policy import Policy
from fvdfs.image.unsettled import Left
from fvdfs.store.base import Store, pread_exactly
from fvdfs.store.host import HostFile
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore

log = logging.getLogger(__name__)

_PIECE = 1 << 20  # bytes of metadata that are read at a time
_NO_BITS = bytes(PAGE)
_REPORTED_RECORDS = 10  # bad journal records that are logged one by one


async def load_chain(chain: Chain, spawn: Spawn | None = None, bases: Bases[Core, Store] | None = None) -> Image:
    """Lock the files of the chain for reading, read all metadata, replay journals in memory.

    What `bases` has open already is used as it is. `spawn`: see `Core`. Takes over the files, also where it fails. Only
    from the main thread. Raises ImageBusy, ImageError, UsageError where a program is missing, OSError.
    """
    bases = bases or Bases()
    loaded: list[Image] = []
    keys = chain.keys()
    try:
        async with bases.changing(keys):
            await _load_chain(chain, keys, spawn, bases, loaded)
    except BaseException:
        await chain.aclose()
        if loaded:
            await loaded[-1].close()
        raise
    return loaded[-1]


async def _load_chain(
    chain: Chain, keys: Sequence[Key], spawn: Spawn | None, bases: Bases[Core, Store], loaded: list[Image]
) -> None:
    """Load the images that are not open yet, from the lowest to the top; the chain has the rest."""
    shared = next(((depth, base) for depth, key in enumerate(keys) if (base := bases.find(key)) is not None), None)
    if shared is not None:
        await trio.to_thread.run_sync(chain.cut, shared[0])
    for store in chain.stores():
        if isinstance(store, QemuStore):
            await store.start()
    wanting = [layer for layer in chain.layers[1:] if layer.keeps_copies]
    fills = [layer for layer in wanting if await trio.to_thread.run_sync(layer.lock_for_copies)]
    await lock_for_reading(chain.stores(), chain.layers)
    below: Core | Store | None = chain.base if shared is None else shared[1]
    for layer in chain.layers:
        if layer.source is not None:
            await check_source(layer.source, layer.header.base_size)
    if below is not None and not isinstance(below, Core) and chain.layers[-1].source is None:
        await _look_at_base(chain.layers[-1], below)
    lowest = chain.base if len(keys) == len(chain.layers) else None  # else it may be written, or is open already
    while chain.layers:
        layer = chain.layers[-1]
        image = await load_image(
            layer.path,
            layer.header,
            layer.raw_header,
            layer.meta,
            layer.data,
            below,
            chain.policy,
            spawn,
            bases,
        )
        if layer.source is not None:
            put_source_below(image, layer.source)
        loaded.append(image)
        chain.base = None
        chain.layers.pop()
        if layer in fills:
            await image.begin_copies()
        elif chain.layers:
            image.share_reads()
        below = image
    new: list[Core | Store] = [*reversed(loaded[:-1])]
    if lowest is not None:
        new.append(lowest)
    for key, base in zip(keys, new, strict=False):
        bases.add(key, base)


async def _look_at_base(layer: Layer, base: Store) -> None:
    """Look whether it is as long as the image says: now, or when its server is back. Raises OSError."""
    header = layer.header
    least = header.base_size - SECTOR + 1
    if isinstance(base, QemuStore) and base.is_away:
        base.expect(least)
        return
    if (size := await base.size()) < least:
        log.warning(
            "%s: base_img=%s is %d bytes long, base_img_size says %d: what is missing reads as zeros",
            layer.path,
            header.base_img,
            size,
            header.base_size,
        )


async def load_image(
    name: str,
    header: Header,
    raw_header: bytes,
    meta: Store,
    data: Store,
    base: Core | Store | None,
    policy: Policy,
    spawn: Spawn | None = None,
    bases: Bases[Core, Store] | None = None,
) -> Image:
    """The image over these stores, its metadata read and its journal replayed in memory."""
    bitmap = table = None
    command = grow_command(name, policy.grow_command, header.add_storage_cmd)
    storage: FlatStorage | ChunkedStorage
    length = max(0, await data.size() - header.data_offset)
    if header.has_base:
        bitmap = await _load_bitmap(meta, header)
    if header.compact:
        region = header.table_region
        assert region is not None
        table = await _load_table(name, meta, region, header.chunks, length // header.chunk_size)
    skipped = not header.clean and await _replay(name, header, meta, bitmap, table)
    notes, left = None, Left()
    if policy.unsettled is not None and isinstance(meta, HostFile):
        notes, left = policy.unsettled.notes(meta.identity, name), policy.unsettled.left(meta.identity)
    has_left = _take_up(name, left, bitmap, table)
    if table is not None:
        table.replay_done()
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
        size = header.virtual_disk_size
        is_truncated = length < size and header.is_truncated(
            length, any_local=bitmap is not None and bitmap.count_local() > 0
        )
        storage = FlatStorage(data, header.data_offset, size, command, length=length, is_truncated=is_truncated)
    raw = raw_header[: round_up(HEADER_SIZE, SECTOR)]
    committer = Committer(
        header,
        raw,
        meta,
        data,
        bitmap,
        table,
        journal_is_bad=skipped,
        notes=notes,
        has_left=has_left,
        was_ours=left.writing,
    )
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
        bases=bases or Bases(),
    )


def refuse_damaged(image: Core) -> None:
    """Raise FormatError where an image of the chain is damaged: nobody is to take a copy of it for a good one."""
    for name, damage in damaged_layers(image):
        raise FormatError(name, f"{damage}; fvdfs check {name} says what is lost")


async def make_writable(image: Image, policy: Policy) -> None:
    """Lock an image that was loaded for reading, and begin to write to it.

    Raises as `lock_for_writing`, `refuse_moved`, `load_image` and `Image.begin_writing`.
    """
    await lock_to_change(image, policy)
    await image.begin_writing(accept_unclean=policy.accept_unclean)


async def lock_to_change(image: Image, policy: Policy) -> None:
    """Lock an image that was loaded for reading against everybody else, and know what it is now.

    Raises as `lock_for_writing` and `load_image`.
    """
    await lock_for_writing(image)
    if isinstance(image.meta, HostFile):
        try:
            await trio.to_thread.run_sync(refuse_moved, image.meta)
        except BaseException:
            await unlock_for_writing(image)
            raise
    await _catch_up(image, policy)


async def reopen(image: Image, policy: Policy) -> None:
    """Have the files of an image that others stand on be open for writing; it is still only read.

    Raises as `open_alone` and `load_chain`; ImageBusy where its name leads to another file.
    """
    if image.meta.writable and image.data.writable:
        return
    loaded = await load_chain(await trio.to_thread.run_sync(open_alone, image.name, policy), image.spawn)
    assert isinstance(loaded.meta, HostFile)
    assert isinstance(image.meta, HostFile)
    if loaded.meta.identity != image.meta.identity:
        await loaded.close()
        raise ImageBusy(image.name, "was replaced by somebody else meanwhile")
    former = take_parts(image, loaded)
    with trio.CancelScope(shield=True):
        await image.wait_for_reads()
        await close_former(former)


async def _catch_up(image: Image, policy: Policy) -> None:
    """Load the metadata again where others may have filled the image with copies since it was loaded."""
    if image.bitmap is None or not isinstance(image.meta, HostFile) or image.meta.file_lock.is_unfilled:
        return
    try:
        raw = bytearray(HEADER_SPACE)
        await image.meta.pread(memoryview(raw), 0)
        header = Header.decode(bytes(raw), image.name)
        image.take_metadata(
            await load_image(
                image.name, header, bytes(raw), image.meta, image.data, image.base, policy, image.spawn, image.bases
            )
        )
    except BaseException:
        await unlock_for_writing(image)
        raise


async def _pieces(meta: Store, region: Region) -> AsyncIterator[tuple[int, bytearray]]:
    """The bytes of a region, piece by piece, each with its offset there. Raises OSError."""
    for at in range(0, region.size, _PIECE):
        yield at, await pread_exactly(meta, min(_PIECE, region.size - at), region.offset + at)


async def _load_bitmap(meta: Store, header: Header) -> Bitmap:
    """Its pages without a local block take no memory: of a new image that is all of them."""
    region = Region("bitmap", header.bitmap_offset, bitmap_bytes(header.blocks))
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    bits = memoryview(mmap.mmap(-1, region.size, flags=private) if region.size else bytearray())
    async for at, data in _pieces(meta, region):
        for page in range(0, len(data), PAGE):
            content = data[page : page + PAGE]
            if content != _NO_BITS:
                bits[at + page : at + page + PAGE] = content
    return Bitmap(bits, header.blocks)


async def _load_table(name: str, meta: Store, region: Region, chunks: int, storage_chunks: int) -> Table:
    entries = decode_entries(b"")
    async for _, data in _pieces(meta, region):
        entries += decode_entries(data)
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
    async for at, data in _pieces(meta, region):
        skipped += journal.replay(bytes(data), header, bitmap, table, at // SECTOR)
    for report in skipped[:_REPORTED_RECORDS]:
        log.warning("%s: %s", name, report)
    if len(skipped) > _REPORTED_RECORDS:
        log.warning("%s: %d more journal records skipped", name, len(skipped) - _REPORTED_RECORDS)
    log.info("%s: was not closed; its journal has been replayed", name)
    return bool(skipped)


def _take_up(name: str, left: Left, bitmap: Bitmap | None, table: Table | None) -> bool:
    """Have what was not committed in bitmap and table, in memory; whether there is any."""
    if table is not None:
        for chunk, number in left.chunks.items():
            if reason := table.replay(chunk, [number]):
                log.error("%s: what was written last may be lost: %s", name, reason)
    if bitmap is not None:
        for first, end in left.blocks:
            if end <= bitmap.blocks:
                bitmap.set_local(first, end)
    return bool((table is not None and left.chunks) or (bitmap is not None and left.blocks))


async def open_image(path: str, policy: Policy, *, write: bool = False) -> Image:
    """Open the image at `path`, for tools that need no mount. Errors as the functions above.

    Also as `refuse_damaged`.
    """
    image = await load_chain(open_chain(path, policy, to_write=write))
    try:
        refuse_damaged(image)
        if write:
            await make_writable(image, policy)
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
