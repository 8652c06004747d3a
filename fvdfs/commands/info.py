"""`fvdfs info`: the fields of an image, and what they mean for the user. Blocks."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fvdfs import mountoptions
from fvdfs.commands.attributes import facts
from fvdfs.commands.mounted import raw_file
from fvdfs.commands.rows import in_columns, local
from fvdfs.commands.terminal import plain_console
from fvdfs.daemon import run_loop
from fvdfs.errors import FormatError, FvdError, ImageBusy, UsageError, printable
from fvdfs.format.header import Header, ceil_div
from fvdfs.format.migration import Target
from fvdfs.format.note import NOTE_OFFSET, Note
from fvdfs.image.chain import Chain, Layer, open_alone, open_chain, top_layer
from fvdfs.image.image import Image
from fvdfs.image.loading import load_chain
from fvdfs.image.map import shares
from fvdfs.image.policy import Policy, resolve
from fvdfs.sizes import human_size
from fvdfs.store.locations import is_local
from fvdfs.xattrs import STATUS


def run(image: str, *, as_json: bool, options: Sequence[str], secret: str) -> int:
    """Print what is known of an image. Raises UsageError, and as `describe`."""
    urls = mountoptions.allowed_urls(options)
    found = describe(image, secret_file=secret, allowed_urls=urls)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        width = plain_console().width if sys.stdout.isatty() else None
        print("\n".join(render(found, width)))
    return 0


def describe(path: str, *, secret_file: str = "", allowed_urls: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything that is known of the image at `path`, ready for JSON: header fields, and what they mean.

    Raises ImageError where it is no image. What only hides a part, as a missing base, or an image in
    use, is reported under "problems".
    """
    problems: list[str] = []
    by_mount: dict[str, Any] = {}
    image: Image | None = None
    policy = Policy(writable=False, secret_file=secret_file, allowed_urls=allowed_urls)
    try:
        # What one of a move stands on is another host's: nothing here depends on whether that can be reached.
        chain = open_alone(path, policy) if _comes_from_elsewhere(path, policy) else open_chain(path, policy)
    except FvdError as error:
        problems.append(str(error))
        chain = open_chain(path, policy, top_only=True)
    header = chain.layers[0].header
    note = _note(chain.layers[0])
    move = _move(chain.layers[0], problems)
    usage = chain.layers[0].usage()
    base_chain = _names(chain)
    if not problems:
        try:
            image = run_loop(functools.partial(load_chain, chain))
        except ImageBusy as error:
            by_mount = _ask_mount(path, error, problems)
        except (FvdError, OSError) as error:
            problems.append(str(error))
    else:
        chain.close()
    if damage := image.damage if image is not None else by_mount.get("failed"):
        problems.append(f"{damage}; fvdfs check says what is lost")
    result: dict[str, Any] = {
        "image": path,
        "virtual_size": header.virtual_disk_size,
        "allocated": usage,
        "layout": _layout(header.compact, bool(header.data_file), header.has_base),
        "clean": header.clean,
        "writable_without_repair": not damage
        and (header.clean or not header.has_metadata or header.journal_region is not None),
        "base_chain": base_chain,
        "export": note,
        "move": move,
        "problems": problems,
        "open_in": by_mount.get("open_in"),
    }
    if image is not None:
        result |= shares(image)
        if image.bitmap is not None:
            result["local_blocks"] = image.bitmap.count_local()
            result["base_blocks"] = header.blocks
        if image.table is not None:
            result["allocated_chunks"] = image.table.allocated()
            result["chunks"] = header.chunks
        run_loop(image.close)
    result |= fields(header)
    if by_mount:
        result |= {key: by_mount[key] for key in _BY_MOUNT} | {"virtual_disk_size": by_mount["virtual_size"]}
        if header.has_base:
            result["local_blocks"] = ceil_div(by_mount["local_bytes"], header.block_size)
            result["base_blocks"] = header.blocks
    return result


_BY_MOUNT = ("virtual_size", "base_size", "local_bytes", "local_share", "disk_local_share")
"""What the mount that has an image open knows better than its header: entries of the status."""


def _ask_mount(path: str, error: ImageBusy, problems: list[str]) -> dict[str, Any]:
    """The status of an image that a mount has open, and as `open_in` its raw file there; empty where none answers."""
    try:
        if raw := raw_file(path, error):
            found = facts(raw, STATUS)
            if found.get("local_share") is not None:
                return found | {"open_in": raw}
    except ImageBusy as still:
        error = still
    except (OSError, UsageError):
        pass  # it has just been closed there
    problems.append(f"{error.reason}; until then only the header can be shown")
    return {}


def _comes_from_elsewhere(path: str, policy: Policy) -> bool:
    """Whether it is the target of a move that is under way, or was given up. Raises ImageError, OSError."""
    try:
        into = top_layer(path, policy).record().incoming
    except FormatError:
        return False
    return into is not None and into.state is not Target.LOCAL


def _move(layer: Layer, problems: list[str]) -> dict[str, str] | None:
    """What it says of its move to or from another host; None: nothing. A damaged record is a problem."""
    try:
        record = layer.record()
    except FormatError as error:
        if str(error) not in problems:
            problems.append(str(error))
        return None
    if not record:
        return None
    into = record.incoming
    source = into.url(layer.header.base_img) if into is not None and into.state is not Target.LOCAL else ""
    number = into.number if into is not None and record.receiving else ""
    return {"state": record.state, "reason": record.obstacle or record.remark, "source": source, "number": number}


def _note(layer: Layer) -> dict[str, str | int] | None:
    """What an export says of itself; None: it is none, or what it says is damaged."""
    try:
        note = Note.decode(layer.raw_header[NOTE_OFFSET:], layer.path)
    except FormatError:
        return None
    if note is None:
        return None
    return {"disk": note.disk, "since": note.since, "since_size": note.since_size, "since_time": note.since_time}


def fields(header: Header) -> dict[str, int | str]:
    """The header's fields by the format's names."""
    return {field.name: getattr(header, field.name) for field in dataclasses.fields(header)}


def _names(chain: Chain) -> list[dict[str, str]]:
    names = []
    for layer in chain.layers:
        header = layer.header
        if header.has_base:
            names.append(
                {
                    "name": header.base_img,
                    "path": resolve(layer.path, header.base_img) if is_local(header.base_img) else header.base_img,
                    "format": header.base_img_fmt or layer.base_format or "not stated",
                }
            )
    return names


def _layout(compact: bool, data_file: bool, base: bool) -> str:
    text = "compact: chunks allocated by the image" if compact else "flat: as a raw image, sparse"
    if data_file:
        text += ", in a data file of its own"
    if base:
        text += ", copy-on-write over a base"
    return text


def render(found: dict[str, Any], width: int | None) -> Iterator[str]:
    """The facts as lines for a terminal of so many columns; None: any number."""
    rows = [
        ("image", found["image"]),
        ("virtual size", human_size(found["virtual_size"])),
        ("allocated", human_size(found["allocated"])),
        ("layout", found["layout"]),
        ("state", _state(found)),
    ]
    if found.get("open_in"):
        rows.append(("open in", found["open_in"]))
    if "local_blocks" in found:
        rows.append(("local", f"{local(found)} ({found['local_blocks']} of {found['base_blocks']} blocks)"))
    if "chunks" in found:
        rows.append(("chunks", f"{found['allocated_chunks']} of {found['chunks']} allocated"))
    rows += [("base", f"{base['path']} ({base['format']})") for base in found["base_chain"]]
    if found["export"]:
        rows.append(("export", _of_export(found["export"])))
    if found["move"]:
        rows.append(("move", found["move"]["reason"] or found["move"]["state"]))
        rows += [("source", found["move"]["source"])] * bool(found["move"]["source"])
        rows += [("asks as", found["move"]["number"])] * bool(found["move"]["number"])
    rows += [("problem", problem) for problem in found["problems"]]
    of_header = [(field.name, str(found[field.name])) for field in dataclasses.fields(Header)]
    of_header = [(name, f"0x{int(value):X}" if name == "magic" else value) for name, value in of_header]
    yield from in_columns([(name, printable(value)) for name, value in rows], width)
    yield ""
    yield from in_columns([(name, printable(value)) for name, value in of_header], width)


def _of_export(note: dict[str, Any]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["since_time"]))
    return f"what of {note['disk']} has changed since {note['since']}, written {written}"


def _state(found: dict[str, Any]) -> str:
    if found.get("open_in"):
        return "open in a mount; this is what the mount says"
    if found["clean"]:
        return "clean"
    if found["writable_without_repair"]:
        return "not closed: in use, or crashed; the journal is replayed at the next opening"
    return "not closed, and no journal: in use, or crashed; can be read, its metadata may be incomplete"
