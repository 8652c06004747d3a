"""The programs that the wheel installs, as they are installed: setup.cfg names them."""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

from support.namespaces import overlaid

ROOT = Path(__file__).parents[2]


def installed(folder: Path) -> Path:
    """The folder, with all programs of the package in it, for this Python and this tree."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folder.mkdir(exist_ok=True)
    for line in setup["options.entry_points"]["console_scripts"].strip().splitlines():
        name, _, place = (part.strip() for part in line.partition("="))
        module, _, function = place.partition(":")
        text = (
            f"#!{sys.executable} -P\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom {module} import {function}\n"
        )
        program = folder / name
        program.write_text(f"{text}{function}()\n")
        program.chmod(0o755)
    return folder


def in_sbin(folder: Path, *names: str) -> str:
    """Commands of a shell, in a mount namespace, after which these programs lie in /usr/sbin."""
    programs = installed(folder / "bin")
    links = (f"ln -s {programs / name} /usr/sbin/{name}" for name in names)
    return "\n".join([overlaid(folder, "/usr/sbin", "/etc"), *links, ""])
