"""Images to damage, and `fvdfs check` in this process."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from fvdfs.check.findings import Severity
from fvdfs.cli import main
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.loading import open_image
from support import reference
from support.builder import IMAGE, LAYOUTS, Layout, read_files
from support.workload import small

BY_NAME = {layout.name: small(layout) for layout in LAYOUTS}
CORRUPTION, LEAK, HARMLESS = Severity
UNALLOCATED = 0xFFFFFFFF
MISSING = "no-such-file"


class Good:
    """A good image with data in it, in files, and means to damage it."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self.layout = layout
        self.folder = folder
        self.path = folder / IMAGE
        layout.build(folder)
        self.fill()
        self.header = Header.decode(self.path.read_bytes()[:HEADER_SPACE], IMAGE)
        self.content = self.read()

    def fill(self, *, crash: bool = False, seed: int = 1) -> None:
        """Write here and there; with `crash`, the files stay as they are before the image is closed."""

        async def work() -> dict[str, bytes]:
            image = await open_image(str(self.path), self.layout.policy, write=True)
            rng = random.Random(seed)
            for _ in range(8):
                offset = rng.randrange(image.size)
                await image.write(offset, rng.randbytes(min(rng.randrange(1, 30_000), image.size - offset)))
            await image.fsync()
            files = read_files(self.folder)
            await image.close()
            return files

        files = trio.run(work)
        if crash:
            for name, content in files.items():
                (self.folder / name).write_bytes(content)
            self.content = self.read()

    def read(self) -> bytes:
        """The whole disk, by the reference reader."""
        return b"".join(reference.read_disk(self.path))

    def write(self, offset: int, data: bytes, name: str = IMAGE) -> None:
        with (self.folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def put(self, **fields: int | str | bytes) -> None:
        """Set fields of the header."""
        for name, value in fields.items():
            index = reference.NAMES.index(name)
            raw = value.encode() if isinstance(value, str) else value
            offset = struct.calcsize("<" + "".join(reference.CODES[:index]))
            self.write(offset, struct.pack(f"<{reference.CODES[index]}", raw))

    def truncate(self, length: int, name: str = IMAGE) -> None:
        os.truncate(self.folder / name, length)

    @property
    def entries(self) -> list[int]:
        """The table as it is on disk."""
        raw = self.path.read_bytes()[self.header.table_offset :]
        return list(struct.unpack_from(f"<{self.header.chunks}I", raw))

    def allocated(self) -> list[int]:
        """Chunks with a place."""
        return [chunk for chunk, entry in enumerate(self.entries) if entry != UNALLOCATED]

    def set_entry(self, chunk: int, entry: int) -> None:
        self.write(self.header.table_offset + 4 * chunk, struct.pack("<I", entry))

    def clear_journal(self) -> None:
        self.write(self.header.journal_offset, bytes(self.header.journal_size))

    def set_sector(self, sector: int, *records: bytes) -> None:
        """Fill a sector of the journal."""
        self.write(self.header.journal_offset + 512 * sector, b"".join(records).ljust(512, b"\0"))

    def zeroed(self, *chunks: int) -> bytes:
        """The content, but zeros in what own storage holds of these chunks."""
        content = bytearray(self.content)
        image = reference.Image(self.path)
        size = self.header.chunk_size
        for chunk in chunks:
            for at in range(chunk * size, min((chunk + 1) * size, len(content)), 512):
                if at >= self.header.base_size or image.bit(at // self.header.block_size):
                    content[at : at + 512] = bytes(512)
        image.close()
        return bytes(content)


COW, COMPACT, BOTH = "cow-7680", "compact-4k", "compact-cow-7680-64k"
DATA_FILE = "cow-data-file"


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The command, in this process: exit code and output."""
    capsys.readouterr()
    code = main(["check", *map(str, arguments)])
    output = capsys.readouterr()
    assert output.err == "", output.err
    return code, output.out


def check(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> dict[str, Any]:
    code, output = run(capsys, path, "--json", *options)
    report: dict[str, Any] = json.loads(output)
    assert report["exit_code"] == code
    return report


def kinds(report: Mapping[str, Any]) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}
