"""The golden images: images that the original made."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST: list[dict[str, Any]] = json.loads((GOLDEN / "manifest.json").read_text())
_ZEROS = bytes(1 << 20)


def extract(name: str, folder: Path) -> Path:
    """Unpack a golden image, sparse where it is zero; returns the path of the image itself."""
    with tarfile.open(GOLDEN / f"{name}.tar.xz", "r:xz") as archive:
        for member in archive:
            source = archive.extractfile(member)
            assert source is not None
            with (folder / member.name).open("wb") as file:
                while piece := source.read(len(_ZEROS)):
                    if piece == _ZEROS:
                        file.seek(len(piece), 1)
                    else:
                        file.write(piece)
                file.truncate(member.size)
    return folder / "disk.fvd"
