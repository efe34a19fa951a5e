"""The configurations of a run, each with the first step it was in force.

RUN_DIR/
  config.yaml            the newest
  configs/step_0.yaml    in force from step 0 (the evaluation before the first step) on
  configs/step_41.yaml   in force from step 41 on
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.config.load import dump_config, written_values
from megatron_rl.config.on_resume import Change, changes
from megatron_rl.config.schema import Config
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.files import move_aside, write_whole

CONFIG_FILE = "config.yaml"
CONFIGS_DIR = "configs"


@dataclass(frozen=True)
class Configuration:
    """A resolved configuration that was in force."""

    first_step: int
    values: Mapping[str, Any]
    text: str


def read_configurations(run_dir: Path) -> list[Configuration]:
    """The configurations of a run, by first step; empty: none is known. A run of an older version
    has only config.yaml, which counts for all its steps.

    Raises:
        UserError: a file is no YAML.
    """
    files = _copies(run_dir)
    if not files and (run_dir / CONFIG_FILE).is_file():
        files = {0: run_dir / CONFIG_FILE}
    found = []
    for first_step, path in sorted(files.items()):
        values, _ = read_yaml(path)
        if values:  # empty: it could not be written on a full disk
            found.append(Configuration(first_step, values, path.read_text(encoding="utf-8")))
    return found


def configuration_at(run_dir: Path, step: int) -> Configuration | None:
    """The one in force at a step; None: not known. UserError: as `read_configurations`."""
    return next((c for c in reversed(read_configurations(run_dir)) if c.first_step <= step), None)


def changes_since(run_dir: Path, step: int, config: Config) -> list[Change] | None:
    """How a configuration differs from the one in force at a step; None: that one is not known."""
    before = configuration_at(run_dir, step)
    return None if before is None else changes(before.values, written_values(config))


def keep_configuration(run_dir: Path, config: Config, resume_step: int | None) -> int:
    """Write config.yaml, and a copy in configs/ if a key has changed that is not silent.

    A new run (``resume_step`` None) moves the configurations of an old run aside. A run that
    resumes deletes the configurations of the steps that it does again.

    Returns:
        The first step of the configuration now in force.

    Raises:
        OSError: a file cannot be written. UserError: one cannot be read.
    """
    folder, text = run_dir / CONFIGS_DIR, dump_config(config)
    if resume_step is None:
        move_aside(folder if folder.is_dir() else run_dir / CONFIG_FILE)
        first_step, kept = 0, None
    else:
        kept = configuration_at(run_dir, resume_step)
        same = kept is not None and not changes(kept.values, written_values(config))
        first_step = kept.first_step if kept is not None and same else resume_step + 1
    folder.mkdir(exist_ok=True)
    for step, path in _copies(run_dir).items():
        if step > (resume_step or 0):
            path.unlink()
    if kept is not None and kept.first_step not in _copies(run_dir):  # of an older version
        write_whole(folder / f"step_{kept.first_step}.yaml", kept.text)
    if kept is None or first_step != kept.first_step:
        write_whole(folder / f"step_{first_step}.yaml", text)
    write_whole(run_dir / CONFIG_FILE, text)
    return first_step


def _copies(run_dir: Path) -> dict[int, Path]:
    """First step -> file, below configs/."""
    return {
        int(match[1]): path
        for path in (run_dir / CONFIGS_DIR).glob("step_*.yaml")
        if (match := re.fullmatch(r"step_(\d+)\.yaml", path.name))
    }
