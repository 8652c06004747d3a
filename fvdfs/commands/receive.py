"""`fvdfs receive`, `activate` and `abandon`: a disk comes from another host, or does not. Blocks."""

from __future__ import annotations

import functools

from fvdfs import daemon
from fvdfs.commands.attributes import explained, or_by_mount
from fvdfs.commands.create import create_image, never_appears
from fvdfs.commands.migration import ask_mount
from fvdfs.errors import UsageError, named
from fvdfs.format import migration
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import PAGE
from fvdfs.format.migration import Incoming, Record, Target
from fvdfs.image.chain import open_chain
from fvdfs.image.migration import new_number
from fvdfs.image.policy import Policy, given_tls_creds
from fvdfs.layers.move import change_record
from fvdfs.store.locations import is_local, parse_location
from fvdfs.store.references import RAW
from fvdfs.store.source import ASKED_PATIENCE, epoch_of, tell_of_end

FOLLOW_DELAY = 1  # seconds after which all that is missing is copied, once the disk is written here


def run_receive(url: str, image: str) -> int:
    """Make an image that stands on a disk that another host gives. Raises UsageError, ImageError, OSError."""
    if remark := never_appears(image):
        raise UsageError(remark)
    location = parse_location(url)
    if is_local(url) or location.protocol.get("driver") != "nbd" or url.startswith("json:"):
        raise UsageError(f"{url}: to be written as nbd://HOST/NAME or nbds://HOST/NAME, as fvdfs serve prints it")
    with named(url):
        epoch = daemon.run_loop(functools.partial(epoch_of, location, given_tls_creds.get()))
    options = CreateOptions(
        base_img=url,
        base_img_fmt=RAW,
        block_size=PAGE,
        copy_on_read=True,
        prefetch_delay=FOLLOW_DELAY,
    )
    record = Record(Incoming(Target.RECEIVING, epoch, new_number()))
    for remark in create_image(image, None, options, record=record):
        daemon.complain(remark)
    return 0


def run_activate(raw: str) -> int:
    """Have a disk in a mount be taken over from its source. Raises UsageError, ImageError, OSError."""
    if not raw.endswith(".raw"):
        raise UsageError(f"{raw}: name the raw file in its mount")
    with explained(raw):
        ask_mount(raw, "activate")
    return 0


def run_abandon(disk: str) -> int:
    """Give a move up at its target, and tell the source. Raises UsageError, ImageBusy, ImageError, OSError."""
    if disk.endswith(".raw"):
        with explained(disk):
            ask_mount(disk, "abandon")
        return 0
    with or_by_mount():
        change_record(disk, migration.abandon)
    layer = open_chain(disk, Policy(), top_only=True).layers[0]
    try:
        source, into = parse_location(layer.header.base_img), layer.record().incoming
    finally:
        layer.meta.close()
    assert into is not None
    daemon.run_loop(functools.partial(tell_of_end, source, given_tls_creds.get(), into, ASKED_PATIENCE))
    return 0
