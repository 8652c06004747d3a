"""The recipe of the Debian package, without building it: `packaging/deb.sh` does that."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fvdfs

ROOT = Path(__file__).parent.parent
DEBIAN = ROOT / "debian"


def requirements(text: str, section: str) -> set[str]:
    """The packages that a list in setup.cfg names."""
    found = re.search(rf"^{section} =\n((?:    .+\n)+)", text, re.MULTILINE)
    assert found is not None
    return {re.split("[>=<]", line.strip())[0].lower() for line in found[1].splitlines()}


def test_the_version_is_that_of_the_package() -> None:
    """`fvdfs/__init__.py` has it; the changelog of the recipe follows."""
    first = (DEBIAN / "changelog").read_text().partition("\n")[0]
    assert re.fullmatch(rf"fvdfs \({re.escape(fvdfs.__version__)}\) \w+; urgency=medium", first)


def test_what_it_installs_is_there() -> None:
    for line in (DEBIAN / "fvdfs.install").read_text().splitlines():
        source, _, folder = line.partition(" ")
        assert (ROOT / source).exists(), source
        assert folder
    for name in (DEBIAN / "fvdfs.docs").read_text().split():
        assert (ROOT / name).exists(), name


def test_all_that_is_needed_has_a_version() -> None:
    text = (ROOT / "setup.cfg").read_text()
    needed = requirements(text, "install_requires") | requirements(text, "metrics") | requirements(text, "top")
    lines = (DEBIAN / "constraints.txt").read_text().splitlines()
    stated = {re.split("==", line)[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert needed <= stated


def test_programs_are_those_of_the_wheel() -> None:
    text = (ROOT / "setup.cfg").read_text()
    wheel: list[tuple[str, str]] = re.findall(r"^    ([\w.]+) = (fvdfs[\w.]*:\w+)$", text, re.MULTILINE)
    links = {line.rpartition("/")[2]: line.partition(" ")[0] for line in _lines("fvdfs.links") if "bin/" in line}
    for name, place in wheel:
        module, _, entry = place.partition(":")
        program = links.get(name, name).rpartition("/")[2]
        script = (DEBIAN / "bin" / program).read_text()
        assert f"from {module} import {entry}" in script
        assert f"\n{entry}()\n" in script


def _lines(name: str) -> list[str]:
    return (DEBIAN / name).read_text().splitlines()


def copied(tmp_path: Path) -> Path:
    tree = tmp_path / "fvdfs"
    tree.mkdir()
    for name in ("debian", "examples", "README.md", "LICENSE", "setup.cfg", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
    return tree


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
@pytest.mark.skipif(not shutil.which("dh"), reason="debhelper is not installed")
def test_lintian_finds_nothing_in_the_recipe(tmp_path: Path) -> None:
    subprocess.run(["dpkg-source", "-b", copied(tmp_path)], cwd=tmp_path, check=True, capture_output=True)
    (dsc,) = tmp_path.glob("*.dsc")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", "--no-tag-display-limit", dsc],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.skipif(not shutil.which("sh"), reason="there is no shell")
@pytest.mark.parametrize(
    "script", ["packaging/deb.sh", "packaging/pythons.sh", "debian/fvdfs.postinst", "debian/fvdfs.prerm"]
)
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["sh", "-n", ROOT / script], check=True)
