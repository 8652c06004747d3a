"""The digest of all of a file, made while something else is done."""

from __future__ import annotations

import hashlib
import threading


class FileDigest:
    """Of one file; it ends with the process."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self._file = open(path, "rb")  # noqa: SIM115
        self._found: str | OSError = ""
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            with self._file:
                self._found = hashlib.file_digest(self._file, "sha256").hexdigest()
        except OSError as error:
            self._found = error

    def found(self) -> str:
        """The SHA-256; empty: it is not known yet. Raises OSError."""
        if isinstance(self._found, OSError):
            raise self._found
        return self._found
