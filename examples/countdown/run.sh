#!/usr/bin/env bash
# Countdown on a CPU, from nothing: environment, data, supervised warm-up, RSPO, report.
#
#   bash examples/countdown/run.sh [--fresh] [--section.key value ...]
#
# A second run continues where it stopped, or reports that it is done. --fresh removes the runs first. All other
# arguments go to the RSPO run, for example --train.steps 120 or --algorithm.name grpo --run_dir runs/countdown/grpo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/countdown

if [ "${1:-}" = --fresh ]; then
    shift
    rm -rf runs/countdown
fi

bash tools/setup_venv.sh .venv
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -f $here/data/train.jsonl ]; then
    echo "== making the problems"
    python tools/data/make_countdown.py --out $here/data \
        --sft 30000 --train 20000 --eval 512 --numbers 3 --max-number 50 --ops='+-'
fi
if [ ! -f $here/data/tokenizer.model ]; then
    echo "== training the tokenizer"
    python tools/data/train_tokenizer.py $here/data/sft.jsonl $here/data/train.jsonl \
        --kind char --vocab-size 64 --out $here/data/tokenizer.model
fi

launch() { torchrun --standalone --nproc-per-node 2 -m megatron_rl "$@"; }

echo "== supervised warm-up"
launch sft $here/sft.yaml
echo "== RSPO"
launch train $here/rspo.yaml "$@"
