"""A host that is reached by a cable, which can be cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess


class Network:
    """A host of its own, behind a cable that can be cut: it has addresses `here` and `there`."""

    @staticmethod
    def missing() -> str:
        """Why there can be none; empty: there can."""
        return "" if os.geteuid() == 0 and shutil.which("ip") else "needs root and ip"

    def __init__(self) -> None:
        self.name = f"fvdfs{os.getpid()}"
        number = os.getpid() % 250
        self.here, self.there = f"10.231.{number}.1", f"10.231.{number}.2"
        for command in (
            f"netns add {self.name}",
            f"link add {self.name} type veth peer name far netns {self.name}",
            f"address add {self.here}/24 dev {self.name}",
            f"link set {self.name} up",
            f"-n {self.name} address add {self.there}/24 dev far",
        ):
            self._ip(command)
        self.join()
        far = json.loads(self._ip(f"-j -n {self.name} link show far"))[0]["address"]
        self._ip(f"neighbor add {self.there} lladdr {far} dev {self.name} nud permanent")  # no ARP, which notices a cut

    @staticmethod
    def _ip(words: str) -> str:
        return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout

    def cut(self) -> None:
        self._ip(f"-n {self.name} link set far down")

    def join(self) -> None:
        self._ip(f"-n {self.name} link set far up")

    @property
    def inside(self) -> list[str]:
        """Before the words of a command that is to run there."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def remove(self) -> None:
        self._ip(f"netns del {self.name}")
