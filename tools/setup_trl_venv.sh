#!/usr/bin/env bash
# Make a virtual environment with TRL, or leave one that is complete alone.
#
#   tools/setup_trl_venv.sh VENV
#
# For tools/bench/rl_step.py, which compares with TRL as its users have it: in an environment of its own, without
# megatron_rl. It takes a minute or two.
set -euo pipefail

TORCH=2.13.0
TRL=1.16.0

source "$(dirname "${BASH_SOURCE[0]}")/new_venv.sh"
[ $# -eq 1 ] || fail "usage: tools/setup_trl_venv.sh VENV"
venv=$1
stamp="$venv/.trl-$TRL-torch-$TORCH"
[ ! -f "$stamp" ] || exit 0

new_venv "$venv"

echo "setup_trl_venv: installing torch $TORCH and trl $TRL into $venv" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH" "trl==$TRL" ||
    fail "pip could not install torch==$TORCH and trl==$TRL"
touch "$stamp"
