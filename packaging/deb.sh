#!/bin/sh
# Build the Debian package from this tree, which is left alone, lint it, and, as root, try it. usage: packaging/deb.sh FOLDER
# FOLDER gets fvdfs_VERSION_ARCHITECTURE.deb. Needs Debian 12: debhelper, libfuse3-dev, pkg-config, python3-dev,
# python3-pip, python3-setuptools, lintian, and an index of Python packages (or PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
end() {
    for each in root/tmp/try/disks root/dev root/proc root kept; do
        mountpoint -q "$work/$each" && umount "$work/$each"
    done
    rm -rf --one-file-system "$work"
}
trap end EXIT
trap 'exit 130' INT TERM HUP
mkdir "$work/fvdfs"
(cd "$here" && tar -cf - --exclude=./.git --exclude='./.venv*' --exclude='./.*_cache' --exclude=./.hypothesis \
    --exclude=__pycache__ --exclude='*.egg-info' --exclude=./build .) | tar -xf - -C "$work/fvdfs"
cd "$work/fvdfs"
if [ -n "${DEBEMAIL:-}" ]; then  # who builds it is its maintainer; the project has no address
    sed -i "s/^Maintainer: .*/Maintainer: ${DEBFULLNAME:-$DEBEMAIL} <$DEBEMAIL>/" debian/control
fi
dpkg-buildpackage -us -uc -b
lintian --allow-root --fail-on error,warning --suppress-tags bad-distribution-in-changes-file "$work"/*.changes
package=$(echo "$work"/fvdfs_*_*.deb)
cp "$package" "$out"

# Installed, used and purged in a copy of this system: what changes there is kept in memory, and forgotten.
if [ "$(id -u)" != 0 ]; then
    echo "built $out/${package##*/}; only root can try it"
    exit
fi
mkdir "$work/kept" "$work/root"
mount -t tmpfs none "$work/kept"
mkdir "$work/kept/upper" "$work/kept/work"
mount -t overlay -o "lowerdir=/,upperdir=$work/kept/upper,workdir=$work/kept/work" none "$work/root"
mount -t proc none "$work/root/proc"
mount --bind /dev "$work/root/dev"
cp "$package" "$work/root/tmp/fvdfs.deb"
chroot "$work/root" /bin/sh -eux <<'EOF'
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
unset PYTHONPATH VIRTUAL_ENV
dpkg -i /tmp/fvdfs.deb
fvdfs --version
dpkg -L fvdfs | grep -q '/man1/fvdfs-create.1.gz$'
test -e /usr/share/bash-completion/completions/fvdfs
mkdir -p /tmp/try/images /tmp/try/disks
cd /tmp/try
fvdfs create images/vm.fvd 1M
mount -t fuse.fvdfs /tmp/try/images /tmp/try/disks
dd if=/etc/services of=disks/vm.raw bs=4096 count=1 conv=notrunc
fvdfs status disks
fvdfs map disks/vm.raw --html map.html
fvdfs umount disks
fvdfs check images/vm.fvd
dpkg --purge fvdfs
test ! -e /usr/lib/fvdfs
EOF
echo "built $out/${package##*/}"
