"""The help of each command ends with examples, and each of these works as it stands."""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fvdfs import cli
from fvdfs.examples import EXAMPLES
from support.mounts import MIB, mounted, must, running, wait_until


def commands() -> dict[str, argparse.ArgumentParser]:
    return {name: command for name, command in cli._commands(cli._parser()).items() if name != "migrate-target"}


def test_each_command_has_examples() -> None:
    assert set(EXAMPLES) == set(commands())
    for name, command in commands().items():
        shown = command.format_help().partition("\nexamples:\n")[2]
        assert [line.strip() for line in shown.splitlines()] == EXAMPLES[name].splitlines()
        assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_make_sense(name: str) -> None:
    """To the parser."""
    for line in EXAMPLES[name].splitlines():
        words = shlex.split(re.sub(r"^gunzip < \S+ \| | (\|\|?|>) .*", "", line), comments=True)
        assert words[:2] == ["fvdfs", name]
        assert cli._parsed(words[1:]).command_name == name


@pytest.fixture(scope="module")
def new_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples find where they are: files, a program fvdfs, and hosts that are this one."""
    tmp_path = tmp_path_factory.mktemp("world")
    images, srv = tmp_path / "images", tmp_path / "srv"
    for path in (images, tmp_path / "images.mnt", srv, srv / "images", tmp_path / "bin"):
        path.mkdir()
    content = os.urandom(MIB) + bytes(3 * MIB)
    for path in (images / "template.raw", images / "other-template.raw", srv / "template.raw"):
        path.write_bytes(content)
    (tmp_path / "vm.raw").write_bytes(content)
    for name in ("template", "monday"):
        target = tmp_path / f"{name}.qcow2"
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", images / "template.raw", target], check=True)
    for name in ("vm", "other"):
        must("create", images / f"{name}.fvd", "-b", "template.raw")
        must("snapshot", images / f"{name}.fvd", "monday")
    must("export", images / "vm.fvd", "--since", "monday", tmp_path / "tuesday.fvd", "-b", "images/vm@monday.fvd")
    must("convert", images / "vm@monday.fvd", tmp_path / "copy.fvd")
    (tmp_path / "bin" / "fvdfs").write_text(f'#!/bin/sh\nexec {sys.executable} -m fvdfs "$@"\n')
    (tmp_path / "bin" / "ssh").write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return tmp_path


@pytest.fixture
def world(new_world: Path, tmp_path: Path) -> Path:
    """One of a test's own."""
    subprocess.run(["cp", "-a", "--sparse=always", f"{new_world}/.", tmp_path], check=True)
    return tmp_path


def start(world: Path, line: str, **how: Any) -> contextlib.AbstractContextManager[subprocess.Popen[Any]]:
    """A line for a shell, in which the places are those of this host."""
    line = re.sub(r"(?<=\s)/srv", str(world / "srv"), line.replace("=/srv", f"={world / 'srv'}"))
    line = re.sub(r"\bdisks\b", "images.mnt", line.replace("host-b:/srv", f"localhost:{world / 'srv'}"))
    programs = {"PATH": f"{world / 'bin'}:{os.environ['PATH']}", "SSH_CONNECTION": "127.0.0.1 1 127.0.0.1 22"}
    return running("sh", "-c", line, **{"cwd": world, "env": os.environ | programs, **how})


def run(world: Path, line: str, **how: Any) -> None:
    with start(world, line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how) as process:
        out, _ = process.communicate(timeout=60)
        # A host on which something is missing is told so: that is no fault of the example.
        assert process.returncode == 0 or line.startswith("fvdfs doctor"), f"{line}: {out}"


SERVED = {"serve", "receive", "activate", "abandon", "release", "migrate"}


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - SERVED - {"mount", "umount", "upgrade", "top"}))
def test_examples_work(name: str, world: Path) -> None:
    images = world / "images"
    if name == "thaw":
        must("freeze", images / "vm.fvd")
    if name in ("rebase", "prefetch"):  # of what stands on the template itself
        base = ["-b", "template.raw", "-F", "raw", "--prefetch-delay", "60"]
        must("create", images / "other.fvd", *base, "--force")
    uses_mount = any("disks" in line for line in EXAMPLES[name].splitlines())
    with mounted(images) if uses_mount else contextlib.nullcontext() as mount:
        for line in EXAMPLES[name].splitlines():
            with open(mount.raw("other"), "rb") if name == "prefetch" and mount else contextlib.nullcontext():
                run(world, line)
            if "profile record" in line:
                with mounted(images) as recording:
                    recording.raw("vm").read_bytes()


@pytest.mark.parametrize("name", ["mount", "umount"])
def test_examples_of_mounts_work(name: str, world: Path) -> None:
    for line in EXAMPLES[name].splitlines():
        if name == "umount":
            must("mount", world / "images", world / "images.mnt")
        run(world, line)
        assert os.path.ismount(world / "images.mnt") == (name == "mount")
        if name == "mount":
            must("umount", world / "images.mnt")


def test_the_examples_of_upgrade_work(world: Path) -> None:
    must("mount", world / "images", world / "images.mnt", "-o", "keep")
    try:
        for line in EXAMPLES["upgrade"].splitlines():
            run(world, line)
    finally:
        must("umount", world / "images.mnt")


def test_the_example_of_top_works(world: Path) -> None:
    with mounted(world / "images"):
        ours, theirs = pty.openpty()
        with start(world, f"exec {EXAMPLES['top']}", stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            while b"q" not in shown or b"Quit" not in shown:
                shown += os.read(ours, 65536)
            os.write(ours, b"q")
            with contextlib.suppress(OSError):  # it has ended
                while os.read(ours, 65536):
                    pass
            assert process.wait(60) == 0
        os.close(ours)


@pytest.mark.parametrize("name", sorted(SERVED))
def test_examples_of_moves_work(name: str, world: Path, free_port: int) -> None:
    there = world / "srv"
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounted(world / "images"))
        # fvdfs migrate names a port of its own choice.
        allowed = "nbd://127.0.0.1" if name == "migrate" else f"nbd://127.0.0.1:{free_port}/"
        stack.enter_context(mounted(there / "images", "-o", f"allow_url={allowed}"))
        if name == "migrate":
            run(world, EXAMPLES[name].splitlines()[0])  # the second is that of test_migrate.py
            assert (there / "images.mnt" / "vm.raw").read_bytes() == (world / "vm.raw").read_bytes()
            return
        line = f"exec {EXAMPLES['serve']}".replace("10.0.0.1 ", f"127.0.0.1:{free_port} ")
        server = stack.enter_context(start(world, line, stdout=subprocess.PIPE, text=True))
        assert server.stdout is not None
        assert server.stdout.readline().startswith(f"nbd://127.0.0.1:{free_port}/vm")
        if name != "serve":
            run(world, EXAMPLES["receive"].replace("10.0.0.1", f"127.0.0.1:{free_port}"), cwd=there)
        if name in ("activate", "abandon", "release"):
            wait_until((there / "images.mnt" / "moved.raw").exists)
            run(world, EXAMPLES["activate" if name == "release" else name], cwd=there)
        if name == "release":
            run(world, EXAMPLES[name])
        server.terminate()
        assert server.wait(60) == 0
