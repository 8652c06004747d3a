"""Copy-on-read, prefetching and profiles through a real mount: what the user sees and steers."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from fvdfs.prefetch.pressure import DiskPressure
from support import reference
from support.devices import small_disk
from support.mounts import MIB, Mount, fvdfs, mounted, must, running, wait_until

SIZE = 24 * MIB
CONTENT = random.Random(7).randbytes(SIZE)


@pytest.fixture
def base(folder: Path) -> Path:
    """A base of random bytes."""
    path = folder / "base.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def server(folder: Path, base: Path) -> Iterator[list[str]]:
    """The same base behind an NBD server of 8 MB/s: the options of `create`."""
    with serve(folder):
        yield ["--base", f"nbd+unix:///?socket={folder}/nbd.sock", "--base-format", "raw"]


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The NBD server, once it listens."""
    socket = folder / "nbd.sock"
    socket.unlink(missing_ok=True)
    command = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=rate", "file", str(folder / "base.raw"), "rate=64M"]
    with running(*command, "burstiness=0.1", stderr=subprocess.DEVNULL) as process:
        wait_until(socket.exists)
        yield process


def is_done(mount: Mount, name: str = "disk") -> bool:
    return bool(mount.status(name)["state"] == "done")


def read_direct(path: Path, offset: int, length: int) -> bytes:
    """Read from the file system itself, past the kernel's cache."""
    data = subprocess.run(
        ["dd", f"if={path}", f"skip={offset}", f"count={length}", "bs=1M", "iflag=direct,skip_bytes,count_bytes"],
        check=True,
        capture_output=True,
    )
    return data.stdout


def write(mount: Mount, offset: int, data: bytes) -> None:
    """Write to the disk, and flush it."""
    with open(mount.raw("disk"), "r+b", buffering=0) as disk:
        disk.seek(offset)
        disk.write(data)
        os.fsync(disk.fileno())


def test_what_was_read_once_is_local(folder: Path, base: Path) -> None:
    must("create", folder / "disk.fvd", "32M", "--base", "base.raw", "--base-format", "raw", "--copy-on-read")
    with mounted(folder) as mount, open(mount.raw("disk"), "r+b"):
        assert read_direct(mount.raw("disk"), 0, 4 * MIB) == CONTENT[: 4 * MIB]
        wait_until(lambda: mount.status("disk")["local_bytes"] == 4 * MIB)
        base.write_bytes(bytes(SIZE))  # nobody should do that; here it shows where bytes come from
        assert read_direct(mount.raw("disk"), 0, 4 * MIB) == CONTENT[: 4 * MIB]
        assert read_direct(mount.raw("disk"), 4 * MIB, MIB) == bytes(MIB)
    assert reference.check(folder / "disk.fvd", "fvdfs") == []
    with mounted(folder) as mount:
        assert read_direct(mount.raw("disk"), 0, 4 * MIB) == CONTENT[: 4 * MIB]


def test_a_mount_that_only_reads_changes_nothing(folder: Path, base: Path) -> None:
    options = ["--base", "base.raw", "--base-format", "raw", "--copy-on-read", "--prefetch-delay", "1"]
    must("create", folder / "disk.fvd", "32M", *options)
    before = (folder / "disk.fvd").read_bytes()
    with mounted(folder, "--read-only") as mount, open(mount.raw("disk"), "rb") as disk:
        assert disk.read(4 * MIB) == CONTENT[: 4 * MIB]
        assert mount.status("disk")["state"] == "off"
    assert (folder / "disk.fvd").read_bytes() == before


@pytest.mark.parametrize("layout", [[], ["--compact"], ["--data-file", "disk.data"], ["--journal-size", "none"]])
def test_prefetching_by_the_header_ends_without_a_base(folder: Path, base: Path, layout: list[str]) -> None:
    options = ["--base", "base.raw", "--base-format", "raw", "--prefetch-delay", "1"]
    must("create", folder / "disk.fvd", "32M", *options, *layout)
    expected = bytearray(CONTENT + bytes(8 * MIB))
    with mounted(folder) as mount:
        with open(mount.raw("disk"), "r+b", buffering=0) as disk:
            assert mount.status("disk")["state"] == "waiting"
            disk.seek(5 * MIB + 100)
            disk.write(b"written before")
            expected[5 * MIB + 100 : 5 * MIB + 114] = b"written before"
            wait_until(lambda: is_done(mount))
            assert mount.status("disk")["local_share"] == 1.0
            base.unlink()
            disk.seek(6 * MIB + 100)
            disk.write(b"written after")
            expected[6 * MIB + 100 : 6 * MIB + 113] = b"written after"
            os.fsync(disk.fileno())
        assert "no longer needed" in mount.log
        assert mount.raw("disk").read_bytes() == expected
        if layout == ["--compact"]:
            write(mount, 28 * MIB, b"a new chunk")
            mount.kill()
            expected[28 * MIB : 28 * MIB + 11] = b"a new chunk"
            mount.mount()
            assert mount.raw("disk").read_bytes() == expected
            assert "skipped" not in mount.log
    assert json.loads(must("info", folder / "disk.fvd", "--json"))["all_data_in_fvd_img"] == 1
    assert b"".join(reference.read_disk(folder / "disk.fvd")) == expected


def test_prefetching_a_disk_that_nobody_has_open(folder: Path, server: list[str]) -> None:
    must("create", folder / "disk.fvd", "32M", *server)
    with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
        assert "closed" in must("status", mount.point)
        must("prefetch", "start", mount.raw("disk"))
        assert mount.status("disk")["open"]
        assert os.getxattr(mount.raw("disk"), "user.fvdfs.prefetch") in (b"running", b"done")
        wait_until(lambda: not mount.status("disk")["open"])
        assert mount.status("disk")["local_share"] == 1.0
    assert json.loads(must("info", folder / "disk.fvd", "--json"))["all_data_in_fvd_img"] == 1
    assert b"".join(reference.read_disk(folder / "disk.fvd")) == CONTENT + bytes(8 * MIB)


def test_pause_go_on_and_stop(folder: Path, server: list[str]) -> None:
    must("create", folder / "disk.fvd", "32M", *server)
    # A minute for all: on a busy host each command takes seconds.
    with mounted(folder, "-o", "allow_url=nbd+unix:///,prefetch_max=400k") as mount:
        raw = mount.raw("disk")
        must("prefetch", "start", raw)
        wait_until(lambda: mount.status("disk")["prefetched"] > 0)
        must("prefetch", "pause", raw)
        wait_until(lambda: mount.status("disk")["state"] == "paused")
        assert mount.status("disk")["reason"] == "as asked"
        assert "paused" in must("status", mount.point)
        have = until_it_stays(mount)
        must("prefetch", "start", raw)
        wait_until(lambda: mount.status("disk")["prefetched"] > have)
        must("prefetch", "stop", raw)
        wait_until(lambda: not mount.status("disk")["open"])
        assert 0 < mount.status("disk")["local_share"] < 1
        for command in ("pause", "stop"):
            done = fvdfs("prefetch", command, raw)
            assert done.code == 2
            assert "nothing is being prefetched" in done.err
        assert raw.read_bytes()[:SIZE] == CONTENT


def until_it_stays(mount: Mount) -> int:
    """Until what was under way has ended; the bytes that were prefetched by then."""
    have = -1
    for _ in range(10):
        before, have = have, int(mount.status("disk")["prefetched"])
        if before == have:
            return have
        time.sleep(3)  # more than what is under way takes at the cap
    pytest.fail(f"{have} bytes, and it goes on")


def test_unmounted_while_reads_are_under_way(folder: Path, base: Path) -> None:
    """What is under way ends first; then the mount is gone, and so is its process."""
    socket = folder / "nbd.sock"
    command = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=delay", "file", str(base), "rdelay=1"]
    with running(*command, stderr=subprocess.DEVNULL):
        wait_until(socket.exists)
        must("create", folder / "disk.fvd", "32M", "--base", f"nbd+unix:///?socket={socket}", "--base-format", "raw")
        with mounted(folder, "-o", "allow_url=nbd+unix:///") as mount:
            must("prefetch", "start", mount.raw("disk"))
            wait_until(lambda: mount.status("disk")["prefetched"] > 0)
            mount.umount()
            assert "unmounted" in mount.log
        assert json.loads(must("info", folder / "disk.fvd", "--json"))["clean_shutdown"] == 1


def test_the_cap_of_the_mount(folder: Path, base: Path) -> None:
    """A cap is a bound on what comes in a time, and so can be tested without a measure of speed."""
    for name in ("one", "two"):
        must("create", folder / f"{name}.fvd", "24M", "--base", "base.raw", "--base-format", "raw")
    with mounted(folder, "-o", "prefetch_max=4M,prefetch_jobs=1") as mount:
        start = time.monotonic()
        for name in ("one", "two"):
            must("prefetch", "start", mount.raw(name))
        wait_until(lambda: mount.status("two")["prefetched"] > MIB)
        time.sleep(1)
        copied = [mount.status(name)["prefetched"] for name in ("one", "two")]
        assert sum(copied) < 4 * MIB * (time.monotonic() - start) + 4 * MIB
        assert min(copied) > 0
        for name in ("one", "two"):
            must("prefetch", "stop", mount.raw(name))


def test_a_server_that_dies_and_comes_back(folder: Path, base: Path) -> None:
    source = f"nbd+unix:///?socket={folder}/nbd.sock"
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(serve(folder))
        must("create", folder / "disk.fvd", "32M", "--base", source, "--base-format", "raw", "--copy-on-read")
        with mounted(folder, "-o", "allow_url=nbd+unix:///,prefetch_max=6M") as mount, open(mount.raw("disk"), "r+b"):
            must("prefetch", "start", mount.raw("disk"))
            wait_until(lambda: mount.status("disk")["prefetched"] > 2 * MIB)
            process.kill()
            process.wait()
            wait_until(lambda: mount.status("disk")["state"] == "paused", timeout=60)
            assert mount.status("disk")["base_outage"]["until"] is None
            assert read_direct(mount.raw("disk"), 0, 64 << 10) == CONTENT[: 64 << 10]
            for least, most in (
                (7, 20),
                (0, 2),
            ):  # seconds; once it is known that the server is away, they fail at once
                began = time.monotonic()
                with pytest.raises(subprocess.CalledProcessError) as caught:
                    read_direct(mount.raw("disk"), 20 * MIB, 4096)
                assert os.strerror(errno.EIO).encode() in caught.value.stderr
                assert least < time.monotonic() - began < most
            stack.enter_context(serve(folder))
            wait_until(lambda: is_done(mount), timeout=90)
            assert read_direct(mount.raw("disk"), 0, SIZE) == CONTENT
            assert "its server is back" in mount.log
            assert len(mount.log.splitlines()) < 8, mount.log


def test_killed_while_prefetching(folder: Path, base: Path) -> None:
    must("create", folder / "disk.fvd", "32M", "--base", "base.raw", "--base-format", "raw", "--compact")
    rng = random.Random(3)
    expected = bytearray(CONTENT + bytes(8 * MIB))
    with mounted(folder, "-o", "prefetch_max=16M") as mount:
        for round_ in range(4):
            must("prefetch", "start", mount.raw("disk"))
            data = rng.randbytes(5000)
            at = rng.randrange(SIZE)
            write(mount, at, data)
            expected[at : at + 5000] = data
            time.sleep(0.1 * round_)
            mount.kill()
            mount.mount()
            assert hashlib.sha256(mount.raw("disk").read_bytes()).digest() == hashlib.sha256(expected).digest()


def test_no_space(folder: Path, base: Path, tmp_path: Path) -> None:
    """Prefetching waits for space, and the guest's reads go on."""
    small = tmp_path / "small"
    with small_disk(small, "12M"):
        ballast = small / "ballast"
        ballast.write_bytes(bytes(4 * MIB))
        options = ["--base", str(base), "--base-format", "raw", "--journal-size", "64K"]
        must("create", small / "disk.fvd", "8M", *options)
        with mounted(small, "-o", f"base_path={folder}") as mount, open(mount.raw("disk"), "r+b"):
            (small / "more").write_bytes(bytes(3 * MIB))
            must("prefetch", "start", mount.raw("disk"))
            wait_until(lambda: mount.status("disk")["state"] == "failed")
            assert os.strerror(errno.ENOSPC) in mount.status("disk")["reason"]
            assert read_direct(mount.raw("disk"), 0, 8 * MIB) == CONTENT[: 8 * MIB]
            ballast.unlink()
            (small / "more").unlink()
            wait_until(lambda: is_done(mount))
            assert read_direct(mount.raw("disk"), 0, 8 * MIB) == CONTENT[: 8 * MIB]


# --- profiles -------------------------------------------------------------------------------------


def test_a_profile_is_recorded_shown_and_used(folder: Path, base: Path, tmp_path: Path) -> None:
    cow = ["--base", "base.raw", "--base-format", "raw"]
    must("create", folder / "first.fvd", "32M", *cow)
    assert fvdfs("profile", "show", folder / "first.fvd").code == 2
    must("profile", "record", folder / "first.fvd")
    order = [9 * MIB, 2 * MIB, 20 * MIB]
    with mounted(folder) as mount, open(mount.raw("first"), "r+b"):
        for at in order:
            read_direct(mount.raw("first"), at, 128 << 10)
    text = must("profile", "show", folder / "first.fvd")
    assert [line.split() for line in text.splitlines()[1:]] == [[str(at), str(128 << 10)] for at in order]
    info = json.loads(must("info", folder / "first.fvd", "--json"))
    assert (info["generate_prefetch_profile"], info["prefetch_profile_entries"]) == (0, 3)
    (tmp_path / "profile").write_text(text)
    for source in (folder / "first.fvd", tmp_path / "profile"):
        must("create", folder / "second.fvd", "32M", *cow, "--profile", source, "--force")
        with mounted(folder) as mount:
            with open(mount.raw("second"), "r+b"):
                wait_until(lambda: mount.status("second")["prefetched"] == 3 * 128 << 10)
                assert mount.status("second")["local_bytes"] == 3 * 128 << 10
            base.write_bytes(bytes(SIZE))
            for at in order:
                assert read_direct(mount.raw("second"), at, 128 << 10) == CONTENT[at : at + (128 << 10)]
            base.write_bytes(CONTENT)


def test_recording_by_the_mount(folder: Path, base: Path) -> None:
    must("create", folder / "disk.fvd", "32M", "--base", "base.raw", "--base-format", "raw")
    with mounted(folder, "-o", "record_profile") as mount:
        for at in (3 * MIB, 7 * MIB):
            with open(mount.raw("disk"), "r+b"):
                read_direct(mount.raw("disk"), at, 4096)
    assert must("profile", "show", folder / "disk.fvd").splitlines()[1:] == [f"{3 * MIB} 4096"]  # once is enough


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (["create", "plain.fvd", "1M", "--profile", "base.raw"], "needs a base"),
        (["create", "x.fvd", "1M", "--base", "base.raw", "--profile", "base.raw"], "line 1"),
        (["create", "x.fvd", "1M", "--base", "base.raw", "--profile", "nothing"], "No such file"),
        (["profile", "record", "alone.fvd"], "has no base"),
        (["profile", "record", "base.raw"], "not an FVD image"),
        (["profile", "show", "alone.fvd"], "holds no profile"),
        (["status", "."], "not mounted there"),
        (["prefetch", "start", "base.raw"], "is not a raw file in a mount of fvdfs"),
        (["prefetch", "start", "none.raw"], "no such file"),
        (["map", "base.raw"], "is not a raw file in a mount of fvdfs"),
        (["map", "none.fvd"], "No such file"),
    ],
)
def test_mistakes(folder: Path, base: Path, make: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    must("create", "alone.fvd", "1M")
    done = fvdfs(*make)
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("option", ["prefetch_jobs=0", "prefetch_jobs=x", "prefetch_max=x"])
def test_mistaken_options(folder: Path, tmp_path: Path, option: str) -> None:
    (tmp_path / "mnt").mkdir()
    done = fvdfs("mount", folder, tmp_path / "mnt", "-o", option)
    assert done.code == 2
    assert option.partition("=")[0] in done.err


# --- what is seen ---------------------------------------------------------------------------------


def test_attributes_and_map(folder: Path, base: Path, tmp_path: Path) -> None:
    cow = ["--base", "base.raw", "--base-format", "raw", "--compact", "--block-size", "64K"]
    must("create", folder / "disk.fvd", "32M", *cow)
    with mounted(folder) as mount:
        raw = mount.raw("disk")
        assert set(os.listxattr(raw)) >= {"user.fvdfs.status", "user.fvdfs.prefetch", "user.fvdfs.local_share"}
        with open(raw, "r+b", buffering=0) as disk:
            disk.write(CONTENT[: 6 * MIB])
            os.fsync(disk.fileno())
            assert os.getxattr(raw, "user.fvdfs.local_share") == b"0.25"
            assert os.getxattr(raw, "user.fvdfs.image") == os.fsencode(folder / "disk.fvd")
            with pytest.raises(OSError):
                os.setxattr(raw, "user.fvdfs.status", b"x")
            with pytest.raises(OSError):
                os.setxattr(raw, "user.fvdfs.prefetch", b"hurry")
            mapped = json.loads(must("map", raw, "--json"))
        shown = json.loads(must("status", mount.point, "--json"))
        assert [image["name"] for image in shown["images"]] == ["disk.raw"]
        assert shown["images"][0]["local_bytes"] == 6 * MIB
    assert mapped == json.loads(must("map", folder / "disk.fvd", "--json"))
    sums = [sum(column) for column in zip(*mapped["cells"], strict=True)]
    assert dict(zip(mapped["states"], sums, strict=True)) == {"stored": 6 * MIB, "base": 18 * MIB, "hole": 8 * MIB}
    text = must("map", folder / "disk.fvd")
    assert "18.8%" in text
    assert "56.2%" in text
    must("map", folder / "disk.fvd", "--png", tmp_path / "map.png")
    from PIL import Image

    with Image.open(tmp_path / "map.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 16) or []
    assert len(colours) >= 4  # three states, and the lines between


def test_watch(folder: Path, base: Path) -> None:
    must("create", folder / "disk.fvd", "32M", "--base", "base.raw", "--base-format", "raw")
    with mounted(folder) as mount, open(mount.raw("disk"), "r+b"):
        command = [
            "timeout",
            "-s",
            "INT",
            "3",
            "script",
            "-qec",
            f"{sys.executable} -m fvdfs status --watch {mount.point}",
            "/dev/null",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "1 of 1 disks open" in done.stdout
        assert re.search(r"disk +0\.0%", done.stdout)


def test_fields_that_make_no_sense(folder: Path, base: Path) -> None:
    """What an image says of prefetching is bounded, whoever wrote it."""
    must("create", folder / "disk.fvd", "32M", "--base", "base.raw", "--base-format", "raw", "--prefetch-delay", "1")
    raw = (folder / "disk.fvd").read_bytes()
    header = Header.decode(raw, "disk.fvd")
    for name in (
        "num_prefetch_slots",
        "bytes_per_prefetch",
        "prefetch_read_throughput_measure_time",
        "prefetch_perf_calc_alpha",
        "prefetch_min_read_throughput",
        "prefetch_max_read_throughput",
        "prefetch_throttle_time",
        "max_outstanding_copy_on_read_data",
        "prefetch_profile_entries",
        "unit_of_PrefetchProfileEntry_len",
    ):
        for value in (-(1 << 31), -1, 0, (1 << 31) - 1):
            if (name, value) in (
                ("prefetch_min_read_throughput", (1 << 31) - 1),  # pauses by its own rule
                ("prefetch_throttle_time", (1 << 31) - 1),
            ):
                continue
            image = folder / f"{name}{value}.fvd"
            changed = with_fields(header, **{name: value}).encode()
            image.write_bytes(changed + raw[HEADER_SIZE : header.metadata_size])
    with mounted(folder) as mount:
        names = sorted(path.stem for path in mount.point.iterdir() if path.stem != "disk")
        assert len(names) > 30
        for name in names:
            with open(mount.raw(name), "r+b"):
                must("prefetch", "start", mount.raw(name))
                wait_until(lambda name=name: is_done(mount, name))  # type: ignore[misc]
                assert read_direct(mount.raw(name), 0, SIZE) == CONTENT
            (folder / f"{name}.fvd").unlink()


# --- who uses the disk ----------------------------------------------------------------------------


def test_pressure_counts_only_while_others_use_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By counters that are made up here."""
    now = 0.0
    stalled = sectors = own = 0
    files = {"pressure": tmp_path / "pressure", "stat": tmp_path / "stat", "io": tmp_path / "self" / "io"}
    files["io"].parent.mkdir()
    monkeypatch.setattr("fvdfs.prefetch.pressure.time.monotonic", lambda: now)
    pressure = DiskPressure(str(tmp_path), str(files["pressure"]), str(tmp_path))
    pressure._stat_file = str(files["stat"])

    def look(stall: int, moved: int, asked: int) -> float:
        """Milliseconds and bytes more than the last time."""
        nonlocal now, stalled, sectors, own
        now, stalled, sectors, own = now + 0.1, stalled + stall * 1000, sectors + moved // 512, own + asked
        files["pressure"].write_text(f"some avg10=0.00 total={stalled}\n")
        files["stat"].write_text(f"0 0 {sectors} 0 0 0 0 0 0 {round(now * 1000)} 0\n")
        files["io"].write_text(f"rchar: 5\nread_bytes: {own}\nwrite_bytes: 0\n")
        found = pressure()
        assert found is not None
        return found

    assert look(90, MIB, 0) == 0
    assert look(90, MIB, MIB) == 0, "ours"
    assert look(90, 0, 8 * MIB) == 0, "not yet on the disk"
    assert look(90, 6 * MIB, 0) == 0, "now it is"
    assert look(90, 4 * MIB, 0) == pytest.approx(0.09), "more than we asked for"
    assert look(900, 4 * MIB, 0) == pytest.approx(0.19), "not longer than the disk was busy"
    assert look(90, 8 << 10, 0) == pytest.approx(0.19), "next to nothing"
    files["io"].unlink()
    monkeypatch.setattr(DiskPressure, "_asked_for", lambda self, process: None)
    files["pressure"].write_text(f"some avg10=0.00 total={stalled + 50_000}\n")
    assert pressure() == pytest.approx(0.19), "the disk was not busy"
    files["stat"].write_text("")
    files["pressure"].write_text(f"some avg10=0.00 total={stalled + 100_000}\n")
    assert pressure() == pytest.approx(0.24), "where nothing else is known it counts"
