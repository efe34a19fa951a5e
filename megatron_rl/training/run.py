"""The verbs that need the model: train, sft, evaluate, generate."""

from __future__ import annotations

from typing import Callable, Sequence

import numpy as np

from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.checkpoint.load import load_weights
from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import load_prompts, load_samples
from megatron_rl.models.build import build_chunks, transformer_config
from megatron_rl.observe.report import summary, write_report
from megatron_rl.records import Prompt
from megatron_rl.rollout.builtin.generate import BuiltinEngine
from megatron_rl.rollout.engine import Engine, SamplingSettings
from megatron_rl.training.evaluate import evaluate as evaluate_problems
from megatron_rl.training.loop import Task, run_loop
from megatron_rl.training.policy import Policy, build_policy
from megatron_rl.training.reinforce import Reinforce
from megatron_rl.training.session import Session, open_session
from megatron_rl.training.supervised import Supervised


def train(config: Config) -> None:
    """Reinforcement learning from ``data.train``, evaluated on ``data.eval``."""
    updates = config.algorithm.mini_batches * config.algorithm.epochs
    _run(config, "train", config.train.steps * updates, _reinforce)


def sft(config: Config) -> None:
    """Supervised fine-tuning on the prompts and answers of ``data.train``."""
    _run(config, "sft", config.train.steps, _supervised)


def _run(
    config: Config,
    verb: str,
    optimizer_steps: int,
    make_task: Callable[[Session, Policy, Engine], Task],
) -> None:
    with open_session(config, verb, config.train.steps) as session:
        policy = build_policy(
            config,
            session.device,
            session.groups,
            optimizer_steps,
            with_reference=verb == "train" and config.algorithm.reference == "initial",
        )
        _show_header(session, policy)
        engine = _engine(session, policy.chunks, policy.transformer)
        complete = run_loop(session, policy, lambda: make_task(session, policy, engine))
        if session.is_main:
            report = write_report(config.run_dir)
            if complete:
                session.console.note(summary(config.run_dir))
            session.console.note(f"report: {report}")


def _reinforce(session: Session, policy: Policy, engine: Engine) -> Task:
    return Reinforce(session, policy, engine, _prompts(session, "train"), _prompts(session, "eval"))


def _supervised(session: Session, policy: Policy, engine: Engine) -> Task:
    data = session.config.data
    samples = load_samples(
        data.train,
        session.tokenizer,
        data.prompt_key,
        data.completion_key,
        session.config.model.max_sequence_length,
    )
    return Supervised(session, policy, engine, samples, _prompts(session, "eval"))


def evaluate(config: Config) -> None:
    """Evaluate the newest weights of the run (or ``checkpoint.init_from``) on ``data.eval``."""
    with open_session(config, "evaluate", None) as session:
        engine = _load_engine(session)
        sums = session.new_sums()
        evaluate_problems(session, engine, _prompts(session, "eval"), sums)
        session.console.eval(0, session.reduce(sums))


def generate(config: Config, prompts: Sequence[str]) -> None:
    """Print a sampled answer to each prompt."""
    with open_session(config, "generate", None) as session:
        engine = _load_engine(session)
        rollout = config.rollout
        settings = SamplingSettings(
            samples=1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            greedy=False,
            seed=config.seed,
        )
        problems = [
            Prompt(i, np.array(session.tokenizer.encode_prompt(text), dtype=np.int64), text, {})
            for i, text in enumerate(prompts)
        ]
        mine = problems if session.groups.data.rank() == 0 else []
        for group in engine.generate(mine, settings):
            session.console.note(f"{group.prompt.text}{group.completions[0].text}")


def _prompts(session: Session, split: str) -> list[Prompt]:
    config = session.config
    room = config.model.max_sequence_length - config.rollout.max_new_tokens
    prompts = load_prompts(
        getattr(config.data, split), session.tokenizer, config.data.prompt_key, room
    )
    return prompts[: config.evaluate.problems] if split == "eval" else prompts


def _engine(session: Session, chunks, transformer) -> BuiltinEngine:
    return BuiltinEngine(
        chunks=chunks,
        groups=session.groups,
        transformer_config=transformer,
        eos_id=session.tokenizer.eos_id,
        max_batch=session.config.rollout.max_batch,
        decode=session.tokenizer.decode,
        max_sequence_length=session.config.model.max_sequence_length,
    )


def _load_engine(session: Session) -> BuiltinEngine:
    """The model with its newest weights, without an optimizer."""
    config = session.config
    transformer = transformer_config(config.model, config.parallel, session.device)
    chunks = build_chunks(config.model, transformer, session.groups, session.device, config.seed)
    load_weights(
        config.checkpoint.init_from or session.run_dir,
        chunks=chunks,
        architecture=architecture_of(config.model),
        groups=session.groups,
    )
    return _engine(session, chunks, transformer)


def _show_header(session: Session, policy: Policy) -> None:
    config, groups = session.config, session.groups
    session.console.header(
        {
            "model": f"{config.model.num_layers} layers, {config.model.num_experts} experts, "
            f"top-{config.model.moe_top_k}",
            "layout": f"data {groups.data.size()} tensor {groups.tensor.size()} "
            f"pipeline {groups.pipeline.size()} context {groups.context.size()} "
            f"expert {groups.expert.size()}",
            "device": f"{session.device.kind}, {config.model.dtype}",
        }
    )
