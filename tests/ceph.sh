#!/bin/sh
# Install Ceph (Debian 12; 350 MB), and run the tests that need it: a cluster of a monitor and an OSD in a temporary
# folder, on loopback. Nothing of it runs or is left at the end. Takes five to eight minutes. Arguments go to pytest.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here"
venv=${FVDFS_VENV:-$here/.venv}
EXTRAS="[test]" sh examples/install.sh "$venv" ceph-common ceph-mon ceph-osd fuse3 gcc openssl qemu-block-extra \
    qemu-system-common qemu-utils
PATH=$venv/bin:$PATH
run=$(mktemp -d -t pytest-of-XXXXXX)
FVDFS_CEPH=1 python -m pytest --basetemp "$run/tests" tests/servers/test_ceph.py tests/servers/test_cells.py -k ceph "$@"
rm -rf --one-file-system "$run"
