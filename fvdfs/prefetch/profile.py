"""Planning the requests that fetch a profile. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from fvdfs.format.profile import Extent


def plan(extents: Sequence[Extent], size: int, gap: int, longest: int) -> list[Extent]:
    """The requests that fetch a profile from a base of `size` bytes.

    An extent that follows another within `gap` bytes is fetched with it, up to `longest` bytes together. A longer
    one stays whole: who fetches it takes it in parts.
    """
    requests: list[Extent] = []
    for start, stop in extents:
        stop = min(stop, size)
        if start >= stop:
            continue
        if requests:
            last_start, last_stop = requests[-1]
            if last_start <= start <= last_stop + gap and max(stop, last_stop) - last_start <= longest:
                requests[-1] = last_start, max(stop, last_stop)
                continue
        requests.append((start, stop))
    return requests
