"""Runs what is left of a plan, several runs side by side, until all have ended or a signal comes.

A run that has ended for good gets its marker last, so after a kill at any moment the same command
finds the runs that are done, and every other run goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from megatron_rl.device.cores import usable_cores
from megatron_rl.errors import RunFailed
from megatron_rl.observe.run_files import METRICS_FILE
from megatron_rl.run.run_lock import owner_in
from megatron_rl.study.child import Child, MakeCommand, command_of
from megatron_rl.study.forked import ForkServer
from megatron_rl.study.plan import Plan, PlannedRun
from megatron_rl.study.results import hours_of
from megatron_rl.study.state import (
    NOT_FINITE,
    is_complete,
    last_error,
    last_records,
    mark_done,
    mark_failed,
    state_of,
)

#: Seconds between two looks at the children, and between two looks of a person.
_LOOK_S = 0.1
_SHOW_S = 1.0
#: Seconds that runs have to save a checkpoint when the study ends by an error.
_GRACE_S = 60.0
#: Seconds until a run whose directory another process holds is tried again.
_HELD_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def slots_of(plan: Plan, at_once: int | None = None) -> int:
    """Runs side by side: as asked for, else as many as the machine has GPUs or cores for."""
    study = plan.study
    ranks = max((run.ranks for run in plan.runs), default=1)
    if at_once or study.at_once:
        return at_once or study.at_once or 1
    if study.gpus:
        return max(1, study.gpus // ranks)
    return max(1, usable_cores() // (ranks * study.threads))


class Runner:
    """Starts, watches and settles runs. One process at a time has one for the same plan."""

    def __init__(
        self,
        plan: Plan,
        runs: Sequence[PlannedRun],
        slots: int,
        *,
        make_command: MakeCommand = command_of,
        note: Callable[[str], None] = print,
        show: Callable[[], None] = lambda: None,
        confirm: Callable[[], None] = lambda: None,
        settled: Callable[[], None] = lambda: None,
        forks: ForkServer | None = None,
    ) -> None:
        """
        Args:
            runs: those to run, of the plan; the others are as their files say.
            slots: runs side by side.
            make_command: a run's command.
            note: shows a line.
            show: called about every second.
            confirm: called before a run is started; raises if the study is another process's now.
            settled: called after a run has ended for good.
            forks: saves runs their imports; None: each is a process of its own.
        """
        self._plan, self._slots = plan, slots
        self._make_command, self._note, self._show = make_command, note, show
        self._confirm, self._settled, self._forks = confirm, settled, forks
        self._waiting = deque(run for run in runs if not state_of(run).finished)
        self._held: dict[int, float] = {}  #: index -> when it is tried again
        self._children: list[Child] = []
        self._steps_at_start: dict[int, int] = {}
        self._signals = 0
        self.failed: dict[str, str] = {}  #: name of a run -> its last error
        self.blocked: dict[str, str] = {}  #: name of a run -> the prepared run that it lacks
        self.not_started = 0  #: runs for which the budget had nothing left

    @property
    def running(self) -> Mapping[int, Child]:
        """Index -> the child of each run that goes on."""
        return {child.run.index: child for child in self._children}

    @property
    def stopped(self) -> bool:
        """Whether a signal asked to stop."""
        return self._signals > 0

    def run(self) -> None:
        """Run them all; returns when the last has ended. A signal stops the runs, which save a
        checkpoint first; a second SIGINT kills them.

        Raises:
            RunFailed: another process has taken over the study. OSError: a disk is full.
            KeyboardInterrupt: a second SIGINT.
        """
        shown = 0.0
        with self._signal_handlers():
            try:
                while self._children or (self._waiting and not self.stopped):
                    self._settle_ended()
                    if not self.stopped:
                        self._start_next()
                    if time.monotonic() - shown >= _SHOW_S:
                        self._show()
                        shown = time.monotonic()
                    time.sleep(_LOOK_S)
            finally:
                self._end_children()
        self._show()

    def _start_next(self) -> None:
        """Fill the free slots with the first runs that can start."""
        for run in list(self._waiting):
            if len(self._children) >= self._slots:
                return
            if self._has_to_wait(run):
                continue
            if self._budget_is_spent(run):
                self.not_started = len(self._waiting)
                self._note(f"the budget is spent: {len(self._waiting)} runs are not started")
                self._waiting.clear()
                return
            self._confirm()
            self._waiting.remove(run)
            slot = min(set(range(self._slots)) - {child.slot for child in self._children})
            self._steps_at_start[run.index] = _last_step(run)
            begun = "goes on" if self._steps_at_start[run.index] > 0 else "starts"
            gpus = self._gpus(run, slot)
            child = Child(run, slot, self._make_command, gpus, self._forks)
            self._children.append(child)
            if self.stopped:  # the signal came while it was started
                child.stop()
            self._note(f"{run.name}: {begun}")

    def _has_to_wait(self, run: PlannedRun) -> bool:
        """Whether a run cannot start now: its weights are not there yet, or another process is at
        work in its directory.
        """
        if run.needs is not None and not self._weights_are_there(run, run.needs):
            return True
        if self._held.get(run.index, 0.0) > time.monotonic():
            return True
        owner = owner_in(run.run_dir)
        if owner is not None:
            if run.index not in self._held:
                self._note(f"{run.name}: waits for {owner}, which is at work there")
            self._held[run.index] = time.monotonic() + _HELD_S
            return True
        if state_of(run).finished:  # by that process
            self._waiting.remove(run)
            return True
        return False

    def _weights_are_there(self, run: PlannedRun, needs: int) -> bool:
        """Whether the prepared run is done; a run that waits in vain is left out."""
        if needs in self.running or needs in [other.index for other in self._waiting]:
            return False
        needed = self._plan.runs[needs]
        state = state_of(needed)
        if state.kind not in ("done", "running"):
            self._waiting.remove(run)
            self.blocked[run.name] = f"{needed.name}, which is {state.kind}"
        return state.kind == "done"

    def _budget_is_spent(self, run: PlannedRun) -> bool:
        budget = self._plan.study.budget
        begun = [other for other in self._plan.runs if state_of(other).kind != "waiting"]
        if run in begun:  # it is only continued
            return False
        if budget.runs is not None and len(begun) >= budget.runs:
            return True
        return budget.hours is not None and hours_of(begun) >= budget.hours

    def _gpus(self, run: PlannedRun, slot: int) -> list[int]:
        gpus = self._plan.study.gpus
        if gpus is None:
            return []
        return [(slot * run.ranks + rank) % gpus for rank in range(run.ranks)]

    def _end_children(self) -> None:
        """After an error: ask them to end, and kill those that do not."""
        for child in self._children:
            child.stop()
        end = time.monotonic() + (0.0 if self._signals > 1 else _GRACE_S)
        while time.monotonic() < end and any(child.ended() is None for child in self._children):
            time.sleep(_LOOK_S)
        for child in self._children:
            child.kill()

    def _settle_ended(self) -> None:
        for child in list(self._children):
            code = child.ended()
            if code is not None:
                self._children.remove(child)
                self._settle(child, code)

    def _settle(self, child: Child, code: int) -> None:
        """Write down how a run has ended, or let it wait for its next attempt."""
        run = child.run
        if code == 0 and is_complete(run):
            mark_done(run)
            self._note(f"{run.name}: done")
            self._settled()
            return
        if self.stopped:  # if it has failed besides, it will again
            return
        if code == 0:
            step = _last_step(run)
            if step > self._steps_at_start[run.index]:  # somebody else stopped it
                self._waiting.appendleft(run)
            else:
                self._fail(run, f"ended at step {step} of {run.steps}; see {child.log}")
            return
        error = last_error(child.log, code, child.log_start)
        if code == 2 and " is in use by " in error:  # a process was faster
            self._held[run.index] = time.monotonic() + _HELD_S
            self._waiting.append(run)
        elif NOT_FINITE in error:
            mark_done(run, "not finite", error)
            self._note(f"{run.name}: ended, a number is not finite: {error}")
            self._settled()
        else:
            self._fail(run, error)

    def _fail(self, run: PlannedRun, error: str) -> None:
        self.failed[run.name] = error
        run.run_dir.mkdir(parents=True, exist_ok=True)
        mark_failed(run, error)
        self._note(f"{run.name}: failed: {error}")

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        before: dict[int, Any] = {}
        for number in map(int, _SIGNALS):
            before[number] = signal.signal(number, self._asked)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signals += 1
        for child in self._children:
            child.stop()


def raise_if_failed(runner: Runner) -> None:
    """RunFailed with the name and last error of each run that failed, and the runs that lack their
    weights.
    """
    parts = []
    if runner.failed:
        each = "; ".join(f"{name} ({error})" for name, error in runner.failed.items())
        parts.append(
            f"{len(runner.failed)} run{'' if len(runner.failed) == 1 else 's'} failed: {each}"
        )
    if runner.blocked:
        lacks = ", ".join(dict.fromkeys(runner.blocked.values()))
        parts.append(f"{len(runner.blocked)} lack the weights of {lacks}")
    if parts:
        raise RunFailed(
            f"{'; '.join(parts)}; look at log.txt in the run's directory; the same command tries "
            "again"
        )


def _last_step(run: PlannedRun) -> int:
    """The last step in a run's metrics; -1: there is none."""
    records = last_records(run.run_dir / METRICS_FILE)
    return records[-1]["step"] if records else -1
