#!/bin/sh
# Install what the tests need (Debian 12), then run ruff, mypy and all tests. Arguments go to pytest.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
venv=${FVDFS_VENV:-$here/.venv}
EXTRAS="[test]" sh examples/install.sh "$venv" \
    acl attr bindfs bsdutils busybox-static cpio curl debhelper e2fsprogs fio fish fuse3 genisoimage git groff-base \
    iproute2 kmod libvirt-clients libvirt-daemon linux-image-cloud-amd64 lintian mandoc mount nbd-server nbdkit \
    nfs-ganesha nfs-ganesha-vfs nginx-light openssh-client openssh-server openssl passwd procps qemu-block-extra \
    qemu-system-common qemu-system-x86 qemu-utils rpcbind rsync strace systemd tgt util-linux xfsprogs xz-utils zsh
PATH=$venv/bin:$PATH
ruff check .
ruff format --check .
mypy fvdfs tests
# A folder of our own: in pytest's, which all runs share, the dead mount of a run that was killed would fail this one.
run=$(mktemp -d -t pytest-of-XXXXXX)
# Half of the time tests wait, for disks, mounts and clocks: twice as many at a time as there are processors.
python -m pytest -n $((2 * $(nproc))) --dist loadscope --no-loadscope-reorder --basetemp "$run/tests" "$@"
rm -rf --one-file-system "$run"
