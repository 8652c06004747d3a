#!/bin/sh
# The fast tests by every Python that fvdfs supports and this machine has, but the one of tests/run.sh: one that is in PATH,
# or one of pyenv's. Each gets an environment beside it, FVDFS_VENV-VERSION. Arguments go to pytest.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
venv=${FVDFS_VENV:-$here/.venv}
own=$(/usr/bin/python3 -c 'import sys; print("3.%d" % sys.version_info[1])')
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
    [ -x "$venv-$version/bin/python" ] || "$python" -m venv "$venv-$version"
    "$venv-$version/bin/python" -m pip install --quiet --disable-pip-version-check "$here[test]"
    echo "Python $version:"
    (cd "$here" && "$venv-$version/bin/python" -m pytest -q -p no:cacheprovider -n "$(nproc)" -m "not programs and not slow" "$@")
done
