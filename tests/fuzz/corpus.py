"""Stored inputs: for each target those that together reach all that the fuzzer has reached.

`corpus/TARGET.tar.xz` holds the inputs of a target, one a member; `regressions/TARGET-WHAT` is one
input, which a defect was found with.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
REGRESSIONS = HERE / "regressions"


def load(target: str) -> list[bytes]:
    """The stored inputs of a target."""
    path = CORPUS / f"{target}.tar.xz"
    if not path.exists():
        return []
    inputs = []
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            inputs.append(file.read())
    return inputs


def store(target: str, inputs: Iterable[bytes]) -> int:
    """Replace the stored inputs of a target; the bytes that the file takes."""
    path = CORPUS / f"{target}.tar.xz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for data in sorted(set(inputs), key=lambda data: (len(data), data)):
            member = tarfile.TarInfo(sha256(data).hexdigest()[:12])
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.stat().st_size


def regressions(target: str) -> dict[str, bytes]:
    """The inputs of a target that a defect was found with, by the names of their files."""
    return {path.name: path.read_bytes() for path in sorted(REGRESSIONS.glob(f"{target}-*"))}
