"""Bases and data files in Ceph: a real cluster, read, written, killed, stopped, and asked by whom it does not know."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.ceph import POOL, READ_ONLY, WATCHES, Ceph, cluster, needs_ceph
from support.mounts import MIB, Mount, fvdfs, mounted, must, running, wait_for_log, wait_until

pytestmark = [needs_ceph, pytest.mark.slow]
SIZE = 64 * MIB
OBJECT = 4 * MIB
"""What Ceph cuts an image into."""
DATA = random.Random(20).randbytes(5 * MIB)
"""From the beginning on; the rest of the template is a hole."""
LIMIT = 90  # seconds; far more than anything takes that does not wait


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    with cluster() as made:
        made.key_of("fvdfs", made.folder / "fvdfs.keyring", "profile rbd")
        yield made


@pytest.fixture(scope="module")
def template(ceph: Ceph) -> str:
    file = ceph.folder / "template.raw"
    file.write_bytes(DATA)
    os.truncate(file, SIZE)
    return ceph.new_image("template", file)


@pytest.fixture
def osd(ceph: Ceph) -> Iterator[Ceph]:
    """A cluster whose OSD may be away at the end."""
    yield ceph
    ceph.signal_osd(signal.SIGCONT)
    ceph.restart_osd()


def known(ceph: Ceph, user: str = "fvdfs", keyring: str = "fvdfs.keyring") -> Path:
    """A file that says who we are."""
    file = ceph.folder / "credentials"
    file.write_text(f"[rbd:]\nuser = {user}\nkeyring = {keyring}\nconf = ceph.conf\n")
    file.chmod(0o600)
    return file


def allowed(ceph: Ceph, *more: str) -> tuple[str, str]:
    """For a mount."""
    return "-o", ",".join(("allow_url=rbd:", f"credentials={known(ceph)}", *more))


def over(folder: Path, ceph: Ceph, url: str, *options: str | Path) -> None:
    must("create", folder / "disk.fvd", "-b", url, "-F", "raw", *options, "--credentials", known(ceph))
    must("create", folder / "other.fvd", "1M")


def read(disk: Path, offset: int, count: int = 4096) -> list[str]:
    at = ("iflag=direct,skip_bytes", f"bs={count}", f"skip={offset}", "count=1", "status=none")
    return ["dd", f"if={disk}", *at]


def read_now(disk: Path, offset: int, count: int = 4096) -> bytes:
    return subprocess.run(read(disk, offset, count), capture_output=True, check=True, timeout=LIMIT).stdout


def outage(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = mount.status("disk")["base_outage"]
    return found


# --- what is read --------------------------------------------------------------------------------


def test_copies_of_what_is_read_and_of_the_rest(folder: Path, ceph: Ceph, template: str) -> None:
    over(folder, ceph, template, "--copy-on-read")
    before = ceph.read_bytes()
    with mounted(folder, *allowed(ceph)) as mount:
        for _ in range(2):
            assert read_now(mount.raw("disk"), MIB, MIB) == DATA[MIB : 2 * MIB]
        assert ceph.read_bytes() - before < 1.1 * MIB
        with open(mount.raw("disk"), "r+b"):
            must("prefetch", "start", mount.raw("disk"))
            wait_for_log(mount, "everything is local", LIMIT)
        # Of the rest of the template, Ceph says that it is a hole: only what it holds crosses the link.
        assert ceph.read_bytes() - before <= 2 * OBJECT + MIB
        assert mount.raw("disk").read_bytes() == DATA.ljust(SIZE, b"\0")
    with mounted(folder) as mount:  # which allows no URL: nothing of the base is used any more
        assert mount.raw("disk").read_bytes() == DATA.ljust(SIZE, b"\0")


def test_a_snapshot_as_a_base(folder: Path, ceph: Ceph, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old".ljust(4 * MIB, b"."))
    url = ceph.new_image("changing", tmp_path / "old")
    ceph.rbd("snap", "create", "--no-progress", f"{POOL}/changing@then")
    over(folder, ceph, f"{url}@then")
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", f"{url}:conf={ceph.conf}"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    ceph.rbd("resize", "--no-progress", "--size", "8M", f"{POOL}/changing")
    must("create", folder / "now.fvd", "-b", url, "-F", "raw", "--credentials", known(ceph))
    with mounted(folder, *allowed(ceph)) as mount:
        assert mount.raw("disk").read_bytes() == b"old".ljust(4 * MIB, b".")
        assert mount.raw("now").read_bytes() == b"\1" * MIB + b"." * (3 * MIB) + bytes(4 * MIB)


def test_disks_on_the_cache_of_a_host(folder: Path, ceph: Ceph, template: str) -> None:
    ceph.rbd("snap", "create", "--no-progress", f"{POOL}/template@v1")
    url, who = f"{template}@v1", ("--credentials", known(ceph))
    must("create", folder / "v1-cache.fvd", "-b", url, "-F", "raw", "--copy-on-read", "--prefetch-delay", "1000", *who)
    must("clone", url, "web", "-n", "2", "--into", folder, *who)
    before = ceph.read_bytes()
    with mounted(folder, *allowed(ceph)) as mount:
        for name in ("web-0001", "web-0002"):
            assert read_now(mount.raw(name), MIB, MIB) == DATA[MIB : 2 * MIB]
        assert ceph.read_bytes() - before < 1.1 * MIB
        with mount.raw("web-0001").open("r+b") as disk:
            os.pwrite(disk.fileno(), b"mine", 0)
            must("prefetch", "start", mount.raw("v1-cache"))
            wait_for_log(mount, "v1-cache.fvd: everything is local", LIMIT)
    with mounted(folder) as mount:
        assert mount.raw("web-0001").read_bytes() == b"mine" + DATA[4:].ljust(SIZE - 4, b"\0")
        assert mount.raw("web-0002").read_bytes() == DATA.ljust(SIZE, b"\0")


def test_a_base_that_grows_and_one_that_shrinks(folder: Path, ceph: Ceph, tmp_path: Path) -> None:
    (tmp_path / "four").write_bytes(b"x" * 4 * MIB)
    url = ceph.new_image("sized", tmp_path / "four")
    over(folder, ceph, url)
    ceph.rbd("resize", "--no-progress", "--size", "8M", f"{POOL}/sized")
    with mounted(folder, *allowed(ceph)) as mount:
        assert mount.raw("disk").read_bytes() == b"x" * 4 * MIB
    ceph.rbd("resize", "--no-progress", "--allow-shrink", "--size", "2M", f"{POOL}/sized")
    with mounted(folder, *allowed(ceph)) as mount:
        found = mount.raw("disk").read_bytes()
        assert found == b"x" * 2 * MIB + bytes(2 * MIB)
        assert f"base_img={url} is {2 * MIB} bytes long" in mount.log


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["compact", "over a base"])
def test_a_data_file_keeps_what_was_flushed(
    folder: Path, osd: Ceph, template: str, tmp_path: Path, layout: str
) -> None:
    name = f"data-{layout.split()[0]}"
    osd.rbd("create", "--size", "16M", f"{POOL}/{name}")
    base = ["-b", template, "-F", "raw"] if layout == "over a base" else [str(SIZE)]
    words = [*base, *(["--compact"] if layout == "compact" else [])]
    done = fvdfs(
        "create", folder / "disk.fvd", *words, "--data-file", f"rbd:{POOL}/{name}", "--credentials", known(osd)
    )
    assert done.code == 0, done.err
    expected = bytearray(DATA.ljust(SIZE, b"\0") if layout == "over a base" else SIZE)
    chance = random.Random(layout)
    with mounted(folder, *allowed(osd)) as mount:
        opened = os.open(mount.raw("disk"), os.O_RDWR)
        for _ in range(50):
            at, piece = chance.randrange(SIZE - MIB), chance.randbytes(chance.randrange(1, 64 << 10))
            os.pwrite(opened, piece, at)
            expected[at : at + len(piece)] = piece
        os.fsync(opened)
        osd.kill_osd()
        mount.kill()  # and all that rbd's cache may hold
        with contextlib.suppress(OSError):
            os.close(opened)
        osd.start_osd()
    with mounted(folder, *allowed(osd)) as mount:
        assert mount.raw("disk").read_bytes() == expected
        must("check", folder / "disk.fvd")
        zeros, end = 2 * OBJECT, 4 * OBJECT
        with open(mount.raw("disk"), "r+b", buffering=0) as disk:
            os.pwrite(disk.fileno(), b"x" * (end + MIB), 0)
            os.fsync(disk.fileno())
            full = osd.used(name)
            # A discard does nothing: QEMU does not say which parts of it Ceph leaves as they were.
            refused = subprocess.run(
                ["fallocate", "-p", "-l", str(MIB), mount.raw("disk")], capture_output=True, check=False
            )
            assert refused.returncode == 1
            subprocess.run(["fallocate", "-z", "-o", str(zeros), "-l", str(end - zeros), mount.raw("disk")], check=True)
            os.fsync(disk.fileno())
        assert mount.raw("disk").read_bytes()[: end + MIB] == b"x" * zeros + bytes(end - zeros) + b"x" * MIB
        # Zeros take no space, as far as they are whole objects.
        assert full - osd.used(name) >= (0 if layout == "compact" else 8)


def test_a_write_waits_while_the_data_file_is_away(folder: Path, osd: Ceph) -> None:
    osd.rbd("create", "--size", "16M", f"{POOL}/slow")
    must("create", folder / "disk.fvd", "16M", "--data-file", f"rbd:{POOL}/slow", "--credentials", known(osd))
    must("create", folder / "other.fvd", "1M")
    with mounted(folder, *allowed(osd)) as mount, open(mount.raw("disk"), "r+b"):
        disk = mount.raw("disk")
        read_now(disk, 0)
        osd.kill_osd()
        said = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        words = ["dd", "if=/dev/zero", f"of={disk}", "bs=64K", "count=4", "oflag=direct", "conv=notrunc,fsync"]
        with running(*words, **said) as writing:
            wait_for_log(mount, "its server has not answered for 10 s", LIMIT)
            assert len(read_now(mount.raw("other"), 0)) == 4096
            must("status", mount.point)
            assert writing.poll() is None
            osd.start_osd()
            assert writing.wait(LIMIT) == 0
        wait_for_log(mount, "its server has answered after", LIMIT)
    assert "may be lost" not in mount.log


# --- a server that is away -----------------------------------------------------------------------


@pytest.mark.parametrize("away", ["killed", "stopped"])
def test_reads_wait_until_ceph_is_back(folder: Path, osd: Ceph, template: str, away: str) -> None:
    over(folder, osd, template, "--copy-on-read")
    with mounted(folder, *allowed(osd, "on_base_error=wait")) as mount, open(mount.raw("disk"), "r+b"):
        disk = mount.raw("disk")
        assert read_now(disk, 0) == DATA[:4096]
        osd.kill_osd() if away == "killed" else osd.signal_osd(signal.SIGSTOP)
        with running(*read(disk, MIB), stdout=subprocess.PIPE) as reading:
            wait_until(lambda: outage(mount) is not None and outage(mount)["until"] is None, LIMIT)
            assert read_now(disk, 0) == DATA[:4096]
            assert len(read_now(mount.raw("other"), 0)) == 4096
            assert "base lost since" in must("status", mount.point)
            with running(*read(disk, 2 * MIB)) as other:
                other.kill()
                assert other.wait(LIMIT) == -signal.SIGKILL
            assert reading.poll() is None
            osd.start_osd() if away == "killed" else osd.signal_osd(signal.SIGCONT)
            assert reading.communicate(timeout=LIMIT)[0] == DATA[MIB : MIB + 4096]
        wait_until(lambda: outage(mount)["until"] is not None, LIMIT)


def test_reads_fail_and_the_mount_ends_while_ceph_is_away(folder: Path, osd: Ceph, template: str) -> None:
    over(folder, osd, template, "--copy-on-read")
    with mounted(folder, *allowed(osd)) as mount:
        with open(mount.raw("disk"), "r+b"):
            disk = mount.raw("disk")
            read_now(disk, 0)
            osd.kill_osd()
            failed = subprocess.run(read(disk, MIB), capture_output=True, check=False, timeout=LIMIT)
            assert b"Input/output error" in failed.stderr
            assert read_now(disk, 0) == DATA[:4096]
            assert "base lost since" in must("status", mount.point)
        with open(mount.raw("disk"), "r+b"):  # opened without it
            assert read_now(mount.raw("disk"), 0) == DATA[:4096]
        done = fvdfs(
            "convert",
            "-o",
            "allow_url=rbd:",
            "--credentials",
            known(osd),
            folder / "disk.fvd",
            folder / "copy.raw",
            timeout=LIMIT,
        )
        assert done.code == 1
        assert "imed out" in done.err
        assert "has not answered" not in mount.log  # as is said of one that is waited for
    must("check", folder / "disk.fvd")


def test_without_a_monitor_what_is_open_is_read(folder: Path, ceph: Ceph, template: str) -> None:
    over(folder, ceph, template)
    with mounted(folder, *allowed(ceph)) as mount, open(mount.raw("disk"), "r+b"):
        read_now(mount.raw("disk"), 0)
        ceph.signal_mon(signal.SIGSTOP)
        try:
            assert read_now(mount.raw("disk"), MIB) == DATA[MIB : MIB + 4096]
            done = fvdfs("create", folder / "new.fvd", "-b", template, "-F", "raw", "--credentials", known(ceph))
            assert done.code == 1
            assert "imed out" in done.err
        finally:
            ceph.signal_mon(signal.SIGCONT)
    assert "is lost" not in mount.log


# --- who may not, and what is not there ----------------------------------------------------------


def test_who_is_let_in(folder: Path, ceph: Ceph, template: str) -> None:
    """And what of an image that is not there."""
    ceph.key_of("reader", ceph.folder / "reader", f"{READ_ONLY}, {WATCHES}")
    with_key = ("--credentials", known(ceph, "reader", "reader"))
    must("create", folder / "disk.fvd", "-b", template, "-F", "raw", *with_key)
    with mounted(folder, "-o", f"allow_url=rbd:,credentials={with_key[1]}") as mount:
        assert read_now(mount.raw("disk"), 0) == DATA[:4096]
    done = fvdfs("create", folder / "taken.fvd", "1M", "--data-file", template, "--force", *with_key)
    assert done.code, "it must not be written"
    for url, reason in (
        (f"rbd:{POOL}/nothing", "Ceph has no image nothing"),
        (f"rbd:{POOL}/template@never", "or not this snapshot of it"),
        ("rbd:nowhere/template", "Ceph has no pool nowhere"),
    ):
        done = fvdfs("create", folder / "x.fvd", "-F", "raw", "-b", url, *with_key)
        assert (done.code, reason in done.err) == (2, True), done.err


def test_an_image_and_a_pool_that_are_removed(folder: Path, ceph: Ceph, tmp_path: Path) -> None:
    ceph.ceph("osd", "pool", "create", "gone", "1", "1", "replicated")
    ceph.ceph("osd", "pool", "application", "enable", "gone", "rbd")
    (tmp_path / "x").write_bytes(DATA)
    ceph.rbd("import", "--no-progress", tmp_path / "x", "gone/image")
    over(folder, ceph, "rbd:gone/image")
    with mounted(folder, *allowed(ceph)) as mount, open(mount.raw("disk"), "r+b"):
        assert read_now(mount.raw("disk"), 0) == DATA[:4096]
        with pytest.raises(AssertionError, match="image still has watchers"):
            ceph.rbd("rm", "--no-progress", "gone/image")
        assert read_now(mount.raw("disk"), MIB) == DATA[MIB : MIB + 4096]
    ceph.rbd("rm", "--no-progress", "gone/image")
    with mounted(folder, *allowed(ceph)) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            mount.raw("disk").read_bytes()
        wait_for_log(mount, "Ceph has no image image")
        ceph.ceph("osd", "pool", "rm", "gone", "gone", "--yes-i-really-really-mean-it")
        with pytest.raises(OSError, match="Input/output error"):
            mount.raw("disk").read_bytes()
        wait_for_log(mount, "Ceph has no pool gone")
