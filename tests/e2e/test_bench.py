"""The benches of tools/bench that compare programs, at their smallest; times decide nothing."""

import json
import subprocess
import sys

import pytest

from tests.support.runs import ROOT


def _run(name, *words, limit=900, codes=(0,)):
    script = str(ROOT / "tools" / "bench" / name)
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, timeout=limit
    )
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_steps_of_reinforcement_learning_beside_trl(tmp_path):
    file = tmp_path / "result.json"
    words = ["--size", "smallest", "--search-rounds", "1", "--rounds", "2", "--steps", "1"]
    trl = ["--trl-python", sys.executable]  # the extra `test` has it
    out = _run("rl_step.py", *words, *trl, "--cores", "2", "--json", str(file))
    result = json.loads(file.read_text())
    assert set(result) == {*("case", "machine", "versions", "flop", "settings", "best", "ratio")}
    rows = result["settings"]
    assert [row["phase"] for row in rows] == ["searched"] * 8 + ["measured"] * 2
    assert {row["name"] for row in rows[8:]} == set(result["best"].values())
    for row in rows:
        assert len(row["turns_s"]) == (1 if row["phase"] == "searched" else 2)
        assert row["samples_per_s"] == pytest.approx(8 / row["seconds"]["median"])
        stages = [row["stages"][stage]["median"] for stage in ("rollout", "score", "update")]
        assert min(stages) > 0.0
        # words of an answer of random weights: half of them odd, 64 of them about equally likely
        assert 0.0 < row["reward"] < 1.0 and 3.0 < row["entropy"] < 4.2
    assert "TRL's time / ours, round by round: " in out


@pytest.mark.slow
def test_growth_of_a_size_and_of_ranks(tmp_path):
    file = tmp_path / "rows.json"
    words = ["--smallest", "--factors", "2", "--rounds", "1", "--only", "vocabulary,EP ranks"]
    _run("growth.py", *words, "--json", str(file))
    rows = json.loads(file.read_text())
    assert [(row["dimension"], row["stage"]) for row in rows] == [
        *(("vocabulary", stage) for stage in ("rollout", "score", "update", "optimizer")),
        ("EP ranks", "cpu"),
        ("EP ranks", "wall"),
    ]
    assert all(len(row["times"]) == 2 and row["times"][0]["median"] > 0 for row in rows)


def test_growth_takes_real_steps(tmp_path):
    file = tmp_path / "rows.json"
    words = ["--smallest", "--factors", "1", "--rounds", "1", "--only", "batch"]
    _run("growth.py", *words, "--json", str(file), limit=180)
    rows = json.loads(file.read_text())
    assert [row["stage"] for row in rows] == ["rollout", "score", "update", "optimizer"]
    assert all(row["times"][0]["median"] > 0 and row["expected"] == 1.0 for row in rows)


def test_router_shift_cost_of_a_layout():
    """Both sides of all pairs run; exit code 1 says that it was slow."""
    words = ["--layouts", "EP2", "--pairs", "4"]
    out = _run("router_shift_cost.py", *words, limit=300, codes=(0, 1))
    head, row, count, size = out.splitlines()
    assert row.split()[0] == "EP2" and row.count("..") == 2, row
    assert int(row.split(")")[1].split()[0]) in (4, 8, 12, 16), row  # more while undecided
    assert count.startswith("medians (95% intervals) of turns of two pairs (scoring: 2 pairs); ")
    assert size.startswith("trace at L=48, K=8, E=128: 1,920 bytes a token; ")
