"""`fvdfs map`: what of a disk is stored in the image, what in its base, and what nowhere. Blocks.

The process that serves a mount is asked, through an extended attribute; an image that is not mounted is read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from fvdfs import mountoptions
from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.commands.mounted import raw_file
from fvdfs.commands.newfiles import NewFiles
from fvdfs.commands.rows import local, percent
from fvdfs.commands.terminal import plain_console
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageBusy, UsageError, named
from fvdfs.image.loading import open_image
from fvdfs.image.map import BAR_CELLS, image_map, merged, totals
from fvdfs.image.policy import Policy
from fvdfs.sizes import human_size
from fvdfs.xattrs import MAP

COLOURS = {"stored": (46, 139, 87), "base": (70, 110, 180), "hole": (225, 225, 225)}
SQUARE, PER_ROW = 12, 50  # pixels of a cell's side in a picture, and cells in a row of it
_PNG = b"\x89PNG\r\n\x1a\n"


def run(image: str, *, as_json: bool, png: str, options: Sequence[str], secret: str) -> int:
    """Show the map as a bar, as JSON, as a picture. Raises as `read_map` and `draw_map`."""
    urls = mountoptions.allowed_urls(options)
    found = read_map(image, secret_file=secret, allowed_urls=urls)
    if png:
        draw_map(found, png, image)
    if as_json:
        print(json.dumps(found))
    elif not png:
        print_map(found)
    return 0


def read_map(path: str, *, secret_file: str = "", allowed_urls: tuple[str, ...] = ()) -> dict[str, Any]:
    """The map of an image, or of a raw file in a mount. Raises UsageError, ImageError, OSError."""
    if path.endswith(".raw"):
        with explained(path):
            return facts(path, MAP)

    async def read() -> dict[str, Any]:
        policy = Policy(writable=False, secret_file=secret_file, allowed_urls=allowed_urls)
        image = await open_image(path, policy)
        try:
            return await image_map(image)
        finally:
            await image.close()

    try:
        return run_loop(read)
    except ImageBusy as error:
        if raw := raw_file(path, error):
            return facts(raw, MAP)
        with or_by_mount():
            raise


def print_map(found: dict[str, Any]) -> None:
    """The map as a bar on the terminal, with a legend."""
    console = plain_console()
    console.print(bar_of(found, BAR_CELLS))
    signs, whole = _signs(), found["virtual_size"] or 1
    for state, size in totals(found).items():
        console.print(f"{signs[state]} {state:<6} {percent(size / whole):>6}  {human_size(size)}")
    console.print(f"local: {local(found)}")


def bar_of(found: dict[str, Any], cells: int) -> Text:
    """A map in a line of at most so many characters; each shows what most of its part of the disk is."""
    bar, signs = Text(), _signs()
    for counts in merged(found, cells):
        state = found["states"][counts.index(max(counts))]
        mixed = state == "stored" and counts[found["states"].index("base")] > 0
        bar.append(signs["mixed" if mixed else state], style="rgb({},{},{})".format(*COLOURS[state]))
    return bar


def legend() -> str:
    """What the characters of a bar mean, in a line."""
    return "  ".join(f"{sign} {state}" for state, sign in _signs().items())


def _signs() -> dict[str, str]:
    """What stands for each state, and for what is mostly stored, but in part in the base."""
    states, plain = ("stored", "mixed", "base", "hole"), "#+-."
    try:
        "█▓░·".encode((sys.__stdout__ and sys.__stdout__.encoding) or "ascii")
    except UnicodeEncodeError:
        return dict(zip(states, plain, strict=True))
    return dict(zip(states, "█▓░·", strict=True))


def draw_map(found: dict[str, Any], path: str, image: str) -> None:
    """The map of an image as a picture (PNG), a square for each cell, in rows.

    Nothing is overwritten but an older picture. Raises UsageError, also where Pillow is missing, ImageBusy, OSError.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise UsageError("--png needs the package Pillow: pip install 'fvdfs[png]'") from None
    cells = found["cells"]
    picture = Image.new("RGB", (PER_ROW * SQUARE, -(-len(cells) // PER_ROW) * SQUARE), "white")
    draw = ImageDraw.Draw(picture)
    for number, counts in enumerate(cells):
        x, y = number % PER_ROW * SQUARE, number // PER_ROW * SQUARE
        whole = sum(counts) or 1
        colours = [COLOURS[state] for state in found["states"]]
        mix = [sum(c * colour[i] for c, colour in zip(counts, colours, strict=True)) // whole for i in range(3)]
        draw.rectangle((x, y, x + SQUARE - 2, y + SQUARE - 2), fill=(mix[0], mix[1], mix[2]))
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
