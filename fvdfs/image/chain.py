"""The files of an image and of all that it stands on: data file, base image, the base's base.

What names inside an image may lead to, `policy` says. What is opened here is locked by `locking` and read by `loading`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fvdfs.alloc.table import decode_entries
from fvdfs.cow.writethrough import MODES
from fvdfs.errors import FormatError, ImageBusy, ImageError, UnsupportedFeature
from fvdfs.format.header import HEADER_SPACE, TABLE_ENTRY_SIZE, UNALLOCATED, Header
from fvdfs.format.migration import NO_RECORD, Record
from fvdfs.image.bases import Key
from fvdfs.image.core import usage_of
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS, HostStore, Policy, looks_like, resolve
from fvdfs.store.host import HostFile, identity_of, open_as_permitted
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import BASE_FORMATS, FORMATS, RAW

log = logging.getLogger(__name__)

MAX_REGION = 1 << 30  # bytes; bitmap and table are held in memory, the journal is read at a replay


@dataclass(slots=True)
class Layer:
    """An FVD image of a chain, its files open, nothing but its header read."""

    path: str
    meta: HostFile
    data: HostStore
    header: Header
    """As on disk, but for the size of a disk that the kernel made longer (`Header.with_length`)."""
    raw_header: bytes
    base_format: str = ""
    """The base's format, once somebody has looked: the header need not state it."""
    keeps_copies: bool = False
    """Whether what is read through this base is to be kept in it, and its files are open for that."""
    place: str = ""
    """Where its file was found; differs from `path` where it does not have its name yet."""
    source: QemuStore | None = None
    """What another host gives of it beside its base, as long as it follows that."""

    def usage(self) -> int:
        """Bytes that the image takes, metadata and data. Blocks."""
        return usage_of(self.header, self.meta, self.data, self._allocated_chunks)

    def facts(self) -> Facts:
        """Those of its disk. Blocks."""
        mtime_ns = 0
        if self.header.length_counts and isinstance(self.data, HostFile) and not self.data.fixed_size:
            mtime_ns = self.data.status().st_mtime_ns
        return Facts(self.header.virtual_disk_size, self.usage(), mtime_ns, self.record())

    def record(self) -> Record:
        """What it says of moves. Raises FormatError."""
        return Record.at(self.raw_header, self.path)

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
        if self.source is not None:
            self.source.close()

    def lock_for_copies(self) -> bool:
        """Be the only one who keeps copies in it; False where that is another. Blocks."""
        assert self.keeps_copies
        if obstacle := self.record().obstacle:
            log.info("%s: what is read of its base is not kept: %s", self.path, obstacle)
            return False
        if not self.meta.file_lock.take_copying():
            log.info("%s: another mount or process fills it; this one reads it", self.path)
            return False
        return True

    def check_unchanged(self) -> None:
        """Once the image is locked: raise ImageBusy where its header has changed since it was read. Blocks.

        Also where another file has its name: who held the lock may have replaced it, and this is a snapshot now, or
        nothing any more. Only a changed `clean_shutdown` is taken over.
        """
        with contextlib.suppress(OSError, ValueError):  # without a name it is still the same image
            if self.place and identity_of(os.stat(self.place)) != self.meta.identity:
                raise ImageBusy(self.path, "it was replaced while it was opened; try again")
        raw = bytearray(len(self.raw_header))
        self.meta.pread_now(memoryview(raw), 0)
        if raw == self.raw_header and not self.header.length_counts:
            return
        header = _as_long_as(Header.decode(bytes(raw), self.path), self.data)
        if replace(header, clean_shutdown=self.header.clean_shutdown) != self.header:
            raise ImageBusy(self.path, "it was changed while it was opened; try again")
        self.header, self.raw_header = header, bytes(raw)


def _as_long_as(header: Header, data: HostStore) -> Header:
    """The header with the disk's true size. Blocks. Raises OSError."""
    if not header.length_counts or not isinstance(data, HostFile) or data.fixed_size:
        return header
    return header.with_length(data.size_now())


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
            found += [layer.source] if layer.source is not None else []
        return found + ([self.base] if self.base is not None else [])

    def keys(self) -> list[Key]:
        """What tells apart the bases: of each image but the top, then of the base under the last one."""
        found = [image_key(layer.meta, layer.path) for layer in self.layers[1:]]
        if self.base is not None and not self.base.writable:
            found.append((self.layers[-1].base_format, str(self.base.identity), ""))
        return found

    def cut(self, depth: int) -> None:
        """Close the bases from this number on, as `keys` counts, 0 being that of the top. Blocks."""
        kept = self.layers[: depth + 1]
        below = Chain(self.layers[depth + 1 :], self.base, self.policy)
        self.layers, self.base = kept, None
        below.close()

    def close(self) -> None:
        """Close every file. Blocks."""
        for store in self.stores():
            store.close()

    async def aclose(self) -> None:
        """Close every file."""
        for store in self.stores():
            await store.aclose()


def image_key(meta: HostFile, path: str) -> Key:
    """That of an FVD image as a base."""
    return FVD_FORMAT, str(meta.identity), os.path.dirname(path)


def open_chain(
    path: str, policy: Policy, *, top_only: bool = False, to_write: bool = False, keep_copies: bool = False
) -> Chain:
    """Open the files of the image at `path`, and read and check their headers. Blocks.

    `top_only`: the image's own file alone, for a look at its header. `to_write`: have nobody fill it
    with copies until it is closed, or `locking.let_fill` is called. `keep_copies`: have base images that want
    copy-on-read open for writing copies, where that is permitted. Raises ImageError with one line
    that names image, field and value; OSError only for `path` itself; NoAnswer.
    """
    chain = Chain([], None, policy)
    try:
        for part in _descend(path, policy, top_only=top_only):
            if isinstance(part, Layer):
                chain.layers.append(part)
                if to_write and len(chain.layers) == 1:
                    part.meta.file_lock.keep_unfilled()
                if keep_copies and len(chain.layers) > 1:
                    _prepare_for_copies(part, policy)
            else:
                chain.base = part
    except BaseException:
        chain.close()
        raise
    return chain


def open_alone(path: str, policy: Policy) -> Chain:
    """The image's own files, its data file too, without what it stands on. Blocks. Raises as `open_chain`."""
    store = _open_top(path, policy)
    try:
        layer = _open_layer(path, store, policy, writable=policy.writable, with_data=True)
    except BaseException:
        store.close()
        raise
    return Chain([layer], None, policy)


def top_layer(path: str, policy: Policy) -> Layer:
    """The image at `path` itself, its files closed again: what they are, and what its header says. Blocks.

    It is opened for reading. Raises as `open_chain`.
    """
    chain = open_chain(path, replace(policy, writable=False), top_only=True)
    chain.close()
    return chain.layers[0]


Judged = dict[tuple[tuple[int, int], str], Exception | None]
"""What is wrong with an image, or None: by its file, and by the folder that its names are relative to."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a look at an image tells of its disk."""

    size: int
    """Bytes."""
    usage: int
    """Bytes that are allocated."""
    mtime_ns: int = 0
    """When its data file was written last, where that was not noted in the image file (`Header.length_counts`)."""
    record: Record = NO_RECORD
    """What it says of moves to and from other hosts."""


def look_at_chain(path: str, policy: Policy, judged: Judged) -> Facts:
    """The facts of the image at `path`, which can be opened with all that it stands on. Blocks.

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
                found = found or part.facts()
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
        if len(above) > 1 and last.record().receiving:
            last.close()
            raise ImageError(path, f"{last.record().obstacle}; until then nothing can stand on it")
        if not top_only and last.header.has_base and (source := last.record().source_name):
            try:
                last.source = open_source(path, source, policy)
            except BaseException:
                last.close()
                raise
        yield last
        header = last.header
        if not header.has_base or top_only:
            return
        last.base_format = header.base_img_fmt or unstated_base_format(path, header, policy)
        through = writable and _writes_base(last, policy)
        if last.base_format != FVD_FORMAT:
            stated = last.base_format if header.base_img_fmt or last.base_format != RAW else ""
            name = last.record().base_name(header.base_img)
            yield open_named(path, "base_img", name, stated, policy, writable=through)
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


def open_source(image: str, name: str, policy: Policy) -> QemuStore:
    """Open what another host gives of a disk, if the policy allows; it is not started yet. Raises as `open_named`."""
    return QemuStore(image, "source", name, RAW, policy, writable=False)


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
        header = _as_long_as(header, data)
    return Layer(path, meta, data, header, bytes(raw), place=policy.place(path))


def wants_copies(header: Header) -> bool:
    """Whether an image asks for copies of its base: on read, or by prefetching all."""
    return header.has_base and (bool(header.copy_on_read) or header.prefetch_start_delay > 0)


def _prepare_for_copies(layer: Layer, policy: Policy) -> None:
    """Open the files of a base image for writing, if it wants to keep what is read of its own base, and may."""
    if not wants_copies(layer.header):
        return
    stores = [layer.meta] if layer.data is layer.meta else [layer.meta, layer.data]
    opened: list[HostFile] = []
    for store in stores:
        if isinstance(store, HostFile):
            opened.append(_open_handle(store.fileno(), store.name, policy, writable=True))
    if len(opened) == len(stores) and all(file.writable for file in opened):
        former = stores
        layer.meta, layer.data, layer.keeps_copies = opened[0], opened[-1], True
    else:
        former = list(opened)
    for store in former:
        store.close()


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
