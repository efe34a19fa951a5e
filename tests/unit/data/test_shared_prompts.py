"""Packs whose sequences share prompts: rows written out by hand, and what holds for any groups."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.packed_routes import Routing
from megatron_rl.data.packing import groups_of, pack_samples, plan_packs
from megatron_rl.data.shared_prompts import Tree, num_rows, plan_trees
from megatron_rl.errors import UserError
from megatron_rl.records import RoutedExperts, Sample


def sample(prompt, answer, advantage=1.0):
    logprobs = -np.arange(1, len(answer) + 1, dtype=np.float32)
    return Sample.of(np.array(prompt), np.array(answer), advantage, logprobs)


THREE = [sample([5, 6], [7, 1, 2], 0.5), sample([5, 6], [3, 4], -2.0), sample([8], [9], 3.0)]


def test_one_pack_by_hand():
    (pack,) = pack_samples(THREE, 12, vocab_size=10, share_prompts=True)
    row = pack.shared
    assert row.tokens.tolist() == [5, 6, 7, 1, 3, 8, 6, 7, 8, 9, 0, 1]  # 6 to 11 mod 10
    assert row.lengths == (2, 2, 1, 1) and row.parents == (-1, 0, 0, -1)
    assert row.places.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 0, 0, 0, 0]
    assert pack.tokens.tolist() == [5, 6, 7, 1, 5, 6, 3, 8, 8, 9, 0, 1]
    assert pack.targets.tolist() == [6, 7, 1, 2, 6, 3, 4, 9, 0, 0, 0, 0]
    assert np.flatnonzero(pack.mask).tolist() == [1, 2, 3, 5, 6, 7]
    assert pack.sequence_ids.tolist() == [0] * 4 + [1] * 3 + [2] + [3] * 4
    assert pack.rollout_logprobs.tolist() == [0, -1, -2, -3, 0, -1, -2, -1, 0, 0, 0, 0]
    assert pack.advantages.tolist() == [0.5] * 4 + [-2.0] * 3 + [3.0] + [0.0] * 4
    assert pack.lengths == (4, 3, 1) and (pack.num_rows, pack.num_tokens) == (12, 12)


def test_of_an_answer_of_one_token_nothing_is_laid():
    samples = [sample([5, 6], [7]), sample([5, 6], [3, 4]), sample([5, 6], [1])]
    (pack,) = pack_samples(samples, 4, vocab_size=10, share_prompts=True)
    row = pack.shared
    assert row.tokens.tolist() == [5, 6, 3, 3]
    assert row.lengths == (2, 1) and row.parents == (-1, 0)
    assert row.places.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert pack.targets.tolist() == [6, 7, 6, 3, 4, 6, 1]
    assert np.flatnonzero(pack.mask).tolist() == [1, 3, 4, 6]


def test_prompts_and_answers_are_padded_by_themselves():
    """To multiples of 4: without sharing 4 + 4 rows, with it 4 + 4 + 4, so nothing is shared."""
    pack, *rest = pack_samples(
        THREE[:2], 16, vocab_size=10, sequence_multiple=4, share_prompts=True
    )
    assert pack.shared is None and not rest
    long = [sample([5, 6, 7], [1, 2, 3]), sample([5, 6, 7], [4, 8, 9])]
    (pack,) = pack_samples(long, 16, vocab_size=10, sequence_multiple=4, share_prompts=True)
    assert pack.shared.tokens.tolist() == [5, 6, 7, 3, 1, 2, 6, 7, 4, 8, 0, 1, 2, 3, 4, 5]
    assert pack.shared.places.tolist() == [0, 1, 2, 4, 5, 0, 1, 2, 8, 9, 0, 0, 0, 0, 0, 0]
    assert pack.sequence_multiple == 4 and pack.tokens.tolist()[:6] == [5, 6, 7, 1, 2, 5]


def test_what_is_shared_is_in_front_of_the_first_trained_token():
    def turns(tokens, letters):
        written = np.array([letter == "w" for letter in letters])
        return Sample(np.array(tokens), written, 1.0, np.zeros(len(tokens), np.float32))

    samples = [
        turns([1, 2, 3, 4], "..ww"),
        turns([1, 2, 3, 9], ".www"),  # another prompt: its third token is trained on
        turns([1, 2, 5, 6, 7], "..w.w"),  # as the first up to the first turn
        turns([1, 2, 8], "w.w"),  # no token predicts its first, so it is as the first
        turns([1, 2, 3, 4], "...."),  # nothing is trained on
    ]
    assert groups_of(samples) == [
        Tree((0, 2, 3), 2),
        Tree((1,), 1),
        Tree((4,), 0),
    ]


def test_a_plan_by_hand():
    """Groups of 3 + 4 + 4, 2 + 8 + 8 and 6 + 1 + 1 + 1 rows in packs of 12."""
    lengths = [7, 7, 10, 10, 7, 7, 7]
    groups = [Tree((0, 1), 3), Tree((2, 3), 2), Tree((4, 5, 6), 6)]
    assert [num_rows(group, lengths, 1) for group in groups] == [11, 18, 9]
    # Of the second group no pack holds two answers, so each runs the prompt for itself.
    assert plan_trees(lengths, groups, 12) == [
        [Tree((0, 1), 3)],
        [Tree((2,))],
        [Tree((3,))],
        [Tree((4, 5, 6), 6)],
    ]
    assert plan_trees(lengths, groups, 20) == [
        [Tree((2, 3), 2)],
        [Tree((0, 1), 3), Tree((4, 5, 6), 6)],
    ]
    # 2 + 6 + 6 and 2 + 6: a group that is too long keeps sharing in its parts.
    assert plan_trees([8, 8, 8], [Tree((0, 1, 2), 2)], 14) == [[Tree((0, 1), 2)], [Tree((2,))]]
    # 31 of 992 rows are saved, which is one in 32, and of one row more less than that.
    assert plan_trees([496, 496], [Tree((0, 1), 31)], 992) == [[Tree((0, 1), 31)]]
    assert plan_trees([497, 496], [Tree((0, 1), 31)], 993) == [[Tree((0,)), Tree((1,))]]
    with pytest.raises(UserError, match="sequence 1 of 9 tokens; a pack holds 8"):
        plan_trees([5, 9], [Tree((0, 1), 3)], 8)


ROUTING = Routing(layers=(2,), top_k=2, num_experts=8)


def routed(prompt, answer, ids, known=None):
    experts = RoutedExperts(
        np.array(ids, dtype=np.uint8)[:, None], (2,), None if known is None else np.array(known)
    )
    return Sample.of(np.array(prompt), np.array(answer), routed_experts=experts)


def traced(prompt, answer, ids, logprobs):
    experts = routed(prompt, answer, ids).routed_experts
    values = np.array(logprobs, dtype=np.float32)[:, None, None] - np.arange(2, dtype=np.float32)
    return dataclasses.replace(
        routed(prompt, answer, ids), routed_experts=dataclasses.replace(experts, logprobs=values)
    )


@pytest.mark.parametrize("share", [True, False])
def test_the_samplers_trace_follows_and_decides_nothing(share):
    samples = [
        traced([5, 6], [7, 8], [[0, 1], [2, 3], [4, 5]], [-1, -2, -3]),
        # another expert of the prompt
        traced([5, 6], [9, 1], [[0, 1], [2, 4], [6, 7]], [-1.5, -2.5, -3.5]),
    ]
    (pack,) = pack_samples(
        samples,
        8,
        vocab_size=10,
        with_rollout_logprobs=False,
        routing=dataclasses.replace(ROUTING, num_logprobs=2),
        share_prompts=share,
    )
    trace = pack.routed_experts
    if share:  # the prompt's is the first answer's
        ids = [[0, 1], [2, 3], [4, 5], [6, 7]]
        first = [-1, -2, -3, -3.5]
        assert pack.shared.lengths == (2, 1, 1)
    else:
        ids = [[0, 1], [2, 3], [4, 5], [0, 1], [2, 4], [6, 7]]
        first = [-1, -2, -3, -1.5, -2.5, -3.5]
    assert trace.known is None and trace.layers == (2,)
    assert trace.ids[: len(ids), 0].tolist() == ids
    expected = np.zeros((8, 2), dtype=np.float32)  # 0 on padding
    expected[: len(ids)] = np.array(first)[:, None] - [0, 1]
    np.testing.assert_array_equal(trace.logprobs[:, 0], expected)
    assert trace.logprobs.dtype == np.float32


def test_the_samplers_experts_follow_and_decide_what_is_shared():
    samples = [
        routed([5, 6], [7, 8], [[0, 1], [2, 3], [4, 5]]),
        routed([5, 6], [9], [[0, 1], [2, 3]]),
        routed([5, 6], [7], [[0, 1], [2, 4]]),  # another expert of the last prompt token
        routed([5, 6], [7], [[0, 1], [2, 3]], [True, False]),  # which here is not known
    ]
    (pack,) = pack_samples(
        samples, 12, vocab_size=10, with_rollout_logprobs=False, routing=ROUTING, share_prompts=True
    )
    assert pack.shared.lengths == (2, 1, 2, 2)
    experts = pack.routed_experts
    assert experts.ids[:6, 0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 4], [0, 1]]
    assert np.flatnonzero(~experts.known).tolist() == [6]


@st.composite
def any_groups(draw):
    """Samples of groups, mixed; tokens say whose they are."""
    samples = []
    for number in range(draw(st.integers(0, 5))):
        prompt = 1000 * (number + 1) + np.arange(draw(st.integers(1, 9)))
        for answer in range(draw(st.integers(1, 5))):
            tokens = 1000 * (number + 1) + 100 * (answer + 1) + np.arange(draw(st.integers(1, 9)))
            samples.append(sample(prompt, tokens, float(len(samples) + 1)))
    return draw(st.permutations(samples))


@given(any_groups(), st.integers(18, 60), st.sampled_from([1, 4]))
def test_nothing_is_lost(samples, room, multiple):
    pack_rows = 4 * (room // 4) + 8
    kwargs = dict(sequence_multiple=multiple, share_prompts=True)
    plan = plan_packs(samples, pack_rows, **kwargs)
    packs = pack_samples(samples, pack_rows, vocab_size=50, **kwargs)
    assert len(plan) == len(packs)
    found, used = [], 0
    for trees, pack in zip(plan, packs):
        lengths = [len(one.tokens) - 1 for one in samples]
        assert sum(num_rows(tree, lengths, multiple) for tree in trees) <= pack_rows
        assert pack.num_rows == pack_rows
        members = [index for tree in trees for index in tree.members]
        found += members
        for number, index in enumerate(members):
            here = pack.sequence_ids == number
            assert pack.tokens[here].tolist() == samples[index].tokens[:-1].tolist()
            assert (pack.advantages[here] == samples[index].advantage).all()
            assert pack.targets[here & pack.mask].tolist() == samples[index].tokens[
                samples[index].written
            ].tolist()  # fmt: skip
        segments, parents = pack.segments
        used += sum(segments)
        if pack.shared is not None:
            row, real = pack.shared, pack.sequence_ids < pack.num_sequences
            assert (row.tokens[row.places[real]] == pack.tokens[real]).all()
            # each row of a segment stands for a token, the prompts' for several
            starts = np.cumsum([0, *[-(-n // multiple) * multiple for n in segments]])
            counts = np.bincount(row.places[real], minlength=pack_rows)
            roots = iter(trees)
            for start, length, parent in zip(starts, segments, parents):
                several = len(next(roots).members) if parent < 0 else 1
                assert (counts[start : start + length] == several).all()
            assert next(roots, None) is None
    assert sorted(found) == list(range(len(samples)))
    assert used <= sum(len(one.tokens) - 1 for one in samples)
