"""Whether the simulations of power cuts see anything: code that orders durable steps wrongly must fail in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.crash_mutants import CHANGED, MODULES, Simulations, mutants

_META = "if self._meta is not self._data: … _flush"
_HELD = "if self.base_writer is not None"
_DIRTY = "if self.committer.dirty or self.committer.failed is not None"
_UNCLEAN = "if core.header.clean and core.header.has_metadata: … change_header"

_LOCAL = "the blocks are local, whatever is stored in them now"
_OF_BASE = "if core.base_writer is not None"
_APART = "the bits say nothing of the base, which keeps its old bytes or gets the new ones"
_RELEASE, _CLEAN = "commit: release_base", "if not self.header.compact"
_TORN = "too few simulations to see a torn header; test_every_state[cow-data-file-on-device] does"
_FRONT = "no journal here is large enough; test_power_cuts_while_the_table_takes_the_front_of_the_journal has one"
_SHORT = "it is done again, or as well, while writers wait; before, it makes that wait short"
_KEPT = "it is for the next daemon of a kept mount, not for a power cut; test_no_program_notices_… does see it"
EQUIVALENT: dict[str, str] = {
    "commit: blocks_stored: without self._notes.blocks_stored(first, end)": _KEPT,
    "commit: chunks_allocated: without "
    "self._notes.chunks_allocated([(chunk, table.on_disk(chunk)) for chunk in chunks])": _KEPT,
    "commit: chunks_moved: without self.chunks_allocated(chunks)": (
        "the next commit is a checkpoint; test_what_is_written_to_chunks_that_have_moved_… does see it"
    ),
    "commit: _write: without batch.data_written = True": (
        "blocks and chunks are reported along with their data: it is set already, or there are pages"
    ),
    f"commit: recover: swapped {_META} | await self.checkpoint(clear_journal=self.journal_is_bad)": (
        "the checkpoint writes only what a replay has rebuilt, from records written after clean_shutdown=0 was stable"
    ),
    "writing: _write_past_gate: swapped await self._store(start, stop, data) | self.stored(bitmap, plan)": _LOCAL,
    "writing: _replace: swapped await change() | self.stored(bitmap, plan)": _LOCAL,
    "writing: _store_zeros: swapped if core.zeroes is Zeroes.PUNCH: … _punch | try: … pwrite": (
        "a hole is made where zeros have just been written"
    ),
    f"writing: _write_past_gate: swapped self.stored(bitmap, plan) | {_OF_BASE}: … wrote": _APART,
    f"writing: _replace: swapped self.stored(bitmap, plan) | {_OF_BASE}: … zeroed": _APART,
    "writing: _replace: swapped for part in (plan.head, plan.tail): … _store | await change()": (
        "nobody reads any of it before the bits are set"
    ),
    "writing: _reserve: without core.committer.data_written()": (
        "space that is reserved holds nothing; test_what_is_reserved_is_flushed does see it"
    ),
    "image: release_base: swapped await self.committer.release_base() | if self.fetcher is not None: … close": (
        "no block is missing any more, so that the fetcher has nothing to store"
    ),
    f"image: fsync: swapped {_HELD}: … flush | {_DIRTY}: … commit": (
        "base and image do not name each other's data; the answer waits for both"
    ),
    f"resizing: _clear_records: swapped {_UNCLEAN} | await core.committer.checkpoint(clear_journal=True)": (
        "a checkpoint that writes anything has clean_shutdown=0 stable before"
    ),
    "resizing: _shrink_to: without core.committer.data_written()": (
        "the simulations do not see it; test_what_a_shrink_gives_back_is_stable_when_the_image_is_closed does"
    ),
    "flat: prepare: swapped await self._store.resize(self._offset + self._size) | await self._store.flush()": (
        "the simulations do not see it; test_the_length_is_stable_before_there_is_data does"
    ),
    "image: begin_writing: without self.committer.data_written()": (
        "the simulations do not see it; test_what_a_recovery_clears_is_stable_when_the_image_is_closed does"
    ),
    f"image: stop_writing: swapped if fetcher is not None: … close | {_HELD}: … close": (
        "what the fetcher stores comes from the base, and does not go there"
    ),
    "chunked: give_back: swapped for first, stop in _runs((number for number in freed if number < used)): … zero | "
    "if self._store.fixed_size: … resize, zero": "one is about chunks below the highest in use, one about those above",
    "image: begin_writing: swapped await passing.recover_length(self) | "
    "if self.base_may_be_written: … begin_base_writing": "the one is about images without base, the other not",
    f"image: stop_writing: swapped {_HELD}: … close | await write_profile(self)": (
        "the base knows nothing of the profile"
    ),
    "image: stop_writing: swapped await write_profile(self) | await passing.settle(self)": (
        "the profile has flushes of its own, and says nothing about the rest of the header"
    ),
    "passing: let_write: swapped if not _goes_on(core): … prepare | "
    "await core.committer.begin_unseen_writes()": "nobody writes before both are done; an empty file is an unused one",
    f"{_RELEASE}: swapped await self._clear_journal() | {_CLEAN}: … _flush, _write_header": (
        "the checkpoint before shows all that the journal has: replayed or not, the image is the same"
    ),
    f"{_RELEASE}: swapped {_CLEAN}: … _flush, _write_header | await self._write_header(all_data_in_fvd_img=1)": _TORN,
    f"{_RELEASE}: without await self._flush(self._meta) (2)": _TORN,
    f"{_RELEASE}: swapped await self._write_header(clean_shutdown=1) | await self._flush(self._meta)": _TORN,
    "commit: recover: swapped if moving.is_moving(self._raw_header): … change_header | "
    "if (not self.header.clean or self._has_left) and self.header.has_metadata: … _flush, checkpoint": (
        "what moves counts as closed"
    ),
    "commit: move_journal: without await self._flush(self._meta)": _FRONT,
    "commit: move_journal: swapped await self._commit(checkpoint=True) | "
    "await self._write_header(journal_offset=offset, journal_size=size)": _FRONT,
    "commit: move_journal: swapped await self._write_header(journal_offset=offset, journal_size=size) | "
    "await self._flush(self._meta)": _FRONT,
    "commit: flush_metadata: without await self._flush(self._meta)": _SHORT,
    "commit: begin_move: swapped await self._commit(checkpoint=True) | "
    "await self._meta.pwrite(moving.encode(fields), moving.PLACE)": "both are flushed before the record counts",
    "table_moving: _clear_front: swapped await trio.lowlevel.checkpoint() | "
    "for at in range(0, len(chunks), part): … _move_chunks, commit": "one is a turn for others",
    "table_moving: _clear_front: swapped await core.committer.commit() | "
    "await _move_chunks(core, storage, table, gate, chunks[at:at + part])": (
        "the window is larger than what two parts and a writer leave here"
    ),
    "table_moving: _move_chunks: swapped await storage.copy_away("
    "[(chunk * size, (chunk + 1) * size) for chunk in chunks], places, fresh=True) | "
    "await core.committer.empty_journal()": _SHORT,
    "table_moving: _move_chunks: swapped await core.committer.empty_journal() | "
    "for _ in range(ROUNDS): … copy_away": _SHORT,
    "table_moving: _move_chunks: swapped for _ in range(ROUNDS): … copy_away | "
    "async with gate.closed(): … copy_away, empty_journal": _SHORT,
    "table_moving: _move_chunks: swapped await storage.copy_away(_take_written(core, places), places, fresh=False) | "
    "await core.committer.empty_journal()": "the entries change after both",
    "table_moving: _copy_table: swapped async with storage.still(): … resize | "
    "for at in range(start, end, PART): … zero": "what a file gets longer by is zeros",
    "table_moving: _copy_table: swapped while at < stop: … pwrite | "
    "for _ in range(ROUNDS): … pwrite_pages": "they are different pages",
    "table_moving: _copy_table: swapped for _ in range(ROUNDS): … pwrite_pages | "
    "await core.committer.flush_metadata()": _SHORT,
    "passing: settle: swapped await make_whole(core) | await core.committer.commit()": (
        "what makes the file whole flushes it, too"
    ),
}
"""Mutants that break nothing, and why; or the test that sees what they break."""


GROUPS = {
    "commit": {"commit", "base", "image", "passing", "chunked", "flat", "core", "base_writing", "profiling", "loading"},
    "writing": {"writing", "writethrough", "table_moving", "resizing"},
}
"""Modules by name; the groups are tests of their own, for several processes to share them."""


def test_every_mutant_is_in_a_group() -> None:
    modules = {name.rpartition(".")[2] for name in (*MODULES, *(row[0] for row in CHANGED))}
    assert sorted(modules) == sorted(module for group in GROUPS.values() for module in group)
    assert {_module(name) for name in EQUIVALENT} <= modules


def _module(mutant: str) -> str:
    return mutant.partition(":")[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", GROUPS)
def test_every_mutant_fails(tmp_path: Path, group: str) -> None:
    """Each change of the code that orders durable steps is noticed, but for those that change nothing.

    These go through few simulations, which is enough to see that the list is not out of date.
    """
    simulations = Simulations(tmp_path)
    simulations.look()
    survivors = []
    for mutant in mutants():
        if _module(mutant.name) not in GROUPS[group]:
            continue
        how = simulations.kill(mutant, few=mutant.name in EQUIVALENT)
        if not how:
            survivors.append(mutant.name)
        print(
            f"{mutant.name}\n    {how or 'survives: ' + EQUIVALENT.get(mutant.name, 'NOT EXPECTED')}", file=sys.stderr
        )
    assert sorted(survivors) == sorted(name for name in EQUIVALENT if _module(name) in GROUPS[group])
