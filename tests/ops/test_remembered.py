"""What a daemon leaves to the next one: however much happens, the file says what is so, and takes little memory."""

from __future__ import annotations

import os
import random

from fvdfs.ops.remembered import Opened, Remembered

ENTRIES = 40


def test_all_is_known_and_what_is_over_takes_no_memory() -> None:
    chance = random.Random(3)
    remembered = Remembered()
    remembered.begin()
    remembered.set("point", "/mnt")
    notes = [remembered.notes((1, number), f"/images/{number}.fvd") for number in range(ENTRIES)]
    left = [notes[number] for number in range(0, ENTRIES, 2)]
    for step in range(60_000):
        number = chance.randrange(ENTRIES)
        remembered.tell(number, step)
        if step % 7 == 0:
            remembered.open(number, Opened(number, True, False, False, step))
        if step % 11 == 0:
            remembered.release(number)
        note = notes[number]
        note.blocks_stored(step, step + 1)
        note.chunks_allocated([(step, step + 5)])
        if note not in left or step % 1000 < 900:
            note.commit_begins()
            note.commit_ends(done=chance.random() < 0.9)
    status = os.fstat(remembered.descriptor)
    assert status.st_size > 4 << 20
    assert status.st_blocks * 512 < 4 << 20
    state, next_one = remembered.state, Remembered()
    copy = os.dup(remembered.descriptor)
    os.write(copy, b'{"what":"told","key"')  # killed in the middle of a line
    next_one.take_up({remembered.number: copy})
    os.close(remembered.descriptor)
    state.takeovers = 1
    assert sorted(state.changes(), key=repr) == sorted(next_one.state.changes(), key=repr)
    for number in range(ENTRIES):
        assert remembered.left((1, number)) == next_one.left((1, number))
    os.close(next_one.descriptor)
