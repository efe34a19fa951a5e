"""The verbs that need the model: train, sft, evaluate, generate.

Tokenizer and data have been read and checked by then (``data/run_data.py``), on every rank.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Callable, Mapping, Sequence

from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.checkpoint.load import load_weights
from megatron_rl.checkpoint.manifest import read_manifest
from megatron_rl.config.algorithm import keeps_trace
from megatron_rl.config.schema import Config
from megatron_rl.data.run_data import RunData
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.device.launch import read_launch
from megatron_rl.errors import UserError
from megatron_rl.models.build import build_chunks, transformer_config
from megatron_rl.observe.report import summary, write_report
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import Engine, sampling_settings
from megatron_rl.training.checkpoints import load_newest
from megatron_rl.training.engines import build_engine
from megatron_rl.training.evaluate import evaluate as evaluate_problems
from megatron_rl.training.header import run_facts, sft_facts, train_facts
from megatron_rl.training.initial_weights import load_initial_weights
from megatron_rl.training.loop import run_loop
from megatron_rl.training.policy import Policy, build_policy
from megatron_rl.training.reinforce import Reinforce
from megatron_rl.training.session import Session, open_session
from megatron_rl.training.supervised import Supervised
from megatron_rl.training.task import Task
from megatron_rl.training.trace_memory import check_trace_fits, longest_sequence

#: Builds a verb's task once session, policy and engine are there.
MakeTask = Callable[[Session, Policy, Engine], Task]


def train(config: Config, data: RunData) -> None:
    """Reinforcement learning from ``data.train``, evaluated on ``data.eval`` where it is given."""
    problems, held_out = data.train.items, _held_out(data)

    def make_task(session: Session, policy: Policy, engine: Engine) -> Task:
        if keeps_trace(config.algorithm):
            check_trace_fits(session, longest_sequence(config, problems))
        return Reinforce(session, policy, engine, problems, held_out)

    updates = config.train.steps * config.algorithm.mini_batches * config.algorithm.epochs
    facts = train_facts(config, data, read_launch().world_size)
    _run(config, "train", data.tokenizer, facts, updates, make_task)


def sft(config: Config, data: RunData) -> None:
    """Supervised fine-tuning on the prompts and answers of ``data.train``."""

    def make_task(session: Session, policy: Policy, engine: Engine) -> Task:
        return Supervised(session, policy, engine, data.train.items, _held_out(data))

    facts = sft_facts(config, data)
    _run(config, "sft", data.tokenizer, facts, config.train.steps, make_task)


def _run(
    config: Config,
    verb: str,
    tokenizer: Tokenizer,
    facts: Mapping[str, str],
    optimizer_steps: int,
    make_task: MakeTask,
) -> None:
    with open_session(config, verb, config.train.steps, tokenizer) as session:
        session.console.header({**run_facts(session), **facts})
        policy = build_policy(
            config,
            session.device,
            session.groups,
            optimizer_steps,
            with_reference=verb == "train" and config.algorithm.reference == "initial",
        )
        engine = build_engine(session, policy.chunks, policy.transformer, policy.capture)
        with contextlib.closing(engine):
            complete = run_loop(session, policy, lambda: make_task(session, policy, engine))
        if session.is_main:
            report = write_report(config.run_dir)
            if complete:
                session.console.note(summary(config.run_dir))
            session.console.note(f"report: {report}")


def evaluate(config: Config, data: RunData) -> None:
    """Evaluate the newest weights of the run, or those it would start from, on ``data.eval``."""
    problems = _held_out(data)
    with open_session(config, "evaluate", None, data.tokenizer) as session:
        engine, weights, step = _load_engine(session)
        what = f"{len(problems):,} problems ({config.data.eval}), reward {config.reward.name}"
        facts = {"weights": weights, "data": what, **data.facts()}
        session.console.header({**run_facts(session), **facts})
        sums = session.new_sums()
        with contextlib.closing(engine):
            evaluate_problems(session, engine, problems, sums)
        session.console.eval(step, session.reduce(sums))


def generate(
    config: Config, data: RunData, problems: Sequence[Prompt], greedy: bool = False
) -> None:
    """Print an answer to each problem, of the weights that `evaluate` takes."""
    with open_session(config, "generate", None, data.tokenizer) as session:
        engine, _, _ = _load_engine(session)
        settings = sampling_settings(config.rollout, samples=1, greedy=greedy, seed=config.seed)
        mine = problems if session.groups.data.rank() == 0 else []
        with contextlib.closing(engine):
            for group in engine.generate(mine, settings):
                session.console.note(f"{group.prompt.text}{group.completions[0].text}")


def _held_out(data: RunData) -> list[Prompt]:
    return [] if data.eval is None else data.eval.items


def _load_engine(session: Session) -> tuple[Engine, str, int]:
    """The model without an optimizer, the checkpoint its weights are from, and that one's step.

    As when a run is continued: the run's newest checkpoint, else what a new run starts from.
    """
    config, groups = session.config, session.groups
    transformer = transformer_config(config.model, config.parallel, session.device)
    chunks = build_chunks(config.model, transformer, groups, session.device, config.seed)

    def load(path: Path) -> Path:
        architecture = architecture_of(config.model)
        return load_weights(path, chunks=chunks, architecture=architecture, groups=groups)

    loaded = load_newest(session, load)
    found = loaded[0] if loaded is not None else load_initial_weights(config, chunks, groups)
    if found is None:
        there = Path(config.run_dir).exists()
        state = "holds no complete checkpoint" if there else "does not exist"
        raise UserError(
            f"{config.run_dir} {state}; expected a run directory, or other weights; "
            "correct run_dir, set checkpoint.init_from or model.hf_path, or train first"
        )
    step = read_manifest(found).step if found != config.model.hf_path else 0
    return build_engine(session, chunks, transformer), str(found), step
