"""The blocks of code in pages, and a machine where commands that a page shows can be run.

A block stands between fences, with its language. Those in `sh` are commands, run by bash in their order; the others are
shown. The blocks of a section follow each other; a section begins anew.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from support.namespaces import overlaid
from support.programs import installed

ROOT = Path(__file__).parents[2]
ADDRESS = "10.0.0.1"
"""Of the server that the pages name."""


class Block(NamedTuple):
    """What stands between two fences."""

    page: str
    """Its path, from the root on."""
    section: str
    language: str
    text: str
    line: int
    """Its number in the page."""

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]


@cache
def blocks(page: Path) -> tuple[Block, ...]:
    """All of a page; of one that is indented instead of fenced the language is empty."""
    return tuple(_blocks(page))


def _blocks(page: Path) -> Iterator[Block]:
    name, section, before = str(page.relative_to(ROOT)), "", ""
    lines = enumerate(page.read_text().splitlines(), 1)
    for number, line in lines:
        if line.startswith("```"):
            inside = [text for _, text in itertools.takewhile(lambda numbered: numbered[1] != "```", lines)]
            yield Block(name, section, line.removeprefix("```"), "\n".join(inside), number)
        elif line.startswith("    ") and not before.strip():
            yield Block(name, section, "", line.strip(), number)
        elif found := re.match(r"##+ (.+)", line):
            section = found[1]
        before = line


def machine(folder: Path, prepared: str) -> str:
    """A script that makes a machine of mount, network and process namespaces what pages take it for; `prepared`: more.

    In the folder there are images/, with a template, and disks/; the template is in /srv, too, and behind a server.
    QEMU runs on, or, where RUNS is `once`, reads its disk and ends; `…` stands for more options. What shows something
    again and again is ended by Ctrl-C.
    """
    programs = installed(folder / "bin")
    return f"""
        {overlaid(folder, "/usr/sbin", "/etc")}
        set -u
        machines=0
        PATH={programs}:$PATH
        mount -t tmpfs none /srv
        mount -t tmpfs none /run
        mkdir {folder}/dev
        mount -t tmpfs none {folder}/dev
        cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/fuse /dev/loop* {folder}/dev
        mkdir {folder}/dev/pts {folder}/dev/shm {folder}/dev/vg
        mount --bind /dev/pts {folder}/dev/pts
        cp -a /dev/ptmx {folder}/dev
        mount --move {folder}/dev /dev
        ip link set lo up
        ip address add {ADDRESS}/32 dev lo
        mkdir {folder}/work
        cd {folder}/work
        mkdir -p images disks /srv/images /srv/disks /srv/templates /srv/backup
        head -c 8M /dev/urandom >images/template.raw
        truncate -s 1G images/template.raw
        cp --sparse=always images/template.raw /srv/
        qemu-nbd --fork --persistent --shared 16 -r -f raw -b {ADDRESS} -x template /srv/template.raw
        qemu-system-x86_64() {{
            local words=() word
            for word; do [ "$word" = … ] || words+=("$word"); done
            words+=(-accel tcg -m 64 -display none -vga none -serial none -parallel none)
            local file="machine-$((++machines)).pid"
            if [ "${{RUNS:-on}}" = once ]; then
                printf '%s\\n' 'qemu-io virtio0 "read 0 4M"' quit |
                    command qemu-system-x86_64 -monitor stdio "${{words[@]}}" >/dev/null
            else
                command qemu-system-x86_64 -monitor none -daemonize -pidfile "$file" "${{words[@]}}"
            fi
        }}
        fvdfs() {{
            case "$*" in
                top*|*--watch*)
                    local command; command=$(printf '%q ' timeout --foreground -s INT 5 fvdfs "$@")
                    TERM=xterm script -qec "$command" watched </dev/null >/dev/null || [ $? = 130 -o $? = 124 ]
                    grep -q . watched;;
                *) command fvdfs "$@";;
            esac
        }}
        volume() {{  # NAME SIZE: a device /dev/vg/NAME, as long as this shell runs
            truncate -s "$2" "{folder}/volume-$1"
            local device; device=$(losetup -f --show "{folder}/volume-$1")
            exec {{volumes}}<"$device"
            losetup -d "$device"
            ln -s "$device" "/dev/vg/$1"
        }}
        set -x
        {prepared}
    """


END = """
        set +x
        for machine in machine-*.pid; do
            [ -e "$machine" ] || continue
            number=$(cat "$machine")
            kill "$number"
            while kill -0 "$number" 2>/dev/null; do sleep 0.1; done
        done
        findmnt -n -l -o TARGET -t fuse.fvdfs | while read -r point; do
            command fvdfs umount "$point"
        done
"""
"""Ends what runs on a machine: all that was mounted can be unmounted."""
