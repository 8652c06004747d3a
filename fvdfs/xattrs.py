"""The extended attributes of a mount: those by which it is seen and steered, for both sides, and the host's own."""

from __future__ import annotations

PID = "user.fvdfs.pid"
"""Of the mount point: the process that serves it."""
DAEMON = "user.fvdfs.daemon"
"""Of the mount point and each file, not listed: how to see that the process has ended, as JSON (`unmount.py`)."""
LOG = "user.fvdfs.log"
"""Of the mount point, not listed: the last lines of the log."""
STATUS = "user.fvdfs.status"
"""Of a raw file: all that is known of it, as JSON. Of the mount point: `folder`, what `-o` says
of servers (`allow_url`, `tls_creds`), and the `caches` (`ops/caches.py`)."""
IMAGES = "user.fvdfs.images."
"""Of the mount point, and a number: the status of all its raw files from that one on, by name, as JSON, and the number
of the next page (`control.page`). Not listed."""
PREFETCH = "user.fvdfs.prefetch"
"""Of a raw file: what prefetching does; `start`, `pause` or `stop` can be written to it."""
MAP = "user.fvdfs.map"
"""Of a raw file: what of it is local, as JSON. Not listed, since it takes a while."""
SNAPSHOT = "user.fvdfs.snapshot"
"""Of a raw file: the path of the last snapshot of it; to make one, its name can be written, or nothing: the next
number. Why that was refused stands in the status."""
MOVE = "user.fvdfs.move"
"""Of a raw file: what its image says of a move to or from another host, in a word; written to it, what is to be done
(`ops/moves.py`). Why that was refused stands in the status."""
OWN = "user.fvdfs.own."
"""Of a raw file whose disk has moved, and a number: that part of the map of what it has beyond its template
(`ops/templates.py`). Not listed."""
HOT = "user.fvdfs.hot"
"""Of a raw file: what of the disk was used lately (`format/hot.py`), as it was when the disk was frozen, if it is. Not
listed."""
ROOM = "user.fvdfs.room"
"""Of a raw file: the size that it is going to get, in bytes, can be written to it before it is truncated to that. While
the kernel waits for a truncation, it lets nobody write to the file; so what takes time is done before. To read it is to
wait for that; a failure is the error. Not listed."""
STEERED = (PREFETCH, ROOM, SNAPSHOT, MOVE)
"""Of a raw file: those that can be written."""
LAYERS = "user.fvdfs.layers"
"""Of the mount point, not listed: the layers that are being merged, or were, as JSON (`ops/merging.py`). To be written:
`delete NAME.fvd`, `commit NAME.fvd`, `stop NAME.fvd`."""
UPGRADE = "user.fvdfs.upgrade"
"""Of the mount point, not listed: to be written, by who mounted it or root: the command that starts the daemon that is
to go on with a kept mount, words that end with a zero byte (`commands/upgrade.py`)."""
PARTS = {
    MOVE: "move",
    PREFETCH: "state",
    SNAPSHOT: "snapshot",
    "user.fvdfs.reason": "reason",
    "user.fvdfs.local_share": "local_share",
    "user.fvdfs.rate": "rate",
    "user.fvdfs.image": "image",
    "user.fvdfs.passthrough": "passthrough",
}
"""Of a raw file: single entries of its status."""
ACLS = ("system.posix_acl_access", "system.posix_acl_default")
"""Of the mount point and of a raw file: those of the folder and of the image."""
