#!/bin/sh
# Build the Debian package from this tree, which is left alone, lint it, and try it unpacked. usage: packaging/deb.sh FOLDER
# FOLDER gets fvdfs_VERSION_ARCHITECTURE.deb. Needs Debian 12: debhelper, libfuse3-dev, pkg-config, python3-dev,
# python3-pip, python3-setuptools, lintian, and an index of Python packages (or PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
mkdir "$work/fvdfs"
(cd "$here" && tar -cf - --exclude=./.git --exclude='./.venv*' --exclude='./.*_cache' --exclude=./.hypothesis \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude=./build .) | tar -xf - -C "$work/fvdfs"
cd "$work/fvdfs"
dpkg-buildpackage -us -uc -b
lintian --allow-root --fail-on error,warning --suppress-tags bad-distribution-in-changes-file "$work"/*.changes
package=$(echo "$work"/fvdfs_*_*.deb)
cp "$package" "$out"

# The program runs from where it is unpacked, but for its folder of packages.
dpkg -x "$package" "$work/root"
sed -i "s|\"/usr/lib/fvdfs\"|\"$work/root/usr/lib/fvdfs\"|" "$work/root/usr/bin/fvdfs" "$work/root/sbin/mount.fvdfs"
mkdir "$work/images"
fvdfs() { "$work/root/usr/bin/fvdfs" "$@"; }
fvdfs --version
fvdfs create "$work/images/vm.fvd" 1M
fvdfs check "$work/images/vm.fvd"
echo "built $out/${package##*/}"
