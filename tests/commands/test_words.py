"""What commands and the log say on a bad day: which file, in the words of the user."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fvdfs.commands import status
from fvdfs.errors import told
from fvdfs.ops.answers import error_number
from fvdfs.ops.complaints import Complaints
from fvdfs.store.host import open_path
from fvdfs.store.paths import Walker
from support.mounts import MIB, fvdfs, must
from support.servers import nbd_server


def test_an_error_names_the_file_by_its_path(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            with pytest.raises(OSError, match="Text file busy") as caught:
                open_path(str(program), writable=True)
        finally:
            process.kill()
    assert caught.value.filename == str(program)
    with pytest.raises(OSError, match="No data available") as caught:
        Walker().attribute(os.fsencode(program), "user.none")
    assert told(caught.value) == f"{program}: No data available"


def test_the_log_holds_no_byte_strings(caplog: pytest.LogCaptureFixture) -> None:
    error = OSError(errno.EIO, "Input/output error", b"/images/a.fvd")
    assert error_number(error, "read", Complaints()) == errno.EIO
    assert "read: /images/a.fvd: Input/output error" in caplog.text
    assert "b'" not in caplog.text


def test_status_shows_the_others_where_one_disk_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).touch()

    def facts(path: str, _attribute: str) -> dict[str, Any]:
        if path.endswith("a.raw"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return {"name": "b.raw", "image": "b.fvd", "open": False, "state": "closed", "virtual_size": MIB}

    monkeypatch.setattr(status, "facts", facts)
    monkeypatch.setattr(os, "getxattr", lambda *_: b"1")
    first, second = status.status(str(tmp_path))["images"]
    assert first == {"name": "a.raw", "open": False, "state": "unreadable", "failed": "Permission denied"}
    assert second["name"] == "b.raw"
    status.print_status(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["a.raw", "unreadable", "Permission", "denied"]
    assert lines[2].split()[0] == "b.raw"


def test_a_base_behind_a_url(folder: Path) -> None:
    """Its name is shown as it is, and the option that a message names is one of the command's."""
    (folder / "base.raw").write_bytes(b"b" * MIB)
    image = folder / "a.fvd"
    with nbd_server(folder / "base.raw", folder.parent / "socket") as url:
        must("create", image, "-b", url, "-F", "raw")
        refused = json.loads(must("info", image, "--json"))
        assert refused["base_chain"] == [{"name": url, "path": url, "format": "raw"}]
        assert "allow it with -o 'allow_url=" in refused["problems"][0]
        assert "allow it with -o 'allow_url=" in fvdfs("map", image).err
        for words in (["info", "--json"], ["map", "--json"]):
            done = fvdfs(*words, image, "-o", "allow_url=nbd+unix:///")
            assert (done.code, done.err) == (0, "")
            if words[0] == "info":
                assert json.loads(done.out)["problems"] == []
