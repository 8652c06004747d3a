#!/bin/sh
# The fast tests by every Python that fvdfs supports and this machine has, but the one of tests/run.sh: one that is in
# PATH, or one of pyenv's; before them, what was installed makes a disk, writes it and checks it. Each Python gets an
# environment beside that one, FVDFS_VENV-VERSION. EXTRAS="[unit]" installs less than "[test]", which suffices for the
# core and the stores. Arguments go to pytest.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
venv=${FVDFS_VENV:-$here/.venv}
own=$(/usr/bin/python3 -c 'import sys; print("3.%d" % sys.version_info[1])')
work=$(mktemp -d -t pytest-of-XXXXXX)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
for version in $(sed -n 's/^    Programming Language :: Python :: \(3\.[0-9]*\)$/\1/p' "$here/setup.cfg"); do
    [ "$version" = "$own" ] && continue
    python=
    for each in "/usr/bin/python$version" "/usr/local/bin/python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
        [ -x "$each" ] && python=$each
    done
    if [ -z "$python" ]; then
        echo "Python $version: not on this machine"
        continue
    fi
    programs=$venv-$version/bin
    [ -x "$programs/python" ] || "$python" -m venv "$venv-$version"
    "$programs/python" -m pip install --quiet --disable-pip-version-check "$here${EXTRAS:-[test]}"
    echo "Python $version:"
    "$programs/fvdfs" create "$work/$version.fvd" 1M
    "$programs/python" "$here/examples/python/patch.py" "$work/$version.fvd" 4096 "$here/LICENSE"
    "$programs/fvdfs" check "$work/$version.fvd"
    "$programs/python" -c 'import fvdfs.ops.mount'  # pyfuse3 was compiled for it
    (cd "$here" && "$programs/python" -m pytest -q -p no:cacheprovider -n "$(nproc)" --basetemp "$work/$version" \
        -m "not programs and not slow" "$@")
done
