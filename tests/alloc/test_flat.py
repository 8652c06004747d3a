"""Storage whose layout is the host's: what a new image of the original, which has none yet, gets first."""

from __future__ import annotations

from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.growth import GrowCommand
from support.fakes import MemoryStore

SIZE = 1 << 20


class Steps(MemoryStore):
    """Takes down the calls that a power cut may come between."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    async def resize(self, size: int) -> None:
        self.steps.append(f"resize to {size}")
        await super().resize(size)

    async def flush(self) -> None:
        self.steps.append("flush")
        await super().flush()


async def test_the_length_is_stable_before_there_is_data() -> None:
    """Else a power cut might leave some data and not the length, which looks as if the rest had been cut off."""
    store = Steps()
    storage = FlatStorage(store, 0, SIZE, GrowCommand("a.fvd", (), ""), length=0, is_truncated=False)
    assert not storage.prepare_nowait(0, 512)
    await storage.prepare(0, 512)
    assert store.steps == [f"resize to {SIZE}", "flush"]
    assert storage.prepare_nowait(0, 512)
    await storage.prepare(512, 1024)
    assert store.steps == [f"resize to {SIZE}", "flush"]
