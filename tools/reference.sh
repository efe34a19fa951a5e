#!/usr/bin/env bash
# Make the reference pages of the package from its docstrings, and check their links.
#
#   bash tools/reference.sh [FOLDER]        # default: ./reference; open FOLDER/index.html
#
# The environment is .venv, as tests/run.sh makes it, with the extra "docs" (pdoc, linkchecker).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:-reference}
bash tools/setup_venv.sh .venv docs
export OMP_NUM_THREADS=1
.venv/bin/python -m pdoc megatron_rl --output-directory "$folder"
.venv/bin/linkchecker --no-robots --ignore-url '^https?://' "$folder/index.html"
