"""The lines of the console."""

import io
import os

import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.observe.console import Console, SilentConsole, eval_line, step_line

METRICS = {
    "step": 7,
    "reward/mean": 0.4321,
    "reward/solved": 0.3125,
    "loss": -0.01234,
    "grad_norm": 0.5178,
    "router/raw_gamma_mean": 0.99312,
    "clip_fraction": 0.0213,
    "entropy": 1.2,
    "tokens_per_second": 12345.6,
    "time/step_s": 2.314,
    "memory/peak_gib": 1.0,
}
LINE = (
    "step   7/300  reward  0.432  solved  31.2%  loss -0.0123  grad   0.518  raw gamma 0.9931  "
    "clip   2.1%  entropy 1.200   12346 tok/s    2.31 s/step"
)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_step_line():
    assert step_line(7, 300, METRICS) == LINE
    assert step_line(7, None, {"loss": float("nan")}) == "step 7  loss     nan"
    assert step_line(7, 10, {"loss": 2.0, "accuracy": 0.5, "time/step_s": 1.0}) == (
        "step  7/10  loss  2.0000  accuracy  50.0%    1.00 s/step"
    )


@pytest.mark.parametrize(("norm", "text"), [(999.9, "999.900"), (12345.0, "1.2e+04")])
def test_gradient_norms_of_any_size_keep_the_columns(norm, text):
    assert step_line(1, None, {"grad_norm": norm}) == f"step 1  grad {text}"


def test_eval_line():
    metrics = {"eval/pass@1": 0.432, "eval/mean@k": 0.38, "eval/samples": 4, "eval/problems": 512}
    assert eval_line(0, metrics) == "eval at step 0  pass@1  43.2%  mean@4  38.0%  512 problems"
    without_solved = {"eval/format": 0.75, "eval/problems": 16, "eval/samples": 4}
    assert eval_line(3, without_solved) == "eval at step 3  format 0.750  16 problems"
    assert eval_line(9, {"eval/pass@1": 1.0, "time/eval_s": 3.04}, total_steps=300) == (
        "eval at step   9  pass@1 100.0%  3.0 s"
    )


def test_plain_is_one_line_a_step_and_warnings_go_to_stderr(capsys):
    stream = io.StringIO()
    with Console("auto", "train", total_steps=300, stream=stream) as console:
        console.run_summary({"model": "tiny", "world": 2})
        console.phase("rollout", 128, 256)
        console.step(7, METRICS)
        console.note("saved [step 7]")
        console.eval(7, {"eval/pass@1": 0.5})
        console.warn("slow")
    assert stream.getvalue().splitlines() == [
        "model  tiny",
        "world  2",
        LINE,
        "saved [step 7]",
        "eval at step   7  pass@1  50.0%",
    ]
    assert capsys.readouterr().err == "warning: slow\n"


@pytest.mark.parametrize(("kind", "stream"), [("auto", _Terminal()), ("rich", io.StringIO())])
def test_rich_shows_lines_progress_and_phase(kind, stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Console(kind, "train", total_steps=300, start_step=6, stream=stream) as console:
        console.phase("rollout [x]", 128, 256)
        console.step(7, METRICS)
        console.warn("slow [/bold]")
        task = console._display._progress.tasks[0]
        assert (task.completed, task.total, task.fields["phase"]) == (
            7,
            300,
            r"rollout \[x] 128/256",
        )
        console._display._progress.refresh()
    shown = stream.getvalue()
    assert LINE in shown  # not wrapped at 120 columns
    assert "warning: slow [/bold]" in shown and "7/300" in shown and "rollout [x] 128/256" in shown


def test_plain_on_a_terminal_when_asked():
    stream = _Terminal()
    with Console("plain", "train", total_steps=300, stream=stream) as console:
        console.step(7, METRICS)
    assert stream.getvalue() == LINE + "\n"


def test_silent_console_has_the_whole_interface_and_shows_nothing(capsys):
    public = {name for name in dir(Console) if not name.startswith("_")}
    assert public == {name for name in dir(SilentConsole) if not name.startswith("_")}
    with SilentConsole() as console:
        console.run_summary({"a": 1})
        console.step(1, METRICS)
        console.eval(1, {})
        console.phase("rollout", 1, 2)
        console.note("n")
        console.warn("w")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_log_that_cannot_be_written_ends_nothing(kind, capsys):
    with open("/dev/full", "w") as full:
        with Console(kind, "train", total_steps=5, stream=full) as console:
            console.run_summary({"model": "tiny"})
            console.step(1, {"loss": 1.0})
            console.note("x" * 100_000)
            console.warn("disk full")
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
    assert ("warning: disk full" in capsys.readouterr().err) == (kind == "plain")


def test_a_result_that_could_not_be_shown_is_a_failure_where_it_is_asked():
    """A run goes on without its log; ``generate`` and ``evaluate`` have nothing else."""
    with open("/dev/full", "w") as full:
        console = Console("plain", "generate", stream=full)
        console.note("an answer")
        with pytest.raises(RunFailed) as told:
            console.confirm()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # so that it can be closed
    assert str(told.value) == (
        "the result could not be shown in full (No space left on device); expected room for it; "
        "make room and give the command again"
    )
    fine = Console("plain", "generate", stream=io.StringIO())
    fine.note("an answer")
    fine.confirm()
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    pipe = open(writing, "w")
    console = Console("plain", "generate", stream=pipe)
    console.note("an answer")
    console.confirm()
    os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # so that it can be closed
    pipe.close()
