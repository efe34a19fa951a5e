"""The story of a run: resume, evaluate, then step after step until the end or a signal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Protocol

from megatron_rl.checkpoint.directory import newest_checkpoint, newest_first
from megatron_rl.checkpoint.identity import architecture_of, layout_of
from megatron_rl.checkpoint.load import load_checkpoint
from megatron_rl.checkpoint.save import save_checkpoint
from megatron_rl.errors import RunFailed
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.training.guard import check_weights
from megatron_rl.training.initial_weights import load_initial_weights
from megatron_rl.training.policy import Policy
from megatron_rl.training.resume import load_newest
from megatron_rl.training.session import Session
from megatron_rl.training.stop import StopRequest


class Task(Protocol):
    """What differs between supervised fine-tuning and reinforcement learning."""

    def step(self, number: int, sums: MetricSums) -> dict[str, float]:
        """Do one step. Metrics go into ``sums``; returns those reduced already. A collective."""

    def evaluate(self, sums: MetricSums) -> None:
        """Answer the held-out problems; metrics go into ``sums``. A collective."""

    def samples(self) -> list[dict[str, Any]]:
        """Completions of the last step, or evaluation, for samples.jsonl."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the data cursor stands."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from such a state."""


def run_loop(session: Session, policy: Policy, make_task: Callable[[], Task]) -> bool:
    """Run all steps that are not done yet.

    Returns:
        True when the run is complete, False when a signal ended it early.
    """
    total = session.config.train.steps
    task = make_task()
    done = _resume(session, policy, task)
    if done is not None and done >= total:
        session.console.note(
            f"all {total} steps are done, nothing left to do; for more raise train.steps, "
            "for a new run choose another run_dir"
        )
        return True
    writer = session.open_writer(done)
    with StopRequest() as stop:
        if done is None:
            sums = session.new_sums()
            task.evaluate(sums)
            _record(session, writer, 0, session.reduce(sums), task)
            done = 0
        for number in range(done + 1, total + 1):
            sums = session.new_sums()
            with session.timers("step"):
                reduced = task.step(number, sums)
            if _due(session.config.evaluate.every, number) or number == total:
                task.evaluate(sums)
            _record(session, writer, number, session.reduce(sums) | reduced, task)
            asked = stop.agreed(session.groups.world, session.device.torch_device)
            last = asked or number == total
            if last or _due(session.config.checkpoint.every, number):
                _save(session, policy, task, number, last)
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


def _resume(session: Session, policy: Policy, task: Task) -> int | None:
    """Load the newest checkpoint of the run, or the weights it starts from; steps done, None for a
    new run.
    """
    fresh = session.config.checkpoint.resume == "never" or not newest_first(session.checkpoints)
    origin = None
    if fresh or policy.reference is not None:
        origin = load_initial_weights(session.config, policy.chunks, session.groups)
        policy.optimizer.reload_model_params()
    if policy.reference is not None:
        policy.reference.take()  # of the weights the run starts from, on resuming as well

    def load(path: Path) -> dict[str, Any]:
        return load_checkpoint(
            path,
            chunks=policy.chunks,
            optimizer=policy.optimizer,
            architecture=architecture_of(session.config.model),
            layout=layout_of(session.config.parallel, session.launch.world_size),
            groups=session.groups,
        )

    found = load_newest(session, load)
    if found is not None:
        path, state = found
        policy.scheduler.load_state_dict(state["scheduler"])
        task.load_state_dict(state["task"])
        session.console.note(f"continuing from {path} (step {state['step']})")
        return state["step"]
    if origin is not None:
        session.console.note(f"starting from the weights of {origin}")
    return None


def _save(session: Session, policy: Policy, task: Task, number: int, last: bool) -> None:
    """Save a checkpoint. One that cannot be written is no reason to lose the run: the older ones
    are as they were, and the next is tried when it is due.

    Raises:
        RunFailed: it could not be written, and there is no next try.
    """
    session.console.phase("checkpoint")
    check_weights(policy)
    settings = session.config.checkpoint
    try:
        with session.timers("checkpoint"):
            save_checkpoint(
                session.checkpoints,
                number,
                chunks=policy.chunks,
                optimizer=policy.optimizer,
                state={
                    "step": number,
                    "scheduler": policy.scheduler.state_dict(),
                    "task": task.state_dict(),
                },
                architecture=architecture_of(session.config.model),
                layout=layout_of(session.config.parallel, session.launch.world_size),
                groups=session.groups,
                keep=settings.keep,
            )
    except OSError as error:
        newest = newest_checkpoint(session.checkpoints)
        text = (
            f"the checkpoint of step {number} could not be written ({error}); "
            f"{'there is none' if newest is None else f'{newest} is untouched'}"
        )
        if last:
            raise RunFailed(
                f"{text}; make room and run the same command to continue from there"
            ) from error
        due = min(number - number % settings.every + settings.every, session.config.train.steps)
        session.console.warn(f"{text}; next try after step {due}")
