"""What a mount tells a monitoring system: Prometheus text at `/metrics`, of a port or a socket (`-o metrics`).

A scrape takes a snapshot in the event loop, which is quick, and makes text of it in a thread. Only images that are open
have series of their own, so that a folder of a thousand disks makes no thousand of each.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import socketserver
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any

import trio
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from fvdfs import __version__
from fvdfs.counters import BOUNDS
from fvdfs.errors import UsageError
from fvdfs.mountoptions import metrics_address
from fvdfs.ops.control import status
from fvdfs.ops.filesystem import Filesystem
from fvdfs.prefetch.prefetcher import Activity

log = logging.getLogger(__name__)

CLIENTS = 8  # that are answered side by side
CLIENT_PATIENCE = 10.0  # seconds for a client to ask, and to take the answer
LOOK = 1.0  # seconds between looks at how late the event loop is
_BOUNDS = [*(repr(bound) for bound in BOUNDS), "+Inf"]

_GAUGES = {
    "virtual_size": ("fvdfs_size_bytes", "size of the disk"),
    "base_size": ("fvdfs_base_size_bytes", "what of the disk can come from its base"),
    "local_bytes": ("fvdfs_local_bytes", "what of the base need not be read from it any more"),
    "local_share": ("fvdfs_local_ratio", "local bytes of base bytes"),
    "disk_local_share": ("fvdfs_disk_local_ratio", "of the disk, what need not be read from the base"),
    "rate": ("fvdfs_prefetch_rate_bytes", "bytes a second that prefetching copies"),
    "eta": ("fvdfs_prefetch_left_seconds", "until all is local, at this rate"),
    "journal_used": ("fvdfs_journal_used_bytes", "of the journal, since the last checkpoint"),
    "journal_size": ("fvdfs_journal_size_bytes", "of the journal"),
}
"""Of an open image: entries of its status that are numbers, as they are now."""
_COUNTERS = {
    "base_read": ("fvdfs_base_read_bytes", "bytes that were asked of the base"),
    "prefetched": ("fvdfs_prefetched_bytes", "bytes that prefetching has copied"),
    "commits": ("fvdfs_commits", "commits of metadata"),
}
"""The same, of those that only grow while it is open."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Of a mount."""

    folder: str
    images: int
    """That are shown in the mount, as far as they were looked at."""
    open: list[dict[str, Any]]
    """The status of each image that is open, and of each cache that disks share."""
    lag: float
    """Seconds by which the event loop was late, at most, in the last second."""
    takeovers: int = 0
    """How often another process has gone on with the mount."""


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """All that is told."""
    yield InfoMetricFamily("fvdfs", "the mount", value={"version": __version__, "folder": snapshot.folder})
    yield GaugeMetricFamily("fvdfs_images", "images that the mount shows", value=snapshot.images)
    yield GaugeMetricFamily("fvdfs_open_images", "images that are open", value=len(snapshot.open))
    yield GaugeMetricFamily(
        "fvdfs_event_loop_lag_seconds", "by which the event loop was late, at most, in a second", value=snapshot.lag
    )
    yield CounterMetricFamily(
        "fvdfs_takeovers", "times that another process has gone on with the mount", value=snapshot.takeovers
    )
    for key, (name, meaning) in _GAUGES.items():
        yield _filled(GaugeMetricFamily(name, meaning, labels=["disk"]), snapshot, key)
    for key, (name, meaning) in _COUNTERS.items():
        yield _filled(CounterMetricFamily(name, meaning, labels=["disk"]), snapshot, key)
    yield from _states(snapshot)
    yield from _requests(snapshot)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, snapshot: Snapshot, key: str) -> Metric:
    for image in snapshot.open:
        if image.get(key) is not None:
            family.add_metric([_disk(image)], image[key])
    return family


def _states(snapshot: Snapshot) -> Iterator[Metric]:
    state = GaugeMetricFamily("fvdfs_prefetch_state", "1: what prefetching does now", labels=["disk", "state"])
    failed = GaugeMetricFamily("fvdfs_failed", "1: the image is damaged, and read-only", labels=["disk"])
    lost = GaugeMetricFamily("fvdfs_base_lost", "1: the server of the base does not answer", labels=["disk"])
    for image in snapshot.open:
        for activity in Activity:
            state.add_metric([_disk(image), activity.value], image["state"] == activity.value)
        outage = image["base_outage"]
        failed.add_metric([_disk(image)], bool(image["failed"]))
        lost.add_metric([_disk(image)], outage is not None and outage["until"] is None)
    yield from (state, failed, lost)


def _requests(snapshot: Snapshot) -> Iterator[Metric]:
    labels = ["disk", "kind"]
    seconds = HistogramMetricFamily("fvdfs_request_seconds", "from a request's arrival to its answer", labels=labels)
    moved = CounterMetricFamily("fvdfs_request_bytes", "bytes that requests have moved", labels=labels)
    errors = CounterMetricFamily("fvdfs_request_errors", "requests that were answered with an error", labels=labels)
    for image in snapshot.open:
        for kind, count in image.get("requests", {}).items():
            series, total, buckets = [_disk(image), kind], 0, []
            for bound, times in zip(_BOUNDS, count["times"], strict=True):
                total += times
                buckets.append((bound, total))
            seconds.add_metric(series, buckets, count["seconds"])
            moved.add_metric(series, count["bytes"])
            errors.add_metric(series, count["errors"])
    yield from (seconds, moved, errors)


def _disk(image: dict[str, Any]) -> str:
    """The label of a disk: its name, as far as it is text."""
    return str(image["name"]).removesuffix(".raw").encode(errors="replace").decode()


def text(snapshot: Snapshot) -> bytes:
    """What a scrape gets."""

    class Of(Collector):
        def collect(self) -> Iterator[Metric]:
            return families(snapshot)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Of())
    return generate_latest(registry)


# --- the server -------------------------------------------------------------------------------------


class _Answer(BaseHTTPRequestHandler):
    timeout = CLIENT_PATIENCE
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        try:
            body = text(self.server.look())
        except trio.RunFinishedError:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE_LATEST)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is nothing to log."""

    def address_string(self) -> str:
        return "a client"  # of a socket there is no address


class _Server(socketserver.TCPServer):
    """Takes connections when it is told to."""

    allow_reuse_address = True
    look: Callable[[], Snapshot]

    def __init__(self, family: socket.AddressFamily, address: Any) -> None:
        """Raises OSError."""
        self.address_family = family
        super().__init__(address, _Answer)
        self.socket.setblocking(False)

    def talk(self, client: socket.socket, address: Any) -> None:
        """Answer a client. One that goes away in the middle is no error. Blocks."""
        with contextlib.suppress(OSError):
            self.finish_request(client, address)
        self.shutdown_request(client)


@contextlib.contextmanager
def listening(address: str) -> Iterator[_Server]:
    """A server at what `-o metrics` says, that answers once it is served. Raises UsageError."""
    host, port = metrics_address(address)
    try:
        server = _tcp(host, port) if port is not None else _unix(host)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"-o metrics={address}: {reason}") from error
    with server:
        try:
            yield server
        finally:
            if port is None:
                with contextlib.suppress(OSError):
                    os.unlink(host)


def _tcp(host: str, port: int) -> _Server:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return _Server(family, address)


def _unix(path: str) -> _Server:
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_served(path):
            os.unlink(path)  # an earlier process was killed
    return _Server(socket.AF_UNIX, path)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CLIENT_PATIENCE)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return False
        return True


async def serve(server: _Server, filesystem: Filesystem) -> None:
    """Answer scrapes until cancelled."""
    token, lag, room = trio.lowlevel.current_trio_token(), _Lag(), trio.Semaphore(CLIENTS)
    server.look = lambda: trio.from_thread.run_sync(_snapshot, filesystem, lag.most, trio_token=token)

    async def talk(client: socket.socket, address: Any) -> None:
        try:
            await trio.to_thread.run_sync(server.talk, client, address, abandon_on_cancel=True)
        finally:
            room.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lag.watch)
        while True:
            await room.acquire()
            await trio.lowlevel.wait_readable(server.socket)
            try:
                client, address = server.get_request()
            except OSError as error:  # it has gone, or there are no descriptors
                room.release()
                if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    log.error("metrics: %s", error.strerror)
                    await trio.sleep(LOOK)
            else:
                nursery.start_soon(talk, client, address)


def _snapshot(filesystem: Filesystem, lag: float) -> Snapshot:
    entries = filesystem.folder.inodes.shown()
    found = [status(entry) for entry in entries if entry.image is not None] + filesystem.openings.caches.status()
    takeovers = filesystem.folder.inodes.remembered.state.takeovers
    return Snapshot(os.fsdecode(filesystem.folder.path), len(entries), found, lag, takeovers)


class _Lag:
    """How late the event loop is."""

    def __init__(self) -> None:
        self.most = 0.0
        """Seconds, in the last period."""

    async def watch(self) -> None:
        """Look for ever."""
        while True:
            most, end = 0.0, trio.current_time() + LOOK
            while (now := trio.current_time()) < end:
                await trio.sleep(LOOK / 20)
                most = max(most, trio.current_time() - now - LOOK / 20)
            self.most = most
