"""A deterministic tree of many small files, as a tar archive, and a digest of such a tree."""

from __future__ import annotations

import hashlib
import io
import os
import random
import stat
import tarfile
from collections.abc import Iterable
from pathlib import Path

DEFAULT_FILES = 20_000
_FILES_PER_DIRECTORY = 100
_EPOCH = 1_600_000_000


def make_tar(path: Path, files: int = DEFAULT_FILES, seed: int = 1) -> str:
    """Write an archive of `files` small files to `path`; return the digest of the tree in it.

    Most files have at most 4 KiB, some are empty, every 500th has about 200 KiB; each
    directory also holds one symbolic link. The same arguments always give the same tree.
    """
    rng = random.Random(seed)
    entries: list[str] = []
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(files):
            directory, position = divmod(number, _FILES_PER_DIRECTORY)
            parent = f"tree/{directory // 16:02d}/{directory % 16:02d}"
            mtime = _EPOCH + number
            if number % 500 == 250:
                content = rng.randbytes(200_000 + rng.randrange(4096))
            else:
                content = rng.randbytes(max(0, rng.randrange(-64, 4097)))
            info = tarfile.TarInfo(f"{parent}/file{position:03d}")
            info.size = len(content)
            info.mode = 0o755 if number % 7 == 0 else 0o644
            info.mtime = mtime
            archive.addfile(info, io.BytesIO(content))
            entries.append(_file_entry(info.name, info.mode, mtime, content))
            if position == 0:
                link = tarfile.TarInfo(f"{parent}/link")
                link.type = tarfile.SYMTYPE
                link.linkname = f"../file{number}"
                link.mtime = mtime
                archive.addfile(link)
                entries.append(_link_entry(link.name, link.linkname))
    return _digest(entries)


def tree_digest(root: Path) -> str:
    """The digest of the tree that an archive of make_tar, unpacked in `root`, has become.

    It covers every file's path, permissions, modification time and content, and every
    symbolic link's target.
    """
    entries: list[str] = []
    for directory, _, names in os.walk(root / "tree"):
        for name in names:
            path = Path(directory, name)
            relative = path.relative_to(root).as_posix()
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                entries.append(_link_entry(relative, os.readlink(path)))
            else:
                mode = stat.S_IMODE(status.st_mode)
                entries.append(_file_entry(relative, mode, int(status.st_mtime), path.read_bytes()))
    return _digest(entries)


def _file_entry(name: str, mode: int, mtime: int, content: bytes) -> str:
    return f"file {name} {mode:o} {mtime} {hashlib.sha256(content).hexdigest()}"


def _link_entry(name: str, target: str) -> str:
    return f"link {name} {target}"


def _digest(entries: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()
