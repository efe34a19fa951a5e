"""What the benches of tools/bench compute: operations, quartiles, turns, settings. Their runs are
in tests/e2e/test_bench.py.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tests.support.tiny import build_tiny
from tools.bench import growth, rl_step, rl_step_parts, router_shift_cost
from tools.bench.common import (
    PASSES,
    Shape,
    Spread,
    Turn,
    Worker,
    forward_flop,
    table,
    take_turns,
    turn_order,
)
from tools.bench.growth_point import Point, config_of
from tools.bench.rl_step_case import END, SPECIAL, Case, make_files, odd_share

ROOT = Path(__file__).resolve().parents[2]
SMALL = rl_step.CASES["smallest"]


def test_operations_of_a_forward_pass_by_hand():
    shape = Shape(
        layers=3,
        hidden=2,
        heads=1,
        kv_heads=1,
        head_dim=2,
        experts=2,
        top_k=1,
        expert_width=3,
        vocabulary=5,
    )
    qkv, out, router, experts = 2 * 2 * 6, 2 * 2 * 2, 2 * 2 * 2, 3 * 2 * 2 * 3
    attention = 2 * 2 * 2 * (1 + 2)  # scores and mix of tokens that see one and two
    head = 2 * 2 * 5
    assert (
        forward_flop(shape, prompt=2, answer=1)
        == 3 * (2 * (qkv + out + router + experts) + 24) + 20
    )
    assert (attention, head) == (24, 20)


def test_operations_of_a_forward_pass_as_torch_counts_them(tmp_path):
    """In transformers' model, which computes masked scores, and logits of all tokens."""
    case = dataclasses.replace(SMALL, shape=dataclasses.replace(SMALL.shape, layers=2))
    make_files(tmp_path, case)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        attn_implementation="eager",
        experts_implementation="eager",
        trust_remote_code=False,
    )
    shape, prompt, answer = case.shape, 9, 4
    n, width = prompt + answer - 1, shape.heads * shape.head_dim
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(n)[None] + len(SPECIAL))
    masked = shape.layers * 4 * width * (n * n - n * (n + 1) // 2)
    logits = (n - answer) * 2 * shape.hidden * shape.vocabulary
    found = counter.get_total_flops() - masked - logits
    assert found == forward_flop(shape, prompt, answer)


def test_operations_of_a_step():
    flop = SMALL.flop()
    once = SMALL.prompts * SMALL.answers * forward_flop(SMALL.shape, 12, SMALL.answer_tokens)
    assert flop == {"rollout": once, "score": once, "update": 3 * once}
    assert set(flop) == set(PASSES)
    layer = 35 * (65_536 + 32_768 + 2_048 + 196_608) + 4 * 128 * 35 * 36 // 2
    assert Case().flop()["score"] == 512 * (4 * layer + 24 * 2 * 128 * 512) == 23_557_308_416


def test_quartiles():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert str(Spread.of([1.0, 2.0])) == "1.50 (1.25 .. 1.75)"


def test_a_table_is_as_wide_as_its_cells():
    text = table(["", "seconds"], [["one", "1"], ["twenty", "20.5"]])
    assert text.splitlines() == ["        seconds", "one           1", "twenty     20.5"]


def test_odd_rounds_are_the_other_way():
    assert [turn_order("abc", number) for number in range(3)] == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tools.bench.common import Turns
turns = Turns(".")
for number in range(int(sys.argv[4])):
    with open(sys.argv[2], "a") as file:
        file.write(sys.argv[3])
    turns.after_step({"number": number})
print("it is over")
"""


def _worker(folder, name, steps=2, most=1000):
    (folder / name).mkdir()
    words = [str(ROOT), str(folder / "order"), name, str(most)]
    return Worker(name, [sys.executable, "-c", WORKER, *words], folder / name, steps, {})


def test_workers_take_turns_and_sleep_between_them(tmp_path):
    with _worker(tmp_path, "a") as a, _worker(tmp_path, "b") as b:
        for worker in (a, b):
            assert [step["number"] for step in worker.wait()["steps"]] == [0, 1]
        (tmp_path / "order").write_text("")
        turns = take_turns({"a": a, "b": b}, rounds=3, steps=2)
        assert (tmp_path / "order").read_text() == "aabb" + "bbaa" + "aabb"
    for taken in turns.values():
        numbers = [[step["number"] for step in turn.steps] for turn in taken]
        assert numbers == [[2, 3], [4, 5], [6, 7]]
        assert all(0 < turn.seconds < 60 and turn.cpu_s >= 0 for turn in taken)


def test_a_worker_that_ends_is_named_with_its_last_words(tmp_path):
    with _worker(tmp_path, "short", most=3) as worker:
        assert len(worker.wait()["steps"]) == 2
        worker.begin()
        with pytest.raises(RuntimeError, match="short has ended or hangs:\nit is over"):
            worker.wait()


def test_every_setting_takes_whole_mini_batches():
    case, words = Case(), ["--optimizer.lr=1e-5"]
    settings = rl_step.settings_of(2, case, words)
    assert [setting.name for setting in settings] == [
        "megatron_rl 1 x 2 threads",
        "megatron_rl 2 x 1 threads",
        "megatron_rl 2 x 1 threads, EP2",
        "TRL 1 x 2 threads, batch 64, grouped_mm",
        "TRL 1 x 2 threads, batch 32, grouped_mm",
        "TRL 1 x 2 threads, batch 16, grouped_mm",
        "TRL 1 x 2 threads, batch 64, eager",
        "TRL 2 x 1 threads, batch 32, grouped_mm",
    ]
    for setting in settings:
        assert setting.ranks * setting.threads == 2
        if setting.side == rl_step.TRL:
            assert 64 % (setting.batch * setting.ranks) == 0
        else:
            assert setting.options[:1] == tuple(words)
    one = rl_step.settings_of(1, case)
    assert all(setting.ranks == setting.threads == 1 for setting in one)


def _turns(*seconds, steps=()):
    return [Turn(value, 2 * value, 0.01, tuple(steps)) for value in seconds]


def test_the_best_of_each_side_and_their_ratio():
    settings = rl_step.settings_of(1, Case())
    ours, *theirs = (setting.name for setting in settings)
    turns = {ours: _turns(2.0, 4.0), theirs[0]: _turns(5.0, 6.0)}
    turns |= {name: _turns(9.0, 9.0) for name in theirs[1:]}
    best = rl_step.best_of(settings, turns)
    assert best == {"megatron_rl": ours, "TRL": theirs[0]}
    assert rl_step.ratio(turns, best) == Spread.of([2.5, 1.5])


def test_a_row_of_the_result():
    step = {"stages": {"rollout": 0.5, "score": 0.25, "update": 1.0}, "reward": 0.5, "entropy": 6.0}
    setting = rl_step.settings_of(1, SMALL)[0]
    row = rl_step.summary(setting, "measured", _turns(2.0, 2.0, steps=[step]), SMALL, peak=100.0)
    assert row["samples_per_s"] == SMALL.samples / 2.0 == 4.0
    assert row["gflops"] == sum(SMALL.flop().values()) / 1e9 / 2.0
    assert row["share_of_peak"] == row["gflops"] / 100.0
    assert row["stages"]["score"] == {"median": 0.25, "low": 0.25, "high": 0.25}
    assert row["cpu_s"]["median"] == 4.0 and row["idle_cpu_s"]["median"] == 0.01
    json.dumps(row)


def test_parts_are_switched_off_and_checkouts_named(tmp_path):
    settings = rl_step_parts.settings_of(2, {"before": tmp_path})
    by_name = {setting.name: setting for setting in settings}
    assert len(by_name) == len(settings) == 5
    assert by_name["whole"].options == ()
    assert by_name["a pass scores, prompts not shared"].options == (
        *by_name["a pass scores"].options,
        *by_name["prompts not shared"].options,
    )
    assert {name for name, each in by_name.items() if each.code != ROOT} == {"before"}
    with pytest.raises(argparse.ArgumentTypeError, match="there is no megatron_rl in"):
        rl_step_parts._checkout(f"before={tmp_path}")
    assert rl_step_parts._checkout(f"now={ROOT}") == ("now", ROOT)


def test_shorter_answers_are_refused():
    turns = {"x": _turns(1.0, steps=[{"answer_tokens": 24.0}, {"answer_tokens": 23.5}])}
    with pytest.raises(RuntimeError, match="x: answers of .*23.5.*; expected 24"):
        rl_step._check_lengths(turns, Case())


def test_the_model_never_ends_an_answer_and_words_are_tokens(tmp_path):
    make_files(tmp_path, SMALL)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=False
    )
    tokens = torch.randint(SMALL.shape.vocabulary, (16, 20), generator=torch.manual_seed(1))
    with torch.no_grad():
        probabilities = model(tokens).logits.softmax(-1)
    assert probabilities[..., SPECIAL.index(END)].max() == 0.0
    assert probabilities.max() < 0.9  # and the others are drawn
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "model", trust_remote_code=False
    )
    assert tokenizer("w0 w7")["input_ids"] == [3, 10]
    assert tokenizer.decode([3, 0, 10], skip_special_tokens=True) == "w0 w7"
    problems = [json.loads(line) for line in (tmp_path / "problems.jsonl").open()]
    lengths = [len(tokenizer(problem["prompt"])["input_ids"]) for problem in problems]
    assert len(lengths) == SMALL.problems and 8 <= min(lengths) <= max(lengths) <= 16


def test_the_reward():
    assert odd_share("w1 w23 w4 w10") == 0.5
    assert odd_share("") == 0.0


def test_the_case_survives_json():
    assert Case.read(json.loads(json.dumps(dataclasses.asdict(Case())))) == Case()
    assert Point.read(json.loads(json.dumps(dataclasses.asdict(Point())))) == Point()


@pytest.mark.parametrize(
    "dimension, tokens, flop",
    [("batch", 4.0, 1.0), ("layers", 1.0, None), ("DP ranks", 4.0, 1.0)],
)
def test_points_grow_in_one_size(dimension, tokens, flop):
    base, large = Point(), growth.grown(Point(), dimension, 4)
    assert large.tokens == tokens * base.tokens
    if flop is not None:
        assert large.flop_per_token() == flop * base.flop_per_token()
    else:  # all but the head, which stays
        head = 24 / 36 * 2 * 128 * 512
        assert large.flop_per_token() - head == pytest.approx(4 * (base.flop_per_token() - head))


def test_points_know_their_parameters():
    for dimension in ("experts", "vocabulary", "layers"):
        point = growth.grown(growth.SMALLEST, dimension, 2)
        _, _, (chunk,) = build_tiny(config_of(point))
        found = sum(weight.numel() for weight in chunk.parameters() if weight.dim() > 1)
        assert point.parameters() == found


def test_rows_of_growth():
    points = [growth.grown(Point(), "batch", factor) for factor in (1, 2)]
    tokens, parameters = points[0].tokens, points[0].parameters()
    steps = [
        [{"score": 3e-6 * tokens, "optimizer": 1e-9 * parameters}],
        [{"score": 2 * 2e-6 * tokens, "optimizer": 1.1e-9 * parameters}],
    ]
    score, optimizer = growth.rows_of("batch", points, steps)
    assert [spread.median for spread in score.times] == pytest.approx([3.0, 2.0])
    assert score.growth == pytest.approx(2 / 3) and score.expected == 1.0 and score.mark == "below"
    assert [spread.median for spread in optimizer.times] == pytest.approx([1.0, 1.1])
    assert optimizer.mark == ""
    assert score.cells()[-4:] == ["0.67", "1.00", "0.67", "below"]
    assert score.why() == "batch, score: below: not explained"
    assert dataclasses.replace(score, stage="rollout").why().endswith(growth._FIXED)


def test_ranks_beyond_the_cores_share_them(monkeypatch):
    monkeypatch.setattr(growth, "usable_cores", lambda: 2)
    points = [growth.grown(Point(), "EP ranks", factor) for factor in (1, 2, 8)]
    walls = [growth.work_per_unit(point, "wall") for point in points]
    assert [wall / walls[0] for wall in walls] == [1.0, 0.5, 0.5]
    assert len({growth.work_per_unit(point, "cpu") for point in points}) == 1
    assert config_of(points[-1]).parallel.expert == 8


def test_the_cost_of_router_shift_is_free_of_order_and_drift():
    """True ratio 1.01; whatever comes first in a pair takes 1.1 times as long."""
    pairs = []
    for turn in range(5):
        without = 1.0 + 0.3 * turn  # the machine slows down
        pairs += [(1.01 * without, 1.1 * without), (1.01 * 1.1 * without, without)]
    cost = router_shift_cost.Cost.of(pairs)
    assert (cost.median, cost.low, cost.high) == pytest.approx((1.01, 1.01, 1.01))
    pairs[3] = (9.0, 1.0)  # one disturbed turn
    assert router_shift_cost.Cost.of(pairs).median == pytest.approx(1.01)


def test_the_interval_of_the_cost():
    """Turns of 1 and 4 (1 and 16), as often: the median is between them, its interval both."""
    cost = router_shift_cost.Cost.of([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (16.0, 1.0)] * 4)
    assert (cost.median, cost.low, cost.high) == pytest.approx((2.5, 1.0, 4.0))
    assert str(cost) == "2.5000 (1.0000 .. 4.0000)"
    assert cost.undecided  # the limit, 1.02, is in it


@pytest.mark.parametrize("cost", [(1.0, 0.99, 1.019), (1.05, 1.021, 1.08)])
def test_a_cost_beside_the_limit_is_decided(cost):
    assert not router_shift_cost.Cost(*cost).undecided


@pytest.mark.parametrize("enough, rounds", [(1, 1), (3, 3), (99, 4)])
def test_a_layout_is_measured_until_it_is_decided(enough, rounds):
    found = router_shift_cost.until_decided(lambda: [0], lambda found: len(found) < enough)
    assert found == [0] * rounds
