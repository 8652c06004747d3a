"""`fvdfs convert`: make an image with the content of another one, in any format.

Pieces of the source are read, several at a time, and written where the new image does not read so
already: zeros are not stored, and over a base only what differs from it is. Holes are not read, be they of the source
or of the base.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import trio

from fvdfs import daemon
from fvdfs.commands.create import make_image, never_appears
from fvdfs.commands.newfiles import NewFile, NewFiles, permissions
from fvdfs.commands.otherfiles import qemu_compress, qemu_create
from fvdfs.commands.profile import read_profile
from fvdfs.commands.sides import NamedSide, Side, StoreSide, stores_of
from fvdfs.commands.streams import INPUT, OUTPUT, STREAM, receive, send
from fvdfs.commands.terminal import progress_bar
from fvdfs.cow.extents import Extents
from fvdfs.cow.planner import Zeroes
from fvdfs.errors import ImageError, UsageError, leading, named
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import SECTOR, round_up
from fvdfs.format.profile import Extent
from fvdfs.image.image import Image
from fvdfs.image.loading import open_image, open_other
from fvdfs.image.policy import FVD_FORMAT, HostStore, Policy, format_by_name
from fvdfs.mountoptions import folders, listed, parse_mount_options
from fvdfs.store.base import Buffer
from fvdfs.store.host import open_path
from fvdfs.store.locations import is_local, parse_location
from fvdfs.store.qemu_store import QemuStore, host_files
from fvdfs.store.references import BASE_FORMATS, PROBE_SIZE, detect

PIECE = 1 << 20  # bytes that are read at a time
UNIT = 64 << 10  # bytes that are compared, and written or not
WORKERS = 4  # pieces under way; a slow source is kept busy while others are compared and written
_ZEROS = bytes(PIECE)
Progress = Callable[[int, int], None]
"""Is told the bytes done, and those in all."""
QEMU_TARGETS = ("qcow2", "vdi", "vmdk", "vhdx", "vpc", "qed")


def run(
    source: str,
    target: str,
    *,
    source_format: str,
    target_format: str,
    layout: CreateOptions,
    options: Sequence[str],
    force: bool,
    secret: str,
    profile: str = "",
    compress: bool = False,
) -> int:
    """Convert, with a progress bar, and tell the user what to know about it. Raises as `convert`."""
    permission = permitted(options, secret)
    if profile and not layout.base_img:
        raise UsageError("--profile needs a base image: give --base")
    with progress_bar() as progress:
        work = functools.partial(
            convert,
            source,
            target,
            source_format=source_format,
            target_format=target_format,
            options=layout,
            force=force,
            permission=permission,
            progress=progress,
            profile=profile,
            compress=compress,
        )
        remarks = daemon.run_loop(work)
    if target_format == FVD_FORMAT and (remark := never_appears(target)):
        remarks.append(remark)
    for remark in remarks:
        daemon.complain(remark)
    return 0


def format_of_name(path: str) -> str:
    """The format that a new file's name asks for."""
    ending = os.path.splitext(path)[1].lstrip(".").lower()
    return ending if ending in (FVD_FORMAT, *QEMU_TARGETS) else "raw"


def exists(path: str) -> bool:
    """Whether there is a file of this name. May block the event loop: this tool does nothing else."""
    return os.path.exists(path)


@dataclass(frozen=True, slots=True)
class Permission:
    """Where names inside images may lead, beside the folder of the image, and the file with its passphrase."""

    roots: tuple[str, ...] = ()
    allowed_urls: tuple[str, ...] = ()
    secret_file: str = ""

    def policy(self, *names: str) -> Policy:
        """For an image that the user named: its names may lead into its folder, and to what else was named here."""
        roots, urls = list(self.roots), list(self.allowed_urls)
        for name in names:
            location = parse_location(name)
            if exists(name) or location.path is not None:
                path = name if exists(name) else str(location.path)
                roots += [os.path.realpath(os.path.dirname(path) or "."), os.path.realpath(path)]
            else:
                urls.append(location.url)
        return Policy(roots=tuple(roots), allowed_urls=tuple(urls), secret_file=self.secret_file)


def permitted(options: Sequence[str], secret: str) -> Permission:
    """What -o of a command, and its --secret, permit. Raises UsageError."""
    allowed = parse_mount_options(options, ("base_path", "allow_url"))
    return Permission(folders(allowed), listed(allowed, "allow_url"), secret_file=secret)


async def open_source(name: str, file_format: str, permission: Permission) -> tuple[Side, list[str]]:
    """Open the source, and lock it for reading; also remarks for the user.

    Raises UsageError, ImageError, OSError.
    """
    if is_local(name):
        await trio.to_thread.run_sync(os.stat, name)
    remarks: list[str] = []
    looks_like: str | None = None
    if not file_format and exists(name):
        file_format, looks_like = format_by_name(name)
    if file_format == FVD_FORMAT:
        policy = replace(permission.policy(name), writable=False)
        return await open_image(name, policy), remarks
    if file_format in ("", "raw") and exists(name):
        store: HostStore = open_path(name, writable=False)
    else:
        stated = file_format or parse_location(name).format
        store = await open_other(name, stated or "raw", permission.policy(name), writable=False)
    try:
        await trio.to_thread.run_sync(store.lock, False)
        side = StoreSide(store, round_up(await store.size(), SECTOR))
        if isinstance(store, QemuStore) and not stated:
            looks_like = detect(bytes(await side.read(0, PROBE_SIZE)))
        if looks_like:
            remarks.append(f"{name} looks like {looks_like}, but is read as raw; if that is wrong: -f {looks_like}")
        return side, remarks
    except BaseException:
        with trio.CancelScope(shield=True):
            await store.aclose()
        raise


async def open_target(
    files: NewFiles,
    path: str,
    file_format: str,
    size: int,
    options: CreateOptions,
    permission: Permission,
    profile: Sequence[Extent] = (),
) -> tuple[Side, list[str]]:
    """Make a new image of `size` bytes and open it; also remarks. Raises UsageError, ImageError, OSError."""
    if file_format == FVD_FORMAT:
        return await _open_fvd_target(files, path, size, options, permission, profile)
    if options != CreateOptions():
        raise UsageError(f"{path}: options of FVD images do not go with the format {file_format}")
    if file_format not in ("raw", *QEMU_TARGETS):
        known = ", ".join(("raw", FVD_FORMAT, *QEMU_TARGETS))
        raise UsageError(f"--target-format {file_format}: can make {known}")
    if exists(path) and not files.force:
        raise UsageError(f"{path} exists already; choose another name, or --force to overwrite it")
    file = await trio.to_thread.run_sync(files.add, path)
    await trio.to_thread.run_sync(files.look_at_images)
    if file_format == "raw":
        await trio.to_thread.run_sync(_make_raw, file, size)
        return StoreSide(file.store, size, keep_open=True), []
    await trio.to_thread.run_sync(file.let_go)
    await trio.to_thread.run_sync(qemu_create, file, file_format, size)
    name = os.path.join(os.path.dirname(path), os.path.basename(path))
    policy = Policy(unnamed=((name, file.place),))
    return StoreSide(await open_other(name, file_format, policy, writable=True), size), []


async def _open_fvd_target(
    files: NewFiles, path: str, size: int, options: CreateOptions, permission: Permission, profile: Sequence[Extent]
) -> tuple[Image, list[str]]:
    make = functools.partial(
        make_image, files, path, size, options, secret_file=permission.secret_file, profile=profile
    )
    remarks = await trio.to_thread.run_sync(make)
    base = options.base_img
    if base and is_local(base):
        base = os.path.join(os.path.dirname(path), base)
    policy = permission.policy(path, *([base] if base else []))
    roots = policy.roots + tuple(os.path.dirname(file.final) for file in files.files)
    policy = replace(policy, roots=roots, unnamed=files.unnamed, zeroes=Zeroes.ON)
    for file in files.files:
        await trio.to_thread.run_sync(file.let_go)
    return await open_image(path, policy, write=True), remarks


def _make_raw(file: NewFile, size: int) -> None:
    if not file.is_device:
        os.ftruncate(file.store.fileno(), size)
        return
    file.check_room(size)
    file.store.zero_now(0, size)


async def copy(source: Side, target: Side, progress: Progress, *, over_base: bool) -> None:
    """Make the target's content the source's; the target is new, and at least as large.

    `over_base`: whether a new target holds anything else than zeros. Raises ImageError, OSError.
    """
    extents = [Extents("convert", side.extent) for side in ((source, target) if over_base else (source,))]
    size = source.size
    looking = trio.Lock()
    at = 0

    async def next_piece() -> tuple[int, int, list[bool]]:
        """The next part of the disk to look into, empty where there is none, and whether each side has a hole there."""
        nonlocal at
        async with looking:
            start, holes = at, [True]
            while all(holes) and at < size:
                limit = min(at + PIECE, size)
                found = [await side.blocks(at, limit, UNIT, size) for side in extents]
                holes = [hole for _, hole in found]
                start, at = at, min(end for end, _ in found)
                progress(at, size)
            return (start, at, holes) if not all(holes) else (size, size, holes)

    async def read(side: Side, known: Extents, start: int, length: int) -> Buffer:
        began = trio.current_time()
        data = await side.read(start, length)
        if len(data) < length:
            raise ImageError("source", f"it ends at {start + len(data)} bytes")
        known.was_read(length, trio.current_time() - began)
        return data

    async def work() -> None:
        while True:
            start, stop, holes = await next_piece()
            if start >= stop:
                return
            length = stop - start
            data = await read(source, extents[0], start, length) if not holes[0] else bytes(length)
            old = await read(target, extents[1], start, length) if not all(holes[1:]) else _ZEROS
            for begin, end in _differences(data, old):
                await target.write(start + begin, memoryview(data)[begin:end])
            await trio.lowlevel.checkpoint()

    await in_workers(work)
    await target.fsync()


async def in_workers(work: Callable[[], Awaitable[None]]) -> None:
    """Run `WORKERS` of them side by side. Raises the one error that all of theirs come to."""
    error: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(work)
    except BaseExceptionGroup as group:
        error = leading(group)
    if error is not None:
        raise error


def _differences(data: Buffer, old: Buffer) -> list[tuple[int, int]]:
    """The parts of `data`, in whole units, that differ from `old`, adjacent ones joined.

    Not by comparing memoryviews, which takes a hundred times as long.
    """
    parts: list[tuple[int, int]] = []
    for start in range(0, len(data), UNIT):
        stop = min(start + UNIT, len(data))
        if bytes(data[start:stop]) == bytes(old[start:stop]):
            continue
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], stop)
        else:
            parts.append((start, stop))
    return parts


async def convert(
    source_name: str,
    target_name: str,
    *,
    source_format: str,
    target_format: str,
    options: CreateOptions,
    force: bool,
    permission: Permission,
    progress: Progress,
    profile: str = "",
    compress: bool = False,
) -> list[str]:
    """Make `target_name` an image with the content of `source_name`; remarks for the user.

    An empty source format: by its name (`format_by_name`), and so an empty target format. Raises UsageError,
    ImageError, OSError; what had the target's name is then still there, but a device then holds no image.
    """
    if source_format and source_format not in BASE_FORMATS:
        raise UsageError(f"--source-format {source_format}: is not known; known are {', '.join(BASE_FORMATS)}")
    if source_name == STREAM and source_format not in ("", "raw"):
        raise UsageError(f"--source-format {source_format}: {INPUT} is raw; name a file")
    if target_name == STREAM and target_format not in ("", "raw"):
        raise UsageError(f"--target-format {target_format}: {OUTPUT} gets a raw disk; name a file")
    if compress and (target_name == STREAM or not is_local(target_name)):
        raise UsageError("--compress: is for new images of the format qcow2")
    with contextlib.ExitStack() as stack:
        if source_name == STREAM:
            folder = os.path.dirname(target_name) if is_local(target_name) and target_name != STREAM else ""
            descriptor = await receive(folder)
            stack.callback(os.close, descriptor)
            source, remarks = await open_source(f"/proc/self/fd/{descriptor}", "raw", permission)
            source_name = INPUT
        else:
            with named(source_name):
                source, remarks = await open_source(source_name, source_format, permission)
        return remarks + await _convert(
            source,
            source_name,
            target_name,
            target_format,
            options=options,
            force=force,
            permission=permission,
            progress=progress,
            profile=profile,
            compress=compress,
        )


async def _convert(
    source: Side,
    source_name: str,
    target_name: str,
    target_format: str,
    *,
    options: CreateOptions,
    force: bool,
    permission: Permission,
    progress: Progress,
    profile: str,
    compress: bool,
) -> list[str]:
    """As `convert`, with an open source, which is closed."""
    remarks = [] if source.size else [f"{source_name}: is empty"]
    try:
        if target_name == STREAM:
            if options != CreateOptions():
                raise UsageError(f"{OUTPUT}: options of FVD images do not go with the format raw")
            await send(NamedSide(source, source_name), progress)
            return remarks
        if not is_local(target_name):
            return remarks + await _to_server(
                NamedSide(source, source_name), target_name, target_format, options, force, permission, progress
            )
        stores = stores_of(source)
        held = [file for store in stores for file in host_files(store)]
        with NewFiles(force=force, mode=permissions(held)) as files:
            files.protect(stores)
            if permission.secret_file:
                files.protect_file(permission.secret_file)
            target_format = target_format or format_of_name(target_name)
            if compress:
                await _compressed(source, files, target_name, target_format, options, progress)
                await trio.to_thread.run_sync(files.publish)
                return remarks
            if profile:
                files.protect_file(profile)
            extents = await trio.to_thread.run_sync(read_profile, profile) if profile else ()
            target, more = await open_target(
                files, target_name, target_format, source.size, options, permission, extents
            )
            on_device = files.files[-1].is_device
            await _fill(NamedSide(source, source_name), target, target_name, progress, on_device=on_device)
            await trio.to_thread.run_sync(files.publish)
    finally:
        with trio.CancelScope(shield=True):
            await source.close()
    return remarks + more


async def _compressed(
    source: Side, files: NewFiles, path: str, file_format: str, options: CreateOptions, progress: Progress
) -> None:
    """Make a new file a compressed qcow2 image: qemu-img does it, of one without a name. Raises UsageError, OSError."""
    if file_format != "qcow2" or options != CreateOptions():
        raise UsageError(f"--compress: is for new images of the format qcow2, and {path} is none; name it NAME.qcow2")
    if exists(path) and not files.force:
        raise UsageError(f"{path} exists already; choose another name, or --force to overwrite it")
    file = await trio.to_thread.run_sync(files.add, path)
    await trio.to_thread.run_sync(files.look_at_images)
    if file.is_device:
        raise UsageError(f"{path}: is a device; a compressed image needs a file")
    with tempfile.TemporaryFile(dir=os.path.dirname(path) or ".", buffering=0) as spool:
        place = f"/proc/{os.getpid()}/fd/{spool.fileno()}"
        size = source.size
        await trio.to_thread.run_sync(os.truncate, place, size)
        store = open_path(place, writable=True)
        try:
            await copy(source, NamedSide(StoreSide(store, size), path), progress, over_base=False)
        finally:
            store.close()
        await qemu_compress(file, place, functools.partial(_of_share, progress, size))


def _of_share(progress: Progress, size: int, share: float) -> None:
    progress(int(size * share), size)


async def _to_server(
    source: Side,
    url: str,
    file_format: str,
    options: CreateOptions,
    force: bool,
    permission: Permission,
    progress: Progress,
) -> list[str]:
    """Make what a server gives at a URL the disk, where it is not so already; remarks.

    Raises UsageError, ImageError, OSError.
    """
    if not parse_location(url).is_device:
        raise UsageError(
            f"{url}: a new image must be a file or a device of this host, or what an NBD server gives: nbd://…"
        )
    if file_format not in ("", "raw") or options != CreateOptions():
        raise UsageError(f"{url}: what a server gives is raw, and has no options of FVD images")
    if not force:
        raise UsageError(f"{url}: exists already; --force to overwrite it")
    store = await open_other(url, "raw", permission.policy(url), writable=True)
    target = StoreSide(store, await store.size())
    try:
        if target.size < source.size:
            raise UsageError(f"{url}: has {target.size} bytes, {source.size} are needed")
        await copy(source, NamedSide(target, url), progress, over_base=True)
    finally:
        with trio.CancelScope(shield=True):
            await target.close()
    more = target.size - source.size
    return [f"{url}: has {more} bytes more than the disk, which are left alone"] if more else []


async def _fill(source: Side, target: Side, name: str, progress: Progress, *, on_device: bool) -> None:
    """Copy, and close the target, which is whole then. Raises ImageError, OSError."""
    header = b""
    try:
        if isinstance(target, Image) and on_device:
            header = await _withhold_header(target)
        over_base = isinstance(target, Image) and target.bitmap is not None
        await copy(source, NamedSide(target, name), progress, over_base=over_base)
    except BaseException:
        with trio.CancelScope(shield=True):
            await _give_up(target)
        raise
    with trio.CancelScope(shield=True), named(name):
        await target.close()
    if header:
        await trio.to_thread.run_sync(_restore_header, name, header)


async def _withhold_header(image: Image) -> bytes:
    """Blank the first sector of an image on a device while it is filled, and return it. Raises OSError."""
    first = bytearray(SECTOR)
    await image.meta.pread(memoryview(first), 0)
    await image.meta.pwrite(bytes(SECTOR), 0)
    await image.meta.flush()
    return bytes(first)


def _restore_header(path: str, first: bytes) -> None:
    store = open_path(path, writable=True)
    try:
        os.fsync(store.fileno())
        store.pwrite_now(first, 0)
        os.fsync(store.fileno())
    finally:
        store.close()


async def _give_up(target: Side) -> None:
    """Close a target that will be discarded."""
    if isinstance(target, Image):
        target.writable = False  # nothing is committed
    with contextlib.suppress(OSError):
        await target.close()
