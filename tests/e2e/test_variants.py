"""A run with reference, regularisers, sampler weights, dynamic sampling and kept tokens, whole and
resumed.
"""

import numpy as np
import pytest

from tests.support.runs import records, reproducible, succeed

WORDS = """
--algorithm.router_shift.mode negative_only --algorithm.router_shift.normalise batch_mean
--algorithm.router_shift.layers max --algorithm.mismatch icepop --algorithm.kl_coef 0.05
--algorithm.reference initial --algorithm.entropy_coef 0.01 --rollout.dynamic_sampling true
--rollout.max_rounds 3 --rollout.top_p 0.9 --rollout.keep_sampling_mask true
--reward.overlong_buffer 4 --evaluate.every 0
""".split()


#: Distances of all layers travel to the last stage; the sampler's experts are taken throughout.
REPLAY = """
--algorithm.routing_replay r3 --algorithm.router_shift.layers quantile
--algorithm.router_shift.quantile 0.6 --algorithm.trace_store pinned --algorithm.epochs 2
--evaluate.every 0
""".split()


def run(folder, name, steps, words=WORDS):
    command = ["train", "rl.yaml", *words, "--run_dir", f"runs/{name}", "--train.steps", str(steps)]
    return succeed(*command, cwd=folder, ranks=2)


@pytest.fixture(scope="module")
def whole(folder, sft_run):
    run(folder, "variants", 3)
    return folder / "runs" / "variants"


def test_every_step_reports_the_parts(whole):
    for row in records(whole / "metrics.jsonl")[1:]:
        assert row["mismatch/weight_mean"] == pytest.approx(1.0, abs=1e-3)
        assert row["mismatch/clipped_fraction"] == 0
        assert row["mismatch/logprob_max"] < 1e-4  # both over the tokens that the sampler kept
        assert 1 <= row["groups/rounds"] <= 3
        assert row["groups/drawn"] >= 8
        assert row["entropy"] > 0
        # the reference is where the run started; answers differ by processor, so it need not grow
        assert row["kl_ref"] > 0


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference_and_cursor(folder, whole):
    run(folder, "variants_resumed", 1)
    result = run(folder, "variants_resumed", 3)
    assert "continuing from runs/variants_resumed/checkpoints/step_1" in result.out
    resumed = folder / "runs" / "variants_resumed"
    wanted = [row for row in reproducible(whole) if row["step"] in (2, 3)]
    found = [row for row in reproducible(resumed) if row["step"] in (2, 3)]
    # a run of one step evaluates at its end: only what training reports is compared
    for row in (*wanted, *found):
        for key in [key for key in row if key.startswith("eval/")]:
            del row[key]
        del row["configuration"]  # train.steps was another
    assert found == wanted


def test_a_run_that_replays_the_samplers_experts(folder, sft_run):
    result = run(folder, "replay", 2, REPLAY)
    assert "routing replay R3" in result.out
    assert "of pinned host memory on a rank" in result.out
    for row in records(folder / "runs" / "replay" / "metrics.jsonl")[1:]:
        # fp32: the sampler and the scoring pass with its experts say the same of every token
        assert row["mismatch/logprob_max"] < 1e-4
        assert row["router/top_k_overlap"] == 1.0
        assert row["router/distance_max"] > row["router/distance_mean"] > 0
        assert 0 < row["router/raw_gamma_min"] < 1
        assert row["router/entropy"] > 0
        for quarter in (1, 2, 3, 4):
            assert 0 <= row[f"clip_fraction/gamma_q{quarter}"] <= 1
        # gamma is of one of the layers' distances, so the largest of all bounds it
        assert row["router/raw_gamma_min"] >= np.exp(-row["router/distance_max"]) - 1e-6
