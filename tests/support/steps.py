"""A process that is killed before one of the steps that it takes in a folder, and the order of these steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
