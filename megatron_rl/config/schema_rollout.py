"""The section ``rollout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_rl.config.section import Section


class ServersConfig(Section):
    """Inference servers that sample in place of the training model (rollout.engine)."""

    urls: tuple[str, ...] = ()
    """Addresses of servers that run already, such as http://host:8000. The environment variable
    MEGATRON_RL_SERVER_KEY holds their key."""
    start: int = Field(0, ge=0)
    """Number of servers to start on rank 0's machine, in place of urls; they end with the run."""
    python: str | None = None
    """Python interpreter of the environment with vLLM or SGLang; for start."""
    options: tuple[str, ...] = ()
    """Further arguments of the command that starts a server."""
    start_s: float = Field(600.0, gt=0.0)
    """Longest wait for a started server, seconds."""
    sync: Literal["disk", "broadcast"] = "disk"
    """How weights reach the servers. disk: by a directory that they can read. broadcast: by process
    groups of rank 0 and the servers' workers, NCCL on CUDA (engine vllm, with urls)."""
    weights_dir: Path | None = None
    """sync disk: where weights are written, on storage that the servers can read; null: run_dir."""
    reload_method: str = "reload_checkpoint"
    """Engine vllm: the workers' method that loads weights from a directory. The default is that of
    the worker extension megatron_rl.rollout.servers.reload.Reload, which servers that a run starts
    have."""
    in_flight: int = Field(32, ge=1)
    """Most open requests of a rank at a server; a request is a problem with all its answers."""
    deadline_s: float = Field(600.0, gt=0.0)
    """Longest exchange with a server, from connecting to the last byte, and longest wait while no
    server can be asked, seconds."""
    retries: int = Field(4, ge=0)
    """How often a request that got no good answer is tried again."""
    probe_tolerance: float = Field(1e-3, gt=0.0)
    """Largest difference between a server's log-probabilities and the trainer's, nats; bf16 needs
    about 0.1."""


class RolloutConfig(Section):
    """Sampling of answers."""

    engine: str = "builtin"
    """The engine: a name of `megatron-rl list engines`, or one of your own, ./my.py:my_engine."""
    settings: dict[str, Any] = {}
    """Settings of an engine of your own that differ from its defaults."""
    servers: ServersConfig = ServersConfig()
    """Settings of the server engines, vllm and sglang."""
    lag: int = Field(0, ge=0)
    """Engines of servers: staleness, the number of steps that answers are sampled ahead, while the
    model trains. 1: their weights are one step old when they are trained on. More: answers under
    way when the weights change are aborted and continued with the new weights."""
    prompts_per_step: int = Field(64, ge=1)
    """Problems in a step, over all ranks."""
    samples_per_prompt: int = Field(8, ge=1)
    """Answers G to each problem."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, tokens."""
    temperature: float = Field(1.0, gt=0.0)
    """Sampling temperature; all log-probabilities are taken at this temperature."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: the smallest set of tokens with this much probability; 1: off."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest tokens; 0: off."""
    keep_sampling_mask: bool = False
    """With top_p or top_k: an answer carries the tokens that they kept for each of its tokens. All
    log-probabilities are over these, the trainer's too, and so its ratio to the sampler is exact.
    """
    scores: Literal["auto", "sampler", "pass"] = "auto"
    """Where the old policy's log-probabilities and router trace come from. pass: a scoring pass.
    sampler: the sampler has them, with engine builtin, an fp32 model, weights that are not rounded,
    no environment and not algorithm.routing_replay r3; the pass of each step's first update checks
    that, and where they differ a pass scores the step. auto: sampler where that is possible. The
    first mini-batch is scored by its own update in any case."""
    round_weights: Literal["none", "bf16", "fp8"] = "none"
    """Engine builtin: answers, those of evaluations included, are sampled with weights of lower
    precision than those that are trained, as from a server with quantized weights. bf16: rounded to
    bf16; fp8: linear layers and experts to e4m3 with a scale for each output, the rest to bf16.
    Activations are not rounded."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Ids of additional stop tokens.

    An answer always ends at the tokenizer's end-of-sequence token and at those in
    generation_config.json and config.json of the model's directory."""
    stop_tokens: tuple[str, ...] = ()
    """Additional stop tokens by their texts, such as <|im_end|>; each is one token of the
    tokenizer."""
    environment: str | None = None
    """An environment of your own that replies to answers, ./my_tool.py:my_tool; the conversation
    then continues; null: none."""
    environment_settings: dict[str, Any] = {}
    """Settings of the environment that differ from its defaults."""
    max_turns: int = Field(4, ge=1)
    """With an environment: most answers in a conversation, each of at most max_new_tokens."""
    max_batch: int = Field(512, ge=1)
    """Answers decoded at a time on a rank."""
    dynamic_sampling: bool = False
    """Draw more problems until prompts_per_step of them have answers of unequal reward."""
    max_rounds: int = Field(10, ge=1, le=255)
    """Dynamic sampling stops after this many rounds and adds groups of equal reward."""
