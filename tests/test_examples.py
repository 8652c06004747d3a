"""What `examples/` shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.guest import find_kernel
from support.hosts import needs_hosts

EXAMPLES = Path(__file__).parents[1] / "examples"


@needs_hosts
@pytest.mark.slow
@pytest.mark.programs
def test_a_machine_moves_between_two_hosts(tmp_path: Path) -> None:
    find_kernel()
    programs = tmp_path / "venv/bin"  # fvdfs is installed there already
    programs.mkdir(parents=True)
    for name, does in (("python", "true"), ("fvdfs", f'exec {sys.executable} -P -m fvdfs "$@"')):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    ours = {"FVDFS_VENV": str(tmp_path / "venv"), "PYTHONPATH": str(EXAMPLES.parent), "MEGABYTES": "64"}
    words = ["sh", str(EXAMPLES / "migrate.sh")]
    temporary = {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        words, env=os.environ | ours | temporary, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without a gap" in done.stdout
    assert "64 MiB of data are the same" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["venv"]
