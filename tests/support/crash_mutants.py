"""Mutants of the code that orders what becomes durable, for a test of the crash simulations themselves.

A simulation that finds nothing may be blind. So the functions that matter are changed, one small change
at a time, and each change must make some simulation fail:

    without   a flush, or what reports that a commit has to cover something, is left out
    swapped   two neighbours among the statements of a block that wait for something durable change places
    changed   a piece of the function's text, one of `CHANGED`, is replaced

A mutant is made from the syntax tree of its module, or from its text; of the compiled module only the code of the one
function is taken, and put into the function of the running program for as long as the simulations run.
"""

from __future__ import annotations

import ast
import contextlib
import cProfile
import importlib
import inspect
import itertools
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from support.crash import SCENARIOS, SUBJECTS, Counts, Effort, Simulation, quiet

MODULES = (
    "fvdfs.store.base",
    "fvdfs.image.commit",
    "fvdfs.image.image",
    "fvdfs.image.core",
    "fvdfs.image.writing",
    "fvdfs.image.resizing",
    "fvdfs.image.passing",
    "fvdfs.image.table_moving",
    "fvdfs.image.base_writing",
    "fvdfs.image.profiling",
    "fvdfs.alloc.chunked",
    "fvdfs.alloc.flat",
    "fvdfs.image.loading",
)
CHANGED = (
    ("fvdfs.image.writing", "Writes._replace", "in (plan.head, plan.tail)", "in (plan.tail,)"),
    ("fvdfs.image.writing", "Writes._replace", "in (plan.head, plan.tail)", "in (plan.head,)"),
    ("fvdfs.image.writing", "Writes._replace", "hold(plan.first, plan.end)", "hold(plan.first, plan.first)"),
    ("fvdfs.image.writing", "Writes._replace", "core.base_writer is not None", "False"),
    ("fvdfs.image.writing", "Writes._prepare_zeros", "if start < base_size", "if False"),
    ("fvdfs.image.writing", "Writes._prepare", "await core.committer.mark_unclean()", "pass"),
    ("fvdfs.image.writing", "Writes._places", "if where is not None", "if where"),
    ("fvdfs.image.writing", "Writes._places", "where + run_stop - run_start", "where + run_stop - run_start + 512"),
    ("fvdfs.cow.writethrough", "WriteThrough.zeroed", "self._written = True", "pass"),
    ("fvdfs.cow.writethrough", "WriteThrough.zeroed", "stop - start", "stop - start + 512"),
    ("fvdfs.cow.writethrough", "WriteBack.zeroed", "self.owe(first, end)", "pass"),
)
"""Module, function, and what of its text is replaced by what: slips in what zeroes ranges."""
FLUSHES = {"flush", "_flush"}
OF_STORE = {"append_by_steps", "Stepwise.append_stable"}  # what else that module has is not simulated
REPORTS = {"mark_committed", "pages_written", "data_written", "blocks_stored", "chunks_allocated", "chunks_moved"}
DURABLE = FLUSHES | {
    *("pwrite", "pwrite_pages", "zero", "resize", "append_stable", "append_by_steps"),
    *("_append", "_write_pages", "_write_header", "_commit", "commit", "checkpoint", "recover"),
    *("_clear_journal", "_clear_records", "change_header", "restore_header", "_shrink_header"),
    *("release_base", "write_profile", "close"),
    *("grow", "shrink", "_grow", "_grow_to", "_shrink", "_make_room", "_make_room_on_device", "prepare", "_prepare"),
    *("_store", "_store_data", "_store_zeros", "wrote", "begin_base_writing"),
    *("_punch", "zeroed", "change", "copy"),
    *("begin_move", "end_move", "write_header", "empty_journal", "flush_metadata", "copy_away", "_copy", "take_places"),
    *("give_back_places", "_clear_front", "_move_chunks", "_copy_table", "_use_copy"),
    *("begin_unseen_writes", "mark_unclean", "look_at_length", "make_whole", "settle", "recover_length"),
}
REPORTED = {"stored"}  # calls that wait for nothing, and must come after what is durable
FEW = 3  # scenarios that a mutant goes through which is known to survive
HANGS = 60  # seconds of one simulation, after which it counts as failed

PAIRS = (
    *(("cow-512", "writing"), ("compact-cow-512-4k", "writing"), ("cow-data-file", "writing")),
    *(("compact-cow-no-journal", "writing"), ("compact-cow-data-file", "writing"), ("plain", "writing")),
    *(("compact-4k-on-device", "writing"), ("compact-cow-512-4k-on-device", "writing")),
    *(("cow-512", "resizing"), ("compact-cow-data-file", "resizing"), ("cow-7680-on-device", "resizing")),
    *(("plain-on-device", "resizing"), ("compact-4k", "resizing"), ("compact-4k-on-device", "resizing")),
    *(("cow-no-journal", "resizing"), ("plain", "resizing"), ("cow-data-file-on-device", "resizing")),
    *(("cow-7680", "copying"), ("compact-cow-data-file", "copying"), ("cow-data-file", "copying")),
    *(
        ("cow-7680", "closing"),
        ("compact-cow-data-file", "closing"),
        ("plain", "leftovers"),
        ("compact-4k", "leftovers"),
    ),
    *(("cow-7680", "zeroing"), ("compact-4k", "zeroing"), ("plain-on-device", "zeroing")),
    *(("cow-7680", "punching"), ("compact-cow-512-4k", "punching"), ("cow-7680-on-device", "punching")),
    *(("compact-4k", "punching"), ("cow-data-file", "punching")),
    *(("cow-7680-writethrough", "writing to the base"), ("cow-512-writeback", "writing to the base")),
    *(("compact-cow-data-file", "recovering"), ("cow-7680", "recovering"), ("cow-no-journal", "copying")),
    *(("passed-through", "appending"), ("passed-through", "killing"), ("passed-through", "unused")),
    *(("plain", "killing"), ("compact-cow-data-file", "killing")),
    *(("compact-4k", "outgrowing"), ("compact-cow-data-file", "outgrowing"), ("compact-4k-on-device", "outgrowing")),
)
"""Subject and scenario of the simulations that the mutants run through."""
_OVER_BASE = (("cow-7680-writethrough", "writing to the base"), ("cow-512-writeback", "writing to the base"))
_OUTGROWING = (("compact-4k", "outgrowing"),)
_KILLING = (("passed-through", "killing"), ("compact-cow-data-file", "killing"))
_CLOSING = (("compact-cow-data-file", "closing"),)
_COPYING = (("cow-no-journal", "copying"), ("cow-data-file", "copying"))
_WRITING = (("compact-cow-data-file", "writing"),)
_PUNCHING = (("cow-data-file", "punching"),)
FIRST: dict[str, tuple[tuple[str, str], ...]] = {
    "writing: _replace": (("cow-7680-on-device", "punching"), *_PUNCHING, ("cow-512-writeback", "writing to the base")),
    "writing: _prepare_zeros": (("compact-cow-512-4k", "punching"),),
    "writing: _places": _PUNCHING,
    "writing: _write_past_gate": _WRITING,
    "writing: start": _COPYING,
    "writing: stored": _COPYING,
    "commit: _commit": (*_COPYING, *_WRITING),
    "commit: _write": (*_PUNCHING, *_WRITING),
    "commit: _write_pages": _CLOSING,
    "commit: release_base": (*_CLOSING, *_COPYING),
    "commit: write_profile": _COPYING,
    "commit: write_header": _OUTGROWING,
    "commit: move_table": _OUTGROWING,
    "commit: _write_moved": _OUTGROWING,
    "commit: recover": _KILLING,
    "commit: end_unseen_writes": _KILLING,
    "image: begin_writing": _KILLING,
    "image: stop_writing": _KILLING,
    "image: end_writing": _CLOSING,
    "image: fsync": _OVER_BASE,
}
"""By module and function, where to begin: what kills its mutants, though others are quicker."""


@dataclass(frozen=True)
class Mutant:
    """A function with another code."""

    name: str
    function: FunctionType
    code: CodeType

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The running program has it while the block runs."""
        original = self.function.__code__
        self.function.__code__ = self.code
        try:
            yield
        finally:
            self.function.__code__ = original


# --- making them ----------------------------------------------------------------------------------


def _awaits(statement: ast.stmt) -> set[str]:
    """What the statement waits for, by the last part of the name."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call):
            function = node.value.func
            found.add(function.attr if isinstance(function, ast.Attribute) else ast.unparse(function))
    return found


def _called(statement: ast.stmt) -> str:
    """The method that the statement is a call of, awaited or not; empty: none."""
    if not isinstance(statement, ast.Expr):
        return ""
    value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
    return value.func.attr if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) else ""


def _reports(statement: ast.stmt) -> bool:
    """Whether the statement notes that data was written, for the next commit."""
    return isinstance(statement, ast.Assign) and ast.unparse(statement).endswith("data_written = True")


def _short(statement: ast.stmt) -> str:
    """The statement's first line; of a compound one, what it waits for as well."""
    lines = ast.unparse(statement).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {', '.join(sorted(_awaits(statement) & DURABLE))}"


def _blocks(function: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _changes(function: ast.AST) -> Iterator[str]:
    """Change the tree in each way, one at a time; what was changed. The tree is as before at the end."""
    for block in _blocks(function):
        for at, statement in enumerate(block):
            if _called(statement) in FLUSHES | REPORTS or _reports(statement):
                block[at] = ast.copy_location(ast.Pass(), statement)
                yield f"without {_short(statement)}"
                block[at] = statement
        durable = [at for at, each in enumerate(block) if _awaits(each) & DURABLE or _called(each) in REPORTED]
        for a, b in itertools.pairwise(durable):
            block[a], block[b] = block[b], block[a]
            yield f"swapped {_short(block[b])} | {_short(block[a])}"
            block[a], block[b] = block[b], block[a]

    for node in ast.walk(function):
        if isinstance(node, ast.keyword) and node.arg == "flush_first" and not isinstance(node.value, ast.Constant):
            what, node.value = node.value, ast.copy_location(ast.Constant(False), node.value)
            yield f"without flush_first={ast.unparse(what)}"
            node.value = what


def _code(code: CodeType, name: str) -> CodeType:
    """The code of the function of that name inside the code of a module."""
    if code.co_qualname == name:
        return code
    for const in code.co_consts:
        if isinstance(const, CodeType) and (name == const.co_qualname or name.startswith(f"{const.co_qualname}.")):
            return _code(const, name)
    raise LookupError(name)


def _function(module: object, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = getattr(found, "fget", found)
    found = inspect.unwrap(found)
    assert isinstance(found, FunctionType)
    return found


def changed(changes: Sequence[tuple[str, str, str, str]]) -> Iterator[Mutant]:
    """The mutants of a table like `CHANGED`."""
    for module_name, function, old, new in changes:
        module = importlib.import_module(module_name)
        path = inspect.getsourcefile(module)
        assert path is not None
        whole, part = Path(path).read_text(), inspect.getsource(_function(module, function))
        assert whole.count(part) == 1
        assert part.count(old) == 1, f"{function}: {old}"
        code = _code(compile(whole.replace(part, part.replace(old, new)), path, "exec"), function)
        name = f"{module_name.rpartition('.')[2]}: {function.rpartition('.')[2]}: changed {old} | {new}"
        yield Mutant(name, _function(module, function), code)


def mutants() -> Iterator[Mutant]:
    """All of them, in the order of the source; names are unique."""
    yield from changed(CHANGED)
    names: Counter[str] = Counter()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        path = inspect.getsourcefile(module)
        assert path is not None
        tree = ast.parse(Path(path).read_text())
        functions = [("", node) for node in tree.body]
        functions += [(f"{c.name}.", node) for c in tree.body if isinstance(c, ast.ClassDef) for node in c.body]
        for prefix, node in functions:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            function = prefix + node.name
            if module_name == "fvdfs.store.base" and function not in OF_STORE:
                continue
            for change in _changes(node):
                name = f"{module_name.rpartition('.')[2]}: {function.rpartition('.')[2]}: {change}"
                names[name] += 1
                if names[name] > 1:
                    name += f" ({names[name]})"
                code = _code(compile(tree, path, "exec"), function)
                yield Mutant(name, _function(module, function), code)


# --- running them ---------------------------------------------------------------------------------


class Simulations:
    """The simulations that mutants run through: those that run the mutant's function.

    First the last killers of mutants of that function, or `FIRST`; the others follow by the time that they take.
    """

    def __init__(self, scratch: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
        self._subjects = {subject.name: subject for subject in SUBJECTS}
        self._left = scratch / "left"
        self._left.mkdir()
        self._files: dict[str, dict[str, bytes]] = {}
        for name in dict(pairs):
            built = scratch / name
            built.mkdir()
            self._files[name] = self._subjects[name].build(built)
        self._pairs = list(pairs)
        self._killers: dict[str, list[tuple[str, str]]] = {name: [*found] for name, found in FIRST.items()}
        self._good: set[tuple[str, str]] = set()
        """Those that have passed without a mutant."""
        self._runs: dict[tuple[str, str], set[CodeType]] = {}
        """The functions that each runs."""

    def look(self) -> None:
        """Find out which functions each runs, and how long it takes."""
        seconds = {}
        for pair in self._pairs:
            begun = time.process_time()
            with cProfile.Profile(builtins=False) as profile:
                self._run(*pair, QUICK)
            self._runs[pair] = {entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)}
            seconds[pair] = time.process_time() - begun
        self._pairs.sort(key=seconds.__getitem__)

    def kill(self, mutant: Mutant, *, few: bool = False) -> str:
        """Which simulation fails with the mutant, and how; empty: none. Without it, none may fail.

        With `few` it runs through one simulation only, the quickest, of the `FEW` quickest scenarios.
        """
        tried: set[str] = set()
        killers = self._killers.setdefault(":".join(mutant.name.split(":")[:2]), [])
        # The killers once more in the end: trio takes tasks in random order, in which a mutant may get through.
        for pair in self._pairs if few else [*dict.fromkeys([*killers, *self._pairs]), *killers, *killers]:
            if mutant.function.__code__ not in self._runs[pair] or (few and (pair[1] in tried or len(tried) == FEW)):
                continue
            tried.add(pair[1])
            if how := self._failure(mutant, pair):
                killers[:] = [pair, *(killer for killer in killers if killer != pair)]
                if pair not in self._good:
                    self._run(*pair)
                    self._good.add(pair)
                return f"{pair[0]}, {pair[1]}: {how}"
        return ""

    def _failure(self, mutant: Mutant, pair: tuple[str, str]) -> str:
        """How the simulation fails; empty: it does not."""
        with mutant.applied():
            try:
                self._run(*pair)
            except Exception as error:
                return _reason(error)
        return ""

    def _run(self, subject: str, scenario: str, effort: Effort | None = None) -> None:
        def sim_of() -> Simulation:
            return Simulation(self._subjects[subject], self._files[subject], self._left, effort or EFFORT, Counts())

        with quiet(), _limit(HANGS):
            SCENARIOS[scenario](sim_of)


EFFORT = Effort(states=12, second_cuts=0, kills=1)
QUICK = Effort(states=2, second_cuts=0, kills=4)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def hangs(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"


def main() -> None:
    """Print what becomes of each."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        simulations = Simulations(Path(scratch))
        simulations.look()
        for mutant in mutants():
            print(f"{mutant.name}\n    {simulations.kill(mutant) or 'SURVIVES'}", flush=True)


if __name__ == "__main__":
    main()
