"""What all of fvdfs stands on: errors, and sizes as people write them."""

from __future__ import annotations

import errno

import pytest

from fvdfs.errors import FormatError, FvdError, UsageError, leading, named, printable, shortage
from fvdfs.sizes import human_size, parse_size


def test_a_text_does_nothing_to_a_terminal() -> None:
    assert printable("plain ä") == "plain ä"
    assert printable("a\x1b[31m\n\u202eb\udcff") == r"a\x1b[31m\n\u202eb\udcff"
    assert str(FormatError("a\n", "is\0bad")) == r"a\n: is\x00bad"


def test_one_error_leads_a_group() -> None:
    """An interrupt before a defect, that before what is anybody's fault; the first of several."""
    usage, full, defect, interrupt = (
        UsageError("no"),
        OSError(errno.ENOSPC, "full"),
        ValueError("x"),
        KeyboardInterrupt(),
    )
    assert leading(usage) is usage
    assert leading(ExceptionGroup("", [usage, full])) is usage
    assert leading(ExceptionGroup("", [full, ExceptionGroup("", [usage, defect])])) is defect
    assert leading(BaseExceptionGroup("", [defect, BaseExceptionGroup("", [interrupt])])) is interrupt


def test_an_error_of_the_system_tells_its_file() -> None:
    def failing(error: OSError) -> OSError:
        with pytest.raises(OSError) as caught, named("disk"):
            raise error
        return caught.value

    assert str(failing(OSError(errno.EIO, "failed"))) == f"[Errno {errno.EIO}] disk: failed"
    assert failing(OSError("failed")).strerror == "disk: failed"
    for error in (OSError(errno.EIO, "failed", "other"), OSError(errno.EIO, "disk: failed")):
        assert failing(error) is error
    with named("disk"):
        pass


def test_what_the_host_lacks_is_no_fault_of_an_image() -> None:
    assert shortage(OSError(errno.EMFILE, "")) == errno.EMFILE
    assert shortage(OSError(errno.EIO, "")) == shortage(FvdError("x")) == 0
    error = FvdError("cannot be opened")
    error.__cause__ = OSError(errno.ENOMEM, "")
    assert shortage(error) == errno.ENOMEM


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1b", 1), ("64K", 65536), ("10m", 10 << 20), ("2T", 2 << 40), ("7P", 7 << 50)]
    + [("20GiB", 20 << 30), ("20 gib", 20 << 30), ("1.5T", 3 << 39), ("0.5K", 512), ("512 bytes", 512)]
    + [(human_size(size), size) for size in (0, 511, 512, 1431655765, 20 << 30, 3 << 39, (1 << 62) + 512)]
    + [("20.49 GiB", 22000969728), ("0.0001M", 0), ("1.0003M", 1048576 + 512)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("size", [512, 488 * 512, (1 << 20) - 512, 3 * 512 << 20, 12345678 * 512, (7 << 40) + 512])
def test_a_size_that_is_shown_in_short_is_one(size: int) -> None:
    """As `status` shows it: near what it was, in whole sectors."""
    found = parse_size(human_size(size).partition(" (")[0])
    assert abs(found - size) <= size * 0.0005
    assert found % 512 == 0


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5Q", "10Q", "1KB", "0x10", "²"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size; write"):
        parse_size(text)


@pytest.mark.parametrize("text", ["8192P", "9223372036854775808", "9" * 5000, "1" + "0" * 100])
def test_sizes_that_no_file_has(text: str) -> None:
    with pytest.raises(ValueError, match="more than any file can hold"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1023, "1023 bytes"),
        (1024, "1 KiB (1024 bytes)"),
        (1500000, "1.431 MiB (1500000 bytes)"),
        (1 << 62, "4 EiB (4611686018427387904 bytes)"),
        (1 << 70, "1024 EiB (1180591620717411303424 bytes)"),
    ],
)
def test_sizes_as_a_person_reads_them(size: int, text: str) -> None:
    assert human_size(size) == text
