"""What `status`, `info` and `map` say of disks: why one cannot be opened, what a mount knows, and the same figures."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from support.mounts import FVDFS, MIB, fvdfs, mounted, must, wait_for_end

BLOCK = 64 << 10
SIZE, BASE = 20 * MIB, 5 * MIB + 512  # the last block is not whole


@pytest.fixture
def disk(folder: Path) -> Path:
    """A disk on a smaller template."""
    (folder / "base.raw").write_bytes(os.urandom(BASE))
    must("create", folder / "vm.fvd", str(SIZE), "-b", "base.raw", "-F", "raw", "--block-size", "64K")
    return folder / "vm.fvd"


def shown(mountpoint: Path, name: str) -> dict[str, Any]:
    """What `status` says of a disk."""
    images = json.loads(must("status", mountpoint, "--json"))["images"]
    (found,) = [image for image in images if image["name"] == name]
    return dict(found)


def test_status_says_why_a_disk_could_not_be_opened(disk: Path) -> None:
    base = disk.parent / "base.raw"
    with mounted(disk.parent) as mount:
        assert shown(mount.point, "vm.raw")["open_failed"] is None
        base.rename(disk.parent / "elsewhere")
        with pytest.raises(OSError, match="Input/output"):
            mount.raw("vm").read_bytes()
        reason = shown(mount.point, "vm.raw")["open_failed"]["reason"]
        assert str(disk) in reason
        assert f"base_img=base.raw: {base}: No such file" in reason
        assert "fvdfs rebase" in reason
        (line,) = [line for line in must("status", mount.point).splitlines() if line.startswith("vm.raw")]
        assert "could not be opened at 2" in line
        assert reason in line
        (disk.parent / "elsewhere").rename(base)
        with open(mount.raw("vm"), "rb"):
            assert shown(mount.point, "vm.raw")["open_failed"] is None


def test_status_of_many_disks(folder: Path) -> None:
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("clone", folder / "base.raw", "a-machine-with-a-long-name", "-n", "400", "--into", folder, "-F", "raw")
    with mounted(folder) as mount:
        found = json.loads(must("status", mount.point, "--json"))["images"]
        assert len(json.dumps(found)) > 65536  # more than an attribute holds
        assert [image["name"] for image in found] == sorted(os.listdir(mount.point))
        assert len(found) == 400


def test_an_open_image_is_shown_as_its_mount_knows_it(disk: Path) -> None:
    with mounted(disk.parent) as mount, open(mount.raw("vm"), "r+b", buffering=0) as file:
        file.write(bytes(range(256)) * (3 * MIB // 256))
        file.truncate(SIZE + MIB)
        os.fsync(file.fileno())
        facts = json.loads(must("info", disk, "--json"))
        assert (facts["open_in"], facts["problems"]) == (str(mount.raw("vm")), [])
        assert (facts["virtual_size"], facts["local_bytes"], facts["local_blocks"]) == (SIZE + MIB, 3 * MIB, 48)
        assert "open in a mount" in must("info", disk)
        assert must("map", disk, "--json") == must("map", mount.raw("vm"), "--json")
        os.link(disk, disk.parent / "other.fvd")
        other = fvdfs("map", disk.parent / "other.fvd")  # which no mount shows as open under this name
        assert (other.code, other.err.count("\n")) == (1, 1)
        assert "or name the raw file in its mount" in other.err
    assert json.loads(must("info", disk, "--json"))["open_in"] is None


def test_an_image_in_a_mount_of_another_user(nobody: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "images"
        folder.mkdir()
        must("create", folder / "vm.fvd", "1M")
        with mounted(folder) as mount, open(mount.raw("vm"), "r+b"):
            for word in ("map", "info"):
                command = [*nobody, *FVDFS, word, str(folder / "vm.fvd")]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert f"root has mounted its folder at {mount.point}: ask as root" in done.stdout + done.stderr


def test_an_image_whose_mount_has_died(disk: Path) -> None:
    with mounted(disk.parent) as mount:
        with contextlib.suppress(OSError), open(mount.raw("vm"), "r+b", buffering=0) as file:  # its closing fails
            file.write(bytes(MIB))
            os.fsync(file.fileno())
            os.kill(mount.pid, 9)
            wait_for_end(mount.pid)
            for words in ("info", "map"):  # the journal is replayed in memory
                assert json.loads(must(words, disk, "--json"))["local_bytes"] == MIB
        for word, path in (("map", mount.raw("vm")), ("status", mount.point), ("status", mount.raw("vm"))):
            done = fvdfs(word, path)
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert f"clear it away with: fvdfs umount {mount.point}" in done.err
        mount.clear()


def test_how_much_is_local_is_the_same_everywhere(disk: Path, tmp_path: Path) -> None:
    last = BASE - BASE % BLOCK
    with mounted(disk.parent) as mount:
        with open(mount.raw("vm"), "r+b", buffering=0) as file:
            for at in (0, last):  # the last block of the base is not whole
                os.pwrite(file.fileno(), b"x" * BLOCK, at)
            os.fsync(file.fileno())
            status = shown(mount.point, "vm.raw")
            found = [status, *(json.loads(must(words, disk, "--json")) for words in ("info", "map"))]
            texts = [must(words, disk) for words in ("info", "map")]
        found.append(shown(mount.point, "vm.raw"))
    found += [json.loads(must(words, disk, "--json")) for words in ("info", "map")]
    texts += [must(words, disk) for words in ("info", "map")]
    local = BLOCK + BASE - last
    for facts in found:
        assert facts["local_bytes"] == local
        assert facts["local_share"] == local / BASE
        assert facts["disk_local_share"] == 1 - (BASE - local) / SIZE
    for text in texts:
        assert f"{local / BASE:.1%} of the base, 64.5 KiB of 5 MiB; {1 - (BASE - local) / SIZE:.1%} of the disk" in text
    cells = found[2]["cells"]
    assert sum(cell[1] for cell in cells) == BASE - local  # what map has in the base
