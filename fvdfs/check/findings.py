"""What a check finds: each thing that is wrong, how bad it is, what a repair does about it.

A *corruption* changes what the disk holds, or can do so, or keeps the image from being opened; a *leak*
is space that nothing refers to; a *harmless* finding costs neither bytes nor space. Of each kind the
first MAX_LISTED findings are listed, the others counted: no image makes the list endless.

Pure.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from bitarray import bitarray

from fvdfs.errors import printable

MAX_LISTED = 10_000  # findings of one kind; more than a person reads, and a few MiB of memory
MAX_RANGES = 1_000  # ranges of lost bytes of one finding, likewise

Range = tuple[int, int]
"""Half-open: [start, stop)."""


class Severity(enum.StrEnum):
    """How bad a finding is."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    HARMLESS = "harmless"


class Kind(enum.StrEnum):
    """What a finding is about; a corruption unless the comment says otherwise.

    The values are for programs, and never change.
    """

    HEADER_CUT = "header-cut"  # the file ends inside the header
    HEADER_VERSION = "header-version"  # a version other than 1
    HEADER_STRING = "header-string"  # a string without a NUL
    HEADER_FILL = "header-fill"  # bytes behind the end of a string (harmless)
    HEADER_FIELD = "header-field"  # a value that `Header.check` refuses
    HEADER_FLAG = "header-flag"  # a flag that is neither 0 nor 1 (harmless)
    HEADER_BITMAP_SIZE = "header-bitmap-size"  # not the size that the blocks need (harmless where it is more)
    HEADER_COMPACT = "header-compact"  # fields of a compact image in one that is not
    HEADER_ODD = "header-odd"  # a value that makes no sense, but costs nothing (harmless)
    HEADER_PADDING = "header-padding"  # bytes behind the fields (harmless)
    REGION_MISPLACED = "region-misplaced"  # a region that overlaps another, or is not on a sector
    REGION_CUT = "region-cut"  # a region that ends past the file
    PROFILE = "profile"  # a prefetch profile where none can be (harmless)
    REPLAY_PENDING = "replay-pending"  # not closed; the next opening replays the journal (harmless)
    UNCLEAN = "unclean"  # not closed, and no journal (harmless without metadata)
    JOURNAL_RECORD = "journal-record"  # a record that a replay skips (harmless in a closed image)
    JOURNAL_UNAPPLIED = "journal-unapplied"  # records that change a closed image
    JOURNAL_SMALL = "journal-small"  # less than all entries need (harmless)
    BITMAP_TAIL = "bitmap-tail"  # bits behind the last block (harmless)
    BITMAP_EARLY = "bitmap-early"  # bits that are set, although the disk may still be written at its source
    BITMAP_INCOMPLETE = "bitmap-incomplete"  # bits that are clear, although the base is not needed
    BIT_WITHOUT_CHUNK = "bit-without-chunk"  # local blocks that have no chunk (harmless where nobody can tell)
    TABLE_BIT_31 = "table-bit-31"  # a state of memory, on disk (harmless)
    TABLE_TAIL = "table-tail"  # entries behind the last chunk (harmless)
    CHUNK_BEYOND_STORAGE = "chunk-beyond-storage"  # a number past the end of the storage, or of all numbers
    CHUNK_SHARED = "chunk-shared"  # a number that occurs twice
    CHUNK_LEAKED = "chunk-leaked"  # a number that no entry has (a leak; harmless where it takes no space)
    STORAGE_SHORT = "storage-short"  # storage that ends before the disk, or inside a chunk
    STORAGE_TAIL = "storage-tail"  # storage behind all that can be used (a leak)
    DATA_MISSING = "data-missing"  # the data file is not there
    DATA_UNUSABLE = "data-unusable"  # the data file is there, but cannot be one
    DATA_UNCHECKED = "data-unchecked"  # the data file was not looked at (harmless)
    BASE_MISSING = "base-missing"  # the base is not there
    BASE_UNUSABLE = "base-unusable"  # the base is there, but cannot be one
    BASE_UNCHECKED = "base-unchecked"  # the base was not looked at (harmless)
    BASE_SHORT = "base-short"  # the base is shorter than it was (harmless where what is missing is local)
    BASE_FORMAT = "base-format"  # the base has no stated format, and does not look raw
    DATA_FORMAT = "data-format"  # the data file does not look raw (harmless)
    CHAIN_LOOP = "chain-loop"  # an image that is its own base
    SAME_FILE = "same-file"  # one file in two places


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    severity: Severity
    image: str
    place: str
    """The field of the header, the entry, the journal's sector and byte, and so on."""
    value: int | str | None
    """What stands there, where that helps."""
    text: str
    repairable: bool
    repair: str
    """What a repair does about it, or why it does nothing."""
    lost: tuple[Range, ...] = ()
    """Bytes of the disk that are lost or doubtful."""
    repaired: bool = False

    @property
    def key(self) -> tuple[str, Kind, Severity, str]:
        """What identifies it among the findings of a check."""
        return self.image, self.kind, self.severity, self.place

    @property
    def line(self) -> str:
        """The finding as one line of text."""
        value = "" if self.value is None else f"={self.value}"
        return f"{printable(self.image)}: {self.place}{value}: {self.text}"


class Findings:
    """What was found in one image, in order."""

    def __init__(self, image: str) -> None:
        self.image = image
        self.listed: list[Finding] = []
        self.unlisted: Counter[tuple[Kind, Severity]] = Counter()
        self._kinds: Counter[Kind] = Counter()

    def add(
        self,
        kind: Kind,
        severity: Severity,
        place: str,
        text: str,
        *,
        value: int | str | None = None,
        remedy: str = "",
        hint: str = "",
        lost: tuple[Range, ...] = (),
    ) -> None:
        """`remedy`: what a repair does; `hint`: what a person can do where there is none."""
        self._kinds[kind] += 1
        if self._kinds[kind] > MAX_LISTED:
            self.more(kind, severity)
            return
        repair = remedy or hint or ("left as it is" if severity is Severity.HARMLESS else "cannot be repaired")
        if isinstance(value, str):
            value = printable(value)
        self.listed.append(
            Finding(kind, severity, self.image, place, value, printable(text), bool(remedy), printable(repair), lost)
        )

    def more(self, kind: Kind, severity: Severity, count: int = 1) -> None:
        """Count findings without listing them."""
        if count:
            self.unlisted[kind, severity] += count

    def listable(self, bits: bitarray, kind: Kind, severity: Severity) -> Iterator[Range]:
        """The first MAX_LISTED runs of set bits; the others are counted."""
        yield from islice(bit_runs(bits), MAX_LISTED)
        total = (bits & ~(bits >> 1)).count(1)
        self.more(kind, severity, max(0, total - MAX_LISTED))

    def block(self, why: str, kinds: Collection[Kind] = tuple(Kind)) -> None:
        """Have findings of these kinds not repaired, and say why."""
        for at, finding in enumerate(self.listed):
            if finding.repairable and finding.kind in kinds:
                self.listed[at] = replace(finding, repairable=False, repair=why)

    def block_unsafe(self, *, sound: bool, complete: bool, is_base: bool) -> None:
        """Block what is not safe to repair beside the other findings; to be called when there are no more.

        `sound`: the header is right, or will be; `complete`: everything could be read.
        """
        others = sum(
            finding.severity is Severity.CORRUPTION and finding.kind is not Kind.UNCLEAN for finding in self.listed
        )
        if is_base:
            self.block(f"not repaired, since it is a base here: fvdfs check --repair {printable(self.image)}")
        if not sound:
            self.block("not repaired while the header is damaged otherwise")
        if any(finding.kind is Kind.SAME_FILE for finding in self.listed):
            self.block("not repaired, since that could change another file's content")
        if not complete:
            self.block("not repaired, since not all could be checked")
        if others:
            self.block("not repaired while there is other corruption: repair once more", (Kind.UNCLEAN,))
        if self.corrupt:
            why = "not repaired while there is corruption, for it may hold what is lost: repair once more"
            self.block(why, (Kind.CHUNK_LEAKED, Kind.STORAGE_TAIL))

    def count(self, severity: Severity) -> int:
        """Findings of this severity, listed or not."""
        listed = sum(finding.severity is severity for finding in self.listed)
        return listed + sum(n for (_, kind_severity), n in self.unlisted.items() if kind_severity is severity)

    @property
    def corrupt(self) -> bool:
        return self.count(Severity.CORRUPTION) > 0

    @property
    def to_repair(self) -> set[Kind]:
        """The kinds of findings that are repairable."""
        return {finding.kind for finding in self.listed if finding.repairable}


def span(lost: Iterable[Range]) -> str:
    """Ranges of the disk as text, four at most."""
    ranges = tuple(lost)
    if not ranges:
        return "no byte of the disk"
    shown = ", ".join(f"{start}..{stop}" for start, stop in ranges[:4])
    more = f" and {len(ranges) - 4} more ranges" if len(ranges) > 4 else ""
    return f"bytes {shown}{more} of the disk"


def bounded(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ascending ranges, adjacent ones joined; MAX_RANGES at most, of which the last covers all the rest."""
    found: list[Range] = []
    for start, stop in ranges:
        join(found, start, stop)
    return tuple(found)


def join(found: list[Range], start: int, stop: int) -> None:
    """Add a range behind the others, as in `bounded`."""
    if found and (start <= found[-1][1] or len(found) == MAX_RANGES):
        found[-1] = (found[-1][0], max(stop, found[-1][1]))
    elif start < stop:
        found.append((start, stop))


def bit_runs(bits: bitarray) -> Iterator[Range]:
    """The runs of set bits."""
    start = bits.find(1)
    while start >= 0:
        stop = bits.find(0, start)
        if stop < 0:
            stop = len(bits)
        yield start, stop
        start = bits.find(1, stop)


def numbered(name: str, first: int, stop: int) -> str:
    """Numbers [first, stop) of something, as the place of a finding."""
    return f"{name} {first}" if stop == first + 1 else f"{name} {first}..{stop - 1}"
