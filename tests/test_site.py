"""The site of the documentation is built from the pages without a warning, and nothing of it comes from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # which advertises another program
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_each_page_is_there(site: Path) -> None:
    pages = {path.stem for path in ROOT.glob("docs/*.md")} | {"index", "SECURITY", "CONTRIBUTING", "CHANGELOG"}
    assert {path.stem for path in site.glob("*.html")} == pages | {"404"}


def test_each_link_leads_somewhere(site: Path) -> None:
    """Those to files beside the pages, too, which mkdocs does not look at."""
    lost = []
    for page in site.glob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if "://" not in link and not (site / unquote(link)).exists():
                lost.append(f"{page.name}: {link}")
    assert [link for link in lost if not link.startswith("404.html: /")] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loading = r'<(?:script|img|link rel="(?:stylesheet|preconnect)")[^>]*(?:src|href)="(https?://[^"]+)'
    assert [found for page in site.glob("*.html") for found in re.findall(loading, page.read_text())] == []


def test_code_in_tables_is_as_it_is_typed(site: Path) -> None:
    """A bar has a backslash there, which GitHub takes away."""
    assert "<code>--journal-size N|none</code>" in (site / "options.html").read_text()
