"""What is found in the header of another format, given its bytes."""

from __future__ import annotations

from fvdfs.store.references import MAX_READ, Reader, Reference, references


def reader(data: bytes) -> Reader:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset < 1 << 63
        assert 0 <= length <= MAX_READ
        return data[offset : offset + length]

    return read


def look(file_format: str, data: bytes) -> list[Reference]:
    return references(file_format, "image", reader(data), len(data))
