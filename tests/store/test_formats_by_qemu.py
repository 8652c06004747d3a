"""Headers of other formats as QEMU writes them: what they lead to, and what is refused."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvdfs.errors import FormatError, FvdError, UnsupportedFeature
from fvdfs.store.references import PROBE_SIZE, Reference, detect
from support.headers import look

MADE_BY_QEMU = ("qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels")


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An empty image of each format, as QEMU makes them."""
    folder = tmp_path_factory.mktemp("images")
    result = {}
    for file_format in MADE_BY_QEMU:
        qemu_img("create", "-f", file_format, folder / file_format, "10M")
        result[file_format] = (folder / file_format).read_bytes()[: 4 << 20]
    return result


def test_formats_are_told_by_their_first_bytes(images: dict[str, bytes]) -> None:
    for file_format, data in images.items():
        assert detect(data[:PROBE_SIZE]) == file_format
        assert look(file_format, data) == []
    assert detect(bytes(PROBE_SIZE)) is None
    assert detect(b"") is None
    assert detect(b"\xa9\xf5\x43\x51") == "fvd"


def test_every_format_refuses_another_one(images: dict[str, bytes]) -> None:
    for stated in MADE_BY_QEMU:
        for file_format, data in images.items():
            if stated != file_format:
                with pytest.raises(FormatError, match=f"no {stated} image.* {file_format}"):
                    look(stated, data)
        for empty in (b"", bytes(1 << 20)):
            with pytest.raises(FormatError, match=f"no {stated} image"):
                look(stated, empty)


@pytest.mark.parametrize("file_format", ["qcow2", "qcow", "qed"])
def test_backing_files_as_qemu_writes_them(tmp_path: Path, file_format: str) -> None:
    base, image = tmp_path / "bäse", tmp_path / "image"
    qemu_img("create", "-f", "qcow2", base, "1M")
    qemu_img("create", "-f", file_format, "-b", "bäse", "-F", "qcow2", image)
    stated = "qcow2" if file_format == "qcow2" else ""
    assert look(file_format, image.read_bytes()) == [Reference("backing", "bäse", stated)]


def test_external_data_file_as_qemu_writes_it(tmp_path: Path) -> None:
    image, data = tmp_path / "image", tmp_path / "data.raw"
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")
    assert look("qcow2", image.read_bytes()) == [Reference("data-file", str(data), "raw")]


def test_old_and_small_qcow2(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img("create", "-f", "qcow2", "-o", "compat=0.10,cluster_size=512", "-u", "-b", "/x", "-F", "raw", image, "1M")
    assert look("qcow2", image.read_bytes()) == [Reference("backing", "/x", "raw")]


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (("-f", "vmdk", "-o", "subformat=monolithicFlat"), "in one file"),
        (("-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"), "in one file"),
        (("-f", "vmdk", "-u", "-b", "/x", "-F", "vmdk"), "difference"),
    ],
)
def test_images_that_qemu_makes_and_fvdfs_refuses(tmp_path: Path, create: tuple[str, ...], reason: str) -> None:
    parent = tmp_path / "parent"
    qemu_img("create", "-f", "vmdk", parent, "1M")
    image = tmp_path / "image"
    words = [str(parent) if word == "/x" else word for word in create if word != "-u"]
    qemu_img("create", *words, image, "1M")
    with pytest.raises(UnsupportedFeature, match=reason):
        look(create[1], image.read_bytes())


@pytest.mark.parametrize(("file_format", "at"), [("qcow2", 32), ("qcow", 36)])
def test_encrypted_images_are_refused(images: dict[str, bytes], file_format: str, at: int) -> None:
    data = bytearray(images[file_format])
    data[at : at + 4] = struct.pack(">I", 1)
    with pytest.raises(UnsupportedFeature, match="encrypted"):
        look(file_format, bytes(data))


def test_extent_of_a_split_vmdk_is_refused(tmp_path: Path) -> None:
    qemu_img("create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", tmp_path / "image.vmdk", "1M")
    with pytest.raises(UnsupportedFeature, match="part"):
        look("vmdk", (tmp_path / "image-s001.vmdk").read_bytes())


def test_vmdk_whose_header_hides_a_descriptor_is_refused(images: dict[str, bytes]) -> None:
    data = bytearray(images["vmdk"])
    data[12:20] = bytes(8)  # no capacity: QEMU would read the descriptor's list of extents
    with pytest.raises(UnsupportedFeature, match="part"):
        look("vmdk", bytes(data))


@pytest.mark.parametrize(
    ("file_format", "at", "value"),
    [("vdi", 76, struct.pack("<I", 4)), ("vpc", 60, struct.pack(">I", 4))],
)
def test_differencing_images_are_refused(images: dict[str, bytes], file_format: str, at: int, value: bytes) -> None:
    data = bytearray(images[file_format])
    data[at : at + len(value)] = value
    with pytest.raises(UnsupportedFeature, match="difference"):
        look(file_format, bytes(data))


def test_differencing_vhdx_is_refused(images: dict[str, bytes]) -> None:
    data = bytearray(images["vhdx"])
    block_size = struct.pack("<I", 8 << 20)
    at = data.index(block_size, 1 << 20)
    data[at + 4] |= 2
    with pytest.raises(UnsupportedFeature, match="difference"):
        look("vhdx", bytes(data))


def test_footer_of_a_fixed_vhd_is_at_the_end(tmp_path: Path) -> None:
    qemu_img("create", "-f", "vpc", "-o", "subformat=fixed", tmp_path / "image", "1M")
    assert look("vpc", (tmp_path / "image").read_bytes()) == []


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (8, struct.pack(">QI", 1 << 60, 10)),
        (8, struct.pack(">QI", 65536 - 5, 10)),
        (8, struct.pack(">QI", 512, 1024)),
        (20, struct.pack(">I", 63)),
        (100, struct.pack(">I", 1 << 31)),
        (100, struct.pack(">I", 8)),
        (104, struct.pack(">II", 0xE2792ACA, 0xFFFF_FFFF)),
        (72, struct.pack(">Q", 4)),  # a data file that has no name
    ],
)
def test_broken_qcow2_headers(images: dict[str, bytes], at: int, value: bytes) -> None:
    data = bytearray(images["qcow2"])
    if at == 104:
        data[100:104] = struct.pack(">I", 104)
    data[at : at + len(value)] = value
    with pytest.raises(FormatError):
        look("qcow2", bytes(data))


numbers = st.sampled_from([0, 1, 2, 3, 4, 0xFF, 0xFFFF, 0xFFFF_FFFF, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
patches = st.lists(
    st.tuples(
        st.sampled_from(range(0, 520, 4)) | st.sampled_from(range(192 << 10, (192 << 10) + 128, 4)) | st.just(1 << 20),
        st.binary(min_size=1, max_size=64)
        | numbers.map(lambda n: struct.pack("<Q", n))
        | numbers.map(lambda n: struct.pack(">Q", n)),
    ),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(file_format=st.sampled_from(MADE_BY_QEMU), changes=patches, cut=st.integers(0, 4 << 20) | st.none())
def test_no_header_makes_the_reader_stumble(
    images: dict[str, bytes], file_format: str, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(images[file_format])
    for at, value in changes:
        data[at : at + len(value)] = value
    try:
        found = look(file_format, bytes(data[:cut]))
    except FvdError as error:
        assert "\n" not in str(error)
        return
    for reference in found:
        assert reference.kind in ("backing", "data-file")
        assert reference.name
        assert "\0" not in reference.name
