"""Through Megatron's own schedules every micro-batch meets the sum of its own distances."""

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device, tiny_config

TOKENS = 8


def relay_of(groups, rule, layers_before, chunks, num_layers=4, **changed):
    from megatron_rl.router.relay import DistanceRelay

    config = chunks[0].config
    settings = dict(
        num_layers=num_layers,
        hidden_size=config.hidden_size,
        dtype=config.pipeline_dtype,
        is_first=groups.is_first_stage,
        is_last=groups.is_last_stage,
    )
    return DistanceRelay(rule, layers_before, **(settings | changed))


def _relayed(parallel, micro_batches, forward_only, dtype="fp32"):
    """On a rank: {micro-batch: total} as its loss saw it.

    Each chunk adds 100 * micro-batch + its number in the model + token / 8, and a third.
    """
    cpu_device()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_rl.algorithms.layer_rules import layer_rule
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.gpt.chunk import cut_input
    from tests.support.tiny import build_tiny

    config = tiny_config(parallel=parallel, model={"num_layers": 4, "dtype": dtype})
    groups, _, chunks = build_tiny(config)
    relay = relay_of(groups, layer_rule("mean"), [0] * len(chunks), chunks)
    tokens, placement = (
        torch.arange(TOKENS),
        packed_placement([TOKENS], TOKENS, torch.device("cpu")),
    )
    totals = {}

    def step(iterator, model):
        number = next(iterator)
        chunk = next(i for i, other in enumerate(chunks) if other is model)
        place = chunk * groups.pipeline.size() + groups.pipeline.rank()
        before = None
        if not relay.is_first(chunk):
            before = relay.read(cut_input(model, TOKENS), chunk, TOKENS)
        output = forward_row(model, tokens, placement)
        own = 100.0 * number + place + torch.arange(TOKENS)[None] / 8 + 1 / 3
        running = relay.join(before, own)

        def loss(logits):
            totals[number] = relay.rule.total(running)
            return logits.sum() * 0, torch.tensor(1, dtype=torch.int), {}

        last = place == len(chunks) * groups.pipeline.size() - 1
        assert relay.ends_at(chunk) == last
        return output if last else relay.put(output, running), loss

    iterators = [iter(range(micro_batches)) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=TOKENS + relay.rows_behind(TOKENS),
        micro_batch_size=1,
        forward_only=forward_only,
    )
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
    _check_sums(ranks, parallel, micro_batches, forward_only)


def test_between_stages_in_bf16_the_sums_stay_fp32():
    _check_sums(2, {"pipeline": 2}, 3, False, "bf16")


def _check_sums(ranks, parallel, micro_batches, *settings):
    chunks = ranks * parallel.get("virtual_pipeline", 1)
    *others, last = run_on_ranks(ranks, _relayed, parallel, micro_batches, *settings)
    assert others == [{}] * (ranks - 1)
    assert sorted(last) == list(range(micro_batches))
    for number, total in last.items():
        expected = torch.zeros(TOKENS)
        for place in range(chunks):
            expected = expected + (100.0 * number + place + torch.arange(TOKENS) / 8 + 1 / 3)
        assert total.tolist() == expected.tolist()


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
    from megatron_rl.models.gpt.chunk import cut_input
    from tests.support.tiny import build_tiny

    config = tiny_config(parallel=parallel, model={"num_layers": 8})
    groups, _, chunks = build_tiny(config)
    held = [[layer.layer_number for layer in chunk.decoder.layers] for chunk in chunks]
    before = [sum(number < layers[0] for number in moe) for layers in held]
    rules = [layer_rule("quantile", rank / len(moe)) for rank in range(1, len(moe) + 1)]
    relays = [relay_of(groups, rule, before, chunks, len(moe)) for rule in rules]
    tokens, placement = (
        torch.arange(TOKENS),
        packed_placement([TOKENS], TOKENS, torch.device("cpu")),
    )
    seen = {}

    def step(iterator, model):
        number = next(iterator)
        chunk = next(i for i, other in enumerate(chunks) if other is model)
        so_far = None  # the same for all
        if not relays[0].is_first(chunk):
            so_far = relays[0].read(cut_input(model, TOKENS), chunk, TOKENS)
        output = forward_row(model, tokens, placement)
        own = [100.0 * number + layer for layer in held[chunk] if layer in moe]
        rows = torch.tensor(own)[:, None] + torch.arange(TOKENS) / 8
        running = relays[0].join(so_far, rows)

        def loss(logits):
            every = [relay.rule.total(running) for relay in relays]
            seen[number] = torch.stack(every).tolist()
            return logits.sum() * 0, torch.tensor(1, dtype=torch.int), {}

        return output if relays[0].ends_at(chunk) else relays[0].put(output, running), loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(range(micro_batches)) for _ in chunks]
        if len(chunks) > 1
        else iter(range(micro_batches)),
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=micro_batches,
        seq_length=TOKENS + relays[0].rows_behind(TOKENS),
        micro_batch_size=1,
        forward_only=False,
    )
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
    ("dtype", "width", "rows"),
    [(torch.float32, 4, 4), (torch.bfloat16, 4, 8), (torch.bfloat16, 7, 5)],
)
def test_what_is_put_behind_activations_is_taken_bit_by_bit_and_gradients_pass_by(
    dtype, width, rows
):
    """Three values of five tokens, 60 bytes, behind activations."""
    cpu_device()
    from megatron_rl.algorithms.layer_rules import layer_rule
    from megatron_rl.models.gpt.chunk import cut_input
    from megatron_rl.router.relay import DistanceRelay

    rule, shape = layer_rule("quantile", 0.5), dict(num_layers=3, hidden_size=width, dtype=dtype)
    make = lambda first, last: DistanceRelay(  # noqa: E731
        rule, [3], is_first=first, is_last=last, **shape
    )
    assert make(True, True).rows_behind(5) == 0
    assert make(True, False).rows_behind(5) == rows
    running = torch.tensor([0.1, float("nan"), 1e-42, 3.3e38, -1 / 3]).repeat(3).view(3, 5)
    output = torch.randn(5, 1, width).to(dtype).requires_grad_()
    sent = make(True, False).put(output, running)
    assert torch.equal(sent[:5], output)

    class Model:
        decoder = type("Block", (), {})()

        def set_input_tensor(self, tensor):
            self.decoder.input_tensor = tensor

    received, model = sent.detach().requires_grad_(), Model()
    model.set_input_tensor(received)
    assert [relay.is_first(0) for relay in (make(True, True), make(False, True))] == [True, False]
    taken = make(False, True).read(cut_input(model, 5), 0, 5)
    assert torch.equal(taken.view(torch.int32), running.view(torch.int32))
    weights = torch.randn(5, 1, width).to(dtype)
    (model.decoder.input_tensor * weights).sum().backward()
    sent.backward(received.grad)
    assert torch.equal(output.grad, weights) and not taken.requires_grad
