"""Which checkpoint a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, TypeVar

from megatron_rl.checkpoint.directory import newest_first
from megatron_rl.checkpoint.manifest import Damaged
from megatron_rl.errors import UserError
from megatron_rl.training.session import Session

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
