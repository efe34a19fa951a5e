"""The interface of a task: what the loop calls."""

from __future__ import annotations

from typing import Any, Mapping, Protocol

from megatron_rl.observe.metrics import MetricSums


class Task(Protocol):
    """Supervised fine-tuning or reinforcement learning, as the loop sees it."""

    identity: Mapping[str, Any]
    """The verb and the identity of its data (`data.identity`); see `continuation.run_identity`."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""

    def step(self, number: int, sums: MetricSums) -> dict[str, float]:
        """Do one step. Adds metrics to ``sums`` and returns those that are reduced already. A
        collective.

        Raises `Stopped` if a signal asked the run to stop and no weight has changed yet.
        """

    def evaluate(self, sums: MetricSums) -> None:
        """Answer the held-out problems and add metrics to ``sums``. A collective.

        Raises `Stopped` if a signal asked the run to stop; then it has added nothing to ``sums``.
        """

    def samples(self) -> list[dict[str, Any]]:
        """Completions of the last step, or evaluation, for samples.jsonl."""

    def state_dict(self) -> dict[str, Any]:
        """The state of the data cursor, fit for JSON."""

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool) -> None:
        """Continue from such a state, or go back to it; ``other_data``: the data set may have
        changed since.
        """
