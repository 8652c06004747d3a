"""docs/options.md as the parser of the command line has it. As a script, it prints that page:

PYTHONPATH=. python tests/support/options.py >docs/options.md
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from fvdfs import cli
from fvdfs.mountoptions import MOUNT_OPTIONS

HEAD = """# Options

Every argument and option of every command, as `fvdfs COMMAND --help` tells them. What a command does, and what the
options of a mount mean in full, is in [commands.md](commands.md). This page is made from the program: a test compares
them.
"""


def options_page() -> str:
    """The page."""
    action = next(action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    names = {choice.dest: choice.help for choice in action._choices_actions}
    parts = [HEAD, *(_command(name, action.choices[name], text or "") for name, text in names.items())]
    return "\n".join(parts)


def _command(name: str, parser: argparse.ArgumentParser, text: str) -> str:
    rows = list(_rows(parser))
    words = ["fvdfs", name, *(form for form, _ in rows if not form.startswith("-"))]
    options = ["[OPTIONS]"] if any(form.startswith("-") for form, _ in rows) else []
    lines = [f"## fvdfs {name}", "", f"`{' '.join([*words, *options])}`", "", _sentence(text)]
    if parser.description:
        lines += ["", _sentence(parser.description)]
    lines += _table([(form, meaning) for form, meaning in rows if meaning])
    if name == "mount":
        lines += ["", "Options of `-o`, separated by commas ([in full](commands.md#options-of-a-mount)):"]
        lines += _table([(option.form, option.help) for option in MOUNT_OPTIONS.values()])
    return "\n".join([*lines, ""])


def _table(rows: list[tuple[str, str]]) -> list[str]:
    lines = [f"| `{_escaped(form)}` | {_escaped(meaning)} |" for form, meaning in rows]
    return ["", "| | |", "|---|---|", *lines] if lines else []


def _rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
        form = str(value)
        if action.option_strings:
            form = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")
        elif action.nargs in ("?", "*"):
            form = f"[{value}]"
        elif action.nargs == "+":
            form = f"{value}…"
        yield form, (action.help or "") % {"default": action.default, "prog": parser.prog}


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else text + "."


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(options_page(), end="")
