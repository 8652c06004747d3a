"""`fvdfs check`: what is wrong with an image, and repairing it. Blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fvdfs.check.check import check_image, describe, render
from fvdfs.mountoptions import folders, parse_mount_options


def run(image: str, *, repair: bool, as_json: bool, options: Sequence[str], secret: str) -> int:
    """Check, and print what was found; the exit code that it stands for. Raises as `check_image`, UsageError."""
    roots = folders(parse_mount_options(options, ("base_path",)))
    report = check_image(image, repair=repair, secret_file=secret, roots=roots)
    print(json.dumps(describe(report), indent=2) if as_json else render(report))
    return report.exit_code
