"""Measures the cost of router shift: time of an rspo update over a gmpo update, and size of the
trace.

    python tools/bench/router_shift_cost.py [--device cpu|cuda] [--layouts PP1,PP2,TP2,EP2]

Starts the ranks of each layout itself (torchrun, one thread a CPU rank). In one run the same model,
packs and optimizer take turns: a pair is one update with each loss, and two pairs are a turn, rspo
first in one of them and gmpo in the other, so that neither order nor a machine that slows down
counts. rspo is gmpo with router shift (on unchanged routers the two are equal bit for bit), so the
ratio is the joint cost of comparing the routers, the relay, gamma and the routers' telemetry. Shown
are medians over the turns, with their 95% intervals. While a layout's interval holds 1.02 the
updates go on, up to four times as many pairs. Exit code 1 if a layout's median is above 1.02 or the
trace is above 1,920 bytes a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.config.estimate import trace_bytes_per_token  # noqa: E402
from megatron_rl.config.presets import MODEL_PRESETS  # noqa: E402
from megatron_rl.config.schema import ModelConfig  # noqa: E402

LAYOUTS = {
    "PP1": (1, {}),
    "PP2": (2, {"pipeline": 2}),
    "TP2": (2, {"tensor": 2}),
    "EP2": (2, {"expert": 2}),
}
#: On CPU ranks an update takes about a second; on a GPU it is a quarter of OLMoE-1B-7B.
MODELS = {
    "cpu": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "ffn_hidden_size": 512,
        "num_experts": 32,
        "moe_top_k": 4,
        "moe_ffn_hidden_size": 256,
        "dtype": "fp32",
    },
    "cuda": {**MODEL_PRESETS["olmoe_1b_7b"], "num_layers": 4},
}
PACK_TOKENS = {"cpu": 256, "cuda": 8192}
PACKS = 4  #: of a step, over all data-parallel ranks
SEQUENCES = 4  #: of a pack
WARM_UP = 2  #: pairs that are not counted
RESAMPLES = 2000  #: for the interval of a median
MOST_ROUNDS = 4  #: of updates, each of --pairs, while the interval holds MOST_TIME
SCORING = 2  #: pairs of updates for a pair of scoring passes
MOST_TIME = 1.02
#: Shape of the 30B-A3B model of the paper: L layers, K of E experts.
SHAPE = ModelConfig(**MODEL_PRESETS["qwen3_30b_a3b"])
MOST_BYTES = 1920
ROW = "{:7} {:27} {:>5} {:9} {:27} {:>8}"


def main() -> int:
    """Measure every layout in its own ranks; print one table."""
    arguments = _arguments()
    if arguments.out:
        _measure(arguments)
        return 0
    names = ("update: rspo / gmpo", "pairs", "CPU time", "scoring: trace / none", "gmpo")
    print(ROW.format("layout", *names))
    slow = False
    for name in arguments.layouts.split(","):
        result = _run_layout(name, arguments)
        update, cpu, scoring = (Cost.of(result[kind]) for kind in ("update", "update_cpu", "score"))
        busy = f"{cpu.median:.4f}" if arguments.device == "cpu" else "-"
        cells = (len(result["update"]), busy, str(scoring), f"{result['gmpo_s']:.2f} s")
        print(ROW.format(name, str(update), *cells))
        sys.stdout.flush()
        slow |= update.median > MOST_TIME
    size = trace_bytes_per_token(SHAPE)
    dense = SHAPE.num_layers * SHAPE.num_experts * 4
    print(
        "medians (95% intervals) of turns of two pairs "
        f"(scoring: {arguments.pairs // SCORING} pairs); load average {os.getloadavg()[0]:.1f}"
    )
    print(f"trace at L=48, K=8, E=128: {size:,} bytes a token; dense fp32 logits: {dense:,}")
    return 1 if slow or size > MOST_BYTES else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated")
    parser.add_argument(
        "--pairs", type=int, default=120, help="updates with each loss at first; whole turns"
    )
    parser.add_argument("--out", help=argparse.SUPPRESS)  # of a rank: where rank 0 writes
    arguments = parser.parse_args()
    unknown = set(arguments.layouts.split(",")) - set(LAYOUTS)
    if unknown:
        parser.error(
            f"unknown layouts {', '.join(sorted(unknown))}; known are {', '.join(LAYOUTS)}"
        )
    if arguments.pairs < 2 * SCORING or arguments.pairs % (2 * SCORING):
        parser.error(f"--pairs {arguments.pairs}: give a multiple of {2 * SCORING}: whole turns")
    return arguments


@dataclasses.dataclass(frozen=True)
class Cost:
    """Median of the turns' ratios, and its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Cost:
        """Of pairs (seconds with, seconds without), two after another a turn of either order; a
        turn's ratio is the geometric mean of its pairs'.
        """
        ratios = np.asarray([a / b for a, b in pairs]).reshape(-1, 2)
        turns = np.sqrt(ratios.prod(axis=1))
        drawn = np.random.default_rng(0).choice(turns, (RESAMPLES, len(turns)))
        low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
        return cls(float(np.median(turns)), float(low), float(high))

    @property
    def undecided(self) -> bool:
        """Whether the limit lies in the interval."""
        return self.low <= MOST_TIME <= self.high

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.low:.4f} .. {self.high:.4f})"


def _run_layout(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the layout's ranks and read what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        ranks = f"--nproc-per-node={LAYOUTS[name][0]}"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
        words = ["--layouts", name, "--device", arguments.device, "--pairs", str(arguments.pairs)]
        subprocess.run(
            [*launch, __file__, *words, "--out", str(out)],
            check=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        return json.loads(out.read_text(encoding="utf-8"))


def _config(parallel: dict[str, int], device: str, name: str) -> Any:
    from megatron_rl.config.schema import Config

    length = PACK_TOKENS[device]
    return Config(
        model={
            **MODELS[device],
            "vocab_size": 2048,
            "max_sequence_length": length // SEQUENCES,
        },
        parallel=parallel,
        device={"kind": device, **({"threads": 1} if device == "cpu" else {})},
        data={"pack_tokens": length, "pack_multiple": 8},
        algorithm={"name": name},
        optimizer={"lr": 1e-5},
    )


def _measure(arguments: argparse.Namespace) -> None:
    """On a rank: time the pairs of one layout."""
    from megatron_rl.device.launch import read_launch
    from megatron_rl.device.select import connect, select_device

    parallel = LAYOUTS[arguments.layouts][1]
    rspo, gmpo = (_config(parallel, arguments.device, name) for name in ("rspo", "gmpo"))
    launch = read_launch()
    device = select_device(rspo.device, launch)
    connect(device, launch, rspo.device.timeout_s)

    import torch.distributed as dist

    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.policy.policy import build_policy

    groups = build_groups(rspo.parallel)
    policy = build_policy(rspo, device, groups, optimizer_steps=1000)
    result = _times(policy, dataclasses.replace(policy, config=gmpo), arguments.pairs)
    if launch.rank == 0:
        Path(arguments.out).write_text(json.dumps(result), encoding="utf-8")
    destroy_groups()
    dist.destroy_process_group()


def _times(policy: Any, without: Any, pairs: int) -> dict[str, Any]:
    """Seconds of updates and of scoring passes, with and without router shift, in pairs."""
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.score import score
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    model, device = policy.config.model, policy.device.torch_device
    packs = _packs(policy)
    scored = score(policy, packs, with_traces=True)
    _check_trace(policy, scored)

    def step(which: Any) -> Callable[[], None]:
        def run() -> None:
            sums = MetricSums(model.num_layers, device)
            telemetry = RouterTelemetry(model.num_layers, model.num_experts, device)
            update(which, scored, sums, telemetry)

        return run

    def scoring(with_traces: bool) -> Callable[[], None]:
        return lambda: score(policy, packs, with_traces=with_traces)

    updates = until_decided(
        lambda: _pairs(step(policy), step(without), pairs, policy),
        lambda updates: _undecided(updates, device),
    )
    scores = _pairs(scoring(True), scoring(False), pairs // SCORING, policy)
    return {
        "update": _wall(updates),
        "update_cpu": [(a[1], b[1]) for a, b in updates],
        "score": _wall(scores),
        "gmpo_s": float(np.median([b[0] for _, b in updates])),
    }


def until_decided(measure: Callable[[], list[Any]], undecided: Callable[[list], bool]) -> list[Any]:
    """All that was measured, of one round or, while they leave it open, of up to MOST_ROUNDS."""
    found = measure()
    for _ in range(MOST_ROUNDS - 1):
        if not undecided(found):
            break
        found += measure()
    return found


def _wall(timed: list[Any]) -> list[tuple[float, float]]:
    return [(a[0], b[0]) for a, b in timed]


def _undecided(updates: list[Any], device: Any) -> bool:
    """Whether rank 0's wall times leave open on which side of the limit the layout is."""
    import torch
    import torch.distributed as dist

    answer = torch.tensor(float(Cost.of(_wall(updates)).undecided), device=device)
    dist.broadcast(answer, 0)
    return bool(answer)


def _pairs(
    with_shift: Callable, without: Callable, pairs: int, policy: Any
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """For each pair, with and without router shift: wall seconds, and CPU seconds of all ranks'
    main threads. The order in a pair alternates.
    """
    timed = []
    for number in range(WARM_UP + pairs):
        order = (with_shift, without) if number % 2 else (without, with_shift)
        times = {run: _timed(run, policy) for run in order}
        timed.append((times[with_shift], times[without]))
    return timed[WARM_UP:]


def _timed(run: Callable, policy: Any) -> tuple[float, float]:
    """Time from when all ranks are ready to when all are done."""
    import torch
    import torch.distributed as dist

    def wait_for_all() -> None:
        if policy.device.kind == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    wait_for_all()
    start, cpu = time.perf_counter(), time.thread_time()
    run()
    busy = torch.tensor(time.thread_time() - cpu, dtype=torch.float64)
    wait_for_all()
    wall = time.perf_counter() - start
    busy = busy.to(policy.device.torch_device)
    dist.all_reduce(busy)
    return wall, float(busy)


def _packs(policy: Any) -> list[Any]:
    """This data-parallel rank's share of the step's full packs."""
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.records import Sample

    data, groups = policy.config.data, policy.groups
    rng = np.random.default_rng(5)
    length = data.pack_tokens // SEQUENCES
    samples = [
        Sample.of(
            *np.split(rng.integers(0, policy.config.model.vocab_size, length), [8]),
            advantage=float(rng.normal()),
        )
        for _ in range(PACKS * SEQUENCES)
    ]
    mine = samples[groups.data.rank() :: groups.data.size()]
    (packs,) = pack_mini_batches([mine], policy.config, groups, policy.device.torch_device)
    return packs


def _check_trace(policy: Any, scored: list[Any]) -> None:
    """Check the traces' size against `trace_bytes_per_token`."""
    for item in scored:
        layers = [layer for chunk in item.traces for layer in chunk.values()]
        tokens = len(layers[0].logprobs)
        found = sum(layer.expert_ids.nbytes + layer.logprobs.nbytes for layer in layers)
        whole = trace_bytes_per_token(policy.config.model)
        expected = whole * len(layers) / policy.config.model.num_layers  # of this stage's layers
        assert found == tokens * expected, (found, tokens, expected)


if __name__ == "__main__":
    sys.exit(main())
