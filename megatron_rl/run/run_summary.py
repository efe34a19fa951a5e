"""The run summary: the facts that a run shows before it starts, one a line."""

from __future__ import annotations

from typing import Mapping

from megatron_rl.config.algorithm import keeps_trace, uses_router_shift
from megatron_rl.config.data import data_text
from megatron_rl.config.estimate import count_parameters
from megatron_rl.config.layout import layout_text, moe_layers
from megatron_rl.config.optimizer import optimizer_text
from megatron_rl.config.reward import reward_text
from megatron_rl.config.rollout import engine_of, truncation_text
from megatron_rl.config.schema import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
)
from megatron_rl.config.schema_rollout import RolloutConfig
from megatron_rl.data.run_data import RunData
from megatron_rl.policy.policy import Policy
from megatron_rl.rollout.builtin.generate import BuiltinEngine
from megatron_rl.rollout.conversation import ConversationEngine
from megatron_rl.rollout.engine import Engine
from megatron_rl.run.session import Session
from megatron_rl.run.trace_memory import longest_sequence, trace_fact


def run_facts(session: Session, machine: Mapping[str, str]) -> dict[str, str]:
    """Facts of every verb: run directory, model, layout, device, and what the verifiers found on
    this machine.
    """
    config, ranks = session.config, session.launch.world_size
    facts = {
        "run": str(session.run_dir),
        "model": _model(config.model),
        "layout": f"{ranks} rank{'' if ranks == 1 else 's'}: {layout_text(config.parallel, ranks)}",
        "device": f"{session.device.kind}, {config.model.dtype}",
        **machine,
        "answers end": "with token " + stop_text(session.stop_tokens),
    }
    tokenizer = config.data.tokenizer
    if tokenizer.trust_remote_code:
        facts["tokenizer"] = f"{tokenizer.path}, whose own code is executed (trust_remote_code)"
    if config.rollout.engine != "builtin":
        facts["rollout"] = _engine(config.rollout)
    if config.rollout.environment is not None:
        turns = f"up to {config.rollout.max_turns} answers a conversation"
        facts["environment"] = f"{config.rollout.environment}, {turns}"
    return facts


def decoding_facts(engine: Engine) -> dict[str, str]:
    """How the built-in engine decodes, where that is not the usual way."""
    answers = engine.engine if isinstance(engine, ConversationEngine) else engine
    text = answers.plan.text() if isinstance(answers, BuiltinEngine) else ""
    return {"decoding": text} if text else {}


def exchange_facts(policy: Policy) -> dict[str, str]:
    """What travels between expert-parallel ranks, where it is not always tokens."""
    text = policy.exchange.plan.text()
    return {"experts": text} if text else {}


def stop_text(stop_tokens: Mapping[int, str]) -> str:
    """``2 (tokenizer), 7, 9 (generation_config.json)``: stop tokens by the sources that name
    them.
    """
    by_place: dict[str, list[int]] = {}
    for token, place in stop_tokens.items():
        by_place.setdefault(place, []).append(token)
    return ", ".join(
        f"{', '.join(map(str, tokens))} ({place})" for place, tokens in by_place.items()
    )


def sft_facts(config: Config, data: RunData) -> dict[str, str]:
    """The data of supervised fine-tuning."""
    assert data.train is not None, "what the verb reads"
    return {
        "data": f"{len(data.train):,} samples ({data_text(config.data.train)}), "
        + _held_out(config, data, "held-out problems"),
        **data.facts(),
        "step": f"{config.train.batch_size} samples",
        "optimizer": _optimizer(config.optimizer),
    }


def train_facts(config: Config, data: RunData, world_size: int) -> dict[str, str]:
    """The data, the algorithm and the size of a step of reinforcement learning."""
    assert data.train is not None, "what the verb reads"
    rollout, algorithm, problems = config.rollout, config.algorithm, data.train.items
    facts = {
        "data": f"{len(problems):,} problems ({data_text(config.data.train)}), "
        f"{_held_out(config, data, 'held-out')}, reward {reward_text(config.reward)}",
        **data.facts(),
        "step": f"{rollout.prompts_per_step} problems x {rollout.samples_per_prompt} answers of "
        f"{rollout.max_new_tokens} tokens at most, {algorithm.mini_batches} mini-batches x "
        f"{algorithm.epochs} epoch{'' if algorithm.epochs == 1 else 's'}",
        "algorithm": _algorithm(algorithm),
        "optimizer": _optimizer(config.optimizer),
    }
    if rollout.keep_sampling_mask:
        facts["truncated sampling"] = str(truncation_text(rollout))
    if keeps_trace(algorithm):
        longest = longest_sequence(config, problems)
        facts["router trace"] = trace_fact(config, world_size, longest)
    return facts


def _held_out(config: Config, data: RunData, what: str) -> str:
    if data.eval is None:
        return "no evaluation: data.eval is not given"
    return f"{len(data.eval):,} {what} ({data_text(config.data.eval)})"


def _engine(rollout: RolloutConfig) -> str:
    servers, which = rollout.servers, ""
    if engine_of(rollout).servers:
        which = ", ".join(servers.urls) or f"{servers.start} started with {servers.python}"
        which = f" servers: {which}"
        # An option of both vLLM and SGLang: the summary always shows what executes code.
        if any(word.startswith("--trust-remote-code") for word in servers.options):
            which += ", which execute code of the model's directory (--trust-remote-code)"
    steps = "one step" if rollout.lag == 1 else f"{rollout.lag} steps"
    ahead = f", answers {steps} ahead" if rollout.lag else ""
    return f"{rollout.engine}{which}{ahead}"


def _model(model: ModelConfig) -> str:
    total, active = count_parameters(model)
    named = model.preset or model.hf_path or model.hf_config
    origin = f" ({named})" if named else ""
    if not model.num_experts:
        return f"{total:,} parameters: {model.num_layers} dense layers{origin}"
    return (
        f"{total:,} parameters, {active:,} active for a token: {model.num_layers} layers "
        f"({sum(moe_layers(model))} MoE), {model.num_experts} experts, "
        f"top-{model.moe_top_k}{origin}"
    )


def _optimizer(optimizer: OptimizerConfig) -> str:
    parts = [f"{optimizer_text(optimizer)}, learning rate {optimizer.lr:g}"]
    if optimizer.warmup_steps:
        parts.append(f"{optimizer.warmup_steps} optimizer steps of warm-up")
    if optimizer.schedule != "constant":
        parts.append(f"{optimizer.schedule} decay to {optimizer.min_lr:g}")
    return ", ".join(parts)


def _algorithm(algorithm: AlgorithmConfig) -> str:
    parts = [algorithm.name, f"{algorithm.advantages} advantages"]
    if uses_router_shift(algorithm):
        shift = algorithm.router_shift
        mode = "" if shift.mode == "ratio" else f" ({shift.mode})"
        parts.append(f"router shift{mode} with floor {shift.floor:g}")
        if shift.penalty:
            parts.append(f"penalty {shift.penalty:g} on the routers' distance")
    if algorithm.routing_replay != "none":
        parts.append(f"routing replay {algorithm.routing_replay.upper()}")
    if algorithm.mismatch != "none":
        parts.append(f"sampler weights {algorithm.mismatch}")
    if algorithm.kl_coef:
        parts.append(f"KL penalty {algorithm.kl_coef:g}")
    if algorithm.entropy_coef:
        parts.append(f"entropy bonus {algorithm.entropy_coef:g}")
    parts += [f"{name} {value}" for name, value in algorithm.settings.items()]
    return ", ".join(parts)
