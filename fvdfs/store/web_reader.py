"""A file on a web server, read by connections of our own: parts of it, by HTTP/1.1, several at a time.

QEMU's driver for the web follows wherever a server sends it, knows no authority but the system's, and mixes what it
read before a file was replaced with what it reads after. Here each redirection is judged as the URL was
(`Web.judge`), the credentials are those of where it leads, and an answer that is of another version than the first ends
the connection.

It takes the place of a storage daemon under a `qemu_supervisor.Supervisor`, as `nbd_reader` does, and opens the file
anew where it has lost it. A daemon that needs it for an image of another format reads through `nbd_giver`.
"""

from __future__ import annotations

import base64
import errno
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import trio

from fvdfs.errors import ImageError, Locked, Refused, Unreachable, UsageError
from fvdfs.store.connecting import SILENCE, connect, silence
from fvdfs.store.http_words import REDIRECTS, Head, Signer, parse_head, request, shown, target_of
from fvdfs.store.lending import read_credentials, secret_in, section_of
from fvdfs.store.locations import Location, parse_location

DRIVERS = ("http", "https")
OPEN_TIMEOUT = 10.0  # seconds until the server has told of the file
_CONNECTIONS = 8  # to one server, for one file
_MOST_REDIRECTS = 5
_LONGEST_HEAD = 1 << 16  # bytes
_LONGEST_REST = 1 << 16  # bytes of a body that nobody wants, and that is read so that the connection can be kept
_PIECE = 256 << 10  # bytes received at a time
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)


@dataclass
class Web:
    """What is to be known for all files on web servers that an image stands on."""

    judge: Callable[[Location], None]
    """Raises Refused where a redirection may not lead; may block."""
    credentials: str
    """As `Policy.credentials`."""
    versions: dict[str, str] = field(default_factory=dict)
    """What each file was when it was opened first, by URL."""


class _TooLong(Exception):
    """A body is longer than wanted."""


class _Answered(Exception):
    """The server has answered, but not with the part."""

    def __init__(self, head: Head) -> None:
        super().__init__(_told(head))
        self.head = head


def _told(head: Head) -> str:
    words = {
        401: "the server does not take our user and password",
        403: "the server refuses the file to us",
        404: "the server has no such file",
        410: "the server has no such file any more",
        200: "the server gives no parts of files (no Range)",
    }
    return f"{words.get(head.status, 'the server answers something else')} ({head.status})"


@dataclass(frozen=True)
class _Place:
    """Where the file is, and who we are there."""

    location: Location
    headers: dict[str, str]
    signer: Signer | None
    tls: ssl.SSLContext | None

    @property
    def host(self) -> str:
        """As `Host:` has it."""
        return urlsplit(self.location.url).netloc

    @property
    def server(self) -> str:
        """The beginning of all its URLs."""
        return f"{self.location.protocol['driver']}://{self.host}"

    def request(self, start: int, stop: int) -> bytes:
        target = target_of(self.location.url)
        headers = dict(self.headers)
        if self.signer is not None:
            headers |= self.signer.headers(self.host, target, time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
        return request(target, self.host, start, stop, headers)


def _place(location: Location, credentials: str) -> _Place:
    """Blocks. Raises UsageError, ImageError, OSError."""
    section = section_of(location, read_credentials(credentials))
    headers: dict[str, str] = {}
    signer = None
    if file := section.get("password_file"):
        both = section.get("user").encode() + b":" + secret_in(file)
        headers["Authorization"] = f"Basic {base64.b64encode(both).decode()}"
    if file := section.get("cookie_file"):
        headers["Cookie"] = secret_in(file).decode("latin-1")
    if file := section.get("secret_key_file"):
        signer = Signer(section.get("access_key"), secret_in(file), section.get("region") or "us-east-1")
    if any(set(value) & {"\r", "\n", "\0"} for value in headers.values()):
        raise UsageError(f"{section.get('cookie_file')}: must be one line")
    tls = None
    if location.protocol["driver"] == "https":
        try:
            tls = ssl.create_default_context(cafile=section.get("ca") or None)
        except ssl.SSLError:
            raise UsageError(f"{section.get('ca')}: holds no certificate of an authority") from None
    return _Place(location, headers, signer, tls)


class _Connection:
    """To one server; one request at a time."""

    def __init__(self, server: str, made: socket.socket, stream: trio.abc.Stream) -> None:
        self.server = server
        self.socket = made
        self._stream = stream
        self._received = bytearray()
        self.is_fresh = True

    @classmethod
    async def open(cls, place: _Place) -> _Connection:
        """Raises Unreachable, ImageError, OSError."""
        made = await connect(place.location)
        assert made is not None
        stream: trio.abc.Stream = trio.SocketStream(trio.socket.from_stdlib_socket(made))
        if place.tls is not None:
            name = urlsplit(place.location.url).hostname or ""
            secure = trio.SSLStream(stream, place.tls, server_hostname=name, https_compatible=True)
            stream = secure
            try:
                await secure.do_handshake()
            except BaseException as error:
                await trio.aclose_forcefully(secure)
                if isinstance(error, trio.BrokenResourceError) and isinstance(error.__cause__, ssl.SSLError):
                    raise _of_tls(place.location, error.__cause__) from error
                raise
        return cls(place.server, made, stream)

    async def ask(self, text: bytes) -> Head:
        """Send a request, and receive the head of its answer. Raises ValueError, and `_BROKEN`."""
        await self._stream.send_all(text)
        while True:
            end = self._received.find(b"\r\n\r\n")
            if end >= 0:
                head = parse_head(bytes(self._received[:end]))
                del self._received[: end + 4]
                if head.status >= 200:
                    return head
            elif len(self._received) > _LONGEST_HEAD:
                raise ValueError("sends a head without end")
            else:
                self._received += await self._some()

    async def _some(self) -> bytes | bytearray:
        data = await self._stream.receive_some(_PIECE)
        if not data:
            raise OSError(errno.ECONNRESET, "the server has closed the connection")
        return data

    async def body(self, head: Head, take: Callable[[bytes | bytearray], None]) -> None:
        """Receive the body, in pieces. Raises as `ask`, and what `take` raises."""
        if head.is_chunked:
            while size := await self._chunk_size():
                await self._pieces(size, take)
                await self._line()
            while await self._line():
                pass
        elif (length := head.length) is not None:
            await self._pieces(length, take)
        else:
            raise ValueError("does not say how long its answer is")

    async def _pieces(self, size: int, take: Callable[[bytes | bytearray], None]) -> None:
        while size:
            if not self._received:
                self._received += await self._some()
            piece = self._received[:size]
            del self._received[: len(piece)]
            size -= len(piece)
            take(piece)

    async def _line(self) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            if len(self._received) > _LONGEST_HEAD:
                raise ValueError("sends a line without end")
            self._received += await self._some()
        line = bytes(self._received[:end])
        del self._received[: end + 2]
        return line

    async def _chunk_size(self) -> int:
        return int((await self._line()).partition(b";")[0].strip(), 16)

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)


def _of_tls(location: Location, error: ssl.SSLError) -> ImageError:
    if isinstance(error, ssl.SSLCertVerificationError):
        how = "if it has an authority of its own, name that by ca = FILE in the credentials"
        return ImageError(location.shown, f"the server's certificate does not fit: {error.verify_message}; {how}")
    return ImageError(location.shown, f"the server and we do not agree on TLS: {error.reason or error}")


class WebReader:
    """One file. Offsets and sizes in bytes."""

    pid = 0
    flush_failed = False
    is_cut_off = False

    def __init__(self, name: str, location: Location, web: Web) -> None:
        """`name`: for messages. `open` must follow."""
        self._name = name
        self._location = location
        self._web = web
        self._at: _Place | None = None
        self._version = ""
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._limit = trio.CapacityLimiter(_CONNECTIONS)
        self._resolving = trio.Lock()
        self._failure = ""
        self._stopped = False
        self.size = 0
        self.users = 0
        self.gone = False
        self.verdict = ""

    async def open(self) -> None:
        """Find the file. Raises Unreachable, Locked, Refused, other ImageError, UsageError."""
        try:
            with trio.fail_after(OPEN_TIMEOUT):
                head = await self._resolve()
        except trio.TooSlowError:
            raise Unreachable(self._name, f"no answer within {OPEN_TIMEOUT:.0f} seconds") from None
        except _Answered as error:
            raise self._verdict_of(error.head) from None
        except ValueError as error:
            raise ImageError(self._name, f"the server {error}") from None
        except _BROKEN as error:
            raise Unreachable(self._name, _why(error)) from error
        part = head.part
        if part is None:
            raise ImageError(self._name, "the server does not say how large the file is")
        self.size, self._version = part[2], head.version
        known = self._web.versions.setdefault(self._location.url, self._version)
        if known != self._version:
            self._stop_all()
            raise ImageError(self._name, "the server has another version than was opened first: is it another one?")

    def _verdict_of(self, head: Head) -> ImageError:
        reason = _told(head)
        if head.status in (401, 403):
            return Locked(self._name, f"{reason}: see the credentials")
        if head.status >= 500 or head.status == 429:
            return Unreachable(self._name, reason)
        return ImageError(self._name, reason)

    async def _resolve(self) -> Head:
        """Follow redirections to where the file is; the head of an answer with its first byte.

        Raises Refused, other ImageError, UsageError, _Answered, ValueError, and `_BROKEN`.
        """
        location = self._location
        for _ in range(_MOST_REDIRECTS + 1):
            place = await trio.to_thread.run_sync(_place, location, self._web.credentials)
            head, _ = await self._exchange(place, 0, 1, None)
            if head.status not in REDIRECTS:
                if head.status != 206 and not (head.status == 416 and head.part is not None and not head.part[2]):
                    raise _Answered(head)
                self._at = place
                return head
            location = await trio.to_thread.run_sync(self._redirected, location, head)
        raise ImageError(self._name, f"the server sends us on more than {_MOST_REDIRECTS} times")

    def _redirected(self, location: Location, head: Head) -> Location:
        """Where we are sent. Raises ImageError, Refused among them."""
        url = urljoin(location.url, head.headers.get("location", "")).partition("#")[0]
        try:
            found = parse_location(url)
            judged = parse_location(shown(url))
        except ImageError as error:
            raise ImageError(self._name, f"the server sends us to {shown(url)}: {error.reason}") from None
        if found.protocol.get("driver") not in DRIVERS:
            raise ImageError(self._name, f"the server sends us to {shown(url)}, which is no web server")
        if location.protocol["driver"] == "https" and found.protocol["driver"] == "http":
            raise Refused(self._name, f"the server sends us to {shown(url)}, without TLS")
        try:
            self._web.judge(judged)
        except Refused as error:
            raise Refused(self._name, f"the server sends us on: {error.reason}") from None
        return found

    # --- as a daemon (`qemu_supervisor.Server`) -----------------------------------------------------

    @property
    def export(self) -> WebReader:
        """What it reads."""
        return self

    @property
    def alive(self) -> bool:
        """Whether it was not stopped."""
        return not self._stopped

    @property
    def is_connected(self) -> bool:
        """Whether the file can be read, as far as is known."""
        return not self._failure and not self._stopped

    @property
    def last_words(self) -> str:
        """How it has ended."""
        return self.verdict or self._failure or "it was stopped"

    def kill_if_silent(self) -> None:
        """End what waits for a server from which nothing is heard. From any thread."""
        for connection in [*self._busy]:
            if silence(connection.socket) > SILENCE:
                self.verdict = f"nothing was heard from its server for {SILENCE:.0f} s"
                self.kill()

    def kill(self) -> None:
        """`stop`."""
        self.stop()

    def stop(self, *, gently: bool = False) -> None:
        """Close what is idle, and have what is under way fail. From any thread."""
        self._stopped = True
        self._stop_all()

    def _stop_all(self) -> None:
        while self._idle:
            self._idle.pop().socket.close()
        for connection in [*self._busy]:
            with suppress(OSError):  # it has ended already
                connection.socket.shutdown(socket.SHUT_RDWR)

    async def flush(self) -> None:
        """Nothing: nothing is written."""

    def flush_now(self) -> None:
        """The same."""

    # --- reading ------------------------------------------------------------------------------------

    async def extent(self, start: int, stop: int) -> tuple[int, bool]:
        """As `Store.extent`: the web knows no holes."""
        return stop, False

    async def pread(self, buffer: memoryview, offset: int) -> int:
        """As `Store.pread`. Raises OSError."""
        count = max(0, min(len(buffer), self.size - offset))
        if not count:
            return 0
        try:
            await self._read(buffer[:count], offset)
        except (_Answered, ValueError, ImageError, UsageError) as error:
            raise self._lost(error.reason if isinstance(error, ImageError) else str(error)) from error
        except _BROKEN as error:
            raise self._lost(_why(error)) from error
        return count

    def _lost(self, reason: str) -> OSError:
        self._failure = self._failure or reason
        return OSError(errno.ECONNRESET, self.last_words)

    async def _read(self, view: memoryview, offset: int) -> None:
        stop = offset + len(view)
        at = self._at
        assert at is not None
        head, count = await self._exchange(at, offset, stop, view)
        was_sent_on = at.location != self._location
        if head.status in REDIRECTS or (was_sent_on and head.status in (401, 403, 404, 410)):
            async with self._resolving:  # where we were sent to was good for some time
                if self._at is at:
                    await self._resolve()
            assert self._at is not None
            head, count = await self._exchange(self._at, offset, stop, view)
        if head.status != 206:
            raise _Answered(head)
        if head.part != (offset, stop, self.size) or head.version != self._version:
            raise ValueError("has another version of the file by now")
        if count != len(view):
            raise ValueError(f"sends {count} bytes of {len(view)}")

    async def _exchange(self, place: _Place, start: int, stop: int, view: memoryview | None) -> tuple[Head, int]:
        """Ask for a part, and receive it; how much was received. Raises ImageError, ValueError, and `_BROKEN`."""
        async with self._limit:
            while True:
                if self._stopped:
                    raise OSError(errno.ECONNRESET, self.last_words)
                async with self._connection(place) as connection:
                    was_fresh, connection.is_fresh = connection.is_fresh, False
                    try:
                        head = await connection.ask(place.request(start, stop))
                    except _BROKEN:
                        if was_fresh or self._stopped:
                            raise
                        continue  # the server has closed it meanwhile, as it may
                    wanted = view if head.status == 206 else None
                    count = await self._receive(connection, head, wanted)
                    if head.stays_open and not self._stopped and count >= 0:
                        self._busy.discard(connection)
                        self._idle.append(connection)
                    return head, count

    @staticmethod
    async def _receive(connection: _Connection, head: Head, view: memoryview | None) -> int:
        """Receive a body; how much it was. -1: it was not received to its end, since nobody wants it."""
        most = len(view) if view is not None else _LONGEST_REST
        if view is None and (head.length or 0) > most:
            return -1
        count = 0

        def take(piece: bytes | bytearray) -> None:
            nonlocal count
            if count + len(piece) > most:
                raise _TooLong
            if view is not None:
                view[count : count + len(piece)] = piece
            count += len(piece)

        try:
            await connection.body(head, take)
        except _TooLong:
            if view is not None:
                raise ValueError("sends more than was asked for") from None
            return -1
        return count

    @asynccontextmanager
    async def _connection(self, place: _Place) -> AsyncIterator[_Connection]:
        """One that nobody else uses; it is closed unless it is idle afterwards."""
        idle = next((each for each in self._idle if each.server == place.server), None)
        if idle is not None:
            self._idle.remove(idle)
        connection = idle or await _Connection.open(place)
        self._busy.add(connection)
        try:
            yield connection
        finally:
            if connection in self._busy:
                self._busy.discard(connection)
                await connection.close()


def _why(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) and error.__cause__ else error
    if isinstance(cause, trio.BrokenResourceError | trio.ClosedResourceError):
        return "the server has closed the connection"
    return (cause.strerror if isinstance(cause, OSError) else None) or str(cause) or os.strerror(errno.ECONNRESET)


async def open_web(name: str, location: Location, web: Web) -> WebReader:
    """The file at this location. Raises as `WebReader.open`."""
    reader = WebReader(name, location, web)
    try:
        await reader.open()
    except BaseException:
        reader.stop()
        raise
    return reader
