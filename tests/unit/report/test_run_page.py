"""The report: its numbers, its escaping, its charts, and what it says when files are missing."""

import json
import re

import pytest

from megatron_rl.errors import UserError
from megatron_rl.report.run_page import duration, points, summary, write_report
from tests.support.pages import Tags, charts_of, data_of

HOSTILE = "</pre><script>alert('x')</script>&amp;<img src=http://evil.example/x.png onerror=1>"
CONFIG = """\
seed: 1
model: {num_layers: 4, hidden_size: 128, num_experts: 8, moe_top_k: 2, dtype: fp32}
parallel: {tensor: 2, pipeline: 1, expert: 4, world_size: 8}
algorithm: {name: rspo, advantages: group_norm, router_shift: {floor: 0.8}}
optimizer: {lr: 0.0003, schedule: constant}
"""


def _eval(pass_at_1, mean_at_k):
    return {
        "eval/pass@1": pass_at_1,
        "eval/mean@k": mean_at_k,
        "eval/samples": 4.0,
        "eval/problems": 512.0,
        "time/eval_s": 3.0,
    }


def _train_record(step):
    record = {"step": step, "reward/mean": 0.1 * step, "reward/solved": 0.05 * step}
    record |= {"loss": None if step == 3 else -0.01 * step, "grad_norm": 0.5, "clip_fraction": 0.02}
    record |= {"router/raw_gamma_mean": 0.99, "router/raw_gamma_min": 0.9 - 0.01 * step}
    record |= {f"router/distance_mean/layer_0{i}": 0.001 * (i + step) for i in range(3)}
    record |= {"time/rollout_s": 10.0, "time/update_s": 8.0, "time/step_s": 20.0}
    return record


def _write(run_dir, records, samples=(), config=CONFIG):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(config)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if samples:
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return run_dir


@pytest.fixture(scope="module")
def train_run(tmp_path_factory):
    records = [{"step": 0} | _eval(0.432, 0.38)]
    records += [_train_record(step) for step in range(1, 6)]
    records += [_train_record(6) | _eval(0.610, 0.5515) | {"time/checkpoint_s": 2.0}]
    samples = [
        {"step": s, "prompt": "p", "completion": f"answer {s}", "reward": 1 / 3, "reason": "right"}
        for s in range(1, 6)
    ]
    samples.append({"step": 6, "prompt": HOSTILE, "completion": HOSTILE, "reason": HOSTILE})
    run_dir = tmp_path_factory.mktemp("runs") / "<b>run"
    return _write(run_dir, records, samples, CONFIG + f"note: {json.dumps(HOSTILE)}\n")


@pytest.fixture(scope="module")
def page(train_run):
    path = write_report(train_run)
    assert path == train_run / "report.html"
    return path.read_text(encoding="utf-8")


# 6 steps of 20 s, two evaluations of 3 s, a checkpoint of 2 s: 128 s
SUMMARY = (
    "solved (greedy pass@1) 43.2% -> 61.0% (+17.8 points), mean@4 38.0% -> 55.1% (+17.1 points) "
    "on 512 held-out problems, 6 steps in 2m08s"
)


def test_summary(train_run):
    assert summary(train_run) == SUMMARY


def test_page_holds_the_numbers(page):
    assert SUMMARY.replace(">", "&gt;") in page
    assert "from 43.2% &middot; +17.8 points" in page
    assert "<strong>0.600</strong><span class='change'>from 0.100 &middot; +0.500</span>" in page
    assert "4 layers, width 128, 8 experts, top-2, fp32" in page
    assert "ranks 8, tensor 2, expert 4" in page
    assert "rspo, advantages group_norm, router-shift floor 0.8" in page
    first = data_of(page)["samples"][0]
    assert (first["step"], first["completion"], first["reward"]) == (1, "answer 1", 1 / 3)


def test_a_verifier_that_does_not_say_solved(tmp_path):
    records = [{"step": 0, "eval/format": 0.25, "eval/samples": 4.0, "eval/problems": 16.0}]
    for step in (1, 2):
        records.append({"step": step, "reward/mean": 0.25 * step, "loss": 0.0, "time/step_s": 2.0})
        records[-1] |= {"reward/format": 0.5, "reward/length": -0.125 * step}
    records[-1] |= {"eval/format": 0.75}
    run = _write(tmp_path / "run", records)
    assert summary(run) == "mean reward 0.25 -> 0.5, 2 steps in 4.0s"
    text = write_report(run).read_text(encoding="utf-8")
    assert "<span class='label'>eval/format</span><strong>0.750</strong>" in text
    assert "pass@1, greedy" not in text and "mean@4" not in text
    charts = charts_of(text)
    assert set(charts) == {"reward", "loss", "parts_1"}
    assert charts["parts_1"]["series"] == [
        {"name": "eval/format", "steps": [0, 2], "values": [0.25, 0.75]},
        {"name": "reward/format", "steps": [1, 2], "values": [0.5, 0.5]},
        {"name": "reward/length", "steps": [1, 2], "values": [-0.125, -0.25]},
    ]


def test_hostile_text_stays_text(page):
    found = Tags(page)
    assert {tag for tag in found.tags if tag in ("b", "img", "link", "iframe", "form")} == set()
    assert "".join(found.text).count(HOSTILE) == 1  # config
    last = data_of(page)["samples"][-1]
    assert last["prompt"] == last["completion"] == last["reason"] == HOSTILE
    assert found.tags.count("script") == page.count("<script") == 2  # the data, and the script


def test_charts_hold_the_metrics_that_exist(page):
    charts = charts_of(page)
    assert set(charts) == {
        *("reward", "eval", "loss", "raw_gamma", "router_distance", "clip_fraction"),
        *("grad_norm", "time"),
    }
    assert charts["eval"]["series"] == [
        {"name": "pass@1 (greedy)", "steps": [0, 6], "values": [0.432, 0.61]},
        {"name": "mean@k (sampled)", "steps": [0, 6], "values": [0.38, 0.5515]},
    ]
    # A step without a finite value has no point.
    (loss,) = charts["loss"]["series"]
    assert loss["steps"] == [1, 2, 4, 5, 6] and loss["values"] == [
        *(-0.01, -0.02, -0.04, -0.05, -0.06)
    ]


def test_layers_are_rows_of_a_heatmap(page):
    """Of layer i at step s: (i + s) / 1000."""
    chart = charts_of(page)["router_distance"]
    assert chart["kind"] == "heatmap" and chart["rows"] == [0, 1, 2]
    assert chart["steps"] == [1, 2, 3, 4, 5, 6] and chart["width"] == 1
    assert chart["values"] == [[round(0.001 * (i + s), 3) for s in range(1, 7)] for i in range(3)]


def test_time_is_stacked_with_the_rest_of_the_step(page):
    """Of 20 s, sampling takes 10 and the update 8."""
    chart = charts_of(page)["time"]
    assert chart["kind"] == "stack"
    assert {s["name"]: s["values"] for s in chart["series"]} == {
        "rollout": [10.0] * 6,
        "update": [8.0] * 6,
        "other": [2.0] * 6,
    }


def test_without_the_script_a_table_has_the_last_values(page):
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td class='number'>([^<]*)</td>", page)
    assert ("Held-out problems", "pass@1 (greedy)", "0.61") in rows
    assert ("Loss", "loss", "-0.06") in rows and ("Reward", "solved", "0.3") in rows
    assert all(page.index("<noscript>") < page.index(f"<td>{row[0]}</td>") for row in rows)


def test_supervised_run(tmp_path):
    records = [
        {"step": s, "loss": 2.5 - s, "accuracy": 0.25 * s, "time/update_s": 0.4, "time/step_s": 0.5}
        for s in (1, 2)
    ]
    run_dir = _write(tmp_path / "sft", records)
    assert summary(run_dir) == "loss 1.5 -> 0.5, 2 steps in 1.0s"
    page = write_report(run_dir).read_text()
    assert "supervised fine-tuning" in page and data_of(page)["samples"] == []
    assert set(charts_of(page)) == {"loss", "accuracy", "time"}


def test_only_an_evaluation(tmp_path):
    run_dir = _write(tmp_path / "eval", [{"step": 0} | _eval(0.5, None)])
    assert summary(run_dir) == (
        "solved (greedy pass@1) 50.0% on 512 held-out problems, 0 steps in 3.0s"
    )


def test_missing_and_broken_files_are_user_errors(tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match="config.yaml"):
        write_report(run_dir)
    _write(run_dir, [])
    with pytest.raises(UserError, match="empty"):
        write_report(run_dir)
    with pytest.raises(UserError, match="empty"):
        summary(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl"):
        write_report(run_dir)
    _write(run_dir, [{"step": 1}], config="a: [1\nb: 2")
    with pytest.raises(UserError, match="config.yaml:2: invalid YAML") as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)
    _write(run_dir, [{"step": 1}], config="- 1")
    with pytest.raises(UserError, match="found a sequence at the top"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_numbers_for_reading():
    assert points(0.432, 0.61) == "+17.8" and points(0.5, 0.489) == "-1.1"
    assert [duration(s) for s in (9.44, 59.97, 60, 151.2, 3599.6, 11070)] == [
        *("9.4s", "1m00s", "1m00s", "2m31s", "1h00m", "3h04m")
    ]


def test_a_run_of_two_configurations_shows_both(tmp_path):
    """40 steps of rspo and one of grpo are not a run of grpo."""
    records = [_train_record(step) for step in range(1, 42)]
    later = CONFIG.replace("name: rspo", "name: grpo").replace("lr: 0.0003", "lr: 0.0001")
    run_dir = _write(tmp_path / "run", records, config=later)
    (run_dir / "configs").mkdir()
    (run_dir / "configs" / "step_0.yaml").write_text(CONFIG)
    (run_dir / "configs" / "step_41.yaml").write_text(later)
    (run_dir / "configs" / "step_42.yaml").write_text("seed: 9\n")  # no step was done under it
    page = write_report(run_dir).read_text(encoding="utf-8")
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["Algorithm"] == (
        "rspo, advantages group_norm, router-shift floor 0.8; from step 41: "
        "grpo, advantages group_norm"
    )
    assert facts["Optimizer"] == "lr 0.0003, constant; from step 41: lr 0.0001, constant"
    assert facts["Layout"] == "ranks 8, tensor 2, expert 4"  # the same throughout: once
    table = page[page.index("Changed configuration") :]
    rows = re.findall(
        "<tr><td class='number'>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)<", table
    )
    assert rows == [
        ("41", "algorithm.name", "rspo", "grpo"),
        ("41", "optimizer.lr", "0.0003", "0.0001"),
    ]
    assert "<summary>Configuration from step 0</summary>" in page
    assert "<summary>Configuration from step 41</summary>" in page
    assert "step 42" not in page


def test_a_run_of_one_configuration_has_no_table_of_changes(page):
    assert "Changed configuration" not in page


def test_charts_have_a_line_where_the_configuration_changed(tmp_path):
    """Left of step 4, half way from step 3."""
    records = [_train_record(step) for step in range(1, 7)]
    one = _write(tmp_path / "one", records)
    two = _write(tmp_path / "two", records)
    (two / "configs").mkdir()
    for step, text in ((0, CONFIG), (4, CONFIG.replace("rspo", "grpo"))):
        (two / "configs" / f"step_{step}.yaml").write_text(text)
    charts = [charts_of(write_report(run).read_text()) for run in (one, two)]
    assert {tuple(chart["marks"]) for chart in charts[0].values()} == {()}
    assert {tuple(chart["marks"]) for chart in charts[1].values()} == {(3.5,)}
