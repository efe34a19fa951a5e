"""Steps of reinforcement learning at one size, for `growth.py`: a model of random weights, random
prompts, the program's own task, and its timers.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Mapping

import numpy as np

from tools.bench.common import SHAPE, Shape, Turns, forward_flop

#: What a step took: processor seconds by stage and of the whole ("cpu"), and its wall seconds.
Times = Mapping[str, float]
STAGES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Point:
    """Sizes of a model and of a step."""

    shape: Shape = replace(SHAPE, layers=2)
    prompts: int = 8  #: of a step, a rank
    answers: int = 8  #: to each
    prompt_tokens: int = 12
    answer_tokens: int = 24
    pack_tokens: int = 2304
    ranks: int = 1
    expert_parallel: bool = False  #: experts are spread over all ranks

    @property
    def tokens(self) -> int:
        """Tokens of a step, prompts included, all ranks."""
        return self.ranks * self.prompts * self.answers * (self.prompt_tokens + self.answer_tokens)

    def flop_per_token(self) -> float:
        """Of a forward pass over an answer and its prompt."""
        flop = forward_flop(self.shape, self.prompt_tokens, self.answer_tokens)
        return flop / (self.prompt_tokens + self.answer_tokens)

    def parameters(self) -> int:
        """Weights of the products and of the embedding; norms are left out."""
        shape = self.shape
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = shape.hidden * (2 * width + 2 * kv)
        experts = shape.experts * shape.hidden * (3 * shape.expert_width + 1)
        return shape.layers * (attention + experts) + 2 * shape.vocabulary * shape.hidden

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Point:
        """From `dataclasses.asdict` of one."""
        return cls(**{**fields, "shape": Shape(**fields["shape"])})


def config_of(point: Point) -> Any:
    """The run's configuration: rspo with one optimizer step a batch."""
    from megatron_rl.config.schema import Config

    shape, ranks = point.shape, point.ranks
    reward = Path(__file__).with_name("rl_step_ours.py")
    return Config(
        model={
            "num_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_query_groups": shape.kv_heads,
            "head_dim": shape.head_dim,
            "num_experts": shape.experts,
            "moe_top_k": shape.top_k,
            "moe_ffn_hidden_size": shape.expert_width,
            "vocab_size": shape.vocabulary,
            "max_sequence_length": point.prompt_tokens + point.answer_tokens,
        },
        parallel={"expert": ranks if point.expert_parallel else 1},
        device={"kind": "cpu", "threads": 1, "timeout_s": 3600.0},
        data={"pack_tokens": point.pack_tokens},
        reward={"name": f"{reward}:odd"},
        rollout={
            "prompts_per_step": ranks * point.prompts,
            "samples_per_prompt": point.answers,
            "max_new_tokens": point.answer_tokens,
        },
        algorithm={"name": "rspo", "mini_batches": 1},
        optimizer={"lr": 1e-6},
    )


class Ranks:
    """This process among the ranks; to be made once."""

    def __init__(self) -> None:
        from megatron_rl.config.schema import DeviceConfig
        from megatron_rl.device.launch import read_launch
        from megatron_rl.device.select import connect, select_device

        self.launch = read_launch()
        self.device = select_device(DeviceConfig(kind="cpu", threads=1), self.launch)
        connect(self.device, self.launch, 3600.0)
        self.groups: Any = None

    def build(self, point: Point) -> Callable[[], Times]:
        """A call that takes a step of the point and tells its times."""
        from megatron_rl.observe.console import SilentConsole
        from megatron_rl.parallel.groups import build_groups
        from megatron_rl.parallel.stop_request import StopRequest
        from megatron_rl.policy.policy import build_policy
        from megatron_rl.records import Prompt
        from megatron_rl.tasks.build import build_engine
        from megatron_rl.tasks.reinforce import Reinforce
        from megatron_rl.tasks.task_session import TaskSession

        config = config_of(point)
        self.groups = self.groups or build_groups(config.parallel)
        policy = build_policy(config, self.device, self.groups, optimizer_steps=1000)
        words = SimpleNamespace(eos_id=0, piece=str, decode=lambda ids: " ".join(map(str, ids)))
        # no token ends an answer
        rest = (words, {}, SilentConsole(), _processor_timers(), StopRequest())
        session = TaskSession(config, self.launch, self.device, self.groups, *rest)
        engine = build_engine(session, policy.chunks, policy.capture)
        draw = np.random.default_rng(3)
        prompts = [
            Prompt(number, draw.integers(0, point.shape.vocabulary, point.prompt_tokens), "", {})
            for number in range(config.rollout.prompts_per_step)
        ]
        return _Steps(session, policy, Reinforce(session, policy, engine, prompts, [], {}))


def _processor_timers() -> Any:
    """The program's timers by the clock of the processor, which other programs hardly move."""
    from megatron_rl.observe.timers import Timers

    class ProcessorTimers(Timers):
        def _now(self) -> float:
            return time.process_time()

    return ProcessorTimers()


class _Steps:
    """One step after the other, each timed."""

    def __init__(self, session: Any, policy: Any, task: Any) -> None:
        self._session, self._task, self._number = session, task, 0
        self._optimizer_s = 0.0
        self._optimizer_step, policy.optimizer.step = policy.optimizer.step, self._timed_step

    def _timed_step(self) -> Any:
        began = time.process_time()
        try:
            return self._optimizer_step()
        finally:
            self._optimizer_s += time.process_time() - began

    def __call__(self) -> Times:
        """Processor seconds of each stage and of the whole step, on this rank; its wall seconds."""
        from megatron_rl.observe.metrics import MetricSums

        session = self._session
        sums = MetricSums(session.config.model.num_layers, session.device.torch_device)
        session.timers.reset()
        self._number, self._optimizer_s = self._number + 1, 0.0
        began, busy = time.perf_counter(), time.process_time()
        self._task.step(self._number, sums)
        wall, cpu = time.perf_counter() - began, time.process_time() - busy
        seconds = session.timers.seconds()
        stages = {stage: seconds.get(f"time/{stage}_s", 0.0) for stage in STAGES}
        stages["update"] -= self._optimizer_s
        return {**stages, "optimizer": self._optimizer_s, "wall": wall, "cpu": cpu}


def work(folder: Path) -> None:
    """On a rank: take steps in turns, until the process is ended."""
    import torch
    import torch.distributed as dist

    ranks = Ranks()
    turns = Turns(folder) if ranks.launch.rank == 0 else None
    step = ranks.build(Point.read(json.loads((folder / "point.json").read_text())))
    while True:
        times = step()
        cpu = torch.tensor(times["cpu"], dtype=torch.float64)
        dist.all_reduce(cpu)
        if turns is not None:
            turns.after_step({**times, "cpu": float(cpu)})
        dist.barrier()
