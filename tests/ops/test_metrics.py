"""What a mount tells Prometheus: by TCP and by a socket, in a form that it can read, and true."""

from __future__ import annotations

import http.client
import json
import mmap
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from support.mounts import MIB, Mount, fvdfs, mounted, must, wait_until

EXAMPLES = Path(__file__).parent.parent.parent / "examples/monitoring"
BLOCK = 4096
Sample = tuple[str, frozenset[tuple[str, str]]]


class _Connection(http.client.HTTPConnection):
    """To a socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(self._path))


def scrape(connection: http.client.HTTPConnection) -> dict[Sample, float]:
    """All samples by name and labels."""
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 200
    assert answer.getheader("Content-Type", "").startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: dict[Sample, float], name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def monitored(folder: Path, tmp_path: Path) -> Iterator[tuple[Mount, Path]]:
    """A mount that tells what it does at a socket."""
    path = tmp_path / "metrics.sock"
    with mounted(folder, "-o", f"metrics=unix:{path}") as mount:
        yield mount, path


def test_requests_are_told_as_they_were(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    template = mount.folder / "template.raw"
    template.write_bytes(os.urandom(MIB))
    must("create", mount.folder / "vm.fvd", "-b", template, "-F", "raw")
    before = scrape(_Connection(path))
    assert of(before, "fvdfs_open_images") == 0
    assert not any(("disk", "vm") in labels for _, labels in before)

    with open(mount.raw("vm"), "r+b", buffering=0) as disk:
        for block in range(3):
            os.pwrite(disk.fileno(), bytes([block + 1]) * BLOCK, block * BLOCK)
        os.fsync(disk.fileno())
        assert os.pread(disk.fileno(), 64 << 10, MIB // 2) == template.read_bytes()[MIB // 2 :][: 64 << 10]
        os.lseek(disk.fileno(), 0, os.SEEK_DATA)
        found = scrape(_Connection(path))
        told = mount.status("vm")["requests"]

    assert of(found, "fvdfs_open_images") == 1
    assert of(found, "fvdfs_size_bytes", disk="vm") == MIB
    assert of(found, "fvdfs_base_read_bytes_total", disk="vm") >= 64 << 10
    assert of(found, "fvdfs_request_bytes_total", disk="vm", kind="write") == 3 * BLOCK
    assert of(found, "fvdfs_request_bytes_total", disk="vm", kind="read") >= 64 << 10
    assert of(found, "fvdfs_request_bytes_total", disk="vm", kind="lseek") == 0
    for kind in ("read", "write", "fsync", "lseek"):
        assert of(found, "fvdfs_request_errors_total", disk="vm", kind=kind) == 0
        count = of(found, "fvdfs_request_seconds_count", disk="vm", kind=kind)
        assert count == told[kind]["requests"] >= 1
        assert count == of(found, "fvdfs_request_seconds_bucket", disk="vm", kind=kind, le="+Inf")
        assert 0 < of(found, "fvdfs_request_seconds_sum", disk="vm", kind=kind) < 30 * count
    states = [value for (name, labels), value in found.items() if name == "fvdfs_prefetch_state"]
    assert sum(states) == 1


def test_failed_requests_are_told_and_the_end_of_the_data_is_no_failure(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    must("create", mount.folder / "vm.fvd", "1M", "--compact")
    with mmap.mmap(-1, BLOCK) as block, open(os.open(mount.raw("vm"), os.O_RDWR | os.O_DIRECT), "r+b", 0) as disk:
        with pytest.raises(OSError, match="too large"):
            os.pwrite(disk.fileno(), block, 1 << 60)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(disk.fileno(), 0, os.SEEK_DATA)
        found = scrape(_Connection(path))
    assert of(found, "fvdfs_request_errors_total", disk="vm", kind="write") == 1
    assert ("fvdfs_request_errors_total", frozenset({("disk", "vm"), ("kind", "lseek")})) not in found


def test_it_answers_at_a_port(folder: Path, tmp_path: Path, free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    with mounted(folder, "-o", f"metrics={address}"):
        found = scrape(http.client.HTTPConnection(address, timeout=30))
        assert of(found, "fvdfs_images") == 0
        info = next(dict(labels) for name, labels in found if name == "fvdfs_info")
        assert info["folder"] == str(folder)

        connection = http.client.HTTPConnection(address, timeout=30)
        connection.request("GET", "/etc/passwd")
        assert connection.getresponse().status == 404
        connection.close()

        (tmp_path / "other").mkdir()
        done = fvdfs("mount", folder, tmp_path / "other", "-o", f"metrics={address}")
        assert (done.code, done.err) == (2, f"fvdfs: -o metrics={address}: Address already in use\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", free_port))


def test_clients_that_say_nothing_keep_neither_others_nor_the_end_waiting(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    for client in clients:
        client.connect(str(path))
    assert of(scrape(_Connection(path)), "fvdfs_images") == 0
    mount.umount()
    assert not path.exists()
    for client in clients:
        client.close()


def test_a_socket_that_a_killed_mount_has_left_is_taken_and_another_file_is_not(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    mount.kill()
    assert path.is_socket()
    mount.mount()
    assert of(scrape(_Connection(path)), "fvdfs_images") == 0
    mount.umount()
    path.write_text("mine")
    done = fvdfs("mount", mount.folder, mount.point, "-o", f"metrics=unix:{path}")
    assert (done.code, done.err) == (2, f"fvdfs: -o metrics=unix:{path}: Address already in use\n")
    assert path.read_text() == "mine"


def _words(expression: str) -> set[str]:
    return set(re.findall(r"\bfvdfs_\w+", expression))


def test_the_examples_ask_for_what_is_told(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    (mount.folder / "template.raw").write_bytes(bytes(MIB))
    must("create", mount.folder / "vm.fvd", "-b", mount.folder / "template.raw", "-F", "raw", "--prefetch-delay", "1")
    with open(mount.raw("vm"), "r+b", buffering=0) as disk:
        disk.write(bytes(BLOCK))
        os.fsync(disk.fileno())
        disk.read(BLOCK)
        wait_until(lambda: mount.status("vm")["rate"] or mount.status("vm")["state"] == "done")
        names = {name for name, _ in scrape(_Connection(path))} | {"fvdfs_prefetch_left_seconds"}

    dashboard: Any = json.loads((EXAMPLES / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    rules: Any = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert set(rule) >= {"alert", "expr", "for", "labels", "annotations"}
            asked.append(rule["expr"])
    assert len(asked) > 15
    for expression in asked:
        assert _words(expression), expression
        assert _words(expression) <= names, expression
        assert expression.count("(") == expression.count(")")


def test_the_page_names_all_that_is_told(monitored: tuple[Mount, Path]) -> None:
    mount, path = monitored
    must("create", mount.folder / "vm.fvd", "1M")
    page = (EXAMPLES.parent.parent / "docs/monitoring.md").read_text()
    with open(mount.raw("vm"), "r+b", buffering=0) as disk:
        disk.write(bytes(BLOCK))
        os.fsync(disk.fileno())
        told = {re.sub("_(bucket|count|sum|created)$", "", name) for name, _ in scrape(_Connection(path))}
    named = _words(page)
    assert told <= named
    assert named - told <= {"fvdfs_prefetch_left_seconds"}, "which is told while it is known"
