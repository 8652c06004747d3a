"""The program, also as `python -m fvdfs`. Ctrl-C before it has begun ends it in silence."""

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself imports others, which takes long

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from fvdfs.cli import entry

if __name__ == "__main__":
    entry()
