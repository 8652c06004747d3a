"""Uses a disk until its standard input ends, and knows what it must hold: python keptwriter.py FILE MODEL SEED.

Then it writes that to MODEL. Anything that is not as it must be ends it with exit code 1.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import sys

UNIT = 4096
LARGEST = 96 << 10
MAPPED = 64 << 10
PUNCH = 0x3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)


def punch(descriptor: int, offset: int, length: int) -> bool:
    """fallocate(2); whether it can be done."""
    if _libc.fallocate(descriptor, PUNCH, ctypes.c_long(offset), ctypes.c_long(length)):
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.EINTR):
            raise OSError(number, os.strerror(number))
        return False
    return True


def use(path: str, model_path: str, seed: int) -> None:
    """Write, read, map, discard and append until nobody wants that any more."""
    chance = random.Random(seed)
    descriptor, reader = os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)
    model = bytearray(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    mapped = mmap.mmap(descriptor, MAPPED)
    print("begun", flush=True)
    while not select.select([0], [], [], 0)[0]:
        at = chance.randrange(len(model) - LARGEST)
        what = chance.random()
        if what < 0.6:
            unit = chance.choice((1, 512, UNIT, UNIT, UNIT))
            at = at // unit * unit
            data = chance.randbytes(chance.choice((unit, UNIT, UNIT, LARGEST // UNIT * UNIT)))
            assert os.pwrite(descriptor, data, at) == len(data)
            model[at : at + len(data)] = data
        elif what < 0.65:
            place, byte = chance.randrange(MAPPED), chance.randrange(256)
            mapped[place] = byte
            model[place] = byte
        elif what < 0.7:
            at, length = at // UNIT * UNIT, chance.randrange(1, LARGEST)
            if punch(descriptor, at, length):
                model[at : at + length] = bytes(length)
        elif what < 0.72:
            data = chance.randbytes(chance.randrange(1, 2000))
            assert os.pwrite(descriptor, data, len(model)) == len(data)
            model += data
        elif what < 0.75:
            os.fsync(descriptor)
        else:
            length = chance.randrange(1, LARGEST)
            found = os.pread(chance.choice((descriptor, reader)), length, at)
            assert found == model[at : at + length], f"{path}: other bytes at {at}"
            size = os.fstat(reader).st_size
            assert size == len(model), f"{path}: ends at {size}, not at {len(model)}"
    found = os.pread(reader, len(model) + 1, 0)
    assert found == model, f"{path}: other bytes at the end"
    with open(model_path, "wb") as file:
        file.write(model)
    mapped.close()
    os.close(descriptor)
    os.close(reader)


if __name__ == "__main__":
    use(sys.argv[1], sys.argv[2], int(sys.argv[3]))
