"""Names and headers of other formats: what they lead to, and that no header makes the reader stumble."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fvdfs.errors import FvdError, ImageError, UnsupportedFeature
from fvdfs.store.locations import join, parse_location, within
from fvdfs.store.qemu_nodes import Node, blockdevs
from fvdfs.store.references import FORMATS
from support.headers import look

# ---- Locations ----


@pytest.mark.parametrize("name", ["disk.raw", "/a/b", "../x", "a:b", "file:disk.raw", "nbd:localhost:10809", "a b"])
def test_local_paths(name: str) -> None:
    location = parse_location(name)
    assert location.path == name.removeprefix("file:")
    assert (location.url, location.protocol) == ("", {})


@pytest.mark.parametrize(
    ("name", "url", "protocol"),
    [
        ("nbd://Host", "nbd://host/", {"server": {"type": "inet", "host": "host", "port": "10809"}, "export": ""}),
        (
            "NBD://[::1]:99/a%20b",
            "nbd://[::1]:99/a%20b",
            {"server": {"type": "inet", "host": "::1", "port": "99"}, "export": "a b"},
        ),
        (
            "nbd+unix:///vm?socket=/run/a%20b",
            "nbd+unix:///vm?socket=/run/a%20b",
            {"server": {"type": "unix", "path": "/run/a b"}, "export": "vm"},
        ),
        ("nbd+unix://?socket=/s", "nbd+unix:///?socket=/s", {"server": {"type": "unix", "path": "/s"}, "export": ""}),
        ("https://h:443/a.img?x=1", "https://h/a.img?x=1", {"driver": "https", "url": "https://h/a.img?x=1"}),
        ("ftp://h/a%20b", "ftp://h/a%20b", {"driver": "ftp", "url": "ftp://h/a%20b"}),
        (
            "ssh://me@h/dir/a.img",
            "ssh://me@h/dir/a.img",
            {"driver": "ssh", "server": {"host": "h", "port": "22"}, "path": "/dir/a.img", "user": "me"},
        ),
        (
            "iscsi://h/iqn.2001-04.com.example:x/3",
            "iscsi://h/iqn.2001-04.com.example:x/3",
            {"portal": "h:3260", "target": "iqn.2001-04.com.example:x", "lun": 3, "transport": "tcp"},
        ),
        ("nfs://h/x/y", "nfs://h/x/y", {"driver": "nfs", "server": {"type": "inet", "host": "h"}, "path": "/x/y"}),
        ("rbd:p/i", "rbd:p/i", {"driver": "rbd", "pool": "p", "image": "i"}),
        (
            "rbd:p/n/i@s:id=u",
            "rbd:p/n/i@s:id=u",
            {"pool": "p", "namespace": "n", "image": "i", "snapshot": "s", "user": "u"},
        ),
    ],
)
def test_urls(name: str, url: str, protocol: dict[str, object]) -> None:
    location = parse_location(name)
    assert location.path is None
    assert location.url == url
    assert protocol.items() <= location.protocol.items()
    assert parse_location(url).protocol == location.protocol  # the one spelling means the same


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\0b",
        "gopher://h/x",
        "ssh://%00e@h/a",
        "nbd://",
        "nbd://h:0/",
        "nbd://h:99999/",
        "nbd://h/?socket=/x",
        "nbd://h/x#y",
        "nbd+unix://h/x?socket=/s",
        "nbd+unix:///x",
        "nbd+unix:///x?socket=rel",
        "nbd+unix:///x?socket=/a/../b",
        "nbd+unix:///x?socket=/a&tls-creds=x",
        "https://u:p@h/x",
        "https://good@evil/x",
        "https://h/a/../b",
        "https://h/a/%2e%2E/b",
        "https://h/a%2F..%2Fb",
        "https://h/a b",
        "https://h\\evil/",
        "https://h/%00",
        "https://h/%ff",
        "https://h/\udc80",
        "https://[::1/x",
        "ssh://h",
        "ssh://u:p@h/x",
        "iscsi://h/target",
        "iscsi://h/target/lun",
        "nfs://h:99/x",
        "rbd:p",
        "rbd:p/i:conf=/etc/shadow",
        "rbd:p/i:id=a:key=b",
        "json:",
        "json:[]",
        "json:" + "[" * 100_000,
        'json:{"driver":"nope"}',
        'json:{"driver":"file"}',
        'json:{"driver":"file","filename":1.5}',
        'json:{"driver":"file","filename":"/x","pr-manager":"p"}',
        'json:{"driver":"https","url":"https://h/x","cookie":"c"}',
        'json:{"driver":"http","url":"file:///etc/shadow"}',
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"/x"},"backing":null}',
        'json:{"driver":"qcow2","file":"node"}',
        'json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"file","filename":"x"}}}',
        'json:{"driver":"nbd","server":{"type":"fd","str":"3"}}',
        'json:{"driver":"nbd","server.type":"inet","server.host":"h/../@evil","server.port":"1"}',
        'json:{"file":{"driver":"file"},"file.driver":"nbd"}',
        'json:{"driver":"rbd","pool":"p","image":"i","conf":"/x"}',
    ],
)
def test_nonsense_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_location(name)
    assert caught.value.reason
    assert "\n" not in caught.value.reason


@pytest.mark.parametrize(
    ("options", "same_as", "file_format"),
    [
        ({"driver": "file", "filename": "/a//b"}, "/a//b", ""),
        ({"driver": "file", "filename": "//a"}, "/a", ""),
        ({"driver": "file", "filename": "nbd://h/"}, "file:nbd://h/", ""),
        ({"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}, "a", "qcow2"),
        ({"driver": "qcow2", "file.driver": "https", "file.url": "https://h/a"}, "https://h/a", "qcow2"),
        ({"driver": "raw", "file": {"driver": "rbd", "pool": "p", "image": "i"}}, "rbd:p/i", "raw"),
        ({"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "export": "e"}, "nbd+unix:///e?socket=/s", ""),
        ({"driver": "nbd", "server.type": "inet", "server.host": "::1", "server.port": 7}, "nbd://[::1]:7/", ""),
        ({"driver": "ssh", "server": {"host": "h"}, "path": "/a b", "user": "u"}, "ssh://u@h/a%20b", ""),
        ({"driver": "nfs", "server": {"type": "inet", "host": "h"}, "path": "/a"}, "nfs://h/a", ""),
        ({"driver": "iscsi", "transport": "tcp", "portal": "h:1", "target": "t", "lun": 2}, "iscsi://h:1/t/2", ""),
    ],
)
def test_json_is_another_spelling(options: dict[str, object], same_as: str, file_format: str) -> None:
    name = "json:" + json.dumps(options)
    found, same = parse_location(name), parse_location(same_as)
    assert (found.path, found.url, found.protocol) == (same.path, same.url, same.protocol)
    assert (found.name, found.format) == (name, file_format)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["file", "nbd", "unix", "/x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["driver", "file", "server", "type", "path", "host", "filename", "a.b", "url"]), inner
        )
    ),
    max_leaves=10,
)


@given(
    st.text(max_size=40)
    | st.builds("{}://{}".format, st.sampled_from(["nbd", "ssh", "https", "nbd+unix"]), st.text(max_size=40))
    | json_values.map(lambda value: "json:" + json.dumps(value))
)
@example("https://[v1.]/")
def test_any_name_is_a_location_or_an_image_error(name: str) -> None:
    try:
        location = parse_location(name)
    except ImageError:
        return
    assert (location.path is None) == bool(location.url)
    assert location.url.isascii() or location.url.startswith(("rbd:", "http", "ftp", "ssh"))


def test_within_goes_by_whole_parts() -> None:
    assert within("https://h/a/b", "https://h/a")
    assert within("https://h/a/b", "https://h/a/")
    assert within("https://h/a", "https://h/a")
    assert within("https://h/a?x", "https://h/a")
    assert not within("https://h/ab", "https://h/a")
    assert not within("https://h.evil/", "https://h")
    assert not within("ssh://good@evil/x", "ssh://good")
    assert not within("https://h/", "")


def test_relative_names_in_remote_images() -> None:
    base = parse_location("https://h/dir/top.qcow2?key=1")
    assert join(base, "b c.qcow2") == "https://h/dir/b%20c.qcow2"
    assert join(base, "/etc/shadow") == "/etc/shadow"
    assert join(base, "nbd://x/") == "nbd://x/"
    with pytest.raises(ImageError, match=r"\.\."):
        parse_location(join(base, "../x"))
    with pytest.raises(ImageError, match="relative"):
        join(parse_location("nbd://h/x"), "b")


# ---- References ----


@pytest.mark.parametrize(("name", "reason"), [("fvd", "FVD"), ("dmg", "dmg is not known"), ("", "not")])
def test_formats_that_are_not_opened(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedFeature, match=reason):
        look(name, b"")


@given(file_format=st.sampled_from(sorted(FORMATS)), data=st.binary(max_size=2048))
def test_no_bytes_make_the_reader_stumble(file_format: str, data: bytes) -> None:
    try:
        look(file_format, data)
    except FvdError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "options",
    [
        '"driver":"nbd","server.host":"h","server.port":"1","export":"\\ud800"',
        '"driver":"nfs","server.host":"h","path":"/\\udcff"',
        '"driver":"ssh","server.host":"h","user":"\\ud800","path":"/a"',
        '"driver":"file","filename":"\\ud800"',
        '"driver":"rbd","pool":"\\ud800","image":"i"',
    ],
)
def test_words_that_are_no_text(options: str) -> None:
    """JSON can say halves of characters, which no file name and no URL has."""
    with pytest.raises(ImageError):
        parse_location(f"json:{{{options}}}")


@pytest.mark.parametrize(
    "options",
    [
        '"driver":"iscsi","portal":"ftp://h","target":"t"',
        '"driver":"iscsi","portal":"h/x","target":"t"',
        '"driver":"iscsi","portal":"me@h","target":"t"',
        '"driver":"iscsi","portal":"h","target":"t","lun":"1/2"',
        '"driver":"rbd","pool":"p/n","image":"i"',
        '"driver":"rbd","pool":"","namespace":"n","image":"i"',
        '"driver":"rbd","pool":"p","namespace":"n","image":""',
        '"driver":"rbd","pool":"p","image":"i@s"',
        '"driver":"rbd","pool":"p","image":"i","snapshot":"s:id=u"',
    ],
)
def test_word_that_would_become_others(options: str) -> None:
    """What is opened is what the options say, each of them."""
    with pytest.raises(ImageError):
        parse_location(f"json:{{{options}}}")


def test_relative_name_that_is_no_text() -> None:
    """The header of a remote image holds any bytes."""
    with pytest.raises(ImageError, match="UTF-8"):
        join(parse_location("https://h/a"), b"b\xff".decode("utf-8", "surrogateescape"))


# ---- Words for QEMU ----


def test_qemu_follows_no_name_by_itself() -> None:
    def node(file_format: str, fd: int, backing: Node | None = None, data_file: Node | None = None) -> Node:
        return Node(file_format, parse_location("x"), fd, False, backing, data_file)

    top = node("qcow2", 5, backing=node("qed", 6, backing=node("raw", 7)), data_file=node("raw", 8))
    nodes = blockdevs(top, writable=True, node_name="disk")

    def file(fd: int, read_only: bool) -> dict[str, object]:
        return {
            "driver": "file",
            "filename": f"/proc/self/fd/{fd}",
            "locking": "off",
            "read-only": read_only,
            "discard": "unmap",
        }

    def image(file_format: str, fd: int, read_only: bool) -> dict[str, object]:
        common = {"read-only": read_only, "discard": "unmap"}
        return {"driver": file_format, "file": file(fd, read_only), **common}

    data_file = image("raw", 8, False)
    assert nodes == [
        {**image("raw", 7, True), "node-name": "backing0"},
        {**image("qed", 6, True), "backing": "backing0", "node-name": "backing1"},
        {**image("qcow2", 5, False), "backing": "backing1", "data-file": data_file, "node-name": "disk"},
    ]
    for file_format in ("qcow2", "qcow", "qed", "vmdk"):
        assert blockdevs(node(file_format, 3), writable=False, node_name="disk")[0]["backing"] is None
