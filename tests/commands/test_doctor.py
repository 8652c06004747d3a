"""`fvdfs doctor`: here it finds what the other tests use, and where something is taken away it says so."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from support.mounts import FVDFS, fvdfs, must, needs_passthrough
from support.namespaces import in_mount_namespace


def test_what_tests_use_works_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where no other test is
    found = json.loads(must("doctor", "--json"))
    works = {finding["name"]: finding["works"] for finding in found["findings"]}
    assert found["works"]
    assert all(works[name] for name in ("/dev/fuse", "fusermount3", "mount", "QEMU", "QEMU's drivers"))
    assert list(tmp_path.iterdir()) == []
    lines = must("doctor").splitlines()
    assert len(lines) == len(works)
    assert any(line.split()[:2] == ["mount", "works"] for line in lines)


@needs_passthrough
def test_passthrough_works_here() -> None:
    [finding] = [each for each in json.loads(must("doctor", "--json"))["findings"] if each["name"] == "passthrough"]
    assert finding["works"]


@pytest.mark.parametrize(
    ("taken", "name", "advice"),
    [("/usr/bin/fusermount3", "fusermount3", "apt install fuse3"), ("/dev/fuse", "mount", "")],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who makes mount namespaces")
def test_what_is_missing_is_said(taken: str, name: str, advice: str) -> None:
    script = f'mount --bind /dev/null {taken} && exec "$@"'
    command = in_mount_namespace("sh", "-c", script, "sh", *FVDFS, "doctor", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    [finding] = [each for each in json.loads(done.stdout)["findings"] if each["name"] == name]
    assert (finding["works"], finding["advice"]) == (False, advice)


def test_fewer_open_files_than_images_need() -> None:
    done = subprocess.run(
        ["sh", "-c", 'ulimit -Sn 500; ulimit -Hn 1000; "$@"', "sh", *FVDFS, "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "at most 1000" in done.stdout


def test_options_of_doctor() -> None:
    assert fvdfs("doctor", "--jsn").code == 2
