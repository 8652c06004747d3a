"""The fuzz targets by name."""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzz.exports import fuzz_export
from fuzz.moves import fuzz_moves
from fuzz.names import fuzz_formats
from fuzz.opening import fuzz_opening
from fuzz.parsers import fuzz_bitmap, fuzz_header, fuzz_journal, fuzz_table

TARGETS: dict[str, Callable[[bytes], bool]] = {
    "header": fuzz_header,
    "bitmap": fuzz_bitmap,
    "table": fuzz_table,
    "journal": fuzz_journal,
    "formats": fuzz_formats,
    "export": fuzz_export,
    "moves": fuzz_moves,
    "open": fuzz_opening,
}
PARSERS = ("header", "bitmap", "table", "journal", "formats", "export", "moves")
MAX_LENGTH = {
    "header": 128,
    "bitmap": 128,
    "table": 256,
    "journal": 512,
    "formats": 192,
    "export": 96,
    "moves": 256,
    "open": 400,
}
"""The longest input that makes sense for a target: behind it, hardly a byte is read."""

NAMES = (
    *(
        "nbd://h/a%20b",
        "nbd+unix:///vm?socket=/run/s",
        "https://h:443/a?x=1",
        "ssh://me@h/dir/a",
        "rbd:p/n/i@s:id=u",
    ),
    *("iscsi://h/iqn.2001-04.com.example:x/3", "nfs://h/x/y", "file:disk", "../x", "NBD://[::1]:99/a", "ftp://h/a"),
    'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"},"export":"e%2Ff"}',
    'json:{"driver":"nbd","server.type":"unix","server.path":"/s?#","export":"e%2F?&#"}',
    'json:{"driver":"qcow2","file":{"driver":"https","url":"https://h/a"}}',
    'json:{"file.driver":"file","file.filename":"/a","driver":"raw"}',
    'json:{"driver":"ssh","user":"m@:e","server.host":"h","server.port":"22","path":"/a?b"}',
    'json:{"driver":"iscsi","transport":"tcp","portal":"h:1","target":"t","lun":1}',
    'json:{"driver":"rbd","pool":"p","namespace":"n","image":"i","snapshot":"s","user":"u"}',
    'json:{"driver":"nfs","server.type":"inet","server.host":"h","path":"/a/b"}',
    'json:{"driver":"host_device","filename":"/dev/x"}',
)


def seeds(target: str, seed: int) -> list[bytes]:
    """Inputs to begin with: nothing, some names, and random decisions, of which most make something valid."""
    rng = random.Random(f"{target} {seed}")
    found = [b"", *(rng.randbytes(rng.randrange(4, MAX_LENGTH[target])) for _ in range(200))]
    if target == "formats":
        found += [bytes((kind, 1)) + name.encode() for kind in (2, 3) for name in NAMES]
    return found
