"""The file that says who we are for servers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from fvdfs.errors import Refused, without_passwords
from fvdfs.store.credentials import host_key, key_of_keyring, parse
from fvdfs.store.lending import lend, read_credentials, secret_in, section_of
from fvdfs.store.locations import parse_location
from fvdfs.store.qemu_nodes import Node
from support.mounts import fvdfs, must

FILE = """
# A remark
[ssh://host/]
user = images
key = id
[ssh://host/other/]
known_hosts = /etc/known
[rbd:templates/]
user = fvdfs
[/srv/images/]
passphrase_file = pass
"""


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("ssh://host/a.raw", {"user": "images", "key": "/etc/fvdfs/id"}),
        ("ssh://images@host/a.raw", {"user": "images", "key": "/etc/fvdfs/id"}),
        ("ssh://host/other/a.raw", {"known_hosts": "/etc/known"}),
        ("ssh://host.example/a.raw", {}),
        ("ssh://host:23/a.raw", {}),
        ("rbd:templates/a", {"user": "fvdfs"}),
        ("rbd:templates2/a", {}),
        ("/srv/images/a.luks", {"passphrase_file": "/etc/fvdfs/pass"}),
        ("/srv/images2/a.luks", {}),
    ],
)
def test_the_longest_prefix_counts(place: str, values: dict[str, str]) -> None:
    assert parse(FILE, "/etc/fvdfs").of(place).values == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user = a\n", "line 1: begin with a"),
        ("[ssh://h/]\ntop-secret\n", "line 2: must be NAME = VALUE"),
        ("[ssh://h/]\nuser = a\nuser = b\n", "line 3: .*user is there twice"),
        ("[ssh://h/]\n[ssh://h/]\n", "line 2: .*is there twice"),
        ("[ssh://h/]\npassword = top-secret\n", "password is not known there; known are user, key, known_hosts"),
        ("[iscsi://h/]\npassword_file = x\n", "needs user, too"),
        ("[ssh://h/]\nuser =\n", "user needs a value"),
        ("[gopher://h/]\n", "is no beginning of a URL"),
        ("[images]\n", "is no beginning of a URL"),
        ("[ftp://me:top-secret@h/]\n", r"\[ftp://h/\]: write no user there"),
    ],
)
def test_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(text, "/")
    assert "top-secret" not in str(caught.value)


def refused(file: Path, folder: Path, message: str) -> None:
    """As a mount and as a command are told."""
    (folder / "mnt").mkdir(exist_ok=True)
    assert f"-o credentials={message}" in fvdfs("mount", folder, folder / "mnt", "-o", f"credentials={file}").err
    assert f"--credentials {message}" in fvdfs("info", folder / "a.fvd", "--credentials", file).err


def test_files_that_others_may_read(tmp_path: Path) -> None:
    file, key = tmp_path / "credentials", tmp_path / "key"
    file.write_text("[ssh://h/]\nkey = key\n")
    refused(file, tmp_path, f"{key}: No such file")
    key.write_text("x")
    key.chmod(0o644)
    refused(file, tmp_path, f"{key}: others than its owner may read it: chmod 600")
    key.chmod(0o600)
    file.chmod(0o622)
    refused(file, tmp_path, f"{file}: others than its owner may write it")
    file.chmod(0o600)
    key.unlink()
    os.mkfifo(key, 0o600)
    refused(file, tmp_path, f"{key}: is no regular file")
    key.unlink()
    key.write_bytes(b"secret \r\n")
    key.chmod(0o600)
    assert read_credentials(str(file)).of("ssh://h/a").get("key") == str(key)
    assert secret_in(str(key)) == b"secret "


def test_another_user_than_that_of_the_credentials() -> None:
    found = parse(FILE, "/")
    assert section_of(parse_location("ssh://images@host/a"), found).get("key") == "/id"
    with pytest.raises(Refused, match="are those of images, and not of root"):
        section_of(parse_location("ssh://root@host/a"), found)


def test_what_ceph_and_iscsi_are_told(tmp_path: Path) -> None:
    (tmp_path / "keyring").write_text('[client.fvdfs]\n\tkey = QUJD\n\tcaps mon = "allow r"\n')
    (tmp_path / "chap").write_text("top-secret\n")
    (tmp_path / "credentials").write_text(
        "[rbd:pool/]\nuser = fvdfs\nkeyring = keyring\nconf = conf\n"
        "[iscsi://h/]\nuser = me\npassword_file = chap\ninitiator = iqn.a\n"
    )
    (tmp_path / "conf").touch()
    for path in tmp_path.iterdir():
        path.chmod(0o600)
    file = str(tmp_path / "credentials")
    backing = Node("raw", parse_location("iscsi://h/target/1"))
    node, lent = lend(Node("qcow2", parse_location("rbd:pool/a"), backing=backing), file)
    try:
        protocol = node.location.protocol
        assert (protocol["user"], protocol["conf"]) == ("fvdfs", str(tmp_path / "conf"))
        assert [protocol["key-secret"], lent.objects[0]["format"]] == ["lent0", "base64"]
        assert node.backing is not None
        protocol = node.backing.location.protocol
        assert protocol | {"user": "me", "password-secret": "lent1", "initiator-name": "iqn.a"} == protocol
        assert [os.pread(fd, 99, 0) for fd in lent.descriptors] == [b"QUJD", b"top-secret"]
        assert "top-secret" not in str(lent.objects)
    finally:
        lent.close()
    assert key_of_keyring("[client.a]\nkey = x\n", "b") == ""


def test_the_key_that_a_host_shows() -> None:
    lines = ["# Host h found: line 1", "h ssh-rsa AAA=", "h ecdsa-sha2-nistp256 BBB=", "|1|x|y ssh-ed25519 CCC="]
    assert host_key("\n".join([*lines, "@revoked h ssh-ed25519 D"])) == "CCC="
    assert host_key("h ssh-rsa AAA=") == "AAA="
    assert host_key("") == ""


@pytest.mark.parametrize(
    "name",
    [
        "https://me:top-secret@h/a",
        "iscsi://me%top-secret@h/iqn.a:b/1",
        'json:{"driver":"https","url":"https://me:top-secret@h/a"}',
        'json:{"driver":"https","url":"https://h/a","password":"top-secret"}',
        "rbd:pool/a:id=me:key=top-secret==",
    ],
)
def test_a_password_in_a_name_is_not_shown(folder: Path, name: str) -> None:
    done = fvdfs("create", folder / "vm.fvd", "--base", name, "--base-format", "raw")
    assert done.code
    assert "top-secret" not in done.err
    assert "top-secret" not in without_passwords(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="a LUKS image is made by qemu-img, which is tested as root")
def test_two_passphrases(folder: Path) -> None:
    """Each image has that of its path."""
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / f"key-{name}").write_text(f"secret {name}\n")
        (folder / f"plain-{name}").write_text(f"secret {name}")
        luks = ["-f", "luks", "--object", f"secret,id=s,file={folder}/plain-{name}", "-o", "key-secret=s,iter-time=10"]
        subprocess.run(["qemu-img", "create", "-q", *luks, folder / name / "base", "1M"], check=True)
    (folder / "credentials").write_text("".join(f"[{folder}/{n}/]\npassphrase_file = key-{n}\n" for n in "ab"))
    for path in folder.glob("key-*"):
        path.chmod(0o600)
    for name in ("a", "b"):
        base = ("--base", f"{name}/base", "--base-format", "luks")
        must("create", folder / f"{name}.fvd", *base, "--credentials", folder / "credentials")
    done = fvdfs("create", folder / "c.fvd", "--base", "a/base", "--base-format", "luks")
    assert "name the file with its passphrase" in done.err
