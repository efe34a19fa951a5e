"""One step of reinforcement learning: sample, reward, score, update."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Callable, Mapping, Sequence, TypeVar

import torch

from megatron_rl.catalogue.kinds import ADVANTAGES
from megatron_rl.config.algorithm import (
    advantages_of,
    advantages_settings,
    keeps_trace,
    updates_per_step,
    uses_router_shift,
)
from megatron_rl.config.schema import Config
from megatron_rl.data.mixture import source_of
from megatron_rl.data.prompts import DataPart, number_occurrences
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.parallel.collectives import gather_first_dim
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.batch import pack_mini_batches
from megatron_rl.policy.finite_checks import check_answers
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.score import ScoredPack, score_reference, unscored
from megatron_rl.policy.update import update
from megatron_rl.records import Prompt, RolloutGroup, Sample
from megatron_rl.rollout.collect import (
    ScoredGroup,
    part_sums,
    rollout_metrics,
    shape_overlong,
    source_sums,
    to_samples,
)
from megatron_rl.rollout.dynamic import collect_informative
from megatron_rl.rollout.engine import Engine, SamplingSettings, sampling_settings
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.tasks.build import reward_workers
from megatron_rl.tasks.evaluate import evaluate
from megatron_rl.tasks.old_scores import OldScores, add_mismatch
from megatron_rl.tasks.shown import ShownSamples
from megatron_rl.tasks.task_session import TaskSession


class Reinforce:
    """The task of `train`: see `task.Task`."""

    def __init__(
        self,
        session: TaskSession,
        policy: Policy,
        engine: Engine,
        train_prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt],
        identity: Mapping[str, Any],
        parts: Sequence[DataPart] = (),
    ) -> None:
        config = session.config
        self.identity = identity
        self._session, self._policy, self._engine = session, policy, engine
        self._source = source_of(train_prompts, parts, config.seed, config.data.shuffle)
        self._parts, self._eval_prompts = parts, eval_prompts
        self._rewards = reward_workers(session)
        self._old_scores = OldScores(session, policy)
        self._last = ShownSamples((), 0)
        #: Steps whose answers are being sampled ahead, the next first: the source's state before
        #: their problems were drawn, and the pending answers.
        self._ahead: deque[tuple[dict[str, Any], Callable[[], list[RolloutGroup]]]] = deque()

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""
        return updates_per_step(self._session.config.algorithm)

    def step(self, number: int, sums: MetricSums) -> dict[str, float]:
        """Sample, reward, score, and take the optimizer steps of one rollout batch.

        Raises:
            Stopped: a signal asked the run to stop before the first update. On all ranks.
        """
        session, config = self._session, self._session.config
        with session.timers("rollout"):
            session.console.phase("rollout")
            groups, sampled = self._roll_out(number, sums)
            check_answers(sampled, session.groups.world, session.device.torch_device)
        session.check_stop()
        sums.add_each(self._engine.metrics())
        sums.add_all(rollout_metrics(sampled))
        sums.add_parts("reward", part_sums(sampled))
        if len(self._parts) > 1:
            for base, metrics in source_sums(sampled, self._parts).items():
                sums.add_parts(base, metrics)
        self._add_staleness(sampled, sums)
        lengths = [answer.num_written for scored in sampled for answer in scored.group.completions]
        sums.add("response/length_max", max(lengths, default=0), len(lengths))
        samples = to_samples(groups, global_advantages(groups, config, session.groups))
        if session.counts_once:
            sums.add("tokens/step", sum(len(sample.tokens) for sample in samples))
        shown = ShownSamples(groups, config.observe.samples)
        with session.timers("score"):
            session.console.phase("score")
            mini_batches, given = self._score(samples, sums, shown)
        session.check_stop()
        with session.timers("update"):
            telemetry = self._update(mini_batches, sums, shown, given)
            self._engine.weights_changed()
            self._last = shown
            return telemetry.reduce(session.groups.world)

    def _roll_out(
        self, number: int, sums: MetricSums
    ) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
        """This rank's groups of the step's batch, and all groups that it has sampled for it."""
        session, config = self._session, self._session.config
        wanted = config.rollout.prompts_per_step
        if not config.rollout.dynamic_sampling:
            _, take = self._ahead.popleft() if self._ahead else self._ask(number)
            answers = take()
            last = min(number + config.rollout.lag, config.train.steps)
            for step in range(number + len(self._ahead) + 1, last + 1):
                self._ahead.append(self._ask(step))
            groups = self._rewarded(answers)
            return groups, groups
        drawn: Counter[int] = Counter()  # in all rounds
        batch = collect_informative(
            lambda count: number_occurrences(self._source.next_batch(count), drawn),
            lambda prompts, attempt: self._collect(prompts, number, attempt),
            wanted,
            config.rollout.max_rounds,
            session.groups.data,
        )
        sums.add("groups/rounds", batch.rounds)
        if session.counts_once:
            sums.add("groups/drawn", len(batch.drawn))
        return my_share(batch.chosen, config, session.groups), batch.drawn

    def _ask(self, number: int) -> tuple[dict[str, Any], Callable[[], list[RolloutGroup]]]:
        """Draw a step's problems and begin to sample answers to this rank's share; see
        ``_ahead``.
        """
        config = self._session.config
        cursor = self._source.state_dict()
        batch = self._source.next_batch(config.rollout.prompts_per_step)
        batch = number_occurrences(batch, Counter())
        mine = my_share(batch, config, self._session.groups)
        return cursor, self._engine.begin(mine, self._sampling(number))

    def _collect(self, prompts: Sequence[Prompt], number: int, attempt: int) -> list[ScoredGroup]:
        """Sample answers and reward them; ``attempt``: the round of dynamic sampling, below 256."""
        return self._rewarded(self._engine.generate(prompts, self._sampling(number, attempt)))

    def _sampling(self, number: int, attempt: int = 0) -> SamplingSettings:
        config = self._session.config
        return sampling_settings(
            config.rollout,
            samples=config.rollout.samples_per_prompt,
            greedy=False,
            seed=(config.seed << 32) + (attempt << 24) + number,
            routes=config.algorithm.routing_replay == "r3" or self._old_scores.wants_traces,
            router_logprobs=self._old_scores.wants_traces,
            kept=config.rollout.keep_sampling_mask,
        )

    def _rewarded(self, answers: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        rollout, reward = self._session.config.rollout, self._session.config.reward
        groups = self._rewards.score(answers)
        if not reward.overlong_buffer:
            return groups
        return shape_overlong(
            groups, rollout.max_new_tokens, reward.overlong_buffer, reward.overlong_penalty
        )

    def _score(
        self, samples: Sequence[Sample], sums: MetricSums, shown: ShownSamples
    ) -> tuple[list[list[ScoredPack]], bool]:
        """Pack the mini-batches and score their packs with the policy as it is before the first
        update, or as the sampler has (`OldScores`): then True, and the first update has to check
        it.

        That update scores its own packs, except where its routers need the sampler's experts: not
        all of them may be known, and a pass with gradients cannot leave some to the routers (R3).
        """
        session, config = self._session, self._session.config
        size = len(samples) // config.algorithm.mini_batches
        slices = [samples[i : i + size] for i in range(0, len(samples), size)]
        given = self._old_scores.given(samples)
        packed = pack_mini_batches(
            slices,
            config,
            session.groups,
            session.device.torch_device,
            with_traces=given and self._old_scores.wants_traces,
        )
        if config.observe.tokens:
            tokens, device = config.observe.tokens, session.device.torch_device
            shown.watch(slices, packed, tokens, device)
        first = 0 if config.algorithm.routing_replay == "r3" else 1
        scored = self._old_scores.of(packed[first:], sums, given=given)
        if first:
            traces = keeps_trace(config.algorithm)
            scored = unscored(self._policy, packed[0], with_traces=traces) + scored
        if self._policy.reference is not None:
            scored = score_reference(self._policy, scored)
        count = len(packed[0])
        return [scored[i : i + count] for i in range(0, len(scored), count)], given

    def _update(
        self,
        mini_batches: list[list[ScoredPack]],
        sums: MetricSums,
        shown: ShownSamples,
        given: bool,
    ) -> RouterTelemetry:
        """All optimizer steps. ``given``: the sampler has scored all but the first mini-batch."""
        model, algorithm = self._session.config.model, self._session.config.algorithm
        telemetry = RouterTelemetry(
            model.num_layers,
            model.num_experts,
            self._session.device.torch_device,
            floor=algorithm.router_shift.floor if uses_router_shift(algorithm) else 0.0,
        )

        def check(first: list[ScoredPack]) -> None:
            later = [item for mini_batch in mini_batches[1:] for item in mini_batch]
            later = self._old_scores.checked(first, later, sums)
            size = len(first)
            mini_batches[1:] = [later[i : i + size] for i in range(0, len(later), size)]

        total = algorithm.epochs * len(mini_batches)
        for done in range(total):
            self._session.console.phase("update", done, total)
            number = done % len(mini_batches)
            before = mini_batches[number]
            mini_batches[number] = update(
                self._policy,
                before,
                sums,
                telemetry,
                shown.values,
                before_step=check if given and not done else None,
            )
            for old, item in zip(before, mini_batches[number], strict=True):
                if old.own is not None:
                    add_mismatch(item, sums)
        shown.gather(self._session.groups, self._session.tokenizer.piece)
        return telemetry

    def _add_staleness(self, sampled: Sequence[ScoredGroup], sums: MetricSums) -> None:
        """Staleness: how many steps the sampling weights are behind the trained ones. Partial
        rollouts: the share of answers sampled by several versions of the weights.
        """
        answers = [answer for scored in sampled for answer in scored.group.completions]
        answers = [answer for answer in answers if answer.version is not None]
        if answers:
            now = self._engine.version
            lags = [now - a.version for a in answers if a.version is not None]
            sums.add("rollout/staleness", sum(lags), len(answers))
            carried = sum(a.last_version != a.version for a in answers)
            sums.add("rollout/partial_fraction", carried, len(answers))

    def evaluate(self, sums: MetricSums) -> None:
        """Held-out problems, greedy and sampled."""
        answers = evaluate(self._session, self._engine, self._eval_prompts, sums)
        sums.add_each(self._engine.metrics())
        if not self._last.rows():
            self._last = ShownSamples(answers, self._session.config.observe.samples)

    def samples(self) -> list[dict[str, Any]]:
        """Completions of the last step on this rank."""
        return self._last.rows()

    def state_dict(self) -> dict[str, Any]:
        """The state of the prompt cursor; everything else follows from seed and step. A resumed run
        draws the problems that are being answered ahead again, and samples them anew.
        """
        return {"prompts": self._ahead[0][0] if self._ahead else self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool) -> None:
        """Continue from such a state and drop the answers being sampled ahead. ``other_data``: the
        data set may have changed since.
        """
        self._ahead.clear()
        self._source.load_state_dict(state["prompts"], other_data=other_data)


Item = TypeVar("Item", Prompt, ScoredGroup)


def my_share(batch: Sequence[Item], config: Config, groups: Groups) -> list[Item]:
    """This data-parallel rank's prompts (or groups), mini-batch by mini-batch.

    Mini-batch m is the m-th slice of the whole batch whatever the number of ranks, so the optimizer
    sees the same mini-batches under every layout.
    """
    slice_size = len(batch) // config.algorithm.mini_batches
    share = slice_size // groups.data.size()
    first = groups.data.rank() * share
    return [
        item
        for start in range(0, len(batch), slice_size)
        for item in batch[start + first : start + first + share]
    ]


def global_advantages(
    groups: Sequence[ScoredGroup], config: Config, parallel: Groups
) -> torch.Tensor:
    """Advantages [P, G] of this rank's groups; the estimator normalises over the groups of all
    ranks.
    """
    rewards = torch.tensor([[r.value for r in group.rewards] for group in groups])
    everyone = gather_first_dim(rewards, parallel.data)
    algorithm = config.algorithm
    estimate = ADVANTAGES.bind(advantages_of(algorithm), advantages_settings(algorithm))
    return estimate(everyone).chunk(parallel.data.size())[parallel.data.rank()]
