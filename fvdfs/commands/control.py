"""Seeing and steering a mount from outside, through the extended attributes of its raw files.

`fvdfs status`, `prefetch` and `map`. Everything is asked of the process that serves the mount; an image
that is not mounted is read itself. Blocks.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from fvdfs.commands.info import human_size
from fvdfs.commands.newfiles import NewFiles
from fvdfs.errors import UsageError, named, printable
from fvdfs.image.chain import open_image
from fvdfs.image.map import BAR_CELLS, image_map, merged, totals
from fvdfs.image.policy import Policy
from fvdfs.mounts import DEAD, refuse_dead
from fvdfs.xattrs import MAP, PID, PREFETCH, STATUS

INTERVAL = 0.5  # seconds between two looks
COLOURS = {"local": (46, 139, 87), "base": (70, 110, 180), "hole": (225, 225, 225)}
_PNG = b"\x89PNG\r\n\x1a\n"
_NOT_OURS = (errno.ENODATA, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_OURS:
            raise UsageError(f"{path}: is not a raw file of an fvdfs mount") from None
        if error.errno == errno.ENOENT:
            raise UsageError(f"{path}: there is no such file") from None
        if error.errno in DEAD:
            refuse_dead(path)
        raise


def _facts(path: str, value: bytes) -> dict[str, Any]:
    """What an attribute tells. Raises UsageError where somebody else has made it."""
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: is not a raw file of an fvdfs mount")
    return found


# --- status -------------------------------------------------------------------------------------


def status(mountpoint: str) -> dict[str, Any]:
    """The state of every image of a mount, ready for JSON. Raises UsageError where it is no mount, OSError."""
    try:
        pid = int(os.getxattr(mountpoint, PID))
    except (OSError, ValueError):
        raise UsageError(f"{mountpoint}: fvdfs is not mounted there") from None
    images = []
    for name in sorted(os.listdir(mountpoint)):
        try:
            path = os.path.join(mountpoint, name)
            images.append(_facts(path, os.getxattr(path, STATUS)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # gone meanwhile
                raise
    return {"mountpoint": mountpoint, "pid": pid, "images": images}


def print_status(mountpoint: str) -> None:
    """The state of every image as a table on the terminal."""
    table = Table(box=None, pad_edge=False)
    for title in ("disk", "size", "local", "state", "rate", "left", "why"):
        table.add_column(title, overflow="fold")
    for image in status(mountpoint)["images"]:
        table.add_row(printable(image["name"]), human_size(image["virtual_size"]).partition(" (")[0], *_columns(image))
    _console(width=None if sys.stdout.isatty() else 200).print(table)


def _console(width: int | None = None) -> Console:
    """Names are no markup."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def _columns(image: dict[str, Any]) -> tuple[str, str, str, str, str]:
    share = f"{image['local_share']:.1%}" if "local_share" in image else ""
    if "rate" not in image:  # closed, or being closed
        return share, image["state"], "", "", image.get("failed", "")
    rate = f"{image['rate'] / 1e6:.1f} MB/s" if image["rate"] else ""
    left = _duration(image["eta"]) if image["eta"] is not None else ""
    return share, image["state"], rate, left, image["failed"] or image["reason"]


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def watch_status(mountpoint: str) -> None:
    """Show a live bar for each open image, until interrupted or unmounted."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]:<8}"),
        TextColumn("{task.fields[rate]:>11}"),
        TextColumn("{task.fields[left]:>8}"),
        TextColumn("{task.fields[why]}", style="yellow", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=_console()) as progress:
        while True:
            try:
                images = {image["name"]: image for image in status(mountpoint)["images"] if image["open"]}
            except UsageError:
                if not tasks:
                    raise
                return
            for name in [name for name in tasks if name not in images]:
                progress.remove_task(tasks.pop(name))
            for name, image in images.items():
                if name not in tasks:
                    tasks[name] = progress.add_task(printable(name), state="", rate="", left="", why="")
                _, state, rate, left, why = _columns(image)
                total = image["base_size"] or 1
                done = image["local_bytes"] if image["base_size"] else 1
                progress.update(tasks[name], total=total, completed=done, state=state, rate=rate, left=left, why=why)
            time.sleep(INTERVAL)


# --- prefetch -----------------------------------------------------------------------------------


def control_prefetch(command: str, raw: str) -> None:
    """Start, pause or stop prefetching the image behind a raw file. Raises UsageError, OSError."""
    with _explained(raw):
        # Another file system might take the attribute, and think nothing of it.
        _facts(raw, os.getxattr(raw, STATUS))
        try:
            os.setxattr(raw, PREFETCH, command.encode())
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"{raw}: nothing is being prefetched; see fvdfs status") from None
            if error.errno == errno.EROFS:
                raise UsageError(f"{raw}: cannot be written: see the log of the mount") from None
            raise
        if command == "start" and _facts(raw, os.getxattr(raw, STATUS)).get("base_size") == 0:
            raise UsageError(f"{raw}: has no base, and so nothing to prefetch")


# --- map ----------------------------------------------------------------------------------------


def read_map(path: str, *, secret_file: str = "") -> dict[str, Any]:
    """The map of an image, or of a raw file in a mount. Raises UsageError, ImageError, OSError."""
    if path.endswith(".raw"):
        with _explained(path):
            return _facts(path, os.getxattr(path, MAP))

    async def read() -> dict[str, Any]:
        image = await open_image(path, Policy(writable=False, secret_file=secret_file))
        try:
            return await image_map(image)
        finally:
            await image.close()

    return trio.run(read)


def print_map(found: dict[str, Any]) -> None:
    """The map as a bar on the terminal, with a legend."""
    bar = Text()
    signs, mixed_sign = {"local": "█", "base": "░", "hole": "·"}, "▓"
    try:
        "█░·▓".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        signs, mixed_sign = {"local": "#", "base": "-", "hole": "."}, "+"
    for counts in merged(found, BAR_CELLS):
        state = found["states"][counts.index(max(counts))]
        mixed = state == "local" and counts[found["states"].index("base")] > 0
        bar.append(mixed_sign if mixed else signs[state], style="rgb({},{},{})".format(*COLOURS[state]))
    console = _console()
    console.print(bar)
    whole = found["virtual_size"] or 1
    for state, size in totals(found).items():
        console.print(f"{signs[state]} {state:<6}{size / whole:6.1%}  {human_size(size)}")


def draw_map(found: dict[str, Any], path: str, image: str) -> None:
    """The map of an image as a picture (PNG), a square for each cell, in rows.

    Nothing is overwritten but an older picture. Raises UsageError, also where Pillow is missing, ImageBusy, OSError.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise UsageError("--png needs the package Pillow: pip install 'fvdfs[png]'") from None
    square, per_row = 12, 50
    cells = found["cells"]
    picture = Image.new("RGB", (per_row * square, -(-len(cells) // per_row) * square), "white")
    draw = ImageDraw.Draw(picture)
    for number, counts in enumerate(cells):
        x, y = number % per_row * square, number // per_row * square
        whole = sum(counts) or 1
        colours = [COLOURS[state] for state in found["states"]]
        mix = [sum(c * colour[i] for c, colour in zip(counts, colours, strict=True)) // whole for i in range(3)]
        draw.rectangle((x, y, x + square - 2, y + square - 2), fill=(mix[0], mix[1], mix[2]))
    again = _is_picture(path)
    if os.path.exists(path) and not again:
        raise UsageError(f"{path} exists already, and is no picture (NAME.png); choose another name")
    with NewFiles(force=again) as files:
        files.protect_file(image)
        with named(path), open(files.add(path).place, "wb") as file:
            picture.save(file, "PNG")
        files.publish()


def _is_picture(path: str) -> bool:
    """Whether a file is there that a picture may replace. Its first bytes alone may be a guest's."""
    try:
        if not path.lower().endswith(".png") or not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(_PNG)) == _PNG
    except OSError:
        return False
