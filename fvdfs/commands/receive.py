"""`fvdfs receive`, `activate` and `abandon`: a disk comes from another host, or does not. Blocks."""

from __future__ import annotations

import functools
import os
import select
from dataclasses import replace

from fvdfs import daemon
from fvdfs.commands.attributes import explained, facts, or_by_mount
from fvdfs.commands.base import inspect_base, open_base, refuse_changing
from fvdfs.commands.create import create_image, never_appears
from fvdfs.commands.migration import ask_mount
from fvdfs.errors import ImageError, UsageError, named
from fvdfs.format import migration
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import PAGE
from fvdfs.format.mailbox import Wish
from fvdfs.format.migration import Incoming, Record, Target, fits
from fvdfs.image.following import stamp_of
from fvdfs.image.migration import new_secret
from fvdfs.image.policy import given_tls_creds
from fvdfs.layers.move import change_record, record_of
from fvdfs.qmp import ANSWER, WAITS, Monitor, NoAnswer
from fvdfs.store.locations import Location, is_local, parse_location
from fvdfs.store.references import RAW
from fvdfs.store.source import ASKED_PATIENCE, ask, epoch_of, tell_of_end
from fvdfs.xattrs import PREFETCH, STATUS

FOLLOW_DELAY = 1  # seconds after which all that is missing is copied, once the disk is written here


def run_receive(
    url: str,
    image: str,
    *,
    keep_base: str = "",
    base_format: str = "",
    hot_first: bool = True,
    into: Incoming | None = None,
) -> int:
    """Make an image that stands on a disk that another host gives. Raises UsageError, ImageError, OSError.

    `keep_base`: the name of a template that it is to stand on, as the source does; empty: nothing. `hot_first`: once
    it is here, copy first what was used last there. `into`: a move whose epoch and secret are known already.
    """
    if base_format and not keep_base:
        raise UsageError("--base-format needs a template: give --keep-base")
    if remark := never_appears(image):
        raise UsageError(remark)
    if os.path.isfile(image):
        raise UsageError(f"{image}: exists already; choose another name, or remove it")
    location = parse_location(url)
    if is_local(url) or location.protocol.get("driver") != "nbd" or url.startswith("json:"):
        raise UsageError(f"{url}: to be written as nbd://HOST/NAME or nbds://HOST/NAME, as fvdfs serve prints it")
    with named(url):
        epoch = daemon.run_loop(functools.partial(epoch_of, location, given_tls_creds.get()))
    into = into or Incoming(Target.RECEIVING, epoch, new_secret())
    if into.epoch != epoch:
        raise UsageError(f"{url}: is given there for another move (epoch {epoch}, not {into.epoch})")
    profile_delay = 0 if hot_first else -1
    if keep_base:
        return _on_template(location, into, url, image, keep_base, base_format, profile_delay)
    options = CreateOptions(
        base_img=url,
        base_img_fmt=RAW,
        block_size=PAGE,
        copy_on_read=True,
        prefetch_delay=FOLLOW_DELAY,
        profile_delay=profile_delay,
    )
    for remark in create_image(image, None, options, record=Record(into)):
        daemon.complain(remark)
    return 0


def _on_template(
    location: Location, into: Incoming, url: str, image: str, template: str, base_format: str, profile_delay: int
) -> int:
    if not fits(url):
        raise UsageError(f"{url}: is too long for --keep-base; use a shorter name for the host or the disk")
    base = inspect_base(image, template, base_format)
    refuse_changing(base)
    size = inspect_base(image, url, RAW).length
    stamp = daemon.run_loop(functools.partial(_stamp, image, template, base.format))
    into = replace(into, source=url, stamp=stamp)
    with named(url):
        daemon.run_loop(functools.partial(ask, location, given_tls_creds.get(), into, Wish.STAND, ASKED_PATIENCE))
    options = CreateOptions(
        base_img=template,
        base_img_fmt=base.format,
        block_size=PAGE,
        base_to_end=True,
        profile_delay=profile_delay,
    )
    for remark in create_image(image, size, options, record=Record(into)):
        daemon.complain(remark)
    return 0


async def _stamp(image: str, template: str, base_format: str) -> str:
    side, _ = await open_base(image, template, base_format, "")
    try:
        return await stamp_of(side.read, side.size)
    finally:
        await side.close()


def run_activate(raw: str, qmp: str = "") -> int:
    """Have a disk in a mount be taken over from its source.

    `qmp`: the monitor of the machine that is to come, which has it; not before that runs here.

    Raises UsageError, ImageError, OSError; NoAnswer where that has ended.
    """
    if not raw.endswith(".raw"):
        raise UsageError(f"{raw}: name the raw file in its mount")
    with explained(raw):
        if qmp:
            _activate_once_it_runs(raw, qmp)
        else:
            ask_mount(raw, "activate")
        if (found := facts(raw, STATUS))["move"] == Target.ACTIVE.value and not found["open"]:
            os.setxattr(raw, PREFETCH, b"start")  # sooner than the mount does
    return 0


def _activate_once_it_runs(raw: str, qmp: str) -> None:
    """Raises as `run_activate`."""
    facts(raw, STATUS)
    with Monitor(qmp) as monitor:
        if not monitor.opens(raw):
            raise UsageError(f"{qmp}: the machine there has not {raw} as its disk")
        try:
            _wait_until_it_runs(monitor)
            _activate_at_last(raw, monitor)
        except NoAnswer as error:
            raise NoAnswer(f"{error}; the machine there has ended, and {raw} was not taken over") from None


def _wait_until_it_runs(monitor: Monitor) -> None:
    """Raises NoAnswer."""
    told = False
    while monitor.call("query-status", ANSWER)["status"] == WAITS:
        if not told:
            print(f"waiting for the machine to run at {monitor.path}", flush=True)
        told = True
        select.select([monitor], [], [], ANSWER)  # until RESUME, or another event
        monitor.skip_events()


def _activate_at_last(raw: str, monitor: Monitor) -> None:
    """As often as it takes, while the machine is there. Raises NoAnswer, UsageError, OSError."""
    said = ""
    while True:
        try:
            ask_mount(raw, "activate")
            return
        except ImageError as error:  # its source cannot yet, or cannot be reached
            if said != (said := str(error)):
                daemon.complain(f"{said}; trying again")
        monitor.skip_events()


def run_abandon(disk: str) -> int:
    """Give a move up at its target, and tell the source. Raises UsageError, ImageBusy, ImageError, OSError."""
    if disk.endswith(".raw"):
        with explained(disk):
            ask_mount(disk, "abandon")
        return 0
    with or_by_mount():
        change_record(disk, migration.abandon)
    record, base = record_of(disk)
    into = record.incoming
    assert into is not None
    source = parse_location(into.url(base))
    daemon.run_loop(functools.partial(tell_of_end, source, given_tls_creds.get(), into, ASKED_PATIENCE))
    return 0
