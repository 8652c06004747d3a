#!/bin/sh
# Measure branch coverage: of all of fvdfs, then of its pure core alone, whose goal is 100 %. Arguments go to pytest.
# What a killed process has covered is lost.
#
#     sh tests/coverage.sh                      all tests (root, 30 minutes)
#     sh tests/coverage.sh -m "not programs"    those that start no program, which suffice for the core
set -eu
cd "$(dirname "$0")/.."
python -m pytest -n auto --dist loadscope --no-loadscope-reorder --cov "$@"
core=$(cd tests && python -c 'import test_imports as t; print(*[t.MODULES[m] for m in sorted(t.PURE)], sep=",")')
echo "The pure core:"
exec python -m coverage report --include="$core"
