"""What is made of the command line when the package is built: manual pages, and completion for bash, zsh and fish.

All come from the one parser of `fvdfs/cli.py`, by argparse-manpage and shtab, which the build needs and fvdfs does not.
Without these it says so, and leaves them out: a distribution may build where it cannot fetch them. They are installed
below `share/`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import setuptools

sys.path.insert(0, str(Path(__file__).parent))

from fvdfs import __version__, cli
from fvdfs.mountoptions import MOUNT_OPTIONS
from fvdfs.store.references import BASE_FORMATS

PAGES = "share/man/man1"
COMPLETIONS = {
    "bash": ("share/bash-completion/completions", "fvdfs"),
    "zsh": ("share/zsh/site-functions", "_fvdfs"),
    "fish": ("share/fish/vendor_completions.d", "fvdfs.fish"),
}
"""Where each shell looks, and for which name."""


# --- manual pages -------------------------------------------------------------------------------


def manual_pages() -> Iterator[tuple[str, str]]:
    """The file names and texts of a page for fvdfs, and of one for each command."""
    from argparse_manpage.manpage import Manpage

    parser = cli._parser()
    [action] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    pages = [("fvdfs", parser, parser.description or "")]
    pages += [(f"fvdfs-{each.dest}", action.choices[each.dest], each.help or "") for each in action._choices_actions]
    # The page of fvdfs lists the commands, each of which has a page of its own.
    action.choices = action._name_parser_map = {}
    for name, each, text in pages:
        paragraphs, each.epilog = each.epilog or "", None
        page = Manpage(each, {"project_name": "fvdfs", "version": __version__, "manual_title": "fvdfs"})
        page.prog, page.description = name, text.rstrip(".")
        for paragraph in paragraphs.split("\n\n"):
            title, _, lines = paragraph.partition(":\n")
            if lines:
                section = "mount options" if title.startswith("options for -o") else title  # names are in capitals
                page.add_section(section, ">", verbatim(lines))
            elif paragraph:  # more of what stands above
                page.add_section(section, ">", f"\n.sp\n{verbatim(paragraph)}")
        others = "\\fBfvdfs\\fR(1)" if name != "fvdfs" else ", ".join(f"\\fB{name}\\fR(1)" for name, _, _ in pages[1:])
        page.add_section("see also", ">", others.replace("-", "\\-"))
        roff = str(page).replace(page.date.replace("-", "\\-"), page.date, 1)  # mandoc knows no other date
        yield f"{name}.1", re.sub("[^\0-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", roff)


def verbatim(text: str) -> str:
    """Lines as they are, in roff."""
    lines = [line.removeprefix("  ").replace("\\", "\\e").replace("-", "\\-") for line in text.splitlines()]
    return "\n".join([".nf", *(f"\\&{line}" for line in lines), ".fi"])


# --- completion ---------------------------------------------------------------------------------

OPTIONS = " ".join(name for name in MOUNT_OPTIONS if name not in ("ro", "rw"))
FORMATS = " ".join(BASE_FORMATS)
PREAMBLE = {
    "bash": f"""
_fvdfs_image_files() {{ compgen -f -X '!*.fvd' -- "$1"; compgen -d -- "$1"; }}
_fvdfs_disk_files() {{ _fvdfs_image_files "$1"; compgen -f -X '!*.raw' -- "$1"; }}
_fvdfs_formats() {{ compgen -W "{FORMATS}" -- "$1"; }}
_fvdfs_options() {{
  local given=""
  [[ $1 == *,* ]] && given="${{1%,*}},"
  compgen -P "$given" -W "{OPTIONS}" -- "${{1##*,}}"
}}
""",
    "fish": f"""
function __fvdfs_files_of
  for found in (__fish_complete_path (commandline -ct))
    if string match -qr -- "$argv[1]" (string split -m1 \\t -- $found)[1]
      echo $found
    end
  end
end
function __fvdfs_images; __fvdfs_files_of '(\\.fvd|/)$'; end
function __fvdfs_disks; __fvdfs_files_of '(\\.fvd|\\.raw|/)$'; end
function __fvdfs_options
  set -l given (string match -r -- '^.*,' (commandline -ct))
  for name in {OPTIONS}; echo $given$name; end
end
""",
}
FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}
FOLDER = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "fish": "(__fish_complete_directories)"}
IMAGE = {"bash": "_fvdfs_image_files", "zsh": "_files -g '*.fvd'", "fish": "(__fvdfs_images)"}
DISK = {"bash": "_fvdfs_disk_files", "zsh": "_files -g '*.(fvd|raw)'", "fish": "(__fvdfs_disks)"}
FORMAT = {"bash": "_fvdfs_formats", "zsh": f"({FORMATS})", "fish": FORMATS}
MOUNT_OPTION = {"bash": "_fvdfs_options", "zsh": f"_values -s , option {OPTIONS}", "fish": "(__fvdfs_options)"}
BY_METAVAR = {
    **dict.fromkeys(("IMAGE", "SNAPSHOT", "EXPORT"), IMAGE),
    **dict.fromkeys(
        ("DISK", "DISK|DIR", "DISK[@SNAPSHOT]", "IMAGE|RAW", "MOUNTPOINT|RAW", "MOUNTPOINT/NAME.raw"), DISK
    ),
    **dict.fromkeys(("FILE", "SRC", "DST", "A", "B", "OUT", "TARGET", "TEMPLATE", "PATH", "SOCKET"), FILE),
    **dict.fromkeys(("FILE|IMAGE", "FILE|auto", "NAME|FILE"), FILE),
    **dict.fromkeys(("DIR", "MOUNTPOINT"), FOLDER),
    "FMT": FORMAT,
}
"""How an argument is completed, by the word that stands for it in the help."""


def completion(shell: str) -> str:
    """The script for a shell."""
    import shtab

    parser = cli._parser()
    for name, command in cli._commands(parser).items():
        for action in command._actions:
            how = BY_METAVAR.get(str(action.metavar))
            if name == "mount" and action.metavar == "OPTIONS":
                how = MOUNT_OPTION
            if how is not None:
                setattr(action, "complete", how)  # noqa: B010
    return str(shtab.complete(parser, shell, preamble=PREAMBLE))


# --- the build ----------------------------------------------------------------------------------


def made(warn: Callable[[str], None]) -> Iterator[tuple[str, str, str]]:
    """The folder, name and text of each file. `warn` is told what cannot be made."""
    try:
        yield from ((PAGES, name, text) for name, text in manual_pages())
    except ModuleNotFoundError as error:
        warn(f"no manual pages are made: {error.name} is missing")
    for shell, (folder, name) in COMPLETIONS.items():
        try:
            yield folder, name, completion(shell)
        except ModuleNotFoundError as error:
            warn(f"no completion for {shell} is made: {error.name} is missing")


class InstallData(setuptools.Distribution().get_command_class("install_data")):
    """Makes the files that it installs."""

    def run(self) -> None:
        place = Path(self.get_finalized_command("build").build_base)
        files: dict[str, list[str]] = {}
        for folder, name, text in made(self.warn):
            path = place / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            files.setdefault(folder, []).append(str(path))
        self.data_files = list(files.items())
        super().run()


# Without files of data, however few, none are installed.
setuptools.setup(cmdclass={"install_data": InstallData}, data_files=[(PAGES, [])])
