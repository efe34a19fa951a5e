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

source "$(dirname "${BASH_SOURCE[0]}")/new_venv.sh"
[ $# -ge 1 ] && [ $# -le 2 ] || fail "usage: tools/setup_venv.sh VENV [EXTRAS]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$1
extras=${2:-}
stamp="$venv/.megatron_rl-${extras:-base}"
wanted="$root torch $TORCH setup.py $(sha256sum <"$root/setup.py")"

if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$(<"$stamp")" = "$wanted" ]; then
    exit 0
fi

new_venv "$venv"

pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }
has() { "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec(sys.argv[1]))' "$1"; }

wanted_packages=(-e "$root${extras:+[$extras]}")
has torch || wanted_packages+=("torch==$TORCH")
echo "setup_venv: installing megatron_rl${extras:+[$extras]} into $venv" >&2
# Nothing is compiled ahead: Python compiles a module when it is first imported, and most modules of the libraries never
# are. (PIP_NO_COMPILE=1 would do the opposite: pip takes the 1 for "compile".)
pip install --no-compile "${wanted_packages[@]}" || fail "pip could not install ${wanted_packages[*]}"
printf '%s\n' "$wanted" >"$stamp"
