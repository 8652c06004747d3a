"""What commands show on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def plain_console(width: int | None = None) -> Console:
    """A console that takes no name for markup. `width`: columns; None: the terminal's."""
    from rich.console import Console

    return Console(width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal for work that tells bytes done and bytes in all; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
