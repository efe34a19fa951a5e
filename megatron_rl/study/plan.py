"""The runs of a study: each with its resolved configuration, its identity and its directory.

    STUDY_DIR/prepare/NAME[_seed_N]-HASH      a prepared run
    STUDY_DIR/runs/ARM/seed_N-HASH            a run of an arm
    STUDY_DIR/quick/...                       the same of --quick

HASH begins the run's digest, so a run of another configuration never meets the files of this one,
and a study whose file is changed back finds its old runs done. A run that has begun under another
name of its arm stays in its directory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.config.checks import check_config, input_files
from megatron_rl.config.fields import leaf_fields, leaf_values
from megatron_rl.config.layout import ranks_wanted
from megatron_rl.config.load import load_config, written_values
from megatron_rl.config.on_resume import kind_of
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError, shown
from megatron_rl.paths import as_written
from megatron_rl.study.contents import contents_of
from megatron_rl.study.schema import Overrides, Stage, Study
from megatron_rl.study.sweep import NAME, sweep_arms

#: Keys that the study itself sets.
_OWN_KEYS = ("run_dir", "seed", "checkpoint.resume")
_HASH_LETTERS = 8


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study."""

    index: int
    arm: str  #: or the name of the prepared run
    seed: int | None  #: None: prepared once for all seeds
    prepared: bool
    verb: str
    config: Config  #: resolved; run_dir is the run's directory
    digest: str  #: SHA-256 of what is trained and measured
    needs: int | None = None  #: index of the prepared run it starts from

    @property
    def name(self) -> str:
        """``rspo seed 1``."""
        seed = "" if self.seed is None else f" seed {self.seed}"
        return f"{'prepare ' if self.prepared else ''}{self.arm}{seed}"

    @property
    def run_dir(self) -> Path:
        """Its directory."""
        return self.config.run_dir

    @property
    def steps(self) -> int:
        """Its length."""
        return self.config.train.steps

    @property
    def ranks(self) -> int:
        """Processes it runs on."""
        return ranks_wanted(self.config.parallel)


@dataclass(frozen=True)
class Plan:
    """All runs of a study: the prepared ones, then seed by seed a run of each arm, so that arms can
    be compared early.
    """

    study: Study
    folder: Path  #: of everything that is written: study_dir, or its quick/
    seeds: tuple[int, ...]  #: of all arms together
    arms: tuple[str, ...]
    runs: tuple[PlannedRun, ...]

    def of_arms(self) -> Iterator[PlannedRun]:
        """The runs that are measured: all but the prepared ones."""
        return (run for run in self.runs if not run.prepared)


def make_plan(study: Study, quick: bool = False) -> Plan:
    """Resolve and check the configuration of every run.

    Raises:
        UserError: a mistake in the study or in a configuration; it names the arm. Two arms with the
            same configuration.
    """
    arms = _arms(study, quick)
    seeds_of = _seeds_of(study, arms, quick)
    seeds = list(dict.fromkeys(seed for many in seeds_of.values() for seed in many))
    maker = _Maker(study, study.study_dir / "quick" if quick else study.study_dir, quick)
    starts: dict[int, PlannedRun | None] = dict.fromkeys(seeds)
    for name, stage in study.prepare.items():
        for seed in seeds if stage.each_seed else [None]:
            run = maker.prepared(name, stage, seed)
            if name == study.start_from:
                starts.update(dict.fromkeys(seeds if seed is None else [seed], run))
    for seed in seeds:
        for arm, overrides in arms.items():
            if seed in seeds_of[arm]:
                maker.of_arm(arm, overrides, seed, starts[seed])
    return Plan(study, maker.folder, tuple(seeds), tuple(arms), tuple(maker.runs))


def flat(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value of nested or dotted overrides. A mapping for a field that takes one
    replaces it (``algorithm.settings: {clip_low: 0.2}``); with a dotted name an entry is added.
    """
    fields = leaf_fields()
    for name, value in overrides.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in fields and value:
            yield from flat(value, f"{key}.")
        else:
            yield key, value


def digest_of(verb: str, config: Config, start: PlannedRun | None) -> str:
    """SHA-256 of a verb and of what changes what is trained or measured: every key but the "silent"
    ones of ``config/on_resume.py``, and the content of what the run reads. A prepared run counts by
    its digest, not by its path. UserError: a file that cannot be read.
    """
    values = {
        key: value for key, value in leaf_values(written_values(config)) if kind_of(key) != "silent"
    }
    if start is not None and config.checkpoint.init_from == start.run_dir:
        values["checkpoint.init_from"] = {"prepared": start.digest}
    made = None if start is None else start.run_dir
    text = json.dumps([verb, values, contents_of(config, verb, made)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Maker:
    """Adds run after run."""

    def __init__(self, study: Study, folder: Path, quick: bool) -> None:
        self._study, self._quick, self.folder = study, quick, folder
        self.runs: list[PlannedRun] = []
        self._seen: dict[tuple[str, int | None], str] = {}  #: digest, seed -> arm
        #: seed_N-HASH -> directory of a run that has begun
        self._begun = {path.name: path for path in sorted(folder.glob("runs/*/seed_*-*"))}

    def prepared(self, name: str, stage: Stage, seed: int | None) -> PlannedRun:
        config = self._resolve(
            f"prepare.{name}", stage.verb, stage.config, [stage.overrides], seed, None
        )
        folder = f"{name}{'' if seed is None else f'_seed_{seed}'}"
        return self._add(name, seed, stage.verb, config, None, Path("prepare", folder))

    def of_arm(
        self, arm: str, overrides: Overrides, seed: int, start: PlannedRun | None
    ) -> PlannedRun:
        study = self._study
        layers = [study.overrides, overrides]
        config = self._resolve(f"arm {arm}", "train", study.base, layers, seed, start)
        folder = Path("runs", arm, f"seed_{seed}")
        run = self._add(arm, seed, "train", config, start, folder)
        other = self._seen.setdefault((run.digest, seed), arm)
        if other != arm:
            raise UserError(
                f"arms {other} and {arm} have the same configuration; expected arms that differ; "
                "correct their keys, or remove one"
            )
        return run

    def _add(
        self,
        arm: str,
        seed: int | None,
        verb: str,
        config: Config,
        start: PlannedRun | None,
        folder: Path,
    ) -> PlannedRun:
        digest = digest_of(verb, config, start)
        prepared = folder.parts[0] == "prepare"
        path = self.folder / folder.with_name(f"{folder.name}-{digest[:_HASH_LETTERS]}")
        if not prepared and not path.exists():
            path = self._begun.get(path.name, path)
        config = config.model_copy(update={"run_dir": path})
        needs = None if start is None else start.index
        run = PlannedRun(len(self.runs), arm, seed, prepared, verb, config, digest, needs)
        self.runs.append(run)
        return run

    def _resolve(
        self,
        who: str,
        verb: str,
        path: Path,
        layers: Sequence[Overrides],
        seed: int | None,
        start: PlannedRun | None,
    ) -> Config:
        study, words = self._study, []
        if start is not None:
            words += ["--checkpoint.init_from", as_written(str(start.run_dir))]
        for overrides in [*layers, study.quick.overrides] if self._quick else layers:
            words += _words(who, overrides)
        if seed is not None:
            words += ["--seed", str(seed)]
        try:
            config = self._with_own_keys(load_config(path, words, verb))
            _runs_resume(config)
            check_config(config, None, verb, files=False)
            _files_exist(config, start)
        except UserError as error:
            raise UserError(f"{who}: {error}") from error
        return config

    def _with_own_keys(self, config: Config) -> Config:
        """Fewer steps for --quick; the threads of a rank, where they are not given."""
        steps, device = config.train.steps, config.device
        if self._quick:
            steps = max(1, round(steps * self._study.quick.steps))
        if device.threads is None:
            device = device.model_copy(update={"threads": self._study.threads})
        train = config.train.model_copy(update={"steps": steps})
        return config.model_copy(update={"train": train, "device": device})


def _words(who: str, overrides: Overrides) -> list[str]:
    """Overrides as arguments of the command line, whose values are YAML, as JSON is."""
    words = []
    for key, value in flat(overrides):
        if key in _OWN_KEYS:
            raise UserError(
                f"{who} sets {key}, which the study gives; expected other keys; remove it"
            )
        words.append(f"--{key}={json.dumps(value, ensure_ascii=False)}")
    return words


def _runs_resume(config: Config) -> None:
    if config.checkpoint.resume != "auto":
        raise UserError(
            f"checkpoint.resume is {config.checkpoint.resume}; expected auto, since a study may be "
            "interrupted and its runs go on; remove the key"
        )


def _files_exist(config: Config, start: PlannedRun | None) -> None:
    """Files that are not there yet are those that a prepared run makes."""
    for name, path in input_files(config).items():
        made = start is not None and path == start.run_dir
        if path is not None and not made and not path.exists():
            raise UserError(
                f"{name}: {path} does not exist; expected a path from the current directory "
                f"({Path.cwd()}); make it, or correct the path"
            )


def _arms(study: Study, quick: bool) -> dict[str, Overrides]:
    """All arms, those of the sweep last, or those of --quick; refuses names that are none."""
    swept = {} if study.sweep is None else sweep_arms(study.sweep)
    arms = {**study.arms, **swept}
    if len(arms) < len(study.arms) + len(swept):
        twice = sorted(study.arms.keys() & swept.keys())
        raise UserError(f"arms.{twice[0]} is also an arm of the sweep; expected other names")
    if not arms:
        raise UserError("the study has no arms; expected at least one; set arms or sweep")
    for what, names in (("arm", arms), ("prepare", study.prepare)):
        for name in names:
            if not NAME.fullmatch(name):
                raise UserError(
                    f"the name {shown(name)} in {what} is no folder's; expected up to 80 letters, "
                    "digits and _.,=+-, first a letter or digit"
                )
    for key, found, known in (
        ("compare_to", study.compare_to, arms),
        ("start_from", study.start_from, study.prepare),
    ):
        if found is not None and found not in known:
            raise UserError(
                f"{key} is {shown(found)}{did_you_mean(found, known)}; expected one of "
                f"{', '.join(known) or 'prepare, which is empty'}"
            )
    _refuse_others("seeds_of", study.seeds_of, arms)
    _refuse_others("quick.arms", study.quick.arms or (), arms)
    if not quick or study.quick.arms is None:
        return arms
    if study.compare_to not in (None, *study.quick.arms):
        raise UserError(
            f"quick.arms lacks {study.compare_to}, the arm of compare_to; expected it; add it"
        )
    return {arm: arms[arm] for arm in arms if arm in study.quick.arms}


def _seeds_of(study: Study, arms: Iterable[str], quick: bool) -> dict[str, list[int]]:
    """Arm -> its seeds."""
    found = {}
    for arm in arms:
        own = arm in study.seeds_of
        key, value = (f"seeds_of.{arm}", study.seeds_of[arm]) if own else ("seeds", study.seeds)
        seeds = list(range(1, value + 1)) if isinstance(value, int) else value
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"{key} is {shown(seeds)}; expected one or more, each once")
        found[arm] = seeds[: study.quick.seeds] if quick else seeds
    return found


def _refuse_others(key: str, names: Iterable[str], arms: Mapping[str, Overrides]) -> None:
    for name in names:
        if name not in arms:
            raise UserError(
                f"{key} names {shown(name)}{did_you_mean(name, arms)}; expected arms: "
                f"{', '.join(arms)}"
            )
