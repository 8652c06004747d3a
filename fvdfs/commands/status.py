"""`fvdfs status`: how far the images of a mount are local, and what prefetching does. Blocks.

The process that serves the mount is asked, through extended attributes.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from fvdfs import mounts
from fvdfs.commands.attributes import facts
from fvdfs.commands.terminal import plain_console
from fvdfs.errors import UsageError, printable
from fvdfs.sizes import human_size
from fvdfs.xattrs import PID, STATUS

INTERVAL = 0.5  # seconds between two looks
WIDE = 200  # columns of a table that is not shown on a terminal, so that nothing is folded


def run(mountpoint: str, *, as_json: bool, watch: bool) -> int:
    """Show the state of every image, once or until interrupted. Raises UsageError where it is no mount, OSError."""
    mountpoint = os.path.abspath(mountpoint)
    mounts.refuse_dead(mountpoint)
    if watch:
        watch_status(mountpoint)
    elif as_json:
        print(json.dumps(status(mountpoint), indent=2))
    else:
        print_status(mountpoint)
    return 0


def status(mountpoint: str) -> dict[str, Any]:
    """The state of every image of a mount, ready for JSON; of one that cannot be asked, the state is "unreadable".

    Raises UsageError where it is no mount or another user's, OSError.
    """
    try:
        pid = int(os.getxattr(mountpoint, PID))
    except PermissionError:
        raise UsageError(f"{mountpoint}: permission denied; ask as the user who mounted it") from None
    except (OSError, ValueError):
        what = "is not the mount point: name that" if os.path.isfile(mountpoint) else "fvdfs is not mounted there"
        raise UsageError(f"{mountpoint}: {what}") from None
    caches = {os.path.realpath(image["image"]): image for image in facts(mountpoint, STATUS).get("caches", [])}
    images = []
    for name in sorted(os.listdir(mountpoint)):
        try:
            path = os.path.join(mountpoint, name)
            image = facts(path, STATUS)
            images.append(image | caches.pop(os.path.realpath(image["image"]), {}) | {"name": image["name"]})
        except OSError as error:
            if error.errno in mounts.DEAD:
                raise
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # gone meanwhile
                images.append({"name": name, "open": False, "state": "unreadable", "failed": error.strerror})
    return {"mountpoint": mountpoint, "pid": pid, "images": images + list(caches.values())}


def print_status(mountpoint: str) -> None:
    """The state of every image as a table on the terminal."""
    table = Table(box=None, pad_edge=False)
    for title in ("disk", "size", "local", "state", "rate", "left", "why", "passed through"):
        table.add_column(title, overflow="fold")
    for image in status(mountpoint)["images"]:
        size = human_size(image["virtual_size"]).partition(" (")[0] if "virtual_size" in image else ""
        table.add_row(printable(image["name"]), size, *_columns(image))
    plain_console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _columns(image: dict[str, Any]) -> tuple[str, str, str, str, str, str]:
    share = f"{image['local_share']:.1%}" if "local_share" in image else ""
    if image.get("disks"):
        image["reason"] = ", ".join(
            filter(None, [f"base of {image['disks']} open disk{'s' * (image['disks'] > 1)}", image["reason"]])
        )
    if why := image.get("move_reason"):
        image["reason"] = ", ".join(filter(None, [why, image.get("reason", "")]))
    if "rate" not in image:  # closed, or being closed
        return share, image["state"], "", "", image.get("failed", "") or image.get("reason", ""), ""
    rate = f"{image['rate'] / 1e6:.1f} MB/s" if image["rate"] else ""
    left = _duration(image["eta"]) if image["eta"] is not None else ""
    passthrough = "on" if image["passthrough"] == "on" else f"no: {image['passthrough']}"
    why = image["failed"] or _outage(image["base_outage"], image["reason"])
    return share, image["state"], rate, left, why, passthrough


def _outage(outage: dict[str, str | None] | None, reason: str) -> str:
    """The reason, or that the base is away; once it is back, beside the reason."""
    if outage is None:
        return reason
    since, until = (str(at).replace("T", " ")[:19] for at in (outage["since"], outage["until"]))
    if outage["until"] is None:
        return f"base lost since {since}: {outage['reason']}"
    return ", ".join(filter(None, [reason, f"base back since {until}, lost at {since}"]))


def _duration(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def watch_status(mountpoint: str) -> None:
    """Show a live bar for each open image, until interrupted or unmounted."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]:<8}"),
        TextColumn("{task.fields[rate]:>11}"),
        TextColumn("{task.fields[left]:>8}"),
        TextColumn("{task.fields[why]}", style="yellow", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=plain_console()) as progress:
        while True:
            try:
                images = {image["name"]: image for image in status(mountpoint)["images"] if image["open"]}
            except UsageError:
                if not tasks:
                    raise
                return
            for name in [name for name in tasks if name not in images]:
                progress.remove_task(tasks.pop(name))
            for name, image in images.items():
                if name not in tasks:
                    tasks[name] = progress.add_task(printable(name), state="", rate="", left="", why="")
                _, state, rate, left, why, _ = _columns(image)
                total = image["base_size"] or 1
                done = image["local_bytes"] if image["base_size"] else 1
                progress.update(tasks[name], total=total, completed=done, state=state, rate=rate, left=left, why=why)
            time.sleep(INTERVAL)
