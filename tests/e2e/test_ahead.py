"""Runs whose answers come from a server, before the steps that are trained on them."""

import pytest

from megatron_rl.rollout.servers.keys import KEY_VARIABLE, new_key
from tests.support.fake_server import FakeServer, hugging_face_model, toy_model, wait_for
from tests.support.runs import records, succeed


@pytest.mark.parametrize(
    ("lag", "expected"),
    [pytest.param(1, [0, 1, 1], marks=pytest.mark.slow), (2, [0, 1, 2, 2])],
)
def test_answers_are_as_old_as_they_come_ahead(folder, sft_run, lag, expected, monkeypatch):
    """The server has answered what it was asked before it is paused for new weights, however slow
    it is: all answers are by the weights of their asking. It answers those who have its key.
    """
    run_dir = folder / "runs" / f"ahead_{lag}"
    key = new_key()
    monkeypatch.setenv(KEY_VARIABLE, key)
    with FakeServer(toy_model(), hugging_face_model) as server:
        server.key = key

        def answer_first(number):
            """Of 8 problems with 4 answers a step, 3 steps are asked before the second pause."""
            asked = {1: 0, 2: 24}.get(number, 32)
            several = lambda: [b for b in server.done if b["sampling_params"]["n"] == 4]  # noqa: E731
            wait_for(lambda: len(several()) >= asked, 250.0)

        server.before_pause = answer_first
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
    texts = [file.read_bytes() for file in run_dir.rglob("*") if file.is_file()]
    assert texts and not any(key.encode() in text for text in texts)
