"""Whether the simulations of power cuts see anything: code that orders durable steps wrongly must fail in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.crash_mutants import Simulations, mutants

_META = "if self._meta is not self._data: … _flush"
_HELD = "if self.base_writer is not None"
_DIRTY = "if self.committer.dirty or self.committer.failed is not None"
_UNCLEAN = "if self.header.clean and self.header.has_metadata: … change_header"

EQUIVALENT: dict[str, str] = {
    "commit: _write: without batch.data_written = True": (
        "blocks and chunks are reported along with their data: it is set already, or there are pages"
    ),
    f"commit: recover: swapped {_META} | await self.checkpoint()": (
        "the checkpoint writes only what a replay has rebuilt, from records written after clean_shutdown=0 was stable"
    ),
    "image: _store_zeros: swapped if start < self._geometry.base_size: … _prepare | try: … pwrite, zero": (
        "a place that is new reads as zeros: nothing is stored there, before or after"
    ),
    "image: finish: swapped await self.committer.release_base() | if self.fetcher is not None: … close": (
        "no block is missing any more, so that the fetcher has nothing to store"
    ),
    f"image: flush: swapped {_HELD}: … flush | {_DIRTY}: … commit": (
        "base and image do not name each other's data; the answer waits for both"
    ),
    f"image: _checkpoint_unclean: swapped {_UNCLEAN} | await self.committer.checkpoint()": (
        "a checkpoint that writes anything has clean_shutdown=0 stable before"
    ),
    "image: begin_writing: swapped await self.committer.recover() | "
    "await self._begin_base_writing(crashed=not header.clean)": (
        "the second writes clean_shutdown=0 alone, which is there already where something is to be recovered"
    ),
    f"image: close: swapped {_HELD}: … close | await self._write_profile()": "the base knows nothing of the profile",
    "image: close: swapped await self._write_profile() | await self.committer.close()": (
        "the profile has flushes of its own, and says nothing about the rest of the header"
    ),
}
"""Mutants that break nothing, and why."""


@pytest.mark.slow
def test_every_mutant_fails(tmp_path: Path) -> None:
    """Each change of the code that orders durable steps is noticed, but for those that change nothing."""
    simulations = Simulations(tmp_path)
    simulations.run_all()
    survivors = []
    for mutant in mutants():
        how = simulations.kill(mutant)
        if not how:
            survivors.append(mutant.name)
        print(
            f"{mutant.name}\n    {how or 'survives: ' + EQUIVALENT.get(mutant.name, 'NOT EXPECTED')}", file=sys.stderr
        )
    assert sorted(survivors) == sorted(EQUIVALENT)
