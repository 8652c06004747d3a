#!/bin/sh
# Install what fvdfs needs on Debian 12, and fvdfs itself into a virtual environment.
# usage: sh examples/install.sh VENV [extra Debian packages ...]; EXTRAS="[test]" adds the package's extras.
set -eu
venv=$1; shift
here=$(cd "$(dirname "$0")/.." && pwd)

sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
missing=
for package in fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "Installing$missing"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
python=/usr/bin/python3
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$here${EXTRAS:-}"
