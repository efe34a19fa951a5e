#!/usr/bin/env bash
# Make a virtual environment with TRL, or leave one that is complete alone.
#
#   tools/setup_trl_venv.sh VENV
#
# For tools/bench/rl_step.py, which compares with TRL as its users have it: in an environment of its own, without
# megatron_rl. The interpreter is $PYTHON, else python3.11, else python3. It takes a minute or two.
set -euo pipefail

TORCH=2.13.0
TRL=1.16.0

fail() { echo "setup_trl_venv: $*" >&2; exit 2; }

[ $# -eq 1 ] || fail "usage: tools/setup_trl_venv.sh VENV"
venv=$1
stamp="$venv/.trl-$TRL-torch-$TORCH"
[ ! -f "$stamp" ] || exit 0

if [ ! -x "$venv/bin/python" ]; then
    for python in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if command -v "$python" >/dev/null && "$python" -c ''; then break; fi
    done
    "$python" -m venv "$venv" || fail "$python -m venv failed; is its venv module installed?"
fi

echo "setup_trl_venv: installing torch $TORCH and trl $TRL into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH" "trl==$TRL" ||
    fail "pip could not install torch==$TORCH and trl==$TRL"
touch "$stamp"
