"""Evaluation on held-out problems: greedy pass@1 and sampled mean@k."""

from __future__ import annotations

from typing import Sequence

from megatron_rl.observe.metrics import MetricSums
from megatron_rl.policy.finite_checks import check_answers
from megatron_rl.records import Prompt
from megatron_rl.rollout.collect import ScoredGroup, part_sums
from megatron_rl.rollout.engine import Engine, SamplingSettings, sampling_settings
from megatron_rl.tasks.build import reward_workers
from megatron_rl.tasks.task_session import TaskSession

#: Separates the random numbers of evaluation from those of training; the same at every evaluation
#: of a run.
EVALUATION_SEED = 0x5EED


def evaluate(
    session: TaskSession, engine: Engine, prompts: Sequence[Prompt], sums: MetricSums
) -> list[ScoredGroup]:
    """Answer every problem once greedily and k times sampled. A collective.

    Args:
        session: the run.
        engine: generates the answers.
        prompts: all held-out problems; each data-parallel rank answers its share.
        sums: receives this rank's part of the metrics.

    Returns:
        This rank's greedy answers.

    Raises:
        Stopped: a signal asked the run to stop; nothing was added to ``sums``. On all ranks.
    """
    config = session.config
    data = session.groups.data
    mine = prompts[data.rank() :: data.size()]
    rewards = reward_workers(session)
    with session.timers("eval"):
        session.console.phase("evaluate, greedy")
        answers = engine.generate(mine, _settings(session, samples=1, greedy=True))
        greedy = rewards.score(answers)
        check_answers(greedy, session.groups.world, session.device.torch_device)
        sampled = None
        if config.evaluate.samples:
            session.console.phase("evaluate, sampled")
            settings = _settings(session, samples=config.evaluate.samples, greedy=False)
            sampled = rewards.score(engine.generate(mine, settings))
    # Only now: an interrupted evaluation adds nothing.
    parts = part_sums(greedy)
    _add_solved(sums, "eval/pass@1", parts)
    sums.add_parts("eval", parts)
    if sampled is not None:
        _add_solved(sums, "eval/mean@k", part_sums(sampled))
        sums.add("eval/samples", config.evaluate.samples)
    if session.counts_once:
        sums.add("eval/problems", len(mine))
    return greedy


def _settings(session: TaskSession, *, samples: int, greedy: bool) -> SamplingSettings:
    config = session.config
    seed = config.seed + EVALUATION_SEED
    return sampling_settings(config.rollout, samples=samples, greedy=greedy, seed=seed)


def _add_solved(sums: MetricSums, name: str, parts: dict[str, tuple[float, float]]) -> None:
    """Add the metric of ``solved``, if the verifier reports it, and remove it from the parts."""
    if "solved" in parts:
        sums.add(name, *parts.pop("solved"))
