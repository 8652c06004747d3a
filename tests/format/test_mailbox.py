"""What source and target of a move say to each other."""

from __future__ import annotations

import random
from typing import Any

from fvdfs.format import mailbox
from fvdfs.format.mailbox import SECTOR, SIZE, Answer, Question, Wish
from fvdfs.format.migration import Incoming, Target, host_name
from fvdfs.format.proof import Word
from fvdfs.format.sealed import seal, seal_text

E, SECRET = "e" * 16, "0123456789abcdef" * 2
INTO = Incoming(Target.LOCAL, E, SECRET)
T = INTO.number


def test_a_question_is_there_until_it_is_answered() -> None:
    box = bytearray(SIZE)
    box[:SECTOR] = mailbox.announcement(E)
    assert mailbox.epoch_in(bytes(box[:SECTOR])) == E
    assert mailbox.questions(bytes(box)) == []
    question = Question("a" * 16, Wish.HAND_OVER, E, T, "beta\n" * 50)
    at = mailbox.question_at(T)
    box[at : at + SECTOR] = question.encode()
    (found,) = mailbox.questions(bytes(box))
    assert (found.number, found.wish, found.epoch, found.target) == ("a" * 16, Wish.HAND_OVER, E, T)
    assert len(found.name) == 64
    answer = Answer("a" * 16, done=False, later=True, text="ä" * 1000)
    box[at + SECTOR : at + 2 * SECTOR] = answer.encode()
    assert mailbox.questions(bytes(box)) == []
    assert Answer.decode(bytes(box[at + SECTOR : at + 2 * SECTOR])) == Answer("a" * 16, False, True, "?" * 300)
    for number, wish in (("b" * 16, Wish.RELEASE), ("c" * 16, Wish.GO_ON)):
        question = Question.of(INTO, wish, number, "")
        box[at : at + SECTOR] = question.encode()
        (found,) = mailbox.questions(bytes(box))
        assert found == question
        assert found.proof == INTO.proof(mailbox.WORDS[wish])


def test_the_longest_question_fits() -> None:
    into = Incoming(Target.LOCAL, E, SECRET, "nbd://alpha/vm", "ab" * 16)
    question = Question.of(into, Wish.GO_ON, "a" * 16, host_name('"' * 100))
    assert Question.decode(question.encode()) == question


def test_the_secret_is_never_in_a_question() -> None:
    for wish in Wish:
        text = Question.of(INTO, wish, "a" * 16, "beta").encode()
        keys = {word: INTO.proof(word).key for word in Word}
        shown = [word for word, key in keys.items() if key.encode() in text]
        assert shown == ([mailbox.WORDS[wish]] if wish in mailbox.WORDS else [])
        assert SECRET.encode() not in text


NONSENSE: list[dict[str, Any]] = [
    {"n": 1},
    {"target": T[:16]},
    {"target": [T]},
    {"name": [1]},
    {"name": None},
    {"wish": []},
    {"stamp": 5},
    {"stamp": None},
    {"wish": "release"},
    {"wish": Wish.RELEASE.value},
    {"wish": Wish.GO_ON.value, "key": T},
    {"wish": Wish.GO_ON.value, "key": [], "other": T},
    {"wish": Wish.GO_ON.value, "key": T, "other": T[1:]},
]


def test_a_question_that_is_whole_and_makes_no_sense_is_none() -> None:
    good = {"n": "a" * 16, "wish": Wish.HAND_OVER.value, "epoch": E, "target": T, "name": "beta"}
    assert Question.decode(seal(b"FVDmail1", good, SECTOR))
    for bad in NONSENSE:
        assert Question.decode(seal(b"FVDmail1", good | bad, SECTOR)) is None, bad
    for text in (b"[" * 490, b"[[1, 2]]", b"1", b'"x"', b"9" * 480, b'{"n": NaN}'):
        sector = seal_text(b"FVDmail1", text, SECTOR)
        assert Question.decode(sector) is None
        assert Answer.decode(sector) is None
        assert mailbox.epoch_in(sector) == ""


def test_slots_are_apart_and_inside() -> None:
    places = {mailbox.question_at(f"{n:016x}") for n in range(200)}
    assert len(places) == 63
    assert min(places) == 2 * SECTOR
    assert max(places) == SIZE - 2 * SECTOR


def test_nonsense_is_no_question() -> None:
    chance = random.Random(1)
    good = Question("a" * 16, Wish.HAND_OVER, E, T, "beta").encode()
    for _ in range(300):
        bad = bytearray(good)
        bad[chance.randrange(60)] = chance.randrange(256)
        if bad != good:
            assert Question.decode(bytes(bad)) is None
        assert Answer.decode(bytes(bad)) is None
        assert mailbox.epoch_in(bytes(bad)) in ("", E)
    assert mailbox.questions(chance.randbytes(SIZE)) == []
