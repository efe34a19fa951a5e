"""Measures score and update of a step with and without shared prompts, in turns.

    python tools/bench/shared_prompts.py [--shapes 10+24,256+64] [--pairs 5]

One CPU process with one thread. A step packs 16 groups of 8 answers in two mini-batches, scores
them all, and takes two RSPO updates. Half of the answers have three quarters of the length. The
seconds are of processor time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "ffn_hidden_size": 256,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 128,
    "vocab_size": 512,
    "max_sequence_length": 1024,
}
GROUPS, ANSWERS, MINI_BATCHES = 16, 8, 2


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="10+24,256+64", help="prompt+answer tokens")
    parser.add_argument("--pairs", type=int, default=5, help="steps of each kind")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'tokens':>8} {'rows off':>9} {'rows on':>8} {'off s':>7} {'on s':>7}   off / on")
    for shape in arguments.shapes.split(","):
        prompt, answer = map(int, shape.split("+"))
        _measure(shape, prompt, answer, arguments.pairs)


def _measure(shape: str, prompt: int, answer: int, pairs: int) -> None:
    from tests.support.layouts import policy_of

    config = _config("off", GROUPS // MINI_BATCHES * ANSWERS * (prompt + answer))
    with policy_of(config) as policy:
        samples = _samples(prompt, answer)
        times: dict[str, list[float]] = {"off": [], "on": []}
        rows = {}
        for number in range(pairs + 1):
            for share in ("off", "on") if number % 2 else ("on", "off"):
                seconds, rows[share] = _step(policy, samples, share)
                times[share].append(seconds)
    off, on = (statistics.median(times[share][1:]) for share in ("off", "on"))
    print(
        f"{shape:>8} {rows['off']:9} {rows['on']:8} {off:7.2f} {on:7.2f}   {off / on:.2f}",
        flush=True,
    )


def _config(share: str, pack_tokens: int) -> Any:
    from megatron_rl.config.schema import Config

    return Config(
        model=MODEL,
        device={"kind": "cpu", "threads": 1},
        data={"pack_tokens": min(pack_tokens, 8192), "share_prompts": share},
        algorithm={"name": "rspo", "mini_batches": MINI_BATCHES},
        optimizer={"lr": 1e-5},
    )


def _samples(prompt: int, answer: int) -> list[Any]:
    """Groups of answers of the given length and half of it, in turns."""
    from megatron_rl.records import Sample

    rng, samples = np.random.default_rng(3), []
    for _ in range(GROUPS):
        question = rng.integers(0, 512, prompt)
        for number in range(ANSWERS):
            length = answer if number % 2 == 0 else answer * 3 // 4
            logprobs = np.full(length, -6.0, dtype=np.float32)
            advantage = float(rng.normal())
            samples.append(Sample.of(question, rng.integers(0, 512, length), advantage, logprobs))
    return samples


def _step(policy: Any, samples: list[Any], share: str) -> tuple[float, int]:
    """Processor seconds of packing, scoring and updating, and the rows that the model ran on."""
    from megatron_rl.observe.metrics import MetricSums
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.policy.score import score
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    device, model = policy.device.torch_device, policy.config.model
    data = policy.config.data.model_copy(update={"share_prompts": share})
    config = policy.config.model_copy(update={"data": data})
    size = len(samples) // MINI_BATCHES
    slices = [samples[i : i + size] for i in range(0, len(samples), size)]
    start = time.process_time()
    mini_batches = pack_mini_batches(slices, config, policy.groups, device)
    count = len(mini_batches[0])
    flat = score(policy, sum(mini_batches, []), with_traces=True)
    sums = MetricSums(model.num_layers, device)
    telemetry = RouterTelemetry(model.num_layers, model.num_experts, device)
    for number in range(MINI_BATCHES):
        update(policy, flat[number * count : (number + 1) * count], sums, telemetry)
    seconds = time.process_time() - start
    return seconds, sum(len(pack.row) for packs in mini_batches for pack in packs)


if __name__ == "__main__":
    main()
