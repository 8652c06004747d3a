"""The engine over stores in memory, where an interleaving has to be made."""

from __future__ import annotations

from pathlib import Path

import trio

from builder import LAYOUTS, load, read_files
from fakes import MemoryStore


def test_writes_past_the_end_together_only_grow_the_disk(tmp_path: Path) -> None:
    """The later, nearer one finds the disk grown already; it must not be taken for a cut."""
    LAYOUTS[0].build(tmp_path)
    stores = {name: MemoryStore(content, name, slow=True) for name, content in read_files(tmp_path).items()}

    async def main() -> None:
        image = await load(stores)
        await image.begin_writing()
        end = image.size
        async with trio.open_nursery() as nursery:
            for distance in (5000, 700, 3000, 1):
                nursery.start_soon(image.write, end + distance, bytes([distance % 251]) * 10)
        assert image.size >= end + 5010
        for distance in (5000, 700, 3000, 1):
            assert await image.read(end + distance, 10) == bytes([distance % 251]) * 10
        await image.close()

    trio.run(main)
