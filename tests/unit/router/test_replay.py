"""Routers that are told which experts to take: what comes out, what is learned, what is refused.

The judge is a router of this file: it makes weights and map of every token in a Python loop, from
the logits and the experts given, and shares no code with Megatron's replay.
"""

import contextlib

import pytest
import torch

from tests.support.tiny import build_tiny, cpu_device, tiny_config

CPU = torch.device("cpu")
LENGTHS, ROOM = [7, 1, 9], 20

MODELS = {
    "softmax": {},
    "softmax before top-K": {"router_pre_softmax": True},
    "sigmoid with bias": {
        "router_score": "sigmoid",
        "router_expert_bias": True,
        "router_scaling_factor": 2.5,
    },
    "groups": {
        "num_experts": 8,
        "moe_top_k": 3,
        "router_score": "sigmoid",
        "router_expert_bias": True,
        "router_num_groups": 4,
        "router_group_top_k": 2,
    },
    "300 experts": {"num_experts": 300, "moe_top_k": 5, "moe_ffn_hidden_size": 4},
    "one MoE layer of two": {"moe_layer_freq": [0, 1]},
}


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def build(model=None, recompute="none", layers=2, replay=True):
    """(chunk, config) of a tiny model whose routers can replay."""
    config = tiny_config(model={"num_layers": layers, **(model or {})})
    parallel = config.parallel.model_copy(update={"recompute": recompute})
    config = config.model_copy(update={"parallel": parallel})
    groups, _, _ = build_tiny(config)
    from megatron_rl.models.build import build_chunks, transformer_config

    transformer = transformer_config(config.model, parallel, cpu_device(), routing_replay=replay)
    (chunk,) = build_chunks(config.model, transformer, groups, cpu_device(), 1)
    generator = torch.Generator().manual_seed(8)
    for router in routers_of(chunk).values():
        if router.expert_bias is not None:
            router.expert_bias.copy_(torch.rand(router.num_experts, generator=generator))
    return chunk, config.model


def routers_of(chunk):
    return {
        layer.layer_number: layer.mlp.router
        for layer in chunk.decoder.layers
        if hasattr(layer.mlp, "router")
    }


def any_routes(chunk, seed):
    """Random experts for every token and MoE layer, different ones in a row."""
    generator = torch.Generator().manual_seed(seed)
    return {
        number: torch.rand(ROOM, router.num_experts, generator=generator)
        .topk(router.topk)
        .indices.to(torch.uint8 if router.num_experts <= 256 else torch.int16)
        for number, router in routers_of(chunk).items()
    }


TOKENS = torch.randint(64, (ROOM,), generator=torch.Generator().manual_seed(5))


def forward(chunk, tokens=TOKENS):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    return forward_row(chunk, tokens, packed_placement(LENGTHS, ROOM, CPU))


def judge(chunk, model, routes):
    """Replace the routers' routing by a loop over tokens that takes the experts of ``routes``."""

    def routing_of(number):
        def routing(logits, padding_mask=None, **_):
            logits = logits.flatten(0, -2)
            probs, chosen = [], torch.zeros(logits.shape, dtype=torch.bool)
            for token, ids in enumerate(routes[number].long().tolist()):
                picked = logits[token, ids]
                if model.router_score == "sigmoid":
                    weights = torch.sigmoid(picked)
                    weights = weights / weights.sum()
                elif model.router_pre_softmax:
                    weights = logits[token].softmax(-1)[ids]
                else:
                    weights = picked.softmax(-1)
                weights = weights * (model.router_scaling_factor or 1.0)
                probs.append(torch.zeros(logits.shape[1]).index_add(0, torch.tensor(ids), weights))
                chosen[token, ids] = True
            return torch.stack(probs), chosen

        return routing

    for number, router in routers_of(chunk).items():
        router.routing = routing_of(number)


def gradients(chunk, output):
    generator = torch.Generator().manual_seed(6)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return {name: p.grad.clone() for name, p in chunk.named_parameters()}


def close(found, expected):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        error = float((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_replayed_experts_give_the_outputs_and_gradients_of_the_loop(model, recompute):
    from megatron_rl.router.replay import RouteReplay

    reference, config = build(model)
    routes = any_routes(reference, 3)
    judge(reference, config, routes)
    expected = forward(reference)
    expected_gradients = gradients(reference, expected)

    chunk, _ = build(model, recompute)
    free = forward(chunk).detach()
    replay = RouteReplay([routers_of(chunk)])
    with replay.routes(0, routes):
        output = forward(chunk)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)
    close(gradients(chunk, output), expected_gradients)
    replay.finish()
    assert (output - free).abs().max() > 0.1  # other experts than the routers' own
    assert all(
        p.grad.norm() > 0 for name, p in chunk.named_parameters() if ".router.weight" in name
    )
    torch.testing.assert_close(forward(chunk), free)  # free again


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_routers_choose_for_themselves_where_no_expert_is_known(model):
    """What they choose depends on the experts of the tokens and layers before, so the loop is given
    what the replay has chosen, and a router of its own must choose that as well.
    """
    from megatron_rl.router.capture import RouterCapture
    from megatron_rl.router.replay import RouteReplay

    chunk, config = build(model)
    layers = sorted(routers_of(chunk))
    capture, replay = RouterCapture([routers_of(chunk)], [layers]), RouteReplay([routers_of(chunk)])
    known = torch.rand(ROOM, generator=torch.Generator().manual_seed(7)) > 0.4
    routes = any_routes(chunk, 3)
    garbage = {n: torch.where(known[:, None], ids, 0) for n, ids in routes.items()}
    with torch.no_grad():
        with replay.routes(0, garbage, known), capture.record(0) as trace:
            output = forward(chunk)
        replay.finish()
        chosen = {number: layer.expert_ids for number, layer in trace.items()}
        for number, ids in routes.items():
            assert torch.equal(chosen[number][known], ids[known].sort(dim=1).values)
        own = 0
        with replay.routes(0, chosen), watched_scores(chunk) as scores:
            again = forward(chunk)
        for number, (values, groups) in scores.items():
            for token in (~known).nonzero().flatten().tolist():
                best = slow_choice(values[token].tolist(), config.moe_top_k, *groups)
                assert sorted(chosen[number][token].tolist()) == best
                own += best != sorted(routes[number][token].tolist())
    assert own > 0
    torch.testing.assert_close(again, output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(forward(chunk), forward(build(model)[0]))  # free again


@contextlib.contextmanager
def watched_scores(chunk):
    """Inside, by layer: the scores that each router chooses by, and (groups, groups taken)."""
    seen, routers = {}, routers_of(chunk)

    def watch(number, replay):
        inner = replay.get_replay_topk

        def spy(scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
            seen[number] = scores.clone(), (num_groups, group_topk)
            return inner(scores, topk, num_groups, group_topk, default_compute_topk)

        replay.get_replay_topk = spy

    for number, router in routers.items():
        watch(number, router.router_replay)
    yield seen
    for router in routers.values():
        del router.router_replay.get_replay_topk


def slow_choice(scores, top_k, num_groups, groups_taken):
    """The experts with the largest scores, of the groups whose best K / taken add up to most."""
    allowed = list(range(len(scores)))
    if groups_taken:
        size = len(scores) // num_groups
        parts = [allowed[i : i + size] for i in range(0, len(scores), size)]
        best = lambda part: sum(sorted(scores[e] for e in part)[-(top_k // groups_taken) :])  # noqa: E731
        allowed = [e for part in sorted(parts, key=best)[-groups_taken:] for e in part]
    return sorted(sorted(allowed, key=lambda e: scores[e])[-top_k:])


def test_routes_of_some_tokens_are_refused_where_gradients_are_wanted():
    from megatron_rl.router.capture import RouterError
    from megatron_rl.router.replay import RouteReplay

    chunk, _ = build()
    with pytest.raises(RouterError, match="routes of some tokens in a pass with gradients"):
        with RouteReplay([routers_of(chunk)]).routes(
            0, any_routes(chunk, 1), torch.ones(ROOM).bool()
        ):
            pass


def test_recomputation_takes_the_experts_of_its_own_micro_batch():
    """Three forward passes before the first backward pass, as a pipeline's first stage does."""
    from megatron_rl.router.replay import RouteReplay

    results = []
    for recompute in ("none", "full"):
        chunk, _ = build(recompute=recompute, layers=3)
        replay = RouteReplay([routers_of(chunk)])
        outputs = []
        for number in range(3):
            with replay.routes(0, any_routes(chunk, number)):
                outputs.append(forward(chunk, TOKENS.roll(number)))
        for output in outputs[:2]:
            found = gradients(chunk, output)
        with replay.routes(0, any_routes(chunk, 9)):  # a forward pass between backward passes
            outputs.append(forward(chunk))
        for output in outputs[2:]:
            found = gradients(chunk, output)
        replay.finish()
        results.append(found)
    close(results[1], results[0])


def test_nothing_is_queued_where_nothing_is_recomputed():
    from megatron_rl.router.replay import RouteReplay

    for recompute, grad in (("none", True), ("selective", True), ("full", False)):
        chunk, _ = build(recompute=recompute)
        replay = RouteReplay([routers_of(chunk)])
        with torch.set_grad_enabled(grad), replay.routes(0, any_routes(chunk, 1)):
            forward(chunk)
        for router in routers_of(chunk).values():
            assert router.router_replay.replay_backward_list == []
            assert router.router_replay.target_topk_idx is None
        replay.finish()


def test_a_missing_recomputation_is_an_error_and_leaves_the_routers_free():
    from megatron_rl.router.capture import RouterError
    from megatron_rl.router.replay import RouteReplay

    chunk, _ = build(recompute="full")
    replay = RouteReplay([routers_of(chunk)])
    with replay.routes(0, any_routes(chunk, 1)):
        forward(chunk)
    with pytest.raises(RouterError, match=r"no recomputation has taken, by layer: \{1: 1, 2: 1\}"):
        replay.finish()
    replay.finish()
    with torch.no_grad():
        free, _ = build()
        torch.testing.assert_close(forward(chunk), forward(free))


def test_the_capture_sees_the_replayed_experts():
    from megatron_rl.router.capture import RouterCapture
    from megatron_rl.router.replay import RouteReplay

    chunk, _ = build()
    capture, replay = RouterCapture([routers_of(chunk)], [[1, 2]]), RouteReplay([routers_of(chunk)])
    routes = any_routes(chunk, 2)
    with torch.no_grad(), replay.routes(0, routes), capture.record(0) as trace:
        forward(chunk)
    for number, layer in trace.items():
        assert torch.equal(layer.expert_ids, routes[number].sort(dim=1).values)


def test_other_models_of_the_process_are_left_alone():
    """Megatron's class-wide list holds the routers of every model ever built here."""
    from megatron_rl.router.replay import RouteReplay

    other, _ = build()
    free = forward(other).detach()
    chunk, _ = build()
    replay = RouteReplay([routers_of(chunk)])
    with replay.routes(0, any_routes(chunk, 2)):
        assert torch.equal(forward(other), free)
    replay.finish()


def test_routes_that_do_not_fit_are_refused():
    from megatron_rl.router.capture import RouterError
    from megatron_rl.router.replay import RouteReplay

    chunk, _ = build()
    replay, routes = RouteReplay([routers_of(chunk)]), any_routes(chunk, 1)
    with pytest.raises(RouterError, match=r"routes of layers \[1\]; expected \[1, 2\]"):
        with replay.routes(0, {1: routes[1]}):
            pass
    with pytest.raises(RouterError, match=r"layer 1: routes of shape \(20, 1\); expected"):
        with replay.routes(0, {n: ids[:, :1] for n, ids in routes.items()}):
            pass
    without, _ = build(replay=False)
    with pytest.raises(RouterError, match="layer 1 was built without moe_enable_routing_replay"):
        RouteReplay([routers_of(without)])
