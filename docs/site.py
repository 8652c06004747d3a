"""A hook of mkdocs: pages and files outside docs/ are part of the site, and links to them work, there as on GitHub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "SECURITY.md": "SECURITY.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
PAGES["CHANGELOG.md"] = "CHANGELOG.md"
CODE = re.compile("`[^`]+`")
SHOWN = ("examples/**/*", "LICENSE")
"""Files that pages link to, beside pages and pictures."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add what lies outside docs/."""
    for name, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / name).read_text()))
    for path in (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)) if path.is_file()):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Have links lead to where the site has what they name, and code in tables be what it is on GitHub."""
    markdown = re.sub(
        r"^\|.*", lambda row: CODE.sub(lambda code: code[0].replace("\\|", "|"), row[0]), markdown, flags=re.M
    )
    if page.file.src_uri in PAGES.values():  # which lies a folder higher
        return re.sub(r"\]\(docs/", "](", markdown)
    markdown = re.sub(r"\]\(\.\./README\.md", "](index.md", markdown)
    return re.sub(r"\]\(\.\./", "](", markdown)
