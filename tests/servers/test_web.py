"""Files on web servers: where they send us, who we are there, and answers that make no sense."""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio

from fvdfs.errors import ImageError, Locked, Refused, Unreachable
from fvdfs.store import qemu_supervisor, web_reader
from fvdfs.store.http_words import Signer, parse_head, target_of
from fvdfs.store.outage import Lost, OnLoss
from fvdfs.store.qemu_store import QemuStore
from support.mounts import MIB
from support.ports import free_port
from support.qsd import named, opened
from support.servers import Https

DATA = random.Random(5).randbytes(MIB)

pytestmark = pytest.mark.skipif(bool(Https.missing()), reason=Https.missing())


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Https]:
    with free_port() as port:
        server = Https(tmp_path_factory.mktemp("nginx") / "server", port)
        try:
            server.put(DATA)
            server.start()
            yield server
        finally:
            server.stop()


async def all_of(store: QemuStore) -> bytes:
    data = bytearray(await store.size())
    assert await store.pread(memoryview(data), 0) == len(data)
    return bytes(data)


async def refused(folder: Path, url: str, *prefixes: str, credentials: Path | str) -> ImageError:
    store = named(folder, url, "raw", *prefixes, credentials=credentials)
    try:
        with pytest.raises(ImageError) as caught:
            await store.start()
        return caught.value
    finally:
        await store.aclose()


async def test_where_a_server_sends_us(folder: Path, nginx: Https) -> None:
    """Each place is judged as a URL of an image is; without TLS we go nowhere."""
    own, file = nginx.root, nginx.credentials()
    async with opened(folder, f"{own}moved/x", "raw", own, credentials=file) as store:
        assert await all_of(store) == DATA
    error = await refused(folder, f"{own}moved/x", f"{own}moved/", credentials=file)
    assert isinstance(error, Refused)
    assert re.search(r"sends us on: base_img=.*/disk.raw is not allowed", str(error))
    error = await refused(folder, f"{own}away/x", own, "http://localhost/", credentials=file)
    assert isinstance(error, Refused)
    assert "without TLS" in str(error)


async def test_a_cookie_lets_in(folder: Path, nginx: Https) -> None:
    section = f"[{nginx.root}cookie/]\nca = tls/ca-cert.pem\n"
    error = await refused(folder, f"{nginx.root}cookie/disk.raw", nginx.root, credentials=nginx.credentials(section))
    assert isinstance(error, Locked)
    assert "(403)" in str(error)
    file = nginx.credentials(f"{section}cookie_file = cookie\n")
    async with opened(folder, f"{nginx.root}cookie/disk.raw", "raw", nginx.root, credentials=file) as store:
        assert await all_of(store) == DATA


async def test_an_image_of_another_format(folder: Path, nginx: Https) -> None:
    """A daemon reads it through us, with what it stands on."""
    web = nginx.disk.parent
    image = web / "image.qcow2"
    backing = ["-b", "disk.raw", "-F", "raw"]
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(image)])
    await trio.run_process(["qemu-io", "-c", "write -P 7 64k 64k", str(image)], capture_stdout=True)
    image.chmod(0o644)
    expected = DATA[: 64 << 10] + bytes([7]) * (64 << 10) + DATA[128 << 10 :]
    url = f"{nginx.root}image.qcow2"
    on_loss = OnLoss(patience=20)
    async with opened(folder, url, "qcow2", nginx.root, on_loss=on_loss, credentials=nginx.credentials()) as store:
        assert await all_of(store) == expected
        await trio.to_thread.run_sync(nginx.restart)
        assert await all_of(store) == expected


async def test_a_file_that_is_replaced(folder: Path, nginx: Https, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one of the same size: it is not mixed with what was read before."""
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 1.0)
    other = nginx.disk.parent / "other.raw"
    other.write_bytes(DATA)
    data = memoryview(bytearray(512))
    file = nginx.credentials()
    async with opened(
        folder, f"{nginx.root}other.raw", "raw", nginx.root, on_loss=OnLoss.EIO, credentials=file
    ) as store:
        await store.pread(data, 0)
        kept = other.stat()
        other.write_bytes(bytes(MIB))
        os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns + 10**9))
        with pytest.raises(Lost, match="is it another one"):
            await store.pread(data, 512)
        other.write_bytes(DATA)
        os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        with trio.fail_after(60):
            while store.is_away:  # noqa: ASYNC110  a server tells nobody
                await trio.sleep(0.02)
        await store.pread(data, 512)
        assert data == DATA[512:1024]


# ---- Odd servers ----


@contextlib.asynccontextmanager
async def answering(answer: Callable[[int, int], bytes]) -> AsyncIterator[str]:
    """The URL of a server that answers each request for bytes [start, stop) with these bytes, and then closes."""

    async def serve(stream: trio.SocketStream) -> None:
        text = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while b"\r\n\r\n" not in text:
                text += await stream.receive_some(4096)
            found = re.search(rb"Range: bytes=(\d+)-(\d+)", text)
            assert found is not None
            await stream.send_all(answer(int(found[1]), int(found[2]) + 1))
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        try:
            yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"
        finally:
            nursery.cancel_scope.cancel()


def part(start: int, stop: int, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 206 Partial\r\nContent-Range: bytes %d-%d/%d\r\n%b" % (start, stop - 1, MIB, more)


def chunked(start: int, stop: int) -> bytes:
    data = DATA[start:stop]
    half = len(data) // 2
    chunks = b"".join(b"%x;x=y\r\n%b\r\n" % (len(each), each) for each in (data[:half], data[half:]) if each)
    return part(start, stop, b"Transfer-Encoding: chunked\r\n\r\n") + chunks + b"0\r\nA: b\r\n\r\n"


async def test_a_server_that_sends_chunks_and_closes(folder: Path) -> None:
    async with answering(chunked) as url, opened(folder, url, "raw", "http://") as store:
        assert await all_of(store) == DATA


async def test_a_url_that_is_signed_for_some_time(folder: Path) -> None:
    """It lets in by itself, and nothing that is said shows how."""
    secret = "?X-Amz-Signature=top-secret"
    async with answering(chunked) as url, opened(folder, url + secret, "raw", "http://") as store:
        assert await all_of(store) == DATA
        assert "top-secret" not in store.name
    async with answering(lambda _start, _stop: b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n") as url:
        error = await refused(folder, url + secret, "http://", credentials="")
        assert "(403)" in str(error)
        assert "top-secret" not in str(error)
    error = await refused(folder, url + secret, "http://", credentials="")
    assert isinstance(error, Unreachable)
    assert "top-secret" not in str(error)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", ImageError, "gives no parts of files"),
        (b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n", Unreachable, r"\(503\)"),
        (b"HTTP/1.1 206 OK\r\nContent-Length: 1\r\n\r\nx", ImageError, "does not say how large"),
        (b"HTTP/1.1 302 Go\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", ImageError, "more than 5 times"),
        (b"HTTP/1.1 302 Go\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", ImageError, "sends us to"),
        (b"HTTP/1.1 302 Go\r\nLocation: nbd://h/x\r\nContent-Length: 0\r\n\r\n", ImageError, "no web server"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", ImageError, "does not speak HTTP"),
        (b"HTTP/1.1 206 OK\r\nX: " + bytes(1 << 17), ImageError, "without end"),
        (b"", Unreachable, "closed the connection"),
    ],
)
async def test_answers_that_make_no_sense(folder: Path, answer: bytes, error: type[ImageError], message: str) -> None:
    async with answering(lambda _start, _stop: answer) as url:
        found = await refused(folder, url, "http://", "nbd://", credentials="")
    assert isinstance(found, error)
    assert re.search(message, str(found))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda start, stop: part(start + 1, stop + 1, b"Content-Length: 512\r\n\r\n") + bytes(512),
        lambda start, stop: part(start, stop, b"Content-Length: 511\r\n\r\n") + bytes(511),
        lambda start, stop: part(start, stop, b"Content-Length: 513\r\n\r\n") + bytes(513),
        lambda start, stop: part(start, stop, b'ETag: "b"\r\nContent-Length: 512\r\n\r\n') + bytes(512),
        lambda start, stop: part(start, stop, b"Content-Length: 512\r\n\r\n") + bytes(100),
    ],
)
async def test_parts_that_were_not_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int, int], bytes]
) -> None:
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.3)

    def answer(start: int, stop: int) -> bytes:
        if stop - start == 1:
            return part(start, stop, b"Content-Length: 1\r\n\r\nx")
        return wrong(start, stop)

    async with answering(answer) as url, opened(folder, url, "raw", "http://", on_loss=OnLoss.EIO) as store:
        with pytest.raises(OSError, match=r"lost again|away"):
            await store.pread(memoryview(bytearray(512)), 1024)


async def test_nothing_is_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a server that does not answer, requests wait; if its host is silent, the connection is given up."""
    silent = 0.0
    monkeypatch.setattr(web_reader, "silence", lambda _: silent)
    monkeypatch.setattr(qemu_supervisor, "SERVER_TIMEOUT", 0.5)
    monkeypatch.setattr(qemu_supervisor, "_WATCH_INTERVAL", 0.05)
    asked = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            text = await stream.receive_some(4096)
            if b"bytes=0-0" in text:
                await stream.send_all(part(0, 1, b"Content-Length: 1\r\n\r\nx"))
            else:
                asked.set()
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x"

        async def read() -> None:
            with pytest.raises(OSError, match="nothing was heard"):
                await store.pread(memoryview(bytearray(512)), 1024)

        async with (
            opened(folder, url, "raw", "http://", on_loss=OnLoss.EIO) as store,
            trio.open_nursery() as readers,
        ):
            readers.start_soon(read)
            with trio.fail_after(60):
                await asked.wait()
            silent = 100.0
        nursery.cancel_scope.cancel()


def test_signatures() -> None:
    """The examples of the documentation of S3."""
    signer = Signer("AKIAIOSFODNN7EXAMPLE", b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    for target, signature in (
        ("/?lifecycle", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("/?max-keys=2&prefix=J", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ):
        found = signer.headers("examplebucket.s3.amazonaws.com", target, "20130524T000000Z")
        assert found["Authorization"].endswith(f"Signature={signature}")


def test_heads_and_targets() -> None:
    head = parse_head(b'HTTP/1.1 206 Partial Content\r\nETag: "a"\r\nContent-Range: bytes 5-9/10\r\nEtag: "b"')
    assert (head.part, head.version, head.stays_open, head.length) == ((5, 10, 10), '"a"', True, None)
    assert parse_head(b"HTTP/1.1 416 x\r\nContent-Range: bytes */0").part == (0, 0, 0)
    assert parse_head(b'HTTP/1.0 200 x\r\nETag: W/"a"\r\nLast-Modified: now').version == "now"
    assert target_of("https://h/a%20b/ü?x=ä") == "/a%20b/%C3%BC?x=%C3%A4"
    assert target_of("https://h") == "/"
