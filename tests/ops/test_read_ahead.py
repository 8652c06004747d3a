"""How much the kernel has read for a mapped page that is missing, where it comes over a network and where not."""

from __future__ import annotations

import mmap
import os
import random
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fvdfs.image.loading import open_image
from fvdfs.image.policy import Policy
from fvdfs.store import filelock
from fvdfs.store.host import open_path
from support.mounts import MIB, Mount, mounted, must, wait_until

SIZE = 400 * MIB
PAGES = 30
PAGE = 4096


@contextmanager
def counted(folder: Path) -> Iterator[list[str]]:
    """An NBD server of `base.raw`, the options of `create`; at its end it says in `statistics` what was read."""
    socket, statistics = folder / "nbd.sock", folder.parent / "statistics"
    command = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=stats", "file", str(folder / "base.raw")]
    process = subprocess.Popen([*command, f"statsfile={statistics}"], stderr=subprocess.DEVNULL)
    try:
        wait_until(socket.exists)
        yield ["--base", f"nbd+unix:///?socket={socket}", "--base-format", "raw"]
    finally:
        process.terminate()
        process.wait()


def bytes_read(folder: Path) -> float:
    text = (folder.parent / "statistics").read_text()
    found = re.search(r"^read: .* ([0-9.]+) (bytes|[KMG]iB), ", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1]) * {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[found[2]]


def touch_pages(path: Path) -> None:
    chance = random.Random(1)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for _ in range(PAGES):
            at = chance.randrange(SIZE // PAGE) * PAGE
            assert memory[at : at + 8] == at.to_bytes(8)


def read_ahead(mount: Mount) -> int:
    device = os.stat(mount.point).st_dev
    return int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())


@pytest.fixture
def base(folder: Path) -> Path:
    """A base whose pages begin with their offset."""
    path = folder / "base.raw"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        chance = random.Random(1)
        for _ in range(PAGES):
            at = chance.randrange(SIZE // PAGE) * PAGE
            os.pwrite(file.fileno(), at.to_bytes(8), at)
    return path


@pytest.mark.parametrize("words", [[], ["--copy-on-read"]])
def test_a_mapped_page_that_is_missing_costs_little_over_a_network(folder: Path, base: Path, words: list[str]) -> None:
    with counted(folder) as server:
        must("create", folder / "a.fvd", *server, *words)
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            touch_pages(mount.raw("a"))
            assert read_ahead(mount) == 512
    assert PAGES * PAGE <= bytes_read(folder) < 20 * MIB


def test_each_opening_reads_ahead_by_where_its_disk_is(folder: Path, base: Path) -> None:
    must("create", folder / "local.fvd", "--base", "base.raw")
    must("create", folder / "far.fvd", "--base", "base.raw")
    must("create", folder / "on-far.fvd", "-b", "far.fvd", "-F", "fvd")
    with counted(folder) as server:
        must("create", folder / "far.fvd", *server, "--force")
        must("create", folder / "fetched.fvd", "1M", *server)
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            for name, expected in (("far", 512), ("local", 4096), ("on-far", 512), ("fetched", 512), ("local", 4096)):
                with open(mount.raw(name), "rb"):
                    assert read_ahead(mount) == expected, name
            with open(mount.raw("fetched"), "r+b") as raw:  # all of it is here then
                raw.write(bytes(MIB))
            with open(mount.raw("far"), "rb"), open(mount.raw("fetched"), "rb"):
                assert read_ahead(mount) == 4096


async def test_a_file_on_a_file_system_of_a_network_is_remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "--base", "base.raw")
    image = await open_image(str(folder / "a.fvd"), Policy())
    assert not image.is_remote
    await image.close()
    monkeypatch.setattr(filelock, "type_of_file_system", lambda fd: 0x6969)
    image = await open_image(str(folder / "a.fvd"), Policy())
    assert image.is_remote
    await image.close()
    file = open_path(str(folder / "base.raw"), writable=False)
    file.lock(False)
    assert file.is_remote
    file.close()
