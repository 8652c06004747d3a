"""What is true of an image, and is in the memory of its process alone, where another process may have to go on.

A write is answered before a commit names its blocks on the disk (`commit.py`). Its bytes are in the page cache by then,
and outlive the process; so with what stands here, a process that goes on (`-o keep`) finds all that was answered.

Pure: it says what is to be remembered; who does it is above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fvdfs.format.journal import Range


class Notes(Protocol):
    """Of one image file. None of these waits, nor fails."""

    def blocks_stored(self, first: int, end: int, /) -> None:
        """These blocks are stored, and no commit has named them."""

    def chunks_allocated(self, entries: Sequence[tuple[int, int]], /) -> None:
        """These chunks got these numbers in the storage, as they stand on disk."""

    def commit_begins(self) -> None:
        """A commit is going to name all that was reported."""

    def commit_ends(self, *, done: bool) -> None:
        """It has, or it failed."""

    def in_use(self, *, writing: bool) -> None:
        """Whether the image is open for writing, here."""


@dataclass(slots=True)
class Left:
    """What a former process, or this one, has not committed."""

    blocks: list[Range] = field(default_factory=list)
    chunks: dict[int, int] = field(default_factory=dict)
    """By chunk: its number in the storage, as on disk."""
    writing: bool = False
    """Whether it had the image open for writing."""


class Unsettled(Protocol):
    """Of all images of a process."""

    def notes(self, identity: tuple[int, int], name: str) -> Notes:
        """Where to report what is not committed of the file with this identity."""

    def left(self, identity: tuple[int, int]) -> Left:
        """What is not committed of it."""
