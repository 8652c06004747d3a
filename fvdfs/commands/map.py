"""`fvdfs map`: what of a disk is stored in the image, what in its base, and what nowhere. Blocks.

The process that serves a mount is asked, through an extended attribute; an image that is not mounted is read.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from fvdfs import mountoptions
from fvdfs.commands import mappage
from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.commands.mappage import PER_ROW, short, visible
from fvdfs.commands.mounted import raw_file
from fvdfs.commands.newfiles import NewFiles
from fvdfs.commands.rows import local, percent, shortened
from fvdfs.commands.streams import OUTPUT, STREAM
from fvdfs.commands.terminal import plain_console
from fvdfs.daemon import run_loop
from fvdfs.errors import ImageBusy, UsageError, named, printable
from fvdfs.image.loading import open_image
from fvdfs.image.map import BAR_CELLS, MEANINGS, image_map, merged, totals
from fvdfs.image.policy import Policy
from fvdfs.sizes import human_size
from fvdfs.xattrs import MAP

COLOURS = {"stored": (46, 139, 87), "base": (70, 110, 180), "hole": (225, 225, 225)}
SQUARE = 14  # pixels of a cell's side in a picture, with the gap beside it
LEFT, TOP, MARGIN, LINE = 90, 70, 16, 22  # pixels: left of the squares, above them, at the edges, and of a line of text
_INK, _SOFT = (29, 33, 37), (93, 102, 111)
_PNG = b"\x89PNG\r\n\x1a\n"


def run(image: str, *, as_json: bool, png: str, page: str, options: Sequence[str], secret: str) -> int:
    """Show the map as a bar, as JSON, as a picture, as a page. Raises as `read_map`, `draw_map` and `make_page`."""
    urls = mountoptions.allowed_urls(options)
    _refuse_output(as_json=as_json, png=png, page=page)
    found = read_map(image, secret_file=secret, allowed_urls=urls)
    if png:
        draw_map(found, png, image)
    if page:
        make_page(found, page, image)
    if as_json:
        print(json.dumps(found))
    elif not png and not page:
        print_map(found)
    return 0


def _refuse_output(*, as_json: bool, png: str, page: str) -> None:
    if (png, page).count(STREAM) + as_json * (STREAM in (png, page)) > 1:
        raise UsageError(f"{OUTPUT}: takes one of --json, --png {STREAM} and --html {STREAM}; give the others a file")
    if png == STREAM and os.isatty(1):
        raise UsageError(f"--png {STREAM}: {OUTPUT} is a terminal; send it to a file or to a program")


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
    """The map of an image as a picture (PNG): a square for each cell, in rows that say where they begin, and a legend.

    Nothing is overwritten but an older picture. Raises UsageError, also where Pillow is missing or too old, ImageBusy,
    OSError.
    """
    try:
        from PIL import Image, ImageDraw

        font, small, large = (_font(size) for size in (13, 11, 19))
    except (ImportError, OSError):
        raise UsageError(
            "--png needs the package Pillow, 10.1 or newer: pip install 'fvdfs[png]'; or Debian's python3-pil and "
            "fonts-dejavu-core; --html needs none"
        ) from None
    cells, rows = found["cells"], max(1, -(-len(found["cells"]) // PER_ROW))
    below = TOP + rows * SQUARE + 16
    picture = Image.new("RGB", (LEFT + PER_ROW * SQUARE + MARGIN, below + 5 * LINE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 12), _fitting(os.path.basename(image), large, picture.width - 2 * MARGIN), _INK, large)
    scale = f"a disk of {short(found['virtual_size'])}; each square is {short(found['cell_size'])} of it"
    draw.text((MARGIN, 40), scale + ", of several kinds where colours are mixed", _SOFT, font)
    colours = [COLOURS[state] for state in found["states"]]
    for number, counts in enumerate(cells):
        row, column = divmod(number, PER_ROW)
        x, y = LEFT + column * SQUARE, TOP + row * SQUARE
        if not column:
            draw.text((LEFT - 8, y + 5), short(number * found["cell_size"]), _SOFT, small, anchor="rm")
        shares = visible(counts)
        mix = [round(sum(s * colour[i] for s, colour in zip(shares, colours, strict=True))) for i in range(3)]
        draw.rectangle((x, y, x + SQUARE - 2, y + SQUARE - 2), fill=(mix[0], mix[1], mix[2]))
    for number, (state, size) in enumerate(totals(found).items()):
        y = below + number * LINE
        draw.rectangle((LEFT, y + 3, LEFT + SQUARE - 2, y + SQUARE + 1), fill=COLOURS[state])
        draw.text((LEFT + 22, y), state, _INK, font)
        draw.text((LEFT + 130, y), percent(size / (found["virtual_size"] or 1)), _INK, font, anchor="ra")
        draw.text((LEFT + 220, y), short(size), _INK, font, anchor="ra")
        draw.text((LEFT + 240, y), MEANINGS[state], _SOFT, font)
    draw.text((LEFT, below + 3 * LINE + 4), f"local: {local(found)}", _INK, font)
    data = io.BytesIO()
    picture.save(data, "PNG")
    _write(path, data.getvalue(), image, "picture", ".png", _PNG)


def _font(size: int) -> Any:
    """A font, in pixels. Raises OSError."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except TypeError:  # before 10.1, that has one size, and few letters
        return ImageFont.truetype("DejaVuSans.ttf", size)


def _fitting(text: str, font: Any, width: int) -> str:
    """A name that is no wider than so many pixels."""
    text = printable(text)
    length = len(text)
    while length > 1 and font.getlength(shortened(text, length)) > width:
        length -= 1
    return shortened(text, length)


def make_page(found: dict[str, Any], path: str, image: str) -> None:
    """The map of an image as a page for a browser. Nothing is overwritten but an older page.

    Raises UsageError, ImageBusy, OSError.
    """
    text = mappage.page(found, printable(os.path.basename(image)), time.strftime("%Y-%m-%d %H:%M:%S"))
    _write(path, text.encode(), image, "page", ".html", mappage.FIRST.encode())


def _write(path: str, data: bytes, image: str, what: str, ending: str, first: bytes) -> None:
    """Write a file that ends and begins like this; of one that is there only such a one is overwritten. `-`: stdout."""
    if path == STREAM:
        sys.stdout.buffer.write(data)
        return
    again = _is_like(path, ending, first)
    if os.path.exists(path) and not again:
        raise UsageError(f"{path} exists already, and is no {what} of a map (NAME{ending}); choose another name")
    with NewFiles(force=again) as files:
        files.protect_file(image)
        with named(path), open(files.add(path).place, "wb") as file:
            file.write(data)
        files.publish()


def _is_like(path: str, ending: str, first: bytes) -> bool:
    """Whether a file is there that may be replaced. Its first bytes alone may be a guest's."""
    try:
        if not path.lower().endswith(ending) or not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(first)) == first
    except OSError:
        return False
