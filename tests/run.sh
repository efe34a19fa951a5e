#!/usr/bin/env bash
# Check everything from nothing: environment, ruff, mypy, pytest.
#
#   bash tests/run.sh [--python X] [--slow | --conversion | --fuzz | --servers | --browser] [pytest arguments]
#   bash tests/run.sh --gpu [--python X] [pytest arguments]
#
# Without --python: .venv, made with $PYTHON, python3.11 or python3 (3.10 or newer) if it is missing.
# With --python X (a command, a path, or a version such as 3.12): .venv-<version> of that interpreter.
# --slow, --conversion, --fuzz, --servers and --browser run only the tests that the default leaves out: all layouts and variants,
# nodes, hosts and Slurm, and properties (Hypothesis) with many examples; all Hugging Face families under all layouts;
# 10,000 hostile inputs of each kind (tools/fuzz); RSPO with vLLM servers, whose environment is .venv-vllm; the pages of
# reports and studies in a Chromium or Chrome of the machine. --gpu runs the tests on CUDA devices with the packages of an existing
# interpreter (--python, $PYTHON or python3), because torch, megatron-core and Transformer Engine are the machine's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "tests/run.sh: $*" >&2; exit 2; }

venv=.venv
python=
only=
while [ $# -gt 0 ]; do
    case "$1" in
    --python)
        [ $# -ge 2 ] || fail "--python needs an interpreter, such as 3.12"
        python=$2
        shift
        ;;
    --python=*) python=${1#--python=} ;;
    --slow | --conversion | --fuzz | --servers | --browser | --gpu)
        [ -z "$only" ] || fail "--$only and $1; expected one of them"
        only=${1#--}
        ;;
    *) break ;;
    esac
    shift
done

if [ -n "$python" ]; then
    case "$python" in [0-9]*) python=python$python ;; esac
    # A shim of pyenv runs only the versions that are switched on: ask pyenv for the interpreter itself.
    if ! "$python" -c '' 2>/dev/null &&
        found=$(PYENV_VERSION=${python#python} pyenv which "$python" 2>/dev/null); then
        python=$found
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python is no Python"
    export PYTHON=$python
    venv=.venv-$version
fi

if [ "$only" = gpu ]; then
    exec "${PYTHON:-python3}" -m pytest -m gpu tests/gpu "$@"
fi
if [ "$only" = servers ] && [ -z "${MEGATRON_RL_VLLM_PYTHON:-}" ]; then
    bash tools/setup_vllm_venv.sh .venv-vllm
    export MEGATRON_RL_VLLM_PYTHON=$PWD/.venv-vllm/bin/python
fi
if [ "$only" = browser ] &&
    ! command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then
    fail "--browser needs Chromium or Chrome; install it, on Debian: apt-get install chromium"
fi
bash tools/setup_venv.sh "$venv" test

# One thread a process: the distributed tests start several, and more threads than cores only wait.
export OMP_NUM_THREADS=1
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check --quiet .
# The package, as pyproject.toml says, beside the tests: most of a minute the first time, seconds from .mypy_cache.
types=$(mktemp)
trap 'kill "$mypy" 2>/dev/null || :; rm -f "$types"' EXIT
"$venv/bin/mypy" >"$types" 2>&1 &
mypy=$!
# Tests side by side (-n 0: one after the other, in this process), with one worker more than cores, since some tests
# wait; those that start vLLM have the machine for themselves. OMP_NUM_THREADS would be taken for the number of cores.
workers=$(($(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) + 1))
[ "$workers" -le 8 ] || workers=8
[ "$only" != servers ] || workers=0
chosen=(${only:+-m "$only"})
[ "$only" != slow ] || chosen=(-m "slow or hypothesis" --hypothesis-profile many)
status=0
"$venv/bin/python" -m pytest -n "$workers" --dist loadfile ${chosen[@]+"${chosen[@]}"} "$@" || status=$?
if wait "$mypy"; then
    echo "mypy: $(tail -n 1 "$types")"
else
    cat "$types" >&2
    echo "tests/run.sh: mypy has found errors" >&2
    [ "$status" -ne 0 ] || status=1
fi
exit "$status"
