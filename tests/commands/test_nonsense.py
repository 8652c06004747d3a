"""What makes no sense is refused: one line, exit code 2, nothing done."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from fvdfs.errors import UsageError
from fvdfs.mountoptions import folders, hint, listed, parse_mount_options
from support.devices import loop_device
from support.mounts import FVDFS, MIB, fvdfs, mounted, must, running

HUGE = "9" * 30

MOUNTS = {
    "base_path=/nosuch": "there is no such directory",
    "base_path=": "needs a value",
    "base_path": "needs a value",
    "secret=/nosuch": "No such file",
    "tls_creds=/nosuch": "has neither ca-cert.pem nor keys.psk",
    "on_base_error=never": "must be wait, wait=TIME (such as 60s, 5m or 1h) or eio",
    "on_base_error=wait=0": "must be wait, wait=TIME",
    "on_base_error=wait=1d": "must be wait, wait=TIME",
    "secret=/etc": "is no regular file",
    "secret": "needs a value",
    "grow_command=/nosuch": "there is no such program",
    "grow_command=nosuch-program": "there is no such program",
    "grow_command=/etc": "there is no such program",
    "grow_command=": "needs a value",
    "allow_url=": "needs a value",
    "allow_url=nosuch": "no beginning of a URL",
    "allow_url=/etc": "no beginning of a URL",
    "base_format=": "needs a value",
    "base_format=banana": "is not known",
    "shrink=banana": "takes no value",
    "shrink=": "takes no value",
    "accept_unclean=yes": "takes no value",
    "allow_base_write=on": "takes no value",
    "record_profile=1": "takes no value",
    "allow_other=1": "takes no value",
    "ro=1": "takes no value",
    "ro,rw": "choose one",
    "sync=always,sync=none": "given twice",
    "writeback=on,writeback=off": "given twice",
    "writeback": "needs a value",
    "writeback=maybe": "must be auto or on or off",
    "io_uring=1": "must be on or off",
    "locking=": "needs a value",
    "detect_zeroes=banana": "must be off or on or punch",
    "sync=": "needs a value",
    "metrics=9101": "must be HOST:PORT",
    "metrics=localhost:99999": "must be HOST:PORT",
    "metrics=unix:a.sock": "must be an absolute path",
    "prefetch_max=0": "leave it out",
    "prefetch_max=-1": "is no size",
    "prefetch_max=nan": "is no size",
    f"prefetch_max={HUGE}": "more than any file can hold",
    "prefetch_jobs=0": "must be a number from 1 to 1024",
    "prefetch_jobs=-1": "must be a number from 1 to 1024",
    "prefetch_jobs=1e3": "must be a number from 1 to 1024",
    f"prefetch_jobs={HUGE}": "must be a number from 1 to 1024",
    "banana": "unknown",
    "=": "unknown",
}


def refused(folder: Path, arguments: list[str], message: str) -> None:
    before = sorted(folder.parent.rglob("*"))
    done = fvdfs(*arguments, cwd=folder)
    assert message in done.err, done.err
    code = 1 if arguments[:1] == ["check"] else 2  # of which 2 says that the image is corrupt
    assert (done.code, done.err.count("\n"), done.out) == (code, 1, "")
    assert sorted(folder.parent.rglob("*")) == before
    assert not os.path.ismount(folder.parent / "point")


@pytest.mark.parametrize("option", MOUNTS)
def test_options_of_mount(folder: Path, option: str) -> None:
    (folder.parent / "point").mkdir()
    refused(folder, ["mount", ".", "../point", "-o", option], MOUNTS[option])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mount", "", "../point"], "is empty"),
        (["mount", ".", ""], "is empty"),
        (["mount", ".", "../point", "--log-file", ""], "is empty"),
        (["mount", ".", "../point", "--log-file="], "is empty"),
        (["mount", ".", "../point", "--log-file", "."], "Is a directory"),
        (["mount", ".", "../point", "--debug"], "needs -f"),
        (["mount", ".", "../point", "--read-only", "-o", "rw"], "choose one"),
        (["mount", "base.raw", "../point"], "is not a directory"),
        (["mount", "."], "required"),
        (["umount", ""], "is empty"),
        (["status", ""], "is empty"),
        (["info", ""], "is empty"),
        (["map", ""], "is empty"),
        (["map", "a.fvd", "--png", ""], "is empty"),
        (["check", ""], "is empty"),
        (["check", "a.fvd", "--secret", "/nosuch"], "No such file"),
        (["check", "a.fvd", "-o", "ro"], "is not for this command, which takes base_path"),
        (["snapshot", "a.fvd", "b", "c"], "unrecognized arguments: c; see fvdfs snapshot --help"),
        (["snapshot", "."], "is a folder; name a disk"),
        (["check", "a.fvd", "-o", "base_path=/nosuch"], "there is no such directory"),
        (["convert", "a.fvd", ""], "is empty"),
        (["convert", "a.fvd", "b.raw", "-o", "allow_url=nosuch"], "no beginning of a URL"),
        (["convert", "a.fvd", "b.raw", "--secret", "/nosuch"], "No such file"),
        (["convert", "a.fvd", "b.raw", "-f", ""], "is empty"),
        (["clone", "a.fvd"], "required"),
        (["clone", "nosuch.raw", "b"], "fvdfs: nosuch.raw: No such file"),
        (["clone", "a.fvd", ".fvd"], "is not a name"),
        (["clone", "a.fvd", ""], "fvdfs: a name: what is given is empty"),
        (["clone", "a.fvd", "a"], "exists already; choose another name\n"),
        (["clone", ".", "b"], "fvdfs: .: neither a regular file nor a block device"),
        (["clone", "a.fvd", "b", "b.fvd"], "is named twice"),
        (["clone", "a.fvd", "b", "--into", "nosuch"], "is not a directory"),
        (["clone", "a.fvd", "b", "-n", "0"], "must be a number from 1"),
        (["clone", "a.fvd", "b", "-n", HUGE], "must be a number from 1"),
        (["clone", "a.fvd", "b", "c", "-n", "2"], "of one NAME"),
        (["clone", "a.fvd", "b", "-F", "banana"], "is not known"),
        (["clone", "a.fvd", "b", "--profile", "base.raw"], "must be two numbers"),
        (["clone", "a.fvd", "b", "--secret", "/nosuch"], "No such file"),
        (["clone", "banana://x/y", "b"], "is not known"),
        (["profile", "show", ""], "is empty"),
        (["prefetch", "start", ""], "is empty"),
        (["prefetch", "banana", "a.raw"], "invalid choice"),
        (["banana"], "invalid choice"),
        (["creat", "a.fvd", "1M"], "invalid choice: 'creat'; did you mean create?; see fvdfs --help"),
        (["migrate-targt"], "invalid choice: 'migrate-targt'; did you mean migrate?; see fvdfs --help"),
        (["x"], "invalid choice: 'x' (choose from create, clone, info, check, amend, convert, measure, compare, diff,"),
        (["prefetch", "x", "a.raw"], "invalid choice: 'x' (choose from start, pause, stop); see fvdfs prefetch --help"),
        (["mount", ".", "..", "--read-onyl"], "arguments: --read-onyl; did you mean --read-only?; see fvdfs mount"),
        (["mount", ".", "../point", "-o", "alow_other"], "-o alow_other: unknown; did you mean allow_other?"),
        (["create", "new.fvd", "1.3K"], "'1.3K' is no whole number of bytes"),
        (["--hlep"], "unrecognized arguments: --hlep; did you mean --help?; see fvdfs --help"),
        ([], "required"),
    ],
)
def test_commands(folder: Path, arguments: list[str], message: str) -> None:
    (folder.parent / "point").mkdir()
    (folder / "base.raw").write_bytes(bytes(4096))
    must("create", folder / "a.fvd", "1M")
    refused(folder, arguments, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'' 1M", "is empty"),
        ("new 1M", "add .fvd to the name"),
        ("new.FVD 1M", "add .fvd to the name"),
        (".fvd 1M", "add .fvd to the name"),
        ("new.fvd 0", "more than 0"),
        ("new.fvd nan", "is no size"),
        ("new.fvd 1e9", "is no size"),
        (f"new.fvd {HUGE}", "more than any file can hold"),
        (f"new.fvd {'9' * 5000}", "more than any file can hold"),
        ("new.fvd 1M --base ''", "is empty"),
        ("new.fvd 1M --base=", "is empty"),
        ("new.fvd 1M --base-format raw", "needs a base"),
        ("new.fvd 1M --base base.raw --base-format ''", "is empty"),
        ("new.fvd 1M --base base.raw --block-size 0", "must be more than 0"),
        ("new.fvd 1M --base base.raw --block-size 4T", "too large"),
        ("new.fvd 1M --compact --chunk-size 0", "must be more than 0"),
        ("new.fvd 1M --compact --chunk-size 8000P", "too large"),
        ("new.fvd 1M --compact --grow-unit 0", "must be more than 0"),
        ("new.fvd 1M --compact --grow-unit 8000P", "too large"),
        ("new.fvd 1M --compact --journal-size 2G", "the journal would take"),
        ("new.fvd 1M --compact --journal-size 8000P", "must be"),
        ("new.fvd 1M --compact --journal-size -1", "is no size"),
        ("new.fvd 1M --base base.raw --prefetch-delay 0", "from 1 to"),
        ("new.fvd 1M --base base.raw --prefetch-delay=-1", "from 1 to"),
        ("new.fvd 1M --base base.raw --prefetch-delay 2147483648", "from 1 to"),
        ("new.fvd 1M --base base.raw --prefetch-delay nan", "from 1 to"),
        ("new.fvd 1M --prefetch-delay 1", "needs a base"),
        ("new.fvd 1M --base base.raw --detect-holes 0", "must be more than 0"),
        ("new.fvd 1M --data-format raw", "--data-format needs a data file"),
        ("new.fvd 1M --data-file data --data-format ''", "is empty"),
        ("new.fvd 1M --grow-command ./grow", "neither IMAGE nor --data-file is one"),
        ("new.fvd 1M --data-file data --grow-command ./grow", "neither IMAGE nor --data-file is one"),
        (
            "new.fvd 1M --secret a.fvd",
            "--secret is for encrypted files: give --base, or --data-file with --data-format luks",
        ),
        ("new.fvd 1M --base base.raw --secret /nosuch", "No such file"),
        ("new.fvd 1M --base a.fvd --base-format fvd --update-base writeback", "an FVD image is never written to"),
        ("new.fvd 1M --base base.raw --update-base maybe", "invalid choice"),
    ],
)
def test_create(folder: Path, arguments: str, message: str) -> None:
    (folder / "base.raw").write_bytes(bytes(4096))
    must("create", folder / "a.fvd", "1M")
    refused(folder, ["create", *shlex.split(arguments)], message)


def test_an_image_on_a_device_needs_no_name(folder: Path, tmp_path: Path) -> None:
    backing = tmp_path / "device"
    backing.touch()
    os.truncate(backing, 32 * MIB)
    with loop_device(backing) as device:
        must("create", device, "1M", "--compact", "--grow-command", "builtin:lvextend")


def test_prefetching_what_has_no_base(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        for _ in range(2):
            done = fvdfs("prefetch", "start", mount.raw("a"))
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert "has no base, and so nothing to prefetch" in done.err


# --- names with commas and colons ---------------------------------------------------------------

NAMES = ["plain", "a,b", "a:b", "a\\b", "a\\,b", "a b", "a'b", 'a"b', "a$b", ",", ":", "a,ro", "ä"]


@pytest.mark.parametrize("name", NAMES)
def test_a_hint_works_as_it_stands_and_in_a_shell(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    text = hint("base_path", str(path))
    for written in (text, *shlex.split(text)):
        assert folders(parse_mount_options([written])) == (str(path),)
        options = parse_mount_options([written, "ro", f"base_path={tmp_path}:/"])
        assert folders(options) == (str(path), str(tmp_path), "/")
        assert "ro" in options
    url = f"nbd://10.0.0.1/{name.replace(' ', '')}"
    for written in (hint("allow_url", url), *shlex.split(hint("allow_url", url))):
        assert listed(parse_mount_options([written, "allow_url=ssh://b"]), "allow_url") == (url, "ssh://b")


def test_what_is_escaped_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a,b:c").touch()
    options = parse_mount_options([rf"ro,secret={tmp_path}/a\,b:c,shrink"])
    assert options == {"ro": "", "secret": f"{tmp_path}/a,b:c", "shrink": ""}
    assert parse_mount_options([r"secret=/a\\b"])["secret"] == r"/a\b"
    assert parse_mount_options(["", "ro,", ",ro"]) == {"ro": ""}
    with pytest.raises(UsageError, match="unknown"):
        parse_mount_options(["'ro"])


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b"])
def test_the_option_that_a_message_names_makes_the_image_appear(folder: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    place.mkdir()
    (place / "base.raw").write_bytes(b"base" * 1024)
    done = fvdfs("create", folder / "a.fvd", "--base", place / "base.raw", "--base-format", "raw")
    remark = done.err.strip().partition("needs -o ")[2]
    with mounted(folder) as mount:
        assert not mount.raw("a").exists()
        logged = mount.log.strip().partition("allow it with -o ")[2].splitlines()[0]
    assert logged == remark
    for option in (remark, *shlex.split(remark)):
        with mounted(folder, "-o", option) as mount:
            assert mount.raw("a").read_bytes() == b"base" * 1024


# --- relative names -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["-f"]])
def test_relative_names_are_those_of_the_caller(folder: Path, tmp_path: Path, flags: list[str]) -> None:
    """In the background and in the foreground."""
    point = tmp_path / "point"
    point.mkdir()
    script = tmp_path / "grow"
    script.write_text(f'#!/bin/sh\nlosetup -c "$2"; truncate -s +"$1" "{tmp_path}/device" && losetup -c "$2"\n')
    script.chmod(0o755)
    backing = tmp_path / "device"
    backing.touch()
    os.truncate(backing, 20 * MIB)
    with loop_device(backing) as device:
        must("create", device, "64M", "--compact", "--chunk-size", "64K", "--grow-unit", "1M")
        (folder / "a.fvd").symlink_to(device)
        options = ["-o", "grow_command=./grow,writeback=off", "--log-file", "log"]
        with running(*FVDFS, "mount", *flags, "images", "point", *options, cwd=tmp_path) as process:
            try:
                if not flags:
                    assert process.wait(60) == 0
                while not os.path.ismount(point) or not os.listdir(point):
                    assert process.poll() in (None, 0)
                with open(point / "a.raw", "r+b", buffering=0) as file:
                    for _ in range(24):
                        file.write(b"x" * MIB)
                    os.fsync(file)
            finally:
                assert fvdfs("umount", point).code == 0
                assert process.wait(60) == 0
    assert "growing its storage" in (tmp_path / "log").read_text()
