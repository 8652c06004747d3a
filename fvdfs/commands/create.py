"""`fvdfs create`: make a new image. Blocks.

What it consists of, `image/making.py` says. With `--detect-holes` the bits of the base's zero runs are set, so that
nothing needs to be stored for them (format.md, "Bitmap").
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from fvdfs import daemon
from fvdfs.commands.base import BaseImage, inspect_base, open_base, refuse_changing
from fvdfs.commands.newfiles import NewFile, NewFiles
from fvdfs.commands.otherfiles import make_data_file, take_disk_of_server
from fvdfs.commands.profile import read_profile
from fvdfs.commands.sides import Side
from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.extents import Extents
from fvdfs.daemon import run_loop
from fvdfs.errors import UsageError
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import (
    DEFAULT_PROFILE_ROOM,
    HEADER_SPACE,
    SECTOR,
    Header,
    ceil_div,
    round_up,
)
from fvdfs.format.migration import NO_RECORD, Record
from fvdfs.format.profile import Extent
from fvdfs.image.making import NewImage, Part, Span, new_image
from fvdfs.image.policy import FVD_FORMAT, RAW_FORMATS
from fvdfs.image.reading import is_zero
from fvdfs.mountoptions import hint
from fvdfs.store.host import HostFile
from fvdfs.store.locations import is_local
from fvdfs.store.placing import fill
from fvdfs.store.references import LUKS, RAW

_ZEROS = bytes(1 << 20)

AUTO = "auto"
"""For --data-file: beside the image, with its name."""


def data_file_name(chosen: str, image: str) -> str:
    """The name of the data file that the user has chosen for this image."""
    return f"{os.path.basename(image)}.data" if chosen == AUTO else chosen


def run(image: str, size: int | None, options: CreateOptions, *, profile: str, force: bool, secret: str) -> int:
    """Make an image, and tell the user what to know about it. Raises as `create_image`."""
    if profile and not options.base_img:
        raise UsageError("--profile needs a base image: give --base")
    if secret and not options.base_img and options.data_file_fmt != LUKS:
        raise UsageError("--secret is for encrypted files: give --base, or --data-file with --data-format luks")
    if remark := never_appears(image):
        raise UsageError(remark)
    device = _data_path(image, options.data_file) if options.data_file else image
    if options.grow_command and not _is_device(device):
        raise UsageError("--grow-command makes a device larger: neither IMAGE nor --data-file is one")
    remarks = create_image(
        image,
        size,
        options,
        force=force,
        secret_file=secret,
        profile=read_profile(profile) if profile else (),
        read=[name for name in (profile, secret) if name],
    )
    for remark in remarks:
        daemon.complain(remark)
    return 0


def never_appears(image: str) -> str:
    """What to do where a new file has a name that no mount shows; empty where a mount does."""
    name = os.path.basename(image)
    if _is_device(image) or (name.endswith(".fvd") and name != ".fvd"):
        return ""
    return f"{image}: a mount shows files NAME.fvd only; add .fvd to the name, or rename the image later"


def create_image(
    path: str,
    virtual_size: int | None,
    options: CreateOptions,
    *,
    force: bool = False,
    secret_file: str = "",
    profile: Sequence[Extent] = (),
    read: Sequence[str] = (),
    record: Record = NO_RECORD,
) -> list[str]:
    """Make an image; remarks for the user. `virtual_size` in bytes, None: the base's; rounded up to a sector.

    `profile`: what is to be fetched first from the base once the image is opened. `read`: files that must not
    be overwritten, beside those of the base. `record`: what it says of moves.

    Raises UsageError for what cannot be, ImageBusy, OSError where the disk refuses. A file that exists, or a
    device that does not look empty, is overwritten only with `force`.
    """
    with NewFiles(force=force) as files:
        for name in read:
            files.protect_file(name)
        remarks = make_image(
            files, path, virtual_size, options, secret_file=secret_file, profile=profile, record=record
        )
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
    record: Record = NO_RECORD,
) -> list[str]:
    """`create_image`, but for the names of the files, which the caller publishes. On a device it is done at once."""
    new, base, options = plan_image(path, virtual_size, options, secret_file=secret_file, profile=profile)
    new = replace(new, record=record)
    for identity, name in base.files if base is not None else ():
        files.protect_identity(identity, name)
    header, size = new.header, new.header.virtual_disk_size
    data_path = _data_path(path, options.data_file) if options.data_file and is_local(options.data_file) else None
    _check_names(path, data_path, base, options)

    zeros = [(0, HEADER_SPACE), *((region.offset, region.size) for region in header.regions())]
    data_zeros = new.data_zeros()
    data_file = None
    if not options.data_file:
        zeros += [(header.metadata_size + at, size) for at, size in data_zeros]
    elif options.data_file_fmt not in RAW_FORMATS:
        make_data_file(files, data_path, options.data_file_fmt, header, data_zeros, secret_file)
    elif data_path is not None:
        data_file = files.add(data_path)
    image = files.add(path)
    files.look_at_images()
    if options.data_file and not is_local(options.data_file):
        url, force = options.data_file, files.force
        take_disk_of_server(path, url, new.data_size, data_zeros, secret_file, force=force)
    if data_file is not None:
        _fill(data_file, new.data_size, data_zeros, [], files.force)
    _fill(image, new.file_size, zeros, new.parts(), files.force)

    rounded = f"{path}: the disk gets {size} bytes, in whole sectors" if virtual_size not in (None, size) else None
    outside = [] if _is_device(path) else _outside(path, data_path, base, options)
    return [remark for remark in (rounded, *outside) if remark]


def plan_image(
    path: str,
    virtual_size: int | None,
    options: CreateOptions,
    *,
    secret_file: str = "",
    profile: Sequence[Extent] = (),
) -> tuple[NewImage, BaseImage | None, CreateOptions]:
    """The image that is to be made at `path`, its base, and the options with what follows from that.

    Raises UsageError, ImageBusy, OSError.
    """
    base = inspect_base(path, options.base_img, options.base_img_fmt, secret_file) if options.base_img else None
    if base is not None and not options.update_base:
        refuse_changing(base)
    options = _completed(options, base)
    new = new_image(_disk_size(virtual_size, base), base.length if base else None, options, profile)
    if base is not None and new.bitmap is not None and options.detect_holes:
        open_side = functools.partial(open_base, path, options.base_img, base.format, secret_file)
        run_loop(functools.partial(_mark_holes, new.bitmap, new.header, open_side, options.detect_holes))
    return new, base, options


def _disk_size(virtual_size: int | None, base: BaseImage | None) -> int:
    """Bytes of the disk: what was asked for, or else the base's, in whole sectors. Raises UsageError."""
    if virtual_size is not None:
        return round_up(virtual_size, SECTOR)
    if base is None:
        raise UsageError("say how large the disk shall be: fvdfs create IMAGE SIZE (or give --base)")
    return round_up(base.length, SECTOR)


def _completed(options: CreateOptions, base: BaseImage | None) -> CreateOptions:
    """The options with what follows from the base."""
    if base is not None and base.format == FVD_FORMAT:
        options = replace(options, base_img_fmt=FVD_FORMAT)
    if options.update_base and not options.base_img_fmt:
        options = replace(options, base_img_fmt=RAW)  # a guest is going to write its first bytes
    if base is not None and not options.profile_room:
        options = replace(options, profile_room=DEFAULT_PROFILE_ROOM)
    return options


def _data_path(path: str, data_file: str) -> str:
    return os.path.join(os.path.dirname(path), data_file)


def _check_names(path: str, data_path: str | None, base: BaseImage | None, options: CreateOptions) -> None:
    """Raise UsageError where names in the image would lead nowhere, or two of the files are one."""
    if _is_device(path):
        for name, option in ((options.base_img, "--base"), (options.data_file, "--data-file")):
            if name and not os.path.isabs(name):
                raise UsageError(f"{option} {name}: an image on a device has no folder; give an absolute name")
    files = {"IMAGE": path, "--data-file": data_path, "--base": base.path if base else None}
    real = {option: os.path.realpath(name) for option, name in files.items() if name is not None}
    if len(set(real.values())) != len(real):
        raise UsageError(f"{' and '.join(real)} must be different files")


def _outside(path: str, data_path: str | None, base: BaseImage | None, options: CreateOptions) -> list[str | None]:
    """Remarks on names that a mount with no options would refuse."""
    base_path = base.path if base else None
    return [leads_outside(path, options.base_img, base_path), leads_outside(path, options.data_file, data_path)]


def _is_device(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)


def leads_outside(image: str, name: str, target: str | None) -> str | None:
    """What to tell a user about a name that a mount with no options would refuse."""
    if target is None:
        return None
    folder = os.path.realpath(os.path.dirname(image) or ".")
    real = os.path.realpath(target)
    if os.path.commonpath([folder, real]) == folder:
        return None
    return f"{name} lies outside {folder}: a mount of it needs -o {hint('base_path', os.path.dirname(real))}"


def _fill(file: NewFile, size: int, zeros: Sequence[Span], parts: Sequence[Part], force: bool) -> None:
    """Give the file its size, sparse, or take a device; it holds the parts, and zeros in these ranges.

    The first part is what makes it an image: of a device it is written when all else is stable.
    """
    store = file.store
    try:
        if not file.is_device:
            fill(store.fileno(), size, parts)
            return
        file.check_room(size)
        if not force and _holds_something(store):
            raise UsageError(f"{file.path}: the device does not look empty; --force to overwrite it")
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


def _holds_something(device: HostFile) -> bool:
    first = bytearray(HEADER_SPACE)
    device.pread_now(memoryview(first), 0)
    return any(first)


async def _mark_holes(
    bitmap: Bitmap, header: Header, open_side: Callable[[], Awaitable[tuple[Side, bool]]], unit: int
) -> None:
    """Set the bits of aligned runs of zeros in the base, `unit` bytes each, rounded up to whole blocks.

    Holes are zeros that need not be read. Of a base on a server nothing is read. Raises ImageError, OSError.
    """
    unit, size = round_up(unit, header.block_size), header.base_size
    source, is_remote = await open_side()
    try:
        extents = Extents("--detect-holes", source.extent)
        at, step = 0, max(unit, len(_ZEROS) // unit * unit)
        while at < size:
            start = at
            at, hole = await extents.blocks(start, min(start + step, size), unit, size)
            found = [(start, at)] if hole else [] if is_remote else await _zero_units(source, start, at, unit)
            for begin, end in found:
                bitmap.set_local(begin // header.block_size, ceil_div(end, header.block_size))
    finally:
        await source.close()


async def _zero_units(source: Side, start: int, stop: int, unit: int) -> list[Span]:
    """The units [begin, end) of bytes [start, stop) that are zeros: one unit, or what may be read at once."""
    units = [(at, min(at + unit, stop)) for at in range(start, stop, unit)]
    if len(units) == 1:
        return units if await is_zero(source, start, stop) else []
    data = bytes(await source.read(start, stop - start)).ljust(stop - start, b"\0")
    return [(begin, end) for begin, end in units if data.startswith(_ZEROS[: end - begin], begin - start)]
