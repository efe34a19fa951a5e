"""What a run shows: one line a step, and on a terminal a progress bar with the phase and the
time left."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TextIO, cast

from megatron_rl.errors import RunFailed
from megatron_rl.files import reason
from megatron_rl.observe.metric_table import split_part

_Format = Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _norm(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.1e}"


#: metric, label before, format, width of the value in characters, label after
_COLUMNS: tuple[tuple[str, str, _Format, int, str], ...] = (
    ("reward/mean", "reward ", "{:.3f}".format, 6, ""),
    ("reward/solved", "solved ", _percent, 6, ""),
    ("loss", "loss ", "{:.4f}".format, 7, ""),
    ("accuracy", "accuracy ", _percent, 6, ""),
    ("grad_norm", "grad ", _norm, 7, ""),
    ("router/raw_gamma_mean", "raw gamma ", "{:.4f}".format, 6, ""),
    ("clip_fraction", "clip ", _percent, 6, ""),
    ("entropy", "entropy ", "{:.3f}".format, 5, ""),
    ("tokens_per_second", "", "{:.0f}".format, 6, " tok/s"),
    ("time/step_s", "", "{:.2f}".format, 6, " s/step"),
)


def step_line(step: int, total_steps: int | None, metrics: Mapping[str, float]) -> str:
    """The line of a step: the columns that ``metrics`` holds, in a fixed order and width; "nan"
    where a value is missing."""
    total = "" if not total_steps else f"/{total_steps}"
    width = len(str(total_steps or step))
    cells = [f"step {step:>{width}}{total}"]
    for name, before, form, size, after in _COLUMNS:
        if name in metrics:
            cells.append(f"{before}{_cell(metrics[name], form):>{size}}{after}")
    return "  ".join(cells)


def eval_line(step: int, metrics: Mapping[str, float], total_steps: int | None = None) -> str:
    """The line of an evaluation: greedy pass@1, mean@k, well-formed answers, other parts of the
    reward, problems and seconds."""
    k = metrics.get("eval/samples", math.nan)
    cells = [f"eval at step {step:>{len(str(total_steps or step))}}"]
    for name, label in (
        ("eval/pass@1", "pass@1"),
        ("eval/mean@k", "mean@k" if math.isnan(k) else f"mean@{k:.0f}"),
        ("eval/well_formed", "well-formed"),
    ):
        if name in metrics:
            cells.append(f"{label} {_cell(metrics[name], _percent):>6}")
    for name in sorted(metrics):
        part = split_part(name)
        if part is not None and part[0] == "eval":
            cells.append(f"{part[1]} {_cell(metrics[name], '{:.3f}'.format)}")
    if "eval/problems" in metrics:
        cells.append(f"{metrics['eval/problems']:.0f} problems")
    if "time/eval_s" in metrics:
        cells.append(f"{metrics['time/eval_s']:.1f} s")
    return "  ".join(cells)


def _cell(value: float | None, form: _Format) -> str:
    return "nan" if value is None or math.isnan(value) else form(value)


class SilentConsole:
    """The same interface, showing nothing: for every rank but 0."""

    def run_summary(self, facts: Mapping[str, object]) -> None:
        """Show what is about to run, a line a fact."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step."""

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show an evaluation."""

    def note(self, text: str) -> None:
        """Show a line."""

    def warn(self, text: str) -> None:
        """Show a warning, on stderr when there is no progress display."""

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        """Name what is going on now, such as ``phase("rollout", 128, 256)``; only the progress
        display shows it."""

    def confirm(self) -> None:
        """Called by verbs that print their result. RunFailed: some of it could not be written."""

    def __enter__(self) -> SilentConsole:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class Console(SilentConsole):
    """The console of rank 0; a context manager. ``auto`` is rich on a terminal and plain lines
    elsewhere."""

    def __init__(
        self,
        kind: Literal["auto", "rich", "plain"],
        verb: str,
        total_steps: int | None = None,
        start_step: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """total_steps: None where the verb has no steps; start_step: steps done before (resume);
        stream: stdout."""
        self._stream = steady = _Steady(sys.stdout if stream is None else stream)
        self._total = total_steps
        rich = kind == "rich" or (kind == "auto" and steady.isatty())
        self._display: _PlainDisplay | _RichDisplay
        if rich:
            self._display = _RichDisplay(
                verb, total_steps, start_step, steady, force=kind == "rich"
            )
        else:
            self._display = _PlainDisplay(steady)

    def run_summary(self, facts: Mapping[str, object]) -> None:
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self._display.line(f"{name:<{width}}  {value}", "bold")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._display.line(step_line(step, self._total, metrics), "")
        self._display.advance(step)

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._display.line(eval_line(step, metrics, self._total), "bold green")

    def note(self, text: str) -> None:
        self._display.line(text, "")

    def warn(self, text: str) -> None:
        self._display.warning(f"warning: {text}")

    def phase(self, name: str, done: int | None = None, total: int | None = None) -> None:
        count = "" if done is None else f" {done}" if total is None else f" {done}/{total}"
        self._display.phase(name + count)

    def confirm(self) -> None:
        failure = self._stream.failure
        if failure is not None:
            raise RunFailed(
                f"the result could not be shown in full ({reason(failure)}); expected room for "
                "it; make room and give the command again"
            )

    def __enter__(self) -> Console:
        self._display.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._display.stop()


class _Steady:
    """A stream that keeps errors of writing and does not raise them (a log on a full disk, a pipe
    without a reader): a lost line is no reason to lose a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None  #: the first error, except a pipe without a reader

    def write(self, text: str) -> int:
        """Write to the stream, if that is possible."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failure = self.failure or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _PlainDisplay:
    """Lines, flushed one by one: for log files and pipes."""

    def __init__(self, stream: _Steady) -> None:
        self._stream = stream

    def line(self, text: str, style: str) -> None:
        print(text, file=self._stream, flush=True)

    def warning(self, text: str) -> None:
        print(text, file=_Steady(sys.stderr), flush=True)

    def advance(self, step: int) -> None:
        """Nothing to move."""

    def phase(self, text: str) -> None:
        """A log stays at one line a step."""

    def start(self) -> None:
        """Nothing to open."""

    def stop(self) -> None:
        """Nothing to close."""


class _RichDisplay:
    """Lines above a progress bar: steps done, time left, current phase."""

    def __init__(
        self, verb: str, total_steps: int | None, start_step: int, stream: _Steady, force: bool
    ) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[phase]}", markup=True),
            # Besides write and flush, rich reaches the stream through _Steady.__getattr__.
            console=RichConsole(
                file=cast("TextIO", stream), force_terminal=True if force else None
            ),
            transient=True,
        )
        self._task = self._progress.add_task(
            verb, total=total_steps, completed=start_step, phase=""
        )

    def line(self, text: str, style: str) -> None:
        self._print(text, style)

    def warning(self, text: str) -> None:
        self._print(text, "yellow")

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def phase(self, text: str) -> None:
        from rich.markup import escape

        self._progress.update(self._task, phase=escape(text))

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def _print(self, text: str, style: str) -> None:
        options: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
        self._progress.console.print(text, style=style or None, **options)


def progress(shown: bool) -> Callable[[Iterable[Any], int, str], Iterable[Any]]:
    """A function that passes items on and shows a bar of how many there were, on stderr.

    ``shown`` False, or no terminal: nothing is shown.
    """

    def watch(items: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        from rich.console import Console as RichConsole
        from rich.progress import track

        console = RichConsole(stderr=True)
        hidden = not (shown and console.is_terminal)
        return track(items, text, total, console=console, disable=hidden)

    return watch
