"""Put a file into a disk at an offset, and keep what the disk was as a snapshot.

usage: python patch.py IMAGE OFFSET FILE        (the image must not be mounted or open)
"""

import sys

import fvdfs

PIECE = 1 << 20  # bytes


def patch(image: str, offset: int, file: str) -> None:
    with fvdfs.open(image, write=True) as disk, open(file, "rb") as source:
        before = disk.create_snapshot()
        at = offset
        while data := source.read(PIECE):
            disk.write(at, data)
            at += len(data)
        disk.flush()  # from here on it survives a power cut
        stored = sum(extent.stop - extent.start for extent in disk.map() if extent.state == "stored")
        print(f"{at - offset} bytes at {offset}; {stored} bytes are stored since {before.path}")


if __name__ == "__main__":
    try:
        patch(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    except (fvdfs.FvdError, OSError) as error:
        sys.exit(f"patch: {error}")
