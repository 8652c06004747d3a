"""What mount(8) runs for a mount of fvdfs: by hand, for /etc/fstab, and for a mount unit of systemd.

    mount.fuse.fvdfs DIR MOUNTPOINT [-sfnv] [-o OPTIONS] [-t TYPE]     (also as mount.fvdfs)

mount(8), "EXTERNAL HELPERS", says what the letters mean. It looks for the program in /sbin. Where there is none for
fuse.fvdfs, it runs mount.fuse, of the package fuse3, which runs `fvdfs DIR MOUNTPOINT -o OPTIONS`; so that is
understood as well (`cli.main`).

Exit codes are those of mount(8): 0 done, 1 what makes no sense, 8 interrupted, 32 it cannot be mounted.
"""

from __future__ import annotations

import getopt
import os
import signal
import sys
from collections.abc import Sequence

from fvdfs import daemon

NO_SENSE, INTERRUPTED, FAILED = 1, 8, 32
USAGE = "usage: DIR MOUNTPOINT [-sfnv] [-o OPTIONS]"


def mount(words: Sequence[str]) -> int:
    """`mount.fuse.fvdfs`; the exit code."""
    try:
        given, names = getopt.gnu_getopt(list(words), "sfnvrwN:t:o:")
    except getopt.GetoptError as error:
        return _nonsense(f"{error.msg}; {USAGE}")
    letters = {letter for letter, _ in given}
    if len(names) != 2:
        return _nonsense(USAGE)
    if "-N" in letters:
        return _nonsense("-N: run mount(8) in that namespace: nsenter --mount=…")
    try:
        return _mount(names[0], names[1], letters, [value for letter, value in given if letter == "-o"])
    except (Exception, KeyboardInterrupt) as error:
        return INTERRUPTED if daemon.ended_by(error) == daemon.INTERRUPTED else FAILED


def _nonsense(text: str) -> int:
    daemon.complain(text)
    return NO_SENSE


def _mount(folder: str, mountpoint: str, letters: set[str], options: list[str]) -> int:
    from fvdfs.commands.mount import run

    if "nofail" in ",".join(options).split(",") and not os.path.lexists(folder):
        return 0  # as mount(8) has it for a device that does not exist
    code = run(
        folder,
        mountpoint,
        [*options, *["ro"] * ("-r" in letters)],
        foreground=False,
        read_only=False,
        allow_other=False,
        log_file="",
        debug=False,
        sloppy="-s" in letters,
        fake="-f" in letters,
    )
    if not code and "-v" in letters:
        print(f"fvdfs: {folder} mounted on {mountpoint}.")
    return FAILED if code else 0


def mount_entry() -> None:
    """The program `mount.fuse.fvdfs`."""
    daemon.prepare()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(daemon.run_program(lambda: mount(sys.argv[1:])))
