"""`fvdfs check`: every kind of damage is done to a good image, found, and repaired; or said not to be.

A `Damage` says what to do to an image, what has to be found, and what the disk must hold after a
repair. Each is tried on files, through the command; those that can be repaired are tried again in
memory, where the power is cut after every change of the repair, and where every call fails in turn.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import HealthCheck, given, settings

from fvdfs.check import contents, examine, findings
from fvdfs.check.check import Report, check_layers, describe, render
from fvdfs.check.findings import Findings, Kind, Severity, bounded, span
from fvdfs.check.header import check_header
from fvdfs.check.layers import Absent, CheckLayer
from fvdfs.cli import main
from fvdfs.errors import FormatError, NotFvd, printable
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.store.base import Buffer, Store
from support import reference
from support.builder import IMAGE, LAYOUTS, Layout, create, load, read_files
from support.damage import (
    BOTH,
    BY_NAME,
    COMPACT,
    CORRUPTION,
    COW,
    DATA_FILE,
    HARMLESS,
    LEAK,
    MISSING,
    UNALLOCATED,
    Good,
    check,
    kinds,
    run,
)
from support.fakes import CALLS, Clock, CrashStore, FaultPlan, FaultStore, MemoryStore
from support.golden import MANIFEST, extract
from support.mounts import MIB
from support.records import bits, raw_entries


@dataclass(frozen=True)
class Damage:
    """What to do to an image, and what a check has to say to it."""

    name: str
    layout: str
    do: Callable[[Good], bytes | None]
    """Damages the image; what the disk must hold after a repair, None: what it held before."""
    kind: Kind
    severity: Severity = CORRUPTION
    place: str = ""
    """What the finding's place begins with."""
    also: tuple[Kind, ...] = ()
    """Other kinds that have to be found."""
    repaired: bool = True
    """Whether a repair leaves nothing but what is harmless."""
    left: tuple[Kind, ...] = ()
    """What else a repair leaves."""
    lost: bool = False
    """Whether bytes of the disk are named."""

    @property
    def code(self) -> int:
        return {CORRUPTION: 2, LEAK: 3, HARMLESS: 0}[self.severity]


DAMAGES: list[Damage] = []


def damage(
    name: str, layout: str, kind: Kind, severity: Severity = CORRUPTION, **options: Any
) -> Callable[[Callable[[Good], bytes | None]], Callable[[Good], bytes | None]]:
    """Add what the function does to DAMAGES."""

    def add(do: Callable[[Good], bytes | None]) -> Callable[[Good], bytes | None]:
        DAMAGES.append(Damage(name, layout, do, kind, severity, **options))
        return do

    return add


def fields(name: str, layout: str, kind: Kind, severity: Severity = CORRUPTION, **options: Any) -> Callable[..., None]:
    """Add a damage to fields of the header."""

    def add(**values: int | str | bytes) -> None:
        options.setdefault("place", next(iter(values)))
        damage(name, layout, kind, severity, **options)(lambda good: good.put(**values))

    return add


FINE = "compact-cow-512-4k"

# --- header ---

fields("version", COW, Kind.HEADER_VERSION, repaired=False)(version=2)
fields("name of the base without end", COW, Kind.HEADER_STRING, repaired=False)(base_img=b"x" * 1024)
fields("name of the data without end", DATA_FILE, Kind.HEADER_STRING, repaired=False)(data_file=b"x" * 1024)
fields("command without end", "plain", Kind.HEADER_STRING, repaired=False)(add_storage_cmd=b"\xff" * 2048)
fields("bytes behind a string", COW, Kind.HEADER_FILL, HARMLESS)(base_img=b"base.raw\0old")
fields("size of the disk negative", COW, Kind.HEADER_FIELD, repaired=False)(virtual_disk_size=-512)
fields("size of the disk odd", COMPACT, Kind.HEADER_FIELD, repaired=False)(virtual_disk_size=100_001)
fields("size of metadata negative", COMPACT, Kind.HEADER_FIELD, repaired=False)(metadata_size=-512)
fields("size of the base negative", COW, Kind.HEADER_FIELD, repaired=False)(base_img_size=-512)
fields("size of the base odd", COW, Kind.HEADER_FIELD, repaired=False)(base_img_size=1000)
fields("no block size", COW, Kind.HEADER_FIELD, repaired=False)(block_size=0)
fields("no chunk size", COMPACT, Kind.HEADER_FIELD, repaired=False)(chunk_size=0)
fields("chunks too small", COMPACT, Kind.HEADER_FIELD, also=(Kind.HEADER_FIELD,), repaired=False)(
    chunk_size=512, virtual_disk_size=1 << 60
)
fields("size of the journal", COW, Kind.HEADER_FIELD, repaired=False)(journal_size=1000)
fields("grow unit negative", COMPACT, Kind.HEADER_FIELD)(storage_grow_unit=-1)
fields("grow unit less than a chunk", COMPACT, Kind.HEADER_ODD, HARMLESS)(storage_grow_unit=1)
fields("needs a base that has no name", "plain", Kind.HEADER_FIELD)(all_data_in_fvd_img=0)
fields("name of the base lost", COW, Kind.HEADER_FIELD, place="all_data_in_fvd_img", repaired=False)(base_img="")
fields("name of a base not needed lost", "all-local", Kind.HEADER_ODD, HARMLESS, repaired=False)(base_img="")
fields("flag copy_on_read", COW, Kind.HEADER_FLAG, HARMLESS)(copy_on_read=-1)
fields("flag clean_shutdown", COW, Kind.HEADER_FLAG, HARMLESS)(clean_shutdown=0x100)
fields("flag compact_image", COMPACT, Kind.HEADER_FLAG, HARMLESS)(compact_image=2)
fields("bitmap_size too small", COW, Kind.HEADER_BITMAP_SIZE)(bitmap_size=0)
fields("bitmap_size too large", BOTH, Kind.HEADER_BITMAP_SIZE, HARMLESS)(bitmap_size=8192)
fields("compact_image lost", BOTH, Kind.HEADER_COMPACT, repaired=False)(compact_image=0)
fields("alpha", COW, Kind.HEADER_ODD, HARMLESS, repaired=False)(prefetch_perf_calc_alpha=101)
fields("bytes_per_prefetch", COW, Kind.HEADER_ODD, HARMLESS, repaired=False)(bytes_per_prefetch=512)
fields("num_prefetch_slots", COW, Kind.HEADER_ODD, HARMLESS, repaired=False)(num_prefetch_slots=0)
fields("throughput", COW, Kind.HEADER_ODD, HARMLESS, repaired=False)(prefetch_min_read_throughput=-1)
fields("write_updates_base_img", COW, Kind.HEADER_ODD, HARMLESS, repaired=False)(write_updates_base_img="perhaps")
fields("need_zero_init with a table", BOTH, Kind.HEADER_ODD, HARMLESS)(need_zero_init=1)
fields("journal of a plain image", "plain", Kind.HEADER_ODD, HARMLESS)(journal_size=-1)
fields("profile of negative length", COW, Kind.PROFILE, HARMLESS, place="prefetch_profile_offset")(
    prefetch_profile_entries=-1, prefetch_profile_offset=8192
)
fields("profile over the bitmap", COW, Kind.PROFILE, HARMLESS)(prefetch_profile_offset=8192, prefetch_profile_entries=1)
fields("profile not on a page", COW, Kind.PROFILE, HARMLESS)(prefetch_profile_offset=8193)
fields("profile past the end", COW, Kind.PROFILE, HARMLESS)(prefetch_profile_offset=1 << 40, prefetch_profile_entries=1)


@damage("header cut", COW, Kind.HEADER_CUT, place="header", repaired=False)
def header_cut(good: Good) -> None:
    good.truncate(4000)


@damage("size of metadata odd", COMPACT, Kind.HEADER_ODD, HARMLESS, place="metadata_size", repaired=False)
def size_of_metadata_odd(good: Good) -> None:
    good.put(metadata_size=good.header.metadata_size + 100)


@damage("size of the base past the disk", COW, Kind.HEADER_ODD, HARMLESS, place="base_img_size", repaired=False)
def size_of_the_base_past_the_disk(good: Good) -> bytes:
    size = good.header.virtual_disk_size // 2 // 512 * 512
    good.put(virtual_disk_size=size)
    good.truncate(good.header.metadata_size + size)
    return good.read()


@damage("padding", COW, Kind.HEADER_PADDING, HARMLESS, place="header", repaired=False)
def padding(good: Good) -> None:
    good.write(8191, b"\x01")


@damage("journal too small for the table", COMPACT, Kind.JOURNAL_SMALL, HARMLESS, place="journal_size", repaired=False)
def journal_too_small_for_the_table(good: Good) -> None:
    good.layout = replace(good.layout, size=125 * 4096)
    for path in good.folder.iterdir():
        path.unlink()
    header = create(good.path, good.layout.size, good.layout.options)
    good.content = bytes(good.layout.size)
    good.header = header
    good.put(journal_size=512)


# --- regions ---

for _name in ("bitmap", "table", "journal"):
    fields(f"{_name} misplaced", BOTH, Kind.REGION_MISPLACED)(**{f"{_name}_offset": 4096})
    fields(f"{_name} past the end", BOTH, Kind.REGION_CUT, place=f"{_name}_offset")(**{f"{_name}_offset": 1 << 50})
fields("bitmap over the table", BOTH, Kind.REGION_MISPLACED, place="table_offset")(bitmap_offset=12288)
fields("table not on a sector", BOTH, Kind.REGION_MISPLACED, also=(Kind.REGION_MISPLACED,))(table_offset=12289)
fields("two regions misplaced", BOTH, Kind.REGION_MISPLACED, repaired=False)(bitmap_offset=0, table_offset=-4096)
fields("data over the journal", BOTH, Kind.REGION_MISPLACED, also=(Kind.STORAGE_TAIL,), repaired=False)(
    metadata_size=8192
)


@damage(
    "file cut in the journal",
    BOTH,
    Kind.REGION_CUT,
    place="journal_offset",
    also=(Kind.CHUNK_BEYOND_STORAGE,),
    repaired=False,
)
def file_cut_in_the_journal(good: Good) -> None:
    good.truncate(good.header.journal_offset + 100)


# --- state and journal ---


@damage("crashed", COW, Kind.REPLAY_PENDING, HARMLESS, place="clean_shutdown")
def crashed_over_a_base(good: Good) -> bytes:
    good.fill(crash=True, seed=2)
    return good.content


@damage("crashed, compact", BOTH, Kind.REPLAY_PENDING, HARMLESS, place="clean_shutdown")
def crashed_compact(good: Good) -> bytes:
    good.fill(crash=True, seed=2)
    return good.content


fields("crashed without a journal", "compact-cow-no-journal", Kind.UNCLEAN)(clean_shutdown=0)
fields("crashed without metadata", "plain", Kind.UNCLEAN, HARMLESS)(clean_shutdown=0)
fields("crashed, base not needed", "all-local", Kind.UNCLEAN, HARMLESS)(clean_shutdown=0)

BAD_RECORDS: dict[str, tuple[str, Callable[[Good], tuple[bytes, ...]]]] = {
    "bitmap record out of range": (COW, lambda good: (bits(1 << 40, 1),)),
    "bitmap record negative": (COW, lambda good: (bits(-5, 1),)),
    "bitmap record without a bitmap": (COMPACT, lambda good: (bits(0, 1),)),
    "table record without a table": (COW, lambda good: (raw_entries(0, 0),)),
    "table record past the table": (COMPACT, lambda good: (raw_entries(good.header.chunks, 0),)),
    "table record longer than its sector": (COMPACT, lambda good: (struct.pack("<III", 0xB4E6F7AC, 0, 126),)),
    "entry past the storage": (COMPACT, lambda good: (raw_entries(good.entries.index(UNALLOCATED), 1 << 20),)),
    "entry without a place": (COMPACT, lambda good: (raw_entries(0, UNALLOCATED),)),
    "chunk in use": (COMPACT, lambda good: (raw_entries(good.entries.index(UNALLOCATED), 0),)),
    "chunk twice": (COMPACT, lambda good: (raw_entries(good.entries.index(UNALLOCATED), 500, 500),)),
}


def _bad_record(name: str, *, crashed: bool) -> None:
    layout, make = BAD_RECORDS[name]

    def do(good: Good) -> None:
        good.clear_journal()
        good.set_sector(3, struct.pack("<III", 0xB4E6F7AC, 0, 0) if good.header.compact else b"", *make(good))
        if crashed:
            good.put(clean_shutdown=0)

    severity, also = (CORRUPTION, (Kind.REPLAY_PENDING,)) if crashed else (HARMLESS, ())
    where = "journal sector 3, byte " + ("12" if BY_NAME[layout].options.compact else "0")
    name = f"{name}, {'crashed' if crashed else 'closed'}"
    DAMAGES.append(Damage(name, layout, do, Kind.JOURNAL_RECORD, severity, where, also))


for _name in BAD_RECORDS:
    _bad_record(_name, crashed=False)
    _bad_record(_name, crashed=True)


@damage("bitmap lost", COW, Kind.JOURNAL_UNAPPLIED, place="journal")
def bitmap_lost(good: Good) -> None:
    good.write(good.header.bitmap_offset, bytes(4096))


@damage("table lost", COMPACT, Kind.JOURNAL_UNAPPLIED, place="journal")
def table_lost(good: Good) -> None:
    good.write(good.header.table_offset, b"\xff" * 4 * good.header.chunks)


@damage("table and bitmap lost", BOTH, Kind.JOURNAL_UNAPPLIED, place="journal")
def table_and_bitmap_lost(good: Good) -> None:
    good.write(good.header.table_offset, b"\xff" * 4 * good.header.chunks)
    good.write(good.header.bitmap_offset, bytes(4096))


@damage("table overwritten", COMPACT, Kind.JOURNAL_UNAPPLIED, place="journal")
def table_overwritten(good: Good) -> None:
    for chunk in good.allocated():
        good.set_entry(chunk, 0x1234567)


# --- bitmap ---


@damage("bits past the end", COW, Kind.BITMAP_TAIL, HARMLESS, place="bitmap")
def bits_past_the_end(good: Good) -> None:
    good.write(good.header.bitmap_offset + 4000, b"\x10")


@damage("base not needed, but bits clear", COW, Kind.BITMAP_INCOMPLETE, place="all_data_in_fvd_img", repaired=False)
def base_not_needed_but_bits_clear(good: Good) -> None:
    good.put(all_data_in_fvd_img=1)


@damage(
    "chunk under set bits lost",
    BOTH,
    Kind.BIT_WITHOUT_CHUNK,
    place="table entry 1",
    lost=True,
    also=(Kind.CHUNK_LEAKED,),
    left=(Kind.CHUNK_LEAKED,),
)
def chunk_under_set_bits_lost(good: Good) -> bytes:
    good.clear_journal()
    good.set_entry(1, UNALLOCATED)
    return good.zeroed(1)


@damage(
    "chunks under small blocks lost",
    FINE,
    Kind.BIT_WITHOUT_CHUNK,
    place="table entry ",
    lost=True,
    also=(Kind.CHUNK_LEAKED,),
    left=(Kind.CHUNK_LEAKED,),
)
def chunks_under_small_blocks_lost(good: Good) -> bytes:
    good.clear_journal()
    chunks = [c for c in good.allocated() if (c + 1) * 4096 <= good.header.base_size][2:5]
    for chunk in chunks:
        good.set_entry(chunk, UNALLOCATED)
    return good.zeroed(*chunks)


# --- table ---


@damage("bit 31", COMPACT, Kind.TABLE_BIT_31, HARMLESS, place="table entry ")
def bit_31(good: Good) -> None:
    chunk = good.allocated()[3]
    good.set_entry(chunk, good.entries[chunk] | 0x80000000)


@damage("bit 31, crashed", COMPACT, Kind.TABLE_BIT_31, HARMLESS, place="table entry ", also=(Kind.REPLAY_PENDING,))
def bit_31_crashed(good: Good) -> None:
    good.clear_journal()
    first, second = good.allocated()[2:4]
    good.set_sector(0, raw_entries(second, good.entries[second]))
    good.set_entry(second, UNALLOCATED)
    good.set_entry(first, good.entries[first] | 0x80000000)
    good.put(clean_shutdown=0)


@damage("entry behind the table", COMPACT, Kind.TABLE_TAIL, HARMLESS, place="table entry ", repaired=False)
def entry_behind_the_table(good: Good) -> None:
    good.set_entry(good.header.chunks + 3, 1)


def _beyond(number: int) -> Callable[[Good], bytes]:
    def do(good: Good) -> bytes:
        good.clear_journal()
        chunk = good.allocated()[4]
        highest = max(entry for entry in good.entries if entry != UNALLOCATED)
        assert good.entries[chunk] != highest
        good.set_entry(chunk, number)
        return good.zeroed(chunk)

    return do


for _number in (0x7FFFFFFF, 0x7FFFFFFE, 100_000):
    for _layout in (COMPACT, FINE, "compact-data-file", "compact-no-journal"):
        DAMAGES.append(
            Damage(
                f"entry {_number:#x}, {_layout}",
                _layout,
                _beyond(_number),
                Kind.CHUNK_BEYOND_STORAGE,
                place="table entry ",
                lost=True,
                also=(Kind.CHUNK_LEAKED,),
                left=(Kind.CHUNK_LEAKED,),
            )
        )


@damage("storage cut", COMPACT, Kind.CHUNK_BEYOND_STORAGE, place="table entr", lost=True)
def storage_cut(good: Good) -> bytes:
    good.truncate(good.header.metadata_size + 20 * 4096)
    good.clear_journal()
    return good.zeroed(*[chunk for chunk in good.allocated() if good.entries[chunk] >= 20])


@damage("all of the storage cut", BOTH, Kind.CHUNK_BEYOND_STORAGE, place="table entr", lost=True)
def all_of_the_storage_cut(good: Good) -> bytes:
    good.truncate(good.header.metadata_size)
    good.clear_journal()
    return good.zeroed(*good.allocated())


def _share(owners: int) -> Callable[[Good], bytes]:
    def do(good: Good) -> bytes:
        good.clear_journal()
        chunks = good.allocated()
        for chunk in chunks[1:owners]:
            good.set_entry(chunk, good.entries[chunks[0]])
        return good.read()

    return do


for _layout in (COMPACT, FINE, BOTH, "compact-data-file", "compact-no-journal"):
    DAMAGES.append(
        Damage(
            f"chunk of two, {_layout}",
            _layout,
            _share(2),
            Kind.CHUNK_SHARED,
            place="table entry ",
            also=(Kind.CHUNK_LEAKED,),
            left=(Kind.CHUNK_LEAKED,),
            lost=True,
        )
    )


@damage(
    "lost chunks, and old bytes behind the highest",
    FINE,
    Kind.CHUNK_BEYOND_STORAGE,
    place="table entry ",
    also=(Kind.CHUNK_LEAKED, Kind.STORAGE_TAIL),
    left=(Kind.CHUNK_LEAKED,),
    lost=True,
)
def lost_chunks_and_old_bytes_behind_the_highest(good: Good) -> bytes:
    good.clear_journal()
    highest = max(entry for entry in good.entries if entry != UNALLOCATED)
    good.write(good.header.metadata_size + (highest + 1) * 4096, b"old!" * 2048)
    chunks = [chunk for chunk in good.allocated() if (chunk + 1) * 4096 <= good.header.base_size][2:4]
    for chunk in chunks:
        good.set_entry(chunk, 0x7FFFFF00 + chunk)
    return good.zeroed(*chunks)


damage(
    "chunk of four",
    COMPACT,
    Kind.CHUNK_SHARED,
    place="table entry ",
    also=(Kind.CHUNK_LEAKED,),
    left=(Kind.CHUNK_LEAKED,),
    lost=True,
)(_share(4))


@damage("leak", COMPACT, Kind.CHUNK_LEAKED, LEAK, place="chunk ")
def leak(good: Good) -> bytes:
    good.clear_journal()
    chunk = good.allocated()[2]
    good.set_entry(chunk, UNALLOCATED)
    return good.zeroed(chunk)


@damage("leak in a data file", "compact-data-file", Kind.CHUNK_LEAKED, LEAK, place="chunk ")
def leak_in_a_data_file(good: Good) -> bytes:
    good.clear_journal()
    chunk = good.allocated()[2]
    good.set_entry(chunk, UNALLOCATED)
    return good.zeroed(chunk)


# --- storage ---


@damage("storage ends in a chunk", COMPACT, Kind.STORAGE_SHORT, place="storage", lost=True)
def storage_ends_in_a_chunk(good: Good) -> bytes:
    highest = max(entry for entry in good.entries if entry != UNALLOCATED)
    good.truncate(good.header.metadata_size + highest * 4096 + 1000)
    return good.read()


@damage("storage of a plain image cut", "plain", Kind.STORAGE_SHORT, place="storage", lost=True)
def storage_of_a_plain_image_cut(good: Good) -> bytes:
    good.truncate(good.header.metadata_size + 50_000)
    return good.content[:50_000].ljust(len(good.content), b"\0")


@damage("data file cut", DATA_FILE, Kind.STORAGE_SHORT, place="storage", lost=True)
def data_file_cut(good: Good) -> bytes:
    good.truncate(0, "disk.data")
    return good.read()


@damage("data file cut, no journal", "cow-no-journal", Kind.STORAGE_SHORT, place="storage", lost=True)
def data_file_cut_no_journal(good: Good) -> bytes:
    good.truncate(good.header.metadata_size + 30_000)
    return good.read()


@damage("bytes behind the storage", COMPACT, Kind.STORAGE_TAIL, LEAK)
def bytes_behind_the_storage(good: Good) -> None:
    good.write(good.header.metadata_size + 3 * good.header.virtual_disk_size, b"x" * 100_000)


@damage("bytes that a crash has left behind the highest chunk", COMPACT, Kind.STORAGE_TAIL, LEAK, place="storage")
def bytes_that_a_crash_has_left_behind_the_highest_chunk(good: Good) -> None:
    highest = max(entry for entry in good.entries if entry != UNALLOCATED)
    good.write(good.header.metadata_size + (highest + 1) * 4096 + 100, b"x")


@damage("bytes behind the disk", "plain", Kind.STORAGE_TAIL, LEAK, repaired=False)
def bytes_behind_the_disk(good: Good) -> None:
    good.write(good.header.metadata_size + good.header.virtual_disk_size + 10_000, b"x" * 100_000)


# --- other files ---


@damage("no data file", DATA_FILE, Kind.DATA_MISSING, place="data_file", repaired=False)
def no_data_file(good: Good) -> None:
    (good.folder / "disk.data").unlink()


fields("unknown format of the data", DATA_FILE, Kind.DATA_UNUSABLE, place="data_file", repaired=False)(
    data_file_fmt="qcow99"
)
fields("data elsewhere", DATA_FILE, Kind.DATA_UNCHECKED, HARMLESS, repaired=False)(data_file="nbd://localhost/x")
fields("data in the image itself", DATA_FILE, Kind.SAME_FILE, repaired=False)(data_file=IMAGE)
fields("data in the base", DATA_FILE, Kind.SAME_FILE, place="base_img", also=(Kind.STORAGE_SHORT,), repaired=False)(
    data_file="base.raw"
)
fields("no base", COW, Kind.BASE_MISSING, repaired=False)(base_img=MISSING)
fields("name of the base too long", COW, Kind.BASE_MISSING, repaired=False)(base_img="x" * 1023)
fields("base in no folder", COW, Kind.BASE_MISSING, repaired=False)(base_img="base.raw/x")
fields("base that is a folder", COW, Kind.BASE_UNUSABLE, repaired=False)(base_img="..")
fields("unknown format of the base", COW, Kind.BASE_UNUSABLE, place="base_img", repaired=False)(base_img_fmt="qcow99")
fields("base no FVD image", COW, Kind.BASE_UNUSABLE, place="base_img", repaired=False)(base_img_fmt="fvd")
fields("FVD base elsewhere", COW, Kind.BASE_UNUSABLE, repaired=False)(base_img="json:{}", base_img_fmt="fvd")
fields("base elsewhere", COW, Kind.BASE_UNCHECKED, HARMLESS, repaired=False)(base_img="nbd://localhost/x")
fields("base not encrypted", COW, Kind.BASE_UNUSABLE, place="base_img", repaired=False)(base_img_fmt="luks")
fields("image on itself", COW, Kind.CHAIN_LOOP, place="base_img", repaired=False)(base_img=IMAGE, base_img_fmt="fvd")
fields("image on itself, raw", COW, Kind.CHAIN_LOOP, repaired=False)(base_img=IMAGE)


@damage("no base, but all local", COW, Kind.BASE_MISSING, place="base_img")
def no_base_but_all_local(good: Good) -> None:
    async def work() -> None:
        image = await open_image(str(good.path), Policy(), write=True)
        await image.write(0, good.content)
        await image.close()

    trio.run(work)
    (good.folder / "base.raw").unlink()


@damage("chain that is a loop", "chain-of-two", Kind.CHAIN_LOOP, place="base_img", repaired=False)
def chain_that_is_a_loop(good: Good) -> None:
    base = good.folder / "base0.fvd"
    with base.open("r+b") as file:
        file.seek(28)
        file.write(IMAGE.encode().ljust(1024, b"\0") + b"fvd".ljust(16, b"\0"))


@damage("base cut", COW, Kind.BASE_SHORT, place="base_img_size", lost=True, repaired=False)
def base_cut(good: Good) -> bytes:
    good.truncate(good.header.base_img_size - 50_000, "base.raw")
    return good.read()


@damage("base cut where it is not used", COW, Kind.BASE_SHORT, HARMLESS, place="base_img_size", repaired=False)
def base_cut_where_it_is_not_used(good: Good) -> bytes:
    async def work() -> None:
        image = await open_image(str(good.path), Policy(), write=True)
        await image.write(image.size - 60_000, bytes(60_000))
        await image.close()

    trio.run(work)
    good.truncate(good.header.base_img_size - 50_000, "base.raw")
    return good.read()


@damage("FVD base of another size", "chain-of-two", Kind.BASE_SHORT, place="base_img_size", lost=True, repaired=False)
def fvd_base_of_another_size(good: Good) -> bytes:
    with (good.folder / "base0.fvd").open("r+b") as file:
        file.seek(12)
        file.write(struct.pack("<q", 153_600))
    return good.read()


@damage("base looks like qcow2", COW, Kind.BASE_FORMAT, place="base_img", repaired=False)
def base_looks_like_qcow2(good: Good) -> bytes:
    good.put(base_img_fmt="")
    good.write(0, b"QFI\xfb\0\0\0\x03", "base.raw")
    return good.read()


@damage("data file looks like qcow2", DATA_FILE, Kind.DATA_FORMAT, HARMLESS, place="data_file_fmt", repaired=False)
def data_file_looks_like_qcow2(good: Good) -> bytes:
    good.write(0, b"QFI\xfb\0\0\0\x03", "disk.data")
    return good.read()


# --- trying them all ---


def test_every_kind_of_damage_is_tried() -> None:
    """That of a disk that is being received is in `commands/test_moves_and_commands.py`."""
    assert {damage.kind for damage in DAMAGES} == set(Kind) - {Kind.BITMAP_EARLY}


damages = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)


@damages
def test_damage(damage: Damage, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Good(BY_NAME[damage.layout], folder)
    assert check(capsys, good.path)["findings"] == []
    after = damage.do(good)
    if after is None:
        after = good.content
    before = read_files(folder)

    report = check(capsys, good.path)
    found = [finding for finding in report["findings"] if finding["kind"] == damage.kind]
    assert kinds(report) == {damage.kind, *damage.also}
    assert any(finding["place"].startswith(damage.place) for finding in found)
    for finding in found:
        assert finding["severity"] == damage.severity
        assert finding["image"] in map(str, folder.iterdir())
        assert finding["line"].startswith(f"{finding['image']}: {finding['place']}")
        assert bool(finding["lost"]) == damage.lost
        assert not finding["repaired"]
    if not damage.repaired:
        assert not any(finding["repairable"] for finding in found)
    assert report["exit_code"] == damage.code
    assert report["left"][damage.severity] >= len(found)
    assert read_files(folder) == before, "checking has written"

    code, text = run(capsys, good.path)
    assert code == damage.code
    for finding in found[:10]:
        assert f"{damage.severity} {damage.kind}: {finding['line']} [" in text
    assert text.count("\n") <= len(report["findings"]) + 1
    assert read_files(folder) == before, "checking has written"

    report = check(capsys, good.path, "--repair")
    if not damage.repaired:
        assert report["exit_code"] == damage.code
        assert report["repaired"] == 0
        assert read_files(folder) == before, "there was nothing to repair, but something was written"
        return
    for finding in report["findings"]:
        if finding["kind"] == damage.kind and finding["severity"] == damage.severity:
            assert finding["repaired"]
    assert report["exit_code"] == (3 if damage.left else 0)
    report = check(capsys, good.path)
    assert {finding["kind"] for finding in report["findings"] if finding["severity"] != HARMLESS} == set(damage.left)
    assert good.read() == after
    assert reference.check(good.path, "fvdfs") == []
    assert {name: read_files(folder).get(name) for name in before if not name.startswith("disk.")} == {
        name: content for name, content in before.items() if not name.startswith("disk.")
    }
    if damage.left:
        assert check(capsys, good.path, "--repair")["exit_code"] == 0
        assert good.read() == after
        report = check(capsys, good.path)
    assert all(finding["severity"] == HARMLESS for finding in report["findings"])
    trio.run(_write_and_close, good.path)


async def _write_and_close(path: Path) -> None:
    """An image that was repaired can be written to."""
    image = await open_image(str(path), Policy(), write=True)
    await image.write(0, b"x" * 1000)
    await image.close()


# --- repairs that are cut short ---


def layers_over(stores: Mapping[str, Store], name: str = IMAGE, above: tuple[str, ...] = ()) -> list[CheckLayer]:
    """The chain of images in these files, opened."""
    meta = stores[name]

    async def first() -> bytes:
        raw = bytearray(HEADER_SPACE)
        count = await meta.pread(memoryview(raw), 0)
        return bytes(raw[:count])

    check = check_header(trio.run(first), 1 << 60, Findings(name))
    layer = CheckLayer(name, meta)
    if check is None:
        return [layer]
    header = check.header
    absent = Absent(Kind.DATA_MISSING, CORRUPTION, "is missing")
    layer.data = stores.get(header.data_file, absent) if header.data_file else meta
    if not header.has_base:
        return [layer]
    if header.base_img_fmt != "fvd":
        layer.base = stores.get(header.base_img, Absent(Kind.BASE_MISSING, CORRUPTION, "is missing"))
        return [layer]
    if header.base_img not in stores or header.base_img in (*above, name, "base.raw"):
        layer.base = Absent(Kind.BASE_MISSING, CORRUPTION, "is missing")
        return [layer]
    below = layers_over(stores, header.base_img, (*above, name))
    below[0].is_base = True
    layer.base = below[0]
    return [layer, *below]


def check_stores(stores: Mapping[str, Store], *, repair: bool = False) -> Report:
    return trio.run(functools.partial(check_layers, layers_over(stores), repair=repair, errors=[]))


class Watched(CrashStore):
    """Notes which writes come while the header says that the image is closed."""

    def _write(self, data: Buffer, offset: int) -> None:
        if int.from_bytes(self.data[4300:4304], "little"):
            self.while_closed.append((offset, offset + len(data)))
        super()._write(data, offset)

    while_closed: list[tuple[int, int]]


class Left:
    """Files that a repair has left, in whatever state."""

    def __init__(self, folder: Path, files: Mapping[str, bytes]) -> None:
        self._folder = folder
        self._written = dict(files)

    def put(self, files: Mapping[str, bytes | bytearray]) -> None:
        for name, content in files.items():
            if self._written.get(name) != content:
                self._written[name] = bytes(content)
                (self._folder / name).write_bytes(content)

    def read(self) -> bytes | None:
        """The disk; None where it cannot be read."""
        try:
            header = reference.Header(self._folder / IMAGE)
            if max(header.virtual_disk_size, header.bitmap_size, header.journal_size) > SmallStore.LIMIT:
                return None
            return b"".join(reference.read_disk(self._folder / IMAGE))
        except (ValueError, OSError, IndexError):
            return None

    def repair(
        self, files: Mapping[str, bytes | bytearray], after: bytes, *, strict: bool = True, kept: Collection[Kind] = ()
    ) -> None:
        """Repair once more, and look; `strict`: with the reference reader's check as well.

        `kept`: what may be left.
        """
        stores = {
            name: MemoryStore(content, name, writable=name.startswith("disk.")) for name, content in files.items()
        }
        for _ in range(3):  # without a journal, an interrupted repair is one more thing to repair
            report = check_stores(stores, repair=True)
            assert report.errors == []
            if report.exit_code == 0:
                break
        left = {f.kind for f in report.findings if f.severity is not HARMLESS and not f.repaired}
        assert left <= set(kept), render(report)
        self.put({name: store.data for name, store in stores.items()})
        assert self.read() == after
        if strict:
            assert reference.check(self._folder / IMAGE, "fvdfs") == []


# One of each kind in each layout.
REPAIRABLE = {(d.kind, d.severity, d.layout): d for d in DAMAGES if d.repaired}.values()
repairable = pytest.mark.parametrize("damage", REPAIRABLE, ids=lambda damage: damage.name)


def half_old(found: bytes, old: bytes, new: bytes) -> bool:
    """Whether every sector is the old or the new one."""
    if found in (old, new):
        return True
    return len(found) == len(new) and all(
        found[at : at + 512] in (old[at : at + 512], new[at : at + 512]) for at in range(0, len(new), 512)
    )


@repairable
def test_power_cuts(damage: Damage, folder: Path) -> None:
    """The power is cut after each change and flush of a repair."""
    good = Good(BY_NAME[damage.layout], folder)
    after = damage.do(good)
    if after is None:
        after = good.content
    files = read_files(folder)
    left = Left(folder, files)
    before = left.read()
    clock = Clock()
    crash_stores = {n: Watched(c, n, clock=clock) for n, c in files.items() if n.startswith("disk.")}
    for store in crash_stores.values():
        store.while_closed = []
    others = {n: MemoryStore(c, n, writable=False) for n, c in files.items() if n not in crash_stores}
    report = check_stores({**crash_stores, **others}, repair=True)
    assert report.exit_code in (0, 3)
    assert any(finding.repaired for finding in report.findings)
    assert clock.now > 1
    image = crash_stores[IMAGE]
    for region in Header.decode(bytes(image.data[:HEADER_SPACE]), IMAGE).regions():
        for start, stop in image.while_closed if region.name != "journal" else ():
            assert stop <= region.offset or region.end <= start, f"{region.name} changes while the image is closed"
    for at in range(clock.now + 1):
        rng = random.Random(at)
        now = {**files, **{name: store.crash(rng, at) for name, store in crash_stores.items()}}
        left.put(now)
        found = left.read()
        if before is not None:
            assert found is not None
            assert half_old(found, before, after), f"cut at {at}"
        left.repair(now, after)


@repairable
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_faults(damage: Damage, error: int, folder: Path) -> None:
    """Each call of a repair fails in turn: that is told, and another repair goes on."""
    good = Good(BY_NAME[damage.layout], folder)
    after = damage.do(good)
    if after is None:
        after = good.content
    files = read_files(folder)
    left = Left(folder, files)
    nth = 0
    while True:
        nth += 1
        plan = FaultPlan(nth, error, CALLS if error == errno.EIO else ("pwrite", "resize"), torn=True)
        inner = {n: MemoryStore(c, n, writable=n.startswith("disk.")) for n, c in files.items()}
        layers = layers_over(inner)
        stores = {id(store): FaultStore(store, plan) for store in inner.values()}
        for layer in layers:
            layer.meta = stores[id(layer.meta)]
            layer.data = stores.get(id(layer.data))
            if not isinstance(layer.base, CheckLayer | Absent):
                layer.base = stores.get(id(layer.base))
        report = trio.run(functools.partial(check_layers, layers, repair=True, errors=[]))
        if not plan.failures:
            break
        assert report.exit_code == 1, f"call {nth} has failed, and nobody says so"
        assert os.strerror(error) in render(report)
        left.repair({name: store.data for name, store in inner.items()}, after)
    assert nth > 1


# --- any damage -----------------------------------------------------------------------------------

FUZZED = [COW, COMPACT, BOTH, FINE, "compact-cow-64k-16k", "cow-no-journal", "plain", "all-local", "chain-of-two"]
NUMBERS = [*range(-2, 3), 511, 512, 4096, 8192, 12288, 1 << 20, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)]
ENTRIES = [0, 1, 2, 0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, UNALLOCATED]
NUMERIC = [name for name, code in zip(reference.NAMES, reference.CODES, strict=True) if code in "iIq"]

mutations = st.one_of(
    st.tuples(st.just("field"), st.sampled_from(NUMERIC[2:]), st.sampled_from(NUMBERS)),
    st.tuples(st.just("field"), st.sampled_from(NUMERIC[2:]), st.integers(-(1 << 63), (1 << 63) - 1)),
    st.tuples(st.just("bytes"), st.integers(8, 1 << 17), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("entry"), st.integers(0, 200), st.sampled_from(ENTRIES)),
    st.tuples(st.just("entry"), st.integers(0, 200), st.integers(0, 100)),
    st.tuples(
        st.just("record"), st.integers(0, 7), st.builds(bits, st.integers(-9, 800), st.integers(0, 800)) | st.binary()
    ),
    st.tuples(st.just("record"), st.integers(0, 7), st.builds(raw_entries, st.integers(0, 90), st.integers(0, 90))),
    st.tuples(st.just("cut"), st.integers(0, 1 << 19), st.just(0)),
    st.tuples(st.just("field"), st.just("clean_shutdown"), st.just(0)),
)


def mutate(content: bytearray, header: Header, mutation: tuple[str, Any, Any]) -> None:
    what, where, value = mutation
    if what == "field":
        index = reference.NAMES.index(where)
        code = reference.CODES[index]
        at, size = struct.calcsize("<" + "".join(reference.CODES[:index])), struct.calcsize(code)
        content[at : at + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif what == "bytes":
        content[where : where + len(value)] = value
    elif what == "entry" and header.compact:
        at = header.table_offset + where % header.chunks * 4
        content[at : at + 4] = struct.pack("<I", value)
    elif what == "record" and header.journal_size:
        at = header.journal_offset + where % (header.journal_size // 512) * 512
        content[at : at + len(value[:512])] = value[:512]
    elif what == "cut":
        del content[where:]


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Good]:
    result = {}
    for name in FUZZED:
        folder = tmp_path_factory.mktemp("good") / "images"
        folder.mkdir()
        result[name] = Good(BY_NAME[name], folder)
    return result


class SmallStore(MemoryStore):
    """A store in which no file is ever long."""

    LIMIT = 16 * MIB

    def _resize(self, size: int) -> None:
        if size > self.LIMIT:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        super()._resize(size)

    def _write(self, data: Buffer, offset: int) -> None:
        assert offset + len(data) <= self.LIMIT
        super()._write(data, offset)


def memory(files: Mapping[str, bytes | bytearray], *, writable: bool = False) -> dict[str, MemoryStore]:
    return {n: SmallStore(c, n, writable=writable and n.startswith("disk.")) for n, c in files.items()}


def passes(files: Mapping[str, bytes | bytearray]) -> bool:
    try:
        Header.decode(bytes(files[IMAGE][:HEADER_SPACE]), IMAGE).check(IMAGE, len(files[IMAGE]))
    except FormatError:
        return False
    return True


async def _load_and_read(files: Mapping[str, bytes | bytearray]) -> bytes:
    image = await load(memory(files))
    return bytes(await image.read(0, image.size))


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("FVDFS_CHECK_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=st.sampled_from(FUZZED), changes=st.lists(mutations, min_size=1, max_size=4))
def test_any_damage(name: str, changes: list[tuple[str, Any, Any]], goods: dict[str, Good], tmp_path: Path) -> None:
    """No damage makes a check or a repair fail; what is clean in the end can be used; nothing else is lost."""
    files: dict[str, bytes | bytearray] = dict(read_files(goods[name].folder))
    content = bytearray(files[IMAGE])
    for change in changes:
        mutate(content, goods[name].header, change)
    files[IMAGE] = content
    for path in tmp_path.iterdir():
        path.unlink()
    left = Left(tmp_path, {})
    left.put(files)
    before = left.read() if passes(files) else None
    try:
        report = check_stores(memory(files))
    except NotFvd:
        assert content[:4] != goods[name].path.read_bytes()[:4]
        return
    assert report.errors == []
    assert json.loads(json.dumps(describe(report)))["exit_code"] == report.exit_code
    assert render(report).isprintable() or "\n" in render(report)
    found = {finding.kind for finding in report.findings}
    if not passes(files):
        assert report.exit_code == 2, "Header.check refuses what is said to be usable"

    stores = memory(files, writable=True)
    for _ in range(3):
        repaired = check_stores(stores, repair=True)
        assert all("ended early" in error for error in repaired.errors)
        if repaired.exit_code == 0:
            break
    after_files = {**files, **{n: bytes(s.data) for n, s in stores.items()}}
    left.put(after_files)
    if repaired.exit_code == 2 and not any(f.repairable or f.repaired for f in report.findings):
        assert after_files == files, "there was nothing to repair, but something was written"
    if repaired.exit_code == 0:
        assert passes(after_files)
        again = check_stores(memory(after_files))
        assert again.exit_code == 0
        assert not any(finding.severity is not HARMLESS for finding in again.findings)
        after = left.read()
        if after is None:
            return  # the reference reader is stricter
        assert after == trio.run(_load_and_read, after_files), "the readers differ"
        # Where entries are wrong that a replay puts right, the reference reader follows the wrong ones.
        replayed = Kind.REPLAY_PENDING in found and any(change[0] in ("entry", "bytes") for change in changes)
        if before is not None and Kind.JOURNAL_UNAPPLIED not in found and not replayed:
            assert after == before, "a repair has changed the disk"


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(FUZZED),
    size=st.integers(8192, 1 << 20) | st.integers(8192, 1 << 62),
    changes=st.lists(mutations.filter(lambda m: m[0] == "field"), max_size=3),
)
def test_the_rules_are_those_of_the_header(
    name: str, size: int, changes: list[tuple[str, Any, Any]], goods: dict[str, Good]
) -> None:
    """A header is refused by `Header.check` where there is corruption in it, and only there."""
    content = bytearray(goods[name].path.read_bytes()[:HEADER_SPACE])
    for change in changes:
        mutate(content, goods[name].header, change)
    found = Findings(IMAGE)
    check = check_header(bytes(content), size, found)
    assert check is not None
    refused = ""
    try:
        Header.decode(bytes(content), IMAGE).check(IMAGE, size)
    except FormatError as error:
        refused = str(error)
    stricter = {Kind.HEADER_COMPACT, Kind.HEADER_BITMAP_SIZE}
    corrupt = {f.kind for f in found.listed if f.severity is CORRUPTION}
    if refused:
        assert corrupt, refused
    else:
        assert corrupt <= stricter
    if check.sound:
        check.header.check(IMAGE, size)
        assert all(f.repairable for f in found.listed if f.severity is CORRUPTION)
        again = Findings(IMAGE)
        repaired = check_header(check.header.encode().ljust(HEADER_SPACE, b"\0"), size, again)
        assert repaired is not None
        assert not again.corrupt
        assert not again.to_repair, "a second look finds more to repair"


# --- good images ----------------------------------------------------------------------------------

# The original loses chunks that it has copied into when it crashes: they are leaks indeed.
LEAKY = {"block-over-chunks": 1, "crash-written-over-copied-compact": 6}


@pytest.mark.slow
@pytest.mark.parametrize("golden", MANIFEST, ids=lambda golden: str(golden["name"]))
def test_a_golden_image_is_clean(golden: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = extract(golden["name"], folder)
    before = read_files(folder)
    report = check(capsys, path)
    leaked = sum(
        int(finding["text"].split("(")[1].split()[0]) // reference.Header(path).chunk_size
        for finding in report["findings"]
        if finding["severity"] == LEAK
    )
    assert leaked == LEAKY.get(golden["name"], 0)
    assert report["exit_code"] == (3 if leaked else 0)
    assert kinds(report) <= {Kind.REPLAY_PENDING, Kind.CHUNK_LEAKED}
    assert (Kind.REPLAY_PENDING in kinds(report)) == golden["crashed"]
    assert read_files(folder) == before
    report = check(capsys, path, "--repair")
    assert report["exit_code"] == 0
    assert reference.sha256(path) == golden["sha256"]
    assert reference.check(path) == []
    assert reference.Header(path).clean_shutdown == 1
    if not golden["crashed"]:
        assert read_files(folder) == before, "an image without a fault was written to"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_good_image_is_clean(layout: Layout, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout.build(folder)
    assert run(capsys, folder / IMAGE) == (0, f"{folder / IMAGE}: clean\n")
    good = Good(layout, folder)
    before = read_files(folder)
    assert check(capsys, good.path, "--repair")["findings"] == []
    assert read_files(folder) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(b""), "not an FVD image"),
        (lambda path: path.write_bytes(b"x" * 10_000), "not an FVD image"),
        (lambda path: path.mkdir(), "neither a regular file nor a block device"),
        (lambda path: os.mkfifo(path), "neither a regular file nor a block device"),
    ],
    ids=["missing", "empty", "other", "folder", "fifo"],
)
def test_what_is_no_image(
    make: Callable[[Path], None], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(folder / "a.fvd")
    for options in ([], ["--repair"], ["--json"]):
        assert main(["check", str(folder / "a.fvd"), *options]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
        assert message in output.err


# --- crashes of the mount -------------------------------------------------------------------------

HARMLESS_AFTER_CRASH = {Kind.REPLAY_PENDING, Kind.BITMAP_TAIL, Kind.TABLE_TAIL, Kind.TABLE_BIT_31}


@pytest.mark.slow
@pytest.mark.parametrize("layout", BY_NAME.values(), ids=lambda layout: layout.name)
def test_a_power_cut_leaves_no_corruption(layout: Layout, folder: Path) -> None:
    """What a mount leaves behind at any moment is at most a leak; and a repair changes nothing of the disk."""
    layout.build(folder)
    files = read_files(folder)
    clock = Clock()
    stores: dict[str, Store] = {
        n: CrashStore(c, n, clock=clock) if n.startswith("disk.") else MemoryStore(c, n, writable=False)
        for n, c in files.items()
    }

    async def work() -> None:
        image = await load(stores)
        await image.begin_writing()
        rng = random.Random(1)
        for number in range(6):
            offset = rng.randrange(image.size)
            await image.write(offset, rng.randbytes(min(rng.randrange(1, 20_000), image.size - offset)))
            if number % 2:
                await image.fsync()
        await image.resize(image.size - 20 * 512, shrink=True)
        await image.write(image.size - 5000, b"x" * 5000)
        await image.resize(image.size + 30 * 512)
        await image.write(image.size - 9000, b"y" * 5000)
        await image.close()

    trio.run(work)
    left = Left(folder, files)
    for at in range(clock.now + 1):
        rng = random.Random(at)
        now = {**files, **{n: s.crash(rng, at) for n, s in stores.items() if isinstance(s, CrashStore)}}
        report = check_stores(memory(now))
        assert report.errors == []
        for finding in report.findings:
            expected = finding.kind in HARMLESS_AFTER_CRASH
            if finding.kind is Kind.UNCLEAN:
                expected = layout.options.journal_size == 0
            elif finding.kind in (Kind.CHUNK_LEAKED, Kind.STORAGE_TAIL):
                expected = finding.severity is not CORRUPTION
            assert expected, f"cut at {at}: {finding.line}"
        left.put(now)
        found = left.read()
        assert found is not None
        left.repair(now, found, strict=False, kept={Kind.STORAGE_TAIL})


# --- devices --------------------------------------------------------------------------------------


class Device(MemoryStore):
    """A store of a fixed size."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data, name)
        self.fixed_size = True

    def _resize(self, size: int) -> None:
        if size > len(self.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, data: Buffer, offset: int) -> None:
        assert offset + len(data) <= len(self.data)
        super()._write(data, offset)

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        return stop, False


def on_device(good: Good, room: int) -> dict[str, MemoryStore]:
    """The image on a device with that much room behind it, which is not zeros."""
    files = read_files(good.folder)
    return {
        n: Device(c + b"\xdd" * room, n) if n == IMAGE else MemoryStore(c, n, writable=False) for n, c in files.items()
    }


def content_of(stores: Mapping[str, MemoryStore]) -> bytes:
    return trio.run(_load_and_read, {name: store.data for name, store in stores.items()})


@pytest.mark.parametrize("layout", [COMPACT, BOTH, FINE])
def test_on_a_device(layout: str, folder: Path) -> None:
    good = Good(BY_NAME[layout], folder)
    assert check_stores(on_device(good, 0)).findings == []
    stores = on_device(good, 10 * MIB)
    assert check_stores(stores).findings == [], "room on a device is no leak"
    good.clear_journal()
    first, second, third = good.allocated()[:3]
    good.set_entry(second, good.entries[first])
    good.set_entry(third, 100_000)
    expected = good.read()
    stores = on_device(good, 10 * MIB)
    report = check_stores(stores, repair=True)
    assert report.exit_code == 0, render(report)
    assert {f.kind for f in report.findings if f.repaired} == {Kind.CHUNK_SHARED, Kind.CHUNK_BEYOND_STORAGE}
    assert content_of(stores) == expected
    report = check_stores(stores, repair=True)
    assert report.exit_code == 0
    assert "used again" in render(report)
    assert content_of(stores) == expected


def test_a_device_that_is_full(folder: Path) -> None:
    good = Good(BY_NAME[BOTH], folder)
    good.clear_journal()
    first, second = good.allocated()[:2]
    good.set_entry(second, good.entries[first])
    highest = max(entry for entry in good.entries if entry != UNALLOCATED)
    good.truncate(good.header.metadata_size + (highest + 1) * good.header.chunk_size)
    expected = good.read()
    stores = on_device(good, good.header.chunk_size - 1)
    report = check_stores(stores, repair=True)
    assert report.exit_code == 1
    assert "the device ends at" in report.errors[0]
    assert report.left[CORRUPTION] == 1
    assert reference_of(stores, folder) == expected


def reference_of(stores: Mapping[str, MemoryStore], folder: Path) -> bytes:
    for name, store in stores.items():
        (folder / name).write_bytes(store.data)
    return b"".join(reference.read_disk(folder / IMAGE))


def test_a_device_that_is_too_small(folder: Path) -> None:
    good = Good(BY_NAME["plain"], folder)
    good.truncate(good.header.metadata_size + 50_000)
    report = check_stores(on_device(good, 0), repair=True)
    assert report.exit_code == 2
    (finding,) = report.findings
    assert finding.kind is Kind.STORAGE_SHORT
    assert "make the device larger" in finding.repair


def test_copies_that_find_no_room_leave_the_storage_as_it_was(folder: Path) -> None:
    good = Good(BY_NAME[BOTH], folder)
    good.clear_journal()
    first, second = good.allocated()[:2]
    good.set_entry(second, good.entries[first])

    class Full(MemoryStore):
        async def pwrite(self, data: Buffer, offset: int) -> None:
            if offset >= size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            await super().pwrite(data, offset)

    files = read_files(folder)
    highest = max(entry for entry in good.entries if entry != UNALLOCATED)
    size = good.header.metadata_size + (highest + 1) * good.header.chunk_size
    files[IMAGE] = files[IMAGE][:size]
    stores = {name: Full(content, name) for name, content in files.items()}
    report = check_stores(stores, repair=True)
    assert report.exit_code == 1
    assert os.strerror(errno.ENOSPC) in report.errors[0]
    assert len(stores[IMAGE].data) == size
    assert reference_of(stores, folder) == good.read()


# --- chains and other formats ---------------------------------------------------------------------


def test_damage_in_a_base_is_found_but_not_repaired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Good(BY_NAME["chain-of-three"], folder)
    base = folder / "base1.fvd"
    header = Header.decode(base.read_bytes()[:HEADER_SPACE], "")
    with base.open("r+b") as file:
        file.seek(header.journal_offset)
        file.write(bytes(header.journal_size))
        file.seek(header.table_offset)
        file.write(struct.pack("<I", 0x7FFFFFF0))
    before = read_files(folder)
    report = check(capsys, good.path, "--repair")
    assert report["exit_code"] == 2
    assert [link["image"] for link in report["chain"]] == [
        str(folder / n) for n in (IMAGE, base.name, "base0.fvd", "base.raw")
    ]
    assert {finding["image"] for finding in report["findings"]} == {str(base)}
    (finding,) = [finding for finding in report["findings"] if finding["kind"] == Kind.CHUNK_BEYOND_STORAGE]
    assert not finding["repairable"]
    assert f"fvdfs check --repair {base}" in finding["repair"]
    assert read_files(folder) == before
    for _ in range(2):
        check(capsys, base, "--repair")
    assert check(capsys, good.path)["exit_code"] == 0


def test_bits_over_zeros_of_the_base_are_no_damage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The original leaves such (format.md, "Left to the writer"); without the base nobody can tell."""
    good = Good(BY_NAME["compact-cow-64k-16k"], folder)
    good.clear_journal()
    chunk = next(c for c in good.allocated() if (c + 1) * good.header.chunk_size <= good.header.base_size)
    good.set_entry(chunk, UNALLOCATED)
    good.write(chunk * good.header.chunk_size, bytes(good.header.chunk_size), "base.raw")
    assert kinds(check(capsys, good.path)) == {Kind.CHUNK_LEAKED}
    good.write((chunk + 1) * good.header.chunk_size - 1, b"\x01", "base.raw")
    assert kinds(check(capsys, good.path)) == {Kind.CHUNK_LEAKED, Kind.BIT_WITHOUT_CHUNK}
    (folder / "base.raw").unlink()
    report = check(capsys, good.path)
    assert kinds(report) == {Kind.CHUNK_LEAKED, Kind.BIT_WITHOUT_CHUNK, Kind.BASE_MISSING}
    (finding,) = [finding for finding in report["findings"] if finding["kind"] == Kind.BIT_WITHOUT_CHUNK]
    assert finding["severity"] == HARMLESS
    assert finding["lost"]


def test_bits_without_a_chunk_over_an_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the base is an image, it is read as such."""
    good = Good(BY_NAME["chain-of-three"], folder)
    good.clear_journal()
    chunk = next(c for c in good.allocated() if (c + 1) * good.header.chunk_size <= good.header.base_size)
    good.set_entry(chunk, UNALLOCATED)
    expected = good.zeroed(chunk)
    assert Kind.BIT_WITHOUT_CHUNK in kinds(check(capsys, good.path, "--repair"))
    assert good.read() == expected
    assert kinds(check(capsys, good.path)) == {Kind.CHUNK_LEAKED}


# --- much damage, much space ----------------------------------------------------------------------


def test_all_damage_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Good(BY_NAME[BOTH], folder)
    good.put(virtual_disk_size=-1, block_size=3, copy_on_read=9, journal_size=7, storage_grow_unit=-1, metadata_size=1)
    good.put(base_img="new\nline\x1b[31m\udcff".encode(errors="surrogateescape"))
    report = check(capsys, good.path)
    assert {finding["place"] for finding in report["findings"]} >= {
        "virtual_disk_size",
        "block_size",
        "copy_on_read",
        "journal_size",
        "storage_grow_unit",
        "metadata_size",
        "base_img",
    }
    assert not any(finding["repairable"] for finding in report["findings"])
    code, text = run(capsys, good.path)
    assert code == 2
    assert "not repaired while the header is damaged otherwise" in text
    assert all(line.isprintable() for line in text.splitlines())
    assert "new\\nline\\x1b[31m\\udcff" in text


def test_long_lists_are_cut(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    good = Good(BY_NAME[COMPACT], folder)
    good.clear_journal()
    for chunk in range(0, 84, 2):
        good.set_entry(chunk, 0x700000 + chunk)
    report = check(capsys, good.path)
    assert len(report["findings"]) >= 42
    text = run(capsys, good.path)[1]
    assert text.count("chunk-beyond-storage: ") == 20
    assert "22 more findings of chunk-beyond-storage; --json lists them" in text
    for module in (findings, contents):
        monkeypatch.setattr(module, "MAX_LISTED", 5)
    report = check(capsys, good.path)
    listed = [finding for finding in report["findings"] if finding["kind"] == Kind.CHUNK_BEYOND_STORAGE]
    assert len(listed) == 5
    assert {"kind": "chunk-beyond-storage", "severity": "corruption", "count": 37} in report["unlisted"]
    assert report["left"]["corruption"] == 42
    assert check(capsys, good.path, "--repair")["left"]["corruption"] == 0


def test_a_table_with_too_much_damage_is_not_repaired(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Good(BY_NAME[COMPACT], folder)
    good.put(clean_shutdown=0)
    for chunk in range(3):
        good.set_entry(chunk, 0x700000 + chunk)
    monkeypatch.setattr(examine, "MAX_DAMAGED", 2)
    before = read_files(folder)
    report = check(capsys, good.path, "--repair")
    assert report["exit_code"] == 1
    assert "too many" in report["errors"][0]
    assert read_files(folder) == before


@pytest.mark.parametrize("region", ["bitmap", "table"])
def test_a_region_that_is_too_large(
    region: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Good(BY_NAME[BOTH], folder)
    monkeypatch.setattr(examine, "MAX_REGION", 4095)
    report = check(capsys, good.path)
    assert report["exit_code"] == 1
    assert any(region in error for error in report["errors"])


# --- parts ----------------------------------------------------------------------------------------


def test_ranges() -> None:
    assert bounded([(0, 5), (5, 6), (7, 9), (9, 9)]) == ((0, 6), (7, 9))
    many = bounded((at * 10, at * 10 + 1) for at in range(2000))
    assert len(many) == findings.MAX_RANGES
    assert many[-1] == (9990, 19991)
    assert span([]) == "no byte of the disk"
    assert span([(0, 512)]) == "bytes 0..512 of the disk"
    assert span([(at, at + 1) for at in range(0, 12, 2)]).endswith("6..7 and 2 more ranges of the disk")
    assert printable("a\nb\udcff\x1b") == "a\\nb\\udcff\\x1b"


def test_space_is_given_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Good(BY_NAME["compact-64k"], folder)
    good.clear_journal()
    chunk = good.allocated()[0]
    good.set_entry(chunk, UNALLOCATED)
    used = good.path.stat().st_blocks
    report = check(capsys, good.path, "--repair")
    assert report["repaired"] == 1
    assert good.path.stat().st_blocks <= used - 128
    (finding,) = check(capsys, good.path)["findings"]
    assert finding["severity"] == HARMLESS
    assert "take no space" in finding["text"]


def test_a_crash_without_a_journal_is_not_taken_for_clean_while_there_is_other_damage(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Good(BY_NAME["compact-no-journal"], folder)
    good.put(clean_shutdown=0)
    good.set_entry(0, 0x7FFFFFF0)
    report = check(capsys, good.path, "--repair")
    assert report["left"]["corruption"] == 1
    assert reference.Header(good.path).clean_shutdown == 0
    assert check(capsys, good.path, "--repair")["left"]["corruption"] == 0
    assert reference.Header(good.path).clean_shutdown == 1


def test_a_smaller_disk_does_not_make_leaks_of_its_chunks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A virtual_disk_size that has become smaller by damage: what it hides must not be given back."""
    good = Good(BY_NAME[COMPACT], folder)
    good.put(virtual_disk_size=8 * 4096)
    report = check(capsys, good.path, "--repair")
    assert kinds(report) == {Kind.TABLE_TAIL, Kind.JOURNAL_RECORD}
    good.put(virtual_disk_size=good.header.virtual_disk_size)
    assert good.read() == good.content


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "no journal"])
def test_a_debt_to_the_base_is_not_forgotten(journal: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mount that finds an image not closed has to write to its base what it owes; it must see that."""
    good = Good(BY_NAME[FINE if journal else "cow-no-journal"], folder)
    good.put(write_updates_base_img="writeback")
    if journal:
        good.fill(crash=True, seed=2)
    good.put(clean_shutdown=0)
    before = read_files(folder)
    content = good.read()
    report = check(capsys, good.path, "--repair")
    assert report["exit_code"] == (0 if journal else 2)
    assert "bring the base up to date" in report["findings"][0]["repair"]
    assert read_files(folder) == before
    good.write(good.header.bitmap_offset + 4000, b"\x10")
    report = check(capsys, good.path, "--repair")
    assert [finding["kind"] for finding in report["findings"] if finding["repaired"]] == [Kind.BITMAP_TAIL]
    assert reference.Header(good.path).clean_shutdown == 0
    assert good.read() == content


def test_a_missing_file_is_named_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = Good(BY_NAME[DATA_FILE], folder)
    (folder / "disk.data").unlink()
    [finding] = check(capsys, good.path)["findings"]
    assert f"data_file=disk.data: is missing: {folder}/disk.data: No such file or directory" in finding["line"]


def test_a_journal_that_cannot_be_replayed_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the data file nobody knows which entries are right: nothing may be cleared."""
    good = Good(BY_NAME["compact-cow-data-file"], folder)
    good.fill(crash=True, seed=2)
    good.write(good.header.bitmap_offset + 4000, b"\x10")
    good.set_sector(5, struct.pack("<III", 0xB4E6F7AC, 0, 126))
    data = (folder / "disk.data").read_bytes()
    (folder / "disk.data").unlink()
    before = read_files(folder)
    report = check(capsys, good.path, "--repair")
    assert kinds(report) == {Kind.DATA_MISSING, Kind.BITMAP_TAIL, Kind.JOURNAL_RECORD}
    assert read_files(folder) == before
    (folder / "disk.data").write_bytes(data)
    good.set_sector(5)
    report = check(capsys, good.path, "--repair")
    assert report["exit_code"] == 0
    assert good.read() == good.content
