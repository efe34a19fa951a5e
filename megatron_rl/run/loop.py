"""The loop of a run: resume, evaluate, then step after step until the end or a signal."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Mapping

from megatron_rl.errors import Stopped
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.observe.writers import RunWriter
from megatron_rl.policy.policy import Policy
from megatron_rl.run.checkpoints import Checkpoints, check_best_metric, resume
from megatron_rl.run.due import due, evaluation_due, evaluation_missing
from megatron_rl.run.pace import Pace
from megatron_rl.run.session import Session
from megatron_rl.tasks.task import Task


def run_loop(session: Session, policy: Policy, make_task: Callable[[], Task]) -> bool:
    """Run the remaining steps.

    A signal also interrupts a rollout or an evaluation. The run then drops it and keeps the
    checkpoint of the last step done; the next run begins it again.

    Returns:
        True when the run is complete, False when a signal ended it early.
    """
    total = session.config.train.steps
    task = make_task()
    done = resume(session, policy, task)
    missing = done is not None and evaluation_missing(session, done)
    if done is not None and done >= total and not missing:
        session.console.note(
            f"all {total} steps are done, nothing left to do; for more raise train.steps, "
            "for a new run choose another run_dir"
        )
        return True
    writer = session.open_writer(done)
    checkpoints = Checkpoints(session, policy, task, done or 0)
    with session.stop, checkpoints, writer or contextlib.nullcontext():
        steps = _Steps(session, writer, checkpoints, task)
        if missing or (done is None and session.config.data.eval is not None):
            if not steps.evaluate_first(done):
                return False
        for number in range((done or 0) + 1, total + 1):
            if not steps.run(number):
                return False
    return True


class _Steps:
    """The steps of a run, one after the other."""

    def __init__(
        self, session: Session, writer: RunWriter | None, checkpoints: Checkpoints, task: Task
    ) -> None:
        self._session, self._writer = session, writer
        self._checkpoints, self._task = checkpoints, task
        self._metrics: Mapping[str, float] = {}  #: of the last step done
        self._pace = Pace(session)

    def evaluate_first(self, done: int | None) -> bool:
        """Evaluate a new run (``done`` None) before its first step, or make up for a missed
        evaluation after step ``done``. False: a signal came first.
        """
        sums = self._session.new_sums()
        if not self._evaluate(sums):
            self._report_stop(done or 0)
            return False
        metrics = self._session.reduce(sums)
        if done is None:
            _record(self._session, self._writer, 0, metrics, self._task)
            check_best_metric(self._session.config, metrics)
            return True
        if self._writer is not None:
            self._writer.add_to_last(done, metrics, _samples(self._session, self._task))
            self._session.console.eval(done, metrics)
        config = self._session.config
        if metrics.get(config.checkpoint.best_metric) is not None and config.checkpoint.keep_best:
            self._checkpoints.save(done, metrics, last=done >= config.train.steps)
        return True

    def run(self, number: int) -> bool:
        """Run one step and what is due after it. False: a signal asked to stop, and the checkpoint
        is saved.
        """
        session, config = self._session, self._session.config
        sums, before = session.new_sums(), self._task.state_dict()
        try:
            with session.timers("step"):
                reduced = self._task.step(number, sums)
        except Stopped:
            self._task.load_state_dict(before, other_data=False)
            if number > 1:
                self._checkpoints.save_before_leaving(number - 1, self._metrics)
            self._report_stop(number - 1)
            return False
        if evaluation_due(config, number):
            self._evaluate(sums)
        metrics = self._metrics = session.reduce(sums) | reduced
        _record(session, self._writer, number, metrics, self._task)
        asked = session.stop.agreed(session.groups.world, session.device.torch_device)
        last = asked or number == config.train.steps
        self._pace.add(metrics, last=last)
        if last or due(config.checkpoint.every, number):
            self._checkpoints.save(number, metrics, last)
        if asked and (number < config.train.steps or evaluation_missing(session, number)):
            self._report_stop(number)
            return False
        return True

    def _evaluate(self, sums: MetricSums) -> bool:
        """Evaluate into ``sums``. False: a signal came first, and nothing was added."""
        try:
            self._task.evaluate(sums)
        except Stopped:
            self._session.timers.forget("eval")
            return False
        return True

    def _report_stop(self, number: int) -> None:
        self._session.console.note(f"stopped after step {number}; run the same command to continue")


def _record(
    session: Session,
    writer: RunWriter | None,
    number: int,
    metrics: Mapping[str, float],
    task: Task,
) -> None:
    if writer is None:
        return
    writer.write_metrics(number, metrics)
    writer.write_samples(number, _samples(session, task))
    if "loss" in metrics:
        session.console.step(number, metrics)
    if "eval/problems" in metrics:
        session.console.eval(number, metrics)


def _samples(session: Session, task: Task) -> list[dict[str, Any]]:
    return task.samples()[: session.config.observe.samples]
