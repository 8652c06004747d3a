"""Runs a command again and again, a signal at another line of it each time.

    python -m support.interrupts SIGNAL TIMES SEED FUNCTION WORDS...

A first run is left alone, and notes the lines that the main thread passes. The signal then comes so many TIMES, each
in a run of its own: at lines that differ, chosen at random, and one of the times that each is passed; at any time
when there are no more. FUNCTION: only lines of functions of this name, and below them, count (empty: all).
Each run is a process of its own in the working directory, in which the files are then put back as they were. Prints, as
JSON, a list of how they ended: exit code, what was said, the files that were new or other ones, "no NAME" for those
missing. Runs that ended before the signal are left out, and lines behind the end of the command: what is done is done.
What the command imports is there before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
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
import fvdfs.daemon

LONGEST = 20  # seconds of a run
DEFECT = 99  # the exit code where an exception passes all
REACHED = b"reached"

Ended = tuple[int, str, list[str]]


def interrupted(words: list[str], number: int, at: int, function: str, output: int, notes: int) -> NoReturn:
    """Be the command, which the signal meets at this line: as it does, a note says so.

    Without a line (0) the notes are, as JSON, how many lines there were, and a number of each that differs.
    """
    lines = 0
    is_over = False
    with_streams = fvdfs.daemon.with_streams
    passed: dict[tuple[CodeType, int], tuple[int, int]] = {}
    chance = random.Random(words[0])

    def command(run: Callable[[], int]) -> int:
        nonlocal is_over
        code = with_streams(run)
        is_over = True
        return code

    def count(frame: FrameType) -> None:
        nonlocal lines
        if is_over:
            return
        lines += 1
        if lines == at:
            sys.settrace(None)
            os.write(notes, REACHED)
            signal.raise_signal(number)
        elif not at:
            times, one = passed.get(place := (frame.f_code, frame.f_lineno), (0, 0))
            passed[place] = times + 1, lines if chance.random() * (times + 1) < 1 else one

    def inside(frame: FrameType, _event: str, _arg: Any) -> Any:
        count(frame)
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
    fvdfs.daemon.with_streams = command
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
        sys.settrace(None)
        sys.stdout.flush()
        if not at:
            with open(notes, "w", closefd=False) as file:
                json.dump([lines, [one for _, one in passed.values()]], file)
        os._exit(code)


def run(words: list[str], number: int, at: int, function: str, before: dict[str, bytes]) -> tuple[Ended, bytes]:
    """How the command ended, and its notes; the files are as they were `before`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as notes:
        child = os.fork()
        if not child:
            interrupted(words, number, at, function, output.fileno(), notes.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        notes.seek(0)
        said, noted = output.read().decode(), notes.read()
    left = sorted(path.name for path in Path().iterdir() if before.get(path.name) != path.read_bytes())
    for name in left:
        Path(name).unlink()
    for name, content in before.items():
        if not Path(name).exists():
            Path(name).write_bytes(content)
            left += [] if name in left else [f"no {name}"]
    return (code, said, left), noted


def runs(words: list[str], number: int, times: int, seed: str, function: str) -> Iterator[Ended]:
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    (code, said, _), noted = run(words, number, 0, function, before)
    assert code == 0, said
    lines, places = json.loads(noted)
    chance = random.Random(seed)
    moments = chance.sample(places, min(times, len(places)))
    moments += [chance.randint(1, lines) for _ in range(times - len(moments))]
    parent = os.getppid()
    for at in moments:
        ended, noted = run(words, number, at, function, before)
        if noted == REACHED or ended[0] != 0:
            yield ended
        if os.getppid() != parent:
            return


if __name__ == "__main__":
    name, times, seed, function, *words = sys.argv[1:]
    print(json.dumps(list(runs(words, signal.Signals[name], int(times), seed, function))))
