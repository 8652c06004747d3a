"""What an image may do: where its names may lead, and what format a file has where nobody states it.

Names inside an image are relative to its folder, and lead only where the user allows (`Policy`): the
file that a name leads to is found first, links and all, without opening it; then it is judged by where
it really is; then that very file is opened.
"""

from __future__ import annotations

import errno
import os
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from fvdfs.cow.planner import Zeroes
from fvdfs.errors import ImageError, Refused, UnstatedFormat, UsageError
from fvdfs.image.unsettled import Unsettled
from fvdfs.mountoptions import hint
from fvdfs.store import paths
from fvdfs.store.host import HostFile, open_path
from fvdfs.store.locations import Location, within
from fvdfs.store.outage import OnLoss
from fvdfs.store.paths import Walker
from fvdfs.store.qemu_store import QemuStore
from fvdfs.store.references import PROBE_SIZE, RAW, detect

RAW_FORMATS = ("", RAW)
FVD_FORMAT = "fvd"
HostStore = HostFile | QemuStore
"""A store that a name leads to."""


given_credentials: ContextVar[str] = ContextVar("given_credentials", default="")
"""`Policy.credentials` of a command."""
given_tls_creds: ContextVar[str] = ContextVar("given_tls_creds", default="")
"""`Policy.tls_creds` of a command, which has them for every server that it may meet."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What an image may do: where its names may lead, and whether it may be written."""

    roots: tuple[str, ...] = ("/",)
    """Real paths of the folders that names inside images may lead into."""
    writable: bool = True
    accept_unclean: bool = False
    """Whether an image that crashed without a journal may be written."""
    grow_command: str = "none"
    """What makes a full device larger: `none`, `stored` (the image's own command), or a program."""
    zeroes: Zeroes = Zeroes.OFF
    base_writable: bool = False
    """Whether an image that asks for it may write to its base."""

    allowed_urls: tuple[str, ...] = ()
    """Prefixes of URLs that names inside images may be; an empty one allows any."""
    secret_file: str = ""
    """The file with the passphrase of encrypted bases and data files."""
    tls_creds: str = field(default_factory=given_tls_creds.get)
    """The file of `TLS_FILES` in the folder with the credentials for servers of nbds://."""
    credentials: str = field(default_factory=given_credentials.get)
    """The file that says who we are for servers (`credentials`)."""
    on_loss: OnLoss = OnLoss.REFUSE
    """What becomes of requests while the server of a base is away."""
    walker: Walker = field(default_factory=Walker, compare=False)
    """Follows paths, and knows where they must not lead."""
    qemu_locks: bool = True
    """Whether QEMU's image locks are taken and respected, beside our own."""
    base_formats: tuple[str, ...] = ()
    """Formats that a base may have where nobody states one and it does not look raw: what it looks like, or `raw`."""
    unnamed: tuple[tuple[str, str], ...] = ()
    """Files that do not have their names yet: the path that each will have, and where it lies now."""

    unsettled: Unsettled | None = field(default=None, compare=False)
    """Who remembers what is not committed, for another process that may go on."""

    def place(self, path: str) -> str:
        """Where the file of this path lies now."""
        return dict(self.unnamed).get(path, path)

    def open_file(self, image: str, field: str, name: str) -> tuple[int, str]:
        """An O_PATH handle of the file that `name` in the image at path `image` leads to, and its path.

        The caller closes the handle. Raises Refused, ImageError, NoAnswer.
        """
        path = resolve(image, name)
        try:
            handle = self.walker.open(self.place(path))
        except OSError as error:
            where = "" if path == image else f"{field}={name}: " + (f"{path}: " if path != name else "")
            remedy = ""
            if error.errno == errno.ENOENT and field == "base_img":
                remedy = "; if it was moved: fvdfs rebase IMAGE -b FILE --unsafe"
            elif error.errno == errno.ENOENT and field == "data_file":
                remedy = "; it holds the disk's data: bring it back"
            raise ImageError(image, f"{where}{error.strerror}{remedy}") from error
        try:
            self._check_file(image, field, name, os.readlink(f"/proc/self/fd/{handle}"))
        except BaseException:
            os.close(handle)
            raise
        return handle, path

    def check_url(self, image: str, field: str, location: Location) -> None:
        """Raise Refused unless the URL is allowed."""
        if not any(prefix == "" or within(location.url, prefix) for prefix in self.allowed_urls):
            raise Refused(image, f"{field}={location.name}: allow it with -o {hint('allow_url', location.url)}")
        for socket in parse_qs(urlsplit(location.url).query).get("socket", ()):
            try:
                self.walker.check(socket)
            except OSError as error:
                raise Refused(image, f"{field}={location.name}: {socket}: {error.strerror}") from error

    def unstated_format(self, image: str, field: str, name: str, looks_like: str) -> str:
        """The format of a base that does not look raw, where nobody states it.

        A guest may have written these bytes into a raw disk, or the original, which cannot store a format, may have
        made an image over such a base (format.md, "Surprising values"). Raises UnstatedFormat.
        """
        if looks_like in self.base_formats:
            return looks_like
        if RAW in self.base_formats:
            return RAW
        if field == "base_img":
            how = f"fvdfs amend {image} --base-format {looks_like} (or raw), or mount with -o base_format={looks_like}"
        else:
            how = f"qemu-img rebase -u -b {name} -F {looks_like} {image}, or mount with -o base_format={looks_like}"
        raise UnstatedFormat(
            image, f"{field}={name} looks like {looks_like}, but no format is stated; say what it is: {how}", looks_like
        )

    def _check_file(self, image: str, field: str, value: str, real_path: str) -> None:
        if any(paths.within(real_path, root) for root in self.roots):
            return
        raise Refused(
            image,
            f"{field}={value} leads to {real_path}, outside the folder of the images; "
            f"allow it with -o {hint('base_path', os.path.dirname(real_path))}",
        )


def format_by_name(path: str) -> tuple[str, str | None]:
    """The format of a file for which nobody has stated one, and, of a raw one, what it looks like. Blocks.

    NAME.fvd is FVD, all else is raw: what a disk holds is its guest's word and never decides. Raises UsageError
    where NAME.fvd holds no FVD image, ImageError, OSError.
    """
    store = open_path(path, writable=False)
    try:
        guess = looks_like(store)
    finally:
        store.close()
    if not path.endswith(".fvd"):
        return RAW, guess
    if guess != FVD_FORMAT:
        raise UsageError(f"{path}: is not an FVD image; if it is one of another format, or raw, say which")
    return FVD_FORMAT, None


def resolve(image_path: str, name: str) -> str:
    """The path that a name inside an image means: names are relative to the image's folder."""
    return os.path.join(os.path.dirname(image_path), name)


def looks_like(file: HostFile) -> str | None:
    """The format that a file's first bytes show; None: raw. Blocks. Raises OSError."""
    first = bytearray(PROBE_SIZE)
    file.pread_now(memoryview(first), 0)
    return detect(bytes(first))
