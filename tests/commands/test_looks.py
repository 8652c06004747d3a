"""What `status`, `info` and `map` say of disks: why one cannot be opened, what a mount knows, and the same figures."""

from __future__ import annotations

import contextlib
import fcntl
import html
import html.parser
import json
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands import map as fvdfs_map
from fvdfs.commands import rows
from fvdfs.errors import UsageError
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


def test_status_says_what_to_do_about_a_damaged_disk(folder: Path) -> None:
    must("create", folder / "vm.fvd", "64M")
    os.truncate(folder / "vm.fvd", 20_000)
    with mounted(folder) as mount, open(mount.raw("vm"), "rb"):
        (line,) = must("status", mount.raw("vm")).splitlines()[1:]
        assert f"was cut at byte 11808 of {64 * MIB}; fvdfs check {folder}/vm.fvd says what is lost" in line


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


# --- the map as a page and as a picture -------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    """Which elements a page has, each closed; the text of its tooltips; the squares' parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tips: list[str] = []
        self.parts: list[dict[str, float]] = []
        self.names: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names += [name for name, _ in attrs]
        if tag == "g":
            self.parts.append({})
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.parts[-1][str(given["class"])] = float(given["width"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-2:] == ["g", "title"]:
            self.tips.append(data)


@pytest.mark.parametrize("size", [20 * MIB, 2 << 40])
def test_a_map_as_a_page(folder: Path, tmp_path: Path, size: int) -> None:
    (folder / "base.raw").write_bytes(os.urandom(BASE))
    image = folder / "<b>vm&amp;.fvd"
    must("create", image, str(size), "-b", "base.raw", "-F", "raw", "--block-size", "64K")
    with mounted(folder) as mount, open(mount.raw("<b>vm&amp;"), "r+b", buffering=0) as file:
        file.write(b"x" * BLOCK)
        file.seek(MIB)
        file.write(b"x" * MIB)
        assert must("map", image, "--html", tmp_path / "map.html") == ""
        found = json.loads(must("map", image, "--json"))
    text = (tmp_path / "map.html").read_text()
    page = _Page(text)
    assert not {"src", "href", "srcset", "data"} & {*page.names}  # nothing is fetched
    assert not re.search(r"https?:|url\(|@import|<link|//", text)
    assert "<h1>&lt;b&gt;vm&amp;amp;.fvd</h1>" in text
    assert "prefers-color-scheme: dark" in text
    whole = sum(sum(cell) for cell in found["cells"])
    for total in map(sum, zip(*found["cells"], strict=True)):
        assert html.escape(rows.percent(total / whole)) in text
    assert len(page.tips) == len(page.parts) == len(found["cells"])
    for counts, parts, tip in zip(found["cells"], page.parts, page.tips, strict=True):
        there = [state for state, count in zip(found["states"], counts, strict=True) if count]
        assert list(parts) == there  # however little it is
        assert all(width > 1 for width in parts.values())
        assert sum(parts.values()) == pytest.approx(12, abs=0.05)
        assert all(f"\n{state} " in tip for state in there)


def test_a_map_as_a_picture_says_what_it_shows(disk: Path, tmp_path: Path) -> None:
    from PIL import Image

    sizes = []
    for name in ("vm.fvd", f"{'a-long-name' * 20}.fvd"):
        os.rename(disk, disk.parent / name)
        disk = disk.parent / name
        must("map", disk, "--png", tmp_path / "map.png")
        with Image.open(tmp_path / "map.png") as opened:
            picture = opened.convert("RGB")
        sizes.append(picture.size)
        below = fvdfs_map.TOP + 20 * fvdfs_map.SQUARE
        for colour in fvdfs_map.COLOURS.values():  # the legend; nothing is stored, which only the legend can show
            found = [y for y in range(below, picture.height) if picture.getpixel((fvdfs_map.LEFT, y)) == colour]
            assert found, colour
        for box in ((0, 0, picture.width, fvdfs_map.TOP), (0, fvdfs_map.TOP, fvdfs_map.LEFT - 4, below)):
            assert picture.crop(box).getextrema() != ((255, 255),) * 3  # its title and scale; where rows begin
        right = picture.crop((picture.width - fvdfs_map.MARGIN + 2, 0, picture.width, picture.height))
        assert right.getextrema() == ((255, 255),) * 3  # nothing is cut off
    assert sizes[0] == sizes[1]


def test_a_picture_needs_a_font_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Pillow has from 10.1 on; an older one takes no size, and needs one of the system."""
    from PIL import ImageFont

    def nothing(*_: object) -> None:
        raise OSError("cannot open resource")

    monkeypatch.setattr(ImageFont, "load_default", lambda: None)
    monkeypatch.setattr(ImageFont, "truetype", nothing)
    with pytest.raises(UsageError, match=r"needs the package Pillow, 10\.1 or newer"):
        fvdfs_map.draw_map({}, str(tmp_path / "map.png"), "vm.fvd")


@pytest.mark.parametrize("ending", ["html", "png"])
def test_only_an_older_map_is_overwritten(disk: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"map.{ending}"
    for _ in range(2):
        must("map", disk, f"--{ending}", path)
    path.write_bytes(b"something else")
    done = fvdfs("map", disk, f"--{ending}", path)
    assert (done.code, path.read_bytes()) == (2, b"something else")
    assert f"{path} exists already, and is no p" in done.err
    assert fvdfs("map", disk, f"--{ending}", disk).code == 2
    assert "fvd" in must("info", disk)


def test_a_map_to_standard_output(disk: Path, tmp_path: Path) -> None:
    for ending, first in (("png", b"\x89PNG"), ("html", b"<!DOCTYPE html>")):
        command = [*FVDFS, "map", disk.name, f"--{ending}", "-"]
        done = subprocess.run(command, capture_output=True, cwd=disk.parent, timeout=60, check=True)
        assert done.stdout.startswith(first)
        assert b"stored" not in done.stderr
    assert not (disk.parent / "-").exists()
    for words in (["--png", "-", "--html", "-"], ["--png", "-", "--json"], ["--json", "--html", "-"]):
        assert "takes one of" in fvdfs("map", disk, *words).err
    must("map", disk, "--png", tmp_path / "map.png", "--html", "-")
    assert (tmp_path / "map.png").exists()
    ours, theirs = pty.openpty()
    done = subprocess.run([*FVDFS, "map", disk, "--png", "-"], stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, b"is a terminal" in done.stderr) == (2, True)


@pytest.mark.parametrize(("words", "width"), [("info vm.fvd", 40), ("info vm.fvd", 80), ("doctor", 40)])
def test_what_is_in_columns_fits(disk: Path, words: str, width: int) -> None:
    """But for single words, which stay whole."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen([*FVDFS, *words.split()], stdout=theirs, cwd=disk.parent, env=environment) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as terminal:
            while data := terminal.read(1 << 16):
                text += data
    assert process.returncode == 0
    lines = text.decode().splitlines()
    assert len(lines) > 10
    for line in lines:
        assert len(line) <= width or len(line.split()[-1]) >= 16
        assert line == line.rstrip()
    piped = subprocess.run([*FVDFS, *words.split()], capture_output=True, text=True, cwd=disk.parent, check=True).stdout
    assert piped.split() == text.decode().split()
    assert all(line == line.rstrip() for line in piped.splitlines())
