"""Making new images: what `fvdfs create` does, as functions that block.

The header is what the original writes for the same options (`header.new_header`); behind it stand an
empty bitmap, table and journal. With `--detect-holes` the bits of the base's zero runs are set, so
that nothing needs to be stored for them (format.md, "Bitmap").
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from fvdfs.alloc.table import new_table
from fvdfs.commands.newfiles import NewFile, NewFiles, host_files
from fvdfs.cow.bitmap import Bitmap, bitmap_bytes
from fvdfs.errors import ImageError, UnstatedFormat, UsageError
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import (
    DEFAULT_PROFILE_ROOM,
    HEADER_SIZE,
    HEADER_SPACE,
    PAGE,
    SECTOR,
    Header,
    Region,
    ceil_div,
    round_up,
    with_fields,
)
from fvdfs.format.profile import Extent, encode
from fvdfs.image.chain import MAX_REGION, open_chain
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS, Policy, unstated_format
from fvdfs.mountoptions import hint
from fvdfs.store.base import Store
from fvdfs.store.host import HostFile, open_path
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import RAW

_ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class BaseImage:
    """What creation has to know of a base."""

    path: str | None
    """None: a URL, or a format whose files are not looked at here."""
    length: int
    format: str
    """What it is."""
    files: list[tuple[tuple[int, int], str]]
    """What must not be overwritten: identity and name of each file of this host that it is made of."""


def inspect_base(image: str, name: str, base_format: str, secret_file: str = "") -> BaseImage:
    """The base that `name` means in an image at `image`.

    Raises UsageError where there is none, or its format is not one that can be read.
    """
    path = os.path.join(os.path.dirname(image), name)
    try:
        if not is_local(name) or base_format not in (*RAW_FORMATS, FVD_FORMAT):
            secret = os.path.abspath(secret_file) if secret_file else ""
            return trio.run(_inspect_other, image, name, base_format, secret)
        if not base_format:
            base_format, looks_like = unstated_format(path)
            if looks_like:
                raise _unstated(name, looks_like)
        if base_format == FVD_FORMAT:
            chain = open_chain(path, Policy(writable=False))
            try:
                size = chain.layers[0].header.virtual_disk_size
                return BaseImage(path, size, base_format, _identities(chain.stores()))
            finally:
                for store in chain.stores():
                    store.close()
        store = open_path(path, writable=False)
        try:
            return BaseImage(path, store.size_now(), base_format, _identities([store]))
        finally:
            store.close()
    except OSError as error:
        hint = ""
        if not os.path.isabs(name) and os.path.exists(name):
            hint = "; a name is relative to the folder of the new image, not to where you are"
        raise UsageError(f"--base {name}: {path}: {error.strerror}{hint}") from error
    except UnstatedFormat as error:
        if error.image != image:  # an image further down
            raise UsageError(f"--base {name}: {error}") from error
        raise _unstated(name, error.looks_like) from error
    except ImageError as error:
        raise UsageError(f"--base {name}: {error}") from error


def _unstated(name: str, looks_like: str) -> UsageError:
    return UsageError(f"--base {name}: looks like {looks_like}; say what it is: --base-format {looks_like}, or raw")


def _identities(stores: Sequence[Store]) -> list[tuple[tuple[int, int], str]]:
    return [(file.identity, file.name) for store in stores for file in host_files(store)]


def create_image(
    path: str,
    virtual_size: int | None,
    options: CreateOptions,
    *,
    force: bool = False,
    secret_file: str = "",
    profile: Sequence[Extent] = (),
    read: Sequence[str] = (),
) -> list[str]:
    """Make an image; remarks for the user. `virtual_size` in bytes, None: the base's; rounded up to a sector.

    `profile`: what is to be fetched first from the base once the image is opened. `read`: files that must not
    be overwritten, beside those of the base.

    Raises UsageError for what cannot be, ImageBusy, OSError where the disk refuses. A file that exists, or a
    device that does not look empty, is overwritten only with `force`.
    """
    with NewFiles(force=force) as files:
        for name in read:
            files.protect_file(name)
        remarks = make_image(files, path, virtual_size, options, secret_file=secret_file, profile=profile)
        files.publish()
        return remarks


def make_image(
    files: NewFiles,
    path: str,
    virtual_size: int | None,
    options: CreateOptions,
    *,
    secret_file: str = "",
    profile: Sequence[Extent] = (),
) -> list[str]:
    """`create_image`, but for the names of the files, which the caller publishes. On a device it is done at once."""
    remarks = []
    base = None
    if options.base_img:
        base = inspect_base(path, options.base_img, options.base_img_fmt, secret_file)
        if base.format == FVD_FORMAT:
            options = dataclasses.replace(options, base_img_fmt=FVD_FORMAT)
        for identity, name in base.files:
            files.protect_identity(identity, name)
    if virtual_size is None:
        if base is None:
            raise UsageError("say how large the disk shall be: fvdfs create IMAGE SIZE (or give --base)")
        virtual_size = base.length
    elif virtual_size % SECTOR:
        remarks.append(f"{path}: the disk gets {round_up(virtual_size, SECTOR)} bytes, in whole sectors")
    virtual_size = round_up(virtual_size, SECTOR)
    other_data = bool(options.data_file) and (
        options.data_file_fmt not in RAW_FORMATS or not is_local(options.data_file)
    )
    if options.update_base and not options.base_img_fmt:
        options = dataclasses.replace(options, base_img_fmt=RAW)  # a guest is going to write its first bytes
    if base is not None and not options.profile_room:
        options = dataclasses.replace(options, profile_room=DEFAULT_PROFILE_ROOM)
    header = new_header(virtual_size, base.length if base else None, options)
    for region in header.regions():
        if region.size > MAX_REGION:
            remedy = "--block-size" if region.name == "bitmap" else "--chunk-size or a smaller --journal-size"
            raise UsageError(f"the {region.name} would take {region.size} bytes: choose a larger {remedy}")
    profile_data = b""
    if profile:
        room = header.profile_room
        profile_data, entries = encode(profile, PAGE, room.size)
        header = with_fields(
            header,
            prefetch_profile_offset=room.offset,
            prefetch_profile_entries=entries,
            profile_directed_prefetch_start_delay=0,
        )
    raw = header.encode().ljust(round_up(HEADER_SIZE, SECTOR), b"\0")
    bitmap = None
    if base:
        bitmap = Bitmap(bytes(bitmap_bytes(header.blocks)), header.blocks)
        if options.detect_holes:
            if base.path is None or options.base_img_fmt == FVD_FORMAT:
                raise UsageError("--detect-holes needs a raw base")
            _mark_holes(bitmap, header, base.path, options.detect_holes)

    on_device = _is_device(path)
    if on_device:
        for name, option in ((options.base_img, "--base"), (options.data_file, "--data-file")):
            if name and not os.path.isabs(name):
                raise UsageError(f"{option} {name}: an image on a device has no folder; give an absolute name")
    data_path = None
    if options.data_file and is_local(options.data_file):
        data_path = os.path.join(os.path.dirname(path), options.data_file)
    _refuse_overlap(path, data_path, base)
    for name, target in ((options.base_img, base.path if base else None), (options.data_file, data_path)):
        remark = _leads_outside(path, name, target)
        if remark and not on_device:
            remarks.append(remark)

    holes = _zero_ranges(header, bitmap)
    metadata = [Region("header", 0, HEADER_SPACE), *header.regions()]
    parts = [(0, raw), *_metadata(header, bitmap)]
    if profile_data:
        parts.append((header.prefetch_profile_offset, profile_data))
    zeros = [(r.offset, r.size) for r in metadata]
    size = header.metadata_size
    if not options.data_file:
        zeros += [(header.metadata_size + at, size) for at, size in holes]
        size += _data_size(header)
    elif other_data:
        _make_other(files, data_path, options.data_file_fmt, header.virtual_disk_size)
    else:
        assert data_path is not None
        _fill(files.add(data_path), _data_size(header), holes, [], files.force)
    _fill(files.add(path), size, zeros, parts, files.force)
    return remarks


def _is_device(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)


def _leads_outside(image: str, name: str, target: str | None) -> str | None:
    """What to tell a user about a name that a mount with no options would refuse."""
    if target is None:
        return None
    folder = os.path.realpath(os.path.dirname(image) or ".")
    real = os.path.realpath(target)
    if os.path.commonpath([folder, real]) == folder:
        return None
    return f"{name} lies outside {folder}: a mount of it needs -o {hint('base_path', os.path.dirname(real))}"


def _data_size(header: Header) -> int:
    """Bytes of data that a new image has at once: the whole disk, sparse, where no table grows it."""
    return 0 if header.compact else header.virtual_disk_size


def _zero_ranges(header: Header, bitmap: Bitmap | None) -> list[tuple[int, int]]:
    """The parts (start, size) of the data that are read before they are written, and so have to be zeros.

    All that lies past the base's range, and blocks that count as local from the start (need_zero_init).
    Chunks are zeroed when they are allocated.
    """
    if header.compact:
        return []
    ranges = []
    if bitmap is not None:
        for first, end, local in bitmap.runs(0, header.blocks):
            if local:
                start = first * header.block_size
                ranges.append((start, min(end * header.block_size, header.base_size) - start))
    ranges.append((header.base_size, header.virtual_disk_size - header.base_size))
    return ranges


def _metadata(header: Header, bitmap: Bitmap | None) -> list[tuple[int, bytes]]:
    parts = []
    if bitmap is not None:
        parts += [(header.bitmap_offset + number * PAGE, page) for number, page in bitmap.take_dirty_pages()]
    if header.compact:
        parts.append((header.table_offset, new_table(header.chunks)))
    return parts


def _refuse_overlap(path: str, data_path: str | None, base: BaseImage | None) -> None:
    files = {"IMAGE": path, "--data-file": data_path, "--base": base.path if base else None}
    real = {option: os.path.realpath(name) for option, name in files.items() if name is not None}
    if len(set(real.values())) != len(real):
        raise UsageError(f"{' and '.join(real)} must be different files")


def _fill(
    file: NewFile, size: int, zeros: Sequence[tuple[int, int]], parts: Sequence[tuple[int, bytes]], force: bool
) -> None:
    """Give the file its size, sparse, or take a device; it holds the parts, and zeros in these ranges.

    The first part is what makes it an image: of a device it is written when all else is stable.
    """
    store = file.store
    try:
        if not file.is_device:
            os.ftruncate(store.fileno(), size)
            for offset, data in parts:
                store.pwrite_now(data, offset)
            return
        _look_at_device(store, size, force)
        for offset, length in zeros:
            store.zero_now(offset, length)
        for part in (parts[1:], parts[:1]):
            os.fsync(store.fileno())
            for offset, data in part:
                store.pwrite_now(data, offset)
        os.fsync(store.fileno())
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"{file.path}: no room for a file of {size} bytes: {error.strerror}") from error
        raise OSError(error.errno, f"{file.path}: {error.strerror}") from error


def _look_at_device(store: HostFile, size: int, force: bool) -> None:
    have = store.size_now()
    if have < size:
        raise UsageError(f"{store.name}: the device has {have} bytes, {size} are needed")
    first = bytearray(min(have, HEADER_SPACE))
    store.pread_now(memoryview(first), 0)
    if any(first) and not force:
        raise UsageError(f"{store.name}: the device does not look empty; --force to overwrite it")


async def _inspect_other(image: str, name: str, file_format: str, secret_file: str) -> BaseImage:
    """A base that QEMU opens. Raises ImageError, UsageError, OSError."""
    policy = Policy(allowed_urls=("",), secret_file=secret_file)
    store = QemuStore(image, "base_img", name, file_format, policy, writable=False)
    try:
        await store.start()
        return BaseImage(None, await store.size(), file_format, _identities([store]))
    finally:
        await store.aclose()


def _make_other(files: NewFiles, path: str | None, file_format: str, size: int) -> None:
    """Make a data file of another format, which must not exist yet."""
    if path is None:
        raise UsageError("--data-file: what is made together with the image must be a file or a device of this host")
    if os.path.lexists(path):
        raise UsageError(f"--data-file {path} exists already; choose another name, or remove it")
    try:
        qemu_create(files.add(path), file_format, size)
    except UsageError as error:
        raise UsageError(f"--data-file: {error}") from None


def qemu_create(file: NewFile, file_format: str, size: int) -> None:
    """Make a new file an image of a format of QEMU's. Raises UsageError."""
    command = ["qemu-img", "create", "-q", "-f", file_format, "--", file.place, str(size)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        raise UsageError("qemu-img is missing: install the package qemu-utils") from None
    except subprocess.CalledProcessError as error:
        said: str = os.fsdecode(error.stderr).strip().replace(file.place, file.path)
        raise UsageError(said or f"qemu-img ended with exit code {error.returncode}") from None


def _mark_holes(bitmap: Bitmap, header: Header, path: str, unit: int) -> None:
    """Set the bits of aligned runs of zeros in the base, `unit` bytes each, rounded up to whole blocks.

    Holes are zeros that need not be read.
    """
    unit = round_up(unit, header.block_size)
    store = open_path(path, writable=False)
    try:
        store.lock(exclusive=False)
        at, size = 0, header.base_size
        while at < size:
            data = store.next_data_now(at, size)
            stop = size if data == size else data // unit * unit
            if at < stop:
                bitmap.set_local(at // header.block_size, ceil_div(stop, header.block_size))
                at = stop
                continue
            stop = min(at + unit, size)
            if _is_zero(store, data, stop):
                bitmap.set_local(at // header.block_size, ceil_div(stop, header.block_size))
            at = stop
    finally:
        store.close()


def _is_zero(store: HostFile, start: int, stop: int) -> bool:
    buffer = bytearray(min(len(_ZEROS), stop - start))
    with memoryview(buffer) as view:
        while start < stop:
            count = store.pread_now(view[: stop - start], start)
            if not count:
                return True
            if not _ZEROS.startswith(view[:count]):
                return False
            start = store.next_data_now(start + count, stop)
    return True
