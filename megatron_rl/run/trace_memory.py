"""Checks before the first step that the router trace fits in memory."""

from __future__ import annotations

from typing import Sequence

from megatron_rl.config.estimate import (
    size_text,
    trace_bytes,
    trace_bytes_per_token,
    trace_text,
)
from megatron_rl.config.schema import Config
from megatron_rl.config.scores import takes_sampler_traces
from megatron_rl.device.memory import available_bytes
from megatron_rl.errors import UserError
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.records import Prompt
from megatron_rl.run.session import Session


def longest_sequence(config: Config, problems: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt with the longest answer or conversation."""
    if config.rollout.environment is not None and config.rollout.max_turns > 1:
        return config.model.max_sequence_length
    longest = max((len(problem.tokens) for problem in problems), default=1)
    return min(longest + config.rollout.max_new_tokens, config.model.max_sequence_length)


def trace_fact(config: Config, world_size: int, longest: int) -> str:
    """The size of the trace, for the run summary."""
    size = trace_bytes_per_token(config.model, config.algorithm.router_shift.distance)
    text = f"{size:,} bytes a token over all pipeline stages; " + trace_text(
        config, world_size, longest
    )
    if not takes_sampler_traces(config):
        return text
    size_of_sampler = size_text(sampler_bytes(config, world_size, longest))
    return f"{text}; the sampler's up to {size_of_sampler} of host memory"


def sampler_bytes(config: Config, world_size: int, longest: int) -> int:
    """The trace that the sampler gives for a rollout batch, in host memory of a rank: all tokens of
    its answers, which tensor- and context-parallel ranks do not share out.
    """
    parallel = config.parallel
    return trace_bytes(config, world_size, longest) * parallel.tensor * parallel.context


def check_trace_fits(session: Session, longest: int) -> None:
    """Refuse a run whose trace needs more than the free memory. A collective.

    Raises:
        UserError: the trace does not fit; on all ranks.
    """
    algorithm = session.config.algorithm

    def check() -> None:
        size = trace_bytes(session.config, session.launch.world_size, longest)
        pinned = algorithm.trace_store == "pinned"
        free = available_bytes(session.device, session.launch, host=pinned)
        if size > free:
            remedy = "lower rollout.prompts_per_step or rollout.samples_per_prompt"
            if session.device.kind == "cuda" and not pinned:
                remedy = f"set algorithm.trace_store pinned, or {remedy}"
            raise UserError(
                f"the router trace of a rollout batch takes up to {size_text(size)} on a rank; "
                f"{size_text(free)} are free; {remedy}"
            )
        if not takes_sampler_traces(session.config):
            return
        # the answers' and the packs'
        size = 2 * sampler_bytes(session.config, session.launch.world_size, longest)
        free = available_bytes(session.device, session.launch, host=True)
        if size > free:
            raise UserError(
                f"the sampler's router trace of a rollout batch takes up to {size_text(size)} of a "
                f"rank's host memory; {size_text(free)} are free; set rollout.scores pass"
            )

    collective_try(session.groups.world, check)
