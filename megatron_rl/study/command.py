"""The verb ``study``: what each of its flags does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rl.errors import UserError
from megatron_rl.files import written_for_the_user
from megatron_rl.report.run_page import duration
from megatron_rl.run.run_lock import RunLock
from megatron_rl.study import slurm
from megatron_rl.study.analysis import Analysis, analyse, write_files
from megatron_rl.study.child import MakeCommand, command_of
from megatron_rl.study.forked import ForkServer
from megatron_rl.study.page import write_study_page
from megatron_rl.study.plan import Plan, make_plan
from megatron_rl.study.runner import Runner, raise_if_failed, slots_of
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import state_of
from megatron_rl.study.table import Display, progress_lines, result_lines, time_left

MakeForks = Callable[[Callable[[str], None]], ForkServer]
#: More lines than a study has runs.
_ALL = 1 << 30
#: Seconds between two writings of the results while runs go on.
_WRITE_EVERY_S = 60.0


def run_study(
    path: Path,
    *,
    quick: bool = False,
    status: bool = False,
    report: bool = False,
    only: int | None = None,
    launch: str | None = None,
    at_once: int | None = None,
    make_command: MakeCommand = command_of,
    make_forks: MakeForks = ForkServer,
) -> None:
    """Run a study, or say how far it is.

    Args:
        path: the study file.
        quick: fewer seeds and steps, in STUDY_DIR/quick.
        status: show the state of each run, and end.
        report: write the results so far and show the table, and end.
        only: run the one with this index, and end.
        launch: local or slurm, in place of the file's.
        at_once: runs side by side, in place of the file's.
        make_command: a run's command.
        make_forks: what saves runs their imports (``fork``).

    Raises:
        UserError: a mistake in the file, a configuration or a flag. RunFailed: runs have failed.
    """
    asked = [name for name, given in _modes(status, report, only).items() if given]
    if len(asked) > 1:
        raise UserError(f"study: found {' and '.join(asked)}; expected one of them; leave one out")
    for name, number, least in (("--only", only, 0), ("--at-once", at_once, 1)):
        if number is not None and number < least:
            raise UserError(f"{name} is {number}; expected at least {least}")
    plan = make_plan(read_study(path), quick)
    slots = slots_of(plan, at_once)
    if status:
        _show_status(plan, slots)
    elif report:
        _write(plan, print)
    elif only is not None:
        _run_one(plan, only, make_command)
    elif (launch or plan.study.launch) == "slurm":
        words = ["study", str(path), *(["--quick"] if quick else [])]
        with written_for_the_user("the batch file", "make room, or set study_dir"):
            print("\n".join(slurm.submit(plan, words, at_once)))
    else:
        _run_all(plan, slots, make_command, make_forks)


def _modes(status: bool, report: bool, only: int | None) -> dict[str, bool]:
    return {"--status": status, "--report": report, "--only": only is not None}


def _show_status(plan: Plan, slots: int) -> None:
    states = {run.index: state_of(run) for run in plan.runs}
    print("\n".join(progress_lines(plan, states, slots, most=_ALL)))


def _run_one(plan: Plan, index: int, make_command: MakeCommand) -> None:
    if index >= len(plan.runs):
        raise UserError(f"--only is {index}; expected the index of a run, below {len(plan.runs)}")
    runner = Runner(plan, [plan.runs[index]], 1, make_command=make_command, note=_print)
    runner.run()
    raise_if_failed(runner)


def _run_all(plan: Plan, slots: int, make_command: MakeCommand, make_forks: MakeForks) -> None:
    """Run what is left, one study at a time in its directory; then the table and the page."""
    lock = RunLock(plan.folder, _print, "study_dir")
    lock.acquire()
    try:
        with contextlib.ExitStack() as stack:
            display = stack.enter_context(Display(plan, slots))
            display.note(_begin(plan, slots))
            forks = stack.enter_context(make_forks(display.note)) if plan.study.fork else None
            runner = Runner(
                plan,
                plan.runs,
                slots,
                make_command=make_command,
                note=display.note,
                show=display.show,
                confirm=lock.confirm,
                settled=_Writer(plan, display.note).now_and_then,
                forks=forks,
            )
            runner.run()
        if runner.stopped:
            print("stopped; run the same command to continue")
        _write(plan, _print)
        raise_if_failed(runner)
    finally:
        lock.release()


def _begin(plan: Plan, slots: int) -> str:
    states = {run.index: state_of(run) for run in plan.runs}
    done = sum(state.finished for state in states.values())
    left = time_left(plan, states, slots)
    arms, seeds = len(plan.arms), len(plan.seeds)
    measured = sum(1 for _ in plan.of_arms())
    prepared = len(plan.runs) - measured
    most = "" if measured == arms * seeds else "up to "
    text = f"{plan.folder}: {arms} arms x {most}{seeds} seeds"
    text += f" and {prepared} prepared" if prepared else ""
    text += f", {done} of {len(plan.runs)} runs done, {slots} at once"
    return text + ("" if left is None else f"; about {duration(left)} left")


class _Writer:
    """Keeps the files of the results fresh while runs go on."""

    def __init__(self, plan: Plan, note: Callable[[str], None]) -> None:
        self._plan, self._note = plan, note
        self._written = -_WRITE_EVERY_S

    def now_and_then(self) -> None:
        """Write them, if that is some time ago. An error is noted; the runs are not concerned."""
        if time.monotonic() - self._written < _WRITE_EVERY_S:
            return
        self._written = time.monotonic()
        try:
            _write_files(self._plan)
        except (OSError, UserError) as error:
            self._note(f"warning: the results so far could not be written: {error}")


def _write_files(plan: Plan) -> tuple[Analysis, Path]:
    plan.folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(plan)
    write_files(analysis)
    return analysis, write_study_page(analysis)


def _write(plan: Plan, show: Callable[[str], None]) -> None:
    """Write the files of the results so far, and show the table."""
    with written_for_the_user("the results", "make room and give the command with --report"):
        analysis, page = _write_files(plan)
    for line in result_lines(analysis):
        show(line)
    show(str(page))


def _print(text: str) -> None:
    print(text, flush=True)
