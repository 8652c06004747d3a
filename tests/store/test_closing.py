"""A file whose closing is interrupted is not closed twice: by then its number may be another file's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fvdfs.store.host import HostFile


def test_an_interrupt_right_after_it_was_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HostFile(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT), "file", writable=True)
    closed, close = [], os.close

    def interrupted(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.close()
    file.close()
    assert len(closed) == 1
