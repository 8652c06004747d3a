"""Fixtures of the tests of `fvdfs migrate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.machines import Machine, is_there, machine
from support.migrations import SIZE, Ground
from support.mounts import MIB, mounted, must
from support.ports import free_port


@pytest.fixture
def ground(tmp_path: Path, folder: Path) -> Iterator[Ground]:
    must("create", folder / "vm.fvd", str(SIZE))
    with free_port() as port, mounted(folder) as source:
        with source.raw("vm").open("r+b") as file:
            file.write(b"x" * 4 * MIB)
        found = Ground(tmp_path, source, port)
        with mounted(found.folder, "-o", f"allow_url=nbd://127.0.0.1:{port}/") as found.target:
            try:
                yield found
            finally:
                if is_there(found.there):
                    Machine(found.there).kill()


@pytest.fixture
def here(ground: Ground) -> Iterator[Machine]:
    with machine(ground.here, ground.source.raw("vm")) as found:
        yield found
