"""Making new images: what `fvdfs create` does, as functions that block.

The header is what the original writes for the same options (`header.new_header`); behind it stand an
empty bitmap, table and journal. With `--detect-holes` the bits of the base's zero runs are set, so
that nothing needs to be stored for them (format.md, section 3).
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from fvdfs.alloc.store import HostFile, open_host_file
from fvdfs.alloc.table import new_table
from fvdfs.chain import FVD_FORMAT, RAW_FORMATS, Policy, looks_like, open_chain
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.errors import ImageError, UsageError
from fvdfs.header import HEADER_SIZE, SECTOR, CreateOptions, Header, new_header, round_up


@dataclass(frozen=True, slots=True)
class BaseImage:
    """What creation has to know of a base."""

    path: str
    length: int
    looks_like: str | None


def inspect_base(image: str, name: str, base_format: str) -> BaseImage:
    """The base that `name` means in an image at `image`.

    Raises UsageError where there is none, or its format is not one that can be read.
    """
    path = os.path.join(os.path.dirname(image), name)
    if base_format not in (*RAW_FORMATS, FVD_FORMAT):
        raise UsageError(f"--base-format {base_format}: only raw and {FVD_FORMAT} bases can be read")
    try:
        if base_format == FVD_FORMAT:
            chain = open_chain(path, Policy(writable=False))
            try:
                return BaseImage(path, chain.layers[0].header.virtual_disk_size, None)
            finally:
                for store in chain.stores():
                    store.close()
        store = _open(path, writable=False)
        try:
            first = bytearray(SECTOR)
            store.pread_now(memoryview(first), 0)
            return BaseImage(path, store.size_now(), None if base_format else looks_like(bytes(first)))
        finally:
            store.close()
    except OSError as error:
        hint = ""
        if not os.path.isabs(name) and os.path.exists(name):
            hint = "; a name is relative to the folder of the new image, not to where you are"
        raise UsageError(f"--base {name}: {path}: {error.strerror}{hint}") from error
    except ImageError as error:
        raise UsageError(f"--base {name}: {error}") from error


def create_image(path: str, virtual_size: int | None, options: CreateOptions, *, force: bool = False) -> list[str]:
    """Make an image; remarks for the user. `virtual_size` in bytes, None: the base's; rounded up to a sector.

    Raises UsageError for what cannot be, OSError where the disk refuses. A file that exists is
    overwritten only with `force`.
    """
    remarks = []
    base = inspect_base(path, options.base_img, options.base_img_fmt) if options.base_img else None
    if virtual_size is None:
        if base is None:
            raise UsageError("say how large the disk shall be: fvdfs create IMAGE SIZE (or give --base)")
        virtual_size = base.length
    virtual_size = round_up(virtual_size, SECTOR)
    if base and base.looks_like:
        remarks.append(
            f"the base looks like {base.looks_like}, but is taken as raw; if that is wrong, "
            f"create the image anew with --base-format {base.looks_like}"
        )
    if options.data_file_fmt not in RAW_FORMATS:
        raise UsageError(f"--data-format {options.data_file_fmt}: only raw data files can be written")
    header = new_header(virtual_size, base.length if base else None, options)
    raw = header.encode().ljust(round_up(HEADER_SIZE, SECTOR), b"\0")
    bitmap = None
    if base:
        bitmap = Bitmap(bytes(bitmap_bytes(header.blocks)), header.blocks)
        if options.detect_holes:
            _mark_holes(bitmap, header, base.path, options.base_img_fmt, options.detect_holes)

    data_path = os.path.join(os.path.dirname(path), options.data_file) if options.data_file else None
    _refuse_overlap(path, data_path, base)
    if data_path is not None:
        _create_file(data_path, _data_size(header), force)
    made_data = data_path
    try:
        size = header.metadata_size + (_data_size(header) if data_path is None else 0)
        _create_file(path, size, force, [(0, raw), *_metadata(header, bitmap)])
    except BaseException:
        if made_data is not None and not force:
            os.unlink(made_data)
        raise
    return remarks


def _data_size(header: Header) -> int:
    """Bytes of data that a new image has at once: the whole disk, sparse, where no table grows it."""
    return 0 if header.compact else header.virtual_disk_size


def _metadata(header: Header, bitmap: Bitmap | None) -> list[tuple[int, bytes]]:
    parts = []
    if bitmap is not None:
        parts += [(header.bitmap_offset + number * 4096, page) for number, page in bitmap.take_dirty_pages()]
    if header.compact:
        parts.append((header.table_offset, new_table(header.chunks)))
    return parts


def _refuse_overlap(path: str, data_path: str | None, base: BaseImage | None) -> None:
    files = {"IMAGE": path, "--data-file": data_path, "--base": base.path if base else None}
    real = {option: os.path.realpath(name) for option, name in files.items() if name is not None}
    if len(set(real.values())) != len(real):
        raise UsageError(f"{' and '.join(real)} must be different files")


def _create_file(path: str, size: int, force: bool, parts: list[tuple[int, bytes]] | None = None) -> None:
    """Make a sparse file of this size that holds the parts; remove it again if that fails."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise UsageError(f"{path}: is not a regular file")
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if force else os.O_EXCL)
    try:
        fd = os.open(path, flags, 0o666)
    except FileExistsError:
        raise UsageError(f"{path} exists already; choose another name, or --force to overwrite it") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    store = HostFile(fd, path, writable=True)
    try:
        store.lock(exclusive=True)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        for offset, data in parts or ():
            store.pwrite_now(data, offset)
        os.fsync(fd)
    except OSError as error:
        if not force:
            os.unlink(path)
        if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"{path}: no room for a file of {size} bytes: {error.strerror}") from error
        raise
    finally:
        store.close()


def _mark_holes(bitmap: Bitmap, header: Header, path: str, base_format: str, unit: int) -> None:
    """Set the bits of aligned runs of zeros in the base, `unit` bytes each, rounded up to whole blocks."""
    if base_format == FVD_FORMAT:
        raise UsageError("--detect-holes needs a raw base")
    unit = round_up(unit, header.block_size)
    blocks = unit // header.block_size
    store = _open(path, writable=False)
    try:
        buffer = bytearray(unit)
        view = memoryview(buffer)
        zeros = bytes(unit)
        for first in range(0, header.blocks, blocks):
            count = min(unit, header.base_size - first * header.block_size)
            filled = store.pread_now(view[:count], first * header.block_size)
            if view[:filled] == zeros[:filled]:
                bitmap.set_local(first, min(first + blocks, header.blocks))
    finally:
        store.close()


def _open(path: str, *, writable: bool) -> HostFile:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return open_host_file(handle, path, writable=writable)
    finally:
        os.close(handle)
