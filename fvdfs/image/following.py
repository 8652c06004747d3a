"""A disk that follows its source on top of a template that both hosts have: only the rest travels.

The image names the template as its base, for good. For the time of the move there is one more layer between the two:

    the image  ->  the source  ->  the template

which is an image like others for who reads it: its storage is what the source gives, its bitmap the source's own map
(`cow/own.py`), bit for bit what it has beyond the template. As long as nobody knows the map, there is no bitmap, and
all bytes are the source's: that is right at any time, since what it gives is the whole disk; nothing is copied
meanwhile. The map is fetched anew after each opening. Where it cannot be had, or the template is another by now, the
map of all is taken.

What the map names is copied (`Core.to_copy`). When all that is here, the layer is taken out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fvdfs.alloc.flat import FlatStorage
from fvdfs.alloc.growth import GrowCommand
from fvdfs.cow.bitmap import Bitmap
from fvdfs.cow.own import OwnBits
from fvdfs.cow.planner import Geometry
from fvdfs.errors import ImageError
from fvdfs.format.header import HEADER_SIZE, SECTOR, Header, round_up
from fvdfs.format.stamp import Stamp, pieces
from fvdfs.image.commit import Committer
from fvdfs.image.core import Core, OwnData, close_files
from fvdfs.image.image import Image
from fvdfs.store.base import Store
from fvdfs.store.qemu_store import QemuStore


async def check_source(source: QemuStore, size: int) -> None:
    """See that it gives so many bytes, now or when its server is back. Raises ImageError, OSError."""
    if source.is_away:
        source.expect(size)
    elif (found := await source.size()) < size:
        raise ImageError(source.name, f"has {found} bytes, and the disk that stands on it needs {size}")


def put_source_below(image: Image, source: QemuStore) -> None:
    """Have an image that was just loaded stand on its source, and that on the image's base. It takes over the store."""
    base, size = image.base, image.header.base_size
    assert base is not None
    header = Header(virtual_disk_size=size)
    layer = Image(
        name=source.name,
        committer=Committer(header, bytes(round_up(HEADER_SIZE, SECTOR)), source, source, None, None),
        meta=source,
        data=source,
        base=base,
        storage=_whole(source, size),
        bitmap=None,
        table=None,
        spawn=image.spawn,
        bases=image.bases,
    )
    image.bases.exchange(base, image, layer)
    image.bases.enter(layer, image)
    image.base = image.followed = layer


def _whole(source: QemuStore, size: int) -> FlatStorage:
    return FlatStorage(source, 0, size, GrowCommand(source.name, (), ""), length=size, is_truncated=False)


async def change_source(image: Image, source: QemuStore) -> None:
    """Have this be what the source gives. Both have the same content for who asks. It is taken over."""
    layer = image.followed
    assert layer is not None
    former = layer.data
    layer.meta = layer.data = source
    layer.storage = _whole(source, layer.size)
    layer.own = OwnData(source, layer.storage, layer.committer)
    await image.wait_for_reads()
    await former.aclose()


def take_map(image: Image, own: Bitmap, unit: int) -> None:
    """What this does not name is the template's from now on. `unit`: bytes for each bit."""
    layer = image.followed
    assert layer is not None
    layer.geometry = Geometry(unit, layer.size)
    layer.bitmap = own
    image.map_known.set()


def take_all(image: Image) -> None:
    """Nothing is the template's."""
    if image.followed is not None:
        found = OwnBits(image.followed.size)
        take_map(image, found.bitmap(), found.unit)


async def stand_on_template(image: Image) -> None:
    """Take the source out: `Image.let_source_go` was called, and all that was to be copied is in the image."""
    layer = image.followed
    if layer is None:
        return  # it was let go with the base
    template = layer.base
    assert template is not None
    image.bases.drop(layer)
    image.bases.exchange(template, layer, image)
    image.base, image.followed = template, None  # that of the layer stays: somebody may be on the way down
    await image.wait_for_reads()
    await close_files(layer)


async def stamp_of(read: Callable[[int, int], Awaitable[bytes | bytearray | memoryview]], size: int) -> str:
    """The stamp of a disk of so many bytes, as `read(offset, length)` gives it. Raises OSError."""
    size = round_up(size, SECTOR)
    stamp = Stamp(size)
    for start, stop in pieces(size):
        stamp.add(bytes(await read(start, stop - start)).ljust(stop - start, b"\0"))
    return stamp.text()


async def stamp_of_layer(layer: Core | Store) -> str:
    """That of an image that others stand on, or of a base below it. Raises OSError."""
    if isinstance(layer, Image):
        return await stamp_of(layer.read, layer.size)
    assert not isinstance(layer, Core)

    async def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            count = await layer.pread(view, offset)
        return bytes(buffer[:count])

    return await stamp_of(read, await layer.size())


async def find_template(image: Image, stamp: str) -> Core | Store | None:
    """What an image stands on that has this stamp; None: nothing. Raises OSError."""
    layer = image.base
    while layer is not None:
        if await stamp_of_layer(layer) == stamp:
            return layer
        layer = layer.base if isinstance(layer, Core) else None
    return None


def own_bits(image: Image, template: Core | Store) -> OwnBits:
    """What a disk that nobody writes has of its own beyond what it stands on. Blocks for a moment."""
    found = OwnBits(image.size)
    unchanged = template.own if isinstance(template, Core) else template
    for start, stop, source, _ in image.pieces(0, image.size, down_to=template if isinstance(template, Core) else None):
        if source is unchanged:
            found.shared(start, stop)
    found.end()
    return found
