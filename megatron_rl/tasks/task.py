"""What supervised fine-tuning and reinforcement learning have to do for the loop."""

from __future__ import annotations

from typing import Any, Mapping, Protocol

from megatron_rl.observe.metrics import MetricSums


class Task(Protocol):
    """What differs between supervised fine-tuning and reinforcement learning."""

    identity: Mapping[str, Any]
    """The verb, and what `data.identity` says of its data: see `continuation.run_identity`."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""

    def step(self, number: int, sums: MetricSums) -> dict[str, float]:
        """Do one step. Metrics go into ``sums``; returns those reduced already. A collective.

        Raises `Stopped` where a signal asked for it and no weight has changed yet.
        """

    def evaluate(self, sums: MetricSums) -> None:
        """Answer the held-out problems; metrics go into ``sums``. A collective.

        Raises `Stopped` where a signal asked for it; nothing has gone into ``sums`` then.
        """

    def samples(self) -> list[dict[str, Any]]:
        """Completions of the last step, or evaluation, for samples.jsonl."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the data cursor stands."""

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool) -> None:
        """Continue from such a state, or go back to it; ``other_data``: its data may have been
        others.
        """
