"""Results of a study whose runs are written by hand: files, intervals, collapses, table, page."""

import csv
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest

from megatron_rl.study.analysis import analyse, write_files
from megatron_rl.study.collapse import collapse_of
from megatron_rl.study.page import write_study_page
from megatron_rl.study.results import Curves
from megatron_rl.study.schema import Collapse
from megatron_rl.study.state import State, mark_done, mark_failed
from megatron_rl.study.table import Display, progress_lines, result_lines, time_left
from tests.support.written_study import SOLVED, write_run, written_plan


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return written_plan(tmp_path)


def finals(frame, arm):
    """Seed -> mean of the last two steps, of a table of results."""
    own = frame[(frame.arm == arm) & (frame.metric == "reward/solved")]
    return {seed: group[group.step > 2].value.mean() for seed, group in own.groupby("seed")}


def percentiles(values):
    """2.5% and 97.5% of the means of 10,000 draws, one draw after the other."""
    draws = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    means = sorted(sum(values[place] for place in draw) / len(values) for draw in draws.tolist())
    found = []
    for share in (0.025, 0.975):  # between the neighbours of place share x 9,999
        place, rest = divmod(share * (len(means) - 1), 1)
        low, high = means[int(place)], means[int(place) + 1]
        found.append(low + rest * (high - low))
    return found


def test_the_tables_intervals_follow_from_the_csv(plan):
    analysis = analyse(plan)
    write_files(analysis)
    frame = pandas.read_csv("out/results.csv")
    assert list(frame.columns) == ["arm", "seed", "step", "metric", "value"]
    table = pandas.read_csv("out/summary.csv")
    rows = table[(table.metric == "reward/solved") & (table.number == "final")]
    by_arm = rows.set_index("arm")
    gmpo, rspo = finals(frame, "gmpo"), finals(frame, "rspo")
    assert gmpo == pytest.approx({1: 0.4, 2: 0.3, 3: 0.8})
    assert rspo == pytest.approx({1: 0.6, 2: 0.4, 3: 0.9})
    for arm, values in (("gmpo", gmpo), ("rspo", rspo)):
        own = list(values.values())
        assert by_arm.loc[arm, "runs"] == 3
        assert by_arm.loc[arm, "mean"] == pytest.approx(sum(own) / 3)
        assert [by_arm.loc[arm, "low"], by_arm.loc[arm, "high"]] == pytest.approx(percentiles(own))
    differences = [rspo[seed] - gmpo[seed] for seed in (1, 2, 3)]
    low, high = percentiles(differences)
    found = by_arm.loc["rspo", ["difference_mean", "difference_low", "difference_high"]]
    assert list(found) == pytest.approx([sum(differences) / 3, low, high])
    assert by_arm.loc["rspo", "pairs"] == 3 and by_arm.loc["grpo", "pairs"] == 2
    assert by_arm.loc["gmpo", "pairs"] == 0 and np.isnan(by_arm.loc["gmpo", "difference_mean"])
    # of three values every sample with replacement is one of 27
    means = sorted(sum(draw) / 3 for draw in itertools.product(gmpo.values(), repeat=3))
    assert percentiles(list(gmpo.values())) == pytest.approx([means[0], means[-1]])


def test_other_numbers_of_a_curve(plan):
    row = {row.arm: row for row in analyse(plan).rows["reward/solved"]}["gmpo"]
    # best mean of two steps; trapezoids over three steps
    assert row.estimates["best"].mean == pytest.approx((0.4 + 0.3 + 0.8) / 3)
    areas = [(0.15 + 0.25 + 0.4) / 3, (0.1 + 0.15 + 0.3) / 3, (0.45 + 0.75 + 0.8) / 3]
    assert row.estimates["area"].mean == pytest.approx(sum(areas) / 3)


def test_the_csv_holds_every_number_but_those_of_layers(plan):
    write_files(analyse(plan))
    with open("out/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {
        *("reward/solved", "loss", "entropy", "grad_norm", "eval/mean@k", "time/step_s")
    }
    got = [
        (r["arm"], int(r["seed"]), int(r["step"]), float(r["value"]))
        for r in rows
        if r["metric"] == "reward/solved"
    ]
    assert got == [
        (run.arm, run.seed, step, value)
        for run in plan.runs
        for step, value in enumerate(SOLVED[run.arm, run.seed], start=1)
    ]
    (missing,) = [row for row in rows if row["value"] == ""]
    assert (missing["arm"], missing["seed"], missing["step"]) == ("rspo", "3", "2")
    assert missing["metric"] == "grad_norm"


def test_collapses_by_each_rule(plan):
    analysis = analyse(plan)
    reasons = {plan.runs[i].name: found for i, found in analysis.collapsed.items() if found}
    assert reasons == {
        "grpo seed 1": ["final reward/solved 0.1 is below 0.5 x its best 0.3"],
        "rspo seed 3": [
            "grad_norm was not finite at step 2",
            "grad_norm 60 at step 4 is above 50",
        ],
    }
    assert [analysis.collapses(arm) for arm in plan.arms] == [0, 1, 1]
    assert [len(analysis.finished(arm)) for arm in plan.arms] == [3, 3, 2]
    write_run(plan.runs[0], [0.1, 0.2, 0.3, 0.5], entropy=[1.0, 0.05, 0.01, 1.0])
    mark_done(plan.runs[0], "not finite", "a loss is nan")
    found = analyse(plan).collapsed[0]
    assert found == [
        "a number was not finite after step 4",
        "entropy 0.05 at step 2 is below 0.1",
    ]


def test_more_spikes_than_allowed_are_a_collapse(plan):
    norms = ([1, 2, 3, 4, 5, 6], [1.0, 1.0, 1.0, 4.0, 1.0, 5.0])
    curves, rules = Curves({"grad_norm": norms}), {"metric": "none"}
    state = State("done", 6)
    assert collapse_of(curves, state, Collapse(grad_norm_spikes=2, **rules), 10) == []
    assert collapse_of(curves, state, Collapse(**rules), 10) == []
    assert collapse_of(curves, state, Collapse(grad_norm_spikes=1, **rules), 10) == [
        "grad_norm has 2 spikes, more than 1, the first at step 4"
    ]


def test_each_run_is_a_line_of_runs_csv(plan):
    mark_failed(plan.runs[8], "the disk is odd")
    write_files(analyse(plan))
    frame = pandas.read_csv("out/runs.csv", keep_default_na=False)
    assert list(frame.state) == [*8 * ["done"], "failed"]
    last = frame.iloc[8]
    assert (last.arm, last.seed, last.step, last.steps) == ("grpo", 3, 2, 4)
    assert last.error == "the disk is odd" and last.directory == str(plan.runs[8].run_dir)
    reasons = "grad_norm was not finite at step 2; grad_norm 60 at step 4 is above 50"
    assert list(frame.collapsed[frame.arm == "rspo"]) == ["", "", reasons]
    assert list(frame.digest) == [run.digest for run in plan.runs]


def test_the_table(plan):
    lines = result_lines(analyse(plan))
    assert lines[0] == "reward/solved"
    cells = [re.split("  +", line.strip()) for line in lines[1:5]]
    assert cells[0] == [
        *("arm", "runs", "final", "95% interval", "- gmpo, points", "95% interval"),
        *("best", "mean over run", "collapsed"),
    ]
    assert cells[1] == ["gmpo", "3", "50.0%", "30.0% to 80.0%", "50.0%", "37.2%", "0 of 3"]
    assert cells[2][:6] == ["rspo", "3", "63.3%", "40.0% to 90.0%", "+13.3", "+10.0 to +20.0"]
    assert lines[6] == "eval/mean@k"  # and none of kl_old, which no run has
    assert "kl_old" not in lines


def test_a_line_a_run_and_the_time_left(plan):
    analysis = analyse(plan)
    lines = progress_lines(plan, analysis.states, slots=2, most=20)
    assert [line.split() for line in lines[1:3]] == [
        ["gmpo", "1", "done", "4/4", "50.0%"],
        ["rspo", "1", "done", "4/4", "70.0%"],
    ]
    assert lines[9].split() == ["grpo", "3", "stopped", "2/4", "90.0%"]
    assert lines[10] == "8 of 9 runs done; about 4.0s left"  # two steps of two seconds
    assert time_left(plan, analysis.states, slots=2) == 4.0
    assert len(progress_lines(plan, analysis.states, slots=2, most=5)) == 2  # none is running


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_runs_and_the_lines_above_them(plan, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    with Display(plan, 2) as display:
        display.show()
        display.note("grpo seed 3: [starts]")
    lines = [re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", line) for line in shown.getvalue().splitlines()]
    assert "grpo seed 3: [starts]" in [line.strip() for line in lines]
    assert ["rspo", "1", "done", "4/4", "70.0%"] in [line.split() for line in lines]
    assert "8 of 9 runs done; about 4.0s left" in [line.strip() for line in lines]


def test_elsewhere_a_line_is_shown_now_and_then(plan, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("megatron_rl.study.table.time.monotonic", lambda: now[0])
    with Display(plan, 2) as display:
        for now[0] in (1.0, 59.0, 61.0, 62.0):
            display.show()
        display.note("grpo seed 3: starts")
    assert capsys.readouterr().out.splitlines() == [
        *("8 of 9 runs done; about 4.0s left", "grpo seed 3: starts")
    ]


class Reader(HTMLParser):
    """Tags that are open, addresses, and text."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line", "polygon", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_table_curves_and_runs(plan):
    (plan.runs[0].run_dir / "report.html").write_text("a report")
    text = write_study_page(analyse(plan)).read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    first = plan.runs[0]
    assert reader.addresses == [str(first.run_dir.relative_to("out")) + "/report.html"]
    data = json.loads(
        re.search("<script type='application/json' id='data'>(.*?)</script>", text)[1]
    )
    assert data["arms"] == ["gmpo", "grpo", "rspo"]
    (group,) = data["groups"]
    titles = [drawn["title"] for drawn in group["charts"]]
    assert titles == ["reward/solved", "eval/mean@k", "entropy", "grad_norm"]
    rspo = group["charts"][0]["series"][1]
    assert (rspo["name"], rspo["steps"]) == ("rspo", [1, 2, 3, 4])
    assert rspo["values"] == pytest.approx([0.2, 0.4, 0.6, 2 / 3], abs=1e-6)
    assert (rspo["low"][3], rspo["high"][3]) == (0.4, 0.9)  # three seeds: the least and the largest
    assert text.count('<svg class="forest"') == 1 and "final, difference to gmpo, points" in text
    for shown in ("+13.3 [+10.0 to +20.0]", "50.0% [30.0% to 80.0%]", "1 of 2", "stopped"):
        assert shown in reader.text
