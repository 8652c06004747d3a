"""What source and target of a move say to each other."""

from __future__ import annotations

import random

from fvdfs.format import mailbox
from fvdfs.format.mailbox import SECTOR, SIZE, Answer, Question, Wish

E, T = "e" * 16, "0123456789abcdef"


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
    box[at : at + SECTOR] = Question("b" * 16, Wish.RELEASE, E, T, "").encode()
    assert [q.number for q in mailbox.questions(bytes(box))] == ["b" * 16]


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
