"""Runs whose answers come from a server, before the steps that are trained on them."""

import pytest

from tests.support.fake_server import FakeServer, hugging_face_model, toy_model
from tests.support.runs import records, succeed


@pytest.mark.parametrize(
    ("lag", "expected"),
    [pytest.param(1, [0, 1, 1], marks=pytest.mark.slow), (2, [0, 1, 2, 2])],
)
def test_answers_are_as_old_as_they_come_ahead(folder, sft_run, lag, expected):
    """The server begins every question at once: all answers are by the weights of their asking."""
    run_dir = folder / "runs" / f"ahead_{lag}"
    with FakeServer(toy_model(), hugging_face_model) as server:
        words = ["--run_dir", str(run_dir), "--train.steps", str(len(expected))]
        words += ["--evaluate.every", "0"]
        words += ["--rollout.engine", "vllm", "--rollout.servers.urls", f"[{server.url}]"]
        words += ["--rollout.lag", str(lag), "--algorithm.mismatch", "tis"]
        succeed("train", "rl.yaml", *words, cwd=folder, ranks=2)
    rows = [row for row in records(run_dir / "metrics.jsonl") if row["step"] > 0]
    assert [row["rollout/lag"] for row in rows] == expected
    # an update lies between sampler and scoring pass wherever answers are old
    differences = [row["mismatch/logprob_max"] for row in rows]
    assert [difference > 1e-3 for difference in differences] == [age > 0 for age in expected]
    assert all(row["servers/probe_difference"] < 1e-4 for row in rows)
    assert sum(row["servers/failures"] for row in rows) == 0
