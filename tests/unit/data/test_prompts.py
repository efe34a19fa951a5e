"""Data sets and the cursor over them."""

import json

import numpy as np
import pytest

from megatron_rl.data.prompts import PromptSource, load_prompts, load_records, load_samples
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt


class Letters:
    """A tokenizer whose ids can be read: 10 for a, 11 for b..., 1 beginning, 2 end."""

    vocab_size, bos_id, eos_id, pad_id = 128, 1, 2, 0

    def encode(self, text):
        return [ord(letter) - ord("a") + 10 for letter in text]

    def encode_prompt(self, prompt):
        if isinstance(prompt, str):
            return [self.bos_id, *self.encode(prompt)]
        return self.encode("".join(message["content"] for message in prompt))


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(str, lines)) + "\n", encoding="utf-8")
    return path


def test_load_records(tmp_path):
    path = write(tmp_path, '{"a": 1}', '{"b": "\u2028 \u00e9"}', "", " ")
    assert load_records(path) == [{"a": 1}, {"b": "\u2028 \u00e9"}]
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\r\n')
    assert load_records(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("{}", "{a}"), r"data.jsonl, line 2: not JSON"),
        (("{}", "", "{}"), r"data.jsonl, line 2: not JSON"),
        (("{}", "[1]"), r"data.jsonl, line 2: a JSON list; expected an object"),
        (("{}", "{}", "3"), r"data.jsonl, line 3: a JSON int; expected an object"),
        (("[" * 100_000,), r"data.jsonl, line 1: not JSON"),
        (("",), r"data.jsonl: empty data set"),
    ],
)
def test_bad_files(tmp_path, lines, message):
    with pytest.raises(UserError, match=message) as caught:
        load_records(write(tmp_path, *lines))
    assert "\n" not in str(caught.value)


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        load_records(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match="byte 7 is not UTF-8"):
        load_records(tmp_path / "latin.jsonl")


def test_load_prompts(tmp_path):
    chat = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    second = {"q": chat, "answer": 7}
    path = write(tmp_path, '{"q": "ab"}', json.dumps(second))
    first, last = load_prompts(path, Letters(), "q", 3)
    assert (first.index, first.tokens.tolist(), first.text) == (0, [1, 10, 11], "ab")
    assert (last.index, last.tokens.tolist(), last.text) == (1, [12, 13], "user: c\nassistant: d")
    assert last.record == second
    assert first.tokens.dtype == np.int64


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"p": "ab"}', r"line 2: no 'q' among p"),
        ("{}", r"line 2: no 'q' among no keys"),
        ('{"q": 3}', r"line 2: 'q' is 3; expected text"),
        ('{"q": ""}', r'line 2: \'q\' is ""; expected text'),
        ('{"q": []}', r"line 2: 'q' is \[\]; expected text"),
        ('{"q": ["a"]}', r"line 2: 'q' is .*; expected text"),
        ('{"q": [{"content": "a"}]}', r"line 2: 'q' is .*role and content"),
        ('{"q": "abc"}', r"line 2: prompt of 4 tokens; expected at most 3"),
        ('{"q": [{"role": "user", "content": ""}]}', r"line 2: the prompt has no tokens"),
    ],
)
def test_bad_prompts(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load_prompts(write(tmp_path, '{"q": "a"}', line), Letters(), "q", 3)


def test_load_samples(tmp_path):
    path = write(tmp_path, '{"q": "ab", "a": "c"}', '{"q": "a", "a": ""}')
    first, last = load_samples(path, Letters(), "q", "a", 5)
    assert (first.tokens.tolist(), first.prompt_length) == ([1, 10, 11, 12, 2], 3)
    assert (last.tokens.tolist(), last.prompt_length) == ([1, 10, 2], 2)
    assert (first.advantage, first.rollout_logprobs) == (1.0, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": "a"}', "line 1: no 'a' among q"),
        ('{"q": "a", "a": 3}', "line 1: 'a' is int; expected text"),
        ('{"q": "ab", "a": "cd"}', "line 1: prompt and completion of 6 tokens; expected at most 5"),
    ],
)
def test_bad_samples(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        load_samples(write(tmp_path, line), Letters(), "q", "a", 5)


def prompts(count):
    return [Prompt(index, np.array([index]), str(index), {}) for index in range(count)]


def indices(batch):
    return [prompt.index for prompt in batch]


def test_in_order():
    source = PromptSource(prompts(3), seed=1, shuffle=False)
    assert indices(source.next_batch(2)) == [0, 1]
    assert indices(source.next_batch(5)) == [2, 0, 1, 2, 0]
    assert indices(source.next_batch(0)) == []
    assert source.state_dict() == {"epoch": 2, "offset": 1, "seed": 1, "shuffle": False, "size": 3}


def test_every_epoch_is_a_permutation_of_its_own():
    source = PromptSource(prompts(50), seed=3, shuffle=True)
    epochs = [indices(source.next_batch(50)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert indices(PromptSource(prompts(50), seed=3, shuffle=True).next_batch(50)) == epochs[0]
    assert indices(PromptSource(prompts(50), seed=4, shuffle=True).next_batch(50)) != epochs[0]


def test_the_order_is_fixed_by_seed_and_epoch():
    # Written down once: a change would break the resumption of saved runs.
    source = PromptSource(prompts(6), seed=7, shuffle=True)
    expected = [
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, epoch]))).permutation(6)
        for epoch in (0, 1)
    ]
    assert indices(source.next_batch(12)) == [*expected[0], *expected[1]]


@pytest.mark.parametrize("drawn", [0, 3, 7, 10, 20, 25])
def test_resume(drawn):
    source = PromptSource(prompts(10), seed=5, shuffle=True)
    source.next_batch(drawn)
    state = json.loads(json.dumps(source.state_dict()))
    expected = [indices(source.next_batch(4)) for _ in range(8)]
    resumed = PromptSource(prompts(10), seed=5, shuffle=True)
    resumed.next_batch(2)
    resumed.load_state_dict(state)
    assert [indices(resumed.next_batch(4)) for _ in range(8)] == expected


@pytest.mark.parametrize(
    ("count", "seed", "shuffle", "found"),
    [(11, 5, True, "size 10"), (10, 6, True, "seed 5"), (10, 5, False, "shuffle True")],
)
def test_resume_expects_the_same_data(count, seed, shuffle, found):
    state = PromptSource(prompts(10), seed=5, shuffle=True).state_dict()
    with pytest.raises(UserError, match=found):
        PromptSource(prompts(count), seed, shuffle).load_state_dict(state)


def test_other_data_is_taken_when_told_to():
    """As many: at the same place. Fewer or more: with the next epoch."""
    before = PromptSource(prompts(10), seed=5, shuffle=True)
    before.next_batch(13)
    state = before.state_dict()
    same = PromptSource(prompts(10), 5, True)
    same.load_state_dict(state, other_data=True)
    assert indices(same.next_batch(7)) == indices(before.next_batch(7))
    more = PromptSource(prompts(12), 5, True)
    more.load_state_dict(state, other_data=True)
    fresh = PromptSource(prompts(12), 5, True)
    fresh.next_batch(24)
    assert indices(more.next_batch(12)) == indices(fresh.next_batch(12))
    with pytest.raises(UserError, match="seed 5 of the prompts, here 6"):
        PromptSource(prompts(12), 6, True).load_state_dict(state, other_data=True)
