"""What a run says of its stages."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.tiny import cpu_device


@pytest.fixture(autouse=True)
def megatron():
    cpu_device()


def test_stages_are_in_the_order_of_their_shares():
    """10 GFLOP/s: 3 GFLOP in 1 s are 30% of it. Small stages, and what is no part of a step, are
    left out.
    """
    from megatron_rl.run.pace import pace_line

    seconds = {
        "time/step_s": 4.0,
        "time/rollout_s": 1.0,
        "time/update_s": 2.5,
        "time/sync_s": 0.4,
        "time/score_s": 0.07,
        "time/eval_s": 3.0,
        "time/checkpoint_s": 1.0,
    }
    assert pace_line(seconds, {"rollout": 3e9, "update": 5e9, "score": 1.0}, 1e10) == (
        "a step of 4 s: update 62% (2.5 s, 20% of peak), rollout 25% (1 s, 30% of peak), "
        "sync 10% (0.4 s); peak 10 GFLOP/s in matrix products"
    )
    assert pace_line({"time/step_s": 1.0}, {}, 2.5e12).endswith(
        "peak 2.5 TFLOP/s in matrix products"
    )


def test_it_is_shown_after_three_steps_and_after_the_last(monkeypatch):
    """Means without the first step: of 2 and 4 s, then of 2, 4 and 6; 60 tokens a step."""
    from megatron_rl.config.schema import Config
    from megatron_rl.config.work import step_flop
    from megatron_rl.run import pace

    config, shown = Config(train={"batch_size": 4}), []
    session = SimpleNamespace(
        config=config,
        device=SimpleNamespace(kind="cpu", torch_device=torch.device("cpu")),
        groups=SimpleNamespace(world=torch.distributed.group.WORLD),
        console=SimpleNamespace(note=shown.append),
    )
    flop = step_flop(config, 60, supervised=True)["update"]
    monkeypatch.setattr(pace, "matrix_peak", lambda device, dtype: flop / 2)
    watch, counts = pace.Pace(session), []
    for seconds in (100.0, 2.0, 4.0, 6.0):
        metrics = {"time/step_s": seconds, "time/update_s": seconds, "tokens/step": 60.0}
        watch.add(metrics, last=seconds == 6.0)
        counts.append(len(shown))
    assert counts == [0, 0, 1, 2]
    assert shown[0].startswith("a step of 3 s: update 100% (3 s, 67% of peak)")
    assert shown[1].startswith("a step of 4 s: update 100% (4 s, 50% of peak)")


def test_a_single_step_is_not_left_out(monkeypatch):
    from megatron_rl.config.schema import Config
    from megatron_rl.run import pace

    shown = []
    session = SimpleNamespace(
        config=Config(),
        device=SimpleNamespace(kind="cpu", torch_device=torch.device("cpu")),
        groups=SimpleNamespace(world=torch.distributed.group.WORLD),
        console=SimpleNamespace(note=shown.append),
    )
    monkeypatch.setattr(pace, "matrix_peak", lambda device, dtype: 1e9)
    metrics = {"time/step_s": 5.0, "time/rollout_s": 4.0, "tokens/step": 8.0}
    pace.Pace(session).add(metrics, last=True)
    assert shown[0].startswith("a step of 5 s: rollout 80% (4 s, ")
