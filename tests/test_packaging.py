"""What is released: the source distribution holds all, and its tests run from it; the wheel; versions and dates."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fvdfs

ROOT = Path(__file__).parent.parent
NOT_RELEASED = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build")
VERSION = re.compile(r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", re.MULTILINE)


def build(kind: str, tmp_path: Path) -> Path:
    """An sdist or a wheel, made from a copy of this tree, which is left alone."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=NOT_RELEASED)
    script = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tmp_path / done.stdout.splitlines()[-1]


def files_of(tree: Path) -> set[str]:
    """The files of a clone; where there is no git, as in a source distribution, all."""
    if not (tree / ".git").exists():
        return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    listed = subprocess.run(["git", "ls-files"], cwd=tree, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (tree / name).exists()}


def metadata(text: bytes) -> email.message.Message:
    return email.message_from_bytes(text)


@pytest.mark.slow
def test_a_source_distribution_is_whole(tmp_path: Path) -> None:
    """All files of the clone are in it; from it pages link to what is there, and tests run."""
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", build("sdist", tmp_path), "-C", unpacked], check=True)
    (tree,) = unpacked.iterdir()
    assert tree.name == f"fvdfs-{fvdfs.__version__}"
    assert files_of(ROOT) - files_of(tree) == set()
    assert [name for name in files_of(tree) if "__pycache__" in name or name.endswith(".pyc")] == []
    tests = ["tests/test_pages.py", "tests/test_ground.py", "tests/format/test_header.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        capture_output=True,
        text=True,
        env={
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONPATH", "COV_"))
        },
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{3,} passed", done.stdout, re.MULTILINE), done.stdout


def test_a_wheel_tells_what_it_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as archive:
        names = archive.namelist()
        (place,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        found = metadata(archive.read(place))
    assert {"fvdfs/py.typed", "fvdfs/aio.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "docs", "examples"))]
    assert any(name.endswith("LICENSE") for name in names)
    assert found["Version"] == fvdfs.__version__
    assert found["Author"] == "The fvdfs authors"
    assert "snapshot" in found["Keywords"]
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert "example" not in str(found.get_all("Project-URL", []))


def test_pythons_are_those_that_are_stated() -> None:
    """The lowest version is the same for installers, for ruff and for mypy."""
    config, tools = (ROOT / "setup.cfg").read_text(), (ROOT / "pyproject.toml").read_text()
    classifiers = re.findall(r"Programming Language :: Python :: (3\.\d+)$", config, re.MULTILINE)
    lowest = classifiers[0]
    assert f"python_requires = >={lowest}" in config
    assert f'python_version = "{lowest}"' in tools
    assert f'target-version = "py{lowest.replace(".", "")}"' in tools


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    """Sections have a version and a date, the newest first; the first is what is released next, or was last."""
    text = (ROOT / "CHANGELOG.md").read_text()
    found = VERSION.findall(text)
    assert len(found) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert found[0][0] == fvdfs.__version__
    versions = [tuple(map(int, version.split("."))) for version, _ in found]
    assert versions == sorted(versions, reverse=True)
    assert [date for _, date in found[1:] if date == "unreleased"] == []


@pytest.mark.parametrize("line", ["## 1.2.3 (2026-01-31)", "## 0.1.0 (unreleased)"])
def test_sections_look_like_this(line: str) -> None:
    assert VERSION.fullmatch(line)
