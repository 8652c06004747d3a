"""What many disks of a mount stand on: open once, filled once for all, let go when all is local."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from support.mounts import Mount, fvdfs, mounted, must, running, wait_until

MIB = 1 << 20
SIZE = 8 * MIB


class Template:
    """A template on a server that notes what is read of it."""

    def __init__(self, folder: Path, *filters: str) -> None:
        self.data = random.Random(4).randbytes(SIZE)
        self.file = folder / "template.raw"
        self.file.write_bytes(self.data)
        self._log = folder / "nbd.log"
        self.socket = folder / "nbd.sock"
        self.url = f"nbd+unix:///?socket={self.socket}"
        self.command: list[str | Path] = [
            "nbdkit", "-f", "-r", "-U", self.socket, *(f"--filter={name}" for name in ("log", *filters)),
            "file", self.file, f"logfile={self._log}",
        ]  # fmt: skip

    def read(self) -> int:
        """Bytes that were read of it."""
        requests = re.findall(r"Read .*offset=\S+ count=(0x[0-9a-f]+)", self._log.read_text())
        return sum(int(count, 16) for count in requests)


@pytest.fixture
def template(tmp_path: Path) -> Iterator[Template]:
    made = Template(tmp_path, "delay")
    with running(*made.command, "rdelay=20ms"):
        wait_until(made.socket.exists)
        yield made


@pytest.fixture
def images(tmp_path: Path, template: Template) -> Path:
    """A cache of the template, and four disks on it."""
    folder = tmp_path / "images"
    folder.mkdir()
    must("create", folder / "cache.fvd", "--base", template.url, "--base-format", "raw", "--copy-on-read")
    for name in "abcd":
        must("create", folder / f"{name}.fvd", "--base", "cache.fvd")
    return folder


def serve(images: Path, template: Template, *options: str) -> AbstractContextManager[Mount]:
    return mounted(images, "-o", f"allow_url={template.url}", *options)


def open_files(mount: Mount, name: str) -> int:
    """How often the process of a mount has a file open."""
    found = 0
    for link in Path(f"/proc/{mount.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found += os.path.basename(os.readlink(link)) == name
    return found


def read_at(path: Path, at: int, size: int) -> bytes:
    with open(path, "rb") as disk:
        return os.pread(disk.fileno(), size, at)


def stored(image: Path) -> int:
    return image.stat().st_blocks * 512


def test_what_one_disk_has_read_is_there_for_all(images: Path, template: Template) -> None:
    with serve(images, template) as mount:
        assert mount.raw("a").read_bytes() == template.data
        once = template.read()
        assert once <= 1.05 * SIZE
        for name in "bcd":
            assert mount.raw(name).read_bytes() == template.data
        assert template.read() == once
    with serve(images, template) as mount:
        assert mount.raw("b").read_bytes() == template.data
        assert template.read() <= once + MIB
    assert stored(images / "a.fvd") < MIB


def test_a_block_that_all_want_at_once_crosses_the_link_once(images: Path, template: Template) -> None:
    with serve(images, template) as mount:
        found: list[bytes] = []

        def read(name: str) -> None:
            found.append(mount.raw(name).read_bytes())

        threads = [threading.Thread(target=read, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [template.data] * 4
        assert template.read() <= 1.05 * SIZE


def test_a_base_is_open_once_and_closed_with_the_last_disk(images: Path, template: Template) -> None:
    with serve(images, template) as mount:
        with open(mount.raw("a"), "rb"), open(mount.raw("b"), "rb"):
            one = open_files(mount, "cache.fvd")
            with open(mount.raw("c"), "rb"), open(mount.raw("d"), "rb"):
                assert open_files(mount, "cache.fvd") == one == 1
        wait_until(lambda: open_files(mount, "cache.fvd") == 0)
        assert mount.raw("a").read_bytes() == template.data


def test_the_template_is_let_go_when_all_is_local(images: Path, template: Template) -> None:
    (images / "cache.fvd").unlink()
    base = ("--base", template.url, "--base-format", "raw")
    must("create", images / "cache.fvd", *base, "--copy-on-read", "--prefetch-delay", "1")
    with serve(images, template) as mount, open(mount.raw("a"), "rb"), open(mount.raw("b"), "r+b") as disk:
        wait_until(lambda: cache_of(mount)["state"] == "done", 60)
        subprocess.run(["pkill", "-f", str(template.socket)], check=True)
        disk.write(b"mine")
        disk.flush()
        assert mount.raw("a").read_bytes() == template.data
        assert mount.raw("b").read_bytes() == b"mine" + template.data[4:]
        assert mount.raw("c").read_bytes() == template.data
    assert fvdfs("check", images / "cache.fvd").code == 0


def cache_of(mount: Mount) -> dict[str, object]:
    images = json.loads(must("status", mount.point, "--json"))["images"]
    found = [image for image in images if image["image"].endswith("/cache.fvd")]
    assert len(found) == 1
    return dict(found[0])


def test_one_mount_fills_and_another_reads(images: Path, template: Template, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    must("create", other / "e.fvd", "--base", "../images/cache.fvd", "--base-format", "fvd")
    options = ("-o", f"base_path={images}")
    with serve(images, template) as first, open(first.raw("a"), "rb") as a:
        assert os.pread(a.fileno(), MIB, 0) == template.data[:MIB]
        with serve(other, template, *options) as second:
            assert second.raw("e").read_bytes() == template.data
            assert "cache.fvd: another mount or process fills it" in second.log
            assert first.raw("b").read_bytes() == template.data
            assert second.raw("e").read_bytes() == template.data
    before = template.read()
    with serve(other, template, *options) as second:
        assert second.raw("e").read_bytes() == template.data
    assert template.read() <= before + MIB


@pytest.mark.parametrize("layout", [[], ["--compact"], ["--data-file", "auto"]], ids=["flat", "compact", "data-file"])
def test_a_cache_whose_mount_is_killed_is_right(tmp_path: Path, template: Template, layout: list[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    must("create", folder / "cache.fvd", "--base", template.url, "--base-format", "raw", "--copy-on-read", *layout)
    must("create", folder / "a.fvd", "--base", "cache.fvd")
    rng = random.Random(1)
    for _ in range(4):
        with serve(folder, template) as mount, open(mount.raw("a"), "rb") as disk:
            for _ in range(8):
                at = rng.randrange(SIZE)
                assert os.pread(disk.fileno(), 70000, at) == template.data[at : at + 70000]
            disk.close()
            mount.kill()
    with serve(folder, template) as mount:
        assert mount.raw("a").read_bytes() == template.data
    assert fvdfs("check", folder / "cache.fvd").code == 0


def test_a_read_only_mount_fills_nothing(images: Path, template: Template) -> None:
    before = (images / "cache.fvd").read_bytes()
    with serve(images, template, "--read-only") as mount:
        assert mount.raw("a").read_bytes() == template.data
        assert mount.raw("b").read_bytes() == template.data
    assert (images / "cache.fvd").read_bytes() == before


def test_nobody_else_writes_what_others_stand_on(images: Path, template: Template) -> None:
    with serve(images, template) as mount, open(mount.raw("a"), "rb") as disk:
        assert os.pread(disk.fileno(), 512, 0) == template.data[:512]
        with pytest.raises(OSError, match="busy"):
            open(mount.raw("cache"), "r+b")
        assert read_at(mount.raw("cache"), 0, 512) == template.data[:512]
        done = fvdfs("check", images / "cache.fvd")
        assert done.code == 1
        assert "a mount fills it with what its disks read; unmount that first" in done.err


def test_a_base_of_a_cache_that_fails_costs_no_disk_its_local_blocks(images: Path, template: Template) -> None:
    with serve(images, template) as mount, open(mount.raw("a"), "rb") as disk:
        assert os.pread(disk.fileno(), MIB, 0) == template.data[:MIB]
        subprocess.run(["pkill", "-f", str(template.socket)], check=True)
        with open(mount.raw("b"), "rb") as other:
            assert os.pread(other.fileno(), MIB, 0) == template.data[:MIB]
            with pytest.raises(OSError, match="rror"):
                os.pread(other.fileno(), MIB, 4 * MIB)


def test_no_image_is_made_over_a_disk_that_somebody_writes(images: Path, template: Template) -> None:
    must("create", images / "vm.fvd", "1M")
    with serve(images, template) as mount, open(mount.raw("vm"), "r+b"):
        for command in (
            ("create", images / "new.fvd", "--base", "vm.fvd"),
            ("clone", images / "vm.fvd", images / "new"),
        ):
            done = fvdfs(*command)
            assert done.code == 1
            assert "or let the new image stand on a snapshot of it" in done.err
        must("create", images / "new.fvd", "--base", "cache.fvd")


def test_clones_that_are_open_take_memory_for_what_they_have_of_their_own(tmp_path: Path) -> None:
    """The bitmap of such a disk has 640 KiB or more: the pages in which something is local take memory, and survive."""
    images, count, size = tmp_path / "images", 20, 20 << 30
    images.mkdir()
    with open(images / "template.raw", "wb") as file:
        file.truncate(size)
    must("clone", images / "template.raw", "vm", "-n", str(count), "--into", images)
    written = range(0, size, size // 4)
    with mounted(images) as mount, open(mount.raw("vm-0001"), "r+b", buffering=0) as disk:
        for at in written:
            os.pwrite(disk.fileno(), b"mine", at)
    with mounted(images) as mount, contextlib.ExitStack() as stack:
        names = [f"vm-{number:04}" for number in range(1, count + 1)]
        disks = [stack.enter_context(open(mount.raw(names[0]), "rb"))]
        before = anonymous_memory(mount)
        disks += [stack.enter_context(open(mount.raw(name), "rb")) for name in names[1:]]
        assert anonymous_memory(mount) - before < (count - 1) * 256 << 10
        assert [os.pread(disks[0].fileno(), 5, at) for at in written] == [b"mine\0"] * len(written)
        assert os.pread(disks[1].fileno(), 4, 0) == bytes(4)


def anonymous_memory(mount: Mount) -> int:
    """Bytes that the process of a mount has in memory for itself."""
    text = Path(f"/proc/{mount.pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) * 1024
