"""Resumes a run from its checkpoints, and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping, TypeVar

from megatron_rl.checkpoint.background import BackgroundWriter
from megatron_rl.checkpoint.directory import newest_checkpoint, newest_first
from megatron_rl.checkpoint.identity import architecture_of, layout_of
from megatron_rl.checkpoint.manifest import Damaged
from megatron_rl.checkpoint.restore import load_checkpoint
from megatron_rl.checkpoint.save import save_checkpoint
from megatron_rl.config.reward import reward_text
from megatron_rl.config.schema import Config
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.policy.finite_checks import check_weights
from megatron_rl.policy.initial_weights import load_initial_weights
from megatron_rl.policy.optimizer import continue_schedule
from megatron_rl.policy.policy import Policy
from megatron_rl.run.continuation import check_state, what_differs
from megatron_rl.run.session import Session
from megatron_rl.tasks.task import Task

Loaded = TypeVar("Loaded")


def load_newest(
    session: Session, load: Callable[[Path], Loaded], resume: str
) -> tuple[Path, Loaded] | None:
    """Load the run's newest checkpoint; with ``resume`` auto the newest undamaged one. None: there
    is no checkpoint. A collective over all ranks.

    Args:
        load: a collective that raises `Damaged` before it changes anything.
        resume: as ``checkpoint.resume``.

    Raises:
        UserError: the newest is damaged (newest), or all are (auto). Nothing is deleted.
    """
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
    """Load the run's newest checkpoint, or the weights it starts from. Returns the steps done; None
    for a new run.
    """
    fresh = session.config.checkpoint.resume == "never" or not newest_first(session.checkpoints)
    origin = None
    if fresh or policy.reference is not None:
        origin = load_initial_weights(session.config, policy.chunks, session.groups)
        policy.optimizer.reload_model_params()
    if policy.reference is not None:
        policy.reference.take()  # of the initial weights, also when resuming

    def load(path: Path) -> dict[str, Any]:
        return load_checkpoint(
            path,
            chunks=policy.chunks,
            optimizer=policy.optimizer,
            architecture=architecture_of(session.config.model),
            layout=layout_of(session.config.parallel, session.launch.world_size),
            groups=session.groups,
        )

    found = load_newest(session, load, session.config.checkpoint.resume)
    if found is not None:
        _go_on(session, policy, task, *found)
        return found[1]["step"]
    if origin is not None:
        session.console.note(f"starting from the weights of {origin}")
    return None


def check_best_metric(config: Config, metrics: Mapping[str, float]) -> None:
    """Raise UserError if ``metrics``, those of an evaluation, lack ``checkpoint.best_metric``."""
    settings = config.checkpoint
    if settings.keep_best and settings.best_metric not in metrics:
        found = [name for name in sorted(metrics) if name.startswith("eval/")]
        raise UserError(
            f"checkpoint.best_metric is {settings.best_metric}, and the evaluation with the "
            f"verifier {reward_text(config.reward)!r} gives {', '.join(found) or 'none'}; expected "
            "one of these; set it, or checkpoint.keep_best to 0"
        )


def _go_on(
    session: Session, policy: Policy, task: Task, path: Path, state: Mapping[str, Any]
) -> None:
    """Restore schedule and data cursor of the loaded checkpoint; note what has changed since."""
    config, console = session.config, session.console
    # This checkpoint may be older than the one that `check_continuation` read.
    check_state(config, path, state, task.identity)
    steps_left = max(0, config.train.steps - state["step"])
    continue_schedule(policy.scheduler, state["scheduler"], steps_left * task.updates_per_step)
    other_data = config.checkpoint.changed_data == "accept"
    task.load_state_dict(state["task"], other_data=other_data)
    console.note(f"continuing from {path} (step {state['step']})")
    if steps_left:
        notes, warnings = what_differs(config, state, task.identity)
        for line in notes:
            console.note(line)
        for line in warnings:
            console.warn(line)


class Checkpoints:
    """Saves the run, in the foreground or beside the training (``checkpoint.asynchronous``)."""

    def __init__(self, session: Session, policy: Policy, task: Task, done: int) -> None:
        """done: the step of the checkpoint that the run resumes from; 0: there is none. A
        collective over all ranks.
        """
        self._session, self._policy, self._task = session, policy, task
        settings = session.config.checkpoint
        self._background = BackgroundWriter() if settings.asynchronous else None
        self._writing = done  #: step of the newest checkpoint that was begun
        self._failed = 0  #: last step whose checkpoint could not be written

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After an error that all ranks raised, finish the pending checkpoint."""
        if kind is not None and issubclass(kind, (UserError, RunFailed, FloatingPointError)):
            self.wait()

    def save_before_leaving(self, number: int, metrics: Mapping[str, float]) -> None:
        """Save the last step done, unless its checkpoint was begun already. A collective.

        Raises:
            RunFailed: it could not be written.
        """
        self.wait()
        if self._writing != number or self._failed == number:
            self.save(number, metrics, last=True)

    def save(self, number: int, metrics: Mapping[str, float], last: bool) -> None:
        """Save a checkpoint. If it cannot be written the run continues: older checkpoints are
        untouched, and the next one is tried when it is due. A collective.

        Raises:
            RunFailed: it could not be written and was the last one; or another run has taken over
                the run directory.
        """
        self._session.console.phase("checkpoint")
        check_weights(self._policy)
        self._session.confirm_lock()
        with self._session.timers("checkpoint"):
            self.wait()  # two pending checkpoints would be two copies in memory
            self._writing = number
            try:
                self._begin(number, metrics)
                if self._background is not None and last:
                    self._background.wait()
            except OSError as error:
                self._report(error, last)

    def wait(self) -> None:
        """Wait until the pending checkpoint is on the disk, or has failed with a warning. A
        collective.
        """
        if self._background is None:
            return
        try:
            self._background.wait()
        except OSError as error:
            self._report(error, last=False)

    def _begin(self, number: int, metrics: Mapping[str, float]) -> None:
        session, settings = self._session, self._session.config.checkpoint
        save_checkpoint(
            session.checkpoints,
            number,
            chunks=self._policy.chunks,
            optimizer=self._policy.optimizer,
            state={
                "step": number,
                "scheduler": self._policy.scheduler.state_dict(),
                "task": self._task.state_dict(),
                "identity": self._task.identity,
            },
            architecture=architecture_of(session.config.model),
            layout=layout_of(session.config.parallel, session.launch.world_size),
            groups=session.groups,
            keep=settings.keep,
            keep_best=settings.keep_best,
            score=metrics.get(settings.best_metric),
            background=self._background,
        )

    def _report(self, error: OSError, last: bool) -> None:
        number, config = self._writing, self._session.config
        self._failed = number
        newest = newest_checkpoint(self._session.checkpoints)
        text = (
            f"the checkpoint of step {number} could not be written ({error}); "
            f"{'there is none' if newest is None else f'{newest} is untouched'}"
        )
        if last:
            raise RunFailed(
                f"{text}; make room and run the same command to continue from there"
            ) from error
        every = config.checkpoint.every
        due = min(number - number % every + every, config.train.steps)
        self._session.console.warn(f"{text}; next try after step {due}")
