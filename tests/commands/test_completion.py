"""The wheel installs completion, by which shells complete, and manual pages without a flaw."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from fvdfs.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("shtab", "argparse_manpage") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder share/ of an environment into which the wheel was installed."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fvdfs", source / "fvdfs", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(place), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(place / "venv")
    [wheel] = place.glob("*.whl")
    python = str(place / "venv/bin/python")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return place / "venv/share"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What there is to complete."""
    for name in ("a.fvd", "b.raw", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    return tmp_path


WORDS = [
    ("fvdfs in", {"info"}),
    ("fvdfs migr", {"migrate"}),  # not what it starts at the other host
    ("fvdfs info ", {"a.fvd", "sub"}),
    ("fvdfs map ", {"a.fvd", "b.raw", "sub"}),
    ("fvdfs mount ", {"sub"}),
    ("fvdfs mount images ", {"sub"}),
    ("fvdfs mount images disks -o shrink,rec", {"shrink,record_profile"}),
    ("fvdfs convert -f qc", {"qcow", "qcow2"}),
    ("fvdfs convert c", {"c.txt"}),
    ("fvdfs prefetch ", {"start", "pause", "stop"}),
    ("fvdfs prefetch start b", {"b.raw"}),
    ("fvdfs check --re", {"--repair"}),
    ("fvdfs create a.fvd 1G --update-base w", {"writethrough", "writeback"}),
]

COMPLETE = """
. "$1"; shift
complete -p fvdfs >&2 || exit 1
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
compopt() { :; }  # which is for a line that somebody types
_shtab_fvdfs
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(("line", "found"), WORDS)
def test_bash_completes(share: Path, here: Path, line: str, found: set[str]) -> None:
    script = share / "bash-completion/completions/fvdfs"
    words = ["bash", "-c", COMPLETE, "bash", str(script), *line.split(" ")]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=True)
    assert "complete -o bashdefault -F _shtab_fvdfs fvdfs" in done.stderr
    assert set(done.stdout.split()) == found


def test_fish_completes(share: Path, here: Path) -> None:
    needs("fish")
    script = share / "fish/vendor_completions.d/fvdfs.fish"
    for line, found in WORDS:
        words = ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", str(script), line]
        done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=True)
        assert {each.partition("\t")[0].rstrip("/") for each in done.stdout.splitlines()} == found, line


def test_zsh_reads_it(share: Path) -> None:
    needs("zsh")
    script = share / "zsh/site-functions/_fvdfs"
    assert script.read_text().startswith("#compdef fvdfs\n")
    subprocess.run(["zsh", "-f", "-n", str(script)], check=True)
    loaded = "fpath=($1 $fpath); autoload -Uz compinit; compinit -u -D; print $_comps[fvdfs]"
    words = ["zsh", "-f", "-c", loaded, "zsh", str(script.parent)]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "_fvdfs\n"


def test_each_command_has_a_manual_page(share: Path) -> None:
    pages = {path.name for path in (share / "man/man1").iterdir()}
    assert pages == {"fvdfs.1", *(f"fvdfs-{name}.1" for name in EXAMPLES)}
    assert ".SH EXIT CODES" in (share / "man/man1/fvdfs.1").read_text()
    mount = (share / "man/man1/fvdfs-mount.1").read_text()
    assert ".SH MOUNT OPTIONS" in mount
    assert r"\&fvdfs mount images disks" in mount


@pytest.mark.parametrize(
    "checker", [["mandoc", "-T", "lint", "-W", "warning"], ["groff", "-man", "-ww", "-Tutf8", "-z"]]
)
def test_manual_pages_are_clean(share: Path, checker: list[str]) -> None:
    needs(checker[0])
    for page in (share / "man/man1").iterdir():
        done = subprocess.run([*checker, str(page)], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("", ""), page.name
