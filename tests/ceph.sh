#!/bin/sh
# Install Ceph from Debian's packages (350 MB), and run what needs it, after tests/run.sh: a cluster of a monitor and an
# OSD in a temporary folder, on loopback. Nothing of it runs or is left at the end. Takes some minutes. Arguments go to
# pytest.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
if ! command -v ceph-mon ceph-osd ceph rbd >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -q -o DPkg::Lock::Timeout=300 update
    apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends ceph-mon ceph-osd ceph-common qemu-block-extra
fi
PATH=${FVDFS_VENV:-$here/.venv}/bin:$PATH
run=$(mktemp -d -t pytest-of-XXXXXX)
FVDFS_CEPH=1 python -m pytest --basetemp "$run/tests" tests/servers/test_ceph.py tests/servers/test_cells.py -k ceph "$@"
rm -rf --one-file-system "$run"
