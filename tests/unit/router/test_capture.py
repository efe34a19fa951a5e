"""What the capture sees is what the routers did; what it measures is `shift_distance`."""

import pytest
import torch
import torch.nn.functional as F

from megatron_rl.algorithms.router_shift import shift_distance
from tests.support.tiny import build_tiny, cpu_device, tiny_config

CPU = torch.device("cpu")
LENGTHS, ROOM = [7, 1, 9], 20
FLOOR = 0.9

ROUTERS = {
    "softmax": {},
    "softmax before top-K": {"router_pre_softmax": True},
    "sigmoid with bias": {"router_score": "sigmoid", "router_expert_bias": True},
    "300 experts": {"num_experts": 300, "moe_top_k": 5, "moe_ffn_hidden_size": 4},
    "one MoE layer of two": {"moe_layer_freq": [0, 1]},
}


@pytest.fixture(autouse=True)
def megatron(monkeypatch):
    cpu_device()
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))


class Watched:
    """A tiny model, its capture, and an independent record of what enters each router."""

    def __init__(self, model=None, parallel=None, distance="top_k", attached=False):
        from megatron_rl.algorithms.distance_rules import distance_rule
        from megatron_rl.models.gpt.chunk import routers_of
        from megatron_rl.router.capture import RouterCapture

        self.config = tiny_config(model=model or {}, parallel=parallel or {})
        _, _, (self.chunk,) = build_tiny(self.config)
        self.routers = {
            layer.layer_number: layer.mlp.router
            for layer in self.chunk.decoder.layers
            if hasattr(layer.mlp, "router")
        }
        generator = torch.Generator().manual_seed(8)
        for router in self.routers.values():
            if router.expert_bias is not None:
                router.expert_bias.copy_(torch.rand(router.num_experts, generator=generator))
        self.capture = RouterCapture(
            routers_of([self.chunk]), [sorted(self.routers)], distance_rule(distance), attached
        )
        self.inputs = {}
        for number, router in self.routers.items():
            router.register_forward_pre_hook(self._remember(number))
        self.tokens = torch.randint(64, (ROOM,), generator=generator)

    def _remember(self, number):
        def hook(module, args):
            self.inputs[number] = args[0].detach().flatten(0, 1)

        return hook

    def forward(self):
        from megatron_rl.models.attention import packed_placement
        from megatron_rl.models.forward import forward_row

        return forward_row(self.chunk, self.tokens, packed_placement(LENGTHS, ROOM, CPU))

    def record(self):
        with torch.no_grad(), self.capture.record(0) as trace:
            self.forward()
        return trace

    def compare(self, trace, weights=None, penalty=None):
        weights = torch.ones(ROOM, dtype=torch.bool) if weights is None else weights
        with self.capture.compare(
            0, trace, weights, self.telemetry(), penalty=penalty
        ) as distances:
            output = self.forward()
        return distances(), output

    def telemetry(self):
        from megatron_rl.router.telemetry import RouterTelemetry

        model = self.config.model
        return RouterTelemetry(model.num_layers, model.num_experts, CPU, floor=FLOOR)

    def logprobs(self, number):
        """log r of all experts, [T, E], from the router's input and weight alone."""
        logits = self.inputs[number] @ self.routers[number].weight.detach().T
        if self.config.model.router_score == "sigmoid":
            return F.logsigmoid(logits)
        return logits.log_softmax(-1)

    def chosen(self, number):
        """Ascending ids of the top-K, biased where there is a bias."""
        scores = self.logprobs(number).exp()
        if self.routers[number].expert_bias is not None:
            scores = scores + self.routers[number].expert_bias
        return scores.topk(self.config.model.moe_top_k, dim=1).indices.sort(dim=1).values

    def move(self, amount=0.05):
        """Change all router weights."""
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for router in self.routers.values():
                router.weight += amount * torch.randn(router.weight.shape, generator=generator)


@pytest.mark.parametrize("model", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_trace_holds_the_routers_choice_and_its_logprobs(model):
    watched = Watched(model)
    trace = watched.record()
    assert sorted(trace) == sorted(watched.routers)
    for number, layer in trace.items():
        chosen = watched.chosen(number)
        assert torch.equal(layer.expert_ids.long(), chosen)
        small = torch.uint8 if watched.config.model.num_experts <= 256 else torch.int16
        assert layer.expert_ids.dtype == small and layer.logprobs.dtype == torch.float32
        expected = watched.logprobs(number).gather(1, chosen)
        torch.testing.assert_close(layer.logprobs, expected, atol=1e-5, rtol=1e-5)


def test_more_than_256_experts_are_told_apart():
    trace = Watched(ROUTERS["300 experts"]).record()
    assert max(int(layer.expert_ids.max()) for layer in trace.values()) > 256


@pytest.mark.parametrize("model", ROUTERS.values(), ids=ROUTERS.keys())
def test_the_distance_to_moved_routers_is_shift_distance(model):
    watched = Watched(model)
    trace = watched.record()
    chosen = {number: watched.chosen(number) for number in trace}
    old = {number: watched.logprobs(number) for number in trace}
    watched.move()
    distances, _ = watched.compare(trace)

    def stacked(source):
        return torch.stack([source(n).gather(1, chosen[n]) for n in sorted(trace)], dim=1)

    new, old = stacked(watched.logprobs), stacked(old.__getitem__)
    assert distances.min() > 1e-3 and len(distances) == len(trace)
    torch.testing.assert_close(distances, (new - old).abs().mean(2).T, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(distances.sum(0), shift_distance(new, old), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("model", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("distance", ["gate_weighted", "union"])
def test_other_distances_of_moved_routers(model, distance):
    """Each token's own, from the definition: the old scores weigh, or both choices count."""
    watched = Watched(model, distance=distance)
    trace = watched.record()
    old = {n: (watched.chosen(n).tolist(), watched.logprobs(n).double()) for n in trace}
    watched.move(0.3)
    distances, _ = watched.compare(trace)
    entered = 0
    for row, number in zip(distances.tolist(), sorted(trace)):
        (chosen, before), after = old[number], watched.logprobs(number).double()
        for t, found in enumerate(row):
            experts, now = set(chosen[t]), set(watched.chosen(number)[t].tolist())
            if distance == "union":
                experts |= now
            weights = {e: before[t, e].exp() if distance == "gate_weighted" else 1 for e in experts}
            moved = sum(w * (after[t, e] - before[t, e]).abs() for e, w in weights.items())
            assert found == pytest.approx((moved / sum(weights.values())).item(), abs=3e-5)
            entered += len(now - set(chosen[t]))
    assert entered > 0


@pytest.mark.parametrize("distance", ["top_k", "union"])
def test_an_attached_distance_has_the_gradient_of_the_definition(distance):
    watched = Watched(distance=distance, attached=True)
    trace = watched.record()
    watched.move()
    distances, _ = watched.compare(trace)
    number = sorted(trace)[-1]
    (found,) = torch.autograd.grad(distances[-1].sum(), watched.routers[number].weight)
    weight = watched.routers[number].weight.detach().clone().requires_grad_()
    new = (watched.inputs[number] @ weight.T).log_softmax(-1)
    ids = trace[number].expert_ids.long()
    counted = torch.zeros_like(new).scatter(1, ids, 1)
    old = trace[number].logprobs
    if distance == "union":
        counted = counted.scatter(1, watched.chosen(number), 1)
    else:
        old = torch.zeros_like(new).scatter(1, ids, old)
    moved = counted * (new - old).abs()
    (expected,) = torch.autograd.grad((moved.sum(1) / counted.sum(1)).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert found.abs().max() > 1e-3
    detached = Watched(distance=distance)
    trace = detached.record()
    assert not detached.compare(trace)[0].requires_grad


@pytest.mark.parametrize("layers", ["mean", "max", "quantile", "last"])
def test_what_runs_is_the_published_formula(monkeypatch, layers):
    """Every layer is measured by `shift_distance`, and what the rule makes of the layers is, bit
    for bit, `shift_distance` of all of them at once.
    """
    from megatron_rl.algorithms import distance_rules
    from megatron_rl.algorithms.layer_rules import layer_rule

    seen = []

    def spy(new, old):
        seen.append((new, old))
        return shift_distance(new, old)

    monkeypatch.setattr(distance_rules, "shift_distance", spy)
    watched = Watched()
    trace = watched.record()
    watched.move()
    distances, _ = watched.compare(trace)
    new, old = (torch.cat(side, dim=1) for side in zip(*seen))
    assert new.shape == (ROOM, len(trace), watched.config.model.moe_top_k)
    assert torch.equal(old, torch.stack([trace[n].logprobs for n in sorted(trace)], dim=1))

    rule = layer_rule(layers, 0.5)
    total = rule.total(rule.running(distances))
    assert total.min() > 1e-3
    assert torch.equal(total, shift_distance(new, old, layers, 0.5))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ROUTERS.values(), ids=ROUTERS.keys())
def test_the_distance_to_unchanged_routers_is_exactly_zero(model, recompute):
    watched = Watched(model, {"recompute": recompute})
    distances, output = watched.compare(watched.record())
    assert distances.tolist() == [[0.0] * ROOM] * len(watched.routers)
    assert output.requires_grad


def test_recomputation_changes_neither_distances_nor_gradients():
    results = []
    for recompute in ("none", "selective", "full"):
        watched = Watched(parallel={"recompute": recompute})
        trace = watched.record()
        watched.move()
        distance, output = watched.compare(trace)
        output.square().sum().backward()
        gradients = {name: p.grad for name, p in watched.chunk.named_parameters()}
        results.append((distance, gradients))
    for distance, gradients in results[1:]:
        assert torch.equal(distance, results[0][0])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("distance", ["top_k", "union"])
def test_a_penalty_at_the_routers_has_the_gradient_of_one_in_the_loss(distance, recompute):
    weights = torch.arange(ROOM) % 3  # as often does a token count
    results = []
    for penalty in (None, torch.tensor(0.7, dtype=torch.float64)):
        parallel = {} if penalty is None else {"recompute": recompute}
        watched = Watched(None, parallel, distance, attached=penalty is None)
        trace = watched.record()
        watched.move()
        for _ in range(2):  # as two micro-batches
            distances, output = watched.compare(trace, weights, penalty)
            loss = output.square().sum()
            if penalty is None:
                loss = loss + 0.7 * (distances * weights).sum()
            else:
                assert not distances.requires_grad
            loss.backward()
        watched.capture.finish()
        results.append(dict(watched.chunk.named_parameters()))
    for name, expected in results[0].items():
        found = results[1][name].grad
        torch.testing.assert_close(found, expected.grad, atol=2e-4, rtol=1e-5, msg=name)


def test_recomputations_meet_the_penalties_of_their_own_passes():
    """Backward passes in the order of the forward passes, as the schedules run them."""
    weights = [torch.arange(ROOM) % 3, torch.arange(ROOM) % 2]
    found = []
    for order in ("in turn", "forward first"):
        watched = Watched(parallel={"recompute": "full"})
        traces, losses = [], []
        for _ in weights:
            traces.append(watched.record())
            watched.move()
        for trace, counted in zip(traces, weights):
            _, output = watched.compare(trace, counted, torch.tensor(0.7))
            losses.append(output.square().sum())
            if order == "in turn":
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        watched.capture.finish()
        found.append(dict(watched.chunk.named_parameters()))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name].grad, expected.grad, atol=2e-5, rtol=1e-5)


def test_a_penalty_that_no_recomputation_has_met_is_an_error():
    from megatron_rl.router.capture import RouterError

    watched = Watched(parallel={"recompute": "full"})
    trace = watched.record()
    watched.compare(trace, penalty=torch.tensor(1.0))
    with pytest.raises(RouterError, match=r"met, by layer: \{1: 1, 2: 1\}"):
        watched.capture.finish()
    watched.capture.finish()  # nothing is left for the next schedule
    watched.compare(trace)  # and without a penalty nothing is kept
    watched.capture.finish()


def test_each_router_computes_its_logits_once():
    watched = Watched()
    calls = []
    for number, router in watched.routers.items():
        gating = router.gating
        router.gating = lambda x, gating=gating, number=number: calls.append(number) or gating(x)
    trace = watched.record()
    assert calls == [1, 2]
    watched.compare(trace)
    assert calls == [1, 2, 1, 2]


def test_comparing_adds_nothing_to_the_graph():
    watched = Watched()
    trace = watched.record()
    watched.move()
    distance, output = watched.compare(trace)
    assert not distance.requires_grad

    def size(node, seen):
        if node is not None and node not in seen:
            seen.add(node)
            for parent, _ in node.next_functions:
                size(parent, seen)
        return len(seen)

    assert size(output.grad_fn, set()) == size(watched.forward().grad_fn, set())


def test_telemetry_counts_the_masked_tokens_only():
    watched = Watched()
    trace = watched.record()
    watched.move(0.3)
    mask, telemetry = torch.arange(ROOM) % 3 == 0, watched.telemetry()
    with watched.capture.compare(0, trace, mask, telemetry):
        watched.forward()
    for number in watched.routers:
        sums = dict(zip(telemetry.COLUMNS, telemetry.sums[number - 1].tolist()))
        new, old_ids = watched.logprobs(number), trace[number].expert_ids.long()
        now = watched.chosen(number)
        per_token = (new.gather(1, old_ids) - trace[number].logprobs).abs().mean(1)
        kept = [len(set(a) & set(b)) / 2 for a, b in zip(old_ids.tolist(), now.tolist())]
        assert sums["tokens"] == sums["compared"] == mask.sum()
        assert sums["distance"] == pytest.approx(per_token[mask].sum().item(), rel=1e-4)
        assert sums["raw_gamma"] == pytest.approx((-per_token[mask]).exp().sum().item(), rel=1e-4)
        assert sums["floored"] == ((-per_token[mask]).exp() < FLOOR).sum() > 0
        assert telemetry.furthest[number - 1] == pytest.approx(per_token[mask].max().item())
        assert sums["overlap"] == pytest.approx(sum(k for k, m in zip(kept, mask.tolist()) if m))
        entropies = -(new.exp() * new).sum(1)
        assert sums["entropy"] == pytest.approx(entropies[mask].sum().item(), rel=1e-4)
        load = F.one_hot(now[mask], 4).sum((0, 1))
        assert telemetry.load[number - 1].tolist() == load.tolist()
    overlap = telemetry.sums[:, telemetry.COLUMNS.index("overlap")]
    assert overlap.min() < mask.sum()  # some token has other experts now


@pytest.mark.parametrize("model", ROUTERS.values(), ids=ROUTERS.keys())
def test_without_a_trace_load_and_entropy_are_counted(model):
    watched = Watched(model)
    mask, telemetry = torch.arange(ROOM) % 3 == 0, watched.telemetry()
    with watched.capture.compare(0, None, mask, telemetry) as distance:
        watched.forward()
    assert distance().shape == (0, ROOM)
    experts = watched.config.model.num_experts
    for number in watched.routers:
        sums = dict(zip(telemetry.COLUMNS, telemetry.sums[number - 1].tolist()))
        logits = watched.inputs[number] @ watched.routers[number].weight.detach().T
        logprobs = logits.log_softmax(-1)
        entropies = -(logprobs.exp() * logprobs).sum(1)
        assert sums["entropy"] == pytest.approx(entropies[mask].sum().item(), rel=1e-4)
        assert (sums["tokens"], sums["compared"]) == (mask.sum(), 0)
        load = F.one_hot(watched.chosen(number)[mask], experts).sum((0, 1))
        assert telemetry.load[number - 1].tolist() == load.tolist()


def test_a_pass_without_telemetry_measures_the_same():
    watched = Watched()
    trace = watched.record()
    watched.move()
    expected, _ = watched.compare(trace)
    with watched.capture.compare(0, trace, torch.ones(ROOM), None) as distance:
        watched.forward()
    assert torch.equal(distance(), expected)


def test_routes_are_those_of_the_trace():
    watched = Watched(ROUTERS["300 experts"])
    trace = watched.record()
    with torch.no_grad(), watched.capture.record_routes() as routes:
        watched.forward()
    assert sorted(routes) == sorted(trace) == list(watched.capture.layers_of())
    for number, ids in routes.items():
        assert ids.dtype == torch.int16 and torch.equal(ids, trace[number].expert_ids)


def test_a_trace_in_pinned_memory_is_the_same_on_a_cpu():
    watched = Watched()
    trace = watched.record()
    with torch.no_grad(), watched.capture.record(0, "pinned") as stored:
        watched.forward()
    for number, layer in trace.items():
        assert torch.equal(stored[number].expert_ids, layer.expert_ids)
        assert torch.equal(stored[number].logprobs, layer.logprobs)


def test_closing_gives_the_routers_back():
    from megatron_rl.router.capture import RouterError

    watched = Watched()
    watched.capture.close()
    assert all("routing" not in vars(router) for router in watched.routers.values())
    with pytest.raises(RouterError, match="fired in layers"):
        watched.record()


def test_a_router_that_fires_twice_or_never_is_an_error():
    from megatron_rl.router.capture import RouterError

    watched = Watched()
    with pytest.raises(
        RouterError, match=r"fired in layers \[1, 1, 2, 2\]; expected each of \[1, 2\] once"
    ):
        with watched.capture.record(0):
            watched.forward()
            watched.forward()
    with pytest.raises(RouterError, match=r"fired in layers \[\]"):
        with watched.capture.record(0):
            pass
    with pytest.raises(RouterError, match="open already"):
        with watched.capture.record(0), watched.capture.record(0):
            pass
    assert sorted(watched.record()) == [1, 2]  # still usable


def test_an_error_inside_a_pass_is_not_hidden():
    watched = Watched()
    with pytest.raises(KeyError, match="mine"):
        with watched.capture.record(0):
            raise KeyError("mine")


def test_a_trace_of_other_tokens_is_refused():
    from megatron_rl.router.capture import RouterError
    from megatron_rl.router.trace import LayerTrace

    watched = Watched()
    trace = {
        number: LayerTrace(layer.expert_ids[:-1], layer.logprobs[:-1])
        for number, layer in watched.record().items()
    }
    with pytest.raises(RouterError, match="layer 1: the trace holds 19 tokens, the pass 20"):
        watched.compare(trace)


def test_routers_that_are_not_expected_are_refused():
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.router.capture import RouterCapture, RouterError

    chunk = Watched().chunk
    with pytest.raises(RouterError, match=r"found routers in layers \[1, 2\]; expected \[2\]"):
        RouterCapture(routers_of([chunk]), [[2]])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("moe_router_fusion", True, "moe_router_fusion hides"),
        ("moe_expert_capacity_factor", 1.0, "drops tokens"),
        ("enable_cuda_graph", True, "CUDA graphs"),
    ],
)
def test_configurations_that_hide_the_logits_are_refused(field, value, message):
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.router.capture import RouterCapture, RouterError

    _, megatron_config, (chunk,) = build_tiny(tiny_config())
    setattr(megatron_config, field, value)
    with pytest.raises(RouterError, match=message):
        RouterCapture(routers_of([chunk]), [[1, 2]])
