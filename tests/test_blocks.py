"""What pages show can be run: each section's commands, on a machine as the page takes it for."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fvdfs import cli
from fvdfs.mountoptions import MOUNT_OPTIONS
from support.blocks import END, ROOT, Block, blocks, machine
from support.namespaces import in_mount_namespace

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
LANGUAGES = {"sh", "text", "json", "yaml", "ini", "xml", "Dockerfile", "python"}

NOT_RUN = {
    "sh examples/quickstart.sh": "installs packages; .ci/run runs it",
    "sh tests/run.sh": "installs packages, and runs this test",
    "python3 -m venv .venv": "installs packages, as tests/run.sh does",
    'python -m pytest -n auto -m "not programs and not slow"': "runs tests",
    "sh packaging/pythons.sh": "runs tests",
    'sh tests/coverage.sh -m "not programs"': "runs tests",
    "cd tests && pytest image/test_kill.py::test_nothing_that_was_flushed_is_lost": "runs tests",
    "cp examples/systemd/fvdfs@.service /etc/systemd/system/": "needs systemd: commands/test_systemd.py",
    "python3 -m venv /srv/fvdfs-new": "installs packages",
    ". VENV/share/bash-completion/completions/fvdfs                 # in ~/.bashrc": "a line for each of three shells",
    "docker run --rm -v /srv/disks:/disks:rslave debian:12 ls -l /disks": "needs Docker, and an image of a registry",
    "qemu-system-x86_64 … -device virtio-serial \\": "needs a guest with an agent: commands/test_freeze.py has one",
}
"""Blocks that are shown and not run, by their first line, and why."""
OTHERS = {
    "docs/migration.md": "two hosts: examples/migrate.sh, which test_examples.py runs, and commands/test_migrate.py",
    "docs/install.md": "installs packages: tests/run.sh does from source; packaging/deb.sh does Debian's",
    "docs/architecture.md": "shows no commands",
    "docs/format.md": "shows no commands",
}
"""Pages whose blocks are not run, and why."""

IMAGE = """
fvdfs create images/vm.fvd 1G --base template.raw --base-format raw
"""
MOUNTED = f"""
{IMAGE}
fvdfs mount images disks
"""
SNAPSHOTS = """
fvdfs create images/vm.fvd 64M --base template.raw --base-format raw
for day in mon tue wed; do
    fvdfs mount images disks
    echo "$day" | dd of=disks/vm.raw conv=notrunc status=none
    fvdfs umount disks
    fvdfs snapshot images/vm.fvd "$day"
done
"""
CRASHED = """
fvdfs create images/vm.fvd 64M --base template.raw --base-format raw
fvdfs mount images disks
exec 7<>disks/vm.raw
echo something >&7
sync -d disks/vm.raw
kill -9 "$(getfattr --only-values -n user.fvdfs.pid disks)"
exec 7<&-
"""
SSHD = """
mkdir -p /run/sshd
echo 'images:x:1234:1234::/tmp:/bin/sh' >>/etc/passwd
ssh-keygen -q -t ed25519 -N "" -f /run/host
/usr/sbin/sshd -f /dev/null -h /run/host -o ListenAddress=10.0.0.1 -o StrictModes=no -o UsePAM=no \\
    -o AuthorizedKeysFile=/etc/fvdfs/id_ed25519.pub -o 'Subsystem=sftp internal-sftp'
"""
NGINX = """
(cd /run && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key.pem \\
    -out ca-cert.pem -subj /CN=server -addext subjectAltName=IP:10.0.0.1 2>/dev/null)
cp /run/ca-cert.pem .
echo "reader:$(openssl passwd -apr1 open-sesame)" >/run/users
chmod 644 /srv/template.raw
cat >/run/nginx.conf <<END
user root; error_log /run/error.log; pid /run/nginx.pid;
events {}
http { access_log off; server {
    listen 10.0.0.1:443 ssl; ssl_certificate /run/ca-cert.pem; ssl_certificate_key /run/key.pem;
    location / { root /srv; auth_basic disks; auth_basic_user_file /run/users; }
} }
END
nginx -e /run/error.log -c /run/nginx.conf
"""
TGT = """
mkdir -p /run/tgtd /etc/tgt /etc/fvdfs
(umask 077 && echo top-secret-word | tee /etc/tgt/chap >/etc/fvdfs/chap)
tgtd --iscsi portal=10.0.0.1:3260
until tgtadm --lld iscsi --op show --mode sys >/dev/null 2>&1; do sleep 0.1; done
"""
GANESHA = """
mkdir -p /run/rpcbind /run/ganesha /etc/fvdfs /srv/share
cp --sparse=always /srv/template.raw /srv/share
chmod 600 /srv/share/template.raw
chown 1234:1234 /srv/share/template.raw
cat >/run/ganesha.conf <<END
NFS_CORE_PARAM { Enable_NLM = false; Enable_RQUOTA = false; }
NFSV4 { Graceless = true; RecoveryRoot = /run/ganesha; }
EXPORT { Export_Id = 1; Path = /srv/share; Pseudo = /share; Access_Type = RW; SecType = sys; FSAL { Name = VFS; } }
END
rpcbind
ganesha.nfsd -f /run/ganesha.conf -L /run/ganesha.log -p /run/ganesha.pid
until rpcinfo -p 10.0.0.1 | grep -q nfs; do sleep 0.1; done
"""
NBDKIT = """
kill "$(pgrep qemu-nbd)"  # of this machine, which has the port
mkdir -p /etc/pki/nbdkit /etc/fvdfs
(
    cd /etc/pki/nbdkit
    key() {
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=$1" \\
            -keyout "$1-key.pem" -out "$1-cert.pem" "${@:2}" 2>/dev/null
    }
    key ca
    by=(-extensions usr_cert -CA ca-cert.pem -CAkey ca-key.pem -addext)
    key server "${by[@]}" subjectAltName=IP:10.0.0.1
    key client "${by[@]}" extendedKeyUsage=clientAuth
)
cp -r /etc/pki/nbdkit /etc/fvdfs/tls
"""
PREPARED = {
    ("docs/storage-on-servers.md", "NBD with TLS"): NBDKIT,
    ("docs/storage-on-servers.md", "NFS"): GANESHA,
    ("docs/storage-on-servers.md", "iSCSI"): TGT,
    ("docs/storage-on-servers.md", "HTTPS"): NGINX,
    ("docs/storage-on-servers.md", "SSH"): SSHD,
    ("docs/operations.md", "After a crash"): CRASHED,
    ("docs/operations.md", "Dead mount"): CRASHED,
    ("docs/python.md", ""): IMAGE,
    ("docs/python.md", "With trio"): IMAGE,
    ("docs/operations.md", "Lost base"): IMAGE,
    ("docs/operations.md", "Lost or damaged header"): IMAGE,
    ("docs/guide.md", "From slow storage"): "RUNS=once",
    ("docs/guide.md", "A cache in front of a volume"): "volume slow 64M",
    ("docs/guide.md", "On a device"): "volume disk 1G",
    ("docs/guide.md", "QEMU and libvirt"): MOUNTED,
    ("docs/monitoring.md", "By eye"): MOUNTED,
    ("docs/guide.md", "Disks that programs make"): "truncate -s 1M other.raw",
    ("docs/guide.md", "Giving space back"): MOUNTED,
    ("docs/guide.md", "Larger disks"): MOUNTED,
    ("docs/guide.md", "Snapshots"): MOUNTED,
    ("docs/guide.md", "Back up what has changed"): SNAPSHOTS,
}
"""What is there before the first command of a section."""

SHOWN = [block for page in PAGES if str(page.relative_to(ROOT)) not in OTHERS for block in blocks(page)]
SECTIONS: dict[tuple[str, str], list[Block]] = {}
for block in SHOWN:
    if block.language in ("sh", "python") and block.first not in NOT_RUN:
        SECTIONS.setdefault((block.page, block.section), []).append(block)

needs_all = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("qemu-nbd", "qemu-system-x86_64", "ip", "script"))),
    reason="needs root, QEMU, ip and script",
)


def test_each_block_says_its_language() -> None:
    wrong = [f"{block.page}:{block.line}: {block.language}" for block in SHOWN if block.language not in LANGUAGES]
    assert wrong == []
    assert len(SECTIONS) > 10


def test_what_is_not_run_is_there() -> None:
    assert set(NOT_RUN) - {block.first for block in SHOWN} == set()


@pytest.mark.parametrize("shown", SHOWN, ids=lambda block: f"{block.page}:{block.line}")
def test_data_can_be_read(shown: Block) -> None:
    if shown.language == "json":
        for line in shown.text.splitlines():
            json.loads(line)
    elif shown.language == "yaml":
        assert list(yaml.safe_load_all(shown.text))


@needs_all
@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: ", ".join(section))
def test_what_a_section_shows_can_be_run(section: tuple[str, str], tmp_path: Path) -> None:
    script = machine(tmp_path, PREPARED.get(section, ""))
    script += "".join(command(block) for block in SECTIONS[section]) + END
    (tmp_path / "script").write_text(script)
    code, said = run(tmp_path)
    if "accurate CPU usage" in said:  # qemu-img times its key derivation, and gives up on a busy machine
        pytest.skip("the machine is too busy for qemu-img to make a LUKS file")
    assert code == 0, said


def command(shown: Block) -> str:
    """What bash runs."""
    if shown.language == "python":
        return f"{sys.executable} -P - <<'END OF PROGRAM'\n{shown.text}\nEND OF PROGRAM\n"
    return f"{shown.text}\n"


def run(folder: Path) -> tuple[int, str]:
    """Run the script in the folder, in namespaces of its own; its exit code, and what it says."""
    alone = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-e", f"{folder}/script"]
    with (folder / "said").open("w+") as said:  # a pipe would stay open with what goes on in the background
        done = subprocess.run(
            in_mount_namespace(*alone),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=200,
            check=False,
        )
    return done.returncode, (folder / "said").read_text()


# ---- commands that are named, and those that are not run: fvdfs knows them ----


def shown(page: Path) -> str:
    return "\n".join(block.text for block in blocks(page) if block.language in ("sh", ""))


INLINE = re.compile(r"`(fvdfs [a-z][^`]*)`")


def commands() -> list[tuple[str, str]]:
    """Each command of fvdfs that a page names, with the place."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for line in [
            *INLINE.findall(text),
            *re.findall(r"^(?:    )?(?:\w+[$#] )?(fvdfs [a-z].*)", shown(page), re.MULTILINE),
        ]:
            found.append((page.name, line))
    return found


def test_commands_that_pages_name_exist() -> None:
    parser = cli._parser()
    known = next(action.choices for action in parser._actions if action.dest == "command_name")
    assert isinstance(known, dict)
    wrong = []
    for page, line in commands():
        words = shlex.split(line.replace("…", "").rstrip("\\"), comments=True)
        command = known.get(words[1])
        options = [word.partition("=")[0] for word in words[2:] if re.match("--[a-z]", word)]
        if command is None or set(options) - {name for act in command._actions for name in act.option_strings}:
            wrong.append(f"{page}: {line}")
    assert wrong == []
    assert len(commands()) > 100


def test_options_of_mounts_that_pages_name_exist() -> None:
    """Those in `-o NAME=VALUE,NAME`; placeholders are in capitals."""
    named = {
        option.partition("=")[0]
        for page in PAGES
        for options in re.findall(r"`-o ([a-z][^`]*)`", page.read_text())
        for option in options.split(",")
    }
    assert named - MOUNT_OPTIONS.keys() == set()
    assert len(named) > 15
