"""Runs a command again and again, a signal at another line of it each time.

    python -m support.interrupts SIGNAL FIRST STEP FUNCTION WORDS...

The signal is raised at the FIRST line that the main thread passes, in the next run STEP lines later, and so on, until
the command ends before that. FUNCTION: only lines of functions of this name, and below them, count (empty: all).
Each run is a process of its own in the working directory, in which the files are then put back as they were. Prints, as
JSON, a list of how they ended: exit code, what was said, the files that were new or other ones, "no NAME" for those
missing. What the command imports
is there before.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import fvdfs.check.check
import fvdfs.cli
import fvdfs.commands.amend
import fvdfs.commands.check
import fvdfs.commands.clone
import fvdfs.commands.compare
import fvdfs.commands.convert
import fvdfs.commands.diff
import fvdfs.commands.export
import fvdfs.commands.info
import fvdfs.commands.layers
import fvdfs.commands.map
import fvdfs.commands.measure
import fvdfs.commands.profile
import fvdfs.commands.rebase
import fvdfs.commands.restore
import fvdfs.commands.snapshot

LONGEST = 20  # seconds of a run
DEFECT = 99  # the exit code where an exception passes all


def interrupted(words: list[str], number: int, at: int, function: str, output: int) -> NoReturn:
    """Be the command, which the signal meets at this line."""
    lines = 0

    def count() -> None:
        nonlocal lines
        lines += 1
        if lines == at:
            signal.raise_signal(number)

    def inside(_frame: FrameType, _event: str, _arg: Any) -> Any:
        count()
        return inside

    def called(frame: FrameType, _event: str, _arg: Any) -> Any:
        if not function:
            return inside
        above: FrameType | None = frame
        while above is not None and above.f_code.co_name != function:
            above = above.f_back
        return inside if above is not None else None

    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["fvdfs", *words]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.alarm(LONGEST)
    sys.settrace(called)
    code = DEFECT
    try:
        fvdfs.cli.entry()
    except SystemExit as end:
        sys.settrace(None)
        code = int(end.code or 0)
    except BaseException:
        sys.settrace(None)
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def runs(words: list[str], number: int, first: int, step: int, function: str) -> Iterator[tuple[int, str, list[str]]]:
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    at, parent = first, os.getppid()
    while os.getppid() == parent:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if not child:
                interrupted(words, number, at, function, output.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            said = output.read().decode()
        left = sorted(path.name for path in Path().iterdir() if before.get(path.name) != path.read_bytes())
        for name in left:
            Path(name).unlink()
        for name, content in before.items():
            if not Path(name).exists():
                Path(name).write_bytes(content)
                left += [] if name in left else [f"no {name}"]
        yield code, said, left
        if code == 0:
            return
        at += step


if __name__ == "__main__":
    name, first, step, function, *words = sys.argv[1:]
    print(json.dumps(list(runs(words, signal.Signals[name], int(first), int(step), function))))
