"""`fvdfs clone`: new disks that start as a template, any number of them. Blocks.

All clones have the same content until somebody writes to one: a header, and the profile. So the template is looked at
once, and the same bytes go to each file. They get their names together (`NewFiles`): all of them, or none.

Blocks are of 4 KiB at least, the unit in which guests write: then few writes have to read of the template what they do
not cover, and the bitmap of an open clone, of which a host has many, takes 0.6 MB for 20 GiB at most.

A clone stands on the template itself, reads each of its blocks once, and fetches the rest by and by; or, where the
folder has a cache of the template (`_find_cache`), on that, which does the same once for all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fvdfs import daemon, xattrs
from fvdfs.commands.base import BaseImage, inspect_base, refuse_changing
from fvdfs.commands.create import leads_outside
from fvdfs.commands.newfiles import NewFiles
from fvdfs.commands.profile import profile_of_image, read_profile
from fvdfs.errors import FvdError, UsageError, printable
from fvdfs.format.creation import CreateOptions, default_block_size
from fvdfs.format.header import DEFAULT_PROFILE_ROOM, PAGE, SECTOR, Header, round_up
from fvdfs.format.profile import Extent
from fvdfs.image.chain import top_layer
from fvdfs.image.making import new_image
from fvdfs.image.policy import FVD_FORMAT, Policy, resolve
from fvdfs.image.tree import identity_at
from fvdfs.store.locations import is_local, parse_location
from fvdfs.store.placing import fill

PREFETCH_DELAY = 60  # seconds after the opening, in which a machine starts
PROFILE_SUFFIX = ".profile"  # of a file beside the template, as `fvdfs profile show` prints it
CACHE_ENDING = "cache.fvd"
"""How the file of the host's cache is named. Nothing else tells it from a clone, which a guest has written to."""
_DIGITS = 4  # of a clone's number, at least


def run(
    template: str,
    names: Sequence[str],
    *,
    count: int | None,
    into: str,
    base_format: str,
    profile: str,
    secret: str,
) -> int:
    """Make clones, all or none, and tell the user what to know about them. Raises UsageError, ImageBusy, OSError."""
    paths = clone_paths(names, count, into)
    files = NewFiles(force=False)
    try:
        with files:
            remarks = _write_clones(files, paths, template, base_format, profile, secret)
            files.publish()
    except KeyboardInterrupt:
        daemon.complain(f"interrupted: {len(paths) if files.have_names else 0} of {len(paths)} clones were made")
        raise
    for remark in remarks:
        daemon.complain(remark)
    return 0


def clone_paths(names: Sequence[str], count: int | None, into: str) -> list[str]:
    """The paths of the new images. Raises UsageError where they are not different files of one folder."""
    if count is not None:
        if len(names) != 1:
            raise UsageError(f"-n {count} numbers the clones of one NAME; {len(names)} are given")
        digits = max(_DIGITS, len(str(count)))
        stem = names[0].removesuffix(".fvd")
        names = [f"{stem}-{number:0{digits}}" for number in range(1, count + 1)]
    paths = [os.path.join(into, name.removesuffix(".fvd") + ".fvd") for name in names]
    for path in paths:
        if os.path.basename(path) == ".fvd":
            raise UsageError(f"{path}: is not a name of an image")
        if os.path.dirname(path) != os.path.dirname(paths[0]):
            raise UsageError(f"{paths[0]} and {path}: clones that are made together lie in one folder")
    if len(set(paths)) != len(paths):
        raise UsageError(f"{next(path for path in paths if paths.count(path) > 1)}: is named twice")
    folder = os.path.dirname(paths[0]) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: is not a directory; make it first")
    return paths


def _write_clones(
    files: NewFiles, paths: Sequence[str], template: str, base_format: str, profile: str, secret: str
) -> list[str]:
    """Write all clones; remarks for the user. Raises UsageError, ImageBusy, ImageError, OSError."""
    plan = plan_clones(os.path.dirname(paths[0]), template, base_format, profile, secret)
    new = new_image(round_up(plan.length, SECTOR), plan.length, plan.options, plan.profile)
    size, parts = new.file_size, new.parts()
    for path in filter(os.path.lexists, paths):
        raise UsageError(f"{path} exists already; choose another name")
    for path in paths:
        file = files.add(path)
        try:
            fill(file.store.fileno(), size, parts)
            files.written(file)
        except OSError as error:
            raise OSError(error.errno, f"{path}: {error.strerror}; none of {len(paths)} clones was made") from error
    return plan.remarks


@dataclass(frozen=True, slots=True)
class Plan:
    """What clones in a folder are."""

    options: CreateOptions
    length: int
    """Bytes of the template."""
    profile: list[Extent]
    remarks: list[str]
    """For the user."""


def plan_clones(folder: str, template: str, base_format: str, profile: str, secret: str) -> Plan:
    """What clones of the template in this folder have to be. Raises UsageError, ImageBusy, ImageError, OSError."""
    image = os.path.join(folder, "clone.fvd")  # where one would be: names in images are relative to their folder
    name = _name_in_image(template, folder)
    try:
        base = inspect_base(image, name, base_format, secret)
    except UsageError as error:
        why = str(error).removeprefix(f"--base {printable(name)}: ")
        raise UsageError(why if why.startswith(template) else f"{template}: {why}") from error
    place = resolve(image, name) if is_local(name) else ""
    refuse_changing(base)
    options = CreateOptions(
        base_img=name,
        base_img_fmt=base.format,
        block_size=max(PAGE, default_block_size(round_up(base.length, SECTOR))),
        profile_room=DEFAULT_PROFILE_ROOM,
    )
    if cache := _find_cache(folder, base, name):
        options = replace(options, base_img=os.path.basename(cache), base_img_fmt=FVD_FORMAT)
        remarks = [f"{cache}: is a cache of {template}; the clones stand on it"]
    else:
        options = replace(options, copy_on_read=True, prefetch_delay=PREFETCH_DELAY)
        remarks = [remark for remark in (leads_outside(image, name, base.path),) if remark]
    extents = read_profile(profile) if profile else [] if cache else _profile_of(place, base.format)
    return Plan(options, base.length, extents, remarks)


def _name_in_image(template: str, folder: str) -> str:
    """How images in the folder name the template: relative to the folder where it lies in there. Raises UsageError."""
    if not is_local(template):
        return template
    with contextlib.suppress(OSError):
        os.getxattr(template, xattrs.DAEMON)
        raise UsageError(f"{template}: is shown by a mount; name the image that it shows")
    real = os.path.join(os.path.realpath(os.path.dirname(template)), os.path.basename(template))
    relative = os.path.relpath(real, os.path.realpath(folder))
    return real if relative.startswith(os.pardir + os.sep) else relative


def _profile_of(path: str, base_format: str) -> list[Extent]:
    """What machines read first from a template: from the file beside it, or in it; empty where nobody knows."""
    if path and os.path.exists(path + PROFILE_SUFFIX):
        return read_profile(path + PROFILE_SUFFIX)
    return profile_of_image(path) if base_format == FVD_FORMAT else []


def _find_cache(folder: str, base: BaseImage, name: str) -> str:
    """The image of the folder that caches this base; empty where there is none."""
    length = round_up(base.length, SECTOR)
    entries: list[str] = []
    with contextlib.suppress(OSError):  # new files may be made in it, and nobody may list it
        entries = sorted(os.listdir(folder or "."))
    for path in (os.path.join(folder, entry) for entry in entries if entry.endswith(CACHE_ENDING)):
        with contextlib.suppress(FvdError, OSError):  # it is no image, or not for us
            header = top_layer(path, Policy()).header
            is_whole = header.base_img_size == header.virtual_disk_size == length
            if header.copy_on_read and is_whole and _is_over(header, path, name):
                return path
    return ""


def _is_over(header: Header, path: str, name: str) -> bool:
    """Whether the image at `path` with this header stands, or stood, on `name`. Raises ImageError."""
    if not is_local(name) or not is_local(header.base_img):
        return bool(header.base_img) and parse_location(header.base_img).url == parse_location(name).url != ""
    return (here := identity_at(resolve(path, name))) is not None and identity_at(
        resolve(path, header.base_img)
    ) == here
