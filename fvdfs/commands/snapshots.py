"""`fvdfs snapshots`: which images of a folder stand on which, as a tree. Blocks.

What a file takes and when its disk was written is that of the file itself: of a running image, as of now.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fvdfs import mounts
from fvdfs.commands.attributes import explained, facts
from fvdfs.errors import UsageError, printable, told
from fvdfs.image.tree import Node, Tree, identity_at
from fvdfs.sizes import human_size
from fvdfs.store.host import Identity
from fvdfs.xattrs import STATUS


def run(disk: str, *, as_json: bool) -> int:
    """Show the images of a folder, or the chain of one and what stands on it. Raises UsageError, OSError."""
    tree, rows = find(disk)
    if as_json:
        print(json.dumps([_facts(tree, row) for row in rows if row.node is not None], indent=2))
    else:
        print(_table(tree, rows))
    return 0


def image_of(disk: str) -> str:
    """The path of the image: what was named, or that behind a raw file in a mount. Raises UsageError, OSError."""
    if not disk.endswith(".raw"):
        return disk
    with explained(disk):
        return str(facts(disk, STATUS)["image"])


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the tree."""

    node: Node | None
    """None: what stands there is no image that can be read."""
    name: str
    depth: int
    lines: str = ""
    """What leads to it from what it stands on."""


def find(disk: str) -> tuple[Tree, list[Row]]:
    """The tree of a folder, and its lines: all, or those of one disk. Raises UsageError, OSError."""
    if os.path.isdir(disk):
        mount = mounts.mount_at(disk)
        tree = Tree(mount.source if mount is not None and mount.is_ours else disk)
        return tree, [row for root in _roots(tree) for row in _rows(tree, root)]
    path = image_of(disk)
    if not os.path.exists(path):
        raise UsageError(f"{disk}: there is no such file")
    tree = Tree(os.path.dirname(path))
    top = tree.at(path)
    if top is None:
        if path in tree.unreadable:
            raise tree.unreadable[path]
        raise UsageError(f"{disk}: is no FVD image; name one, or a folder of images")
    chain = tree.chain(top.path)
    shown = {node.identity for node in chain}
    found = [top]
    for node in found:
        children = [child for child in tree.children(node.path) if child.identity not in shown]
        shown |= {child.identity for child in children}
        found += children
    root = chain[-1].base or chain[-1].path
    return tree, list(_rows(tree, root, shown))


def _roots(tree: Tree) -> list[str]:
    """What stands on nothing in the folder: images, and the bases of the others, each once."""
    found: dict[object, str] = {}
    for node in tree.nodes.values():
        last = tree.chain(node.path)[-1]
        found.setdefault(last.base_identity or last.base or last.identity, last.base or last.path)
    return list(found.values())


def _rows(tree: Tree, root: str, shown: set[Identity] | None = None) -> Iterator[Row]:
    """A base, or an image, and all that stands on it, or those of it that are to be shown; the nearest first."""
    seen = set()
    todo = [Row(tree.at(root), root, 0)]
    while todo:
        row = todo.pop()
        yield row
        children = tree.children(row.name) if row.node or os.path.exists(row.name) else _on_url(tree, row.name)
        children = [child for child in children if child.path not in seen and (not shown or child.identity in shown)]
        seen |= {child.path for child in children}
        lead = row.lines.replace("├─", "│ ").replace("└─", "  ")
        for number, child in enumerate(reversed(children)):
            todo.append(Row(child, child.path, row.depth + 1, lead + ("├─ " if number else "└─ ")))


def _on_url(tree: Tree, base: str) -> list[Node]:
    """The images that stand on what is no file of this host, or is missing."""
    return [node for node in tree.nodes.values() if node.base == base]


def _table(tree: Tree, rows: list[Row]) -> str:
    """The lines as text, their columns below each other."""
    cells = [("image", "takes", "disk", "written", "")]
    for row in rows:
        name = row.lines + printable(os.path.basename(row.name) if row.name in tree.nodes else _plain(row.name))
        if row.node is None:
            there = os.path.exists(row.name) or "://" in row.name
            cells.append((name, "", "", "", "" if there else "is missing"))
            continue
        node = row.node
        others = [os.path.basename(other) for other in tree.names(node.identity) if other != node.path]
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(node.mtime_ns // 1_000_000_000))
        remark = f"the same file as {printable(', '.join(others))}" if others else ""
        cells.append((name, _short(node.usage), _short(node.header.virtual_disk_size), written, remark))
    cells += [(printable(told(why)), "", "", "", "") for why in tree.unreadable.values()]
    widths = [max(len(cell[column]) for cell in cells[: len(rows) + 1]) for column in range(4)]
    lines = []
    for name, takes, disk, written, remark in cells:
        line = f"{name:<{widths[0]}}  {takes:>{widths[1]}}  {disk:>{widths[2]}}  {written:<{widths[3]}}  {remark}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _plain(path: str) -> str:
    """The path of a file elsewhere, without detours."""
    plain = os.path.normpath(path)
    return plain if identity_at(plain) == identity_at(path) is not None else path


def _short(size: int) -> str:
    return human_size(size).partition(" (")[0]


def _facts(tree: Tree, row: Row) -> dict[str, Any]:
    node = row.node
    assert node is not None
    return {
        "image": node.path,
        "base": node.base or None,
        "depth": row.depth,
        "virtual_size": node.header.virtual_disk_size,
        "allocated": node.usage,
        "written": node.mtime_ns / 1e9,
        "clean": node.header.clean,
        "stood_on_by": [child.path for child in tree.children(node.path)],
        "same_file_as": [other for other in tree.names(node.identity) if other != node.path],
    }
