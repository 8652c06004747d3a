"""How far the kernel reads ahead for a mount, and how much it gathers of writes: files below /sys/class/bdi.

There is one value of each for a mount, but an open file keeps the read-ahead that is set when its opening is answered
(`file_ra_state_init` in the kernel). So it is set for each opening, by what a miss costs there. Two openings at the
same moment may get each other's: that costs only speed. Only root may set them.

More read-ahead makes a long read through the page cache faster. But at a page fault of mmap(2) the kernel reads as
much around each missing page, until a hundred faults have shown that it is in vain. On a disk of this host that costs
little.

Measured over NBD, 30 pages spread over a file of 400 MiB by mmap (in brackets: computed), and dd of 100 to 300 MiB,
on two busy cores:

    read-ahead   30 pages   dd, server 5 ms away   1 ms       0 ms
       128 KiB    3.8 MiB                30 MB/s               86 MB/s
       256 KiB    7.5 MiB                57 MB/s   124 MB/s   80 to 110 MB/s
       512 KiB     15 MiB                91 MB/s   144 MB/s   64 to 148 MB/s
         1 MiB    (30 MiB)              124 MB/s   120 MB/s      156 MB/s
         4 MiB    106 MiB               243 MB/s   152 MB/s   86 to 169 MB/s
"""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 4096
REMOTE_READ_AHEAD_KIB = 512  # what still fills a link of 50 MB/s to a server 5 ms away, by the figures above
MAX_DIRTY_PERCENT = 40  # of what the kernel lets wait to be written, which is little else, so that writers wait for us


class KernelLimits:
    """The limits of one mount. The calls wait for no disk."""

    def __init__(self) -> None:
        self._folder = ""
        self._read_ahead = 0

    def raise_all(self, device: int) -> None:
        """Have the kernel do as much as pays with a file system that answers in user space. `device`: the mount's."""
        folder = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}"
        limits = (("read_ahead_kb", READ_AHEAD_KIB), ("max_ratio", MAX_DIRTY_PERCENT))
        for name, value in limits:
            try:
                _write(f"{folder}/{name}", value)
            except OSError as error:
                log.info("%s/%s stays as it is (%s): long transfers will be slower", folder, name, error.strerror)
            else:
                self._folder = folder
        self._read_ahead = READ_AHEAD_KIB

    def before_open(self, *, is_remote: bool) -> None:
        """An opening is about to be answered, of a disk that may be partly on another machine, or not."""
        value = REMOTE_READ_AHEAD_KIB if is_remote else READ_AHEAD_KIB
        if not self._folder or value == self._read_ahead:
            return
        self._read_ahead = value
        try:
            _write(f"{self._folder}/read_ahead_kb", value)
        except OSError as error:
            log.info("%s/read_ahead_kb stays as it is (%s)", self._folder, error.strerror)


def _write(path: str, value: int) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))
