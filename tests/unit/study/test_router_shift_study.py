"""The numbers of the example's scripts, worked out by hand; its data are not needed."""

import math

import numpy as np
import pytest

from examples.router_shift_study import gradients, kept, results


def rows(values):
    """study -> arm -> seed -> mean@4, as rows of runs."""
    others = dict.fromkeys(results.COLUMNS, 0.25)
    counts = {"spikes": 1, "collapsed": 0}
    return [
        {"study": study, "arm": arm, "seed": seed, **others, "mean@4": value, **counts}
        for study, arms in values.items()
        for arm, seeds in arms.items()
        for seed, value in seeds.items()
    ]


TWO = rows(
    {
        "sort_deep": {"gmpo": {1: 0.2, 2: 0.4}, "rspo": {1: 0.3, 2: 0.4, 3: 0.9}},
        "countdown_deep": {"gmpo": {1: 0.5, 2: 0.5}, "rspo": {1: 0.6, 2: 0.6}},
    }
)
STUDIES = ("sort_deep", "countdown_deep")


def test_a_difference_is_paired_by_seed():
    found = results.differences(TWO, "sort_deep")
    assert found["gmpo"] is None
    assert found["rspo"].mean == pytest.approx(0.05) and found["rspo"].count == 2  # not seed 3
    assert (found["rspo"].low, found["rspo"].high) == pytest.approx((0.0, 0.1))


def test_pooled_differences_weigh_studies_alike():
    """sort_deep: .1 and 0, so that a draw's mean is 0, .05 or .1 with masses 1/4, 1/2, 1/4;
    countdown_deep: .1 always. Their mean is .05, .075 or .1.
    """
    found = results.pooled(TWO, "rspo", "gmpo", STUDIES)
    assert (found.mean, found.low, found.high) == pytest.approx((0.075, 0.05, 0.1))
    assert found.count == 4
    assert results.pooled(TWO, "grpo", "gmpo", STUDIES) is None


def test_the_interval_of_many_pairs_is_near_the_normal_one():
    values = np.random.default_rng(5).normal(0.02, 0.05, (2, 200))
    many = rows(
        {
            study: {"gmpo": dict.fromkeys(range(200), 0.0), "rspo": dict(enumerate(own))}
            for study, own in zip(STUDIES, values)
        }
    )
    found = results.pooled(many, "rspo", "gmpo", STUDIES)
    error = math.sqrt(sum(own.var() / 200 for own in values)) / 2
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_the_tables_show_them():
    text = results.tables(TWO)
    across, line, _ = (line for line in text.splitlines() if line.startswith("| rspo |"))
    assert across == "| rspo | +5.0 [+0.0, +10.0] | +10.0 [+10.0, +10.0] |"
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:5] == ["rspo", "3", "53.3%", "+5.0 [+0.0, +10.0]", "1 of 2"]
    assert results.figure(TWO).count("<circle") == 2


def changed(number):
    found = [dict(row) for row in TWO]
    found[number]["mean@4"] = math.nextafter(found[number]["mean@4"], 1.0)
    return found


def test_a_kept_run_is_what_it_was(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "runs.csv").write_text(kept.as_csv([{**TWO[0], "gamma": None}, TWO[2]]))
    first, second = kept.read_sets(tmp_path)["one"]
    assert first == {k: v for k, v in {**TWO[0], "gamma": None}.items() if k != "seconds"}
    assert second["mean@4"] == 0.3 and "seconds" not in second
    assert kept.read_sets(tmp_path / "absent") == {}


def elsewhere(rows):
    """The same runs with other digits."""
    return [{**row, "entropy": 0.5} for row in rows]


def test_runs_are_compared_to_the_last_digit(capsys):
    sets = {"one": TWO, "other": elsewhere(TWO)}
    assert kept.compare(TWO[1:], sets) == 0
    assert capsys.readouterr().out.splitlines() == [
        "one: 8 of 8 runs are equal, 9 are kept",
        "other: 0 of 8 runs are equal, 9 are kept",
    ]
    own = changed(3)
    own[4]["seconds"] = 99.0  # a time is no result
    assert kept.compare(own, sets) == 1
    assert capsys.readouterr().out.splitlines() == [
        "one: 8 of 9 runs are equal, 9 are kept",
        "other: 0 of 9 runs are equal, 9 are kept",
        "sort_deep rspo 2: mean@4 differ from one",
    ]


def test_runs_that_are_not_kept_are_not_equal(capsys):
    """Neither a set of which a few runs are kept, equal or not, nor one without any of them counts
    for a whole one.
    """
    sets = {"few": TWO[:1], "unlike": elsewhere(TWO[:1]), "none": [], "most": TWO[:8]}
    assert kept.compare(TWO, sets) == 1
    *counts, line = capsys.readouterr().out.splitlines()
    assert [count.split()[1] for count in counts] == ["1", "0", "0", "8"]
    assert line.startswith("countdown_deep rspo 2: study, arm, seed, ")
    assert line.endswith(" differ from most")


def test_runs_of_another_machine_are_not_listed(capsys):
    words = "no run equals a kept one; another processor rounds differently"
    assert kept.compare(TWO, {"other": elsewhere(TWO)}) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("other: 0 of 9 runs are equal, 9 are kept", words)
    assert kept.compare(TWO, {}) == 1
    assert capsys.readouterr().out.splitlines() == [words]


def test_sets_beside_each_other():
    """In sort_deep the intervals are [0, 10] and [-10, 0] points, in countdown_deep [10, 10] and
    [-10, -10].
    """
    opposite = [{**row, "mean@4": 1.0 - row["mean@4"]} for row in TWO]
    *_, blank, text = results.sets_table({"one": TWO, "other": opposite})
    assert blank == "" and text == (
        "one and other: 2 differences of an arm to gmpo in a study. The intervals of 1 overlap. "
        "Both exclude 0 in 1, with the same sign in 0; one of them does in 0."
    )


def test_pooled_differences_of_sets_beside_each_other(monkeypatch):
    monkeypatch.setattr(results, "CONFIRMING", STUDIES)
    lines = results.sets_table({"one": TWO, "other": TWO[:2] + TWO[5:7]})
    assert lines[0] == "| difference in mean@4 | one | other |"
    assert lines[2] == "| rspo - gmpo | +7.5 [+5.0, +10.0] |  |"


def arms(**numbers):
    return {arm: {"trace": trace, "snr": snr} for arm, (trace, snr) in numbers.items()}


def test_ratios_of_gradient_noise():
    """Ratios 2 and 8: geometric mean 4; the draws' means are 2, 4 and 8."""
    found = [arms(gmpo=(1.0, 0.5), rspo=(2.0, 0.5)), arms(gmpo=(3.0, 0.1), rspo=(24.0, -0.1))]
    trace = gradients.ratio(found, "rspo", "gmpo", "trace")
    assert (trace.mean, trace.low, trace.high) == pytest.approx((4.0, 2.0, 8.0))
    assert gradients.ratio(found, "rspo", "gmpo", "snr") is None  # -0.1 has no logarithm
    lines = gradients.overview([{"drift": {"steps": 3}, "arms": one} for one in found], "gmpo")
    assert lines[0] == "3 optimizer steps later, 2 weights"
    assert lines[3].split() == ["rspo", "13", "0.2", "4.000", "[2.000,", "8.000]"]
