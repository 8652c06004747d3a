"""Making a device larger: the command that an image names, or one that the operator gives.

`add_storage_cmd` comes from the image and is not to be trusted: it is run only if the mount says
`-o grow_command=stored`. It is split into words as a shell would, but no shell runs it. Appended to
the words are the number of bytes that are missing and the device (format.md, "Chunk table").
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import subprocess
from dataclasses import dataclass

import trio

log = logging.getLogger(__name__)

LVEXTEND = "builtin:lvextend"


@dataclass(frozen=True, slots=True)
class GrowCommand:
    """How the device of one image is made larger."""

    image: str
    words: tuple[str, ...]
    """The program and its first arguments; empty: there is none."""
    hint: str
    """What to tell a user whose device is full."""

    async def grow(self, size: int, device: str) -> None:
        """Add at least `size` bytes to the device. Raises OSError(ENOSPC) where that failed."""
        # A link in the mounted folder stands for the device as the operator named it.
        device = await trio.to_thread.run_sync(_named, device)
        if not self.words:
            raise OSError(errno.ENOSPC, f"{self.image}: {device} is full; {self.hint}")
        if self.words == (LVEXTEND,):
            command = ["lvextend", "--size", f"+{size}b", device]
        else:
            command = [*self.words, str(size), device]
        log.info("%s: growing its storage: %s", self.image, shlex.join(command))
        try:
            with trio.CancelScope(shield=True):  # half a change of a volume would be worse than a wait
                done = await trio.run_process(
                    command, stdin=b"", capture_stdout=True, stderr=subprocess.STDOUT, check=False
                )
        except OSError as error:
            raise OSError(errno.ENOSPC, f"{self.image}: {command[0]}: {error.strerror}") from error
        output = done.stdout.decode(errors="replace").strip()
        if output:
            log.info("%s: %s: %s", self.image, command[0], output)
        if done.returncode:
            raise OSError(errno.ENOSPC, f"{self.image}: {shlex.join(command)} failed with code {done.returncode}")


def _named(device: str) -> str:
    return os.path.join(os.path.dirname(device), os.readlink(device)) if os.path.islink(device) else device


def grow_command(image: str, choice: str, stored: str) -> GrowCommand:
    """The command for an image, by the mount's choice: `none`, `stored`, or a program.

    `stored`: the image's add_storage_cmd.
    """
    if choice == "none":
        hint = "the image has no command to grow it"
        if stored:
            hint = f"allow the image's own command ({stored}) with -o grow_command=stored"
        return GrowCommand(image, (), hint)
    if choice == "stored":
        try:
            words = tuple(shlex.split(stored))
        except ValueError as error:
            return GrowCommand(image, (), f"add_storage_cmd={stored}: {error}")
        return GrowCommand(image, words, "add_storage_cmd is empty")
    return GrowCommand(image, (choice,), "")
