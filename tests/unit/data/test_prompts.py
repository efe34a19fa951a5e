"""Data sets as the model sees them, and the cursor over them."""

import json

import numpy as np
import pytest

from megatron_rl.config.schema import DataConfig
from megatron_rl.data.problems import read_problems
from megatron_rl.data.prompts import PromptSource, load_prompts, load_samples
from megatron_rl.data.rendering import Rendering
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt

DATA = DataConfig(prompt_key="q", completion_key="a")


class Letters:
    """A tokenizer whose ids can be read: 10 for a, 11 for b..., 1 beginning, 2 end, which is
    written $.
    """

    vocab_size, bos_id, eos_id, pad_id, has_chat_template = 128, 1, 2, 0, True

    def encode(self, text, control=False):
        return [ord(letter) - ord("a") + 10 for letter in text]

    def show(self, ids):
        return "".join({1: "^", 2: "$"}.get(i) or chr(i - 10 + ord("a")) for i in ids)

    def find_control(self, text):
        return "$" if "$" in text else None

    def encode_prompt(self, prompt, variables=None):
        if isinstance(prompt, str):
            return [self.bos_id, *self.encode(prompt)]
        return self.encode("".join(message["content"] for message in prompt))


def prompts_of(path, limit=3, overlong="refuse", chat="auto"):
    return load_prompts(read_problems(path, DATA), Rendering(Letters(), chat), limit, overlong)


def samples_of(path, limit=5, overlong="refuse"):
    file = read_problems(path, DATA, completions=True)
    return load_samples(file, Rendering(Letters(), "auto"), limit, overlong)


def write(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(str, lines)) + "\n", encoding="utf-8")
    return path


def test_load_prompts(tmp_path):
    chat = [{"role": "system", "content": "c"}, {"role": "user", "content": "d"}]
    second = {"q": chat, "answer": 7}
    found = prompts_of(write(tmp_path, '{"q": "ab"}', json.dumps(second)))
    first, last = found.items
    assert (first.index, first.tokens.tolist(), first.text) == (0, [1, 10, 11], "ab")
    assert (last.index, last.tokens.tolist(), last.text) == (1, [12, 13], "cd")
    assert last.record == second
    assert first.tokens.dtype == np.int64
    assert (len(found), found.lines, found.skips()) == (2, 2, "")
    assert found.kinds == {str: 1, list: 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q": "abc"}', r"line 2: prompt of 4 tokens; expected at most 3; .* data.overlong skip"),
        ('{"q": [{"role": "system", "content": ""}]}', r"line 2: the prompt has no tokens"),
    ],
)
def test_bad_prompts(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        prompts_of(write(tmp_path, '{"q": "a"}', line))


def test_long_lines_are_left_out_and_counted_when_told_to(tmp_path):
    path = write(tmp_path, '{"q": "abcd"}', '{"q": "b"}', '{"q": "abc"}', '{"q": "c"}')
    found = prompts_of(path, overlong="skip")
    assert [(item.index, item.text) for item in found.items] == [(1, "b"), (3, "c")]
    assert found.skipped == ((0, 5), (2, 4))
    assert found.skips() == (
        "2 of 4 lines skipped, longer than 3 tokens: the first is line 1 with 5"
    )
    with pytest.raises(UserError, match="data.jsonl: 4 of 4 lines skipped, .*; expected at least"):
        prompts_of(path, limit=1, overlong="skip")


def test_load_samples(tmp_path):
    path = write(tmp_path, '{"q": "ab", "a": "c"}', '{"q": "a", "a": ""}')
    first, last = samples_of(path).items
    assert first.tokens.tolist() == [1, 10, 11, 12, 2]
    assert first.written.tolist() == [False] * 3 + [True] * 2
    assert last.tokens.tolist() == [1, 10, 2]
    assert last.written.tolist() == [False] * 2 + [True]
    assert (first.advantage, first.rollout_logprobs) == (1.0, None)


def test_an_answer_that_ends_with_the_end_token_gets_no_second_one(tmp_path):
    path = write(tmp_path, '{"q": "a", "a": "b$"}', '{"q": "a", "a": "b$ $\\n"}')
    found = samples_of(path)
    assert [sample.tokens.tolist() for sample in found.items] == [[1, 10, 11, 2]] * 2
    assert found.notes == {"answers that ended with the text $: it is kept once": 2}


def test_long_samples(tmp_path):
    path = write(tmp_path, '{"q": "a", "a": "b"}', '{"q": "ab", "a": "cd"}')
    message = "line 2: prompt and completion of 6 tokens; expected at most 5"
    with pytest.raises(UserError, match=message):
        samples_of(path)
    found = samples_of(path, overlong="skip")
    assert ([s.tokens.tolist() for s in found.items], found.skipped) == (
        [[1, 10, 11, 2]],
        ((1, 6),),
    )


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
