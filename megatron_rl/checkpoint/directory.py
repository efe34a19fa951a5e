"""The directory of checkpoints: names, publishing, the newest one, and which are deleted.

    checkpoints/
      latest               "step_20": the checkpoint published last
      step_10/  step_20/   complete checkpoints
      .step_30.partial/    being written, or left behind by a run that was killed
      .step_20.replaced/   complete; there for the moment in which step 20 is saved again
      .step_5.deleted/     being deleted

A directory gets its final name by one rename, after all its files are on the disk: what is called
step_N is complete.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_rl.checkpoint.manifest import MANIFEST, score_of, step_named
from megatron_rl.errors import UserError
from megatron_rl.files import read_bounded, write_whole

LATEST = "latest"


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"step_{step}"


def _hidden(root: Path, name: str, state: str) -> Path:
    return root / f".{name}.{state}"


def complete_checkpoints(root: Path) -> dict[int, Path]:
    """The complete checkpoints of a directory, by increasing step; empty if it does not exist."""
    found: dict[int, Path] = {}
    if root.is_dir():
        for path in sorted(root.iterdir()):  # ".step_N.replaced" comes before "step_N"
            step = step_named(path.name)
            if step is not None and (path / MANIFEST).is_file():
                found[step] = path
    return dict(sorted(found.items()))


def newest_first(root: Path) -> list[Path]:
    """All complete checkpoints: the one that ``latest`` names, then by decreasing step."""
    complete = complete_checkpoints(root)
    try:
        named = read_bounded(root / LATEST, 100).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):  # it only saves a look at the names
        named = ""
    step = step_named(named)
    last = None if step is None else complete.get(step)
    others = [path for path in reversed(complete.values()) if path != last]
    return others if last is None else [last, *others]


def newest_checkpoint(root: Path) -> Path | None:
    """The first of `newest_first`."""
    return next(iter(newest_first(root)), None)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run or of a checkpoints directory.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    found = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    if found is None:
        state = "holds no complete checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {state}; expected a run directory, its checkpoints directory or a step_N "
            "in it; check the path"
        )
    return found


def begin(root: Path, step: int) -> Path:
    """An empty directory for the files of a step; tidies up after killed runs. One rank only."""
    root.mkdir(parents=True, exist_ok=True)
    for replaced in root.glob(".step_*.replaced"):
        final = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not final.exists():
            os.rename(replaced, final)
    _remove(root, "partial", "replaced", "deleted")
    partial = _hidden(root, f"step_{step}", "partial")
    partial.mkdir()
    return partial


def publish(root: Path, step: int, keep: int, keep_best: int = 0) -> Path:
    """Name the finished directory, update ``latest``, delete all but the newest ``keep`` and the
    ``keep_best`` of the highest score. One rank only.
    """
    final = step_directory(root, step)
    partial = _hidden(root, final.name, "partial")
    for directory, _, _ in os.walk(partial, topdown=False):
        _sync_directory(Path(directory))
    if final.exists():  # the same step again, after resuming from it or from an older one
        os.rename(final, _hidden(root, final.name, "replaced"))
    os.rename(partial, final)
    _sync_directory(root)
    _write_latest(root, final.name)
    complete = complete_checkpoints(root)
    others = [path for path in complete.values() if path != final]
    best = _best(complete, keep_best)
    for path in others[: max(0, len(others) - (keep - 1))]:
        if path not in best:
            # Renamed first, so that none is seen half deleted.
            os.rename(path, _hidden(root, path.name, "deleted"))
    _remove(root, "replaced", "deleted")
    return final


def _best(complete: dict[int, Path], count: int) -> list[Path]:
    """Those of the highest score; of equal ones the later."""
    scores = {step: score_of(path) for step, path in complete.items()} if count else {}
    ranked = sorted((score, step) for step, score in scores.items() if score is not None)
    return [complete[step] for _, step in reversed(ranked[-count:])] if ranked else []


def _write_latest(root: Path, name: str) -> None:
    write_whole(root / LATEST, name + "\n")
    _sync_directory(root)


def _remove(root: Path, *states: str) -> None:
    for state in states:
        for path in root.glob(f".step_*.{state}"):
            if path.is_symlink() or not path.is_dir():  # not what this package has left there
                path.unlink()
            else:
                shutil.rmtree(path)


def _sync_directory(path: Path) -> None:
    """Write a directory's entries (its names, not its files) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
