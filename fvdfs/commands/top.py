"""`fvdfs top`: a live table of the disks of a mount that are open, on the terminal.

What it shows is decided in `rows.py`. The mount is asked in a thread: one that hangs must not keep the keys from
working.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import Resize
from textual.widgets import DataTable, Footer, Static
from textual.worker import get_current_worker

from fvdfs.commands import prefetch
from fvdfs.commands.map import bar_of, legend, read_map
from fvdfs.commands.rows import NAME, Column, Row, fitting, rows, shortened, total
from fvdfs.commands.status import status
from fvdfs.errors import FvdError, UsageError, printable
from fvdfs.mounts import refuse_dead

INTERVAL = 1.0  # seconds between two looks
IDLE_SHARE = 4  # the time between looks is at least so many times what a look takes
MAP_EVERY = 5.0  # seconds; a map takes longer than a status
_DUMB = ("dumb", "unknown")  # what TERM says of terminals without a cursor
_PADDING = 2  # columns that a cell of the table takes beside its text
HELP = """\
s, p, x    start, pause and stop copying the disk under the cursor from its base
o, r       order by the next column; the other way round
arrows     another disk; Page Up and Page Down, Ctrl+Home and Ctrl+End go further
local      what of it need not be read from its base
p99        99 of 100 reads and writes took no longer
q, Ctrl+C  end; ? ends this"""
_COLOURS = {"running": "green", "profile": "green", "paused": "yellow", "waiting": "yellow", "failed": "bold red"}


class Top(App[str]):
    """Ends with why it cannot go on; empty where the user ended it."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #total, #said, #map { height: auto; padding: 0 1; }
    #said { color: $text-warning; }
    #help { height: auto; padding: 0 1; display: none; }
    DataTable { height: 1fr; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("ctrl+c", "quit", show=False, priority=True),
        Binding("question_mark,h", "toggle_help", "Help", key_display="?"),
        Binding("s", "prefetch('start')", "Start"),
        Binding("p", "prefetch('pause')", "Pause"),
        Binding("x", "prefetch('stop')", "Stop"),
        Binding("o", "order", "Order"),
        Binding("r", "reverse", "Reverse"),
    ]

    def __init__(self, mountpoint: str) -> None:
        super().__init__()
        self._mountpoint = mountpoint
        self._before: tuple[float, dict[str, Any]] | None = None
        self._rows: list[Row] = []
        self._images = 0
        self._columns: list[tuple[Column, int]] = []
        self._order: Column = NAME
        self._reversed = False
        self._mapped: tuple[str, float] = ("", 0.0)

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static("Asking the mount …", id="total", markup=False)
            yield DataTable(cursor_type="row", zebra_stripes=True)
            yield Static(HELP, id="help", markup=False)
            yield Static("", id="map", markup=False)
            yield Static("", id="said", markup=False)
            yield Footer()

    def on_mount(self) -> None:
        self._look()

    # --- looking ----------------------------------------------------------------------------------

    @work(thread=True, exclusive=True)
    def _look(self) -> None:
        """Ask the mount again and again, until the program ends."""
        worker = get_current_worker()
        while not worker.is_cancelled:
            began = time.monotonic()
            try:
                found = status(self._mountpoint)
            except (FvdError, OSError) as error:
                self.call_from_thread(self.exit, str(error))
                return
            self.call_from_thread(self._take, began, found)
            self._draw_map_in_time()
            time.sleep(max(INTERVAL, IDLE_SHARE * (time.monotonic() - began)))

    def _take(self, now: float, found: dict[str, Any]) -> None:
        before, seconds = None, 0.0
        if self._before is not None:
            before, seconds = self._before[1], now - self._before[0]
        self._before = now, found
        self._rows, self._images = rows(before, found, seconds), len(found["images"])
        self._show()

    def _draw_map_in_time(self) -> None:
        name, now = self.call_from_thread(lambda: self._selected), time.monotonic()
        if not name or (name == self._mapped[0] and now < self._mapped[1] + MAP_EVERY):
            return
        try:
            text = bar_of(read_map(self._path(name)), max(1, self.size.width - 2))
            text.append("\n" + legend())
        except (FvdError, OSError) as error:
            text = Text(str(error))
        self._mapped = name, now
        self.call_from_thread(self.query_one("#map", Static).update, text)

    # --- showing ----------------------------------------------------------------------------------

    @property
    def _selected(self) -> str:
        """The file of the disk that the cursor is on; empty where there is none."""
        table = self.query_one(DataTable)
        if not table.is_valid_row_index(table.cursor_row):
            return ""
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value or ""

    def _path(self, name: str) -> str:
        return os.path.join(self._mountpoint, name)

    def _show(self) -> None:
        self.query_one("#total", Static).update(total(self._rows, self._images))
        table, selected = self.query_one(DataTable), self._selected
        columns = fitting(self.size.width - 2, [row.name for row in self._rows], _PADDING)
        if columns != self._columns:
            self._columns = columns
            table.clear(columns=True)
            for column, width in columns:
                table.add_column(self._title(column), width=width, key=column.title)
        top = table.scroll_y
        table.clear()
        for row in self._in_order():
            table.add_row(*(self._cell(row, column, width) for column, width in self._columns), key=row.file)
        if selected in table.rows:
            table.move_cursor(row=table.get_row_index(selected), scroll=False)
            table.scroll_to(y=top, animate=False)
        if not self._rows:
            self.query_one("#map", Static).update("")

    def _title(self, column: Column) -> str:
        mark = "" if column is not self._order else "▲" if (column is NAME) != self._reversed else "▼"
        return column.title + mark

    def _in_order(self) -> list[Row]:
        by_name = sorted(self._rows, key=NAME.key)
        return sorted(by_name, key=self._order.key, reverse=(self._order is not NAME) != self._reversed)

    def _cell(self, row: Row, column: Column, width: int) -> Text:
        style = _COLOURS.get(row.state, "") if column.title in ("", "state") else ""
        text = shortened(column.cell(row), width) if column is NAME else column.cell(row)
        return Text(
            text, style=style, justify="right" if column.at_right else "left", no_wrap=True, overflow="ellipsis"
        )

    def on_resize(self, event: Resize) -> None:
        self._mapped = ("", 0.0)  # it is as wide as the terminal
        if self._before is not None:
            self._show()

    # --- keys -------------------------------------------------------------------------------------

    def action_toggle_help(self) -> None:
        """Show what the keys do, and what the columns mean, or not."""
        shown = self.query_one("#help", Static)
        shown.display = not shown.display

    def action_order(self) -> None:
        """Order the rows by the column on the right of the present one."""
        shown = [column for column, _ in self._columns if column.title] or [NAME]
        at = shown.index(self._order) if self._order in shown else -1
        self._order, self._columns = shown[(at + 1) % len(shown)], []
        self._show()

    def action_reverse(self) -> None:
        self._reversed, self._columns = not self._reversed, []
        self._show()

    def action_prefetch(self, command: str) -> None:
        if name := self._selected:
            self._steer(command, name)

    @work(thread=True)
    def _steer(self, command: str, name: str) -> None:
        said = f"{name}: prefetching: {command}"
        try:
            prefetch.run(command, self._path(name))
        except (FvdError, OSError) as error:
            said = str(error)
        self.call_from_thread(self.query_one("#said", Static).update, printable(said))


def run(mountpoint: str) -> None:
    """Show it until the user or the mount ends it. Raises UsageError where it is no mount, or no terminal, OSError."""
    refuse_dead(mountpoint)
    status(mountpoint)
    if not all(os.isatty(descriptor) for descriptor in (0, 1, 2)):  # it would read keys, and draw, without end
        raise UsageError("top needs a terminal; fvdfs status --watch MOUNTPOINT shows the disks without one")
    if (kind := os.environ.get("TERM", "").lower()) in _DUMB:
        other = "fvdfs status --watch MOUNTPOINT needs none"
        raise UsageError(f"top needs a terminal with a cursor, and TERM={kind}; {other}")
    if why := Top(mountpoint).run():
        print(f"fvdfs: {why}")
