"""Draws the pictures of what users see, in docs/: a map, `status --watch` in two widths, `top`.

    python tests/bench/pictures.py [FOLDER]

A folder of disks in several states is mounted, as root or not, with programs that read and write them. What the
commands show of them then is drawn; nothing is made up. Needs Pillow and textual.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from textual.widgets import DataTable

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fvdfs.commands import rows
from fvdfs.commands.status import status, watched
from fvdfs.commands.top import Top
from support.mounts import MIB, Mount, mounted, must, wait_until

FOLDER = Path(__file__).parents[2] / "docs"
TEMPLATE = 192 * MIB
DISKS = ("build-farm-worker-17", "database-of-the-accounting-department", "mail", "web-1", "web-2", "web-10")
PACE = {"build-farm-worker-17": 0.2, "database-of-the-accounting-department": 0.02, "web-2": 0.3, "web-10": 0.1}
"""Seconds between two requests to a disk."""
WIDTHS = (40, 120)
OPTIONS = ("-o", "prefetch_max=4M,writeback=off")
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""Of a picture by rich or textual: fonts that are elsewhere."""


@contextlib.contextmanager
def used(mount: Mount) -> Iterator[None]:
    """Have programs use the disks meanwhile: each reads, and now and then writes."""
    ended = threading.Event()

    def use(name: str, pace: float) -> None:
        chance = random.Random(name)
        with open(mount.raw(name), "r+b", buffering=0) as file:
            while not ended.wait(pace):
                at = chance.randrange(TEMPLATE // 4 // 4096) * 4096
                if chance.random() < 0.7:
                    os.pread(file.fileno(), 4096 << chance.randrange(4), at)
                else:
                    os.pwrite(file.fileno(), os.urandom(8192), at)

    threads = [threading.Thread(target=use, args=(name, pace)) for name, pace in PACE.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def disks(folder: Path) -> Iterator[Mount]:
    """A mount with disks that are used, each in a state of its own."""
    with open(folder / "template.raw", "wb") as file:
        for at in range(0, TEMPLATE, 16 * MIB):
            os.pwrite(file.fileno(), os.urandom(12 * MIB), at)
        file.truncate(TEMPLATE)
    for name in DISKS:
        words = ["--copy-on-read", "--prefetch-delay", "3600" if name in ("web-1", "web-10") else "1"]
        how = [] if name == "mail" else words
        must("create", folder / f"{name}.fvd", "320M", "-b", "template.raw", "-F", "raw", "--block-size", "64K", *how)
    with mounted(folder, *OPTIONS) as mount, contextlib.ExitStack() as stack:
        for name in DISKS:
            disk = stack.enter_context(open(mount.raw(name), "r+b", buffering=0))
            for _ in range(30):
                os.pwrite(disk.fileno(), os.urandom(MIB), random.Random(name).randrange(280 * MIB))
        stack.enter_context(used(mount))
        must("prefetch", "start", mount.raw("web-2"))
        wait_until(lambda: mount.status("web-2")["local_share"] > 0.5, 300)
        must("prefetch", "pause", mount.raw("database-of-the-accounting-department"))
        time.sleep(2)
        yield mount


def draw_watch(mount: Mount, folder: Path) -> None:
    """`status --watch`, in each width."""
    before = status(str(mount.point))
    time.sleep(2)
    now = status(str(mount.point))
    for width in WIDTHS:
        console = Console(
            width=width, height=len(DISKS) + 4, record=True, file=io.StringIO(), force_terminal=True, highlight=False
        )
        console.print(watched(rows.rows(before, now, 2), len(now["images"]), console.size))
        text = console.export_svg(title="fvdfs status --watch", unique_id=f"watch{width}")
        (folder / f"watch-{width}.svg").write_text(FONT.sub("", text))


async def draw_top(mount: Mount, folder: Path) -> None:
    """`top`, on 100 columns."""
    app = Top(str(mount.point))
    async with app.run_test(size=(100, len(DISKS) + 8)) as pilot:
        while not app.query_one(DataTable).row_count:
            await pilot.pause(0.1)
        await pilot.press("down", "down", "down", "down")
        await pilot.pause(7)  # for rates, and the map of the disk that is selected
        (folder / "top.svg").write_text(FONT.sub("", app.export_screenshot(title="fvdfs top")))


def main(folder: Path) -> None:
    """Draw them."""
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        images.mkdir()
        with disks(images) as mount:
            (folder / "map.png").unlink(missing_ok=True)
            must("map", mount.raw("web-2"), "--png", folder / "map.png")
            draw_watch(mount, folder)
            asyncio.run(draw_top(mount, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
