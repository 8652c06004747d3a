"""`fvdfs receive` and `fvdfs activate`: a disk comes from another host. Blocks."""

from __future__ import annotations

import functools

from fvdfs import daemon
from fvdfs.commands.attributes import explained
from fvdfs.commands.create import create_image, never_appears
from fvdfs.commands.migration import ask_mount
from fvdfs.errors import UsageError, named
from fvdfs.format.creation import CreateOptions
from fvdfs.format.header import PAGE
from fvdfs.format.migration import Incoming, Record, Target
from fvdfs.image.migration import new_number
from fvdfs.image.policy import given_tls_creds
from fvdfs.store.locations import is_local, parse_location
from fvdfs.store.references import RAW
from fvdfs.store.source import epoch_of

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
