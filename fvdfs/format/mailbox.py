"""What source and target say to each other: a small disk beside the one that moves, which both read and write.

The source exports it as NAME/move, writable; so it takes no connection, no port and no certificate of its own. It
begins with what the source says to all, the epoch. Then there is a slot for each of a few targets, by the target's
number: a sector for what it asks, and one for the answer, which bears the number of the question. Whoever asks
again, or finds another in its slot, writes its question again.

Whoever reaches the server can read and write all of it. So what frees the source is proven (`proof.py`), and a target
knows by the export of the epoch alone that the disk is handed over. Who forges more delays a move. Pure.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from fvdfs.format.migration import Incoming, host_name, is_number
from fvdfs.format.proof import Proof, Word, is_digest
from fvdfs.format.sealed import seal, unseal
from fvdfs.format.stamp import is_stamp

EXPORT = "/move"
"""What follows the name of the disk."""
MAP_EXPORT = "/own"
"""What follows the name of the disk that has moved, as NAME/EPOCH, for the map that was asked for."""
SECTOR = 512  # bytes
_SLOT = 2 * SECTOR
_SLOTS = 63
SIZE = (1 + _SLOTS) * _SLOT  # bytes
_MAGIC = b"FVDmail1"
_NONSENSE = (ValueError, TypeError, KeyError, RecursionError)
_TEXT_MAX = 300  # characters of an answer


class Wish(enum.Enum):
    """What a target asks for."""

    HAND_OVER = "hand over"
    """That the disk be frozen, and given to this target alone."""
    RELEASE = "release"
    """Nothing more: it has all."""
    GO_ON = "go on without it"
    """That the disk be written there again: it has never written to it, and never will."""
    STAND = "stand on the template"
    """To know whether the disk stands on the template of this stamp."""
    MAP = "know what to copy"
    """The map of what the disk, which has moved to this target, has beyond that template (`cow/own.py`)."""


WORDS = {Wish.RELEASE: Word.RELEASE, Wish.GO_ON: Word.GO_ON}
"""Wishes that go with a proof."""


@dataclass(frozen=True, slots=True)
class Question:
    """Of a target."""

    number: str
    """Of this question, random."""
    wish: Wish
    epoch: str
    target: str
    name: str
    """Of the target's host."""
    stamp: str = ""
    """Of a template (`stamp.py`)."""
    proof: Proof | None = None
    """That it is this target that asks; with some of the wishes, and never with another."""

    @classmethod
    def of(cls, into: Incoming, wish: Wish, number: str, name: str) -> Question:
        """What this target, on a host of this name, asks."""
        proof = into.proof(WORDS[wish]) if wish in WORDS else None
        return cls(number, wish, into.epoch, into.number, name, into.stamp, proof)

    def encode(self) -> bytes:
        """The sector."""
        fields = {"n": self.number, "wish": self.wish.value, "epoch": self.epoch, "target": self.target}
        fields |= {"stamp": self.stamp} if self.stamp else {}
        fields |= {"key": self.proof.key, "other": self.proof.other} if self.proof is not None else {}
        return seal(_MAGIC, fields | {"name": host_name(self.name)}, SECTOR)

    @classmethod
    def decode(cls, sector: bytes) -> Question | None:
        """What is asked; None: nothing, or nothing that makes sense."""
        try:
            fields = unseal(_MAGIC, sector)
            if fields is None or not all(is_number(fields[key]) for key in ("n", "epoch")):
                return None
            wish, target, stamp = Wish(fields["wish"]), fields["target"], fields.get("stamp", "")
            if not is_digest(target) or (stamp != "" and not is_stamp(stamp)) or not isinstance(fields["name"], str):
                return None
            proof = None
            if wish in WORDS:
                proof = Proof(fields["key"], fields["other"])
                if not (is_digest(proof.key) and is_digest(proof.other)):
                    return None
            return cls(fields["n"], wish, fields["epoch"], target, host_name(fields["name"]), stamp, proof)
        except _NONSENSE:
            return None


@dataclass(frozen=True, slots=True)
class Answer:
    """Of the source."""

    number: str
    """That of the question."""
    done: bool
    later: bool = False
    """Whether it may be done when it is asked again."""
    text: str = ""
    """Why it was not done."""

    def encode(self) -> bytes:
        """The sector."""
        text = self.text.encode("ascii", "replace").decode()[:_TEXT_MAX]
        return seal(_MAGIC, {"n": self.number, "done": self.done, "later": self.later, "text": text}, SECTOR)

    @classmethod
    def decode(cls, sector: bytes) -> Answer | None:
        """The answer; None: there is none, or none that makes sense."""
        try:
            fields = unseal(_MAGIC, sector)
            if fields is None:
                return None
            return cls(str(fields["n"]), fields["done"] is True, fields["later"] is True, str(fields["text"]))
        except _NONSENSE:
            return None


def question_at(target: str) -> int:
    """Where the question of a target is, in bytes; the answer follows it."""
    return _SLOT * (1 + int(target, 16) % _SLOTS)


def announcement(epoch: str) -> bytes:
    """The first sector."""
    return seal(_MAGIC, {"epoch": epoch}, SECTOR)


def epoch_in(sector: bytes) -> str:
    """The epoch that the first sector tells; empty where it makes no sense."""
    try:
        fields = unseal(_MAGIC, sector) or {}
        epoch = fields.get("epoch")
        return epoch if isinstance(epoch, str) and is_number(epoch) else ""
    except _NONSENSE:
        return ""


def questions(box: bytes) -> list[Question]:
    """All that is asked in the whole mailbox, and not answered."""
    found = []
    for at in range(_SLOT, SIZE, _SLOT):
        question = Question.decode(box[at : at + SECTOR])
        answer = Answer.decode(box[at + SECTOR : at + _SLOT])
        if question and question_at(question.target) == at and (answer is None or answer.number != question.number):
            found.append(question)
    return found
