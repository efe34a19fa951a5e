#!/usr/bin/env bash
# Make a virtual environment with megatron_rl installed in it, or leave one that is up to date alone.
#
#   tools/setup_venv.sh VENV [EXTRAS]        EXTRAS: comma-separated extras of setup.py, such as test or te,wandb
#
# Up to date means: installed from this copy of the repository, with these extras, since setup.py and the
# recorded torch version last changed (a stamp file in VENV records it). The interpreter of a new environment is
# $PYTHON, else python3.11, else python3; it must be 3.10 or newer. An installed torch is kept.
set -euo pipefail

TORCH=2.13.0

fail() { echo "setup_venv: $*" >&2; exit 2; }

[ $# -ge 1 ] && [ $# -le 2 ] || fail "usage: tools/setup_venv.sh VENV [EXTRAS]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$1
extras=${2:-}
stamp="$venv/.megatron_rl-${extras:-base}"
wanted="$root torch $TORCH setup.py $(sha256sum <"$root/setup.py")"

if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(<"$stamp")" = "$wanted" ]; then
    exit 0
fi

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

if [ ! -x "$venv/bin/python" ]; then
    python=${PYTHON:-}
    if [ -n "$python" ]; then
        usable "$python" || fail "PYTHON=$python is no Python 3.10 or newer"
    else
        for candidate in python3.11 python3; do
            if usable "$candidate"; then python=$candidate; break; fi
        done
        [ -n "$python" ] || fail "no Python 3.10 or newer found; install one or set PYTHON=/path/to/python"
    fi
    echo "setup_venv: creating $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv" || fail "$python -m venv failed; is its venv module installed?"
fi

pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
has() { "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1"; }

wanted_packages=(-e "$root${extras:+[$extras]}")
has torch || wanted_packages+=("torch==$TORCH")
echo "setup_venv: installing megatron_rl${extras:+[$extras]} into $venv" >&2
# For tests nothing is compiled ahead: Python compiles a module when it is first imported, and most modules of the
# libraries never are. (PIP_NO_COMPILE=1 would do the opposite: pip takes the 1 for "compile".)
ahead=(--compile)
case ",$extras," in *,test,*) ahead=(--no-compile) ;; esac
pip install "${ahead[@]}" "${wanted_packages[@]}" || fail "pip could not install ${wanted_packages[*]}"
printf '%s\n' "$wanted" >"$stamp"
