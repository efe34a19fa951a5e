"""The size of the router trace is shown and held against the memory there is."""

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

#: 8 x 4 sequences of at most 30 + 20 tokens; 2 layers x 2 experts x 5 bytes a token.
CONFIG = Config(
    model={"num_layers": 2, "max_sequence_length": 64},
    rollout={
        "prompts_per_step": 8,
        "samples_per_prompt": 4,
        "max_new_tokens": 20,
        "scores": "pass",
    },
)
SAMPLED = CONFIG.model_copy(
    update={"rollout": CONFIG.rollout.model_copy(update={"scores": "sampler"})}
)
PROBLEMS = [Prompt(i, np.zeros(n, dtype=np.int64), "", {}) for i, n in enumerate((12, 30, 7))]
BYTES = 8 * 4 * 50 * 2 * 2 * 5


def test_the_longest_sequence_is_the_longest_problem_with_an_answer():
    from megatron_rl.run.trace_memory import longest_sequence

    assert longest_sequence(CONFIG, PROBLEMS) == 50
    short = CONFIG.model.model_copy(update={"max_sequence_length": 40})
    assert longest_sequence(CONFIG.model_copy(update={"model": short}), PROBLEMS) == 40
    for turns, longest in ((1, 50), (2, 64)):  # a conversation may take all the room there is
        talk = CONFIG.rollout.model_copy(update={"environment": "my:tool", "max_turns": turns})
        assert longest_sequence(CONFIG.model_copy(update={"rollout": talk}), PROBLEMS) == longest


def test_the_header_shows_the_size():
    from megatron_rl.run.trace_memory import trace_fact

    assert trace_fact(CONFIG, 1, 50) == (
        f"20 bytes a token over all pipeline stages; at most {BYTES / 1024:.3g} KiB of device "
        "memory on a rank, for sequences of 50 tokens"
    )
    pinned = CONFIG.algorithm.model_copy(update={"trace_store": "pinned"})
    assert "of pinned host memory" in trace_fact(
        CONFIG.model_copy(update={"algorithm": pinned}), 1, 50
    )


def test_the_header_shows_the_size_of_the_sampler_s_trace():
    from megatron_rl.run.trace_memory import sampler_bytes, trace_fact

    text = trace_fact(SAMPLED, 1, 50)
    assert text == trace_fact(CONFIG, 1, 50) + "; the sampler's up to 31.2 KiB of host memory"
    wide = SAMPLED.model_copy(
        update={"parallel": SAMPLED.parallel.model_copy(update={"tensor": 2, "context": 2})}
    )
    # 2 of 8 ranks' data: each of them holds what the 4 ranks of a replica share out
    assert sampler_bytes(wide, 8, 50) == BYTES // 2


def _checked(free_of_rank, kind, config=CONFIG):
    from megatron_rl.device.memory import available_bytes
    from megatron_rl.run import trace_memory

    cpu_device()
    session = SimpleNamespace(
        config=config,
        launch=SimpleNamespace(world_size=1, local_world_size=1),
        device=SimpleNamespace(kind=kind),
        groups=SimpleNamespace(world=dist.group.WORLD),
    )
    free = free_of_rank[dist.get_rank()]
    with mock.patch.object(trace_memory, "available_bytes", return_value=free):
        try:
            trace_memory.check_trace_fits(session, 50)
        except UserError as error:
            return str(error)
    assert available_bytes(SimpleNamespace(kind="cpu"), session.launch, host=False) > BYTES
    return None


def test_a_trace_that_fits_is_let_through_and_one_that_does_not_is_refused_on_all_ranks():
    assert run_on_ranks(2, _checked, [BYTES, BYTES], "cpu") == [None, None]
    for message in run_on_ranks(2, _checked, [BYTES, BYTES - 1], "cpu"):
        assert message.startswith("the router trace of a rollout batch takes up to 31.2 KiB")
        assert message.endswith(
            "are free; lower rollout.prompts_per_step or rollout.samples_per_prompt"
        )


def test_a_sampler_s_trace_needs_room_in_its_answers_and_in_packs():
    assert run_on_ranks(1, _checked, [2 * BYTES], "cpu", SAMPLED) == [None]
    (message,) = run_on_ranks(1, _checked, [2 * BYTES - 1], "cpu", SAMPLED)
    assert message.startswith("the sampler's router trace of a rollout batch takes up to 62.5 KiB")
    assert message.endswith("are free; set rollout.scores pass")


def test_on_cuda_the_host_is_the_first_remedy():
    (message,) = run_on_ranks(1, _checked, [0], "cuda")
    assert "0 bytes are free; set algorithm.trace_store pinned, or lower" in message


def test_the_free_memory_of_a_machine_is_shared_among_its_ranks():
    from megatron_rl.device import memory

    with mock.patch.object(memory.psutil, "virtual_memory") as virtual:
        virtual.return_value = SimpleNamespace(available=900)
        launch = SimpleNamespace(local_world_size=3)
        assert memory.available_bytes(SimpleNamespace(kind="cpu"), launch, host=False) == 300
        assert memory.available_bytes(SimpleNamespace(kind="cuda"), launch, host=True) == 300


@pytest.mark.parametrize("kept", [True, False])
def test_the_header_of_a_run_names_the_trace_where_one_is_kept(kept):
    cpu_device()
    from megatron_rl.run.run_summary import train_facts

    name = "rspo" if kept else "grpo"
    algorithm = CONFIG.algorithm.model_copy(update={"name": name})
    data = SimpleNamespace(train=SimpleNamespace(items=PROBLEMS), eval=None, facts=dict)
    facts = train_facts(CONFIG.model_copy(update={"algorithm": algorithm}), data, 1)
    assert ("router trace" in facts) == kept
