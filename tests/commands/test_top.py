"""What `top` and `status --watch` show fits into the terminal, whatever its width, the names and how many there are."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from fvdfs.commands import rows
from fvdfs.commands.top import Top
from fvdfs.counters import BOUNDS, Counters
from support.mounts import FVDFS, MIB, Mount, fvdfs, mounted, must

LONG = "a-machine-whose-name-nobody-can-read-on-one-line-of-a-terminal"
Look = Callable[[Pilot[str]], Awaitable[None]]


# --- what fits --------------------------------------------------------------------------------------


@given(st.integers(20, 300), st.lists(st.text("abc-1", min_size=1, max_size=80), max_size=4), st.integers(1, 2))
def test_columns_are_not_wider_than_the_terminal(width: int, names: list[str], padding: int) -> None:
    found = rows.fitting(width, names, padding)
    assert found[0][0] is rows.NAME
    assert sum(size + padding for _, size in found) <= width
    assert all(size >= column.width for column, size in found)


def test_what_is_worth_most_is_shown_first() -> None:
    titles = {width: [column.title for column, _ in rows.fitting(width, [LONG], 2)] for width in (40, 80, 200)}
    assert titles[40] == ["disk", "local", "state"]
    assert titles[80] == ["disk", "local", "state", "left", "reads/s", "writes/s", "p99"]
    assert titles[200][-1] == "why"
    assert rows.fitting(120, [LONG], 1)[-1][0] is rows.WHY
    assert rows.fitting(200, [LONG], 2)[0][1] == len(LONG)


@given(st.text("abcd", max_size=60), st.integers(0, 70))
def test_a_shortened_name_keeps_both_ends(name: str, width: int) -> None:
    short = rows.shortened(name, width)
    assert len(short) == min(len(name), width)
    if 3 <= width < len(name):
        begin, end = short.split("…")
        assert begin
        assert end
        assert name.startswith(begin)
        assert name.endswith(end)


def test_numbers_in_names_count() -> None:
    names = ["vm-10", "vm-2", "VM-1", "10", "9", "vm-2b"]
    assert sorted(names, key=rows.natural) == ["9", "10", "VM-1", "vm-2", "vm-2b", "vm-10"]


@pytest.mark.parametrize(
    ("share", "shown"), [(0, "    "), (0.5, "██  "), (0.99, "███▉"), (0.9999, "███▉"), (1, "████"), (0.01, "    ")]
)
def test_a_bar_is_full_only_where_all_is_local(share: float, shown: str) -> None:
    assert rows.bar(share, 4) == shown


@given(st.floats(0, 1e15), st.integers(0, 1 << 62), st.sampled_from([*BOUNDS, math.inf, None]), st.integers(0, 10**6))
def test_cells_are_no_wider_than_their_columns(number: float, size: int, seconds: float | None, left: int) -> None:
    row = rows.Row("f", "n", size, 0.5, "running", number, left, number, number, number, seconds)
    for column in (rows.SIZE, rows.LOCAL, rows.SHARE, rows.STATE, rows.COPIED, rows.LEFT):
        assert len(column.cell(row)) <= column.width
    for column in (rows.READS, rows.WRITES, rows.MOVED, rows.SLOWEST):
        assert len(column.cell(row)) <= column.width


def _status(requests: dict[str, Any]) -> dict[str, Any]:
    return {"images": [{"name": "vm.raw", "open": True, "state": "off", "requests": requests}]}


def test_rates_are_those_between_two_looks() -> None:
    counters = Counters()
    for _ in range(10):
        counters.answered("read", 4096, 10_000)
    before = _status(counters.status())
    for _ in range(20):
        counters.answered("read", 4096, 1_000_000)
    counters.answered("write", 512, 1000)
    (row,) = rows.rows(before, _status(counters.status()), 2.0)
    assert (row.reads, row.writes, row.moved) == (10, 0.5, 20 * 4096 / 2 + 256)
    assert row.slowest is not None
    assert 0.001 <= row.slowest <= 0.002
    (first,) = rows.rows(None, before, 0.0)
    assert (first.reads, first.slowest) == (0, None)
    (restarted,) = rows.rows(_status(counters.status()), before, 2.0)
    assert restarted.reads == 0


@given(
    st.lists(st.tuples(*[st.text("ab1 -", max_size=30)] * 8), max_size=5),
    st.sampled_from([20, 40, 80, 200, None]),
)
def test_the_table_of_status_fits(cells: list[tuple[str, ...]], width: int | None) -> None:
    cells = [(f"disk-{number}-{row[0]}", row[1][:8], "12.3%", row[3][:9], *row[4:]) for number, row in enumerate(cells)]
    cells = [(*row[:4], row[4][:10], row[5][:8], *row[6:]) for row in cells]
    lines = list(rows.laid_out(cells, width))
    if width is None:
        assert len(lines) == 1 + len(cells)
    elif width >= 40:
        assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    for row in cells:
        assert not row[6].split() or all(word in text for word in row[6].split())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_status_on_a_terminal(tmp_path: Path, folder: Path, width: int) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / f"{LONG}.fvd", "4M", "-b", "base.raw", "-F", "raw")
    with mounted(folder) as mount:
        (folder / "base.raw").unlink()
        with contextlib.suppress(OSError):
            mount.raw(LONG).read_bytes()
        command = f"unset COLUMNS; stty cols {width}; {' '.join(FVDFS)} status {mount.point}"
        done = subprocess.run(
            ["script", "-qec", command, "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
        assert [line for line in lines if len(line) > width] == []
        assert "could not be opened at" in " ".join(done.stdout.split())
        assert lines[0].split()[:2] == ["disk", "size"]


def test_what_is_not_being_copied_has_no_time_left() -> None:
    image = {"name": "vm.raw", "open": True, "rate": 5, "eta": 60}
    states = ("running", "paused", "waiting")
    shown = [rows.rows(None, {"images": [image | {"state": state}]}, 0)[0] for state in states]
    assert [(row.copied, row.left) for row in shown] == [(5, 60), (0, None), (0, None)]


# --- on a terminal ----------------------------------------------------------------------------------


@contextlib.contextmanager
def disks(folder: Path, names: list[str]) -> Iterator[Mount]:
    """A mount with these disks, which are open."""
    (folder / "template.raw").write_bytes(os.urandom(MIB))
    must("clone", folder / "template.raw", *names, "--into", folder, "-F", "raw")
    with mounted(folder) as mount, contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(open(mount.raw(name), "r+b"))
        yield mount


def top(mount: Mount, size: tuple[int, int], look: Look) -> None:
    """Run it on a terminal of this size; `look` once it has shown what there is."""

    async def run() -> None:
        app = Top(str(mount.point))
        async with app.run_test(size=size) as pilot:
            while "Asking" in str(app.query_one("#total", Static).content):
                await pilot.pause(0.05)
            await look(pilot)

    asyncio.run(run())


def shown(pilot: Pilot[str]) -> list[str]:
    """The first column."""
    table = pilot.app.query_one(DataTable)
    return [str(table.get_row_at(at)[0]) for at in range(table.row_count)]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_disks_are_listed_in_any_width(folder: Path, width: int) -> None:
    async def look(pilot: Pilot[str]) -> None:
        names = shown(pilot)
        assert names[1:] == ["vm-2", "vm-10"]
        assert names[0].startswith("a-")
        assert names[0].endswith("l")
        assert (names[0] == LONG) == (width == 200)
        table = pilot.app.query_one(DataTable)
        assert table.virtual_size.width <= width
        await pilot.press("down", "o", "r")
        assert len(shown(pilot)) == 3

    with disks(folder, ["vm-10", "vm-2", LONG]) as mount:
        top(mount, (width, 20), look)


def test_keys_steer_prefetching_of_the_disk_under_the_cursor(folder: Path) -> None:
    async def look(pilot: Pilot[str]) -> None:
        await pilot.press("down", "s")
        while not str(pilot.app.query_one("#said", Static).content):
            await pilot.pause(0.05)
        while mount.status("vm-2")["state"] != "done":
            await pilot.pause(0.05)
        assert mount.status("vm-1")["state"] == "waiting"

    with disks(folder, ["vm-1", "vm-2"]) as mount:
        for name in ("vm-1", "vm-2"):
            assert mount.status(name)["state"] in ("waiting", "off")
        top(mount, (100, 20), look)


def test_three_hundred_disks_can_be_scrolled(folder: Path) -> None:
    async def look(pilot: Pilot[str]) -> None:
        table = pilot.app.query_one(DataTable)
        assert table.row_count == 300
        await pilot.press("ctrl+end")
        assert shown(pilot)[-1] == "vm-0300"

    with disks(folder, [f"vm-{number:04}" for number in range(1, 301)]) as mount:
        top(mount, (80, 20), look)


@pytest.mark.parametrize("width", [40, 80])
def test_help_comes_and_goes_and_ctrl_c_ends(folder: Path, width: int) -> None:
    async def look(pilot: Pilot[str]) -> None:
        shown = pilot.app.query_one("#help", Static)
        for key, is_shown in (("question_mark", True), ("h", False), ("h", True)):
            await pilot.press(key)
            await pilot.pause()
            assert (shown.display, shown.size.height > 5) == (is_shown, is_shown)
        assert pilot.app.return_code is None
        await pilot.press("ctrl+c")
        assert pilot.app.return_code == 0

    with disks(folder, ["vm"]) as mount:
        top(mount, (width, 24), look)


def test_that_nothing_is_open_is_said_in_words(folder: Path) -> None:
    async def look(pilot: Pilot[str]) -> None:
        text = str(pilot.app.query_one("#total", Static).content)
        assert text.startswith("No disk is open of 1")
        await pilot.press("s", "o", "r")  # which have nothing to do

    with disks(folder, ["vm"]) as mount:
        pass
    mount.mount()
    try:
        top(mount, (80, 20), look)
    finally:
        mount.umount()


def test_it_ends_where_there_is_no_mount(tmp_path: Path) -> None:
    done = fvdfs("top", tmp_path)
    assert (done.code, done.err) == (2, f"fvdfs: {tmp_path}: fvdfs is not mounted there\n")


def test_it_ends_where_there_is_no_terminal(folder: Path) -> None:
    with mounted(folder) as mount:
        done = fvdfs("top", mount.point)
        assert (done.code, done.out) == (2, "")
        assert done.err == "fvdfs: top needs a terminal; fvdfs status --watch MOUNTPOINT shows the disks without one\n"
        for ends in ("</dev/null", "2>/dev/null", "| cat"):
            command = f"timeout 60 {' '.join(FVDFS)} top {mount.point} {ends}"
            done_there = subprocess.run(
                ["script", "-qec", f"bash -o pipefail -c '{command}'", "/dev/null"],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            assert done_there.returncode == 2, (ends, done_there.stdout)


def test_watch_tells_the_same_to_a_pipe(folder: Path) -> None:
    with disks(folder, ["vm-10", "vm-2", LONG]) as mount:
        watch = subprocess.Popen(
            [*FVDFS, "status", "--watch", mount.point], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert watch.stdout is not None
        lines = [watch.stdout.readline() for _ in range(10)]
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate(timeout=60)
        assert (watch.returncode, err) == (130, "")
    assert lines[0].startswith("3 of 3 disks open")
    assert re.match(r"disk +size +local", lines[1])
    assert [line.split()[0] for line in lines[2:5]] == [LONG, "vm-2", "vm-10"]
    assert lines[5].startswith("3 of 3 disks open")


def test_a_terminal_without_a_cursor(folder: Path) -> None:
    """`top` says so; `status --watch` writes one line after the other."""
    with mounted(folder) as mount:
        environment = {**os.environ, "TERM": "dumb"}
        command = ["script", "-qec", f"timeout 60 {' '.join(FVDFS)} top {mount.point}", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, "TERM=dumb" in done.stdout) == (2, True)
        command[2] = f"timeout 60 {' '.join(FVDFS)} status --watch {mount.point}"
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as watch:
            assert watch.stdout is not None
            for _ in range(2):
                assert watch.stdout.readline().startswith("No disk is open of 0")
            watch.terminate()
