"""Several data sets at once: shares of the draws, resuming, and what a checkpoint keeps of them."""

import json
from collections import Counter

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.data.identity import difference, identity_of
from megatron_rl.data.mixture import MixedSource, source_of
from megatron_rl.data.preview import preview
from megatron_rl.data.prompts import DataPart, PromptSource
from megatron_rl.data.run_data import encode_files, read_files
from megatron_rl.errors import UserError
from megatron_rl.records import Completion, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup, source_sums
from tests.support.chat_tokenizers import save_qwen

PARTS = (DataPart("a", 3.0, 0, 50), DataPart("b", 1.0, 50, 4))
ITEMS = [f"a{n}" for n in range(50)] + [f"b{n}" for n in range(4)]


def mixed(items=ITEMS, parts=PARTS, seed=3, shuffle=True):
    return MixedSource(items, parts, seed, shuffle)


def test_shares_of_the_draws():
    source = mixed()
    drawn = [source.next_batch(8) for _ in range(10)]
    for batch in drawn:  # 3 : 1 in every batch
        assert Counter(item[0] for item in batch) == {"a": 6, "b": 2}
    of_b = [item for batch in drawn for item in batch if item[0] == "b"]
    for start in range(0, 20, 4):  # an epoch draws all of it
        assert sorted(of_b[start : start + 4]) == ["b0", "b1", "b2", "b3"]
    of_a = [item for batch in drawn for item in batch if item[0] == "a"]
    assert len(set(of_a[:50])) == 50 and of_a[:50] != sorted(of_a[:50])
    again = mixed()  # the batches do not matter
    assert again.next_batch(5) + again.next_batch(11) == drawn[0] + drawn[1]
    assert mixed(seed=4).next_batch(8) != drawn[0]


def test_one_data_set_is_no_mixture():
    """Its order is what it always was, alone and as the first of several."""
    alone = source_of(ITEMS[:50], PARTS[:1], 3, True)
    assert type(alone) is PromptSource
    of_a = [item for item in mixed().next_batch(40) if item[0] == "a"]
    assert of_a == alone.next_batch(30)


def test_weights_that_are_no_whole_numbers():
    parts = [DataPart("a", 0.07, 0, 50), DataPart("b", 0.9, 50, 4)]
    drawn = Counter(item[0] for item in mixed(parts=parts).next_batch(970))
    assert drawn == {"a": 70, "b": 900}


@pytest.mark.parametrize("before", [0, 1, 13, 150])
def test_resuming_goes_on_to_the_bit(before):
    source = mixed()
    source.next_batch(before)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = mixed()
    resumed.load_state_dict(state)
    assert resumed.next_batch(200) == source.next_batch(200)


def test_resuming_with_other_weights_counts_from_there():
    source = mixed()
    source.next_batch(40)
    other = mixed(parts=(DataPart("a", 1.0, 0, 50), DataPart("b", 1.0, 50, 4)))
    other.load_state_dict(source.state_dict())
    batch = other.next_batch(8)
    assert Counter(item[0] for item in batch) == {"a": 4, "b": 4}
    assert [item for item in batch if item[0] == "a"] == [
        item for item in source.next_batch(8) if item[0] == "a"
    ][:4]


def test_resuming_with_other_parts():
    alone, three = PromptSource(ITEMS[:50], 3, True), (*PARTS, DataPart("c", 1.0, 54, 1))
    source = mixed()
    source.next_batch(3)
    for resumed, state, words in (
        (mixed(), alone.state_dict(), "checkpoint of 1 data sets in data.train, here 2"),
        (mixed([*ITEMS, "c0"], three), source.state_dict(), "of 2 data sets .*, here 3"),
        (alone, source.state_dict(), "checkpoint of 2 data sets in data.train, here 1"),
        (mixed(seed=4), source.state_dict(), "checkpoint with seed 3 of the prompts, here 4"),
    ):
        with pytest.raises(UserError, match=words):
            resumed.load_state_dict(state)
    fresh = mixed()
    fresh.load_state_dict(alone.state_dict(), other_data=True)
    assert fresh.next_batch(8) == mixed().next_batch(8)
    alone.load_state_dict(source.state_dict(), other_data=True)
    assert alone.state_dict()["epoch"] == 1 and alone.state_dict()["offset"] == 0


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("tokenizer"))


def read(tmp_path, qwen, first="12", second="345", **data):
    for name, digits, key in (("a.jsonl", first, "prompt"), ("b.jsonl", second, "q")):
        lines = [json.dumps({key: digit, "answer": "1"}) for digit in digits]
        (tmp_path / name).write_text("\n".join(lines))
    parts = [
        {"path": tmp_path / "a.jsonl", "weight": 3},
        {"path": tmp_path / "b.jsonl", "template": "{q}{q}", "label": "own"},
    ]
    config = Config(
        model={"vocab_size": 512, "max_sequence_length": 67},
        data={"tokenizer": {"kind": "huggingface", "path": qwen}, "train": parts, **data},
        reward={"name": "math"},
    )
    return encode_files(config, "train", read_files(config, "train"))


def test_parts_have_columns_of_their_own(tmp_path, qwen):
    data = read(tmp_path, qwen)
    assert [prompt.text for prompt in data.train.items] == ["1", "2", "33", "44", "55"]
    assert [prompt.index for prompt in data.train.items] == [0, 1, 2, 3, 4]
    assert data.train.parts == (DataPart("a", 3.0, 0, 2), DataPart("own", 1.0, 2, 3))
    assert data.train.named(3) == f"{tmp_path / 'b.jsonl'}, line 2"
    assert data.facts()["mixture"] == "0.75 a (2), 0.25 own (3)"


def test_what_is_left_out_is_counted_over_all_parts(tmp_path, qwen):
    data = read(tmp_path, qwen, ("1", "1234", "2"), ("3", "44", "5"), overlong="skip")
    assert [prompt.index for prompt in data.train.items] == [0, 2, 3, 5]
    assert [part.size for part in data.train.parts] == [2, 2]
    assert data.facts()["left out"] == (
        "2 of 6 lines skipped, longer than 3 tokens: the first is "
        f"{tmp_path / 'a.jsonl'}, line 2 with 4"
    )
    with pytest.raises(UserError, match=r"so none is left of own; expected at least one that fits"):
        read(tmp_path, qwen, "1", ("44", "55"), overlong="skip")


def test_each_part_is_known_by_its_content(tmp_path, qwen):
    before = read(tmp_path, qwen).train
    kept = json.loads(json.dumps(identity_of(before.items, before.parts)))
    assert list(kept["parts"]) == ["a", "own"] and kept["size"] == 5
    assert difference(kept, kept) is None
    for change, text in (
        ({"first": "126"}, "a: 2 then, 3 now"),
        ({"second": "346"}, "own: 3 as before, with other content"),
    ):
        now = read(tmp_path, qwen, **change).train
        assert difference(kept, identity_of(now.items, now.parts)) == text
    alone = identity_of(before.items[:2])
    assert difference(alone, kept) == "one data set then, a, own now"
    assert difference(kept, alone) == "a, own then, one now"


def test_rewards_and_shares_of_each(tmp_path, qwen):
    data = read(tmp_path, qwen).train
    answer = Completion(None, None, True, "")

    def scored(prompt, *values):
        group = RolloutGroup(prompt, (answer,) * len(values))
        return ScoredGroup(group, tuple(Reward(value) for value in values))

    first, second, third, *_ = data.items
    groups = [scored(first, 1.0, 0.5), scored(third, 0.25), scored(second, 0.0)]
    assert source_sums(groups, data.parts) == {
        "data": {"a": (1.5, 3.0), "own": (0.25, 1.0)},
        "share": {"a": (2.0, 3.0), "own": (1.0, 3.0)},
    }
    assert source_sums([], data.parts) == {
        "data": {},
        "share": {"a": (0.0, 0.0), "own": (0.0, 0.0)},
    }


def test_the_preview_shows_each_part(tmp_path, qwen):
    lines = list(preview(read(tmp_path, qwen), {2: "tokenizer"}, 64, 1))
    assert lines[2] == "mixture: 0.75 a (2), 0.25 own (3)"
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert lines[4:8] == [
        f"data.train: {first}, {second}, 5 problems, prompts of 1 to 2 tokens "
        "(50%: 2, 90%: 2, 99%: 2)",
        "",
        "a, 0.75 of the draws: 2 problems, prompts of 1 to 1 tokens (50%: 1, 90%: 1, 99%: 1)",
        "",
    ]
    shown = [line for line in lines if ": a prompt of" in line]
    assert [line.partition(": a")[0] for line in shown] == [f"{first}, line 1", f"{second}, line 1"]
    assert "  | 33" in lines


@pytest.mark.parametrize(
    ("most", "texts"),
    [(None, "1 2 33 44 55"), (9, "1 2 33 44 55"), (4, "1 2 33 44"), (3, "1 2 33"), (1, "1")],
)
def test_the_first_of_each(tmp_path, qwen, most, texts):
    found = read(tmp_path, qwen).train.cut(most)
    assert " ".join(prompt.text for prompt in found.items) == texts
    assert sum(part.size for part in found.parts) == len(found)
