"""What the report reads of a run directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_rl.config.on_resume import Change, changes
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.errors import UserError
from megatron_rl.observe.configurations import (
    CONFIG_FILE,
    Configuration,
    read_configurations,
)
from megatron_rl.observe.metric_table import split_layer, with_new_names
from megatron_rl.observe.run_files import METRICS_FILE, SAMPLES_FILE, read_jsonl

COMPARISON_FILE = "comparison.html"
_OLD_PLOTS = "comparison_plots"  # written beside the page up to version 0.1.0


@dataclass(frozen=True)
class Run:
    """What a run directory holds, for the report."""

    directory: Path
    config: Mapping[str, Any]
    config_text: str
    records: tuple[Mapping[str, Any], ...]  #: metrics.jsonl, by step, names of today
    samples: tuple[Mapping[str, Any], ...]  #: samples.jsonl; may be empty
    configurations: tuple[Configuration, ...] = ()  #: of its steps, by first step

    @property
    def last_step(self) -> int:
        """Of its records; 0 where there is none yet."""
        return self.records[-1]["step"] if self.records else 0

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
        return self._columns.get(name, ([], []))

    def layer_series(self, name: str) -> dict[int, tuple[list[int], list[float]]]:
        """``series`` of every ``name/layer_NN`` that has values, by layer."""
        return dict(sorted(self._layers.get(name, {}).items()))

    @cached_property
    def names(self) -> frozenset[str]:
        """What any record has."""
        return frozenset(name for record in self.records for name in record)

    @cached_property
    def _columns(self) -> dict[str, tuple[list[int], list[float]]]:
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.records:
            for name, value in record.items():
                if _is_number(value):
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(float(value))
        return columns

    @cached_property
    def _layers(self) -> dict[str, dict[int, tuple[list[int], list[float]]]]:
        found: dict[str, dict[int, tuple[list[int], list[float]]]] = {}
        for name, column in self._columns.items():
            layered = split_layer(name)
            if layered:
                found.setdefault(layered[0], {})[layered[1]] = column
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(run_dir: Path, *, begun: bool = True) -> Run:
    """Read config.yaml, metrics.jsonl and, where there is one, samples.jsonl. UserError:
    missing, empty or malformed.

    begun: False: there may be no record yet.
    """
    run_dir = Path(run_dir)
    for name in (CONFIG_FILE, METRICS_FILE) if begun else (CONFIG_FILE,):
        if not (run_dir / name).is_file():
            raise UserError(
                f"{run_dir} holds no {name}; expected the directory of a run; pass the run_dir of "
                f"its config"
            )
    metrics_path = run_dir / METRICS_FILE
    records = read_jsonl(metrics_path) if metrics_path.is_file() else []
    if begun and not records:
        raise UserError(
            f"{metrics_path} is empty; expected one object a step; let the run finish a step first"
        )
    config, _ = read_yaml(run_dir / CONFIG_FILE)
    text = (run_dir / CONFIG_FILE).read_text(encoding="utf-8")
    samples_path = run_dir / SAMPLES_FILE
    samples = read_jsonl(samples_path) if samples_path.is_file() else []
    ordered = tuple(sorted(map(with_new_names, records), key=lambda record: record["step"]))
    last = ordered[-1]["step"] if ordered else -1
    done_under = [c for c in read_configurations(run_dir) if c.first_step <= last]
    return Run(run_dir, config, text, ordered, tuple(samples), tuple(done_under))


def runs_among(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Split the paths given to ``report RUNS/*`` into runs, each once, and comparisons that an
    earlier ``report`` wrote there.
    """
    own = (COMPARISON_FILE, _OLD_PLOTS)
    runs: dict[Path, Path] = {}
    written: list[Path] = []
    for path in paths:
        if path.name in own and not (path / METRICS_FILE).exists():
            written.append(path)
        else:
            runs.setdefault(path.resolve(), path)
    return list(runs.values()), written
