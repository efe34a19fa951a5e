#!/usr/bin/env bash
# Start a verb on all nodes: every node runs this same command, with its own NODE_RANK.
#
#   tools/launch/torchrun.sh VERB CONFIG [--section.key value ...]
#
# Settings, from the environment:
#   NODES=1             nodes of the run
#   NODE_RANK=0         number of this node; rank 0, which shows the run, is on node 0
#   RANKS_PER_NODE      processes on this node; default: one for each GPU, or one without GPUs
#   MASTER_ADDR         address of node 0 for the other nodes: name, IPv4 or IPv6; needed with several nodes
#   MASTER_PORT=29500   a free port of node 0
#   JOB_ID=megatron_rl  a name of the run: nodes of another run at the same address and port do not join it
#   MAX_RESTARTS=0      times this node restarts after its ranks failed; all nodes meet in the preflight and continue
#                       from the last checkpoint
#   SHUTDOWN_S=600      seconds that ranks have for a last checkpoint after SIGTERM, SIGINT or SIGUSR1
#   PREFLIGHT=1         0: do not compare the nodes first (versions, configuration, data, shared run directory)
#   PREFLIGHT_S=30      seconds that nodes wait for each other there; at least 900 after a restart
#   PREFLIGHT_PORT      another free port of node 0; default: MASTER_PORT + 1
#   LOGS                directory for the output of each rank, in addition to the terminal
#   PYTHON=python       interpreter of the environment that has megatron_rl
set -euo pipefail

fail() { echo "torchrun.sh: $*" >&2; exit 2; }

# number NAME VALUE LOWEST HIGHEST
number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || [ "$2" -lt "$3" ] || [ "$2" -gt "$4" ]; then
        fail "$1 is '$2'; expected a number from $3 to $4"
    fi
}

[ $# -ge 2 ] || fail "usage: tools/launch/torchrun.sh VERB CONFIG [--section.key value ...]"
nodes=${NODES:-1} node=${NODE_RANK:-0} python=${PYTHON:-python} restarts=${MAX_RESTARTS:-0}
port=${MASTER_PORT:-29500} preflight=${PREFLIGHT:-1} patience=${PREFLIGHT_S:-30} shutdown=${SHUTDOWN_S:-600}
number NODES "$nodes" 1 100000
number NODE_RANK "$node" 0 "$((nodes - 1))"
number MASTER_PORT "$port" 1 65535
number MAX_RESTARTS "$restarts" 0 1000000
number SHUTDOWN_S "$shutdown" 1 1000000
number PREFLIGHT "$preflight" 0 1
number PREFLIGHT_S "$patience" 1 1000000
number PREFLIGHT_PORT "${PREFLIGHT_PORT:-$((port + 1))}" 1 65535
command -v "$python" >/dev/null || fail "PYTHON is '$python', which is not there; expected an interpreter"

# An IPv6 address may have brackets.
address=${MASTER_ADDR:-}
[[ $address =~ ^\[([^][]+)\]$ ]] && address=${BASH_REMATCH[1]}
if [ "$nodes" -gt 1 ]; then
    [ -n "$address" ] || fail "MASTER_ADDR is not set with NODES $nodes; expected the address of node 0"
    # One colon stands before a port, no IPv6 address has less than two.
    if ! [[ $address =~ ^[A-Za-z0-9._%:-]+$ ]] || [[ $address =~ ^[^:]*:[^:]*$ ]]; then
        fail "MASTER_ADDR is '$address'; expected a host name or address alone; the port is MASTER_PORT"
    fi
fi

# A missing or failing nvidia-smi is no error: it means that there is no GPU, and its output is no list of GPUs.
ranks=${RANKS_PER_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | sed -n '/^GPU /p' | wc -l)}
[ -n "${RANKS_PER_NODE:-}" ] || [ "$ranks" -gt 0 ] || ranks=1
number RANKS_PER_NODE "$ranks" 1 100000

# Schedulers set these for their own ranks; torchrun reads PET_* as its options.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "${!PET_@}"

# The preflight reports differences between the nodes, and nodes missing after PREFLIGHT_S, before any rank starts.
case "$1" in train | sft | evaluate) ;; *) preflight=0 restarts=0 ;; esac
if [ "$nodes" -gt 1 ] && [ "$preflight" = 1 ]; then
    meet=$address
    [[ $address != *:* ]] || meet="[$address]"
    "$python" -m megatron_rl preflight "${@:2}" --for "$1" --nodes "$nodes" --node "$node" \
        --ranks-per-node "$ranks" --within "$patience" --meet "$meet:${PREFLIGHT_PORT:-$((port + 1))}" &
    asking=$! # beside this shell, which can hear signals meanwhile
    trap 'kill "$asking" 2>/dev/null || true; echo "torchrun.sh: stopped in the preflight" >&2; exit 75' TERM INT USR1
    wait "$asking"
    trap - TERM INT USR1
elif [ "$nodes" -gt 1 ] && [ "$restarts" -gt 0 ]; then
    fail "MAX_RESTARTS is $restarts with PREFLIGHT 0; expected PREFLIGHT 1: nodes that start again meet there"
fi

# Static: NODE_RANK numbers the ranks. torch's own rendezvous (c10d) would number nodes by their addresses.
arguments=(--nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 0)
if [ "$nodes" -gt 1 ]; then
    arguments+=(--rdzv-backend static --node-rank "$node" --master-addr "$address" --master-port "$port")
    arguments+=(--rdzv-id "${JOB_ID:-megatron_rl}")
    if [ "$node" -gt 0 ]; then
        echo "torchrun.sh: node $node of $nodes starts; rank 0, which shows the run, is on node 0 ($address)"
    fi
else
    arguments+=(--standalone)
fi
if [ -n "${LOGS:-}" ]; then
    arguments+=(--log-dir "$LOGS/node_$node" --redirects 3 --tee 3)
fi
# By default torch waits 30 s and then kills, too short for a large checkpoint. Older versions lack the option.
# (The help is read as a whole: grep -q would close the pipe early, which pipefail sometimes counts as a failure.)
if [[ $("$python" -m torch.distributed.run --help) == *--shutdown-timeout* ]]; then
    arguments+=(--shutdown-timeout "$shutdown" --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
fi

# For run_ranks.py, which runs this file again after a failure.
[ "$nodes" -eq 1 ] || export MASTER_ADDR=$address MASTER_PORT=$port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MAX_RESTARTS=$restarts
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/run_ranks.py" "${arguments[@]}" -m megatron_rl "$@"
