"""Packing: rows written out by hand, and what holds for any samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.packed_routes import Routing
from megatron_rl.data.packing import pack_samples
from megatron_rl.data.shared_prompts import Tree, plan_trees, round_up
from megatron_rl.errors import UserError
from megatron_rl.records import RoutedExperts, Sample


def sample(tokens, prompt_length, advantage=1.0, logprobs=None):
    values = None if logprobs is None else np.array(logprobs, dtype=np.float32)
    prompt, answer = np.split(np.array(tokens), [prompt_length])
    return Sample.of(prompt, answer, advantage, values)


def test_one_pack_by_hand():
    samples = [
        sample([5, 6, 7, 8], 2, advantage=0.5, logprobs=[-0.25, -0.5]),
        sample([9, 4, 3], 1, advantage=-2.0, logprobs=[-1.0, -2.0]),
    ]
    (pack,) = pack_samples(samples, 10, vocab_size=8)
    assert pack.tokens.tolist() == [5, 6, 7, 9, 4, 5, 6, 7, 0, 1]  # 5 to 9 mod 8
    assert pack.targets.tolist() == [6, 7, 8, 4, 3, 0, 0, 0, 0, 0]
    assert pack.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 0, 0]
    assert pack.mask.tolist() == [False, True, True, True, True, *[False] * 5]
    assert pack.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert pack.lengths == (3, 2)
    assert pack.advantages.tolist() == [0.5] * 3 + [-2.0] * 2 + [0.0] * 5
    assert pack.rollout_logprobs.tolist() == [0, -0.25, -0.5, -1, -2, 0, 0, 0, 0, 0]
    assert (pack.num_tokens, pack.num_sequences) == (10, 2)
    assert [pack.tokens.dtype, pack.targets.dtype, pack.positions.dtype] == [np.int64] * 3
    assert [pack.advantages.dtype, pack.rollout_logprobs.dtype] == [np.float32] * 2
    assert (pack.mask.dtype, pack.sequence_ids.dtype) == (np.bool_, np.int64)


def test_one_pack_of_padded_sequences_by_hand():
    samples = [sample([5, 6, 7], 1, logprobs=[-1, -2]), sample([9, 4], 1, 3.0, logprobs=[-3])]
    (pack,) = pack_samples(samples, 12, vocab_size=8, sequence_multiple=4)
    assert pack.tokens.tolist() == [5, 6, 2, 3, 9, 5, 6, 7, 0, 1, 2, 3]
    assert pack.targets.tolist() == [6, 7, 0, 0, 4, *[0] * 7]
    assert pack.positions.tolist() == [0, 1, *[0] * 10]
    assert pack.mask.tolist() == [True, True, False, False, True, *[False] * 7]
    assert pack.sequence_ids.tolist() == [0, 0, 2, 2, 1, *[2] * 7]
    assert pack.advantages.tolist() == [1, 1, 0, 0, 3, *[0] * 7]
    assert pack.rollout_logprobs.tolist() == [-1, -2, 0, 0, -3, *[0] * 7]
    assert (pack.lengths, pack.sequence_multiple) == ((2, 1), 4)


def test_padded_sequences_are_planned_with_their_padding():
    samples = [sample([1, 2, 3], 1), sample([4, 5], 1), sample([6, 7], 1)]
    packs = pack_samples(samples, 8, vocab_size=8, sequence_multiple=4)
    assert [pack.lengths for pack in packs] == [(2, 1), (1,)]
    with pytest.raises(UserError, match="sequence 0 of 8 tokens; a pack holds 6"):
        pack_samples([sample([1, 2, 3, 4, 5, 6], 1)], 6, vocab_size=8, sequence_multiple=4)


def test_empty_packs_fill_up():
    packs = pack_samples([sample([5, 6], 1)], 4, 3, vocab_size=3)
    assert [pack.lengths for pack in packs] == [(1,), (), ()]
    assert packs[2].tokens.tolist() == [0, 1, 2, 0]
    assert packs[2].sequence_ids.tolist() == [0, 0, 0, 0]
    assert not packs[2].mask.any() and not packs[2].advantages.any()
    assert packs[2].rollout_logprobs is None


def test_empty_packs_carry_logprobs_where_the_others_do():
    packs = pack_samples([sample([5, 6], 1, logprobs=[-1])], 4, 2, vocab_size=9)
    assert packs[1].rollout_logprobs.tolist() == [0, 0, 0, 0]
    packs = pack_samples([], 4, 1, vocab_size=9, with_rollout_logprobs=True)
    assert packs[0].rollout_logprobs.tolist() == [0, 0, 0, 0]
    assert pack_samples([], 4, vocab_size=9) == []


def plan_packs(lengths, pack_tokens):
    """The plan of sequences that share nothing."""
    packs = plan_trees(lengths, [Tree((n,)) for n in range(len(lengths))], pack_tokens)
    assert all(len(tree.members) == 1 and not tree.prompt for pack in packs for tree in pack)
    return [[tree.members[0] for tree in pack] for pack in packs]


def test_plan_by_hand():
    # Longest first: 6 -> A, 5 -> B, 4 -> A, 4 -> B, 2 -> C, 1 -> B
    assert plan_packs([4, 6, 2, 5, 4, 1], 10) == [[0, 1], [3, 4, 5], [2]]
    assert plan_packs([3, 3, 3], 3) == [[0], [1], [2]]
    assert plan_packs([], 3) == []


def first_fit_decreasing(lengths, pack_tokens):
    packs = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for pack in packs:
            if sum(lengths[i] for i in pack) + lengths[index] <= pack_tokens:
                pack.append(index)
                break
        else:
            packs.append([index])
    return [sorted(pack) for pack in packs]


@given(st.lists(st.integers(2, 20), max_size=40), st.integers(20, 50))
def test_plan_is_first_fit_decreasing(lengths, pack_tokens):
    assert plan_packs(lengths, pack_tokens) == first_fit_decreasing(lengths, pack_tokens)


@st.composite
def any_samples(draw):
    samples = []
    for number in range(draw(st.integers(0, 12))):
        prompt, completion = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        tokens = 1000 * (number + 1) + np.arange(prompt + completion)
        logprobs = -1.0 - np.arange(completion) - 100 * number
        samples.append(sample(tokens, prompt, float(number + 1), logprobs))
    return samples


@given(any_samples(), st.integers(16, 40), st.integers(0, 3))
def test_nothing_is_lost(samples, pack_tokens, extra):
    needed = len(plan_packs([len(item.tokens) - 1 for item in samples], pack_tokens))
    packs = pack_samples(samples, pack_tokens, needed + extra, vocab_size=50)
    assert len(packs) == needed + extra
    assert all(len(pack.tokens) == pack_tokens for pack in packs)
    found = []
    for pack in packs:
        starts = np.cumsum([0, *pack.lengths])
        for number, (start, stop) in enumerate(zip(starts, starts[1:])):
            row = slice(start, stop)
            original = int(pack.tokens[start]) // 1000 - 1
            item = samples[original]
            found.append(original)
            trained = np.flatnonzero(pack.mask[row])
            assert pack.tokens[row].tolist() == item.tokens[:-1].tolist()
            assert (pack.sequence_ids[row] == number).all()
            assert (pack.advantages[row] == item.advantage).all()
            # what the mask points at is the completion, with its log-probabilities
            assert pack.targets[row][trained].tolist() == item.tokens[item.written].tolist()
            logprobs = item.rollout_logprobs[item.written].tolist()
            assert pack.rollout_logprobs[row][trained].tolist() == logprobs
        assert pack.mask.sum() == np.count_nonzero(pack.rollout_logprobs)
        rest = slice(starts[-1], None)
        assert (pack.sequence_ids[rest] == len(pack.lengths)).all()
        assert not pack.mask[rest].any()
        assert (pack.tokens[rest] < 50).all()
        members = found[len(found) - len(pack.lengths) :]
        assert members == sorted(members)
    assert sorted(found) == list(range(len(samples)))


def test_mistakes():
    with pytest.raises(UserError, match="sequence 1 of 5 tokens; a pack holds 4"):
        plan_packs([4, 5], 4)
    with pytest.raises(ValueError, match="2 packs are needed, num_packs is 1"):
        pack_samples([sample([1, 2, 3], 1)] * 2, 3, 1, vocab_size=9)
    with pytest.raises(ValueError, match="sample 1 has no rollout"):
        pack_samples([sample([1, 2], 1, logprobs=[0]), sample([1, 2], 1)], 4, vocab_size=9)
    with pytest.raises(ValueError, match="2 rollout log-probabilities for 3 tokens"):
        pack_samples([sample([1, 2, 3], 1, logprobs=[0])], 4, vocab_size=9)


def test_round_up():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]


ROUTING = Routing(layers=(5, 2), top_k=2, num_experts=8)


def routed(tokens, ids, layers=(2, 3, 5)):
    """A sample of a prompt of one token, with experts ids[token][layer]."""
    experts = RoutedExperts(np.array(ids, dtype=np.uint8), layers)
    return Sample.of(tokens[:1], tokens[1:], routed_experts=experts)


def test_routes_of_a_pack_by_hand():
    samples = [
        routed([5, 6, 7], [[[0, 1], [9, 9], [2, 3]], [[4, 5], [9, 9], [6, 7]]]),
        routed([8, 9], [[[7, 0], [9, 9], [1, 2]]]),
    ]
    for sample in samples:  # experts of a layer that this rank does not have are left out
        sample.routed_experts.ids[:, 1] = [1, 0]
    (pack,) = pack_samples(samples, 8, vocab_size=8, routing=ROUTING)
    assert pack.routed_experts.layers == (5, 2)
    assert pack.routed_experts.ids.dtype == np.uint8
    assert pack.routed_experts.ids.tolist() == [
        [[2, 3], [0, 1]],
        [[6, 7], [4, 5]],
        [[1, 2], [7, 0]],
        *[[[first, first + 1]] * 2 for first in (6, 0, 2, 4, 6)],  # padding at 3 to 7: 2 t mod 8
    ]


def test_routes_follow_padded_sequences():
    samples = [
        routed([5, 6, 7], [[[0, 1]] * 3, [[4, 5]] * 3]),
        routed([8, 9], [[[7, 0]] * 3]),
    ]
    (pack,) = pack_samples(samples, 8, vocab_size=8, sequence_multiple=4, routing=ROUTING)
    assert pack.routed_experts.ids[:, 0].tolist() == [
        [0, 1], [4, 5], [4, 5], [6, 7], [7, 0], [2, 3], [4, 5], [6, 7],
    ]  # fmt: skip


def test_an_empty_pack_has_routes_and_without_routing_there_are_none():
    many = Routing(layers=(1,), top_k=3, num_experts=300)
    (pack,) = pack_samples([], 4, 1, vocab_size=8, routing=many)
    assert pack.routed_experts.ids.dtype == np.int16
    assert pack.routed_experts.ids[:, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    (pack,) = pack_samples([routed([1, 2], [[[0, 1]] * 3])], 4, vocab_size=8)
    assert pack.routed_experts is None


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (sample([1, 2], 1), "sample 0 has no experts of the sampler$"),
        (routed([1, 2], [[[0, 1]]], (2,)), r"no experts of the sampler in layers \[5\]"),
        (routed([1, 2, 3], [[[0, 1]] * 3]), "experts are of 1 tokens; expected 2"),
        (routed([1, 2], [[[0, 1]] * 3] * 3), r"shape \(3, 3, 2\); expected \(1, 3, 2\)"),
        (routed([1, 2], [[[0]] * 3]), r"shape \(1, 3, 1\); expected \(1, 3, 2\)"),
        (routed([1, 2], [[[0, 8]] * 3]), "experts are 0 to 8; expected 0 to 7"),
        (routed([1, 2], [[[3, 3]] * 3]), "sent a token to one expert twice"),
    ],
)
def test_routes_that_do_not_fit_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        pack_samples([sample], 8, vocab_size=8, routing=ROUTING)


def turns(tokens, written, advantage=1.0, logprobs=None, routed_experts=None):
    """A sample with one letter a token: w, written by the policy, or anything else."""
    values = None if logprobs is None else np.array(logprobs, dtype=np.float32)
    mask = np.array([letter == "w" for letter in written])
    return Sample(np.array(tokens), mask, advantage, values, routed_experts)


def test_a_pack_of_turns_by_hand():
    nan = np.nan
    samples = [
        # two turns, next to each other a third, and a tool's last word
        turns([5, 6, 7, 8, 9, 3], ".w.ww.", 2.0, [nan, -1, nan, -2, -3, nan]),
        turns([4, 2, 1], "w.w", -1.0, [-7, nan, -4]),  # nothing predicts its first token
        turns([6, 6], "..", 3.0, [nan, nan]),
        turns([7], "w", 4.0, [-9]),
    ]
    (pack,) = pack_samples(samples, 14, vocab_size=8)
    # of a sequence of one token, which predicts nothing, that token is read all the same
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9, 4, 2, 6, 7, 1, 2, 3, 4, 5]
    assert pack.targets.tolist() == [6, 7, 8, 9, 3, 2, 1, 6, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(pack.mask).tolist() == [0, 2, 3, 6]
    assert pack.targets[pack.mask].tolist() == [6, 8, 9, 1]
    assert pack.rollout_logprobs.tolist() == [-1, 0, -2, -3, 0, 0, -4, *[0] * 7]
    assert pack.sequence_ids.tolist() == [0] * 5 + [1] * 2 + [2, 3] + [4] * 5
    assert pack.advantages.tolist() == [2] * 5 + [-1] * 2 + [3, 4] + [0] * 5
    (padded,) = pack_samples(samples[:2], 16, vocab_size=8, sequence_multiple=4)
    assert np.flatnonzero(padded.mask).tolist() == [0, 2, 3, 9]
    assert padded.rollout_logprobs[padded.mask].tolist() == [-1, -2, -3, -4]


def test_a_prompt_and_an_answer_are_a_sample_of_one_turn():
    found = Sample.of([5, 6], [7, 8, 9], 0.5, [-1, -2, -3])
    assert found.tokens.tolist() == [5, 6, 7, 8, 9] and found.tokens.dtype == np.int64
    assert found.written.tolist() == [False, False, True, True, True]
    assert np.isnan(found.rollout_logprobs[:2]).all() and found.rollout_logprobs.dtype == np.float32
    assert found.rollout_logprobs[2:].tolist() == [-1, -2, -3]
    part = Sample.of([5], [7, 8], written=np.array([False, True]))
    assert part.written.tolist() == [False, False, True]
    assert (part.advantage, part.rollout_logprobs, part.routed_experts) == (1.0, None, None)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (turns([], ""), "sample 0 has no tokens"),
        (turns([1, 2], "w"), r"bool of shape \(1,\); expected bool of the 2 tokens"),
        (Sample(np.array([1, 2]), np.array([0, 1])), "is int64 of shape"),
        (turns([1, 2, 3], "..w", 1.0, [-1, -1, np.nan]), "no rollout log-probability of a token"),
    ],
)
def test_masks_that_do_not_fit_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        pack_samples([sample], 8, vocab_size=8)


ONE_LAYER = Routing(layers=(2,), top_k=2, num_experts=8)


def routes(rows, known=None):
    ids = np.array(rows, dtype=np.uint8)[:, None]
    return RoutedExperts(ids, (2,), None if known is None else np.array(known))


def test_routes_that_the_sampler_does_not_know_are_left_to_the_routers():
    samples = [
        # spliced text at 1, nothing beyond the fourth token
        turns([5, 6, 7, 8, 9], ".w.w.", routed_experts=routes(
            [[0, 1], [9, 9], [2, 3], [4, 5]], [True, False, True, True]
        )),
        turns([1, 2, 3], "..w", routed_experts=routes([[6, 7], [9, 9]], [True, False])),
        turns([4, 5], ".w", routed_experts=routes([[1, 0], [3, 2]])),  # of its last token too
    ]  # fmt: skip
    (pack,) = pack_samples(samples, 12, vocab_size=8, routing=ONE_LAYER)
    known = pack.routed_experts.known
    assert np.flatnonzero(~known).tolist() == [1, 5]
    assert known.dtype == np.bool_ and len(known) == 12
    assert pack.routed_experts.ids[known][:, 0].tolist() == [
        [0, 1], [2, 3], [4, 5], [6, 7], [1, 0], [6, 7], [0, 1], [2, 3], [4, 5], [6, 7],
    ]  # fmt: skip
    # Of a pack whose experts are all known nothing more is said.
    (pack,) = pack_samples(samples[2:], 4, vocab_size=8, routing=ONE_LAYER)
    assert pack.routed_experts.known is None


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        (routes([[0, 1]]), "experts are of 1 tokens; expected 2, or a mask of the known ones"),
        (routes([[0, 1]] * 2, [True]), r"bool of shape \(1,\); expected bool of 2 tokens"),
        (routes([[0, 1]] * 2, [1, 0]), r"int64 of shape \(2,\); expected bool of 2 tokens"),
        (routes([[9, 9], [0, 9]], [False, True]), "experts are 0 to 9; expected 0 to 7"),
    ],
)
def test_known_routes_that_do_not_fit_are_refused(routed, message):
    sample = turns([1, 2, 3], ".ww", routed_experts=routed)
    with pytest.raises(ValueError, match=message):
        pack_samples([sample], 8, vocab_size=8, routing=ONE_LAYER)
