"""Bases and data files in QEMU's formats and over its protocols, through a real mount; and `fvdfs convert`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from fvdfs import cli
from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from fvdfs.store import qemu_daemon
from support import reference
from support.guest import find_program
from support.mounts import MIB, fvdfs, mounted, must, wait_for_end
from support.servers import nbd_server


def write_at(path: Path, offset: int, data: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True)


def content_of(path: Path, file_format: str, scratch: Path) -> bytes:
    """What QEMU reads from an image."""
    qemu_img("convert", "-f", file_format, "-O", "raw", path, scratch / "content.raw")
    return (scratch / "content.raw").read_bytes()


@pytest.fixture
def content(folder: Path) -> bytes:
    """The content of `base.raw` in the folder."""
    data = bytearray(random.Random(8).randbytes(3 * MIB))
    data[MIB : 2 * MIB] = bytes(MIB)
    (folder / "base.raw").write_bytes(data)
    return bytes(data)


def scribble(raw: Path, expected: bytearray, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(30):
        offset, data = chance.randrange(len(expected) - 9000), chance.randbytes(chance.randrange(1, 9000))
        write_at(raw, offset, data)
        expected[offset : offset + len(data)] = data


@pytest.mark.parametrize("file_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_a_base_in_another_format(folder: Path, content: bytes, file_format: str) -> None:
    base = folder / "base"
    qemu_img("convert", "-O", file_format, folder / "base.raw", base)
    before = base.read_bytes()
    must("create", folder / "a.fvd", "5M", "-b", "base", "-F", file_format, "--block-size", "64K")
    expected = bytearray(content + bytes(2 * MIB))
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == expected
        scribble(mount.raw("a"), expected, 1)
        mount.remount()
        assert mount.raw("a").read_bytes() == expected
    assert base.read_bytes() == before


def test_a_chain_of_qcow2_images_as_a_base(folder: Path, content: bytes, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "one.qcow2")
    qemu_img("create", "-f", "qcow2", "-b", "one.qcow2", "-F", "qcow2", folder / "two.qcow2")
    subprocess.run(["qemu-io", "-c", "write -P 7 1000 5000", folder / "two.qcow2"], check=True, capture_output=True)
    must("create", folder / "a.fvd", "-b", "two.qcow2", "-F", "qcow2")
    expected = content[:1000] + b"\7" * 5000 + content[6000:]
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == expected
    outside = tmp_path / "outside"
    outside.mkdir()
    os.rename(folder / "base.raw", outside / "base.raw")
    qemu_img("rebase", "-u", "-b", outside / "base.raw", "-F", "raw", folder / "one.qcow2")
    with mounted(folder) as mount:
        with pytest.raises(PermissionError):
            mount.raw("a").read_bytes()
        assert f"one.qcow2: backing={outside}/base.raw" in mount.log
        assert f"-o base_path={outside}" in mount.log
    with mounted(folder, "-o", f"base_path={outside}") as mount:
        assert mount.raw("a").read_bytes() == expected


@pytest.mark.parametrize("layout", [[], ["--compact", "--chunk-size", "64K"]])
def test_a_data_file_in_qcow2(folder: Path, content: bytes, tmp_path: Path, layout: list[str]) -> None:
    must(
        "create", folder / "a.fvd", "5M", "-b", "base.raw", "--block-size", "16K", *layout,
        "--data-file", "data.qcow2", "--data-format", "qcow2",
    )  # fmt: skip
    expected = bytearray(content + bytes(2 * MIB))
    with mounted(folder) as mount:
        assert mount.raw("a").read_bytes() == expected
        for seed in range(3):
            scribble(mount.raw("a"), expected, seed)
            mount.remount()
            assert mount.raw("a").read_bytes() == expected
        os.truncate(mount.raw("a"), 6 * MIB)
        expected += bytes(MIB)
        scribble(mount.raw("a"), expected, 9)
        assert mount.raw("a").read_bytes() == expected
    qemu_img("check", folder / "data.qcow2")
    # The same layout with a raw data file is one that the reference reader knows.
    qemu_img("convert", "-f", "qcow2", "-O", "raw", folder / "data.qcow2", folder / "data.raw")
    with open(folder / "a.fvd", "r+b") as file:
        header = Header.decode(file.read(HEADER_SIZE), "a")
        file.seek(0)
        file.write(with_fields(header, data_file="data.raw", data_file_fmt="raw").encode())
    assert b"".join(reference.read_disk(folder / "a.fvd")) == expected


def test_what_was_flushed_to_qcow2_survives_kill(folder: Path, content: bytes) -> None:
    must(
        "create", folder / "a.fvd", "-b", "base.raw", "--block-size", "16K",
        "--data-file", "data.qcow2", "--data-format", "qcow2",
    )  # fmt: skip
    expected = bytearray(content)
    with mounted(folder) as mount:
        for seed in range(3):
            descriptor = os.open(mount.raw("a"), os.O_RDWR)
            scribble(mount.raw("a"), expected, seed)
            daemons = children(mount.pid)
            assert len(daemons) == 1
            mount.kill()
            with suppress(OSError):
                os.close(descriptor)
            for pid in daemons:
                wait_for_end(pid)
            mount.mount()
            assert mount.raw("a").read_bytes() == expected


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_daemon_that_dies_is_started_again(folder: Path, content: bytes) -> None:
    qemu_img("convert", "-O", "qcow2", folder / "base.raw", folder / "base")
    must("create", folder / "a.fvd", "-b", "base", "-F", "qcow2")
    with mounted(folder) as mount, open(mount.raw("a"), "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1000, 0) == content[:1000]
        for at in (MIB // 2, 5 * MIB // 2):
            for pid in children(mount.pid):
                os.kill(pid, 9)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), 100_000, at) == content[at : at + 100_000]


def test_a_base_on_an_nbd_server(folder: Path, content: bytes, tmp_path: Path) -> None:
    server_file = tmp_path / "served.raw"
    os.rename(folder / "base.raw", server_file)
    with nbd_server(server_file, tmp_path / "socket") as url:
        must("create", folder / "a.fvd", "5M", "-b", url, "--block-size", "64K")
        expected = bytearray(content + bytes(2 * MIB))
        with mounted(folder) as mount:
            assert not mount.raw("a").exists()
            assert "-o 'allow_url=nbd+unix://" in mount.log
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            assert mount.raw("a").read_bytes() == expected
            scribble(mount.raw("a"), expected, 3)
            mount.remount()
            assert mount.raw("a").read_bytes() == expected


def change_header(image: Path, **fields: int | str) -> None:
    with open(image, "r+b") as file:
        header = with_fields(Header.decode(file.read(HEADER_SIZE), str(image)), **fields)
        file.seek(0)
        file.write(header.encode())


def test_a_base_that_leads_astray_is_refused(folder: Path, content: bytes) -> None:
    os.mkfifo(folder / "fifo")
    astray = {
        "shadow": ("/etc/shadow", "", "base_path=/etc"),
        "dots": ("../../../../../../etc/shadow", "", "base_path=/etc"),
        "url": ("https://127.0.0.1:1/disk.img", "", "allow_url=https://127.0.0.1:1/disk.img"),
        "json": ('json:{"driver":"file","filename":"/etc/shadow"}', "", "base_path=/etc"),
        "fifo": ("fifo", "", "neither a regular file nor a block device"),
        "qcow2-fifo": ("fifo", "qcow2", "neither a regular file nor a block device"),
        "device": ("/dev/loop-control", "", "outside the folder of the images"),
        "itself": ("itself.fvd", "fvd", "the chain is a loop"),
        "proc": ("/proc/self/mem", "", "outside the folder of the images"),
    }
    for name, (base, file_format, _) in astray.items():
        must("create", folder / f"{name}.fvd", "-b", "base.raw")
        change_header(folder / f"{name}.fvd", base_img=base, base_img_fmt=file_format)
    with mounted(folder) as mount:
        assert os.listdir(mount.point) == []
        for name, (_, _, reason) in astray.items():
            lines = [line for line in mount.log.splitlines() if f"/{name}.fvd: " in line]
            assert len(lines) == 1, (name, lines)
            assert reason in lines[0]


def test_create_says_what_a_mount_will_refuse(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    done = fvdfs("create", folder / "a.fvd", "-b", tmp_path / "base.raw")
    assert done.code == 0
    assert f"needs -o base_path={tmp_path}" in done.err


# --- convert ------------------------------------------------------------------------------------


def test_convert_from_everything_to_everything(folder: Path, content: bytes, tmp_path: Path) -> None:
    raw = folder / "base.raw"
    must("convert", raw, folder / "compact.fvd", "--compact", "--chunk-size", "64K")
    must("convert", folder / "compact.fvd", folder / "b.qcow2")
    must("convert", "-f", "qcow2", folder / "b.qcow2", folder / "plain.fvd")
    must("convert", folder / "plain.fvd", folder / "c.vdi")
    must("convert", "-f", "vdi", folder / "c.vdi", folder / "back.raw")
    must("convert", "-f", "qcow2", folder / "b.qcow2", folder / "cow.fvd", "-b", "base.raw", "--block-size", "64K")
    assert (folder / "back.raw").read_bytes() == content
    assert content_of(folder / "b.qcow2", "qcow2", tmp_path) == content
    for name in ("compact", "plain", "cow"):
        image = folder / f"{name}.fvd"
        assert b"".join(reference.read_disk(image)) == content
        assert reference.check(image, "fvdfs") == []
    # A hole stays one, and over a base only what differs is stored.
    assert (folder / "compact.fvd").stat().st_blocks * 512 < 2.5 * MIB
    assert (folder / "back.raw").stat().st_blocks * 512 < 2.2 * MIB
    assert (folder / "cow.fvd").stat().st_blocks * 512 < 100_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.raw", "a.fvd"], "No such file"),
        (["base.raw", "base.raw"], "exists already"),
        (["base.raw", "a.qcow2", "--compact"], "do not go with the format qcow2"),
        (["base.raw", "a.img", "-O", "qcow99"], "can make raw, fvd, qcow2"),
        (["-f", "qcow2", "base.raw", "a.fvd"], "base.raw"),
    ],
)
def test_convert_refuses_in_one_line(folder: Path, content: bytes, words: list[str], message: str) -> None:
    named = [word if word.startswith("-") or "." not in word else str(folder / word) for word in words]
    done = fvdfs("convert", *named)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1, done.err
    assert not (folder / "a.fvd").exists()


LARGE = 4 << 40  # bytes: to read all of that would take hours


@pytest.fixture
def large_base(folder: Path) -> list[int]:
    """A raw base that is nearly all holes; where its 4 KiB of data begin."""
    places = [0, 1 << 40, (3 << 40) + 5 * 4096, LARGE - 4096]
    with open(folder / "base.raw", "wb") as base:
        base.truncate(LARGE)
        for number, place in enumerate(places, 1):
            base.seek(place)
            base.write(bytes([number]) * 4096)
    return places


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("disk.raw", []),
        ("disk.qcow2", []),
        ("disk.fvd", []),
        ("disk.fvd", ["--compact", "--chunk-size", "1M"]),
        ("disk.fvd", ["-b", "zeros.raw", "--block-size", "1M"]),
    ],
)
def test_convert_reads_no_holes(
    folder: Path, large_base: list[int], tmp_path: Path, name: str, options: list[str]
) -> None:
    """On the way there, and on the way back, whoever keeps the holes."""
    with open(folder / "zeros.raw", "wb") as zeros:
        zeros.truncate(LARGE)
    must("convert", folder / "base.raw", folder / name, *options, timeout=120)
    words = ["-f", "qcow2"] if name.endswith("qcow2") else []
    must("convert", folder / name, tmp_path / "back.raw", *words, timeout=120)
    with open(tmp_path / "back.raw", "rb") as back:
        for number, place in enumerate(large_base, 1):
            back.seek(place)
            assert back.read(4096) == bytes([number]) * 4096
    assert (tmp_path / "back.raw").stat().st_size == LARGE
    assert (tmp_path / "back.raw").stat().st_blocks * 512 <= 4 * 128 << 10


CHEAP = "iter-time=10"
"""QEMU's option for keys that a passphrase gives at once; by default each opening takes two seconds."""


@pytest.fixture
def cheap_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `fvdfs create` encrypts has cheap keys; all else about `qemu-img` is as ever."""
    found = tmp_path / "bin"
    found.mkdir()
    script = found / "qemu-img"
    script.write_text(
        f"""#!/bin/sh
case "$*" in
    "create -q -f luks "*) shift; set -- create -o {CHEAP} "$@";;
esac
exec {find_program("qemu-img")} "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")


@pytest.mark.slow
def test_an_encrypted_base(folder: Path, content: bytes, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("open sesame")
    words = ["convert", "--object", f"secret,id=s,file={key}", "-O", "luks", "-o", f"key-secret=s,{CHEAP}"]
    for _ in range(5):
        # qemu-img times its key derivation, and gives up on a busy machine: "Unable to get accurate CPU usage".
        made = subprocess.run(["qemu-img", *words, folder / "base.raw", folder / "base.luks"], check=False)
        if made.returncode == 0:
            break
    assert made.returncode == 0
    done = fvdfs("create", folder / "a.fvd", "-b", "base.luks", "-F", "luks")
    assert done.code == 1
    assert "is encrypted: name the file with its passphrase" in done.err
    must("create", folder / "a.fvd", "-b", "base.luks", "-F", "luks", "--secret", key)
    with mounted(folder) as mount:
        with pytest.raises(OSError, match="Input/output"):
            mount.raw("a").read_bytes()
        assert "base.luks: is encrypted" in mount.log
    with mounted(folder, "-o", f"secret={key}") as mount:
        assert mount.raw("a").read_bytes() == content
    for words in (["info", "--json"], ["map"], ["check"]):
        must(words[0], folder / "a.fvd", *words[1:], "--secret", key)
    assert json.loads(must("info", folder / "a.fvd", "--json", "--secret", key))["problems"] == []
    assert "is encrypted" in json.loads(must("info", folder / "a.fvd", "--json"))["problems"][0]
    for source, options in (("a.fvd", []), ("base.luks", ["-f", "luks"])):
        done = fvdfs("convert", *options, folder / source, tmp_path / "plain.raw")
        assert done.code == 1
        assert "is encrypted: name the file with its passphrase: --secret FILE" in done.err
        must("convert", *options, folder / source, tmp_path / "plain.raw", "--secret", key)
        assert (tmp_path / "plain.raw").read_bytes() == content
        (tmp_path / "plain.raw").unlink()
    assert "is encrypted: to check it, give its passphrase" in must("check", folder / "a.fvd")
    key.write_text("wrong")
    done = fvdfs("check", folder / "a.fvd", "--secret", key)
    assert done.code == 1, "nobody knows whether it is corrupt"
    assert "the passphrase is wrong: name the file with the right one" in done.out
    assert "corruption" not in done.out
    with mounted(folder, "-o", f"secret={key}") as mount:
        with pytest.raises(OSError, match="Input/output"):
            mount.raw("a").read_bytes()
        assert "Invalid password" in mount.log


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_keys")
@pytest.mark.parametrize("layout", ["flat", "compact", "cow"])
def test_an_encrypted_data_file(folder: Path, content: bytes, tmp_path: Path, layout: str) -> None:
    """It reads as zeros where nothing was written, also after a cut, and a wrong passphrase is no damage."""
    options = {
        "flat": [],
        "compact": ["--compact", "--chunk-size", "64K", "--grow-unit", "1M"],
        "cow": ["-b", "base.raw", "-F", "raw"],
    }[layout]
    key, image = tmp_path / "key, or not", folder / "a.fvd"
    key.write_text("open sesame")
    (folder / "a.luks").write_bytes(b"something else")
    words: list[str | Path] = ["create", image, "4M", *options, "--data-file", "a.luks", "--data-format", "luks"]
    done = fvdfs(*words, "--force")
    assert (done.code, "name the file with its passphrase: --secret FILE" in done.err) == (2, True)
    done = fvdfs(*words, "--secret", key)
    assert (done.code, "--force to overwrite it" in done.err) == (2, True)
    assert (folder / "a.luks").read_bytes() == b"something else"
    for _ in range(5):  # see above
        done = fvdfs(*words, "--secret", key, "--force")
        if "CPU usage" not in done.err:
            break
    assert done.code == 0, done.err
    disk = bytearray((content if layout == "cow" else b"")[: 4 * MIB].ljust(4 * MIB, b"\0"))
    with mounted(folder, "-o", f"shrink,secret={str(key).replace(',', chr(92) + ',')}") as mount:
        raw = mount.raw("a")
        assert raw.read_bytes() == disk
        disk[1_000_000:1_000_007] = b"written"
        disk[-7:] = b"the end"
        with open(raw, "r+b") as file:
            file.seek(1_000_000)
            file.write(b"written")
            file.seek(4 * MIB - 7)
            file.write(b"the end")
            os.fsync(file.fileno())
        os.truncate(raw, 3 * MIB)
        os.truncate(raw, 4 * MIB)
        disk[3 * MIB :] = bytes(MIB)
        mount.remount()
        assert raw.read_bytes() == disk
    assert b"written" not in (folder / "a.luks").read_bytes()
    assert fvdfs("check", image, "--secret", key).code == 0
    assert "is encrypted: to check it" in must("check", image)
    must("convert", image, tmp_path / "copy.raw", "--secret", key)
    assert (tmp_path / "copy.raw").read_bytes() == disk
    key.write_text("wrong")
    done = fvdfs("check", image, "--secret", key)
    assert (done.code, "the passphrase is wrong" in done.out) == (1, True)


def test_a_key_may_take_long(folder: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine needs more than ten seconds for one; the open disk would give EIO."""
    (tmp_path / "key").write_text("open sesame")
    words = ["convert", "--object", f"secret,id=s,file={tmp_path}/key", "-O", "luks", "-o", f"key-secret=s,{CHEAP}"]
    for _ in range(5):  # see above
        made = subprocess.run(["qemu-img", *words, folder / "base.raw", folder / "base.luks"], check=False)
        if made.returncode == 0:
            break
    monkeypatch.setattr(qemu_daemon, "START_TIMEOUT", 0)
    pair = [str(folder / "base.luks"), str(folder / "base.raw")]
    assert cli.main(["compare", "-f", "luks", *pair, "--secret", str(tmp_path / "key")]) == 0
