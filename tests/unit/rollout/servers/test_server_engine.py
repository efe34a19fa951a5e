"""The engine on servers: only servers with the trainer's weights answer."""

import contextlib
import dataclasses
import sys
import threading

import numpy as np
import psutil
import pytest
import torch

from megatron_rl.errors import RunFailed, Stopped, UserError
from megatron_rl.rollout.engine import SamplingSettings
from tests.support import hugging_face
from tests.support.fake_server import FakeServer, hugging_face_model, toy_model, wait_for
from tests.support.ranks import run_on_ranks
from tests.support.runs import ROOT
from tests.support.server_engine import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    build,
    build_on,
    change_weights,
    config_of,
    tokens_of,
)


@pytest.fixture
def servers(directory):
    """Two servers with other weights, until the policy sends its own."""
    with (
        FakeServer(toy_model(), hugging_face_model) as one,
        FakeServer(toy_model(), hugging_face_model) as other,
    ):
        yield one, other


@pytest.fixture
def built(directory, tmp_path, servers, told):
    return build(config_of(directory, tmp_path / "run", [s.url for s in servers]), told)


def test_answers_are_those_of_the_built_in_engine(built, servers, told):
    from megatron_rl.rollout.builtin.generate import BuiltinEngine

    engine, chunks, groups, transformer = built
    judge = BuiltinEngine(chunks, groups, transformer, (1,), 8, engine._decode, 64)
    found, expected = (e.generate(PROMPTS, GREEDY) for e in (engine, judge))
    assert len(found) == len(PROMPTS)
    for group, wanted in zip(found, expected, strict=True):
        (answer,), (judged,) = group.completions, wanted.completions
        assert group.prompt is wanted.prompt
        assert answer.tokens.tolist() == judged.tokens.tolist()
        assert (answer.finished, answer.text) == (judged.finished, judged.text)
        np.testing.assert_allclose(answer.logprobs, judged.logprobs, atol=1e-4)
        assert answer.version == 0
    assert told == []
    metrics = engine.metrics()
    assert 0 < metrics.pop("servers/probe_difference") < 1e-4
    assert metrics.pop("time/sync_s") > 0
    assert metrics == {"servers/used": 2, "servers/failures": 0, "servers/restarts": 0}
    assert engine.metrics()["time/sync_s"] == 0.0


def test_answers_end_with_the_same_stop_tokens_as_those_of_the_built_in_engine(
    directory, tmp_path, servers, told
):
    """The tokens in the server's own files do not count. The text has no stop token."""
    from megatron_rl.rollout.builtin.generate import BuiltinEngine

    for server in servers:
        server.own_stops = set(range(60))
    config = config_of(directory, tmp_path / "run", [s.url for s in servers])
    engine, chunks, groups, transformer = build(config, told)
    judge = BuiltinEngine(chunks, groups, transformer, (), 8, engine._decode, 64)
    settings = dataclasses.replace(GREEDY, max_new_tokens=20)
    endless = [g.completions[0].tokens.tolist() for g in judge.generate(PROMPTS, settings)]
    stops = {tokens[n] for tokens, n in zip(endless, (3, 7))}  # the third answer may end anywhere
    engine = build_on(config, chunks, groups, told, stop_ids=tuple(stops))
    judge = BuiltinEngine(chunks, groups, transformer, stops, 8, engine._decode, 64)
    found, expected = (e.generate(PROMPTS, settings) for e in (engine, judge))
    for group, wanted, tokens in zip(found, expected, endless, strict=True):
        (answer,), (judged,) = group.completions, wanted.completions
        length = next((i + 1 for i, token in enumerate(tokens) if token in stops), 20)
        assert answer.tokens.tolist() == judged.tokens.tolist() == tokens[:length]
        assert answer.finished == judged.finished == (tokens[length - 1] in stops)
        assert answer.text == judged.text == engine._decode(tokens[: length - answer.finished])
    assert sum(group.completions[0].finished for group in found) >= 2 and told == []


def test_an_answer_is_as_long_as_the_sequence_allows(directory, tmp_path, servers, told):
    """Nothing longer is asked for, and nothing shorter is accepted without a stop token."""
    config = config_of(directory, tmp_path / "run", [s.url for s in servers])
    engine = build_on(config, *build(config, told)[1:3], told, stop_ids=())
    settings = SamplingSettings(1, 60, greedy=True)
    lengths = [len(g.completions[0].tokens) for g in engine.generate(PROMPTS, settings)]
    assert lengths == [60, 60, 64 - 8] and told == []


def test_new_weights_are_sent_once_and_answered_with(built, servers, tmp_path):
    engine, chunks, *_ = built
    left = tmp_path / "run" / "servers" / "weights" / "version_40"  # of a run that was killed
    left.mkdir(parents=True)
    first = engine.generate(PROMPTS, SAMPLED)
    assert not left.exists()
    assert [server.loaded for server in servers] == [["version_0"]] * 2
    again = engine.generate(PROMPTS, SAMPLED)
    for one, other in zip(first, again):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.1)
    for number in range(1, 4):
        engine.weights_changed()
        new = engine.generate(PROMPTS, SAMPLED)
        assert {answer.version for group in new for answer in group.completions} == {number}
    assert servers[0].loaded == [f"version_{number}" for number in range(4)]
    logprobs = [
        np.concatenate([a.logprobs[:1] for g in groups for a in g.completions])
        for groups in (first, new)
    ]
    assert np.abs(logprobs[0] - logprobs[1]).max() > 1e-3
    assert engine.metrics()["servers/probe_difference"] < 1e-4
    kept = {path.name for path in (tmp_path / "run" / "servers" / "weights").iterdir()}
    assert kept == {"version_2", "version_3"}


def test_a_stop_is_heard_while_answers_are_waited_for(built, servers):
    engine, *_ = built
    engine.generate(PROMPTS, SAMPLED)  # now the servers have the weights
    for server in servers:
        server.fault = "hang"
    looks = []
    engine._stop = lambda: looks.append(1) or len(looks) > 1
    with pytest.raises(Stopped):
        engine.generate(PROMPTS, SAMPLED)
    assert len(looks) == 2
    engine.close()


def test_answers_begun_before_the_weights_change_are_by_the_old_ones(built, servers):
    engine, chunks, *_ = built
    expected = tokens_of(engine.generate(PROMPTS, SAMPLED))
    may_answer = threading.Event()
    for server in servers:
        server.before_answer = lambda: may_answer.wait(100.0)
    finish = engine.begin(PROMPTS, SAMPLED)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.1)
    engine.weights_changed()
    threading.Timer(0.3, may_answer.set).start()
    # requests with the new weights wait until the open requests are answered
    new = engine.generate(PROMPTS, SAMPLED)
    old = finish()
    assert tokens_of(old) == expected != tokens_of(new)
    versions = [{a.version for group in groups for a in group.completions} for groups in (old, new)]
    assert versions == [{0}, {1}] and engine.version == 1
    assert engine.metrics()["servers/failures"] == 0


def masked(directory, tmp_path, servers, told, **rollout):
    """(engine, chunks) of a run with sampling masks, on servers that return them."""
    for server in servers:
        server.masks = True
    config = config_of(directory, tmp_path / "run", [s.url for s in servers])
    truncated = {"top_k": 6, "top_p": 0.9, "temperature": 0.8, "keep_sampling_mask": True}
    changed = config.rollout.model_copy(update={**truncated, **rollout})
    return build(config.model_copy(update={"rollout": changed}), told)[:2]


TRUNCATED = SamplingSettings(3, 8, seed=4, top_k=6, top_p=0.9, temperature=0.8, kept=True)


def test_kept_tokens_come_with_the_answers_and_the_probe_is_over_them(
    directory, tmp_path, servers, told
):
    engine, _ = masked(directory, tmp_path, servers, told)
    groups = engine.generate(PROMPTS, TRUNCATED)
    assert told == [] and 0 < engine.metrics()["servers/probe_difference"] < 1e-4
    model = hugging_face.load(tmp_path / "run" / "servers" / "weights" / "version_0")
    sizes = set()
    for group in groups:
        for answer in group.completions:
            tokens = torch.tensor([*group.prompt.tokens, *answer.tokens])
            with torch.no_grad():
                logits = model(tokens[None], use_cache=False).logits[0].double() / 0.8
            logits = logits[len(group.prompt.tokens) - 1 : -1]
            for place, ids in enumerate(np.split(answer.kept.ids, answer.kept.offsets[1:-1])):
                assert set(ids) <= set(logits[place].topk(6).indices.tolist())
                over = logits[place, answer.tokens[place]] - logits[place, ids].logsumexp(0)
                assert answer.logprobs[place] == pytest.approx(over.item(), abs=1e-4)
                sizes.add(len(ids))
    assert len(sizes) > 2
    greedy = engine.generate(PROMPTS, dataclasses.replace(TRUNCATED, samples=1, greedy=True))
    assert all(group.completions[0].kept is None for group in greedy)


def test_servers_without_masks_are_left_out(directory, tmp_path, servers, told):
    engine, _ = masked(directory, tmp_path, servers, told)
    servers[0].masks = False
    engine.generate(PROMPTS, TRUNCATED)
    assert len(told) == 1 and "no sets of kept tokens for 12 tokens" in told[0]


LONG = SamplingSettings(3, 40, seed=4)


@pytest.fixture
def ahead(directory, tmp_path, servers, told):
    """As ``built``, with a staleness of 2. The servers stop in the middle of each answer until an
    update aborts it. Their first pause is that of the first weights.
    """
    config = config_of(directory, tmp_path / "run", [s.url for s in servers])
    rollout = config.rollout.model_copy(update={"lag": 2})
    built = build(config.model_copy(update={"rollout": rollout}), told)
    for server in servers:
        server.hold = (15, 2)  # later than any answer to the probe
    return built


def test_answers_that_are_broken_off_go_on_with_the_new_weights(ahead, servers, tmp_path, told):
    """Every token has the log-probability of the weights that sampled it: first the old ones."""
    engine, chunks, *_ = ahead
    finish = engine.begin(PROMPTS, LONG)
    wait_for(lambda: sum(len(server.asked) for server in servers) >= 2 + len(PROMPTS))
    change_weights(engine, chunks)
    new = engine.generate(PROMPTS, SAMPLED)
    old = finish()
    assert {a.version for group in new for a in group.completions} == {1}
    weights = tmp_path / "run" / "servers" / "weights"
    models = [hugging_face.load(weights / f"version_{number}") for number in range(2)]
    partial = 0
    for group in old:
        for answer in group.completions:
            first, last = hugging_face.drawn_by(models, group.prompt, answer, 1e-4)
            switched = len(first) if first.all() else int(first.argmin())
            assert last[switched:].all()
            assert len(answer.tokens) == 40 or answer.finished
            assert (answer.version, answer.last_version) == (0, int(switched < len(first)))
            partial += 0 < switched < len(first)
    assert partial >= 3 and sum(server.broken_off for server in servers) >= 3
    assert told == [] and engine.metrics()["servers/failures"] == 0


def test_what_a_server_without_the_new_weights_went_on_with_is_not_taken(ahead, servers, told):
    engine, chunks, *_ = ahead
    finish = engine.begin(PROMPTS, LONG)
    wait_for(lambda: all(server.asked for server in servers))
    servers[0].fault = "lie"
    change_weights(engine, chunks)
    engine.generate([], SAMPLED)
    answers = [answer for group in finish() for answer in group.completions]
    assert len(answers) == 9 and all(len(a.tokens) == 40 or a.finished for a in answers)
    assert any("is left out: its log-probabilities differ" in text for text in told)
    assert engine.metrics()["servers/used"] == 1


def test_several_batches_are_sampled_at_a_time(ahead, servers):
    engine = ahead[0]
    for server in servers:
        server.hold = None
    finishers = [engine.begin(PROMPTS, dataclasses.replace(LONG, seed=n)) for n in range(2)]
    probes = 2 * len(servers)
    wait_for(lambda: sum(len(server.asked) for server in servers) == probes + 2 * len(PROMPTS))
    batches = [tokens_of(finish()) for finish in finishers]
    assert batches[0] != batches[1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lie", "is left out: its log-probabilities differ from the trainer's by "),
        ("refuse", 'did not take the weights: BadAnswer /collective_rpc answered 500: {"error"'),
        ("stale", "is left out: the probe failed: BadAnswer weights of version 0; expected 1"),
        ("garbage", "is left out: the probe failed: BadAnswer not a response"),
    ],
)
def test_a_server_without_the_weights_is_left_out_and_taken_back(
    built, servers, told, fault, message
):
    engine = built[0]
    engine.weights_changed()
    servers[0].fault = fault
    groups = engine.generate(PROMPTS, SAMPLED)
    assert len(told) == 1 and told[0].startswith(f"rollout server {servers[0].url}"), told
    assert message in told[0]
    assert [len(group.completions) for group in groups] == [3, 3, 3]
    assert engine.metrics()["servers/used"] == 1
    servers[0].fault = ""
    engine.weights_changed()
    engine.generate(PROMPTS, SAMPLED)
    assert len(told) == 1
    assert engine.metrics()["servers/used"] == 2


def test_without_a_server_that_has_the_weights_the_run_ends(built, servers):
    for server in servers:
        server.fault = "lie"
    with pytest.raises(RunFailed, match="no rollout server has the weights of the trainer .http"):
        built[0].generate(PROMPTS, GREEDY)
    for server in servers:
        server.fault = "refuse"
    with pytest.raises(RunFailed, match="weights of the trainer .none took them."):
        built[0].generate(PROMPTS, GREEDY)


def test_a_token_that_would_end_the_server_is_not_sent(built, servers):
    wrong = dataclasses.replace(PROMPTS[0], tokens=np.array([3, hugging_face.VOCABULARY]))
    with pytest.raises(UserError, match="problem 0 .from 0. holds the token 125; expected ids"):
        built[0].generate([wrong], GREEDY)
    assert servers[0].asked == []


def fake_command(directory, host, port):
    argv = [sys.executable, "-m", "tests.support.fake_server", str(port), str(directory)]
    return argv, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_servers_of_its_own_are_started_brought_back_and_stopped(directory, tmp_path, told):
    config = config_of(directory, tmp_path / "run", [])
    servers = config.rollout.servers.model_copy(update={"start": 2, "python": "python"})
    rollout = config.rollout.model_copy(update={"servers": servers})
    engine, *_ = build(config.model_copy(update={"rollout": rollout}), told, fake_command)
    with contextlib.closing(engine):
        expected = tokens_of(engine.generate(PROMPTS, SAMPLED))
        processes = [psutil.Process(process.pid) for process in engine.sync.own.processes]
        assert engine.metrics()["servers/used"] == 2 and told == []
        # One dies between two steps: the other answers while it starts again.
        kill(processes[0])
        engine.weights_changed()
        assert tokens_of(engine.generate(PROMPTS, SAMPLED)) == expected
        metrics = engine.metrics()
        assert (metrics["servers/used"], metrics["servers/restarts"]) == (1, 1)
        assert told == [
            f"rollout server {engine.sync.own.processes[0].url} has ended; starting it again"
        ]
        wait_for(lambda: engine.sync.own.processes[0].is_ready, 60.0)
        engine.weights_changed()
        assert tokens_of(engine.generate(PROMPTS, SAMPLED)) == expected
        assert engine.metrics()["servers/used"] == 2
        # Both die before they are asked: both start again with the present weights.
        processes = [psutil.Process(process.pid) for process in engine.sync.own.processes]
        for process in processes:
            kill(process)
        assert tokens_of(engine.generate(PROMPTS, SAMPLED)) == expected
        assert engine.metrics()["servers/restarts"] == 2
        processes = [psutil.Process(process.pid) for process in engine.sync.own.processes]
    assert not any(process.is_running() for process in processes)


def kill(supervisor):
    """Kill the server, as a crash does, and wait until its supervisor has seen it."""
    for child in supervisor.children():
        child.kill()
    wait_for(lambda: not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE)


def _generate(directory, run_dir, urls, parallel):
    """On a rank: the prompts of its data-parallel rank, and their answers."""
    engine, _, groups, _ = build(config_of(directory, run_dir, urls, **parallel), [])
    mine = PROMPTS[groups.data.rank() :: groups.data.size()]
    answers = engine.generate(mine, SAMPLED)
    return [
        (group.prompt.index, [answer.tokens.tolist() for answer in group.completions])
        for group in answers
    ], engine.metrics()


def _routes(directory, run_dir, urls, parallel):
    """On a rank: the experts of each answer, and its length."""
    engine, *_ = build(config_of(directory, run_dir, urls, **parallel), [])
    (group,) = engine.generate(PROMPTS[:1], dataclasses.replace(SAMPLED, routes=True))
    return [(answer.routed_experts, len(answer.tokens)) for answer in group.completions]


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [({"pipeline": 2}, [(1, 2), (3, 4)]), ({"tensor": 2}, [(1, 2, 3, 4)] * 2)],
)
def test_a_pipeline_stage_gets_the_experts_of_its_layers(
    directory, tmp_path, servers, parallel, layers
):
    for server in servers:
        server.experts = (4, 2)
    urls = [server.url for server in servers]
    ranks = run_on_ranks(2, _routes, directory, tmp_path, urls, parallel)
    for answers, wanted in zip(ranks, layers, strict=True):
        assert len(answers) == 3
        for routes, count in answers:
            assert routes.layers == wanted and routes.ids.dtype == np.uint8
            places = np.arange(len(PROMPTS[0].tokens) + count - 1)
            for column, layer in enumerate(wanted):
                first = (places + layer - 1) % 8
                np.testing.assert_array_equal(routes.ids[:, column, 0], first)
                np.testing.assert_array_equal(routes.ids[:, column, 1], (first + 1) % 8)


@pytest.mark.parametrize("experts", [(3, 2), (4, 3)])
def test_experts_that_the_model_does_not_have_are_asked_for_again(built, servers, told, experts):
    """The model has 4 layers, 8 experts in each, and 2 for a token."""
    servers[0].experts, servers[1].experts = experts, (4, 2)
    settings = dataclasses.replace(SAMPLED, routes=True)
    groups = built[0].generate(PROMPTS, settings)
    answers = [answer for group in groups for answer in group.completions]
    assert all(answer.routed_experts.ids.shape[1:] == (4, 2) for answer in answers)
    assert told and all("BadAnswer experts of" in text for text in told)
    # they are ignored if they are not asked for
    told.clear()
    groups = built[0].generate(PROMPTS, SAMPLED)
    answers = [answer for group in groups for answer in group.completions]
    assert told == [] and all(answer.routed_experts is None for answer in answers)


@pytest.mark.parametrize(
    "parallel", [{"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}, {}]
)
def test_each_rank_gets_the_answers_to_its_prompts(
    built, servers, directory, tmp_path, parallel, request
):
    expected = {
        group.prompt.index: [answer.tokens.tolist() for answer in group.completions]
        for group in built[0].generate(PROMPTS, SAMPLED)
    }
    for server in servers:
        server.asked.clear()
    urls = [server.url for server in servers]
    ranks = run_on_ranks(2, _generate, directory, tmp_path / "ranks", urls, parallel)
    data = 2 if "expert" in parallel or not parallel else 1
    for rank, (answers, metrics) in enumerate(ranks):
        wanted = [i for i in range(len(PROMPTS)) if data == 1 or i % 2 == rank]
        assert answers == [(index, expected[index]) for index in wanted]
        assert metrics["servers/probe_difference"] < 1e-4
        assert metrics["servers/used"] == 2
    probes = 2 * len(servers)
    assert sum(len(server.asked) for server in servers) == len(PROMPTS) + probes
