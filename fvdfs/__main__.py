"""`python -m fvdfs`: the same as the program `fvdfs`."""

from fvdfs.cli import entry

entry()
