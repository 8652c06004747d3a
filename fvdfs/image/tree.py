"""Who stands on what among the images of a folder. Blocks.

A tree reads the header of each `NAME.fvd` of the folder once, and tells files by their identity, not by their names: a
base may be named in many ways, and two names may be one file. An image that has let go of its base stands on nothing.
FVD images elsewhere, or under another name (`NAME.fvd.deleted`), are looked at where a chain leads there, since it may
lead back; other images elsewhere that stand on something here nobody can find.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from fvdfs.errors import FvdError, NotFvd
from fvdfs.format.header import Header
from fvdfs.image.chain import top_layer
from fvdfs.image.policy import FVD_FORMAT, Policy, resolve
from fvdfs.store.host import Identity, identity_of
from fvdfs.store.locations import is_local

SUFFIX = ".fvd"
_SETTLED = (
    3_000_000_000  # ns after which the next change of a file gets another time, where times are whole seconds, too
)


def identity_at(path: str) -> Identity | None:
    """Of the file of this name; None where there is none, or none to be seen."""
    try:
        return identity_of(os.stat(path))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Node:
    """An image, by one of its names."""

    path: str
    identity: Identity
    header: Header
    usage: int
    """Bytes that it takes, with its data file where that is one of this host."""
    mtime_ns: int
    """Of its file: when its disk was written last."""
    base: str
    """The path or URL of what it stands on; empty: nothing."""
    base_identity: Identity | None
    """None: it stands on nothing, on what is missing, or on what is no file of this host."""
    data_identity: Identity | None
    """That of its data file, where that is a file of this host."""
    signature: tuple[int, ...] = ()
    """Of a file whose next change will show in it; empty: it may not."""

    @property
    def stands_on_image(self) -> bool:
        """Whether what it stands on may be another FVD image: the header need not state it."""
        return self.base_identity is not None and self.header.base_img_fmt in ("", FVD_FORMAT)


class Tree:
    """Of the images of a folder as they are now."""

    def __init__(self, folder: str, before: Tree | None = None) -> None:
        """`before`: of the same folder, whose headers still count where a file has not changed since.

        Raises OSError where the folder cannot be read.
        """
        self.folder = folder or "."
        self.nodes: dict[str, Node] = {}
        """The images, by path, in the order of their names."""
        self.unreadable: dict[str, FvdError | OSError] = {}
        """The paths of what may be images, but cannot be read, so that nobody knows what they stand on; and why."""
        self._by_identity: dict[Identity, list[Node]] = {}
        self._above: dict[Identity, list[Node]] = {}
        self._policy = Policy(writable=False)
        for name in sorted(os.listdir(self.folder)):
            if name.endswith(SUFFIX):
                path = os.path.join(folder, name)
                try:
                    known = before.nodes.get(path) if before is not None else None
                    self.nodes[path] = self._note(_look(path, self._policy, known))
                except (NotFvd, FileNotFoundError):
                    continue
                except (FvdError, OSError) as error:
                    self.unreadable[path] = error
        self._follow_chains()

    def _follow_chains(self) -> None:
        known = {*self._by_identity}
        todo = [*self.nodes.values()]
        for node in todo:
            if node.stands_on_image and node.base_identity is not None and node.base_identity not in known:
                known.add(node.base_identity)
                below = self.at(node.base)
                todo += [below] if below is not None else []

    def at(self, path: str) -> Node | None:
        """The image of this name, in the folder or elsewhere; None where there is none that can be read."""
        if (node := self.nodes.get(path)) is not None or (identity := identity_at(path)) is None:
            return node
        if identity in self._by_identity:
            return self._by_identity[identity][0]
        try:
            return self._note(_look(path, self._policy))
        except (FvdError, OSError):
            return None

    def children(self, path: str) -> list[Node]:
        """The images, of the folder and of the chains of these, that stand on the file of this name."""
        identity = identity_at(path)
        return self._above.get(identity, []) if identity is not None else []

    def users(self, identity: Identity) -> Iterator[tuple[Node, str]]:
        """The images, as `children`, that have this file as their "base" or "data file", each with which."""
        for node in chain.from_iterable(self._by_identity.values()):
            if node.base_identity == identity:
                yield node, "base"
            elif node.data_identity == identity:
                yield node, "data file"

    def data_file(self, node: Node) -> str:
        """The path of the data file that no image of the folder but this one has; empty: there is none."""
        if node.data_identity is None or any(
            user.identity != node.identity for user, _ in self.users(node.data_identity)
        ):
            return ""
        return resolve(node.path, node.header.data_file)

    def chain(self, path: str) -> list[Node]:
        """The image of this name and the images that it stands on, from the top. A loop ends where it begins again."""
        found: list[Node] = []
        node = self.at(path)
        while node is not None and all(node.identity != other.identity for other in found):
            found.append(node)
            node = self.at(node.base) if node.stands_on_image else None
        return found

    def names(self, identity: Identity) -> list[str]:
        """The paths in the folder that lead to this image."""
        return [node.path for node in self._by_identity.get(identity, ())]

    def _note(self, node: Node) -> Node:
        self._by_identity.setdefault(node.identity, []).append(node)
        if node.base_identity is not None:
            self._above.setdefault(node.base_identity, []).append(node)
        return node


def _look(path: str, policy: Policy, known: Node | None = None) -> Node:
    """Raises ImageError, OSError."""
    status = os.stat(path)
    signature = _signature(status)
    if known is not None and known.signature and known.signature == signature:
        header, identity = known.header, known.identity
    else:
        layer = top_layer(path, policy)
        header, identity = layer.header, layer.meta.identity
    base, base_identity, data_identity = header.base_img if header.has_base else "", None, None
    if base and is_local(base):
        base = resolve(path, base)
        base_identity = identity_at(base)
    usage = status.st_blocks * 512  # of a device, which says nothing: 0
    if header.data_file and is_local(header.data_file):
        data = resolve(path, header.data_file)
        data_identity = identity_at(data)
        if data_identity is not None:
            usage += os.stat(data).st_blocks * 512
    return Node(path, identity, header, usage, status.st_mtime_ns, base, base_identity, data_identity, signature)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file (`Node.signature`)."""
    if stat.S_ISBLK(status.st_mode) or time.time_ns() - status.st_ctime_ns < _SETTLED:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size
