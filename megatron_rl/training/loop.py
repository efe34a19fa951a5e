"""The story of a run: resume, evaluate, then step after step until the end or a signal."""

from __future__ import annotations

from typing import Callable

from megatron_rl.training.checkpoints import Checkpoints, resume
from megatron_rl.training.policy import Policy
from megatron_rl.training.session import Session
from megatron_rl.training.stop import StopRequest
from megatron_rl.training.task import Task


def run_loop(session: Session, policy: Policy, make_task: Callable[[], Task]) -> bool:
    """Run all steps that are not done yet.

    Returns:
        True when the run is complete, False when a signal ended it early.
    """
    total, evaluates = session.config.train.steps, session.config.data.eval is not None
    task = make_task()
    done = resume(session, policy, task)
    if done is not None and done >= total:
        session.console.note(
            f"all {total} steps are done, nothing left to do; for more raise train.steps, "
            "for a new run choose another run_dir"
        )
        return True
    writer = session.open_writer(done)
    checkpoints = Checkpoints(session, policy, task)
    with StopRequest() as stop, checkpoints:
        if done is None and evaluates:
            sums = session.new_sums()
            task.evaluate(sums)
            _record(session, writer, 0, session.reduce(sums), task)
        for number in range((done or 0) + 1, total + 1):
            sums = session.new_sums()
            with session.timers("step"):
                reduced = task.step(number, sums)
            if evaluates and (_due(session.config.evaluate.every, number) or number == total):
                task.evaluate(sums)
            metrics = session.reduce(sums) | reduced
            _record(session, writer, number, metrics, task)
            asked = stop.agreed(session.groups.world, session.device.torch_device)
            last = asked or number == total
            if last or _due(session.config.checkpoint.every, number):
                checkpoints.save(number, metrics, last)
            if asked and number < total:
                session.console.note(
                    f"stopped after step {number}; run the same command to continue"
                )
                return False
    if writer is not None:
        writer.close()
    return True


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


def _record(session: Session, writer, number: int, metrics: dict[str, float], task: Task) -> None:
    if writer is None:
        return
    writer.write_metrics(number, metrics)
    writer.write_samples(number, task.samples()[: session.config.observe.samples])
    if "loss" in metrics:
        session.console.step(number, metrics)
    if "eval/pass@1" in metrics:
        session.console.eval(number, metrics)
