"""The move of a disk from one host to another: the record in each image, and what may follow on what.

While a disk moves there are two images of it, the source and the target that stands on it, and never two that may be
written. Each says in a record of its own in which state it is (docs/migration.md has the whole table):

    source  none → serving → frozen → moved → released          target  receiving → active → local
                                                                   ↘ abandoned

`serving` draws an epoch, a random number that names this one move. `moved` names the target that has taken the disk
over, by its number, so that no second target can; and that number commits the target, so that nobody else can say in
its place that it has all, or has given the move up (`proof.py`). The record is a sector of the header's padding, which
is written whole or not at all; the image is in the new state once that is stable. An image in a chain of moves has both
parts: it is the target of one move, and the source of the next.

How the record is stored, `sealed.py` says. Pure.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass, field, replace

from fvdfs.errors import FormatError, UsageError
from fvdfs.format.proof import Proof, Word, is_digest, number_of, proof_of, proves
from fvdfs.format.sealed import seal, unseal
from fvdfs.format.stamp import is_stamp

PLACE = 14 * 512
"""Bytes. In front of it is what an export notes of itself (`note`), behind it a move of the chunk table (`moving`)."""
SIZE = 512  # bytes
NAME_MAX = 64  # characters of a host's name that are kept
SOURCE_MAX = 200  # bytes of a source's URL, as JSON
_MAGIC = b"FVDmove1"
_ESCAPED = '"\\'
"""What JSON takes two bytes for."""
_NUMBER = re.compile("[0-9a-f]{16}")


class Source(enum.Enum):
    """What an image is to the target that the disk moves to."""

    SERVING = "serving"
    """The disk is written here; a target may read it, and ask for it."""
    FROZEN = "frozen"
    """Nobody writes it, and no target has been told so."""
    MOVED = "moved"
    """A target may write its own image: this one never again, unless what is written there is given up."""
    RELEASED = "released"
    """The target has all of it: this image may be removed."""


class Target(enum.Enum):
    """What an image is to the source that the disk comes from."""

    RECEIVING = "receiving"
    """The disk may still be written at the source: it is read there, and nothing of it is kept."""
    ACTIVE = "active"
    """The disk is written here. The source is frozen, and gives what is missing."""
    LOCAL = "local"
    """The source is no longer needed."""
    ABANDONED = "abandoned"
    """The move is given up: the disk was never written here, and never will be."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The move that this image is the source of."""

    state: Source
    epoch: str
    target: str = ""
    """The number of the target that the disk has moved to; while it has not moved, of the only one that may have it."""
    name: str = ""
    """What that is called, for messages."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """The move that this image is the target of."""

    state: Target
    epoch: str
    """That of the source."""
    secret: str = field(repr=False)
    """What proves to the source that it is this target that speaks. It stays here."""
    source: str = ""
    """The URL of the source, where the header names a template that the target is to stand on; empty: it names that."""
    stamp: str = ""
    """That of the template (`stamp.py`)."""

    @property
    def number(self) -> str:
        """What this target is called."""
        return number_of(self.secret, self.epoch)

    def proof(self, word: Word) -> Proof:
        """What to show with this word, which has to be stable in the record before."""
        return proof_of(self.secret, self.epoch, word)

    def url(self, base: str) -> str:
        """That of the source, where the header names this base."""
        return self.source or base


@dataclass(frozen=True, slots=True)
class Record:
    """What an image says of moves; empty where there is none."""

    incoming: Incoming | None = None
    outgoing: Outgoing | None = None

    def __bool__(self) -> bool:
        return self.incoming is not None or self.outgoing is not None

    @property
    def state(self) -> str:
        """In a word; the later move counts. Empty where there is none."""
        if self.outgoing is not None:
            return self.outgoing.state.value
        return self.incoming.state.value if self.incoming is not None else ""

    @property
    def receiving(self) -> bool:
        """Whether the disk may still be written at its source: nothing of it is kept here."""
        return self.incoming is not None and self.incoming.state in (Target.RECEIVING, Target.ABANDONED)

    @property
    def abandoned(self) -> bool:
        """Whether its move was given up."""
        return self.incoming is not None and self.incoming.state is Target.ABANDONED

    @property
    def handed_over(self) -> bool:
        """Whether a target may have it."""
        return self.outgoing is not None and self.outgoing.state in (Source.MOVED, Source.RELEASED)

    @property
    def needed(self) -> str:
        """Why the image must not be removed or replaced; empty where it may."""
        if self.outgoing is None or self.outgoing.state not in (Source.FROZEN, Source.MOVED):
            return ""
        return f"{self.obstacle}; once the target has all of it: fvdfs release"

    @property
    def obstacle(self) -> str:
        """Why nobody may write to the image; empty where it may be written."""
        if self.abandoned:
            return "its move to this host was given up (fvdfs abandon): remove this image, and receive the disk again"
        if self.receiving:
            return "it is being received: fvdfs activate, or the first write, takes it over from its source"
        out = self.outgoing
        if out is None or out.state is Source.SERVING:
            return ""
        if out.state is Source.FROZEN:
            return f"frozen for a move (epoch {out.epoch}); fvdfs thaw, if that was cancelled"
        if out.state is Source.RELEASED:
            return f"moved to {out.name or out.target}, which has all of it: this image may be removed"
        return f"frozen: moved to {out.name or out.target} (epoch {out.epoch}), which does not have all of it yet"

    @property
    def remark(self) -> str:
        """What is under way, though the image may be written; empty where nothing is, or it may not."""
        if self.obstacle:
            return ""
        if self.outgoing is not None:
            return "offered to other hosts by fvdfs serve"
        if self.incoming is not None and self.incoming.state is Target.ACTIVE:
            return "its source is needed until all is local"
        return ""

    @property
    def keeps_base(self) -> bool:
        """Whether the source gives what the disk has beyond its base, and is still needed for that."""
        into = self.incoming
        return into is not None and bool(into.source) and into.state is not Target.LOCAL

    def base_name(self, name: str) -> str:
        """The base of an image whose header names this one."""
        return name if self.keeps_base else self._given(name)

    @property
    def source_name(self) -> str:
        """What a source gives beside the base; empty: nothing."""
        return self._given(self.incoming.source) if self.keeps_base and self.incoming is not None else ""

    def _given(self, name: str) -> str:
        """What a source exports. Of a target that has the disk: for this move alone, once it is frozen."""
        into = self.incoming
        if into is None or into.state is not Target.ACTIVE:
            return name
        export, mark, options = name.partition("?")
        return f"{export}/{into.epoch}{mark}{options}"

    # --- as it is stored --------------------------------------------------------------------------

    def encode(self) -> bytes:
        """The sector."""
        fields: dict[str, list[str]] = {}
        if (into := self.incoming) is not None:
            fields["in"] = [into.state.value, into.epoch, into.secret]
            fields["in"] += [into.source, into.stamp] if into.source else []
        if (out := self.outgoing) is not None:
            fields["out"] = [out.state.value, out.epoch, out.target, out.name]
        if not fields:
            return bytes(SIZE)
        return seal(_MAGIC, fields, SIZE)

    @classmethod
    def decode(cls, sector: bytes, image: str) -> Record:
        """The record in a sector. Raises FormatError where it is damaged: nobody knows then who may write the disk."""
        try:
            return cls._of(unseal(_MAGIC, sector) or {})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise FormatError(
                image,
                "what it says of its move to or from another host is damaged, or of another version of fvdfs; "
                "if it is the image to go on with: "
                "fvdfs thaw --lose-writes",
            ) from None

    @classmethod
    def _of(cls, fields: dict[str, list[str]]) -> Record:
        incoming = outgoing = None
        if "in" in fields:
            state, epoch, secret, *template = fields["in"]
            source, stamp = template or ("", "")
            if template and not (source and is_stamp(stamp)):
                raise ValueError
            incoming = Incoming(Target(state), _number(epoch), _digest(secret), source, stamp)
        if "out" in fields:
            state, epoch, target, name = fields["out"]
            outgoing = Outgoing(Source(state), _number(epoch), _digest(target) if target else "", host_name(name))
        return cls(incoming, outgoing)

    @classmethod
    def at(cls, raw: bytes, image: str) -> Record:
        """The record of a file that begins with these bytes. Raises as `decode`."""
        return cls.decode(raw[PLACE : PLACE + SIZE], image)


NO_RECORD = Record()


def is_record(sector: bytes) -> bool:
    """Whether a sector is a record, and whole."""
    try:
        return sector.startswith(_MAGIC) and Record.decode(sector, "").encode() == sector
    except FormatError:
        return False


def is_number(text: str) -> bool:
    """Whether this can be an epoch, or the number of a question."""
    return bool(_NUMBER.fullmatch(text))


def host_name(text: str) -> str:
    """What of a host's name is kept."""
    return "".join(c if c.isascii() and c.isprintable() and c not in _ESCAPED else "?" for c in text[:NAME_MAX])


def fits(source: str) -> bool:
    """Whether a record has room for this URL of a source."""
    return len(json.dumps(source)) <= SOURCE_MAX


def _number(text: str) -> str:
    if not is_number(text):
        raise ValueError
    return text


def _digest(text: str) -> str:
    if not is_digest(text):
        raise ValueError
    return text


# --- events -----------------------------------------------------------------------------------------
# Each gives the record that follows, the same one where nothing changes. Each raises UsageError, which says what to do.


def serve(record: Record, new_epoch: str) -> Record:
    """A server begins to give the disk to targets. `new_epoch`: where no move is under way."""
    if record.receiving:
        raise UsageError(f"cannot be served: {record.obstacle}")
    if record.outgoing is not None:
        return record
    return replace(record, outgoing=Outgoing(Source.SERVING, new_epoch))


def freeze(record: Record, new_epoch: str) -> Record:
    """The user freezes the disk, before or without a target that asks for it."""
    record = serve(record, new_epoch)
    out = record.outgoing
    assert out is not None
    return replace(record, outgoing=replace(out, state=Source.FROZEN)) if out.state is Source.SERVING else record


def hand_over(record: Record, epoch: str, target: str, name: str) -> Record:
    """A target asks for the disk. Asking again changes nothing."""
    out = record.outgoing
    if out is None or out.epoch != epoch:
        raise UsageError(f"the move of epoch {epoch} is over here; receive the disk again")
    _refuse_others(out, target)
    if record.handed_over:
        return record
    return replace(record, outgoing=Outgoing(Source.MOVED, epoch, target, host_name(name)))


def keep_for(record: Record, epoch: str, target: str) -> Record:
    """Of all targets only this one may have the disk. Another one may be named as long as none has it."""
    out = record.outgoing
    if out is None or out.epoch != epoch:
        raise UsageError(f"the move of epoch {epoch} is over")
    if record.handed_over:
        _refuse_others(out, target)
        return record
    return replace(record, outgoing=replace(out, target=target, name=""))


def _refuse_others(out: Outgoing, target: str) -> None:
    if out.target in ("", target):
        return
    if out.state in (Source.MOVED, Source.RELEASED):
        raise UsageError(f"has moved to another target, {out.name or out.target} (epoch {out.epoch})")
    raise UsageError(f"is kept for another target (epoch {out.epoch}), until its fvdfs migrate ends, or fvdfs thaw")


def thaw(record: Record, *, lose_writes: bool) -> Record:
    """The move was cancelled: the disk is written here again, is kept for no target, and its epoch is over.

    `lose_writes`: though a target may have written to its image, which is then another disk.
    """
    out = record.outgoing
    if out is None or (out.state is Source.SERVING and not out.target):
        raise UsageError("is not frozen")
    if record.handed_over and not lose_writes:
        raise UsageError(
            f"has moved to {out.name or out.target}, which may have written to it: go on there; "
            "or, to go on here without what was written there: fvdfs thaw --lose-writes"
        )
    return replace(record, outgoing=None)


def end(record: Record) -> Record:
    """No target is to have the disk: it is written here, as before, and its epoch is over."""
    if record.handed_over:
        return thaw(record, lose_writes=False)
    return replace(record, outgoing=None)


def told_of_end(record: Record, epoch: str, target: str, proof: Proof) -> Record:
    """This target says that it has given the move up: it has never written to the disk, and never will.

    Where it was told to have the disk, that is written here again, and the epoch is over.
    """
    out = record.outgoing
    if out is None or not record.handed_over or (out.epoch, out.target) != (epoch, target):
        return record
    _refuse_unproven(out, Word.GO_ON, proof)
    if out.state is Source.RELEASED:
        raise UsageError(f"has moved to {out.name or out.target}, which has said that it has all of it")
    return replace(record, outgoing=None)


def release(record: Record) -> Record:
    """The user says that the target has all of the disk."""
    out = record.outgoing
    if out is None or not record.handed_over:
        raise UsageError("has not moved: no target has taken it over")
    return replace(record, outgoing=replace(out, state=Source.RELEASED))


def told_of_all(record: Record, epoch: str, target: str, proof: Proof) -> Record:
    """This target says that it has all of the disk."""
    after = release(record)
    out = after.outgoing
    assert out is not None
    if (epoch, target) != (out.epoch, out.target):
        raise UsageError(f"has moved to another target, {out.name or out.target} (epoch {out.epoch})")
    _refuse_unproven(out, Word.RELEASE, proof)
    return after


def _refuse_unproven(out: Outgoing, word: Word, proof: Proof) -> None:
    if not proves(proof, out.epoch, out.target, word):
        raise UsageError(f"does not show that it is {out.name or out.target}, which has the disk (epoch {out.epoch})")


def activate(record: Record) -> Record:
    """The source has handed over the disk."""
    into = record.incoming
    if into is None:
        raise UsageError("is not being received from another host")
    if record.abandoned:
        raise UsageError(record.obstacle)
    return replace(record, incoming=replace(into, state=Target.ACTIVE)) if record.receiving else record


def abandon(record: Record) -> Record:
    """The user gives the move up at the target. Once this is stable the source may be told (`told_of_end`)."""
    into = record.incoming
    if into is None:
        raise UsageError("is not being received from another host")
    if not record.receiving:
        raise UsageError(
            "has been taken over: go on here; or, to lose what was written: fvdfs thaw --lose-writes there"
        )
    return replace(record, incoming=replace(into, state=Target.ABANDONED))


def complete(record: Record) -> Record:
    """All of the disk is in the target."""
    into = record.incoming
    if into is None or record.receiving:
        raise UsageError("is not being followed from another host")
    return replace(record, incoming=replace(into, state=Target.LOCAL, source="", stamp=""))
