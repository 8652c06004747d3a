"""The record of a move, and its states: each event in each state, of source and target."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable

import pytest

from fvdfs.errors import FormatError, UsageError
from fvdfs.format import migration
from fvdfs.format.migration import PLACE, SIZE, Incoming, Outgoing, Record, Source, Target
from fvdfs.format.proof import Proof, Word, number_of, proof_of, proves
from fvdfs.format.sealed import seal

E, OTHER_E, NEW = "0" * 15 + "e", "f" * 16, "9" * 16
SECRET, OTHER_SECRET = "1" * 32, "2" * 32
T, OTHER_T = number_of(SECRET, E), number_of(OTHER_SECRET, E)
HAS_ALL, GIVES_UP = (proof_of(SECRET, E, word) for word in Word)

OUTGOING = [
    None,
    Outgoing(Source.SERVING, E),
    Outgoing(Source.SERVING, E, T),
    Outgoing(Source.FROZEN, E),
    Outgoing(Source.MOVED, E, T, "beta"),
    Outgoing(Source.RELEASED, E, T, "beta"),
]
INCOMING = [None, *(Incoming(state, OTHER_E, OTHER_SECRET) for state in Target)]
ALL = [Record(into, out) for into, out in itertools.product(INCOMING, OUTGOING)]

Event = Callable[[Record], Record]
EVENTS: dict[str, Event] = {
    "serve": lambda r: migration.serve(r, NEW),
    "end": migration.end,
    "freeze": lambda r: migration.freeze(r, NEW),
    "asked": lambda r: migration.hand_over(r, E, T, "beta"),
    "asked by another": lambda r: migration.hand_over(r, E, OTHER_T, "gamma"),
    "asked of another epoch": lambda r: migration.hand_over(r, OTHER_E, T, "beta"),
    "thaw": lambda r: migration.thaw(r, lose_writes=False),
    "thaw, lose writes": lambda r: migration.thaw(r, lose_writes=True),
    "release": migration.release,
    "kept": lambda r: migration.keep_for(r, E, T),
    "kept for another": lambda r: migration.keep_for(r, E, OTHER_T),
    "kept of another epoch": lambda r: migration.keep_for(r, OTHER_E, T),
    "told to release": lambda r: migration.told_of_all(r, E, T, HAS_ALL),
    "told by another": lambda r: migration.told_of_all(r, E, OTHER_T, proof_of(OTHER_SECRET, E, Word.RELEASE)),
    "told by who shows another's": lambda r: migration.told_of_all(r, E, T, proof_of(OTHER_SECRET, E, Word.RELEASE)),
    "told by who shows the other key": lambda r: migration.told_of_all(r, E, T, GIVES_UP),
    "given up": lambda r: migration.told_of_end(r, E, T, GIVES_UP),
    "given up by another": lambda r: migration.told_of_end(r, E, OTHER_T, proof_of(OTHER_SECRET, E, Word.GO_ON)),
    "given up of another epoch": lambda r: migration.told_of_end(r, OTHER_E, T, GIVES_UP),
    "given up by who shows another's": lambda r: migration.told_of_end(r, E, T, proof_of(OTHER_SECRET, E, Word.GO_ON)),
    "given up by who shows the other key": lambda r: migration.told_of_end(r, E, T, HAS_ALL),
}
# State of the source after each event, "-" for a refusal, in the order of none, serving, serving for T alone, frozen,
# moved, released.
SOURCE = {
    "serve": "serving serving serving frozen moved released",
    "end": "none none none none - -",
    "freeze": "frozen frozen frozen frozen moved released",
    "asked": "- moved moved moved moved released",
    "asked by another": "- moved - moved - -",
    "asked of another epoch": "- - - - - -",
    "thaw": "- - none none - -",
    "thaw, lose writes": "- - none none none none",
    "release": "- - - - released released",
    "kept": "- serving serving frozen moved released",
    "kept for another": "- serving serving frozen - -",
    "kept of another epoch": "- - - - - -",
    "told to release": "- - - - released released",
    "told by another": "- - - - - -",
    "told by who shows another's": "- - - - - -",
    "told by who shows the other key": "- - - - - -",
    "given up": "none serving serving frozen none -",
    "given up by another": "none serving serving frozen moved released",
    "given up of another epoch": "none serving serving frozen moved released",
    "given up by who shows another's": "none serving serving frozen - -",
    "given up by who shows the other key": "none serving serving frozen - -",
}


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_in_each_state_of_a_source(event: str) -> None:
    for before, after in zip(OUTGOING, SOURCE[event].split(), strict=True):
        record = Record(None, before)
        if after == "-":
            with pytest.raises(UsageError):
                EVENTS[event](record)
            continue
        found = EVENTS[event](record)
        assert (found.state or "none") == after
        if "thaw" not in event:
            assert EVENTS[event](found) == found, "twice is once"


def test_a_target_that_was_told_of_the_freeze_is_the_only_one_ever() -> None:
    """Whatever events come in whatever order: once moved to T, no other target gets it until it is thawed."""
    chance = random.Random(1)
    for _ in range(2000):
        record, taken = Record(), ""
        for _ in range(12):
            name = chance.choice(list(EVENTS))
            before = record
            try:
                record = EVENTS[name](record)
            except UsageError:
                assert record == before
                continue
            if record.handed_over:
                assert record.outgoing is not None
                assert taken in ("", record.outgoing.target)
                taken = record.outgoing.target
            elif before.handed_over:
                assert name in ("thaw, lose writes", "given up")
                taken = ""


def test_a_proof_is_of_one_target_one_move_and_one_word() -> None:
    """Whatever else of what was seen is put together."""
    words = list(Word)
    seen = {(s, e, w): proof_of(s, e, w) for s in (SECRET, OTHER_SECRET) for e in (E, OTHER_E) for w in words}
    keys = {proof.key for proof in seen.values()}
    assert len(keys) == len(seen)
    parts = [*keys, *(proof.other for proof in seen.values()), T, OTHER_T]
    assert len({*parts}) == len(parts)
    for word in words:
        good = [Proof(key, other) for key in parts for other in parts if proves(Proof(key, other), E, T, word)]
        assert good == [seen[SECRET, E, word]]


def test_a_secret_is_not_shown() -> None:
    into = Incoming(Target.RECEIVING, E, SECRET)
    assert SECRET not in f"{into} {Record(into)!r}"
    for word in Word:
        proof = into.proof(word)
        assert proof.key not in repr(proof)
        assert SECRET not in f"{proof.key}{proof.other}{into.number}"


def test_an_epoch_that_was_thawed_is_over() -> None:
    record = migration.thaw(migration.freeze(migration.serve(Record(), E), NEW), lose_writes=False)
    record = migration.serve(record, NEW)
    with pytest.raises(UsageError, match="is over"):
        migration.hand_over(record, E, T, "beta")
    assert migration.hand_over(record, NEW, T, "beta").handed_over


@pytest.mark.parametrize("record", ALL)
def test_only_one_side_may_write(record: Record) -> None:
    frozen = record.outgoing is not None and record.outgoing.state is not Source.SERVING
    assert bool(record.obstacle) == (frozen or record.receiving)
    assert bool(record.needed) == (record.outgoing in OUTGOING[3:5])


def test_states_of_a_target() -> None:
    receiving, active, local, abandoned = (Record(Incoming(state, E, SECRET)) for state in Target)
    assert [migration.activate(r) for r in (receiving, active, local)] == [active, active, local]
    assert [migration.complete(r) for r in (active, local)] == [local, local]
    assert [migration.abandon(r) for r in (receiving, abandoned)] == [abandoned, abandoned]
    base = "nbd://host/vm"
    assert [r.base_name(base) for r in (receiving, active, local, abandoned)] == [base, f"{base}/{E}", base, base]
    assert active.base_name("nbd+unix:///vm?socket=/s") == f"nbd+unix:///vm/{E}?socket=/s"
    for event, record in (
        (migration.complete, receiving),
        (migration.complete, Record()),
        (migration.activate, Record()),
        (lambda r: migration.serve(r, NEW), receiving),
        (lambda r: migration.freeze(r, NEW), receiving),
        *((migration.abandon, r) for r in (Record(), active, local)),
        (migration.activate, abandoned),
        (migration.complete, abandoned),
        (lambda r: migration.serve(r, NEW), abandoned),
        (lambda r: migration.freeze(r, NEW), abandoned),
    ):
        with pytest.raises(UsageError):
            event(record)
    assert migration.hand_over(migration.serve(active, NEW), NEW, OTHER_T, "c").incoming == active.incoming


@pytest.mark.parametrize("record", ALL)
def test_records_are_read_as_they_were_written(record: Record) -> None:
    sector = record.encode()
    assert len(sector) == SIZE
    assert Record.decode(sector, "a.fvd") == record
    assert Record.at(bytes(PLACE) + sector, "a.fvd") == record
    assert migration.is_record(sector) == bool(record)


def test_a_name_is_kept_as_far_as_it_goes() -> None:
    record = migration.hand_over(Record(None, OUTGOING[1]), E, T, '"\\' + "ü" * 500 + "\0")
    assert record.outgoing is not None
    assert record.outgoing.name == "?" * 64
    assert Record.decode(record.encode(), "") == record


def test_damaged_records_are_refused() -> None:
    sector = Record(INCOMING[1], OUTGOING[4]).encode()
    end = len(sector.rstrip(b"\0"))
    for at in range(8, end):
        broken = bytearray(sector)
        broken[at] ^= 0x41
        with pytest.raises(FormatError, match=r"a\.fvd"):
            Record.decode(bytes(broken), "a.fvd")
    for fields in (
        b"{}x",
        b'{"in": ["active", "0", "1"]}',
        b'{"out": ["gone", 1, 2, 3]}',
        b'{"in": "abc"}',
        b'{"in": ["receiving", "%s", "%s"]}' % (E.encode(), E.encode()),  # as there were before there were secrets
        b'{"out": ["moved", "%s", "%s", ""]}' % (E.encode(), E.encode()),
        b"1",
    ):
        text = fields.ljust(100)
        head = sector[:8] + len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
        with pytest.raises(FormatError):
            Record.decode((head + text).ljust(SIZE, b"\0"), "a.fvd")
    assert not Record.decode(bytes(SIZE), "a.fvd")
    assert not Record.decode(b"FVDEXPRT".ljust(SIZE, b"x"), "a.fvd")


def test_a_target_on_a_template() -> None:
    """Its header names the template, its record the source, until all is local."""
    url = "nbd://alpha/vm?x=1"
    receiving = Record(
        Incoming(Target.RECEIVING, E, SECRET, url, "ab" * 16), Outgoing(Source.MOVED, OTHER_E, T, "b" * 64)
    )
    active = migration.activate(receiving)
    local = migration.complete(active)
    for record, keeps, name in ((receiving, True, url), (active, True, f"nbd://alpha/vm/{E}?x=1"), (local, False, "")):
        assert Record.decode(record.encode(), "") == record
        assert (record.keeps_base, record.source_name) == (keeps, name)
        assert record.base_name("template.raw") == "template.raw"
    assert receiving.incoming is not None
    assert receiving.incoming.url("template.raw") == url
    assert Incoming(Target.ACTIVE, E, SECRET).url(url) == url


def test_the_longest_url_of_a_source_fits() -> None:
    url = "n" * (migration.SOURCE_MAX - 2)
    assert migration.fits(url)
    assert not migration.fits(url + "n")
    assert not migration.fits('"' * 150)
    outgoing = Outgoing(Source.RELEASED, E, T, migration.host_name('"' * 100))
    record = Record(Incoming(Target.RECEIVING, E, SECRET, url, "ab" * 16), outgoing)
    assert Record.decode(record.encode(), "") == record


@pytest.mark.parametrize("more", [["", "ab" * 16], ["nbd://x/vm"], ["nbd://x/vm", "g" * 32], ["nbd://x/vm", "ab"]])
def test_a_record_with_half_a_template_is_damaged(more: list[str]) -> None:
    sector = seal(b"FVDmove1", {"in": ["active", E, SECRET, *more]}, SIZE)
    with pytest.raises(FormatError):
        Record.decode(sector, "vm.fvd")
