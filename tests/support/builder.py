"""Small FVD images for tests, made from their header alone, and images opened over stores in memory."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from fvdfs.alloc.chunked import Spawn
from fvdfs.alloc.flat import FlatStorage
from fvdfs.format.creation import CreateOptions, new_header
from fvdfs.format.header import HEADER_SPACE, Header, with_fields
from fvdfs.image.image import Image
from fvdfs.image.loading import load_image, open_image
from fvdfs.image.policy import Policy
from fvdfs.store.base import Store

KIB = 1024
IMAGE = "disk.fvd"


def create(
    path: Path, size: int, options: CreateOptions, *, base_length: int | None = None, all_local: bool = False
) -> Header:
    """Write an image without data to `path`, and its data file, if it has one.

    Its base, of `base_length` bytes, stands in the same folder; it is looked into only for holes.
    With `all_local` every bit is set, and the header says that the base is no longer needed.
    """
    header = new_header(size, base_length, options)
    bits = bytearray(header.bitmap_size)
    if options.detect_holes:
        holes = -(-options.detect_holes // header.block_size) * header.block_size
        base = (path.parent / options.base_img).read_bytes()[: header.base_img_size]
        for at in range(0, len(base) - holes + 1, holes):
            if not any(base[at : at + holes]):
                for block in range(at // header.block_size, (at + holes) // header.block_size):
                    bits[block // 8] |= 1 << block % 8
    if all_local:
        for block in range(header.blocks):
            bits[block // 8] |= 1 << block % 8
        header = with_fields(header, all_data_in_fvd_img=1)
    with path.open("wb") as file:
        file.write(header.encode())
        file.seek(header.bitmap_offset or HEADER_SPACE)
        file.write(bits)
        if header.table_region is not None:
            file.seek(header.table_offset)
            file.write(b"\xff" * header.table_region.size)
        file.truncate(header.metadata_size)
    if header.data_file:
        (path.parent / header.data_file).write_bytes(b"")
    return header


@dataclass(frozen=True)
class Layout:
    """A kind of image to test: its size, its options, what it stands on."""

    name: str
    size: int
    options: CreateOptions = field(default_factory=CreateOptions)
    base_length: int = 0
    """Of the raw image at the bottom; 0: none."""
    chain: tuple[CreateOptions, ...] = ()
    """The FVD images between that and the top, from the bottom up; each of the top's size less 3 sectors a step."""
    all_local: bool = False
    holes: bool = False
    """Whether the base has long runs of zeros."""
    hole_size: int = 40 * KIB
    """Of each such run, in bytes."""
    passed_through: bool = False
    """Whether the kernel writes the data by itself."""

    @property
    def policy(self) -> Policy:
        """How to open it, also after a crash."""
        return Policy(accept_unclean=self.options.journal_size == 0)

    async def begin_writing(self, image: Image) -> None:
        """As after a crash."""
        await image.begin_writing(accept_unclean=self.policy.accept_unclean)
        if self.passed_through and isinstance(image.storage, FlatStorage) and not image.storage.is_longer:
            await image.pass_through()

    def build(self, folder: Path) -> None:
        """Make the image, `IMAGE`, and all it stands on, in this empty folder."""
        rng = random.Random(self.name)
        base_length: int | None = None
        if self.base_length:
            base = bytearray(rng.randbytes(self.base_length))
            if self.holes:
                for at in range(0, len(base), 12 * self.hole_size // 5):
                    base[at : at + self.hole_size] = bytes(len(base[at : at + self.hole_size]))
            (folder / "base.raw").write_bytes(base)
            base_length = len(base)
        for number, options in enumerate(self.chain):
            size = self.size - 1536 * (len(self.chain) - number)
            path = folder / f"base{number}.fvd"
            create(path, size, options, base_length=base_length)
            trio.run(_fill, path, rng)
            base_length = size
        path = folder / IMAGE
        header = create(path, self.size, self.options, base_length=base_length, all_local=self.all_local)
        if self.all_local:
            with path.open("r+b") as file:
                file.seek(header.metadata_size)
                file.write(rng.randbytes(self.size))


async def _fill(path: Path, rng: random.Random) -> None:
    """Write here and there, and past the base's end, to an image that another will stand on."""
    image = await open_image(str(path), Policy(), write=True)
    for _ in range(12):
        offset = rng.randrange(image.size)
        await image.write(offset, rng.randbytes(min(rng.randrange(1, 90_000), image.size - offset)))
    await image.close()


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of every file in the folder."""
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


async def load(
    stores: Mapping[str, Store], name: str = IMAGE, *, policy: Policy | None = None, spawn: Spawn | None = None
) -> Image:
    """Open the image over these stores, by the names of their files. Raises ImageError, OSError."""
    meta = stores[name]
    raw = bytearray(HEADER_SPACE)
    with memoryview(raw) as view:
        count = await meta.pread(view, 0)
    header = Header.decode(bytes(raw[:count]), name)
    header.check(name, await meta.size())
    data = stores[header.data_file] if header.data_file else meta
    if header.length_counts and not data.fixed_size:
        header = header.with_length(await data.size())
    base: Image | Store | None = None
    if header.has_base:
        base_name = header.base_img
        base = await load(stores, base_name) if header.base_img_fmt == "fvd" else stores[base_name]
    return await load_image(name, header, bytes(raw), meta, data, base, policy or Policy(), spawn)


def _options(
    block: int = 0,
    *,
    chunk: int = 0,
    journal: int | None = 64 * KIB,
    base: str = "base.raw",
    data_file: str = "",
    detect_holes: int = 0,
    copy_on_read: bool = False,
) -> CreateOptions:
    """Options of an image with a base if it has a block size, compact if it has a chunk size."""
    return CreateOptions(
        base_img=base if block else "",
        base_img_fmt=("fvd" if base.endswith(".fvd") else "raw") if block else "",
        block_size=block,
        compact=chunk > 0,
        chunk_size=chunk,
        grow_unit=3 * chunk,
        journal_size=journal if block or chunk else None,
        data_file=data_file,
        detect_holes=detect_holes,
        copy_on_read=copy_on_read,
    )


_MIB = 1024 * KIB
_SMALL = _MIB + 13 * 512
_LARGE = 2 * _MIB + 77 * 512

LAYOUTS = (
    Layout("plain", _SMALL),
    Layout("cow-512", _SMALL, _options(512), base_length=_SMALL),
    Layout("cow-64k", _LARGE, _options(64 * KIB), base_length=_LARGE),
    Layout("cow-7680", _LARGE, _options(7680), base_length=_LARGE),
    Layout("cow-base-smaller", _LARGE, _options(4096), base_length=_MIB + 3 * 512),
    Layout("cow-base-larger", _SMALL, _options(8192), base_length=_LARGE),
    Layout("cow-base-odd-length", _SMALL, _options(64 * KIB), base_length=700_001),
    Layout("cow-no-journal", _SMALL, _options(4096, journal=0), base_length=900_000),
    Layout("cow-tiny-journal", _SMALL, _options(512, journal=4096), base_length=_SMALL),
    Layout("cow-data-file", _SMALL, _options(4096, data_file="disk.data"), base_length=1_000_000),
    Layout("cow-holes", _LARGE, _options(4096, detect_holes=9000), base_length=1_900_000, holes=True),
    Layout("copy-on-read-512", _SMALL, _options(512, copy_on_read=True), base_length=_SMALL),
    Layout("copy-on-read-7680", _LARGE, _options(7680, copy_on_read=True), base_length=1_800_001, holes=True),
    Layout("all-local", _SMALL, _options(4096), base_length=_SMALL, all_local=True),
    Layout("compact-4k", _LARGE, _options(chunk=4096)),
    Layout("compact-64k", _LARGE, _options(chunk=64 * KIB)),
    Layout("compact-no-journal", _SMALL, _options(chunk=4096, journal=0)),
    Layout("compact-tiny-journal", _LARGE, _options(chunk=4096, journal=4096)),
    Layout("compact-data-file", _SMALL, _options(chunk=8192, data_file="disk.data")),
    Layout("compact-cow-512-4k", _SMALL, _options(512, chunk=4096), base_length=800_000),
    Layout("compact-cow-7680-64k", _LARGE, _options(7680, chunk=64 * KIB), base_length=1_500_000),
    Layout("compact-cow-64k-16k", _LARGE, _options(64 * KIB, chunk=16 * KIB), base_length=1_500_000),
    Layout("compact-cow-1m-4k", _LARGE, _options(_MIB, chunk=4096), base_length=_MIB + 300_000),
    Layout("compact-cow-no-journal", _SMALL, _options(7680, chunk=4096, journal=0), base_length=900_000),
    Layout("compact-cow-tiny-journal", _SMALL, _options(512, chunk=4096, journal=4096), base_length=_SMALL),
    Layout("compact-cow-data-file", _SMALL, _options(12 * KIB, chunk=8192, data_file="disk.data"), base_length=900_000),
    Layout(
        "compact-copy-on-read",
        _SMALL,
        _options(12 * KIB, chunk=8192, copy_on_read=True),
        base_length=900_000,
        holes=True,
    ),
    Layout("chain-of-two", _SMALL, _options(4096, base="base0.fvd"), 900_000, (_options(7680, chunk=64 * KIB),)),
    Layout(
        "chain-of-three",
        _SMALL,
        _options(64 * KIB, chunk=16 * KIB, base="base1.fvd", copy_on_read=True),
        700_000,
        (_options(512), _options(4096, chunk=8192, base="base0.fvd")),
    ),
    Layout("passed-through", _SMALL, _options(data_file="disk.data"), passed_through=True),
)
