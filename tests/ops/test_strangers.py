"""What somebody can do who reaches the address of a disk that moves: he reads all, and writes into its mailbox."""

from __future__ import annotations

import functools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fvdfs.format import mailbox
from fvdfs.format.mailbox import SECTOR, SIZE, Question, Wish
from fvdfs.format.migration import Incoming, Target
from fvdfs.format.proof import Proof, Word, proof_of
from fvdfs.store.locations import parse_location
from fvdfs.store.source import ask
from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until
from support.moves import Client, number, record, serving

CONTENT = random.Random(4).randbytes(2 * MIB)
OTHER_SECRET = "5" * 32
ALLOWED = "allow_url=nbd+unix:///"


class Scene:
    """A source that is served, a target, and a stranger."""

    def __init__(self, source: Mount, image: Path, log_file: Path) -> None:
        self.source = source
        self.image = image
        self.log_file = log_file
        self.url = f"nbd+unix:///vm?socket={source.folder.parent / 'nbd'}"
        self.stranger = Client(self.url)

    @property
    def into(self) -> Incoming:
        found = record(self.image).incoming
        assert found is not None
        return found

    def ask(self, wish: Wish) -> None:
        """As the target."""
        trio.run(functools.partial(ask, parse_location(self.url), "", self.into, wish, 3.0))

    def state(self) -> str:
        """Of the source."""
        return str(self.source.status("vm")["move"])

    def forged(self, shown: Proof | None = None) -> Iterator[Question]:
        """Words in the name of this target, with all that can be seen of it; `shown`: what was shown with another."""
        epoch, target = self.into.epoch, self.into.number
        theirs = Incoming(Target.LOCAL, epoch, OTHER_SECRET)
        for wish, word in mailbox.WORDS.items():
            for proof in (
                theirs.proof(word),
                Proof(target, target),
                *((shown, Proof(shown.other, shown.key), Proof(shown.key, shown.key)) if shown is not None else ()),
            ):
                yield Question(number(), wish, epoch, target, "stranger", proof=proof)

    def refuses(self, question: Question) -> str:
        """The answer, which is no."""
        answer = self.stranger.ask(question)
        assert (answer.done, answer.later) == (False, False), (question, answer)
        return answer.text

    def shown(self) -> str:
        """All that can be seen of the move without reading the target's image."""
        parts = [self.stranger.read().decode("latin-1"), self.log_file.read_text(), self.source.log]
        parts += [json.dumps(self.source.status("vm")), must("status", "--json", self.source.point)]
        parts += [fvdfs("info", "--json", path).out for path in (self.source.folder / "vm.fvd", self.image)]
        return "\n".join(parts)

    def expect_nothing_is_shown(self, but: Word | None = None) -> None:
        shown, into = self.shown(), self.into
        assert into.number in shown
        assert into.secret not in shown
        for word in Word:
            assert (into.proof(word).key in shown) == (word is but), word


@pytest.fixture
def scene(folder: Path, tmp_path: Path) -> Iterator[Scene]:
    must("create", folder / "vm.fvd", "8M")
    (there := tmp_path / "there").mkdir()
    with mounted(folder) as source:
        with source.raw("vm").open("r+b") as disk:
            disk.write(CONTENT)
        found = Scene(source, there / "vm.fvd", tmp_path / "serve.log")
        with serving(source, found.log_file):
            must("receive", found.url, found.image)
            yield found


def cannot_write(mount: Mount) -> bool:
    try:
        with mount.raw("vm").open("r+b", buffering=0) as disk:
            disk.write(b"x")
    except OSError:
        return True
    return False


def test_nobody_speaks_for_a_target_that_has_not_asked(scene: Scene) -> None:
    """It may be anybody who asks first, and he has nothing in the name of another."""
    for question in scene.forged():
        answer = scene.stranger.ask(question)
        assert answer.done == (question.wish is Wish.GO_ON)  # that changes nothing
        assert scene.state() == "serving"
    epoch = scene.into.epoch
    assert scene.source.status("vm")["move_epoch"] == epoch
    scene.ask(Wish.HAND_OVER)
    for question in scene.forged():
        assert "does not show that it is" in scene.refuses(question)
        assert scene.state() == "moved"
    assert cannot_write(scene.source)
    scene.expect_nothing_is_shown()
    must("abandon", scene.image)
    wait_until(lambda: scene.state() == "serving")
    assert scene.source.status("vm")["move_epoch"] != epoch


def test_nobody_speaks_for_a_target_that_writes_the_disk(scene: Scene) -> None:
    """Else two hosts wrote it, or the source's image were removed that is needed."""
    with mounted(scene.image.parent, "-o", f"{ALLOWED},prefetch_max=16k") as target:
        must("activate", target.raw("vm"))
        with target.raw("vm").open("r+b", buffering=0) as disk:
            disk.write(b"written")
            scene.expect_nothing_is_shown()
            assert scene.into.secret not in target.log + json.dumps(target.status("vm"))
            for question in scene.forged():
                assert "does not show that it is" in scene.refuses(question)
                assert scene.state() == "moved"
            said = "stranger asks to go on without it: does not show that it is"
            wait_until(lambda: said in scene.log_file.read_text())
            assert cannot_write(scene.source)
            assert target.status("vm")["move"] == "active"
    outgoing = record(scene.source.folder / "vm.fvd").outgoing
    assert outgoing is not None
    assert (outgoing.epoch, outgoing.target) == (scene.into.epoch, scene.into.number)
    with mounted(scene.image.parent, "-o", ALLOWED) as target, target.raw("vm").open("rb"):
        wait_until(lambda: scene.state() == "released", 30)
        assert target.raw("vm").read_bytes()[: len(CONTENT)] == b"written" + CONTENT[7:]
    scene.expect_nothing_is_shown(but=Word.RELEASE)
    shown = scene.into.proof(Word.RELEASE)
    for question in scene.forged(shown):
        if (question.wish, question.proof) != (Wish.RELEASE, shown):
            scene.refuses(question)
        assert scene.state() == "released"
    must("thaw", "--lose-writes", scene.source.raw("vm"))
    wait_until(lambda: scene.state() == "serving")
    epoch = scene.source.status("vm")["move_epoch"]
    scene.image.unlink()
    must("receive", scene.url, scene.image)
    scene.ask(Wish.HAND_OVER)
    assert scene.into.epoch == epoch
    for question in scene.forged(shown):
        assert "does not show that it is" in scene.refuses(question)
    assert scene.state() == "moved"


def test_what_was_seen_of_one_that_gave_up_is_no_word_for_the_next(scene: Scene) -> None:
    must("abandon", scene.image)
    shown = scene.into.proof(Word.GO_ON)
    scene.expect_nothing_is_shown(but=Word.GO_ON)
    before = scene.image.rename(scene.image.with_name("before.fvd"))
    must("receive", scene.url, scene.image)
    assert record(before).incoming != record(scene.image).incoming
    scene.ask(Wish.HAND_OVER)
    for question in scene.forged(shown):
        scene.refuses(question)
    again = proof_of(scene.into.secret, "0" * 16, Word.GO_ON)
    scene.refuses(Question(number(), Wish.GO_ON, scene.into.epoch, scene.into.number, "stranger", proof=again))
    assert scene.state() == "moved"


def test_nonsense_in_the_mailbox_and_many_questions_keep_nobody_from_the_disk(scene: Scene) -> None:
    chance = random.Random(6)
    scene.stranger.write(0, chance.randbytes(SIZE))
    good = Question(number(), Wish.HAND_OVER, "0" * 16, "0" * 32, "stranger").encode()
    for _ in range(100):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            bad[chance.randrange(200)] = chance.randrange(256)
        scene.stranger.write(chance.randrange(SIZE // SECTOR) * SECTOR, bytes(bad))
    for each in range(40):
        wish = chance.choice(list(Wish))
        proof = Proof(f"{each:032x}", "0" * 32) if wish in mailbox.WORDS else None
        stamp = "ab" * 16 if wish in (Wish.MAP, Wish.STAND) else ""
        whom = f"{chance.randrange(1 << 100):032x}"
        epoch = scene.into.epoch if wish is not Wish.HAND_OVER else "0" * 16
        question = Question(number(), wish, epoch, whom, f"stranger{each}", stamp, proof)
        assert scene.stranger.ask(question).done == (wish is Wish.GO_ON)
    assert len(scene.log_file.read_text().splitlines()) <= 10
    assert scene.state() == "serving"
    assert mailbox.epoch_in(scene.stranger.read(length=SECTOR)) == scene.into.epoch
    must("receive", scene.url, scene.image.with_name("another.fvd"))
    with mounted(scene.image.parent, "-o", ALLOWED) as target:
        must("activate", target.raw("vm"))
        with target.raw("vm").open("rb"):
            wait_until(lambda: scene.state() == "released", 30)


def test_a_disk_that_is_kept_for_a_target_is_given_to_no_other(scene: Scene) -> None:
    """As `fvdfs migrate` has it, which knows the target."""
    epoch, raw = scene.into.epoch, scene.source.raw("vm")
    other = Incoming(Target.RECEIVING, epoch, OTHER_SECRET)
    os.setxattr(raw, "user.fvdfs.move", f"keep {epoch} {scene.into.number}".encode())
    asked = Question.of(other, Wish.HAND_OVER, number(), "stranger")
    assert "is kept for another target" in scene.refuses(asked)
    assert (scene.state(), scene.source.status("vm")["moved_to"]) == ("serving", "")
    assert not cannot_write(scene.source)
    scene.ask(Wish.HAND_OVER)
    assert scene.state() == "moved"
    must("abandon", scene.image)
    wait_until(lambda: scene.state() == "serving")
    epoch = scene.source.status("vm")["move_epoch"]
    os.setxattr(raw, "user.fvdfs.move", f"keep {epoch} {'7' * 32}".encode())
    scene.refuses(Question.of(Incoming(Target.RECEIVING, epoch, OTHER_SECRET), Wish.HAND_OVER, number(), "stranger"))
    must("thaw", raw)
    wait_until(lambda: scene.source.status("vm").get("move_epoch") not in (None, epoch))
    scene.image.unlink()
    must("receive", scene.url, scene.image)
    scene.ask(Wish.HAND_OVER)
    assert scene.state() == "moved"
