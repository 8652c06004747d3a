#!/bin/sh
# fvdfs in one minute: a disk that starts at once from a template, served as a raw file.
# Installs what is needed (Debian 12), then works in a temporary folder, which it removes.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
venv=${FVDFS_VENV:-$here/.venv}
sh "$here/examples/install.sh" "$venv" qemu-utils
PATH=$venv/bin:$PATH

work=$(mktemp -d)
clean_up() { fvdfs umount "$work/disks" 2>/dev/null || true; rm -rf "$work"; }
trap clean_up EXIT
mkdir "$work/images" "$work/disks"
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
cd "$work"

say "A template of 256 MiB, as a slow server would hold it"
run dd if=/dev/urandom of=images/template.raw bs=1M count=256 status=none

say "A disk of 1 GiB on top of it: made in no time, and almost empty"
run fvdfs create images/vm.fvd 1G --base template.raw --base-format raw
run du -h images/vm.fvd

say "Mounted, it is a flat raw file that anything can open"
run fvdfs mount images disks
run ls -lsh disks

say "QEMU writes to it and reads back; what it does not write comes from the template"
run qemu-io -f raw -c "write -P 0x42 10M 64k" -c "read -P 0x42 10M 64k" -c flush disks/vm.raw
run cmp -n 10485760 disks/vm.raw images/template.raw
echo "the first 10 MiB are the template's"

say "Unmounted, the image holds just what was written"
run fvdfs umount disks
run du -h images/vm.fvd
fvdfs info images/vm.fvd | head -7
