"""The fuzz targets (`fuzz/`) without the fuzzer: stored inputs, changed ones, random ones; and that targets notice.

For more, and guided by coverage: `python tests/fuzz/run.py`, with the extra `fuzz`.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import corpus
from fuzz.targets import MAX_LENGTH, TARGETS, seeds
from fvdfs.alloc.table import Table
from fvdfs.cow.bitmap import Bitmap
from fvdfs.format import mailbox, migration, qcow2
from fvdfs.format.header import Header
from fvdfs.format.note import Note
from fvdfs.image.image import Image
from fvdfs.store import base, locations, references
from support.crash import quiet

RUN = Path(__file__).parent / "fuzz" / "run.py"
all_targets = pytest.mark.parametrize("target", TARGETS)
some_examples = settings(
    max_examples=300, deadline=timedelta(seconds=5), suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@functools.cache
def inputs(target: str) -> list[bytes]:
    return [*corpus.load(target), *corpus.regressions(target).values(), *seeds(target, 0)[:20]]


@all_targets
def test_stored_inputs(target: str) -> None:
    stored = corpus.load(target)
    assert len(stored) > 20
    accepted = [TARGETS[target](data) for data in stored]
    assert any(accepted)
    assert all(len(data) <= MAX_LENGTH[target] for data in stored)


@pytest.mark.parametrize("name", sorted(path.name for path in corpus.REGRESSIONS.iterdir()))
def test_inputs_that_a_defect_was_found_with(name: str) -> None:
    target = name.partition("-")[0]
    TARGETS[target](corpus.regressions(target)[name])


def changed(data: bytes, changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Some pieces of the input replaced by others, of any length."""
    for at, length, piece in changes:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + length :]
    return data


pieces = st.tuples(st.integers(0, 511), st.integers(0, 8), st.binary(max_size=8))


@all_targets
@some_examples
@given(number=st.integers(0, 4095), changes=st.lists(pieces, min_size=1, max_size=4))
def test_changed_inputs(target: str, number: int, changes: list[tuple[int, int, bytes]]) -> None:
    known = inputs(target)
    TARGETS[target](changed(known[number % len(known)], changes))


@all_targets
@some_examples
@given(data=st.binary(max_size=400))
def test_random_inputs(target: str, data: bytes) -> None:
    TARGETS[target](data)


# --- that targets notice ----------------------------------------------------------------------------


def _unchecked(self: Header, image: str, file_size: int) -> None:
    pass


def _record_that_fits(self: Table, first: int, entries: Sequence[int]) -> str | None:
    if first + len(entries) > self.chunks:
        return "out of range"
    for chunk, entry in enumerate(entries, first):
        self._entries[chunk] = entry & 0x7FFFFFFF
    return None


def _without_last(self: Bitmap, start: int, stop: int) -> None:
    self._local[start : stop - 1] = 1


async def _nothing(self: Image) -> None:
    pass


def _any_text(name: str, what: str, raw: bytes, size: int) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _unquoted(name: str, text: str, safe: str = "/") -> str:
    return text


def _as_one(places: list[qcow2.Placed], new: qcow2.Placed) -> None:
    places[:] = [(places[0][0] if places else new[0], new[1], new[2])]


def _any_note(data: bytes, image: str) -> Note:
    return Note("", "", len(data), -1, 0, b"", "")


def _believed(*_: object) -> bool:
    return True


async def _all_at_once(source: base.Store, size: int, offset: int) -> bytearray:
    data = bytearray(size + (1 << 40 if size > 1 << 40 else 1 << 18))
    await source.pread(memoryview(data), offset)
    return data[:size]


@pytest.mark.parametrize(
    ("target", "where", "name", "wrong"),
    [
        ("header", Header, "check", _unchecked),
        ("open", Header, "check", _unchecked),
        ("table", Table, "replay", _record_that_fits),
        ("journal", Table, "replay", _record_that_fits),
        ("open", Table, "replay", _record_that_fits),
        ("bitmap", Bitmap, "set_local", _without_last),
        ("journal", Bitmap, "set_local", _without_last),
        ("open", Bitmap, "set_local", _without_last),
        ("open", Image, "fsync", _nothing),
        ("formats", locations, "_quoted", _unquoted),
        ("formats", references, "_text", _any_text),
        ("export", qcow2, "_join", _as_one),
        ("export", Note, "decode", _any_note),
        ("moves", migration, "_refuse_unproven", _believed),
        ("moves", mailbox, "is_digest", _believed),
        ("open", "fvdfs.image.loading", "pread_exactly", _all_at_once),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_targets_notice(target: str, where: object, name: str, wrong: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with this instead does not pass."""
    if isinstance(where, str):
        where = importlib.import_module(where)
    monkeypatch.setattr(where, name, wrong)
    run: Callable[[bytes], bool] = TARGETS[target]

    def noticed(data: bytes) -> bool:
        try:
            run(data)
        except Exception:
            return True
        return False

    assert any(noticed(data) for data in [*inputs(target), *seeds(target, 1)])


def test_same_bytes_make_the_same_input() -> None:
    for target, run in TARGETS.items():
        results = [[run(data) for data in inputs(target)] for _ in range(2)]
        assert results[0] == results[1]


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs the extra fuzz")
def test_the_fuzzer_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--target", "header", "--runs", "3000", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    words = next(line for line in done.stdout.splitlines() if line.startswith("header ")).split()
    assert int(words[1]) >= 3000
    assert words[-1] == "ok"
    assert list(tmp_path.iterdir()) == []
