"""What a study file holds: a class for each section, a docstring for each field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.yaml_text import read_yaml
from megatron_rl.paths import local_path

#: Values of configuration keys, nested or dotted: ``{algorithm: {name: gmpo}}`` or
#: ``{algorithm.name: gmpo}``.
Overrides = dict[str, Any]
#: A list of seeds, or n for 1 to n.
Seeds = Annotated[int, Field(ge=1, le=10_000)] | list[Annotated[int, Field(ge=0, lt=2**32)]]
#: Of a sweep.
MOST_ARMS = 10_000


class Stage(Settings):
    """A run that is done before the arms, such as a supervised warm-up."""

    config: Path
    """Its configuration file."""
    verb: Literal["sft", "train"] = "sft"
    """What is run."""
    overrides: Overrides = {}
    """Keys of the configuration that differ from the file."""
    each_seed: bool = False
    """true: one run for each seed; false: one run, with the file's seed, for all seeds."""


class Range(Settings):
    """Numbers between two bounds, for a random sweep."""

    low: float
    """The least."""
    high: float
    """The largest."""
    log: bool = False
    """true: the logarithm is uniform."""
    whole: bool = False
    """true: whole numbers, both bounds included."""


class Sweep(Settings):
    """Arms made from values of keys."""

    kind: Literal["grid", "random"] = "grid"
    """grid: every combination; random: ``count`` combinations, each key drawn by itself."""
    over: dict[str, list[Any] | Range] = Field(min_length=1)
    """Key -> the values it takes, or (random) the range it is drawn from."""
    count: int = Field(10, ge=1, le=MOST_ARMS)
    """random: arms."""
    seed: int = Field(1, ge=0)
    """random: seed of the draws."""


class Collapse(Settings):
    """When a finished run counts as collapsed: if any of these rules says so."""

    metric: str = "reward/solved"
    """The metric of ``final_share``."""
    final_share: float = Field(0.5, ge=0.0, le=1.0)
    """The final value is below this share of the run's best; 0: off."""
    not_finite: bool = True
    """The run ended because a number was not finite, or its loss or gradient norm was not."""
    entropy_below: float | None = Field(None, gt=0.0)
    """The entropy of a step is below this, nat; null: off."""
    grad_norm_above: float | None = Field(None, gt=0.0)
    """The gradient norm of a step is above this; null: off."""
    grad_norm_spikes: int | None = Field(None, ge=0)
    """More steps than this have a gradient norm above 3 x the median of the 20 steps before; null:
    off."""


class Budget(Settings):
    """When no new run starts any more; runs that have begun go on to their end."""

    hours: float | None = Field(None, gt=0.0)
    """Hours of all runs together, by their own clocks (steps, evaluations, checkpoints); null: no
    limit."""
    runs: int | None = Field(None, ge=1)
    """Runs that have begun, prepared ones included; null: no limit."""


class Quick(Settings):
    """The small form of the study: ``--quick``."""

    seeds: int = Field(2, ge=1)
    """The first seeds of each arm that are used."""
    arms: list[str] | None = Field(None, min_length=1)
    """The arms that are run; null: all."""
    steps: float = Field(0.05, gt=0.0, le=1.0)
    """Factor on train.steps of every run, prepared ones included; at least one step is left."""
    overrides: Overrides = {}
    """Keys for every run, prepared ones included, after all other overrides."""


class SlurmConfig(Settings):
    """How a study is handed to Slurm: ``launch: slurm``."""

    options: list[str] = []
    """Options of sbatch, such as ``--partition=gpu``, ``--time=04:00:00``."""
    setup: list[str] = []
    """Lines of shell before each run, such as ``source .venv/bin/activate``."""


class Study(Settings):
    """A whole study file. Paths are relative to the current directory; ``~`` and ``${VAR}`` are
    filled in."""

    study_dir: Path
    """The directory of everything the study writes."""
    base: Path
    """The configuration file of every arm."""
    overrides: Overrides = {}
    """Keys of every arm that differ from the file."""
    prepare: dict[str, Stage] = {}
    """Runs that are done before the arms, by name."""
    start_from: str | None = None
    """The prepared run whose weights every arm starts from; null: as the configuration says."""
    arms: dict[str, Overrides] = {}
    """Name -> the keys in which this arm differs."""
    sweep: Sweep | None = None
    """More arms, made from values of keys; null: none."""
    seeds: Seeds = 3
    """The seeds of every arm: a list, or n for 1 to n."""
    seeds_of: dict[str, Seeds] = {}
    """Arm -> its seeds, in the place of ``seeds``, such as more for the arms that matter most."""
    compare_to: str | None = None
    """The arm that the others are compared with, seed by seed; null: no comparison."""
    at_once: int | None = Field(None, ge=1)
    """Runs side by side; null: as many as there are cores (or ``gpus``) for."""
    threads: int = Field(1, ge=1)
    """CPU threads of a rank, where the configuration does not say (device.threads)."""
    fork: bool = True
    """true: a run of one process on a CPU is copied from a process that has imported what it needs;
    false: each is started anew. The numbers are the same."""
    gpus: int | None = Field(None, ge=1)
    """GPUs of this machine, which are shared out: each rank of each run gets its own; null: the
    ranks of all runs see all."""
    launch: Literal["local", "slurm"] = "local"
    """local: on this machine, several ranks with torchrun; slurm: a job array, a run a task."""
    slurm: SlurmConfig = SlurmConfig()
    """Of ``launch: slurm``."""
    budget: Budget = Budget()
    """When no new run starts any more."""
    quick: Quick = Quick()
    """What --quick changes."""
    metrics: list[str] = ["reward/solved", "eval/pass@1", "eval/mean@k"]
    """The metrics of the table, and the first panels of the page; the first is shown live."""
    curves: list[str] = [
        *("entropy", "grad_norm", "kl_old", "router/raw_gamma_mean", "response/length_mean")
    ]
    """More panels of the page."""
    window: int = Field(10, ge=1)
    """Steps over which a final or best value is a mean."""
    collapse: Collapse = Collapse()
    """When a run counts as collapsed."""


def read_study(path: Path) -> Study:
    """The study in a YAML file. UserError: no such file, bad YAML, a key or value that does not
    fit, a path that is none."""
    tree, _ = read_yaml(path)
    study = read_settings(f"{path}: study", "a study", Study, tree)
    assert isinstance(study, Study), "a class with fields gives an object"

    def local(key: str, written: Path) -> Path:
        return Path(local_path(f"{path}: {key}", str(written)))

    stages = {
        name: stage.model_copy(update={"config": local(f"prepare.{name}.config", stage.config)})
        for name, stage in study.prepare.items()
    }
    paths = {name: local(name, getattr(study, name)) for name in ("study_dir", "base")}
    return study.model_copy(update={**paths, "prepare": stages})
