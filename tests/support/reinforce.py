"""A task of reinforcement learning on a tiny policy, without a run's directory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Callable, Sequence

from megatron_rl.records import Prompt
from tests.support.tiny import random_prompts


def problems(lengths: Sequence[int]) -> list[Prompt]:
    """Problems of the countdown task that random tokens do not solve."""
    record = {"numbers": [1, 2], "target": 3}
    return [Prompt(p.index, p.tokens, p.text, record) for p in random_prompts(lengths)]


def task_of(
    policy: Any,
    prompts: Sequence[Prompt],
    make_engine: Callable[[Any], Any],
    console: Any = None,
) -> tuple[Any, Any]:
    """(session, task) of a policy's configuration; ``make_engine`` gets the policy."""
    from megatron_rl.device.launch import read_launch
    from megatron_rl.observe.console import SilentConsole
    from megatron_rl.observe.timers import Timers
    from megatron_rl.parallel.stop_request import StopRequest
    from megatron_rl.run.continuation import run_identity
    from megatron_rl.run.session import Session
    from megatron_rl.tasks.reinforce import Reinforce

    session = Session(
        config=policy.config,
        launch=read_launch({}),
        device=policy.device,
        groups=policy.groups,
        tokenizer=SimpleNamespace(piece=str),  # the engine is given
        stop_tokens={},
        console=console or SilentConsole(),
        timers=Timers(),
        stop=StopRequest(),
    )
    identity = run_identity(policy.config, "train", prompts, [])
    return session, Reinforce(session, policy, make_engine(policy), prompts, [], identity)
