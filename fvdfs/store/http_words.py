"""Requests for parts of files by HTTP/1.1, the heads of answers, and signatures as S3 has them. Pure."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlsplit

REDIRECTS = (301, 302, 303, 307, 308)
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: .*)?")
_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18})")
_EMPTY = hashlib.sha256().hexdigest()
_SIGNED = "host;x-amz-content-sha256;x-amz-date"


@dataclass(frozen=True, slots=True)
class Head:
    """What precedes the body of an answer."""

    status: int
    headers: dict[str, str]
    """Names in small letters; of several with one name, the first."""

    @property
    def length(self) -> int | None:
        """Bytes of the body; None where it is not stated. Raises ValueError."""
        text = self.headers.get("content-length")
        if text is None:
            return None
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ValueError("states no length that makes sense")
        return int(text)

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks, each with its length."""
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def stays_open(self) -> bool:
        """Whether the connection can be used again."""
        return self.headers.get("connection", "").lower() != "close"

    @property
    def part(self) -> tuple[int, int, int] | None:
        """Start and end of the body's part of the file, and the file's size, in bytes; None where nothing is said."""
        found = _RANGE.fullmatch(self.headers.get("content-range", ""))
        if found is None:
            return None
        return int(found[1] or 0), int(found[2] or -1) + 1, int(found[3])

    @property
    def version(self) -> str:
        """What changes with the file; empty where nothing tells."""
        tag = self.headers.get("etag", "")
        return self.headers.get("last-modified", "") if tag.startswith("W/") else tag


def parse_head(data: bytes) -> Head:
    """The lines before a body. Raises ValueError."""
    first, *lines = data.split(b"\r\n")
    found = _STATUS.fullmatch(first)
    if found is None:
        raise ValueError("does not speak HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon or not name or name != name.strip():
            raise ValueError("sends a line that is no header")
        headers.setdefault(name.lower(), value.strip())
    return Head(int(found[1]), headers)


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signs requests to a store like S3."""

    access_key: str
    secret: bytes
    region: str

    def headers(self, host: str, target: str, now: str) -> dict[str, str]:
        """Those that a GET has to have. `now`: as in 20260101T120000Z, by UTC. (AWS Signature Version 4)."""
        path, _, query = target.partition("?")
        pairs = sorted((_quoted(name), _quoted(value)) for name, value in parse_qsl(query, keep_blank_values=True))
        asked = "&".join(f"{name}={value}" for name, value in pairs)
        heads = f"host:{host}\nx-amz-content-sha256:{_EMPTY}\nx-amz-date:{now}\n"
        request = "\n".join(["GET", path, asked, heads, _SIGNED, _EMPTY])
        scope = f"{now[:8]}/{self.region}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(request.encode()).hexdigest()])
        key = b"AWS4" + self.secret
        for word in (now[:8], self.region, "s3", "aws4_request"):
            key = hmac.digest(key, word.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        return {
            "X-Amz-Date": now,
            "X-Amz-Content-Sha256": _EMPTY,
            "Authorization": f"AWS4-HMAC-SHA256 Credential={self.access_key}/{scope}, "
            f"SignedHeaders={_SIGNED}, Signature={signature}",
        }


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")


def target_of(url: str) -> str:
    """What a request for this URL names: path and query, in ASCII."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return re.sub(r"[^!-~]", lambda found: quote(found[0]), target)


def request(target: str, host: str, start: int, stop: int, headers: dict[str, str]) -> bytes:
    """A request for bytes [start, stop)."""
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {host}",
        "User-Agent: fvdfs",
        "Accept: */*",
        "Accept-Encoding: identity",
        f"Range: bytes={start}-{stop - 1}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def shown(url: str) -> str:
    """A URL without its query, which may let in whoever has it."""
    return url.partition("?")[0]
