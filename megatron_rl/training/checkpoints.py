"""How a run goes on from its checkpoints, and how it leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping, TypeVar

from megatron_rl.checkpoint.directory import newest_checkpoint, newest_first
from megatron_rl.checkpoint.identity import architecture_of, layout_of
from megatron_rl.checkpoint.load import load_checkpoint
from megatron_rl.checkpoint.manifest import Damaged
from megatron_rl.checkpoint.save import save_checkpoint
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.training.guard import check_weights
from megatron_rl.training.initial_weights import load_initial_weights
from megatron_rl.training.policy import Policy
from megatron_rl.training.session import Session
from megatron_rl.training.task import Task

Loaded = TypeVar("Loaded")


def load_newest(session: Session, load: Callable[[Path], Loaded]) -> tuple[Path, Loaded] | None:
    """Load the run's newest checkpoint, or with ``checkpoint.resume`` auto the newest that is
    undamaged; None if there is none. A collective over all ranks.

    Args:
        load: a collective that raises `Damaged` before it changes anything.

    Raises:
        UserError: the newest is damaged (newest), or all are (auto). Nothing is deleted.
    """
    resume = session.config.checkpoint.resume
    paths = newest_first(session.checkpoints) if resume != "never" else []
    reasons = []
    for path in paths:
        try:
            return path, load(path)
        except Damaged as damage:
            reasons.append(str(damage))
            if resume == "newest":
                raise
            session.console.warn(f"left out {path}: {damage}")
    if reasons:
        raise UserError(
            f"all {len(paths)} checkpoints in {session.checkpoints} are damaged, the newest: "
            f"{reasons[0]}"
        )
    return None


def resume(session: Session, policy: Policy, task: Task) -> int | None:
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


def save(
    session: Session,
    policy: Policy,
    task: Task,
    number: int,
    metrics: Mapping[str, float],
    last: bool,
) -> None:
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
                keep_best=settings.keep_best,
                score=metrics.get(settings.best_metric),
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
