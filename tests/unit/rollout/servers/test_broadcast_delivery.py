"""Weights that reach the servers through process groups."""

import shutil

import pytest

from tests.support import hugging_face
from tests.support.fake_server import FakeServer, hugging_face_model, toy_model
from tests.support.ranks import run_on_ranks
from tests.support.server_engine import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    build,
    change_weights,
    config_of,
    tokens_of,
)


@pytest.fixture
def receivers(directory):
    """Two servers that take weights from a process group."""
    with (
        FakeServer(toy_model(), hugging_face_model, like=directory) as one,
        FakeServer(toy_model(), hugging_face_model, like=directory) as other,
    ):
        yield one, other


def broadcasting(directory, run_dir, servers, lag=0, start_s=60.0, **parallel):
    config = config_of(directory, run_dir, [server.url for server in servers], **parallel)
    chosen = config.rollout.servers.model_copy(update={"sync": "broadcast", "start_s": start_s})
    rollout = config.rollout.model_copy(update={"servers": chosen, "lag": lag})
    return config.model_copy(update={"rollout": rollout})


def test_weights_are_broadcast_without_a_disk(directory, tmp_path, receivers, told):
    engine, chunks, *_ = build(broadcasting(directory, tmp_path, receivers), told)
    for number in range(3):
        groups = engine.generate(PROMPTS, SAMPLED)
        assert {answer.version for group in groups for answer in group.completions} == {number}
        metrics = engine.metrics()
        assert metrics["servers/used"] == 2 and metrics["servers/probe_difference"] < 1e-4
        change_weights(engine, chunks)
    assert [len(server.loaded) for server in receivers] == [3, 3] and told == []
    assert not (tmp_path / "servers").exists()


def test_config_json_is_read_once_and_not_at_each_broadcast(directory, tmp_path, receivers, told):
    model = shutil.copytree(directory, tmp_path / "model")
    engine, chunks, *_ = build(broadcasting(model, tmp_path / "run", receivers), told)
    (model / "config.json").write_text("{")
    for number in range(2):
        groups = engine.generate(PROMPTS, SAMPLED)
        assert {answer.version for group in groups for answer in group.completions} == {number}
        change_weights(engine, chunks)
    assert told == []


@pytest.mark.parametrize(
    ("fault", "start_s"), [("refuse", 60.0), ("refuse late", 60.0), ("stall", 8.0)]
)
def test_a_server_that_stops_reading_is_left_out_and_joins_again(
    directory, tmp_path, receivers, told, fault, start_s
):
    """The test takes as long as it waits for the server that stalls."""
    engine, chunks, *_ = build(broadcasting(directory, tmp_path, receivers, start_s=start_s), told)
    engine.generate(PROMPTS, SAMPLED)
    change_weights(engine, chunks)
    receivers[0].fault = fault
    groups = engine.generate(PROMPTS, SAMPLED)
    assert [len(group.completions) for group in groups] == [3, 3, 3]
    assert any(f"{receivers[0].url} did not take the weights" in text for text in told), told
    assert engine.metrics()["servers/used"] == 1
    receivers[0].fault = ""
    change_weights(engine, chunks)
    engine.generate(PROMPTS, SAMPLED)
    assert engine.metrics()["servers/used"] == 2


def broadcast_from_ranks(directory, run_dir, urls, parallel):
    """On a rank: the probe's difference, the warnings and the tokens."""
    from types import SimpleNamespace

    told = []
    servers = [SimpleNamespace(url=url) for url in urls]
    engine, *_ = build(broadcasting(directory, run_dir, servers, **parallel), told)
    groups = engine.generate([PROMPTS[0]], GREEDY)
    return engine.metrics()["servers/probe_difference"], told, tokens_of(groups)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"tensor": 2, "expert": 2}),
        pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "pipeline": 2, "expert": 2}, marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_spread_over_ranks_are_broadcast_whole(
    directory, tmp_path, receivers, ranks, parallel
):
    urls = [server.url for server in receivers]
    found = run_on_ranks(ranks, broadcast_from_ranks, directory, tmp_path, urls, parallel)
    expected = hugging_face.greedy(directory, [PROMPTS[0].tokens.tolist()], 6)
    for difference, told, tokens in found:
        assert 0 < difference < 1e-4 and told == [] and tokens == [expected]
