#!/usr/bin/env bash
# Check everything from nothing: environment, ruff, pytest.
#
#   bash tests/run.sh [--python X] [pytest arguments]
#
# Without --python: .venv, made with $PYTHON, python3.11 or python3 (3.10 or newer) if it is not there.
# With --python X (a command, a path, or a version such as 3.12): .venv-<version> of that interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
case "${1:-}" in
--python | --python=*)
    if [ "$1" = --python ]; then
        [ $# -ge 2 ] || { echo "tests/run.sh: --python needs an interpreter, such as 3.12" >&2; exit 2; }
        python=$2
        shift 2
    else
        python=${1#--python=}
        shift
    fi
    case "$python" in [0-9]*) python=python$python ;; esac
    # A shim of pyenv runs only the versions that are switched on: ask pyenv for the interpreter itself.
    if ! "$python" -c '' 2>/dev/null &&
        found=$(PYENV_VERSION=${python#python} pyenv which "$python" 2>/dev/null); then
        python=$found
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        { echo "tests/run.sh: $python is no Python" >&2; exit 2; }
    export PYTHON=$python
    venv=.venv-$version
    ;;
esac

bash tools/setup_venv.sh "$venv" test

# One thread a process: the distributed tests start several, and more threads than cores only wait.
export OMP_NUM_THREADS=1
"$venv/bin/ruff" check .
exec "$venv/bin/python" -m pytest "$@"
