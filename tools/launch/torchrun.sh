#!/usr/bin/env bash
# Start a verb on all nodes: every node runs this same command, with its own NODE_RANK.
#
#   tools/launch/torchrun.sh VERB CONFIG [--section.key value ...]
#
# Settings, from the environment:
#   NODES=1             nodes of the run
#   NODE_RANK=0         which of them this is
#   RANKS_PER_NODE      processes here; default: one a GPU, or one where there is none
#   MASTER_ADDR         address of node 0 as the others see it; needed with several nodes
#   MASTER_PORT=29500   a port that is free there
#   NODE_ADDR           this node's address as the others see it; needed where its host name does not lead to it
#   JOB_ID=megatron_rl  other runs that meet at the same address and port need another
#   MAX_RESTARTS=0      times the ranks are started again after one has failed; they go on from the last checkpoint
#   SHUTDOWN_S=600      how long ranks may take for a last checkpoint after SIGTERM, SIGINT or SIGUSR1
#   PREFLIGHT=1         0: do not compare the nodes first (versions, configuration, shared run directory)
#   PREFLIGHT_S=30      how long nodes may wait for each other there
#   PREFLIGHT_PORT      another free port of node 0; default: MASTER_PORT + 1
#   LOGS                directory for the output of each rank, beside the terminal
#   PYTHON=python       interpreter of the environment that has megatron_rl
set -euo pipefail

fail() { echo "torchrun.sh: $*" >&2; exit 2; }

[ $# -ge 2 ] || fail "usage: tools/launch/torchrun.sh VERB CONFIG [--section.key value ...]"
nodes=${NODES:-1} node=${NODE_RANK:-0} python=${PYTHON:-python}
case "$nodes$node" in *[!0-9]*) fail "NODES is '$nodes' and NODE_RANK '$node'; expected numbers" ;; esac
[ "$node" -lt "$nodes" ] || fail "NODE_RANK is $node with NODES $nodes; expected 0 to $((nodes - 1))"
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    fail "MASTER_ADDR is not set with NODES $nodes; expected the address of node 0"
fi

# A missing or failing nvidia-smi is no error: there is no GPU then, and what it prints is no list of them.
ranks=${RANKS_PER_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | sed -n '/^GPU /p' | wc -l)}
[ "$ranks" -gt 0 ] || ranks=1

# What differs between the nodes is said before any rank starts, and a node that is missing after PREFLIGHT_S.
if [ "$nodes" -gt 1 ] && [ "${PREFLIGHT:-1}" = 1 ]; then
    case "$1" in train | sft | evaluate)
        "$python" -m megatron_rl preflight "${@:2}" --for "$1" --nodes "$nodes" --node "$node" \
            --ranks-per-node "$ranks" --within "${PREFLIGHT_S:-30}" \
            --meet "$MASTER_ADDR:${PREFLIGHT_PORT:-$((${MASTER_PORT:-29500} + 1))}"
        ;;
    esac
fi

words=(--nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}")
if [ "$nodes" -gt 1 ]; then
    is_host=$([ "$node" -eq 0 ] && echo true || echo false)
    words+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
    [ -z "${NODE_ADDR:-}" ] || words+=(--local-addr "$NODE_ADDR")
    words+=(--rdzv-id "${JOB_ID:-megatron_rl}" --rdzv-conf "is_host=$is_host")
else
    words+=(--standalone)
fi
if [ -n "${LOGS:-}" ]; then
    words+=(--log-dir "$LOGS/node_$node" --redirects 3 --tee 3)
fi
# torch waits 30 s by default and then kills: too short for a large checkpoint. Older ones cannot be told.
if "$python" -m torch.distributed.run --help | grep -q -e --shutdown-timeout; then
    words+=(--shutdown-timeout "${SHUTDOWN_S:-600}" --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/run_ranks.py" "${words[@]}" -m megatron_rl "$@"
