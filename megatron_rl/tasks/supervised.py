"""One step of supervised fine-tuning: next-token cross-entropy on reference answers."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from megatron_rl.data.mixture import source_of
from megatron_rl.data.prompts import DataPart
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.policy.batch import pack_mini_batches
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.update import supervised_update
from megatron_rl.records import Prompt, Sample
from megatron_rl.rollout.collect import ScoredGroup, sample_rows
from megatron_rl.rollout.engine import Engine
from megatron_rl.tasks.evaluate import evaluate
from megatron_rl.tasks.task_session import TaskSession


class Supervised:
    """The task of `sft`: see `task.Task`."""

    def __init__(
        self,
        session: TaskSession,
        policy: Policy,
        engine: Engine,
        samples: Sequence[Sample],
        eval_prompts: Sequence[Prompt],
        identity: Mapping[str, Any],
        parts: Sequence[DataPart] = (),
    ) -> None:
        config = session.config
        self.identity = identity
        self._session, self._policy, self._engine = session, policy, engine
        self._source = source_of(samples, parts, config.seed, config.data.shuffle)
        self._eval_prompts = eval_prompts
        self._last: Sequence[ScoredGroup] = ()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""
        return 1

    def step(self, number: int, sums: MetricSums) -> dict[str, float]:
        """One optimizer step on the next batch."""
        session, config = self._session, self._session.config
        batch = self._source.next_batch(config.train.batch_size)
        mine = batch[session.groups.data.rank() :: session.groups.data.size()]
        if session.counts_once:
            sums.add("tokens/step", sum(len(sample.tokens) for sample in mine))
        with session.timers("update"):
            session.console.phase("update")
            (packs,) = pack_mini_batches(
                [mine], config, session.groups, session.device.torch_device
            )
            supervised_update(self._policy, packs, sums)
            self._engine.weights_changed()
        return {}

    def evaluate(self, sums: MetricSums) -> None:
        """Held-out problems, greedy and sampled."""
        self._last = evaluate(self._session, self._engine, self._eval_prompts, sums)
        sums.add_each(self._engine.metrics())

    def samples(self) -> list[dict[str, Any]]:
        """Answers of the last evaluation that have not been written yet."""
        rows, self._last = sample_rows(self._last, self._session.config.observe.samples), ()
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The state of the data cursor."""
        return {"samples": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool) -> None:
        """Continue from such a state; ``other_data``: the data set may have changed since."""
        self._source.load_state_dict(state["samples"], other_data=other_data)
