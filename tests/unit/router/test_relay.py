"""Through Megatron's own schedules every micro-batch meets the sum of its own distances."""

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config

TOKENS = 8


def _relayed(parallel, micro_batches, forward_only):
    """On a rank: {micro-batch: total} as its loss saw it.

    Each chunk adds 100 * micro-batch + its number in the model + token / 8.
    """
    cpu_device()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rl.algorithms.layer_rules import layer_rule
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.router.relay import DistanceRelay
    from tests.support.tiny import build_tiny

    config = tiny_config(parallel=parallel, model={"num_layers": 4})
    groups, _, chunks = build_tiny(config)
    relay = DistanceRelay(groups.relay, layer_rule("mean"), [0] * len(chunks))
    tokens, placement = (
        torch.arange(TOKENS),
        packed_placement([TOKENS], TOKENS, torch.device("cpu")),
    )
    totals = {}

    def step(iterator, model):
        number = next(iterator)
        chunk = next(i for i, other in enumerate(chunks) if other is model)
        place = chunk * groups.pipeline.size() + groups.pipeline.rank()
        relay.expect(chunk, TOKENS, tokens.device)
        output = forward_row(model, tokens, placement)
        total = relay.pass_on(chunk, 100.0 * number + place + torch.arange(TOKENS)[None] / 8)

        def loss(logits):
            totals[number] = total
            return logits.sum() * 0, torch.tensor(1, dtype=torch.int), {}

        assert (total is not None) == (place == len(chunks) * groups.pipeline.size() - 1)
        return output, loss

    iterators = [iter(range(micro_batches)) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=TOKENS,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    relay.finish()
    return totals


@pytest.mark.parametrize("forward_only", [False, True], ids=["training", "forward"])
@pytest.mark.parametrize(
    ("ranks", "parallel", "micro_batches"),
    [
        (1, {}, 2),
        (2, {"pipeline": 2}, 5),
        (4, {"pipeline": 4}, 6),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, 6),
    ],
    ids=["one stage", "two", "four", "interleaved"],
)
def test_each_micro_batch_meets_its_own_sum(ranks, parallel, micro_batches, forward_only):
    chunks = ranks * parallel.get("virtual_pipeline", 1)
    *others, last = run_on_ranks(ranks, _relayed, parallel, micro_batches, forward_only)
    assert others == [{}] * (ranks - 1)
    assert sorted(last) == list(range(micro_batches))
    for number, total in last.items():
        constant = chunks * 100.0 * number + chunks * (chunks - 1) / 2
        assert total.tolist() == [constant + chunks * t / 8 for t in range(TOKENS)]


class _OneRank:
    """A process group of one rank, as far as the relay looks at it."""

    def rank(self):
        return 0

    def size(self):
        return 1


def _appended(parallel, micro_batches, moe):
    """As above, for quantiles: {micro-batch: [the least distance, ..., the largest]} where a layer
    gives 100 * micro-batch + its number in the model + token / 8. ``moe``: numbers from 1 of the
    MoE layers of 8.
    """
    cpu_device()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rl.algorithms.layer_rules import layer_rule
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.router.relay import DistanceRelay
    from tests.support.tiny import build_tiny

    config = tiny_config(parallel=parallel, model={"num_layers": 8})
    groups, _, chunks = build_tiny(config)
    held = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
    before = [sum(number < layers[0] for number in moe) for layers in held]
    rules = [layer_rule("quantile", rank / len(moe)) for rank in range(1, len(moe) + 1)]
    relays = [DistanceRelay(groups.relay, rule, before) for rule in rules]
    tokens, placement = (
        torch.arange(TOKENS),
        packed_placement([TOKENS], TOKENS, torch.device("cpu")),
    )
    seen = {}

    def step(iterator, model):
        number = next(iterator)
        chunk = next(i for i, other in enumerate(chunks) if other is model)
        for relay in relays:
            relay.expect(chunk, TOKENS, tokens.device)
        output = forward_row(model, tokens, placement)
        own = [100.0 * number + layer for layer in held[chunk] if layer in moe]
        rows = torch.tensor(own)[:, None] + torch.arange(TOKENS) / 8
        every = [relay.pass_on(chunk, rows) for relay in relays]

        def loss(logits):
            seen[number] = torch.stack(every).tolist()
            return logits.sum() * 0, torch.tensor(1, dtype=torch.int), {}

        return output, loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(micro_batches)) for _ in chunks]
        if len(chunks) > 1
        else iter(range(micro_batches)),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=TOKENS,
        micro_batch_size=1,
        forward_only=False,
    )
    for relay in relays:
        relay.finish()
    return seen


@pytest.mark.parametrize("moe", [range(1, 9), (4, 5, 8), (8,), (1, 2)])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual_pipeline": 2}), (4, {"pipeline": 4})],
    ids=["two", "interleaved", "four"],
)
def test_for_a_quantile_the_last_stage_has_the_distance_of_every_layer(ranks, parallel, moe):
    """Also where stages have no MoE layer and pass nothing on."""
    *others, last = run_on_ranks(ranks, _appended, parallel, 4, moe)
    assert others == [{}] * (ranks - 1)
    for number in range(4):
        expected = [[100.0 * number + layer + t / 8 for t in range(TOKENS)] for layer in moe]
        assert last[number] == expected


@pytest.mark.parametrize(
    ("layers", "totals"),
    [("mean", [18.0, 1.5]), ("max", [10.0, 1.0]), ("quantile", [7.0, 0.5])],
)
def test_chunks_of_one_rank_pass_on_without_sending(layers, totals):
    """Of two micro-batches, chunk by chunk; the second chunk of three has no MoE layer."""
    from megatron_rl.algorithms.layer_rules import layer_rule
    from megatron_rl.router.relay import DistanceRelay

    relay = DistanceRelay(_OneRank(), layer_rule(layers, 0.5), layers_before=[0, 1, 1])
    assert relay.pass_on(0, torch.tensor([[1.0, 2.0]])) is None
    assert relay.pass_on(0, torch.tensor([[0.0, 0.5]])) is None
    assert relay.pass_on(1, torch.zeros(0, 2)) is None
    assert relay.pass_on(1, torch.zeros(0, 2)) is None
    found = relay.pass_on(2, torch.tensor([[7.0, 7.0], [10.0, 0.0]]))
    assert found.tolist() == [totals[0], {"mean": 9.0, "max": 7.0, "quantile": 2.0}[layers]]
    found = relay.pass_on(2, torch.tensor([[0.5, 0.5], [1.0, 0.25]]))
    assert found.tolist() == [totals[1], {"mean": 1.25, "max": 0.5, "quantile": 0.5}[layers]]
