"""What `--json` prints is what docs/json.md says: one value, these fields, of these types, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fvdfs import cli
from fvdfs.format.header import Header
from support.mounts import MIB, Mount, fvdfs, mounted, must

PAGE = (Path(__file__).parents[2] / "docs/json.md").read_text()
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclasses.dataclass
class Field:
    types: list[str]
    is_optional: bool


def documented(command: str) -> dict[str, Field]:
    section = PAGE.partition(f"\n## fvdfs {command}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\*?)`(.+?)`\*? \| (.+?) \|", section, re.MULTILINE)
    return {name: Field(types.split(" or "), bool(star)) for star, name, types in rows}


def flat(value: Any, known: dict[str, Field], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a value, by the names of the page; objects of which the page tells no fields have none."""
    if path and path != "[]":
        yield path, value
    if isinstance(value, dict) and (not path or any(name.startswith(f"{path}.") for name in known)):
        for name, inner in value.items():
            yield from flat(inner, known, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(name.startswith(f"{path}[]") for name in known):
        for inner in value:
            assert isinstance(inner, dict)
            for name, each in inner.items():
                yield from flat(each, known, f"{path}[].{name}")


def judge(command: str, value: Any) -> None:
    known = documented(command)
    header = {field.name for field in dataclasses.fields(Header)} if command == "info" else set()
    found = [(name, each) for name, each in flat(value, known) if name not in header]
    assert found
    assert {name for name, _ in found} - set(known) == set(), "not documented"
    for name, each in found:
        if "any" not in known[name].types:
            assert any(type(each) in TYPES[kind] for kind in known[name].types), f"{name} is {each!r}"
    needed = {name for name, field in known.items() if not field.is_optional}
    assert needed - {name for name, _ in found} - {name for name in known if "[]." in name and not value} == set()


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    folder = tmp_path_factory.mktemp("json") / "images"
    folder.mkdir()
    (folder / "base.raw").write_bytes(os.urandom(MIB) + bytes(MIB))
    must("create", folder / "vm.fvd", "-b", "base.raw", "-F", "raw", "--compact", "--chunk-size", "64K")
    must("profile", "record", folder / "vm.fvd")
    with mounted(folder) as recording:
        recording.raw("vm").read_bytes()
        with open(recording.raw("vm"), "r+b") as disk:
            disk.write(b"x" * 65536)
    must("create", folder / "flat.fvd", "-b", "base.raw", "-F", "raw")
    must("snapshot", folder / "flat.fvd", "monday")
    with mounted(folder) as writing, open(writing.raw("flat"), "r+b") as disk:
        disk.write(b"y" * 65536)
    must("export", folder / "flat.fvd", "--since", "monday", folder.parent / "export.fvd")
    damaged = bytearray((folder / "vm.fvd").read_bytes())
    damaged[8:16] = b"\xff" * 8
    (folder / "bad.fvd").write_bytes(damaged)
    with mounted(folder) as found, open(found.raw("flat"), "rb"):
        yield found


def test_all_commands_with_json_are_documented() -> None:
    with_json = {
        name
        for name, command in cli._commands(cli._parser()).items()
        if any("--json" in action.option_strings for action in command._actions)
    }
    assert set(re.findall(r"^## fvdfs (\w+)$", PAGE, re.MULTILINE)) == with_json


REPORTS = [
    "info vm.fvd",
    "info flat.fvd",
    "info ../export.fvd",
    "check vm.fvd",
    "check bad.fvd",
    "status MOUNT",
    "status MOUNT/vm.raw",
    "map vm.fvd",
    "map MOUNT/flat.raw",
    "diff vm.fvd",
    "diff MOUNT/flat.raw --since monday",
    "compare vm.fvd base.raw",
    "compare vm.fvd vm.fvd",
    "measure vm.fvd",
    "measure base.raw -O raw",
    "snapshots .",
    "profile show vm.fvd",
    "doctor",
]


@pytest.mark.parametrize("line", REPORTS)
def test_reports(mount: Mount, line: str) -> None:
    command, *words = line.replace("MOUNT", str(mount.point)).split()
    done = fvdfs(command, *words, "--json", cwd=mount.folder)
    assert done.err == ""
    found = {"check bad.fvd": 2, "compare vm.fvd base.raw": 1}
    assert done.code == found.get(line, 0) or command == "doctor"  # which may find that something is missing here
    judge(command, json.loads(done.out))


@pytest.mark.parametrize("line", [line for line in REPORTS if "." in line])
def test_errors_are_no_reports(mount: Mount, line: str) -> None:
    command, *words = line.replace("MOUNT", str(mount.point)).split()
    missing = [re.sub(r"\w+(@\w+)?\.(fvd|raw)$|^\.$", "nosuch.fvd", word) for word in words]
    done = fvdfs(command, *missing, "--json", cwd=mount.folder)
    assert (done.code, done.out) == (1 if command == "check" else 2, "")
    assert re.fullmatch("fvdfs: .+\n", done.err)
