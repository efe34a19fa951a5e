"""Reduction of a step's metrics, against numbers worked out by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_rl.observe
from megatron_rl.observe.metric_table import (
    METRICS,
    OLD_NAMES,
    layer_name,
    metric,
    reduced_names,
    split_layer,
    split_part,
)
from megatron_rl.observe.metrics import MetricSums

CONTRACT = (
    "step reward/mean reward/solved loss grad_norm clip_fraction entropy kl_old router/shift_mean "
    "router/shift_min router/floor_fraction router/top_k_overlap router/load_max_over_mean "
    "tokens_per_second time/rollout_s time/score_s time/update_s memory/peak_gib"
).split()


def test_mean_is_weighted_by_the_counts():
    sums = MetricSums()
    sums.add("reward/mean", 3.0, 4)  # 4 completions worth 3 together
    sums.add("reward/mean", torch.tensor(0.0), torch.tensor(12))
    sums.add("loss", torch.tensor(2.0))
    sums.add("loss", 5.0)
    assert sums.reduce() == {"reward/mean": 3 / 16, "loss": 3.5}


def test_sum_max_and_min():
    sums = MetricSums()
    sums.add_all({"tokens/step": (10, 1), "ratio_max": (1.5, 3), "router/raw_gamma_min": (0.9, 3)})
    sums.add_all({"tokens/step": (7, 1), "ratio_max": (1.2, 3), "router/raw_gamma_min": (0.7, 3)})
    # No tokens in this pack: its extremes do not count.
    sums.add_all(
        {"ratio_max": (9.0, 0), "router/raw_gamma_min": (torch.tensor(0.0), torch.tensor(0))}
    )
    assert sums.reduce() == {"tokens/step": 17.0, "ratio_max": 1.5, "router/raw_gamma_min": 0.7}


def test_reduce_reads_only_and_keeps_double_precision():
    sums = MetricSums()
    for _ in range(10):
        sums.add("loss", torch.tensor(2.0**24 + 2), 1)  # ten of them do not fit float32
    sums.add("loss", 1.0, 0)
    assert sums.reduce() == sums.reduce() == {"loss": 2.0**24 + 2 + 0.1}


def test_nothing_counted_is_nan_and_nothing_added_is_absent():
    sums = MetricSums()
    sums.add("clip_fraction", 0.0, 0)
    sums.add("ratio_max", 3.0, 0)
    reduced = sums.reduce()
    assert set(reduced) == {"clip_fraction", "ratio_max"}
    assert all(math.isnan(value) for value in reduced.values())


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_nan_is_not_hidden_by_a_later_value(make):
    sums = MetricSums()
    sums.add("loss", make(math.nan))
    sums.add("loss", make(1.0))
    sums.add("ratio_max", make(math.nan))
    sums.add("ratio_max", make(2.0))
    sums.add("router/raw_gamma_min", make(0.5))
    sums.add("router/raw_gamma_min", make(math.nan))
    assert all(math.isnan(value) for value in sums.reduce().values())


def test_values_are_detached():
    sums = MetricSums()
    weight = torch.ones((), requires_grad=True)
    sums.add("loss", 2 * weight)
    sums.add("ratio_max", 2 * weight)
    assert sums.reduce() == {"loss": 2.0, "ratio_max": 2.0}
    assert weight.grad is None and not sums._sums["loss"].requires_grad


def test_layers():
    sums = MetricSums(num_layers=4)
    sums.add("router/raw_gamma_mean/layer_03", 1.8, 2)
    assert sums.reduce() == {"router/raw_gamma_mean/layer_03": 0.9}
    assert layer_name("router/raw_gamma_mean", 3) == "router/raw_gamma_mean/layer_03"
    assert layer_name("router/entropy", 120) == "router/entropy/layer_120"
    assert split_layer("router/raw_gamma_mean/layer_03") == ("router/raw_gamma_mean", 3)
    assert split_layer("router/raw_gamma_mean") is None
    with pytest.raises(ValueError, match="num_layers"):
        sums.add("router/raw_gamma_mean/layer_04", 1.0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("reward/mena", "reward/mean"),  # names the nearest
        ("reward/PART", "METRICS"),
        ("loss/layer_00", "METRICS"),
        ("router/raw_gamma_mean/layer_NN", "METRICS"),
        ("router/raw_gamma_mean/layer_3", "METRICS"),
        ("tokens_per_second", "after the reduction"),
    ],
)
def test_refused_names(name, part):
    with pytest.raises(ValueError, match="metric_table.py") as caught:
        MetricSums(num_layers=8).add(name, 1.0)
    assert part in str(caught.value)


def test_parts_of_the_reward():
    sums = MetricSums()
    sums.add_parts("reward", {"solved": (1.0, 4), "format": (3.0, 4)})
    sums.add_parts("reward", {"format": (1.0, 4)})
    sums.add_parts("eval", {"format": (1.0, 2)})
    assert sums.reduce() == {"reward/solved": 0.25, "reward/format": 0.5, "eval/format": 0.5}
    assert metric("eval/format").name == "eval/PART" and metric("reward/solved").unit == "fraction"
    assert split_part("reward/format") == ("reward", "format")
    assert split_part("reward/solved") is None and split_part("kl/format") is None
    assert metric("loss/format").name == "loss/PART"


def test_names_that_are_no_parts_are_those_of_the_table():
    from megatron_rl.rewards.base import Reward

    own = {name.partition("/")[2] for name in METRICS if name.startswith(("reward/", "eval/"))}
    for part in own - {"solved", "well_formed"}:
        with pytest.raises(ValueError, match="of a reward; expected"):
            Reward(0.0, {part: 1.0})
    assert Reward(0.0, {"solved": 1.0, "well_formed": 0.0, "other_2": 0.5}).value == 0.0


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"loss.*\(2,\)"):
        MetricSums().add("loss", torch.ones(2))


def test_table_holds_the_contract_and_names_are_sorted():
    assert [name for name in CONTRACT if name not in {**METRICS, **OLD_NAMES}] == []
    names = reduced_names(2)
    assert list(names) == sorted(names) and "step" not in names
    assert names.count("router/entropy/layer_01") == 1 and "router/entropy/layer_02" not in names
    assert metric("router/top_k_overlap/layer_17").name == "router/top_k_overlap/layer_NN"


def test_readme_lists_every_metric_as_the_table_does():
    readme = (Path(megatron_rl.observe.__path__[0]) / "README.md").read_text(encoding="utf-8")
    rows = [
        tuple(
            cell.strip().replace("\\|", "|") for cell in line.replace("\\|", "\0").split("|")[1:6]
        )
        for line in readme.splitlines()
        if line.startswith("| `") and line.count("|") - line.count("\\|") == 6
    ]
    rows = [tuple(cell.replace("\0", "|") for cell in row) for row in rows]
    table = [(f"`{m.name}`", m.unit, m.reduction, m.verbs, m.meaning) for m in METRICS.values()]
    assert rows == table


RANK_PROGRAM = """
import json, sys
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_rl.observe.metrics import MetricSums
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
sums = MetricSums(num_layers=2)
sums.add("reward/mean", float(rank + 1), 1 + 2 * rank)          # (1 + 2) / (1 + 3)
sums.add("tokens/step", torch.tensor(10.0 + rank))                # 21
sums.add("ratio_max", torch.tensor(1.0 + rank), 5)                # 2
sums.add("router/raw_gamma_min", 0.5 + rank / 4, 5)                   # 0.5
sums.add("time/step_s", float("nan") if rank == 0 else 1.0)       # one NaN shows
sums.add_parts("reward", [{"b": (1.0, 2)}, {"a": (3.0, 1), "c": (4.0, 1)}][rank])
sums.add(f"router/entropy/layer_0{rank}", 3.0 * (rank + 1), 3)    # each stage its own layer
together, alone = sums.reduce(dist.group.WORLD), sums.reduce(None)
print(json.dumps([together, alone]))
dist.destroy_process_group()
"""


def test_two_ranks_agree_on_the_reduced_metrics(tmp_path):
    root = Path(megatron_rl.observe.__path__[0]).parents[1]
    command = [sys.executable, "-c", RANK_PROGRAM]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            cwd=root,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [json.loads(rank.communicate(timeout=90)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert str(answers[0][0]) == str(answers[1][0])  # as text: NaN is not equal to itself
    together = answers[0][0]
    assert math.isnan(together.pop("time/step_s"))
    assert together == {
        "ratio_max": 2.0,
        "reward/a": 3.0,
        "reward/b": 0.5,
        "reward/c": 4.0,
        "reward/mean": 0.75,
        "router/entropy/layer_00": 1.0,
        "router/entropy/layer_01": 2.0,
        "router/raw_gamma_min": 0.5,
        "tokens/step": 21.0,
    }
    assert answers[1][1]["reward/mean"] == 2 / 3 and answers[1][1]["tokens/step"] == 11.0
