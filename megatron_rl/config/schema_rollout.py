"""The section ``rollout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.config.section import Section


class ServersConfig(Section):
    """Inference servers that answer in place of the training model (rollout.engine)."""

    urls: tuple[str, ...] = ()
    """Of servers that run already, such as http://host:8000; the environment variable
    MEGATRON_RL_SERVER_KEY holds their key."""
    start: int = Field(0, ge=0)
    """Servers to start on the machine of rank 0, in place of urls; they end with the run."""
    python: str | None = None
    """Interpreter of the environment that has vLLM or SGLang; for start."""
    options: tuple[str, ...] = ()
    """More words for the command that starts a server."""
    start_s: float = Field(600.0, gt=0.0)
    """Longest wait for a started server, seconds."""
    sync: Literal["disk", "broadcast"] = "disk"
    """How weights reach the servers. disk: through a directory that they see; broadcast: through a
    process group of rank 0 and the servers' workers (engine vllm, with urls): NCCL on CUDA."""
    weights_dir: Path | None = None
    """sync disk: where weights are written, which the servers have to see; null: in run_dir."""
    reload_method: str = "reload_checkpoint"
    """Engine vllm: method of its workers that reads weights, called with a directory; the default
    is that of the worker extension megatron_rl.rollout.servers.reload.Reload, which started servers
    have."""
    in_flight: int = Field(32, ge=1)
    """Most open questions of a rank at a server; a question is a problem with all its answers."""
    deadline_s: float = Field(600.0, gt=0.0)
    """Longest exchange with a server, from connecting to its last byte, and longest wait while none
    can be asked, seconds."""
    retries: int = Field(4, ge=0)
    """How often a question that got no good answer is asked again."""
    probe_tolerance: float = Field(1e-3, gt=0.0)
    """Largest difference of a server's log-probabilities from the trainer's, nats; bf16 needs more:
    0.1 or so."""


class RolloutConfig(Section):
    """Sampling of answers."""

    engine: str = "builtin"
    """Who answers: a name of `megatron-rl list engines`, or one of your own, ./my.py:my_engine."""
    settings: dict[str, Any] = {}
    """Settings of an engine of your own that differ from its defaults."""
    servers: ServersConfig = ServersConfig()
    """Of engines that ask servers, vllm and sglang."""
    lag: int = Field(0, ge=0)
    """Engines of servers: answers are sampled this many steps ahead, beside the training. 1: by
    weights that are one step old when they are trained on. More: answers that are being sampled
    when the weights change are broken off and go on with the new ones."""
    prompts_per_step: int = Field(64, ge=1)
    """Problems of a step, over all ranks."""
    samples_per_prompt: int = Field(8, ge=1)
    """Answers G to each problem."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, tokens."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature; log-probabilities everywhere are those at this temperature."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus: smallest set of tokens with this much probability; 1: off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0: off."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids of more tokens that end an answer.

    The tokenizer's end-of-sequence token does, and those that generation_config.json and
    config.json of the model's directory name."""
    stop_tokens: tuple[str, ...] = ()
    """The same by their texts, such as <|im_end|>; each is one token of the tokenizer."""
    environment: str | None = None
    """What replies to answers, which then go on: one of your own, ./my_tool.py:my_tool; null:
    nothing, an answer is all."""
    environment_settings: dict[str, Any] = {}
    """Settings of the environment that differ from its defaults."""
    max_turns: int = Field(4, ge=1)
    """With an environment: most answers of a conversation, each of max_new_tokens at most."""
    max_batch: int = Field(512, ge=1)
    """Answers decoded at a time on a rank."""
    dynamic_sampling: bool = False
    """Draw more problems until prompts_per_step of them have answers of unequal reward."""
    max_rounds: int = Field(10, ge=1, le=255)
    """Dynamic sampling gives up after this many rounds and fills up with groups of equal reward."""
