"""Fuzz target without I/O: the record of a move, and what source and target say to each other."""

from __future__ import annotations

import copy
import json
import zlib
from typing import Any

from fuzz.source import Source
from fvdfs.errors import FormatError, UsageError
from fvdfs.format import mailbox, migration
from fvdfs.format.mailbox import SECTOR, Answer, Question, Wish
from fvdfs.format.migration import Incoming, Outgoing, Record, Target
from fvdfs.format.proof import is_digest

NAME = "vm.fvd"
E = "e" * 16
INTO = Incoming(Target.ACTIVE, E, "5" * 32, "nbd://alpha/vm", "ab" * 16)
RECORD = Record(INTO, Outgoing(migration.Source.MOVED, E, INTO.number, "beta"))
SECTORS = (
    *(Question.of(INTO, wish, "a" * 16, "beta").encode() for wish in Wish),
    Answer("a" * 16, done=False, text="no").encode(),
    mailbox.announcement(E),
    RECORD.encode(),
)
VALUES: tuple[Any, ...] = (None, 0, -1, 10**30, True, "", "x", E, E[1:], "5" * 32, "\0\n", "ü", "\ud800", [], [1], [E])


def fuzz_moves(data: bytes) -> bool:
    """A sector with some of its values, or of its text, replaced, and a checksum that is right."""
    source = Source(data)
    sector = SECTORS[source.byte() % len(SECTORS)]
    size = int.from_bytes(sector[8:12], "little")
    text = bytearray(sector[16 : 16 + size])
    if source.byte() & 1:
        text = bytearray(json.dumps(_changed(json.loads(text), source)).encode())
    for _ in range(source.byte() % 4):
        at = source.number(2) % (len(text) + 1)
        text[at : at + source.byte() % 8] = source.take(source.byte() % 8)
    if source.byte() & 1:
        text = bytearray(source.rest())
    del text[SECTOR - 16 :]
    raw = sector[:8] + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little") + text
    return _read(raw.ljust(SECTOR, b"\0"))


def _changed(fields: Any, source: Source) -> Any:
    for _ in range(1 + source.byte() % 3):
        key = [*fields][source.byte() % len(fields)]
        value = copy.deepcopy(VALUES[source.byte() % len(VALUES)])
        if isinstance(fields[key], list) and fields[key] and source.byte() & 1:
            fields[key][source.byte() % len(fields[key])] = value
        else:
            fields[key] = value
    return fields


def _read(raw: bytes) -> bool:
    question, answer = Question.decode(raw), Answer.decode(raw)
    if question is not None:
        assert is_digest(question.target)
        assert Question.decode(question.encode()) == question
        at = mailbox.question_at(question.target)
        box = bytearray(mailbox.SIZE)
        box[at : at + SECTOR] = raw
        assert mailbox.questions(bytes(box)) == [question]
        _ask(question)
    if answer is not None:
        assert Answer.decode(answer.encode()) is not None
    epoch = mailbox.epoch_in(raw)
    assert not epoch or migration.is_number(epoch)
    try:
        record = Record.decode(raw, NAME)
    except FormatError as error:
        assert "\n" not in str(error)
        record = Record()
    assert Record.decode(record.encode(), NAME) == record
    return bool(question or answer or epoch or record)


def _ask(question: Question) -> None:
    """Only its own words free a source."""
    epoch, target = question.epoch, question.target
    assert (question.proof is not None) == (question.wish in mailbox.WORDS)
    if question.proof is None:
        return
    told = migration.told_of_all if question.wish is Wish.RELEASE else migration.told_of_end
    try:
        after = told(RECORD, epoch, target, question.proof)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert after == RECORD or question.proof == INTO.proof(mailbox.WORDS[question.wish])
