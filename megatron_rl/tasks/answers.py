"""Answers of `generate`: sampled over all ranks, shown or written in the order of the prompts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

from megatron_rl.errors import UserError
from megatron_rl.files import written_for_the_user
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.records import Prompt, RolloutGroup
from megatron_rl.rollout.engine import Engine, SamplingSettings
from megatron_rl.tasks.task_session import TaskSession

#: A line of the output.
Row = dict[str, Any]


def check_output(path: Path) -> None:
    """UserError: the file is there already, or its directory is not."""
    if path.exists() or path.is_symlink():
        raise UserError(f"--output {path} exists; expected a new file; name another, or move it")
    if not path.parent.is_dir():
        raise UserError(
            f"--output {path}: there is no directory {path.parent}; expected one; make it, or "
            "correct the path"
        )


def answer(
    session: TaskSession,
    engine: Engine,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    output: Path | None,
) -> None:
    """Answer every prompt, each data-parallel rank its share; some at a time, so that what there is
    is seen before all is done. A collective.

    Args:
        session: the run.
        engine: generates the answers.
        prompts: all of them, on every rank.
        settings: how answers are drawn, and how many to a prompt.
        output: a new file for JSON lines, an answer each (see `rows_of`); None: prompts and answers
            are shown as text.

    Raises:
        UserError: the file cannot be written; on all ranks.
        Stopped: a signal asked for it; whole lines are in the file.
    """
    data = session.groups.data
    at_once = max(1, session.config.rollout.max_batch // settings.samples) * data.size()
    write = _writer(session, output)
    for start in range(0, len(prompts), at_once):
        some = prompts[start : start + at_once]
        mine = engine.generate(some[data.rank() :: data.size()], settings)
        everyone = gather_objects([rows_of(group) for group in mine], data)
        rows = [
            row
            for number in range(len(some))
            for row in everyone[number % data.size()][number // data.size()]
        ]
        collective_try(session.groups.world, partial(write, rows))


def rows_of(group: RolloutGroup) -> list[Row]:
    """An object for each answer: the prompt's record (from 0) and the answer's number, what the
    model saw and wrote, its tokens, whether it ended by itself, and its log-probability, nats; of
    a conversation those that the model wrote.
    """
    return [
        {
            "index": group.prompt.index,
            "sample": number,
            "prompt": group.prompt.text,
            "completion": completion.text,
            "tokens": completion.num_written,
            "finished": completion.finished,
            "logprob": float(completion.written_logprobs.sum()),
        }
        for number, completion in enumerate(group.completions)
    ]


def _writer(session: TaskSession, output: Path | None) -> Callable[[Sequence[Row]], None]:
    if output is not None:
        return partial(_append, session, output)

    def show(rows: Sequence[Row]) -> None:
        for row in rows:
            session.console.note(f"{row['prompt']}{row['completion']}")

    return show


def _append(session: TaskSession, output: Path, rows: Sequence[Row]) -> None:
    if not session.is_main:
        return
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with written_for_the_user(f"--output {output}", "make room, or name another file"):
        with output.open("a", encoding="utf-8") as file:
            file.write(text)
