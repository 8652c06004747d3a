"""The map of a disk as a page for a browser (`map --html`): one file that needs no other. Pure.

Each square of the map is a part of the disk, and is filled from the left by what is stored, in the base and nowhere, as
wide as its share, but wide enough to be seen. The page follows the reader's choice of dark or light; without scripts,
a square's tooltip is that of the browser.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from fvdfs.commands.rows import local, percent
from fvdfs.image.map import MEANINGS, totals
from fvdfs.sizes import human_size

FIRST = "<!DOCTYPE html><!-- made by fvdfs map -->"
"""How a page begins, by which an older one is known."""
PER_ROW = 50
_SIDE, _GAP, _LABELS = 12, 2, 74  # units of the picture: a square, between two, for the labels of rows
_LEAST = 0.15  # of a square, for a kind that is in it

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #1d2125; --soft: #5d666f; --line: #e2e5e8;
  --stored: #2e8b57; --base: #4f7fd0; --hole: #d5d9dd; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e8eaec; --soft: #9aa4ad;
  --line: #2d3339; --stored: #45b97c; --base: #5c8fe6; --hole: #343b42; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.25rem;
  margin-top: 1.1rem; }
.bar { display: flex; height: 18px; border-radius: 5px; overflow: hidden; margin: .2rem 0 .8rem; }
.bar i { min-width: 3px; }
.stored { fill: var(--stored); background: var(--stored); } .base { fill: var(--base); background: var(--base); }
.hole { fill: var(--hole); background: var(--hole); }
table { border-collapse: collapse; width: 100%; }
td { padding: .2rem .8rem .2rem 0; vertical-align: baseline; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td b { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .55em; }
td.m { color: var(--soft); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 9px system-ui, sans-serif; }
g:hover rect { stroke: var(--ink); stroke-width: 1; }
#tip { position: fixed; display: none; pointer-events: none; background: var(--ink); color: var(--paper);
  white-space: pre; padding: .35rem .6rem; border-radius: 6px; font-size: 13px; z-index: 1; }
@media (max-width: 40rem) { td.m { display: none; } }
"""
_SCRIPT = """
const tip = document.getElementById("tip"), map = document.querySelector("svg");
for (const title of map.querySelectorAll("title")) {
  const part = title.parentNode;
  part.setAttribute("aria-label", title.textContent);
  title.remove();
}
map.addEventListener("mousemove", (event) => {
  const part = event.target.closest("g");
  tip.style.display = part ? "block" : "none";
  if (!part) return;
  tip.textContent = part.getAttribute("aria-label");
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, room)) + "px";
  tip.style.top = (event.clientY > 120 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18) + "px";
});
map.addEventListener("mouseleave", () => { tip.style.display = "none"; });
"""


def page(found: dict[str, Any], name: str, at: str) -> str:
    """The map of the disk `name`, as it was `at` that time."""
    title = html.escape(name)
    size, cell = short(found["virtual_size"]), short(found["cell_size"])
    return "\n".join(
        [
            FIRST,
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{title}: map</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{title}</h1><p>a disk of {size}, as it was at {html.escape(at)}</p>",
            "<section>",
            *_kinds(found),
            f"<p>Local, so not read from the base: {html.escape(local(found))}.</p>",
            "</section><section>",
            f"<p>Each square is {cell} of the disk, filled by the share of each kind; a row is "
            f"{short(found['cell_size'] * PER_ROW)}.</p>",
            *_squares(found),
            f'</section></main><div id="tip"></div><script>{_SCRIPT}</script></body></html>\n',
        ]
    )


def short(size: int) -> str:
    """A size without the exact number of bytes."""
    return human_size(size).partition(" (")[0]


def visible(counts: list[int]) -> list[float]:
    """The shares of the kinds in a square; one that is there at all has so much that it is seen."""
    whole = sum(counts) or 1
    shares = [max(count / whole, _LEAST) if count else 0.0 for count in counts]
    return [share / (sum(shares) or 1) for share in shares]


def _kinds(found: dict[str, Any]) -> Iterator[str]:
    """What the disk is made of: a bar, and a line for each kind."""
    whole, sizes = found["virtual_size"] or 1, totals(found)
    parts = (f'<i class="{kind}" style="flex:{size}" title="{kind}"></i>' for kind, size in sizes.items() if size)
    yield f'<div class="bar">{"".join(parts)}</div><table>'
    for kind, size in sizes.items():
        share, meaning = html.escape(percent(size / whole)), html.escape(MEANINGS[kind])
        yield (
            f'<tr><td><b class="{kind}"></b>{kind}</td><td class="n">{share}</td><td class="n">{short(size)}</td>'
            f'<td class="m">{meaning}</td></tr>'
        )
    yield "</table>"


def _squares(found: dict[str, Any]) -> Iterator[str]:
    """The squares, with where each row begins."""
    cells, step = found["cells"], _SIDE + _GAP
    rows = -(-len(cells) // PER_ROW)
    yield f'<svg viewBox="0 0 {_LABELS + PER_ROW * step} {max(1, rows) * step}" role="img" aria-label="map">'
    for number, counts in enumerate(cells):
        row, column = divmod(number, PER_ROW)
        start = number * found["cell_size"]
        if not column:
            yield f'<text x="{_LABELS - 8}" y="{row * step + 9.5:g}" text-anchor="end">{short(start)}</text>'
        x, parts = float(_LABELS + column * step), []
        for kind, share in zip(found["states"], visible(counts), strict=True):
            if share:
                width = _SIDE * share
                where = f'x="{x:.5g}" y="{row * step}" width="{width:.4g}" height="{_SIDE}"'
                parts.append(f'<rect class="{kind}" {where}/>')
                x += width
        yield f"<g><title>{html.escape(_tip(found, start, counts))}</title>{''.join(parts)}</g>"
    yield "</svg>"


def _tip(found: dict[str, Any], start: int, counts: list[int]) -> str:
    whole = sum(counts) or 1
    kinds = zip(found["states"], counts, strict=True)
    shares = (f"{kind} {percent(size / whole)}, {short(size)}" for kind, size in kinds if size)
    return "\n".join([f"{short(start)} to {short(start + whole)}", *shares])
