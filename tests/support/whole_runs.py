"""Whole runs of reinforcement learning in the calling process (or rank), on a tiny model: the real
loop, task, engine, policy, files and checkpoints, with something done to them on the way.
"""

from __future__ import annotations

import os
import re
import signal
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

from megatron_rl.records import Prompt
from tests.support.layouts import policy_of
from tests.support.tiny import EOS, cpu_device, random_prompts, tiny_config

#: What answers say: right, well formed, and neither, by a number of their tokens.
TEXTS = ("1 + 2", "2 - 1", "I do not know")


def say(ids: Sequence[int]) -> str:
    """Token ids as an answer to `problems`, in the place of a tokenizer."""
    return TEXTS[zlib.crc32(repr(list(ids)).encode()) % len(TEXTS)]


def problems(lengths: Sequence[int], first_index: int = 0) -> list[Prompt]:
    """Random tokens that ask to make 3 of 1 and 2."""
    record = {"numbers": [1, 2], "target": 3}
    return [replace(prompt, record=record) for prompt in random_prompts(lengths, first_index)]


def run_config(run_dir: Path, **overrides: Mapping):
    """Four steps, of which the second and the last are evaluated.

    Batches of 4 answers: evaluation 1 (greedy), 2, 3 (sampled); step one: 4; step two: 5,
    evaluation 6, 7, 8; step three: 9; step four: 10, evaluation 11, 12, 13.
    """
    sections = {
        "rollout": {
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "max_new_tokens": 24,
            "max_batch": 4,
        },
        "train": {"steps": 4},
        "evaluate": {"every": 2, "samples": 2},
        "checkpoint": {"every": 4, "keep": 9},
        "algorithm": {"name": "rspo", "mini_batches": 1},
        "data": {"eval": "held_out.jsonl", "pack_tokens": 64, "pack_multiple": 8},
        "observe": {"tensorboard": False, "console": "plain"},
        "optimizer": {"lr": 1e-3},
    }
    for name, section in overrides.items():
        sections[name] = {**sections.get(name, {}), **section}
    return tiny_config(run_dir=run_dir, seed=3, **sections)


def run_here(config, at_batch: Mapping[int, Callable[[], None]] = {}) -> tuple[bool, int]:
    """Start the run, or go on with it.

    Args:
        config: of `run_config`.
        at_batch: batch of answers, counted from 1 -> what is done before it is decoded.

    Returns:
        Whether the run is complete, and how many tokens a row were decoded in its last batch.
    """
    device = cpu_device()
    import torch.distributed as dist

    from megatron_rl.device.launch import Launch
    from megatron_rl.observe.console import Console, SilentConsole
    from megatron_rl.observe.timers import Timers
    from megatron_rl.parallel.stop_request import StopRequest
    from megatron_rl.rollout.builtin.generate import BuiltinEngine
    from megatron_rl.run.continuation import run_identity
    from megatron_rl.run.loop import run_loop
    from megatron_rl.run.session import Session
    from megatron_rl.tasks.build import build_engine
    from megatron_rl.tasks.reinforce import Reinforce

    rank, size = dist.get_rank(), dist.get_world_size()
    seen = {"batches": 0, "tokens": 0}
    run_batch, decode = BuiltinEngine._run, BuiltinEngine._decode

    def watched_batch(self, *args):
        seen["batches"] += 1
        seen["tokens"] = 0
        at_batch.get(seen["batches"], lambda: None)()
        return run_batch(self, *args)

    def watched_decode(self, *args):
        seen["tokens"] += 1
        return decode(self, *args)

    tokenizer = mock.Mock(eos_id=EOS, decode=say, piece=str)
    with (
        policy_of(config) as policy,
        mock.patch.object(BuiltinEngine, "_run", watched_batch),
        mock.patch.object(BuiltinEngine, "_decode", watched_decode),
    ):
        console = Console("plain", "train", 4) if rank == 0 else SilentConsole()
        launch = Launch(rank, size, rank, size, launched=size > 1)
        rest = (tokenizer, {EOS: "tokenizer"}, console, Timers(), StopRequest())
        session = Session(config, launch, device, policy.groups, *rest)
        engine = build_engine(session, policy.chunks, policy.capture)
        prompts, held_out = problems([5, 9, 3, 7, 6]), problems([4, 8, 6, 5], first_index=50)
        identity = run_identity(config, "train", prompts, held_out)
        complete = run_loop(
            session, policy, lambda: Reinforce(session, policy, engine, prompts, held_out, identity)
        )
    return complete, seen["tokens"]


def terminate() -> None:
    """SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def checkpoints(run_dir: Path) -> list[str]:
    """Names of the complete ones."""
    found = [path.parent.name for path in run_dir.glob("checkpoints/*/manifest.json")]
    return sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))
