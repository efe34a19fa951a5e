"""Kept tokens from the sampler's answer to the targets of a pack, by hand."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.data.packing import pack_samples
from megatron_rl.records import KeptTokens, Sample


def kept_of(sets):
    ids = np.array([number for each in sets for number in each])
    return KeptTokens.of_sizes(ids, np.array([len(each) for each in sets], dtype=int))


def sets_of(kept):
    return [ids.tolist() for ids in np.split(kept.ids, kept.offsets[1:-1])]


def sample(prompt, answer, sets, written=None):
    mask = None if written is None else np.array(written)
    logprobs = np.full(len(answer), -1.0, dtype=np.float32)
    kept = None if sets is None else kept_of(sets)
    return Sample.of(np.array(prompt), np.array(answer), 1.0, logprobs, written=mask, kept=kept)


def test_sets_are_joined_and_selected():
    kept = KeptTokens.join([kept_of([[1, 2], []]), KeptTokens.empty(1), kept_of([[3]])])
    assert sets_of(kept) == [[1, 2], [], [], [3]]
    assert kept.ids.dtype == np.int32 and kept.offsets.dtype == np.int64
    assert sets_of(kept.select(np.array([3, -1, 0, 0]))) == [[3], [], [1, 2], [1, 2]]
    assert len(kept.select(np.zeros(0, dtype=int)).sizes) == 0
    assert kept.rows().tolist() == [0, 0, 3]
    assert kept.missing(np.array([2, 5, 5, 4])).tolist() == [False, False, False, True]
    assert len(KeptTokens.join([]).sizes) == 0


def test_targets_have_the_sets_of_their_tokens():
    # Tokens 5 6 | 7 8 and, with an environment's 4 between the policy's words, 3 | 2 4 1.
    samples = [
        sample([5, 6], [7, 8], [[7], [1, 8]]),
        sample([3], [2, 4, 1], [[2, 9], [], [0, 1]], [True, False, True]),
    ]
    (pack,) = pack_samples(samples, 10, vocab_size=16)
    assert pack.mask.tolist() == [False, True, True, True, False, True, *[False] * 4]
    assert sets_of(pack.kept) == [[], [7], [1, 8], [2, 9], [], [0, 1], [], [], [], []]
    (padded,) = pack_samples(samples, 12, vocab_size=16, sequence_multiple=6)
    assert sets_of(padded.kept)[:3] == [[], [7], [1, 8]]
    assert sets_of(padded.kept)[6:] == [[2, 9], [], [0, 1], [], [], []]
    assert pack_samples(samples, 10, vocab_size=16, with_kept=False)[0].kept is None


def test_empty_packs_have_none_and_packs_with_shared_prompts_the_same():
    samples = [sample([5, 6, 6, 6], [n, 8], [[n, 1], [8]]) for n in (7, 9)]
    shared, empty = pack_samples(samples, 8, 2, vocab_size=16, share_prompts=True)
    assert shared.shared is not None and len(shared.kept.sizes) == len(shared.mask)
    assert [ids for ids in sets_of(shared.kept) if ids] == [[7, 1], [8], [9, 1], [8]]
    assert empty.kept is None or not empty.kept.sizes.any()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (None, "sample 1: no sets of kept tokens for 3 tokens"),
        ([[7]], "sample 1: 2 sets of kept tokens for 3 tokens"),
        ([[7], [1, 9]], "sample 1: token 2 is outside of its kept set"),
    ],
)
def test_sets_that_are_not_of_the_sample_are_refused(sets, message):
    wrong = sample([5], [7, 8], sets)
    with pytest.raises(ValueError, match=message):
        pack_samples([sample([5], [7], [[7]]), wrong], 8, vocab_size=16)


def test_a_token_that_is_not_trained_may_be_outside_of_its_set():
    one = sample([5], [7, 8], [[1], [8]], [False, True])
    (pack,) = pack_samples([one], 4, vocab_size=16)
    assert sets_of(pack.kept) == [[], [8], [], []]
    assert dataclasses.replace(one, kept=None).kept is None
