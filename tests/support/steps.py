"""A process that is killed before one of the steps that it takes in a folder, and the order of these steps.

`kills` tries some of the steps, chosen at random: FVDFS_STEPS sets how many, "all" has each of them tried, and
FVDFS_STEPS_SEED has others chosen.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST = os.environ.get("FVDFS_STEPS", "6")
SEED = os.environ.get("FVDFS_STEPS_SEED", "0")

CALLS = (
    "ftruncate",
    "pwrite",
    "pwritev",
    "fchown",
    "fchmod",
    "utime",
    "fsync",
    "fdatasync",
    "link",
    "rename",
    "unlink",
)
"""What changes a file or a folder, or makes it stable; by `os`."""
_REACHED, _ENDED, _FAILED = 9, 0, 1


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that ends at once before its `step`th call, from 1; False: it has fewer."""
    child = os.fork()
    if not child:
        try:
            _count(lambda _name, number: os._exit(_REACHED) if number == step else None)
            work()
        except BaseException:
            os._exit(_FAILED)
        os._exit(_ENDED)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code != _FAILED, "the work itself has failed"
    return code == _REACHED


def kills(folder: Path, work: Callable[[], object], *, at_least: int) -> Iterator[int]:
    """Kill the work before some of its steps, the first and the last among them; yields each time: the step.

    The files in the folder are put back as they were after each. The work has `at_least` so many steps.
    """
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def put_back() -> None:
        for path in set(folder.iterdir()) - set(before):
            path.unlink()
        for path, content in before.items():
            path.unlink(missing_ok=True)
            path.write_bytes(content)

    put_back()  # what was a hole is none any more, from the first run on
    count = _steps_of(work)
    put_back()
    assert count >= at_least, f"there are only {count} steps"
    for step in _chosen(count):
        if killed_before(step, work):
            yield step
        put_back()


def _steps_of(work: Callable[[], object]) -> int:
    """How many steps the work has, which is done by a process of its own."""
    read, write = os.pipe()
    count = 0

    def counted(_name: str, number: int) -> None:
        nonlocal count
        count = number

    def work_counted() -> None:
        _count(counted)
        work()
        os.write(write, b"%d" % count)

    assert not killed_before(0, work_counted)
    os.close(write)
    with open(read, "rb") as pipe:
        return int(pipe.read())


def _chosen(count: int) -> list[int]:
    """Some of the steps 1 to `count`, in order: the first, the last, and random ones."""
    most = count if MOST == "all" else max(2, int(MOST))
    if most >= count:
        return list(range(1, count + 1))
    return sorted({1, count, *random.Random(f"{SEED} {count}").sample(range(2, count), most - 2)})


def recorded(work: Callable[[], object]) -> list[str]:
    """The calls of the work, in order; of fsync, what is made stable: "fsync NAME"."""
    found: list[str] = []
    undo = _count(lambda name, _number: found.append(name))
    try:
        work()
    finally:
        undo()
    return found


def _count(tell: Callable[[str, int], object]) -> Callable[[], None]:
    """Have `tell` be told of each call before it is made: its name, and its number."""
    number = 0
    before = {name: getattr(os, name) for name in CALLS}

    def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal number
            number += 1
            what = name
            if name in ("fsync", "fdatasync"):
                what = f"{name} {Path(os.readlink(f'/proc/self/fd/{arguments[0]}')).name}"
            elif name in ("link", "rename", "unlink"):
                what = " ".join([name, *(os.path.basename(os.fsdecode(path)) for path in arguments)])
            tell(what, number)
            return call(*arguments, **more)

        return counted

    for name, call in before.items():
        setattr(os, name, told(name, call))

    def undo() -> None:
        for name, call in before.items():
            setattr(os, name, call)

    return undo
