"""Who is silent, with a clock of the test's: no thread, no store."""

import pytest

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device.heartbeat import SIGNS_IN_LIMIT, watched
from megatron_rl.device.launch import Launch
from megatron_rl.device.silence import ENDED, STORE, Silences


def looks(silences, times, signs):
    """What each look at these times has found; signs: time -> signs."""
    return [silences.look(now, signs(now)) for now in times]


def test_a_rank_is_named_once_after_the_limit_and_again_when_it_is_heard():
    """Rank 1 stops after its sign of second 10, and goes on at second 70."""
    silences = Silences([1, 2], limit_s=45.0, pause_s=5.0, now=0.0)

    def signs(now):
        return {1: f"{now if now >= 70 else min(now, 10)}", 2: f"{now}"}

    found = dict(zip(range(5, 80, 5), looks(silences, range(5, 80, 5), signs)))
    assert {now: what for now, what in found.items() if what != ([], [])} == {
        55: ([1], []),
        70: ([], [1]),
    }


def test_by_default_a_rank_is_named_within_a_minute_however_long_a_collective_may_wait():
    config = DeviceConfig(timeout_s=86400.0)
    pause_s = config.silence_s / SIGNS_IN_LIMIT
    silences = Silences([1], config.silence_s, pause_s, now=0.0)
    assert silences.look(pause_s, {1: "1"}) == ([], [])  # its last sign is of just before, 0.0
    times = [pause_s * number for number in range(2, 30)]
    found = [
        now for now, what in zip(times, looks(silences, times, lambda now: {1: "1"})) if what[0]
    ]
    assert len(found) == 1 and found[0] <= 60.0


def test_a_watcher_that_was_stopped_itself_accuses_nobody():
    """It sleeps for ten minutes, and the others have not had their turn yet when it looks."""
    silences = Silences([1], limit_s=45.0, pause_s=5.0, now=0.0)
    assert silences.look(5.0, {1: "1"}) == ([], [])
    assert silences.look(605.0, {1: "1"}) == ([], [])  # counts as 10 s
    assert silences.look(610.0, {1: "1"}) == ([], [])
    assert looks(silences, range(615, 640, 5), lambda now: {1: "1"}) == [([], [])] * 5
    assert silences.look(640.0, {1: "1"}) == ([1], [])  # 10 + 7 * 5 = 45 s


def test_a_rank_that_has_ended_is_not_missed_and_one_that_never_came_is():
    silences = Silences([1, 2], limit_s=45.0, pause_s=5.0, now=0.0)
    found = looks(silences, range(5, 100, 5), lambda now: {1: ENDED, 2: None})
    assert [what for what in found if what != ([], [])] == [([2], [])]
    assert found[8] == ([2], []) and silences.sign(2) is None


def test_while_the_store_is_silent_ranks_are_not_blamed():
    silences = Silences([STORE, 1], limit_s=45.0, pause_s=5.0, now=0.0)
    silences.look(5.0, {STORE: "1", 1: "1"})
    found = looks(silences, range(10, 70, 5), lambda now: {STORE: "1"})
    assert [what for what in found if what != ([], [])] == [([STORE], [])]
    assert not silences.any_silent([1]) and silences.any_silent([STORE, 1])
    assert silences.look(70.0, {STORE: "2", 1: "2"}) == ([], [STORE])


@pytest.mark.parametrize(
    ("rank", "local_rank", "parties"),
    [
        (0, 0, [1, 2, 3, 4, 5]),
        (1, 1, [0]),
        (2, 2, []),
        (3, 0, [0, 4, 5]),
        (4, 1, []),
    ],
)
def test_who_watches_whom_on_two_nodes_of_three_ranks(rank, local_rank, parties):
    assert watched(Launch(rank, 6, local_rank, 3, launched=True)) == parties


def test_a_single_process_watches_nobody():
    assert watched(Launch(0, 1, 0, 1, launched=False)) == []
