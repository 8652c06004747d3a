"""Fixtures of many tests, and what pytest is told as it begins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import ports
from support.mounts import MIB, PASSED_THROUGH, mounted, must, needs_passthrough

RAW_DISK_SIZE = 512 * MIB
RAW_DISK_LAYOUTS = {
    "plain": [],
    "cow": ["--base", "base.raw"],
    "compact-cow": ["--base", "base.raw", "--compact", "--block-size", "64K", "--chunk-size", "1M"],
    "passed through": ["--data-file", "auto"],
}


ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that are ignored in what a shell starts in the background, or with nohup; tests send them."""


SPREAD = (
    "tests/image/test_crash.py::",
    "tests/image/test_crash_mutants.py::",
    "tests/prefetch/test_busy_host.py::",
    "tests/test_blocks.py::",
)
"""Modules whose tests share no fixture and take long: with `--dist loadscope` any worker takes the next of them."""
LONGEST = (
    "tests/layers/test_merging.py",
    "tests/commands/test_migrate_again.py",
    "tests/ops/test_programs.py",
    "tests/ops/test_merging.py",
    "tests/ops/test_mount.py",
    "tests/ops/test_security.py",
    "tests/commands/test_commands.py",
    "tests/commands/test_backup.py",
    "tests/image/test_stateful.py",
    "tests/image/test_kill.py",
)
"""Modules that take longest come first, so that in the end no worker is left alone with one of them."""


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_make_scheduler() -> Generator[None, Any, Any]:
    scheduler = yield
    if (scope_of := getattr(scheduler, "_split_scope", None)) is not None:
        scheduler._split_scope = lambda test: test if test.startswith(SPREAD) else scope_of(test)
    return scheduler


def pytest_configure() -> None:
    # Else each of the programs that tests start compiles the whole package anew, which takes longer than most commands.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        if starts_programs(item):
            item.add_marker(pytest.mark.programs)


def starts_programs(item: pytest.Item) -> bool:
    """Whether a test may start programs, going by what its module imports and by its fixtures."""
    assert isinstance(item, pytest.Function)
    names = vars(item.module).values()
    uses_mounts = any(getattr(name, "__module__", "") == mounted.__module__ for name in names)
    return uses_mounts or subprocess in names or "raw_disk" in item.fixturenames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for images."""
    path = tmp_path / "images"
    path.mkdir()
    return path


@pytest.fixture
def free_port() -> Iterator[int]:
    """A TCP port of this machine on which nobody listens."""
    with ports.free_port() as port:
        yield port


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=needs_passthrough if "through" in name else ()) for name in RAW_DISK_LAYOUTS],
)
def raw_disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted raw file of 512 MiB, in each of several layouts."""
    folder = tmp_path_factory.mktemp("programs") / "images"
    folder.mkdir()
    pattern = bytes(range(251)) * 4177
    with open(folder / "base.raw", "wb") as base:
        for at in range(0, 320 * MIB, 16 * MIB):
            base.seek(at)
            base.write(pattern)
        base.truncate(320 * MIB)
    must("create", folder / "disk.fvd", str(RAW_DISK_SIZE), *RAW_DISK_LAYOUTS[request.param])
    passed = request.param == "passed through"
    with mounted(folder, *(["-o", PASSED_THROUGH] if passed else []), passes="disk" if passed else "") as mount:
        yield mount.raw("disk")


@pytest.fixture
def nobody() -> list[str]:
    """What runs a command as a user who may do nothing."""
    if os.geteuid():
        pytest.skip("only root may become another user")
    return ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
