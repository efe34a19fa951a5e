"""What the report reads of a run directory."""

import json

from megatron_rl.report.run import read_run
from megatron_rl.report.run_charts import run_groups

#: Of an older version, of one that wrote both names, and of one that writes the new one alone.
RECORDS = (
    {
        "step": 1,
        "router/gamma_mean": 0.875,
        "router/shift_mean": 0.75,
        "router/shift_mean/layer_03": 0.5,
        "rollout/lag": 1.0,
    },
    {"step": 2, "router/raw_gamma_mean": 0.625, "router/shift_mean": 0.625},
    {"step": 3, "router/raw_gamma_mean": 0.5},
)


def test_records_of_older_versions_are_read_under_the_names_of_today(tmp_path):
    (tmp_path / "config.yaml").write_text("algorithm: {name: rspo}\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    run = read_run(tmp_path)
    assert run.series("router/raw_gamma_mean") == ([1, 2, 3], [0.75, 0.625, 0.5])
    assert run.series("router/shift_mean") == ([], [])
    assert run.layer_series("router/raw_gamma_mean") == {3: ([1], [0.5])}
    assert run.series("router/gamma_mean") == ([1], [0.875])  # has been behind the floor ever since
    assert run.series("rollout/staleness") == ([1], [1.0])
    charts = [chart.data["id"] for group in run_groups(run) for chart in group.charts]
    assert charts == ["raw_gamma"]
