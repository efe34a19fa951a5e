"""Reading and cutting the JSONL files of a run directory."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.config.on_resume import Change, changes
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole
from megatron_rl.observe.configurations import (
    CONFIG_FILE,
    Configuration,
    read_configurations,
)
from megatron_rl.observe.metric_table import split_layer

#: No run has more.
MOST_STEPS = 1 << 53
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
COMPARISON_FILE = "comparison.html"
COMPARISON_PLOTS = "comparison_plots"
EVALUATED = "eval/problems"  #: a metric of every evaluation


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file whose every object has a ``step``, an integer from 0.

    A last line that is not complete JSON (the writer was killed) is left out. UserError: any
    other line is not an object.
    """
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except BadJson:
            if number == len(lines):
                break
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not 0 <= step < MOST_STEPS:
            raise UserError(
                f"{path} line {number} holds {line[:60].decode(errors='replace')!r}; expected a "
                f"JSON object with an integer "
                f"'step'; delete that line"
            )
        records.append(record)
    return records


def drop_after(path: Path, step: int) -> int | None:
    """Drop the records with a step above ``step``, and a torn last line; the last step left,
    None where none is.

    The file is cut where the first of them begins, which needs no room on the disk; where records
    that stay are behind it, or the last has no newline, it is replaced in one rename. A crash
    leaves the old file or the new one. A missing file stays missing. OSError: it is no file, such
    as a pipe, which would be waited for.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    records, content = read_jsonl(path), path.read_bytes()
    kept = [record for record in records if record["step"] <= step]
    lines = [line + b"\n" for line in content.split(b"\n") if line.strip()][: len(kept)]
    whole = b"".join(lines)
    if kept == records[: len(kept)] and content.startswith(whole):
        os.truncate(path, len(whole))
    else:
        write_whole(path, "".join(to_json_line(record) for record in kept))
    return max((record["step"] for record in kept), default=None)


def last_evaluated(run_dir: Path, step: int) -> bool | None:
    """Whether the record of a step holds an evaluation; None where there is no such record.

    UserError: a line that is not the last is no object.
    """
    path = run_dir / METRICS_FILE
    records = read_jsonl(path) if path.is_file() else []
    found = [EVALUATED in record for record in records if record["step"] == step]
    return found[-1] if found else None


def to_json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities, which JSON cannot hold, become null at any
    depth."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@dataclass(frozen=True)
class Run:
    """What a run directory holds, for the report."""

    directory: Path
    config: Mapping[str, Any]
    config_text: str
    records: tuple[Mapping[str, Any], ...]  #: metrics.jsonl, at least one, by step
    samples: tuple[Mapping[str, Any], ...]  #: samples.jsonl; may be empty
    configurations: tuple[Configuration, ...] = ()  #: those that steps were done under, by step

    def over_time(self, text: Callable[[Mapping[str, Any]], str]) -> str:
        """What ``text`` makes of the configurations, each with its first step where it differs from
        the one before: ``rspo; from step 41: grpo``."""
        shown = [text(self.configurations[0].values if self.configurations else self.config)]
        parts = list(shown)
        for configuration in self.configurations[1:]:
            line = text(configuration.values)
            if line != shown[-1]:
                shown.append(line)
                parts.append(f"from step {configuration.first_step}: {line}")
        return "; ".join(parts)

    def changes(self) -> list[tuple[int, list[Change]]]:
        """The first step of every configuration but the first, and what it changed."""
        pairs = zip(self.configurations, self.configurations[1:], strict=False)
        return [(new.first_step, changes(old.values, new.values)) for old, new in pairs]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric where it has a finite value; two empty lists where it
        never has."""
        pairs = [(r["step"], r[name]) for r in self.records if _is_number(r.get(name))]
        return [step for step, _ in pairs], [float(value) for _, value in pairs]

    def layer_series(self, name: str) -> dict[int, tuple[list[int], list[float]]]:
        """``series`` of every ``name/layer_NN`` that has values, by layer."""
        keys = {key for record in self.records for key in record}
        found = {}
        for key in keys:
            layered = split_layer(key)
            if layered and layered[0] == name and self.series(key)[0]:
                found[layered[1]] = self.series(key)
        return dict(sorted(found.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(run_dir: Path) -> Run:
    """Read config.yaml, metrics.jsonl and, where there is one, samples.jsonl. UserError:
    missing, empty or malformed."""
    run_dir = Path(run_dir)
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (run_dir / name).is_file():
            raise UserError(
                f"{run_dir} holds no {name}; expected the directory of a run; pass the run_dir of "
                f"its config"
            )
    records = read_jsonl(run_dir / METRICS_FILE)
    if not records:
        raise UserError(
            f"{run_dir / METRICS_FILE} is empty; expected one object a step; let the run finish a "
            f"step first"
        )
    config, _ = read_yaml(run_dir / CONFIG_FILE)
    text = (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
    samples_path = run_dir / SAMPLES_FILE
    samples = read_jsonl(samples_path) if samples_path.is_file() else []
    ordered = tuple(sorted(records, key=lambda record: record["step"]))
    last = ordered[-1]["step"]
    done_under = [c for c in read_configurations(run_dir) if c.first_step <= last]
    return Run(run_dir, config, text, ordered, tuple(samples), tuple(done_under))


def runs_among(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Of what ``report RUNS/*`` is given: the runs, each once, and the comparisons of runs that it
    has written there itself.
    """
    own = (COMPARISON_FILE, COMPARISON_PLOTS)
    runs: dict[Path, Path] = {}
    written: list[Path] = []
    for path in paths:
        if path.name in own and not (path / METRICS_FILE).exists():
            written.append(path)
        else:
            runs.setdefault(path.resolve(), path)
    return list(runs.values()), written
