"""The report: its numbers, its escaping, its plots, and what it says when files are missing."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from megatron_rl.errors import UserError
from megatron_rl.report.plots import smooth
from megatron_rl.report.run_page import duration, points, summary, write_report

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
    assert "<td class='number'>0.333</td>" in page and "answer 1" in page


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
    drawn = {path.stem for path in (run / "plots").glob("*.png")}
    assert drawn == {"reward", "loss", "parts_1"}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href") and v]

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_text_stays_text_and_nothing_is_fetched(page):
    parser = _Tags()
    parser.feed(page)
    assert "script" not in parser.tags and "b" not in parser.tags and "link" not in parser.tags
    assert "".join(parser.text).count(HOSTILE) == 4  # prompt, completion, reason, config
    assert all(address.startswith("data:image/png;base64,") for address in parser.addresses)
    assert parser.tags.count("img") == parser.tags.count("figure") > 0
    assert "url(" not in page and "@import" not in page


def test_plots_are_pictures_of_the_metrics_that_exist(train_run, page):
    files = {path.stem for path in (train_run / "plots").glob("*.png")}
    assert files == {
        *("reward", "eval", "loss", "raw_gamma", "router_distance", "clip_fraction"),
        *("grad_norm", "time"),
    }
    for path in (train_run / "plots").glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
        assert pixels.shape == (465, 960)
        assert pixels[0, 0] > 250 and pixels.std() > 8, path.name  # white paper, with ink on it
    embedded = re.findall(r"srcset='data:image/png;base64,([^']+)'", page)
    dark = [Image.open(io.BytesIO(base64.b64decode(data))).convert("L") for data in embedded]
    assert len(dark) == len(files) and all(image.getpixel((0, 0)) < 40 for image in dark)


def test_plots_show_the_values(tmp_path):
    """A rising and a falling curve: the ink of the first third lies below, then above the last."""
    heights = {}
    for name, sign in (("up", 1), ("down", -1)):
        records = [{"step": s, "entropy": sign * float(s)} for s in range(1, 41)]
        write_report(_write(tmp_path / name, records))
        image = Image.open(tmp_path / name / "plots/entropy.png").convert("RGB")
        pixels = np.asarray(image).astype(int)[60:380, 100:900]
        rows, columns = np.nonzero(pixels[..., 2] - pixels[..., 0] > 60)  # the blue curve
        heights[name] = rows[columns < 250].mean() - rows[columns > 550].mean()
    assert heights["up"] > 100 and heights["down"] < -100


def test_supervised_run(tmp_path):
    records = [
        {"step": s, "loss": 2.5 - s, "accuracy": 0.25 * s, "time/update_s": 0.4, "time/step_s": 0.5}
        for s in (1, 2)
    ]
    run_dir = _write(tmp_path / "sft", records)
    assert summary(run_dir) == "loss 1.5 -> 0.5, 2 steps in 1.0s"
    page = write_report(run_dir).read_text()
    assert "supervised fine-tuning" in page and "Completions" not in page
    assert {p.stem for p in (run_dir / "plots").glob("*.png")} == {"loss", "accuracy", "time"}


def test_many_layers_and_long_runs(tmp_path):
    records = [
        {"step": s, "router/load_max_over_mean": 1.5}
        | {f"router/load_max_over_mean/layer_{i:02d}": 1.0 + i / 10 for i in range(9)}
        for s in range(1, 80)
    ]
    write_report(_write(tmp_path / "long", records))
    assert {p.stem for p in (tmp_path / "long/plots").glob("*.png")} == {"expert_load"}


def test_only_an_evaluation(tmp_path):
    run_dir = _write(tmp_path / "eval", [{"step": 0} | _eval(0.5, None)])
    assert summary(run_dir) == (
        "solved (greedy pass@1) 50.0% on 512 held-out problems, 0 steps in 3.0s"
    )


def test_samples_are_few_and_spread_and_long_texts_are_cut(tmp_path):
    samples = [
        {"step": step, "completion": f"completion {step}-{i} " + "x" * 2000}
        for step in range(1, 101)
        for i in range(5)
    ]
    page = write_report(_write(tmp_path / "r", [{"step": 100}], samples)).read_text()
    shown = re.findall(r"completion (\d+)-(\d)", page)
    assert shown == [(s, str(i)) for s in ("1", "21", "41", "60", "80", "100") for i in range(3)]
    assert "more characters)" in page and "x" * 1501 not in page


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
    assert smooth([0.0, 3.0, 6.0, 3.0], 1) == [1.5, 3.0, 4.0, 4.5]


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


def test_plots_have_a_line_where_the_configuration_changed(tmp_path):
    """Left of step 4, half way from step 3; the pixels of a column there and of one beside it."""
    records = [_train_record(step) for step in range(1, 7)]
    one = _write(tmp_path / "one", records)
    two = _write(tmp_path / "two", records)
    (two / "configs").mkdir()
    for step, text in ((0, CONFIG), (4, CONFIG.replace("rspo", "grpo"))):
        (two / "configs" / f"step_{step}.yaml").write_text(text)
    images = []
    for run_dir in (one, two):
        write_report(run_dir)
        with Image.open(run_dir / "plots" / "reward.png") as image:
            images.append(np.asarray(image.convert("L"), dtype=int))
    columns = np.flatnonzero((np.abs(images[0] - images[1]) > 40).any(axis=0))
    assert 0 < len(columns) < 8  # one thin line
    width = images[0].shape[1]
    assert 0.4 < columns.mean() / width < 0.65  # the middle of steps 1 to 6
