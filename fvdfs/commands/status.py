"""`fvdfs status`: how far the images of a mount are local, and what prefetching does. Blocks.

The process that serves the mount is asked, through extended attributes.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import ConsoleDimensions, Group
from rich.live import Live
from rich.table import Table

from fvdfs import mounts
from fvdfs.commands import rows
from fvdfs.commands.attributes import facts, mounted_by, why_missing
from fvdfs.commands.terminal import plain_console
from fvdfs.errors import UsageError, printable
from fvdfs.format.header import ceil_div
from fvdfs.sizes import human_size
from fvdfs.xattrs import IMAGES, LOG, PID, STATUS

INTERVAL = 1.0  # seconds between two looks
WATCHED = 200  # columns of what --watch shows where there is no terminal


def run(mountpoint: str, *, as_json: bool, watch: bool, log: bool = False) -> int:
    """Show the state of every image, once or until interrupted, or the last lines of the log.

    Raises UsageError where it is no mount, OSError.
    """
    mountpoint = os.path.abspath(mountpoint)
    mounts.refuse_dead(mountpoint)
    if not log and not watch and _is_disk(mountpoint):
        found = status(os.path.dirname(mountpoint))
        found["images"] = [image for image in found["images"] if image["name"] == os.path.basename(mountpoint)]
        if as_json:
            print(json.dumps(found, indent=2))
        else:
            print_status(found)
    elif log:
        _process(mountpoint)
        sys.stdout.write(os.getxattr(mountpoint, LOG).decode(errors="replace"))
    elif watch:
        watch_status(mountpoint)
    elif as_json:
        print(json.dumps(status(mountpoint), indent=2))
    else:
        print_status(status(mountpoint))
    return 0


def status(mountpoint: str) -> dict[str, Any]:
    """The state of every image of a mount, ready for JSON.

    Raises UsageError where it is no mount or another user's, OSError.
    """
    pid = _process(mountpoint)
    os.listdir(mountpoint)  # which has the mount look at the folder
    of_mount = facts(mountpoint, STATUS)
    caches = {os.path.realpath(image["image"]): image for image in of_mount.get("caches", [])}
    images = [
        image | (caches.pop(os.path.realpath(image["image"]), {}) if caches else {}) | {"name": image["name"]}
        for image in _images(mountpoint)
    ]
    images += list(caches.values())
    for refused in of_mount.get("refused", []):
        image = {"name": refused["name"], "image": os.path.join(of_mount["folder"], refused["name"])}
        images.append(image | {"open": False, "state": "refused", "failed": refused["reason"]})
    if (more := of_mount.get("refused_count", 0) - len(of_mount.get("refused", []))) > 0:
        images.append({"name": f"{more} more images", "open": False, "state": "refused", "failed": "see the log"})
    takeovers = of_mount.get("takeovers", 0)
    return {"mountpoint": mountpoint, "pid": pid, "takeovers": takeovers, "images": images}


def _images(mountpoint: str) -> Iterator[dict[str, Any]]:
    """The status of each image that appears, page by page. Raises UsageError, OSError."""
    seen: set[str] = set()
    first: int | None = 0
    while first is not None:
        page = facts(mountpoint, f"{IMAGES}{first}")
        for image in page["images"]:
            if image["name"] not in seen:  # one that has appeared meanwhile moves those behind it
                seen.add(image["name"])
                yield image
        first = page["next"]


def _process(mountpoint: str) -> int:
    """The process that serves it. Raises UsageError where it is no mount or another user's."""
    try:
        return int(os.getxattr(mountpoint, PID))
    except PermissionError as error:
        whose = mounted_by(mountpoint) or "ask as the user who mounted it, or have it mounted with --allow-other"
        raise UsageError(f"{mountpoint}: permission denied; {whose}") from error
    except (OSError, ValueError):
        what = "fvdfs is not mounted there"
        if os.path.isfile(mountpoint):
            what = "is not the mount point: name that"
        elif (mount := mounts.mount_at(os.path.dirname(mountpoint))) is not None and mount.is_ours:
            what = why_missing(mountpoint) or "there is no such file"
        raise UsageError(f"{mountpoint}: {what}") from None


def _is_disk(path: str) -> bool:
    """Whether this is a raw file in a mount of fvdfs."""
    mount = mounts.mount_at(os.path.dirname(path))
    return mount is not None and mount.is_ours and os.path.isfile(path)


def print_status(found: dict[str, Any]) -> None:
    """The state of every image as a table on the terminal."""
    cells = []
    for image in found["images"]:
        size = human_size(image["virtual_size"]).partition(" (")[0] if "virtual_size" in image else ""
        cells.append((printable(image["name"]), size, *_columns(image)))
    console = plain_console()
    head, *lines = rows.laid_out(cells, console.width if sys.stdout.isatty() else None)
    console.print(head, style="bold", soft_wrap=True)
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _columns(image: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    share = rows.percent(image["local_share"]) if "local_share" in image else ""
    if image.get("disks"):
        image["reason"] = ", ".join(
            filter(None, [f"base of {image['disks']} open disk{'s' * (image['disks'] > 1)}", image["reason"]])
        )
    if why := image.get("move_reason"):
        image["reason"] = ", ".join(filter(None, [why, image.get("reason", "")]))
    if image["state"] == "profile" and not image["reason"] and (image.get("first") or {}).get("from") == "source":
        image["reason"] = "copies first what its source used last"
    if remark := image.get("move_remark"):
        image["reason"] = ", ".join(filter(None, [image.get("reason", ""), remark]))
    if failed := image.get("open_failed"):
        at = failed["at"].replace("T", " ")[:19]
        image["failed"] = f"could not be opened at {at}: {failed['reason']}"
    if "rate" not in image:  # closed, or being closed
        return share, image["state"], "", "", image.get("failed", "") or image.get("reason", ""), ""
    copying = image["state"] in rows.COPYING
    rate = f"{image['rate'] / 1e6:.1f} MB/s" if image["rate"] and copying else ""
    left = rows.duration(image["eta"] if copying else None)
    passthrough = "on" if image["passthrough"] == "on" else f"no: {image['passthrough']}"
    if image["failed"] and not image.get("open_failed"):
        image["failed"] += f"; fvdfs check {shlex.quote(image['image'])} says what is lost"
    why = image["failed"] or _outage(image["base_outage"], image["reason"])
    return share, image["state"], rate, left, why, passthrough


def _outage(outage: dict[str, str | None] | None, reason: str) -> str:
    """The reason, or that the base is away; once it is back, beside the reason."""
    if outage is None:
        return reason
    since, until = (str(at).replace("T", " ")[:19] for at in (outage["since"], outage["until"]))
    if outage["until"] is None:
        fails_at = str(outage.get("fails_at") or "").replace("T", " ")[:19]
        then = f"what needs it waits, until {fails_at} at most" if fails_at else "what needs it waits"
        return f"base lost since {since}: {outage['reason']}; {then}"
    return ", ".join(filter(None, [reason, f"base back since {until}, lost at {since}"]))


def watch_status(mountpoint: str) -> None:
    """Show the disks that are open, again and again, until interrupted or unmounted."""
    console, before = plain_console(width=None if sys.stdout.isatty() else WATCHED), None
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            now = time.monotonic()
            try:
                found = status(mountpoint)
            except UsageError:
                if before is None:
                    raise
                return
            since, former = before or (now, None)
            shown = watched(rows.rows(former, found, now - since), len(found["images"]), console.size)
            if console.is_terminal and not console.is_dumb_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            before = now, found
            time.sleep(INTERVAL)


def watched(found: list[rows.Row], images: int, size: ConsoleDimensions) -> Group:
    """A table of as many disks as there are lines for, and how many more there are."""
    found, total = sorted(found, key=rows.NAME.key), rows.total(found, images)
    room = size.height - 2 - ceil_div(len(total), size.width) if sys.stdout.isatty() else len(found)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    columns = rows.fitting(size.width, [row.name for row in found[:room]], padding=1)
    for column, width in columns:
        justify: Literal["left", "right"] = "right" if column.at_right else "left"
        table.add_column(column.title, width=width, no_wrap=True, overflow="ellipsis", justify=justify)
    for row in found[:room]:
        table.add_row(
            *(rows.shortened(row.name, width) if column is rows.NAME else column.cell(row) for column, width in columns)
        )
    more = [f"and {len(found) - room} more; fvdfs top shows them all"] if len(found) > room else []
    return Group(total, *([table] if found else []), *more)
