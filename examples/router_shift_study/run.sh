#!/usr/bin/env bash
# The whole study, from nothing: environment, data, then one study file after another.
#
#   bash examples/router_shift_study/run.sh [--quick] [STUDY ...]
#
# STUDY is a name of the list below; without one all are run. --quick shows that everything works. A second run of the
# same command continues where the first stopped. The search of the regime is no part of it:
#   megatron-rl study examples/router_shift_study/search.yaml
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=examples/router_shift_study
trap 'exit 130' INT TERM

quick=()
if [ "${1:-}" = --quick ]; then
    quick=(--quick)
    shift
fi
if [ $# = 0 ]; then
    set -- sort_small countdown_small sort_deep countdown_deep mismatch
fi

bash tools/setup_venv.sh .venv
export OMP_NUM_THREADS=1
export PATH="$PWD/.venv/bin:$PATH"

if [ ! -f $here/data/countdown/train.jsonl ]; then
    python tools/data/make_countdown.py --out $here/data/countdown \
        --sft 8000 --train 8000 --eval 512 --numbers 3 --max-number 30 --ops='+-'
fi
if [ ! -f $here/data/sort/train.jsonl ]; then
    python tools/data/make_topological_sort.py --out $here/data/sort \
        --sft 20000 --train 8000 --eval 512 --items 6 --pairs 7
fi
if [ ! -f $here/data/tokenizer.model ]; then
    python tools/data/train_tokenizer.py $here/data/*/sft.jsonl --kind char --vocab-size 64 --out $here/data/tokenizer.model
fi

status=0
for study in "$@"; do
    echo "== $study"
    megatron-rl study "$here/$study.yaml" "${quick[@]}" || status=$?
done
exit $status
