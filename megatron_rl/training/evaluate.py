"""Evaluation on held-out problems: greedy pass@1 and sampled mean@k."""

from __future__ import annotations

from typing import Sequence

from megatron_rl.observe.metrics import MetricSums
from megatron_rl.records import Prompt
from megatron_rl.rewards import VERIFIERS
from megatron_rl.rollout.collect import ScoredGroup, collect
from megatron_rl.rollout.engine import Engine, SamplingSettings, sampling_settings
from megatron_rl.training.guard import check_answers
from megatron_rl.training.session import Session

#: Keeps the samples of an evaluation apart from those of training; the same at every evaluation of
#: a run.
EVALUATION_SEED = 0x5EED


def evaluate(
    session: Session, engine: Engine, prompts: Sequence[Prompt], sums: MetricSums
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
        Stopped: a signal asked for it; nothing was added to ``sums``. On all ranks.
    """
    config = session.config
    data = session.groups.data
    mine = prompts[data.rank() :: data.size()]
    verifier = VERIFIERS[config.reward.name]
    with session.timers("eval"):
        session.console.phase("evaluate, greedy")
        greedy = collect(engine, mine, verifier, _settings(session, samples=1, greedy=True))
        check_answers(greedy, session.groups.world)
        sampled = None
        if config.evaluate.samples:
            session.console.phase("evaluate, sampled")
            settings = _settings(session, samples=config.evaluate.samples, greedy=False)
            sampled = collect(engine, mine, verifier, settings)
    # Only now: of an evaluation that is given up nothing is kept.
    _add(sums, "eval/pass@1", "solved", greedy)
    _add(sums, "eval/well_formed", "well_formed", greedy)
    if sampled is not None:
        _add(sums, "eval/mean@k", "solved", sampled)
        sums.add("eval/samples", config.evaluate.samples)
    if session.counts_once:
        sums.add("eval/problems", len(mine))
    return greedy


def _settings(session: Session, *, samples: int, greedy: bool) -> SamplingSettings:
    config = session.config
    seed = config.seed + EVALUATION_SEED
    return sampling_settings(config.rollout, samples=samples, greedy=greedy, seed=seed)


def _add(sums: MetricSums, name: str, part: str, groups: Sequence[ScoredGroup]) -> None:
    parts = [reward.parts.get(part, 0.0) for group in groups for reward in group.rewards]
    sums.add(name, float(sum(parts)), float(len(parts)))
