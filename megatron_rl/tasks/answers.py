"""The answers of `generate`: sampled on all ranks, then shown or written in the order of the
prompts.
"""

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

#: One line of the output.
Row = dict[str, Any]


def check_output(path: Path) -> None:
    """Raise UserError if the file exists or its directory does not."""
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
    """Answer every prompt. Each data-parallel rank answers its share, a batch at a time, so that
    the first answers show early. A collective.

    Args:
        session: the run.
        engine: generates the answers.
        prompts: all of them, on every rank.
        settings: how answers are sampled, and how many to a prompt.
        output: a new file for JSON lines, one an answer (see `rows_of`); None: show prompts and
            answers as text.

    Raises:
        UserError: the file cannot be written; on all ranks.
        Stopped: a signal asked the run to stop; the lines in the file are whole.
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
    """One object for each answer: the prompt's record and the answer's number (both from 0), prompt
    and completion as text, token ids, whether it ended with a stop token, and its log-probability,
    nats. In a conversation tokens and log-probability cover what the model wrote.
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
