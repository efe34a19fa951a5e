# What the scripts that make virtual environments share; read by `source`, after `set -euo pipefail`.
#
# new_venv VENV: create it if it has no interpreter yet. The interpreter is $PYTHON, else python3.11, else python3; it must be
# 3.10 or newer. fail WORDS: say them after the script's name and end with exit code 2.

fail() { echo "$(basename "$0" .sh): $*" >&2; exit 2; }

usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

new_venv() {
    local venv=$1 python=${PYTHON:-} candidate
    [ ! -x "$venv/bin/python" ] || return 0
    if [ -n "$python" ]; then
        usable_python "$python" || fail "PYTHON=$python is no Python 3.10 or newer"
    else
        for candidate in python3.11 python3; do
            if usable_python "$candidate"; then python=$candidate; break; fi
        done
        [ -n "$python" ] || fail "no Python 3.10 or newer found; install one or set PYTHON=/path/to/python"
    fi
    echo "$(basename "$0" .sh): creating $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv" || fail "$python -m venv failed; is its venv module installed?"
}
