"""fvdfs: Fast Virtual Disk images as flat raw files.

For programs in Python: `open` opens an image, `aio.open` does in an event loop of trio's (docs/python.md). What that
takes is imported where it is first named: the program fvdfs does without, and has to start at once.
"""

TYPE_CHECKING = False  # as in `typing`, which is not imported here: Ctrl-C meanwhile would be a traceback

if TYPE_CHECKING:
    from fvdfs import aio
    from fvdfs.aio import Extent, Snapshot
    from fvdfs.blocking import Image, open
    from fvdfs.errors import (
        FormatError,
        FvdError,
        ImageBusy,
        ImageError,
        Locked,
        MovedAway,
        NotFvd,
        NotPermitted,
        ReadOnlyImage,
        Refused,
        Unreachable,
        UnstatedFormat,
        UnsupportedFeature,
        UsageError,
    )

__version__ = "0.1.0"

__all__ = [
    "Extent",
    "FormatError",
    "FvdError",
    "Image",
    "ImageBusy",
    "ImageError",
    "Locked",
    "MovedAway",
    "NotFvd",
    "NotPermitted",
    "ReadOnlyImage",
    "Refused",
    "Snapshot",
    "Unreachable",
    "UnstatedFormat",
    "UnsupportedFeature",
    "UsageError",
    "aio",
    "open",
]

_PLACES = {"Extent": "aio", "Image": "blocking", "Snapshot": "aio", "open": "blocking"}
"""The modules of names; those of errors are in `errors`."""


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib  # takes long

        if name == "aio":
            return importlib.import_module("fvdfs.aio")
        return getattr(importlib.import_module(f"fvdfs.{_PLACES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
