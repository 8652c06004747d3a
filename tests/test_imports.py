"""The direction of imports: the pure core knows no I/O, the engine knows no FUSE, nothing knows the tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fvdfs"
TESTS = ROOT / "tests"

DRAWING = re.compile(r"^```\n(.+?)^```", re.MULTILINE | re.DOTALL)


def floors_drawn(page: str) -> list[list[str]]:
    """The rooms and single modules on each floor of the first drawing of a page, from the ground up."""
    drawing = DRAWING.search(page)
    assert drawing is not None
    floors: list[list[str]] = []
    for line in drawing[1].splitlines():
        if "─" in line:
            floors.append([])
        else:
            floors[-1] += line.split("│")[1].split()
    return floors[-2::-1]


ROOMS = floors_drawn((ROOT / "docs/architecture.md").read_text())
"""Imports lead down, or within a floor in one direction."""

IMPURE = {
    "errors": set[str](),
    "sizes": set[str](),
    "counters": set[str](),
    "xattrs": set[str](),
    "format": set[str](),
    "alloc": {"chunked", "flat", "growth"},
    "cow": {"extents", "fetching", "locks", "writethrough"},
    "check": {"check", "examine", "layers", "repair"},
    "prefetch": {"order", "prefetcher", "pressure", "scheduler"},
    "store": {
        *("base", "devices", "filelock", "flushing", "host", "mountinfo", "paths", "placing", "uring", "worker"),
        *("connecting", "lending", "nbd_client", "nbd_giver", "nbd_reader", "nbd_server", "nbd_tls"),
        *("outage", "source", "web_reader"),
        *("qemu_daemon", "qemu_files", "qemu_store", "qemu_supervisor"),
    },
}
"""The rooms of the core, each with its modules that wait or do I/O. The others are pure: bytes in, decisions out."""

PURE_LIBRARIES = {
    *("__future__", "array", "base64", "binascii", "bitarray", "collections", "configparser", "contextlib"),
    *("dataclasses", "difflib", "enum", "errno", "functools", "hashlib", "hmac", "itertools", "json", "math", "random"),
    *("re", "statistics", "struct", "sys"),
    *("typing", "urllib.parse", "uuid", "zlib"),
}
"""What a pure module may import beside others; none of it waits, nor asks the system for anything."""

# What these may import of fvdfs, where that is less than everything below them.
LOW = {
    "fvdfs.errors": set[str](),
    "fvdfs.cow.locks": set[str](),
    "fvdfs.store.filelock": {"fvdfs.errors"},
    "fvdfs.store.host": {
        *("fvdfs.store.base", "fvdfs.store.filelock", "fvdfs.store.flushing", "fvdfs.store.uring"),
        *("fvdfs.store.worker", "fvdfs.errors"),
    },
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}
PURE = {
    module
    for module in set(MODULES) - PACKAGES
    for _, name, *rest in [module.split(".")]
    if name in IMPURE and not IMPURE[name].intersection(rest)
}


def imported(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """The names that a module's source imports, anywhere in it, as absolute dotted names.

    `from a import b` gives "a.b": whether b is a module or a name in a, nobody can tell from here.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                origin = ".".join([*kept, origin] if origin else kept)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1]


def imports_of(module: str) -> list[str]:
    return list(imported(MODULES[module].read_text(), module, is_package=module in PACKAGES))


def within(name: str, module: str) -> bool:
    """Whether an imported name is the module, or something in it."""
    return name == module or name.startswith(f"{module}.")


def modules_imported(module: str) -> set[str]:
    """The modules of fvdfs that a module imports; packages count where no module in them is meant."""
    found = set()
    for name in imports_of(module):
        while within(name, "fvdfs") and name not in MODULES:
            name = name.rpartition(".")[0]
        if name in MODULES:
            found.add(name)
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os", ["os"]),
        ("import os.path as p, trio", ["os.path", "trio"]),
        ("from os import path", ["os.path"]),
        ("def f():\n    from trio import Event, run", ["trio.Event", "trio.run"]),
        ("if x:\n    from fvdfs.store import host", ["fvdfs.store.host"]),
        ("from . import locks", ["fvdfs.cow.locks"]),
        ("from .locks import RangeLock", ["fvdfs.cow.locks.RangeLock"]),
        ("from ..store import host", ["fvdfs.store.host"]),
        ("from ..store.base import Store", ["fvdfs.store.base.Store"]),
    ],
)
def test_imports_are_found(source: str, names: list[str]) -> None:
    assert list(imported(source, "fvdfs.cow.bitmap")) == names


def test_relative_imports_of_a_package_are_found() -> None:
    assert list(imported("from . import bitmap", "fvdfs.cow", is_package=True)) == ["fvdfs.cow.bitmap"]
    assert list(imported("from ..ops import inodes", "fvdfs.cow", is_package=True)) == ["fvdfs.ops.inodes"]


def test_names_within_a_module() -> None:
    assert within("os", "os")
    assert within("os.path", "os")
    assert not within("osmium", "os")


def impurities(module: str) -> list[str]:
    """The imports that a pure module may not have."""
    allowed = PURE_LIBRARIES | PURE
    return [name for name in imports_of(module) if not any(within(name, library) for library in allowed)]


@pytest.mark.parametrize("module", sorted(PURE))
def test_pure_core_does_no_io(module: str) -> None:
    assert impurities(module) == []


def test_what_is_pure_is_not_called_impure() -> None:
    named = {f"fvdfs.{name}.{module}" for name, modules in IMPURE.items() for module in modules}
    assert [module for module in named if not impurities(module)] == []


@pytest.mark.parametrize("module", sorted(LOW))
def test_bottom_of_the_package_stays_there(module: str) -> None:
    assert modules_imported(module) <= LOW[module]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_fuse_is_known_only_in_ops(module: str) -> None:
    if not within(module, "fvdfs.ops"):
        assert [n for n in imports_of(module) if within(n, "pyfuse3")] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_ops_is_imported_only_by_the_mount_command(module: str) -> None:
    if module != "fvdfs.commands.mount" and not within(module, "fvdfs.ops"):
        assert [n for n in imports_of(module) if within(n, "fvdfs.ops")] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_package_does_not_import_tests(module: str) -> None:
    helpers = {path.stem for path in TESTS.iterdir()} | {"tests", "pytest", "hypothesis"}
    assert [n for n in imports_of(module) if any(within(n, helper) for helper in helpers)] == []


def test_no_test_imports_another() -> None:
    """What tests share lies in tests/support."""
    for path in TESTS.rglob("*.py"):
        parts = {part for name in imported(path.read_text(), "tests") for part in name.split(".")}
        assert [part for part in parts if part.startswith("test_") or part == "conftest"] == [], path


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"fvdfs"}))
def test_imports_lead_down(module: str) -> None:
    floors = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
    climbing = [name for name in modules_imported(module) - {"fvdfs"} if floors[room(name)] > floors[room(module)]]
    assert climbing == []


def test_rooms_are_no_circle() -> None:
    """Of two rooms, one knows the other, or neither."""
    graph: dict[str, set[str]] = {}
    for module in set(MODULES) - {"fvdfs"}:
        others = {room(name) for name in modules_imported(module) - {"fvdfs"}} - {room(module)}
        graph.setdefault(room(module), set()).update(others)
    TopologicalSorter(graph).prepare()


def test_no_cycles() -> None:
    """Imports inside functions count as well: a cycle is a wrong cut, whether Python minds or not."""
    TopologicalSorter({module: modules_imported(module) for module in MODULES}).prepare()


def test_every_room_is_drawn() -> None:
    assert sorted(name for floor in ROOMS for name in floor) == sorted({room(m) for m in set(MODULES) - {"fvdfs"}})


def test_every_module_that_this_file_names_exists() -> None:
    assert set(MODULES) >= set(LOW)
    assert {room(module) for module in PURE} == set(IMPURE)


def test_commands_run_event_loops_in_one_way() -> None:
    """By `daemon.run_loop`, which is safe from Ctrl-C; a mount has signals of its own."""
    callers = {module for module, path in MODULES.items() if "trio.run(" in path.read_text()}
    assert callers == {"fvdfs.daemon", "fvdfs.ops.mount"}
