"""The rollout engines. To ship one: a row here, and its file in ``rollout/``."""

from __future__ import annotations

from megatron_rl.catalogue.entry import EngineEntry

ENGINES: tuple[EngineEntry, ...] = (
    EngineEntry(
        name="builtin",
        summary="the training model itself, on the ranks that train it",
        code="megatron_rl.rollout.builtin.generate:builtin_engine",
        routes=True,
        kept_tokens=True,
    ),
    EngineEntry(
        name="vllm",
        summary="vLLM servers: running ones, or some that the run starts",
        code="megatron_rl.rollout.servers.vllm_command:vllm_engine",
        servers=True,
        beside_training=True,
        routes=True,
        kept_tokens=True,
        broadcast=True,
        tempered_cuts=False,
    ),
    EngineEntry(
        name="sglang",
        summary="SGLang servers: running ones, or some that the run starts",
        code="megatron_rl.rollout.servers.sglang_command:sglang_engine",
        servers=True,
        beside_training=True,
        routes=True,
        kept_tokens=True,
    ),
)
