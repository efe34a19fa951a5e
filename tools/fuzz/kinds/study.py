"""Study files: an accepted one has the runs that it names, with their values, and plans the same
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.config.yaml_text import dump_yaml, read_yaml
from megatron_rl.errors import UserError
from megatron_rl.study.plan import Plan, make_plan
from megatron_rl.study.schema import read_study
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import ODD, as_text, changed, encoded

_BASE = "data: {tokenizer: {path: tokenizer.model}, train: train.jsonl}\n"
#: Values of keys that any of the others can stand beside.
_KEYS: dict[str, tuple[Any, ...]] = {
    "optimizer.lr": (1e-4, 0.5, 3e-6),
    "train.steps": (1, 7, 40),
    "rollout.temperature": (0.5, 1.0),
    "algorithm.name": ("rspo", "gmpo", "grpo"),
}
_ODD_PATHS = ("/dev/zero", "/dev/stdin", ".", "\0", "a" * 300, "base.yaml", "no/file")


@dataclass(frozen=True)
class Case:
    """A file, and the runs (arm, seed) that it has for sure; None: it is spoiled."""

    data: bytes
    runs: tuple[tuple[str, int | None], ...] | None


def make(rng: random.Random) -> Case:
    """A good study, two thirds of them spoiled afterwards."""
    tree, runs = _good(rng)
    if rng.random() < 0.3:
        return Case(dump_yaml(tree).encode(), tuple(runs))
    if rng.random() < 0.5:  # a section that the good one may lack
        tree |= rng.choice(
            [
                {"sweep": {"over": {"optimizer.lr": {"low": 0.1, "high": rng.choice(ODD)}}}},
                {"sweep": {"kind": "random", "count": 2, "over": {"train.steps": _range(rng)}}},
                {"sweep": {"over": {key: list(range(60)) for key in "abcdefgh"}}},
                {"seeds_of": {rng.choice("abx"): rng.choice(ODD)}},
                {"quick": {"seeds": 1, "arms": ["a"], "steps": rng.choice(ODD)}},
                {"overrides": {rng.choice(_PATHS): rng.choice(_ODD_PATHS)}},
                {rng.choice(("study_dir", "base")): rng.choice(_ODD_PATHS)},
            ]
        )
    tree = changed(rng, tree, rng.randint(0, 2))
    text = dump_yaml(tree) if _can_be_yaml(tree) and rng.random() < 0.5 else as_text(rng, tree)
    return Case(encoded(rng, text), None)


_PATHS = ("data.train", "data.eval", "data.tokenizer.path", "model.hf_path", "checkpoint.init_from")


def _good(rng: random.Random) -> tuple[dict[str, Any], list[tuple[str, int | None]]]:
    names = rng.sample(["a", "b", "c.d", "lr=0.1,x"], rng.randint(1, 3))
    lr = rng.sample([1e-4, 2e-4, 3e-4, 4e-4], len(names))
    arms = {name: {"optimizer.lr": value} for name, value in zip(names, lr)}
    for name in names:
        key = rng.choice([key for key in _KEYS if key != "optimizer.lr"])
        value = rng.choice(_KEYS[key])
        section, _, field = key.partition(".")
        arms[name] |= {key: value} if rng.random() < 0.5 else {section: {field: value}}
    seeds = rng.choice([1, 2, [5], [9, 3]])
    every = list(range(1, seeds + 1)) if isinstance(seeds, int) else seeds
    tree: dict[str, Any] = {"study_dir": "out", "base": "base.yaml", "arms": arms, "seeds": seeds}
    runs: list[tuple[str, int | None]] = [(name, seed) for seed in every for name in names]
    if rng.random() < 0.3:
        each = rng.random() < 0.5
        tree |= {"prepare": {"warm": {"config": "base.yaml", "each_seed": each}}}
        tree |= {"start_from": "warm"} if rng.random() < 0.5 else {}
        runs[:0] = [("warm", seed) for seed in (every if each else [None])]
    if rng.random() < 0.3:
        tree["compare_to"] = rng.choice(names)
    return tree, runs


def _range(rng: random.Random) -> dict[str, Any]:
    bounds = [rng.choice([*ODD, 0.2, 0.8, 3, 9]) for _ in range(2)]
    return dict(zip(("low", "high"), bounds)) | {
        name: rng.random() < 0.5 for name in ("log", "whole")
    }


def _can_be_yaml(tree: Any) -> bool:
    """Not half a character, which no file holds."""
    return "\\ud" not in json.dumps(tree)


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A directory with a study's files, in which the study is read and planned."""
    (folder / "base.yaml").write_text(_BASE)
    for name in ("tokenizer.model", "train.jsonl"):
        (folder / name).touch()
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield _judge
    finally:
        os.chdir(here)


def _judge(case: Case) -> Verdict:
    file = Path("study.yaml")
    file.write_bytes(case.data)
    try:
        plan = make_plan(read_study(file))
    except UserError as error:
        if case.runs is not None:
            raise Wrong(f"refused: {error}: {case.data[:300]!r}") from None
        raise
    if case.runs is not None and [(run.arm, run.seed) for run in plan.runs] != [*case.runs]:
        raise Wrong(f"other runs: {[run.name for run in plan.runs]} {case.data[:300]!r}")
    _check_values(plan, read_yaml(file)[0])
    again = make_plan(read_study(file))
    if [run.digest for run in again.runs] != [run.digest for run in plan.runs]:
        raise Wrong(f"other runs, planned again: {case.data[:300]!r}")
    identities = {(run.arm, run.seed, run.prepared) for run in plan.runs}
    if len(identities) != len(plan.runs) or len({run.run_dir for run in plan.runs}) != len(
        plan.runs
    ):
        raise Wrong(f"a run or a directory twice: {case.data[:300]!r}")
    make_plan(read_study(file), quick=True)
    return Verdict.TAKEN


def _check_values(plan: Plan, tree: Any) -> None:
    """Numbers that an arm gives to the known keys are those of its runs."""
    for run in plan.of_arms():
        given = tree.get("arms", {}).get(run.arm, {})
        for key in _KEYS:
            section, _, field = key.partition(".")
            nested = given.get(section)
            value = nested.get(field) if isinstance(nested, dict) else given.get(key)
            found = getattr(getattr(run.config, section), field)
            known = (key in given) != isinstance(nested, dict)  # else the later one counts
            if known and type(value) in (int, float) and found != type(found)(value):
                raise Wrong(f"{run.name}: {key} is {found}, not {value}")


KIND = Kind("study", make, judging, deadline_s=20.0, share=0.3)
