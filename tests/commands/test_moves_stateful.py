"""Moves between three hosts, in any order of events, with crashes between any two steps and answers that get lost.

What decides is real: `fvdfs serve` for each disk, the mailbox, and what may follow on what. The mounts, which keep a
record and the blocks of each image, and the servers, which have exports, are simulated. At every moment

- at most one image of the disk may be written, and by no machine while an export of the frozen disk stands,
  whatever strangers write into the mailboxes who have seen all that ever was in them;
- what is read is what was written last in that line of the disk, or an error;
- what was released is needed by nobody;

and however it ends, the commands that docs/migration.md names get all of the disk back to where it can be written.

FVDFS_STATEFUL_STEPS scales how many such runs there are; FVDFS_STATEFUL_SEED has other orders tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands import serve
from fvdfs.errors import ImageBusy, ImageError, UsageError
from fvdfs.format import mailbox, migration
from fvdfs.format.mailbox import SECTOR, Answer, Question, Wish
from fvdfs.format.migration import Incoming, Record, Source, Target
from fvdfs.format.proof import Proof, number_of
from fvdfs.ops import moves
from support.crash import quiet

STEPS = int(os.environ.get("FVDFS_STATEFUL_STEPS", "500"))
RUNS = max(STEPS // 2, 100)
SEED = os.environ.get("FVDFS_STATEFUL_SEED", "")
BLOCKS = range(2)
HOSTS = range(3)
MOST = 7  # images
EVENTS_MAX = 150  # of a run
COUNTED = 8  # kinds of what a run is to reach


class Killed(BaseException):
    """A process ends here."""


class Steps:
    """Counts the steps of a process. Before one of them, something happens."""

    def __init__(self) -> None:
        self._left, self._event = -1, end

    def before(self, left: int, event: Callable[[], None]) -> None:
        self._left, self._event = left, event

    def step(self) -> None:
        if self._left == 0:
            self._event()
        self._left -= 1


def end() -> None:
    """The process is killed."""
    raise Killed


class Exports:
    """In place of the storage daemon."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._names: dict[str, str] = {}

    @property
    def names(self) -> set[str]:
        return {*self._names.values()}

    def add_node(self, _node: object) -> None:
        self._steps.step()

    def add_export(self, number: str, _node: str, name: str, *, writable: bool = False) -> None:
        del writable
        self._steps.step()
        self._names[number] = name

    def remove_export(self, number: str) -> None:
        self._steps.step()
        del self._names[number]


class Image:
    """An image of the disk on a host: what of it is stable, and who is at it."""

    def __init__(self, raw: Path, host: int, source: Image | None, record: Record) -> None:
        raw.parent.mkdir()
        raw.touch()
        self.raw = str(raw)
        self.host = host
        self.source = source
        self.record = record
        self.blocks: dict[int, int] = {} if source is not None else dict.fromkeys(BLOCKS, 0)
        self.truth = dict(self.blocks)
        """What was written last in each block, in the line of the disk that this image belongs to."""
        self.given_up: bool = source is not None and source.given_up
        """Whether a user has gone on without what was written here."""
        self.removed = False
        self.mounted = True
        self.lost_mount = False
        """Whether the mount that its server has open has ended."""
        self.has_machine = False
        self.disk: serve._Disk | None = None
        self.exports: Exports | None = None
        self.question: Question | None = None
        self.told = False

    def __str__(self) -> str:
        if self.removed:
            return "removed"
        into, out = self.record.incoming, self.record.outgoing
        words = [f"host {self.host}", "mounted" if self.mounted else "", "machine" if self.has_machine else ""]
        words += [f"{into.state.value} {into.epoch[:3]}" if into is not None else ""]
        words += [f"{out.state.value} {out.epoch[:3]}" if out is not None else ""]
        words += [f"served {sorted(self.exports.names)}" if self.exports is not None else ""]
        words += ["told" if self.told else "", "given up" if self.given_up else "", str(self.blocks)]
        return " ".join(word for word in words if word)

    @property
    def may_write(self) -> bool:
        return not self.record.obstacle

    @property
    def line(self) -> Iterator[Image]:
        """This image, and all that it has come from."""
        image: Image | None = self
        while image is not None:
            yield image
            image = image.source

    def is_given(self, suffix: str) -> bool:
        """Whether a client can read the export of this name."""
        return not self.lost_mount and self.exports is not None and f"vm{suffix}" in self.exports.names

    def read(self, block: int) -> int | None:
        """None: that fails."""
        if self.removed or not self.mounted:
            return None
        if block in self.blocks:
            return self.blocks[block]
        assert self.source is not None
        into = self.record.incoming
        assert into is not None
        assert into.state is not Target.LOCAL, "it says that all is here"
        suffix = f"/{into.epoch}" if into.state is Target.ACTIVE else ""
        return self.source.read(block) if self.source.is_given(suffix) else None

    def crash(self) -> None:
        """Of the host, as far as this image is concerned."""
        self.mounted = self.has_machine = False
        self.end_server()
        self.forget()

    def end_server(self) -> None:
        if self.disk is not None:
            self.disk.close()
        self.disk, self.exports, self.lost_mount = None, None, False

    def forget(self) -> None:
        self.question, self.told = None, False


EVENTS: list[str] = []
OFTEN = ("move", "run_machine", "write", "copy", "mount_all", "receive", "serve", "tell")
RARE = ("crash_host", "lose_writes", "freeze", "thaw")


def event(method: Callable[..., None]) -> Callable[..., None]:
    """One of what may happen."""
    name = method.__name__
    EVENTS.extend([name] * (6 if name in OFTEN else 1 if name in RARE else 3))
    return method


class Hosts:
    """Three hosts, and a disk that begins on the first."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
        self.folder = folder
        self.counts = counts
        self.steps = Steps()
        self.images: list[Image] = []
        self.by_raw: dict[str, Image] = {}
        self._add(0, None, Record())
        self.versions = 0
        self.numbers = 0
        self.secrets = 0
        self.seen: list[Question] = []
        """All that was ever asked."""
        for name, fake in (("facts", self._facts), ("ask_mount", self._ask_mount), ("flush", lambda _raw: None)):
            patch.setattr(serve, name, fake)
        patch.setattr(serve, "kept_from_qemu", self._kept_from_qemu)

    def _add(self, host: int, source: Image | None, record: Record) -> None:
        image = Image(self.folder / str(len(self.images)) / "vm.raw", host, source, record)
        self.images.append(image)
        self.by_raw[image.raw] = image

    # --- what `fvdfs serve` finds ---------------------------------------------------------------------

    def _facts(self, raw: str, _attribute: str) -> dict[str, Any]:
        image = self.by_raw[os.path.realpath(raw)]
        if not image.mounted or image.removed or image.lost_mount:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        out = image.record.outgoing
        found = {} if out is None else {"move_epoch": out.epoch, "move_target": out.target, "moved_to": out.name}
        return {"move": image.record.state, **found}

    def _ask_mount(self, raw: str, step: str) -> dict[str, Any]:
        image = self.by_raw[raw]
        self._facts(raw, "")
        self.steps.step()
        image.record = moves._event(step)(image.record)
        self.steps.step()
        return self._facts(raw, "")

    @contextlib.contextmanager
    def _kept_from_qemu(self, raw: str) -> Iterator[None]:
        self._facts(raw, "")
        if self.by_raw[raw].has_machine:
            raise ImageBusy(raw, "a machine runs on it")
        yield

    # --- events -------------------------------------------------------------------------------------

    def _pick(self, number: int, condition: Callable[[Image], object] = lambda _: True) -> Image | None:
        """One of the images that are there and for which this holds."""
        found = [image for image in self.images if not image.removed and condition(image)]
        return found[number % len(found)] if found else None

    def _serve(self, image: Image, left: int = -1, event: Callable[[], None] = end) -> None:
        """Have the server of an image do what it does; before one of its steps something happens."""
        self.steps.before(left, event)
        try:
            if image.disk is None:
                self.numbers += 1
                image.disk, image.exports = serve._Disk(image.raw, self.numbers), Exports(self.steps)
                image.disk.begin()
                server: Any = image.exports
                image.disk.export(server)
            server = image.exports
            image.disk.look(server)
        except (Killed, UsageError, ImageError, OSError):
            image.end_server()
        finally:
            self.steps.before(-1, end)

    @event
    def serve(self, number: int, *, left: int, **_: int) -> None:
        """A server starts, or looks, and perhaps ends."""
        if image := self._pick(number):
            self._serve(image, left)

    @event
    def serve_while_machines_start(self, number: int, *, left: int, other: int, **_: int) -> None:
        image, another = self._pick(number, lambda image: image.disk is not None), self._pick(other)
        if image is None or another is None:
            return

        def start() -> None:
            for each in (image, another):
                self._run_machine(each)
                self._write(each, 0)
            self._copy(another, 1)
            self.nothing_old_is_read()
            self.what_is_exported_as_frozen_is_written_by_no_machine()

        self._serve(image, left, start)

    @event
    def end_server(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.disk is not None):
            image.end_server()

    @event
    def crash_host(self, _number: int, *, host: int, **_: int) -> None:
        for image in self.images:
            if image.host == host:
                image.crash()

    @event
    def mount_all(self, _number: int, **_: int) -> None:
        for image in self.images:
            image.mounted = True

    @event
    def end_mount(self, number: int, **_: int) -> None:
        """It is killed, and clients of the server get errors."""
        if image := self._pick(number, lambda image: image.mounted):
            image.mounted = image.has_machine = False
            image.lost_mount = image.disk is not None
            image.forget()

    @event
    def receive(self, number: int, *, host: int, meets: int, **_: int) -> None:
        source = self._pick(number, lambda image: image.mounted and not image.record.receiving)
        if source is None or len(self.images) == MOST:
            return
        self._serve(source)
        if source.disk is None:
            return
        with open(source.disk.box, "rb") as box:
            epoch = mailbox.epoch_in(box.read(SECTOR))
        self._add(host, source, Record(Incoming(Target.RECEIVING, epoch, self._draw(epoch, meets=meets))))

    def _draw(self, epoch: str, *, meets: int) -> str:
        """A secret; `meets`: of a target that has the first slot of the mailbox."""
        while True:
            self.secrets += 1
            secret = f"{self.secrets:032x}"
            if not meets or mailbox.question_at(number_of(secret, epoch)) == mailbox.question_at("0"):
                return secret

    def _put(self, image: Image, wish: Wish) -> None:
        into, source = image.record.incoming, image.source
        assert into is not None
        assert source is not None
        if source.disk is None:
            return
        image.told = False
        self.numbers += 1
        image.question = Question.of(into, wish, f"{self.numbers:016x}", "host")
        self.seen.append(image.question)
        self._write_question(source.disk.box, image.question)

    @staticmethod
    def _write_question(path: str, question: Question) -> None:
        with open(path, "r+b") as box:
            box.seek(mailbox.question_at(question.target))
            box.write(question.encode())

    def _ask(self, image: Image) -> None:
        if image.record.receiving and not image.record.abandoned and image.mounted:
            self._put(image, Wish.HAND_OVER)

    def _hear(self, image: Image) -> None:
        if image.question is None or image.source is None or image.source.disk is None:
            return
        with open(image.source.disk.box, "rb") as box:
            box.seek(mailbox.question_at(image.question.target) + SECTOR)
            answer = Answer.decode(box.read(SECTOR))
        if answer is not None and answer.number == image.question.number:
            image.told = answer.done and image.question.wish is Wish.HAND_OVER
            image.question = None

    def _take_over(self, image: Image) -> None:
        into, source = image.record.incoming, image.source
        if not image.told or into is None or source is None or not source.is_given(f"/{into.epoch}"):
            return
        if image.record.receiving and not image.record.abandoned:
            image.record = migration.activate(image.record)
            image.truth = dict(source.truth)
            self.counts["taken over"] += 1
            self.counts["taken over from what still follows"] += any(
                each.record.incoming is not None and each.record.incoming.state is Target.ACTIVE for each in source.line
            )

    @event
    def ask(self, number: int, **_: int) -> None:
        """A first write, or `fvdfs activate`."""
        if image := self._pick(number, lambda image: image.record.receiving):
            self._ask(image)

    @event
    def hear(self, number: int, **_: int) -> None:
        """A target reads its answer."""
        if image := self._pick(number, lambda image: image.question):
            self._hear(image)

    @event
    def lose_answer(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.question or image.told):
            image.forget()

    @event
    def abandon(self, number: int, *, left: int, **_: int) -> None:
        """A target gives the move up, and tells its source, if that hears it."""
        image = self._pick(number, lambda image: image.record.receiving and image.mounted)
        if image is None or image.source is None:
            return
        image.record = migration.abandon(image.record)
        had = image.source.record.handed_over
        self._put(image, Wish.GO_ON)
        if image.source.disk is not None:
            self._serve(image.source, left)
        self.counts["given up by the target that had it"] += had and not image.source.record.handed_over

    @event
    def take_over(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.told):
            self._take_over(image)

    @event
    def move(self, number: int, **_: int) -> None:
        """All of it, without a failure."""
        image = self._pick(number, lambda image: image.record.receiving and image.mounted)
        if image is None or image.source is None or image.source.removed:
            return
        image.source.mounted, image.source.has_machine = True, False
        self._serve(image.source)
        self._ask(image)
        if image.source.disk is not None:
            self._serve(image.source)
        self._hear(image)
        self._take_over(image)

    def _run_machine(self, image: Image) -> None:
        is_kept = image.disk is not None and image.disk._is_locked and not image.lost_mount
        image.has_machine = image.mounted and image.may_write and not image.removed and not is_kept

    @event
    def run_machine(self, number: int, **_: int) -> None:
        """Where QEMU gets its locks."""
        if image := self._pick(number, lambda image: image.may_write):
            self._run_machine(image)

    @event
    def stop_machine(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.has_machine):
            image.has_machine = False

    def _write(self, image: Image, block: int) -> None:
        if image.has_machine and image.may_write:
            self.versions += 1
            image.blocks[block] = image.truth[block] = self.versions

    @event
    def write(self, number: int, *, block: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.has_machine):
            self._write(image, block)

    def _copy(self, image: Image, block: int) -> None:
        into = image.record.incoming
        if not image.may_write or into is None or (found := image.read(block)) is None:
            return
        image.blocks[block] = found
        if into.state is Target.ACTIVE and len(image.blocks) == len(BLOCKS):
            image.record = migration.complete(image.record)
            self.counts["local"] += 1
            self.counts["local after its source had moved on"] += any(
                each.record.incoming is not None and each.record.incoming.state is Target.ACTIVE for each in image.line
            )

    @event
    def copy(self, number: int, *, block: int, **_: int) -> None:
        """What is missing of a disk that follows."""
        if image := self._pick(number, lambda image: image.may_write and image.source):
            self._copy(image, block)

    @event
    def tell(self, number: int, **_: int) -> None:
        """The source is not needed any more."""
        if image := self._pick(number, lambda image: image.mounted and needs_nothing(image.record)):
            self._put(image, Wish.RELEASE)

    def _command(self, image: Image, step: str) -> None:
        with contextlib.suppress(UsageError):
            image.record = moves._event(step)(image.record)

    @event
    def keep(self, number: int, *, other: int, **_: int) -> None:
        """Of all targets one alone is to get the disk."""
        image = self._pick(number, lambda image: image.mounted and image.record.outgoing)
        another = self._pick(other, lambda another: another.source is image and another.record.incoming)
        if image is None or another is None:
            return
        into = another.record.incoming
        assert into is not None
        self._command(image, f"keep {into.epoch} {into.number}")

    @event
    def forge(self, number: int, *, other: int, left: int, meets: int, **_: int) -> None:
        """A stranger asks what others have asked, or puts what he saw together to another wish."""
        image = self._pick(number, lambda image: image.disk is not None and image.record.outgoing)
        if image is None or image.disk is None:
            return
        out = image.record.outgoing
        assert out is not None
        self.numbers += 1
        shown = [question for question in self.seen if question.proof is not None and question.epoch == out.epoch]
        proof = shown[other % len(shown)].proof if shown else Proof("0" * 32, out.target or "0" * 32)
        assert proof is not None
        forged = [
            Question(f"{self.numbers:016x}", wish, out.epoch, out.target or "0" * 32, "stranger", "", each)
            for wish in mailbox.WORDS
            for each in (proof, Proof(proof.other, proof.key), Proof(proof.other, proof.other))
        ]
        again = [replace(question, number=f"{self.numbers:016x}") for question in self.seen]
        question = (again if meets and again else forged)[other % len(again if meets and again else forged)]
        self._write_question(image.disk.box, question)
        before = image.record
        self._serve(image, left)
        if before.handed_over and question in forged:
            self.counts["forged, and refused"] += image.record == before

    @event
    def freeze(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.mounted and not image.has_machine):
            self._command(image, "freeze")

    @event
    def thaw(self, number: int, **_: int) -> None:
        if image := self._pick(number, lambda image: image.mounted and not image.may_write):
            self._command(image, "thaw")

    @event
    def lose_writes(self, number: int, **_: int) -> None:
        image = self._pick(number, lambda image: image.mounted and image.record.handed_over)
        if image is None:
            return
        self._command(image, "thaw lose-writes")
        self.counts["given up"] += 1
        for other in self.images:
            other.given_up = other.given_up or (other is not image and image in other.line)

    @event
    def remove(self, number: int, **_: int) -> None:
        """As `fvdfs` permits it."""
        released = Source.RELEASED
        if image := self._pick(number, lambda i: i.record.outgoing is not None and i.record.outgoing.state is released):
            image.crash()
            image.removed = True
            self.counts["removed"] += 1

    def happen(self, chance: random.Random) -> str:
        """One event, after which all holds that has to hold; what has changed by it."""
        name, number, before = chance.choice(EVENTS), chance.randrange(MOST), str(self)
        left = chance.choice((-1, chance.randrange(7)))  # before which of its steps a server is disturbed; -1: none
        details = {"left": left, "other": chance.randrange(MOST), "host": chance.choice(HOSTS)}
        details |= {"meets": chance.randrange(2), "block": chance.choice(BLOCKS)}
        try:
            getattr(self, name)(number, **details)
            self.one_may_write()
            self.nothing_old_is_read()
            self.what_is_exported_as_frozen_is_written_by_no_machine()
        except Exception as error:
            error.add_note(f"{name}({number}, {details}): {self}")
            raise
        return "" if str(self) == before else f"{name}: {self}"

    def __str__(self) -> str:
        return "; ".join(map(str, self.images))

    # --- what holds -----------------------------------------------------------------------------------

    def one_may_write(self) -> None:
        writers = [image.raw for image in self.images if image.may_write and not image.given_up and not image.removed]
        assert len(writers) <= 1, writers

    def nothing_old_is_read(self) -> None:
        for image in self.images:
            into = image.record.incoming
            assert image.source is not None or into is None
            truth = image.source.truth if image.record.receiving and image.source is not None else image.truth
            for block in BLOCKS:
                found = image.read(block)
                assert found is None or not truth or found == truth[block], f"{image.raw}: {found}, not {truth[block]}"

    def what_is_exported_as_frozen_is_written_by_no_machine(self) -> None:
        for image in self.images:
            names = image.exports.names if image.exports is not None and not image.lost_mount else ()
            is_frozen = any(migration.is_number(name.rpartition("/")[2]) for name in names)
            assert not (is_frozen and image.has_machine and image.may_write), image.raw

    def get_out(self) -> None:
        """All hosts are back, and whoever has the disk goes on."""
        for image in self.images:
            image.mounted, image.has_machine = True, False
            image.end_server()
        for _ in self.images:
            for image in self.images:
                if not image.removed:
                    self._serve(image)
            for image in self.images:
                out = image.record.outgoing
                if image.removed or image.given_up or out is None:
                    continue
                if out.state is Source.FROZEN:
                    self._command(image, "thaw")
                elif out.state is Source.MOVED:
                    self._go_on(image, out.target, out.epoch)
        (one,) = (image for image in self.images if image.may_write and not image.removed and not image.given_up)
        if not any(image.given_up for image in self.images):
            assert [one.read(block) for block in BLOCKS] == [one.truth[block] for block in BLOCKS]
        self.nothing_old_is_read()

    def _go_on(self, source: Image, target: str, epoch: str) -> None:
        """A target that has asked asks again, or tells again that it has given the move up."""
        for image in self.images:
            into = image.record.incoming
            if image.source is source and into is not None and (into.number, into.epoch) == (target, epoch):
                if image.record.abandoned:
                    self._put(image, Wish.GO_ON)
                self._ask(image)
                self._serve(source)
                self._hear(image)
                self._take_over(image)


def needs_nothing(record: Record) -> bool:
    """Whether the source of an image may be told to release the disk."""
    into, out = record.incoming, record.outgoing
    if into is None or into.state is Target.RECEIVING:
        return False
    return into.state is Target.LOCAL or (out is not None and out.state is Source.RELEASED)


def test_any_order_of_events(tmp_path: Path) -> None:
    counts = Counter[str]()
    for run in range(RUNS):
        chance = random.Random(f"{SEED} {run}")
        (folder := tmp_path / str(run)).mkdir()
        with quiet(), pytest.MonkeyPatch.context() as patch:
            hosts = Hosts(folder, patch, counts)
            happened = []
            try:
                for _ in range(chance.randrange(EVENTS_MAX)):
                    happened.append(hosts.happen(chance))
                hosts.get_out()
            except Exception as error:
                error.add_note("\n".join([f"run {run}", *filter(None, happened)]))
                raise
            finally:
                for image in hosts.images:
                    image.end_server()
    print(f"{RUNS} runs: {dict(counts)}")
    assert len(counts) == COUNTED, "something was never tried"
