"""What a mount keeps from whom: an unprivileged user's mount, other users, names in images, commands of images.

The user is `nobody`, who mounts with fusermount3 as anybody may. The tests of names that lead outside stand in
`test_mount.py` as well; here are the ways around them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fvdfs.format.header import HEADER_SIZE, Header, with_fields
from fvdfs.ops.complaints import LINES
from support.mounts import FVDFS, MIB, Finished, Mount, fvdfs, mounted, must, wait_for_end

NOBODY = 65534
OTHER = 65533  # a user who is neither root nor the one who mounts
SECRET = b"not for everybody" * 1000


def run_as(uid: int, *command: str | Path, timeout: float = 60) -> Finished:
    """Run a program as another user, without any privilege."""
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"]
    if str(command[0]).endswith("fusermount3") or "fvdfs" in map(str, command):
        drop.remove("--no-new-privs")  # fusermount3 is set-uid root
    done = subprocess.run(
        [*drop, *map(str, command)], capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def fvdfs_as(uid: int, *arguments: str | Path) -> Finished:
    return run_as(uid, *FVDFS, *arguments)


def python_as(uid: int, code: str, *arguments: str | Path) -> Finished:
    return run_as(uid, sys.executable, "-I", "-S", "-c", code, *arguments)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="fvdfs-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def users(shared: Path) -> Path:
    """A folder of images that belongs to `nobody`."""
    if fvdfs_as(NOBODY, "--version").code:
        pytest.skip("another user cannot run this Python")
    for name in ("images", "disks"):
        (shared / name).mkdir()
        os.chown(shared / name, NOBODY, NOBODY)
    done = fvdfs_as(NOBODY, "create", shared / "images/a.fvd", "2M")
    assert done.code == 0, done.err
    return shared / "images"


@contextmanager
def mounted_as(uid: int, folder: Path, *options: str) -> Iterator[Path]:
    """The folder, mounted by that user."""
    point = folder.parent / "disks"
    log = folder.parent / "log"
    log.touch()
    os.chown(log, uid, uid)
    done = fvdfs_as(uid, "mount", folder, point, "--log-file", log, *options)
    assert done.code == 0, done.err
    try:
        yield point
    finally:
        done = fvdfs_as(uid, "umount", point)
        if done.code:
            subprocess.run(["umount", "-l", point], check=False)
        assert done.code == 0, done.err


PID = "import os, sys; print(os.getxattr(sys.argv[1], 'user.fvdfs.pid').decode())"
READ = "import sys; print(len(open(sys.argv[1], 'rb').read(4096)))"
WRITE = "import os, sys; f = os.open(sys.argv[1], os.O_RDWR); os.pwrite(f, b'x' * 4096, 0); os.fsync(f)"


def test_a_user_without_privileges_mounts_and_uses_disks(users: Path) -> None:
    with mounted_as(NOBODY, users) as point:
        assert python_as(NOBODY, WRITE, point / "a.raw").code == 0
        assert python_as(NOBODY, READ, point / "a.raw").out == "4096\n"
        assert "a.raw" in fvdfs_as(NOBODY, "status", point).out
    assert fvdfs_as(NOBODY, "info", users / "a.fvd").code == 0


def test_status_says_which_images_a_user_may_not_read(users: Path) -> None:
    (users / "a.fvd").chmod(0)
    with mounted_as(NOBODY, users) as point:
        assert f"{users}/a.fvd: Permission denied" in (told := fvdfs_as(NOBODY, "status", point).out)
        assert "Errno" not in told


def test_root_unmounts_what_a_user_has_mounted(users: Path) -> None:
    """It waits until every image is closed, though the kernel shows it nothing of the mount; also of a dead one."""
    point = users.parent / "disks"
    try:
        for killed in (True, False):
            assert fvdfs_as(NOBODY, "mount", users, point).code == 0
            assert python_as(NOBODY, WRITE, point / "a.raw").code == 0
            if killed:
                pid = int(python_as(NOBODY, PID, point).out)
                os.kill(pid, signal.SIGKILL)
                wait_for_end(pid)
                assert "has ended; clear it away with" in fvdfs("mount", users, point).err
            assert fvdfs("umount", point) == Finished(0, "", "")
            assert not os.path.ismount(point)
    finally:
        subprocess.run(["umount", "-l", point], check=False, stderr=subprocess.DEVNULL)
    assert fvdfs_as(NOBODY, "check", users / "a.fvd").code == 0


def test_why_a_user_cannot_mount_is_said_in_one_line(users: Path) -> None:
    os.chown(users.parent / "disks", 0, 0)
    done = fvdfs_as(NOBODY, "mount", users, users.parent / "disks")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert f"{users.parent}/disks: cannot mount: user has no write access to mountpoint" in done.err


def test_other_users_and_root_are_kept_out_unless_allowed(users: Path) -> None:
    with mounted_as(NOBODY, users) as point:
        for uid in (OTHER, 0):
            done = python_as(uid, READ, point / "a.raw")
            assert done.code
            assert "PermissionError" in done.err
        refusal = (
            f"fvdfs: {point}: permission denied; nobody has mounted it: ask as nobody, "
            "or have it mounted with --allow-other\n"
        )
        assert fvdfs("status", point) == Finished(1, "", refusal)
        assert python_as(NOBODY, READ, point / "a.raw").code == 0


def test_permissions_of_a_disk_are_those_of_its_image(shared: Path) -> None:
    """Also where everybody may reach the mount: the kernel checks them (default_permissions)."""
    folder = shared / "images"
    folder.mkdir()
    for name, mode, uid in (("open", 0o644, 0), ("private", 0o600, 0), ("theirs", 0o600, NOBODY), ("all", 0o666, 0)):
        must("create", folder / f"{name}.fvd", "1M")
        os.chown(folder / f"{name}.fvd", uid, uid)
        os.chmod(folder / f"{name}.fvd", mode)
    may = {"open": (True, False), "private": (False, False), "theirs": (True, True), "all": (True, True)}
    with mounted(folder, "--allow-other") as mount:
        for name, (reads, writes) in may.items():
            status = mount.raw(name).stat()
            image = (folder / f"{name}.fvd").stat()
            assert (status.st_mode, status.st_uid, status.st_gid) == (image.st_mode, image.st_uid, image.st_gid)
            assert (python_as(NOBODY, READ, mount.raw(name)).code == 0) == reads, name
            assert (python_as(NOBODY, WRITE, mount.raw(name)).code == 0) == writes, name
        # Who may not write to the disk may not have it prefetched either, nor change its mode or size.
        setxattr = "import os, sys; os.setxattr(sys.argv[1], 'user.fvdfs.prefetch', b'start')"
        change = "import os, sys; os.chmod(sys.argv[1], 0o777)"
        truncate = "import os, sys; os.truncate(sys.argv[1], 1 << 22)"
        for code, message in (
            (setxattr, "PermissionError"),
            (change, "PermissionError"),
            (truncate, "PermissionError"),
        ):
            done = python_as(NOBODY, code, mount.raw("open"))
            assert done.code
            assert message in done.err
        assert python_as(NOBODY, setxattr, mount.raw("all")).code == 0
        assert mount.raw("open").stat().st_size == MIB
        flags = Path("/proc/mounts").read_text()
        (line,) = [line for line in flags.splitlines() if f" {mount.point} " in line]
        assert "nosuid" in line
        assert "nodev" in line
    assert (folder / "open.fvd").exists()


GROUP = 60  # of images, not of nobody and the other
PEOPLE = ((NOBODY, NOBODY), (NOBODY, GROUP), (OTHER, OTHER), (OTHER, GROUP), (OTHER, 61))
ACLS = {
    "no ACL": [],
    "a named user, but not the group": ["-m", "u:65534:rw,g::---,m::rw"],
    "a named user shut out, though others may": ["-m", "u:65534:---,g::r,o::r"],
    "a named group": ["-m", "g:61:rw,g::---,o::---"],
    "a mask that cuts all": ["-m", "u:65534:rw,g:61:rw,m::r"],
    "the mask is nothing": ["-m", "u:65534:rw,g::rw,m::---,o::r"],
    "only named": ["-m", "u:65533:r,g::---,o::---"],
}


def rights(path: Path) -> list[str]:
    """What each of several people may do with a file."""
    ask = "import os, sys\nfor mode in (os.O_RDONLY, os.O_RDWR): os.close(os.open(sys.argv[1], mode)); print(mode)"
    command = [sys.executable, "-I", "-S", "-c", ask, str(path)]
    found = []
    for uid, gid in PEOPLE:
        drop = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        found.append(subprocess.run([*drop, *command], capture_output=True, text=True, check=False).stdout)
    return found


def acl(path: Path) -> str:
    return subprocess.run(
        ["getfacl", "--omit-header", "--absolute-names", "--numeric", path], check=True, capture_output=True, text=True
    ).stdout


def test_an_acl_of_an_image_is_that_of_its_disk(shared: Path) -> None:
    """Where there is one, the group's bits are the mask: by them alone the group could do what the ACL denies."""
    folder = shared / "images"
    folder.mkdir()
    must("create", folder / "a.fvd", "1M")
    images = [folder / f"{number}.fvd" for number in range(len(ACLS))]
    for image, options in zip(images, ACLS.values(), strict=True):
        shutil.copy(folder / "a.fvd", image)
        os.chown(image, 0, GROUP)
        os.chmod(image, 0o640)
        if options:
            subprocess.run(["setfacl", *options, image], check=True)
    with mounted(folder, "--allow-other") as mount:
        for number, (image, what) in enumerate(zip(images, ACLS, strict=True)):
            raw = mount.raw(str(number))
            assert rights(raw) == rights(image), what
            assert acl(raw) == acl(image), what
            assert raw.stat().st_mode == image.stat().st_mode, what
        # Changes through the mount reach the image, changes of the image the mount, as long as it is open, too.
        raw, image = mount.raw("0"), images[0]
        with open(raw, "rb"):
            for change in (
                lambda: subprocess.run(["setfacl", "-m", "u:65534:rw,g::---", raw], check=True),
                lambda: os.chmod(raw, 0o600),
                lambda: os.chmod(raw, 0o660),
                lambda: subprocess.run(["setfacl", "-x", "u:65534", raw], check=True),
                lambda: subprocess.run(["setfacl", "-m", "u:65533:r", image], check=True),
                lambda: subprocess.run(["setfacl", "-b", raw], check=True),
                lambda: os.chmod(image, 0o604),
            ):
                change()
                assert rights(raw) == rights(image)
                assert acl(raw) == acl(image)
        done = run_as(NOBODY, "setfacl", "-m", "u:65534:rwx", mount.raw("1"))
        assert "Operation not permitted" in done.err
        assert acl(mount.raw("1")) == acl(images[1])
        assert "ERROR" not in mount.log


def test_an_acl_of_the_folder_is_that_of_the_mount(shared: Path) -> None:
    folder = shared / "images"
    folder.mkdir()
    must("create", folder / "a.fvd", "1M")
    os.chmod(folder / "a.fvd", 0o644)
    os.chown(folder, 0, GROUP)
    with mounted(folder, "--allow-other") as mount:
        for options in (
            ["-m", "u:65534:---"],
            ["-m", "u:65534:rx,g::---,o::---"],
            ["-m", "d:u:65534:rw"],
            ["-k"],
            ["-b"],
        ):
            subprocess.run(["setfacl", *options, folder], check=True)
            assert rights(mount.raw("a")) == rights(folder / "a.fvd")
            assert acl(mount.point) == acl(folder)
        done = subprocess.run(["setfacl", "-m", "u:65534:rw", mount.point], capture_output=True, text=True, check=False)
        assert "Operation not permitted" in done.stderr


def test_a_file_system_without_acls_has_permissions(shared: Path) -> None:
    folder = shared / "images"
    folder.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "-o", "mode=755", "none", folder], check=True)
    try:
        must("create", folder / "a.fvd", "1M")
        os.chown(folder / "a.fvd", 0, GROUP)
        os.chmod(folder / "a.fvd", 0o640)
        with mounted(folder, "--allow-other") as mount:
            assert rights(mount.raw("a")) == rights(folder / "a.fvd") == ["", "0\n", "", "0\n", ""]
            done = subprocess.run(
                ["setfacl", "-m", "u:1:r", mount.raw("a")], capture_output=True, text=True, check=False
            )
            assert "Operation not supported" in done.stderr
            assert "ERROR" not in mount.log
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


CHANGES_OF_THE_FOLDER: dict[str, tuple[Callable[[Path, Path], object], int]] = {
    "create": (lambda raw, new: os.open(new, os.O_CREAT | os.O_WRONLY), errno.EPERM),
    "O_TMPFILE": (lambda raw, new: os.open(new.parent, os.O_TMPFILE | os.O_WRONLY), errno.EOPNOTSUPP),
    "mknod": (lambda raw, new: os.mknod(new), errno.EPERM),
    "mkfifo": (lambda raw, new: os.mkfifo(new), errno.EPERM),
    "mkdir": (lambda raw, new: os.mkdir(new), errno.EPERM),
    "symlink": (lambda raw, new: os.symlink("/etc/passwd", new), errno.EPERM),
    "link": (lambda raw, new: os.link(raw, new), errno.EPERM),
    "unlink": (lambda raw, new: os.unlink(raw), errno.EPERM),
    "rmdir": (lambda raw, new: os.rmdir(raw), errno.ENOTDIR),
    "rename": (lambda raw, new: os.rename(raw, new), errno.EPERM),
    "long name": (lambda raw, new: os.open(new.with_name("n" * 300), os.O_CREAT | os.O_WRONLY), errno.ENAMETOOLONG),
    "chmod of the folder": (lambda raw, new: os.chmod(new.parent, 0o700), errno.EPERM),
}


@pytest.mark.parametrize("read_only", [False, True])
def test_nothing_can_be_made_removed_or_renamed_in_a_mount(folder: Path, read_only: bool) -> None:
    """The answers are those of a file system that does not do it, not of a kernel that does not know the call."""
    must("create", folder / "a.fvd", "1M")
    with mounted(folder, *(["--read-only"] if read_only else [])) as mount:
        for what, (call, expected) in CHANGES_OF_THE_FOLDER.items():
            with pytest.raises(OSError) as caught:
                call(mount.raw("a"), mount.raw("new"))
            code = errno.EROFS if read_only and expected != errno.ENAMETOOLONG else expected
            assert caught.value.errno == code, f"{what}: {caught.value}"
        assert os.listdir(mount.point) == ["a.raw"]
        assert mount.log.count("ERROR") == (0 if read_only else 3)
    assert os.listdir(folder) == ["a.fvd"]


def resident(pid: int) -> int:
    """KiB of memory that a process holds."""
    return int(re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])  # type: ignore[index]


def ask_for_names(mount: Mount, make: Callable[[int], str], count: int) -> set[int]:
    """Look for that many names, none of which is there; the error codes."""
    codes = set()
    for number in range(count):
        try:
            os.stat(mount.point / make(number))
        except OSError as error:
            codes.add(error.errno or 0)
    return codes


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda number: f"{number:0900}.raw", errno.ENAMETOOLONG),
        (lambda number: f"{number:0900}", errno.ENAMETOOLONG),
        (lambda number: f"{number:0251}.raw", errno.ENOENT),
    ],
)
def test_names_that_are_not_there_fill_neither_log_nor_memory(
    folder: Path, make: Callable[[int], str], code: int
) -> None:
    must("create", folder / "a.fvd", "1M")
    with mounted(folder) as mount:
        ask_for_names(mount, make, 1000)
        before, lines = resident(mount.pid), mount.log
        assert ask_for_names(mount, lambda number: make(number + 1000), 3000) == {code}
        assert mount.log == lines
        assert resident(mount.pid) - before < 4000


HOSTILE = {
    "open what is only complained of": "os.close(os.open(p, os.O_RDONLY))",
    "open the folder": "kept.append(os.open(os.path.dirname(p), os.O_RDONLY)); n % 500 or close()",
    "nonsense to prefetching": "os.setxattr(p, 'user.fvdfs.prefetch', bytes(60000))",
    "prefetching": "os.setxattr(p, 'user.fvdfs.prefetch', b'start')",
    "attributes of any name": "os.setxattr(p, f'user.{n:0200}', bytes(60000))",
    "attributes that are not there": "os.getxattr(p, f'user.{n:0200}')",
    "sizes": "os.truncate(p, 1 << 62)",
    "an ACL that is none": "os.setxattr(p, 'system.posix_acl_access', bytes(60000))",
    "names": "os.rename(p, p + str(n))",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_that_a_user_does_fills_log_or_memory(shared: Path, what: str) -> None:
    folder = shared / "images"
    folder.mkdir()
    (folder / "base").write_bytes(b"b" * MIB)
    must("create", folder / "a.fvd", "--base", "base", "--base-format", "raw")
    os.truncate(folder / "base", MIB // 2)  # which is said at each opening
    os.chmod(folder / "a.fvd", 0o666)
    code = (
        "import os, sys\n"
        "p, start, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n"
        "kept = []\n"
        "def close():\n"
        "    while kept: os.close(kept.pop())\n"
        "for n in range(start, start + count):\n"
        f"    try: {HOSTILE[what]}\n"
        "    except OSError: pass\n"
    )
    with mounted(folder, "--allow-other") as mount:
        assert python_as(NOBODY, code, mount.raw("a"), "0", "300").code == 0
        before, lines = resident(mount.pid), mount.log.count("\n")
        assert python_as(NOBODY, code, mount.raw("a"), "300", "1000").code == 0
        assert mount.log.count("\n") - lines <= 2 * LINES
        assert len(mount.log) < 20_000
        assert resident(mount.pid) - before < 4000
        assert mount.raw("a").stat().st_size == MIB
    assert len(mount.log) < 20_000


def test_a_folder_that_cannot_be_looked_into_is_said_a_few_times(users: Path) -> None:
    with mounted_as(NOBODY, users) as point:
        log = users.parent / "log"
        mount = Mount(users, point, log, pid=int(python_as(NOBODY, PID, point).out))
        ask = "import os, sys\nfor n in range(2000): os.path.exists(f'{sys.argv[1]}/{n}.raw')"
        os.chmod(users, 0)
        try:
            assert python_as(NOBODY, ask, point).code == 0
            size = len(mount.log)
            assert 0 < size < 3000
        finally:
            os.chmod(users, 0o755)
        assert python_as(NOBODY, READ, point / "a.raw").out == "4096\n"


def test_set_uid_bits_do_not_show(folder: Path) -> None:
    must("create", folder / "a.fvd", "1M")
    os.chmod(folder / "a.fvd", 0o6755)
    with mounted(folder) as mount:
        assert stat.S_IMODE(mount.raw("a").stat().st_mode) == 0o755


# --- names in images ----------------------------------------------------------------------------


def set_header(image: Path, **fields: int | str) -> None:
    with open(image, "r+b") as file:
        header = with_fields(Header.decode(file.read(HEADER_SIZE), str(image)), **fields)
        file.seek(0)
        file.write(header.encode())


def ways_out(folder: Path, outside: Path) -> dict[str, str]:
    """Names that lead to the file `secret` outside of the folder."""
    os.symlink(outside / "secret", folder / "link")
    os.symlink("link", folder / "link-to-link")
    os.symlink(outside, folder / "linked-folder")
    os.symlink("..", folder / "up")
    (folder / "sub").mkdir()
    os.symlink(f"../../{outside.name}/secret", folder / "sub/link")
    return {
        "dots": f"../{outside.name}/secret",
        "many dots": f"sub/../.././{outside.name}//secret",
        "absolute": str(outside / "secret"),
        "twice absolute": f"/{outside / 'secret'}",
        "link": "link",
        "link to link": "link-to-link",
        "linked folder": "linked-folder/secret",
        "up and out": f"up/{outside.name}/secret",
        "link below": "sub/link",
        "proc root": f"/proc/self/root{outside}/secret",
        "proc cwd": f"/proc/self/cwd{outside}/secret",
        "file url": f"file://{outside}/secret",
        "file protocol": f"file:{outside}/secret",
        "json": f'json:{{"driver": "raw", "file": {{"driver": "file", "filename": "{outside}/secret"}}}}',
        "neighbour": f"../{folder.name}2/secret",
    }


@pytest.mark.parametrize("field", ["base_img", "data_file"])
def test_no_name_leads_out_of_the_folder(folder: Path, tmp_path: Path, field: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(SECRET)
    neighbour = tmp_path / f"{folder.name}2"  # whose path begins like the folder's
    neighbour.mkdir()
    (neighbour / "secret").write_bytes(SECRET)
    (folder / "base").write_bytes(bytes(len(SECRET)))
    names = ways_out(folder, outside)
    for number, name in enumerate(names.values()):
        image = folder / f"i{number}.fvd"
        if field == "base_img":
            must("create", image, "--base", "base", "--base-format", "raw")
            set_header(image, base_img=name)
        else:
            must("create", image, "1M", "--data-file", f"data{number}")
            set_header(image, data_file=name)
    with mounted(folder) as mount:
        assert os.listdir(mount.point) == []
        for number, (what, name) in enumerate(names.items()):
            assert f"i{number}.fvd: {field}=" in mount.log, f"{what}: {name}"
    assert (outside / "secret").read_bytes() == SECRET


def test_an_image_that_stands_on_itself_or_on_what_is_no_file(folder: Path) -> None:
    (folder / "base").write_bytes(bytes(4096))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    for number, name in enumerate(("i0.fvd", "socket", "/dev/zero", "/dev/mem", "/proc/self/mem", "/proc/kcore", "")):
        must("create", folder / f"i{number}.fvd", "--base", "base", "--base-format", "raw")
        if name:
            set_header(folder / f"i{number}.fvd", base_img=name, base_img_fmt="fvd" if number == 0 else "raw")
    with mounted(folder, "-o", "base_path=/") as mount:
        found = os.listdir(mount.point)
        assert "i6.raw" in found
        assert not {"i0.raw", "i1.raw", "i2.raw", "i3.raw"} & set(found)
        for name in found:  # files of /proc may be files by their mode; none of them hangs the mount
            try:
                assert len((mount.point / name).read_bytes()) == 4096
            except OSError as error:  # a base that cannot be read, as the memory of a process at 0
                assert (name, error.errno) == ("i4.raw", errno.EIO)


def test_a_link_that_is_turned_round_after_it_was_judged(folder: Path, tmp_path: Path) -> None:
    """The file that was judged is the one that is opened: nobody who turns a link meanwhile gets another one read."""
    (tmp_path / "secret").write_bytes(SECRET)
    (folder / "harmless").write_bytes(b"harmless".ljust(len(SECRET), b"."))
    os.symlink("harmless", folder / "base")
    must("create", folder / "a.fvd", "--base", "base", "--base-format", "raw")
    turning = (
        "import os, sys\n"
        "while True:\n"
        "    for target in ('harmless', sys.argv[2]):\n"
        "        os.symlink(target, sys.argv[1] + '.new')\n"
        "        os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
    )
    with mounted(folder, "-o", "writeback=off") as mount:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", turning, str(folder / "base"), str(tmp_path / "secret")]
        ) as process:
            try:
                seen = 0
                until = time.monotonic() + 2
                while time.monotonic() < until:
                    try:
                        content = mount.raw("a").read_bytes()
                    except OSError:
                        continue
                    assert content[:8] == b"harmless"
                    seen += 1
            finally:
                process.kill()
        assert seen, "the image could never be opened"


# --- commands, terminals, files that are left ----------------------------------------------------


def test_a_command_in_an_image_is_never_run_unless_the_mount_says_so(folder: Path, tmp_path: Path) -> None:
    """Neither by any command that looks at the image, nor by a mount whose device is full."""
    backing = tmp_path / "device.img"
    backing.touch()
    os.truncate(backing, 4 * MIB)
    witness = tmp_path / "witness"
    device = subprocess.run(["losetup", "-f", "--show", backing], check=True, capture_output=True, text=True).stdout
    try:
        os.symlink(device.strip(), folder / "a.fvd")
        must(
            "create", device.strip(), "64M", "--compact", "--chunk-size", "64K", "--journal-size", "64K", "--force",
            "--grow-command", f"touch {witness}",
        )  # fmt: skip
        must("info", folder / "a.fvd")
        must("map", folder / "a.fvd")
        for options in ([], ["-o", "grow_command=none"]):
            with mounted(folder, *options, "-o", "writeback=off") as mount:
                with pytest.raises(OSError, match="No space"), open(mount.raw("a"), "r+b", buffering=0) as disk:
                    for _ in range(64):
                        disk.write(b"x" * MIB)
                assert f"allow the image's own command (touch {witness})" in mount.log
        assert not witness.exists()
        with (
            mounted(folder, "-o", "grow_command=stored,writeback=off") as mount,
            pytest.raises(OSError),
            open(mount.raw("a"), "r+b", buffering=0) as disk,
        ):
            for _ in range(64):
                disk.write(b"x" * MIB)
        assert witness.exists(), "so the test would have seen it"
    finally:
        subprocess.run(["losetup", "-d", device.strip()], check=True)


def test_a_guest_cannot_make_its_disk_look_like_an_image(folder: Path) -> None:
    """A disk is raw to whoever opens it, and a base is what its format field says, whatever is written to it."""
    must("create", folder / "inner.fvd", "1M")
    must("create", folder / "a.fvd", "64M")
    (folder / "base.raw").write_bytes((folder / "inner.fvd").read_bytes())
    must("create", folder / "b.fvd", "--base", "base.raw", "--base-format", "raw")
    with mounted(folder) as mount:
        header = (folder / "inner.fvd").read_bytes()[:HEADER_SIZE]
        with open(mount.raw("a"), "r+b") as disk:
            disk.write(header)
        mount.remount()
        assert mount.raw("a").read_bytes()[:HEADER_SIZE] == header
        assert mount.raw("b").read_bytes()[:HEADER_SIZE] == header
        assert fvdfs("info", mount.raw("b")).code == 0, "asked for, it is looked at"


def test_images_of_one_folder_trust_each_other(folder: Path) -> None:
    """What SECURITY.md admits: an image may name another one as its data file; locks are all that is in the way."""
    must("create", folder / "victim.fvd", "1M")
    must("create", folder / "a.fvd", "1M", "--data-file", "a.data")
    set_header(folder / "a.fvd", data_file="victim.fvd")
    with mounted(folder) as mount:
        with open(mount.raw("victim"), "r+b"), pytest.raises(OSError) as caught:
            os.open(mount.raw("a"), os.O_RDWR)
        assert caught.value.errno == errno.EBUSY
        with open(mount.raw("a"), "r+b") as disk:
            disk.write(b"overwritten")
    assert (folder / "victim.fvd").read_bytes()[:11] == b"overwritten"


def test_a_base_is_opened_for_reading_only(folder: Path) -> None:
    """Whatever its image wishes."""
    (folder / "base.raw").write_bytes(bytes(MIB))
    must("create", folder / "a.fvd", "--base", "base.raw", "--base-format", "raw", "--update-base", "writethrough")
    with mounted(folder) as mount, open(mount.raw("a"), "r+b", buffering=0) as disk:
        disk.write(b"x" * 4096)
        base = (folder / "base.raw").stat()
        found = 0
        for name in os.listdir(f"/proc/{mount.pid}/fd"):
            status = os.stat(f"/proc/{mount.pid}/fd/{name}")
            if (status.st_dev, status.st_ino) == (base.st_dev, base.st_ino):
                flags = Path(f"/proc/{mount.pid}/fdinfo/{name}").read_text().split("flags:")[1].split()[0]
                assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
                found += 1
        assert found
    assert (folder / "base.raw").read_bytes() == bytes(MIB)


def test_clones_in_a_folder_of_somebody_else(users: Path, shared: Path) -> None:
    done = fvdfs_as(NOBODY, "clone", users / "a.fvd", "b", "--into", shared)
    assert done.code == 1
    assert "Permission denied" in done.err
    assert done.err.count("\n") == 1
    assert sorted(os.listdir(shared)) == ["disks", "images"]


def test_a_disk_belongs_to_whoever_makes_it(shared: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can make files of others")
    for name in ("images", "disks"):
        (shared / name).mkdir()
    (shared / "images").chmod(0o1777)
    must("mount", shared / "images", shared / "disks", "-o", "create,remove,allow_other")
    try:
        point, code = shared / "disks", "import os, sys; os.{}(sys.argv[1], *map(int, sys.argv[2:]))"
        flags = os.O_CREAT | os.O_WRONLY
        assert python_as(OTHER, code.format("open"), point / "a.raw", str(flags), str(0o600)).code == 0
        status = os.stat(shared / "images/a.fvd")
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (OTHER, OTHER, 0o600)
        assert "PermissionError" in python_as(NOBODY, code.format("unlink"), point / "a.raw").err
        assert python_as(OTHER, code.format("unlink"), point / "a.raw").code == 0
        (shared / "images").chmod(0o755)
        assert "PermissionError" in python_as(OTHER, code.format("open"), point / "a.raw", str(flags)).err
        assert os.listdir(shared / "images") == []
    finally:
        must("umount", shared / "disks")


def test_a_user_makes_read_only_disks(users: Path) -> None:
    """As `cp` of a file that nobody may write does: what it has opened it may write."""
    with mounted_as(NOBODY, users, "-o", "create") as point:
        code = "import os, sys; f = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR, 0o444); os.write(f, b'x' * 512)"
        done = python_as(NOBODY, code, point / "b.raw")
        assert done.code == 0, done.err
        assert python_as(NOBODY, READ, point / "b.raw").out == "512\n"
    assert os.stat(users / "b.fvd").st_mode & 0o777 == 0o444
