"""What `top` and `status --watch` show of the open disks, and how that fits into the columns of a terminal. Pure."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len

from fvdfs.counters import BOUNDS, quantile
from fvdfs.errors import printable
from fvdfs.sizes import human_size

NAME_LEAST = 12  # characters that a name gets before there is another column
WHY_LEAST = 16
BAR = 10
COPYING = ("profile", "running")
"""States of a disk that is being copied."""
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_GAP = "…"


@dataclass(frozen=True, slots=True)
class Row:
    """Of a disk; rates are those between two looks."""

    file: str
    """Its name in the mount."""
    name: str
    """The same as it can be shown, without `.raw`."""
    size: int = 0
    """Bytes."""
    share: float = 1.0
    """What of the base's bytes is local."""
    state: str = ""
    copied: float = 0.0
    """Bytes a second that prefetching copies."""
    left: int | None = None
    """Seconds until all is local; None where nothing is being copied."""
    reads: float = 0.0
    writes: float = 0.0
    """Requests a second."""
    moved: float = 0.0
    """Bytes a second that requests move."""
    slowest: float | None = None
    """Seconds within which 99 of 100 reads and writes were answered; infinite where it is longer than all bounds."""
    why: str = ""


def rows(before: dict[str, Any] | None, now: dict[str, Any], seconds: float) -> list[Row]:
    """A row for each open disk of a mount's status, given that of `seconds` before; None: there was none."""
    former = {image["name"]: image for image in before["images"]} if before is not None else {}
    return [_row(former.get(image["name"]), image, seconds) for image in now["images"] if image["open"]]


def _row(before: dict[str, Any] | None, now: dict[str, Any], seconds: float) -> Row:
    rates = {kind: _Rate.between(before, now, kind, seconds) for kind in ("read", "write")}
    times = [sum(column) for column in zip(*(rate.times for rate in rates.values()), strict=True)]
    outage = now.get("base_outage")
    lost = f"base lost: {outage['reason']}" if outage is not None and outage["until"] is None else ""
    copying = now["state"] in COPYING  # the rate of one that was stopped falls slowly
    return Row(
        file=now["name"],
        name=printable(now["name"].removesuffix(".raw")),
        size=now.get("virtual_size", 0),
        share=now.get("local_share", 1.0),
        state=now["state"],
        copied=now.get("rate", 0) if copying else 0,
        left=now.get("eta") if copying else None,
        reads=rates["read"].requests,
        writes=rates["write"].requests,
        moved=rates["read"].bytes + rates["write"].bytes,
        slowest=quantile(times, 0.99),
        why=now.get("failed") or lost or now.get("move_reason") or now.get("reason") or now.get("move_remark", ""),
    )


@dataclass(frozen=True, slots=True)
class _Rate:
    """Of one kind of requests; a second, but for `times`."""

    requests: float
    bytes: float
    times: list[int]

    @classmethod
    def between(cls, before: dict[str, Any] | None, now: dict[str, Any], kind: str, seconds: float) -> _Rate:
        count = now.get("requests", {}).get(kind)
        nothing = [0] * (len(BOUNDS) + 1)
        if before is None or count is None or not seconds:
            return cls(0, 0, nothing)
        earlier = before.get("requests", {}).get(kind) or {"requests": 0, "bytes": 0, "times": nothing}
        if earlier["requests"] > count["requests"]:  # it is another mount by now
            return cls(0, 0, nothing)
        times = [new - old for new, old in zip(count["times"], earlier["times"], strict=True)]
        requests, moved = (count[what] - earlier[what] for what in ("requests", "bytes"))
        return cls(requests / seconds, moved / seconds, times)


# --- cells ------------------------------------------------------------------------------------------


def shortened(name: str, width: int) -> str:
    """A name in at most so many characters: what is left out is in its middle, since names differ at their ends."""
    if len(name) <= width:
        return name
    if width <= 1:
        return _GAP[:width]
    end = width // 2
    return name[: width - 1 - end] + _GAP + name[len(name) - end :]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """The key by which names are in the order that people expect: vm-2 before vm-10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not part[0].isdigit(), int(part) if part[0].isdigit() else 0, part.casefold()) for part in parts]


def bar(share: float, width: int) -> str:
    """A share as a bar; full only where it is all."""
    eighths = math.floor(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return (_EIGHTHS[8] * full + (_EIGHTHS[rest] if full < width else "")).ljust(width)


def short_number(number: float) -> str:
    """A number in at most five characters: 7, 950, 1.2k, 34k, 1.2M."""
    if number < 1000:
        return f"{number:.0f}" if number >= 10 or number == 0 else f"{number:.1f}"
    for unit in "kMGTP":
        number /= 1000
        if number < 999.5 or unit == "P":
            return f"{number:.1f}{unit}" if number < 9.95 else f"{number:.0f}{unit}"
    raise AssertionError


def short_size(size: int) -> str:
    """A size in binary units in at most five characters: 512, 20G, 1.5T."""
    number, unit = float(size), ""
    for unit in ("", "K", "M", "G", "T", "P", "E"):
        if number < 1000 or unit == "E":
            break
        number /= 1024
    return f"{number:.0f}{unit}" if number >= 10 or number == int(number) else f"{number:.1f}{unit}"


def short_time(seconds: float | None) -> str:
    """How long a request took, in at most five characters."""
    if seconds is None:
        return ""
    if math.isinf(seconds):
        return f">{BOUNDS[-1]:.0f}s"
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.0f}{unit}"
    return f"{seconds:.0f}s"


def duration(seconds: int | None) -> str:
    """Time left: 0:42, 12:03, 3:05:00, 12d."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def local(found: dict[str, Any]) -> str:
    """How much of a disk is local, in words: of what it can have from its base, and of the whole disk."""
    if not found["base_size"]:
        return "all, it has no base"
    whole, part = (human_size(found[what]).partition(" (")[0] for what in ("base_size", "local_bytes"))
    of_base = f"{percent(found['local_share'])} of the base, {part} of {whole}"
    return f"{of_base}; {percent(found['disk_local_share'])} of the disk"


def percent(share: float) -> str:
    """A share, in at most six characters; 100% only where it is all, 0% only where it is nothing."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else f"{share:.1%}"


# --- columns ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """One that has a width of its own."""

    title: str
    width: int
    cell: Callable[[Row], str]
    key: Callable[[Row], Any]
    """By what to sort; the largest comes first."""
    at_right: bool = True


NAME = Column("disk", NAME_LEAST, lambda row: row.name, lambda row: natural(row.name), at_right=False)
WHY = Column("why", WHY_LEAST, lambda row: row.why, lambda row: row.why, at_right=False)
# In the order in which they stand.
SIZE = Column("size", 5, lambda row: short_size(row.size), lambda row: row.size)
LOCAL = Column("local", 6, lambda row: percent(row.share), lambda row: row.share)
SHARE = Column("", BAR, lambda row: bar(row.share, BAR), lambda row: row.share, at_right=False)
STATE = Column("state", 8, lambda row: row.state, lambda row: row.state, at_right=False)
COPIED = Column("copied/s", 8, lambda row: short_number(row.copied) if row.copied else "", lambda row: row.copied)
LEFT = Column("left", 8, lambda row: duration(row.left), lambda row: math.inf if row.left is None else row.left)
READS = Column("reads/s", 7, lambda row: short_number(row.reads), lambda row: row.reads)
WRITES = Column("writes/s", 8, lambda row: short_number(row.writes), lambda row: row.writes)
MOVED = Column("bytes/s", 7, lambda row: short_number(row.moved), lambda row: row.moved)
SLOWEST = Column("p99", 5, lambda row: short_time(row.slowest), lambda row: row.slowest or 0.0)
_IN_PLACE = (SIZE, LOCAL, SHARE, STATE, COPIED, LEFT, READS, WRITES, MOVED, SLOWEST)
_BY_WORTH = (LOCAL, STATE, READS, WRITES, SLOWEST, LEFT, SHARE, WHY, MOVED, SIZE, COPIED)


def fitting(width: int, names: Sequence[str], padding: int) -> list[tuple[Column, int]]:
    """The columns that fit into a terminal, with their widths; `padding`: what each takes beside that.

    A quarter is for names, if they need it, then those of most worth come first; what remains is for names and `why`.
    """
    longest = max([NAME_LEAST, *map(len, names)])
    name = min(longest, max(NAME_LEAST, width // 4))
    room, chosen = width - name - padding, []
    for column in _BY_WORTH:
        if room < column.width + padding:
            break
        room -= column.width + padding
        chosen.append(column)
    more = min(longest - name, room)
    found = [(NAME, name + more), *((column, column.width) for column in _IN_PLACE if column in chosen)]
    return [*found, (WHY, WHY_LEAST + room - more)] if WHY in chosen else found


STATUS = ("disk", "size", "local", "state", "rate", "left", "why", "passed through")
"""The columns of `status`."""
_SHORT = 6  # of these columns, whose texts are short
_LESS = ("rate", "size", "left")
"""Those that are left out first where there is no room."""


def laid_out(cells: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """The table of `status` as lines, the first with the titles, for so many columns; None: any number.

    Where a disk does not fit into one line, why it waits stands below it.
    """
    wide = [max(cell_len(row[at]) for row in (STATUS, *cells)) for at in range(len(STATUS))]
    if width is None or sum(wide) + 2 * (len(wide) - 1) <= width:
        for row in (STATUS, *cells):
            yield "  ".join(_padded(text, size) for text, size in zip(row, wide, strict=True)).rstrip()
        return
    chosen = [at for at in range(_SHORT) if any(row[at] for row in cells) or not at]
    for title in ("", *_LESS):
        chosen = [at for at in chosen if STATUS[at] != title]
        name = width - sum(wide[at] + 2 for at in chosen[1:])
        if name >= min(wide[0], NAME_LEAST):
            break
    wide[0] = max(min(name, wide[0]), 1)
    for row in (STATUS, *cells):
        short = [shortened(row[0], wide[0]), *(row[at] for at in chosen[1:])]
        yield "  ".join(_padded(text, wide[at]) for text, at in zip(short, chosen, strict=True)).rstrip()
        if row is not STATUS:
            for title, text in zip(STATUS[_SHORT:], row[_SHORT:], strict=True):
                lead = "" if title == "why" else f"{title}: "
                yield from textwrap.wrap(lead + text, max(width, 20), initial_indent="  ", subsequent_indent="  ") * (
                    text != ""
                )


def in_columns(cells: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Rows as lines of at most so many columns, where words permit it (None: any number).

    What does not fit goes on below the last column, or, where that has too little room, below its row.
    """
    wide = [max(cell_len(row[at]) for row in cells) for at in range(len(cells[0]) - 1)]
    lead = sum(wide) + 2 * len(wide)
    room = math.inf if width is None else width
    for *row, text in cells:
        first = "  ".join(_padded(cell, size) for cell, size in zip(row, wide, strict=True))
        if lead + cell_len(text) <= room:
            yield f"{first}  {text}".rstrip()
        elif room - lead >= WHY_LEAST:
            lines = _wrapped(text, int(room) - lead)
            yield f"{first}  {lines[0]}"
            yield from (" " * lead + line for line in lines[1:])
        elif sum(map(cell_len, (*row, text))) + 2 * len(row) <= room:
            yield "  ".join((*row, text)).rstrip()
        else:
            yield first.rstrip()
            yield from (f"  {line}" for line in _wrapped(text, max(int(room) - 2, 1)))


def _wrapped(text: str, width: int) -> list[str]:
    """Broken between words alone: a path or a command is to be copied."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def total(found: Sequence[Row], images: int) -> str:
    """All disks in a line."""
    if not found:
        return f"No disk is open of {images}. A disk shows up here while a program has it open."
    reads, writes, moved, copied = (
        short_number(sum(getattr(row, what) for row in found)) for what in ("reads", "writes", "moved", "copied")
    )
    return (
        f"{len(found)} of {images} disks open · {reads} reads/s · {writes} writes/s · {moved}B/s"
        f" · prefetching {copied}B/s"
    )
