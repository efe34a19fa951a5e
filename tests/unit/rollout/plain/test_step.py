"""Fixed buckets of rows and lengths, steps that are captured, and steps that wait for nothing."""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.host_syncs import HostSyncs
from tests.support.layout_cases import LATENT
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine, uneven_norms

LENGTHS = [5, 1, 12, 7, 3, 9]
SETTINGS = SamplingSettings(samples=4, max_new_tokens=40, seed=11)


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config()
    built = build_tiny(config)
    uneven_norms(built[2][0])
    return (config, *built)


def answers(groups):
    return [[answer.tokens.tolist() for answer in group.completions] for group in groups]


@contextlib.contextmanager
def buckets_as_captured():
    """On a CPU; yields a list that gets the key of every step."""
    from megatron_rl.rollout.builtin import generate
    from megatron_rl.rollout.builtin.plain.buckets import Buckets
    from megatron_rl.rollout.builtin.plain.graphs import Steps

    keys = []

    class Recorded(Steps):
        def run(self, key, step):
            keys.append(key)
            step()

    with (
        mock.patch.object(generate, "Buckets", lambda captured, tight: Buckets(True, room=8)),
        mock.patch.object(generate, "Steps", Recorded),
    ):
        yield keys


def test_the_answers_do_not_depend_on_the_buckets(tiny):
    stops = (5, 7, 12, 40, 50, 61)
    expected = tiny_engine(*tiny, stops).generate(random_prompts(LENGTHS), SETTINGS)
    with buckets_as_captured() as keys:
        found = tiny_engine(*tiny, stops).generate(random_prompts(LENGTHS), SETTINGS)
    assert answers(found) == answers(expected)
    rows = [rows for rows, _ in keys]
    assert rows == sorted(rows, reverse=True)
    assert set(rows) <= {1, 2, 4, 8, 16, 24} and len(set(rows)) > 2
    assert {length for _, length in keys} == {56}  # 12 + 40 tokens, in eights


@pytest.mark.parametrize("model", [{}, LATENT], ids=["grouped", "latent"])
def test_the_answers_do_not_depend_on_the_parts(model):
    """Rows in up to four parts, of prompts and answers of all lengths, of which most end early."""
    from megatron_rl.rollout.builtin.plain import buckets, cache

    config = tiny_config(model=model)
    built = build_tiny(config)
    stops = (5, 7, 12, 40, 50, 61)
    engine = lambda: tiny_engine(config, *built, stops)  # noqa: E731
    expected = engine().generate(random_prompts(LENGTHS), SETTINGS)
    laid, lay_out = [], cache.Cache.lay_out

    def seen(self, parts, sources=None):
        laid.append((len(parts), sources is not None))
        lay_out(self, parts, sources)

    with (
        mock.patch.object(buckets, "PART_ROWS", 2),
        mock.patch.object(cache.Cache, "lay_out", seen),
    ):
        found = engine().generate(random_prompts(LENGTHS), SETTINGS)
    assert answers(found) == answers(expected)
    for one, other in zip(found, expected, strict=True):
        for mine, wanted in zip(one.completions, other.completions, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(mine.logprobs),
                torch.from_numpy(wanted.logprobs),
                rtol=0,
                atol=1e-5,
            )
    assert {1, 4} <= {parts for parts, _ in laid} and {moved for _, moved in laid} == {True, False}


def test_buckets():
    from megatron_rl.rollout.builtin.plain.buckets import Buckets

    captured, free = Buckets(True), Buckets(False)
    assert [captured.rows(n, 200) for n in (1, 2, 3, 64, 65, 129)] == [1, 2, 4, 64, 128, 200]
    assert [free.rows(n, 200) for n in (1, 3, 129)] == [1, 3, 129]
    lengths = {captured.length(n, 4096) for n in range(1, 4097)}
    assert sorted(lengths) == [
        *range(64, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256),
        *range(2560, 4097, 512),
    ]  # fmt: skip
    assert all(captured.length(n, 999) >= n for n in range(1, 1000))
    assert [free.length(n, 100) for n in (1, 16, 17, 97)] == [8, 16, 24, 104]
    tight = Buckets(False, tight=True)
    assert [tight.capacity(n, 100) for n in (1, 16, 17, 97)] == [8, 16, 24, 104]
    assert [tight.capacity(n, 2000) for n in (255, 257, 511, 513, 1990)] == [
        256,
        288,
        512,
        576,
        2000,
    ]
    for buckets in (captured, free, tight):
        for count in range(1, 2000):
            capacity = buckets.capacity(count, 2000)
            assert capacity >= buckets.length(count, 2000) and capacity <= 2000
    assert [free.worth_moving(10, n) for n in (10, 9)] == [False, True]
    assert [captured.worth_moving(64, n) for n in (33, 32)] == [False, True]


def test_parts_of_the_rows_read_up_to_their_own_longest():
    from megatron_rl.rollout.builtin.plain.buckets import Buckets

    captured, free = Buckets(True), Buckets(False)
    halves = np.array([40] * 65 + [32] * 65)
    assert free.parts(halves, 99) == [(slice(0, 65), 40), (slice(65, 130), 32)]
    assert free.parts(halves + 1, 99) == [(slice(0, 65), 48), (slice(65, 130), 40)]
    assert free.parts(halves[1:], 99) == [(slice(0, 64), 40), (slice(64, 129), 32)]
    assert free.parts(halves[:128], 99) == [(slice(0, 128), 40)]  # row 64 is in the second half
    # They stay two parts in the steps where both read as much.
    both = np.array([40] * 64 + [34] * 64)
    assert free.parts(both, 99) == [(slice(0, 64), 40), (slice(64, 128), 40)]
    assert free.parts(halves[3:], 99) == [(slice(0, 127), 40)]  # too few to be two parts
    lengths = [length for _, length in free.parts(np.arange(999, 0, -1), 9999)]
    assert lengths == [1000, 752, 504, 256]
    assert captured.parts(halves, 99) == [(slice(0, 130), 64)]


def test_a_step_is_called_then_captured_then_replayed():
    from megatron_rl.rollout.builtin.plain.graphs import CapturedSteps

    log = []

    class Graph:
        def replay(self):
            log.append("replay")

        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def capture(graph, pool=None):
        log.append(f"capture in {pool}")
        yield

    with (
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        mock.patch.object(torch.cuda, "graph", capture),
    ):
        steps = CapturedSteps()
        for key in (1, 1, 1, 2, 2):
            steps.run(key, lambda: log.append("step"))
        assert log == [
            "step", "capture in None", "step", "replay", "replay",
            "step", "capture in pool", "step", "replay",
        ]  # fmt: skip
        steps.forget()
        log.clear()
        for _ in range(2):
            steps.run(1, lambda: log.append("step"))
        assert log == ["step", "capture in None", "step", "replay"]


@pytest.mark.parametrize("routes", [False, True])
def test_a_step_waits_for_nothing(tiny, routes, monkeypatch):
    """What a CUDA graph can hold: no value is read, no result's size depends on values."""
    # The padded batch of experts, which several threads of a CPU take, is not for CUDA.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.rollout.builtin.plain.step import PlainDecoder
    from megatron_rl.router.capture import RouterCapture

    capture = RouterCapture(routers_of(tiny[3]), [[1, 2]])
    advance, counted = PlainDecoder.advance, HostSyncs()

    def watched(self):
        with counted:
            advance(self)

    settings = SamplingSettings(2, 9, seed=1, top_k=20, top_p=0.9, routes=routes)
    try:
        with buckets_as_captured() as keys, mock.patch.object(PlainDecoder, "advance", watched):
            tiny_engine(*tiny, capture=capture).generate(random_prompts([4, 6]), settings)
    finally:
        capture.close()
    assert len(keys) == 8 and not counted.places, counted.places
