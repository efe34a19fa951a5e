"""The verbs that need the model: train, sft, evaluate, generate.

Every rank has read and checked tokenizer and data before (``data/run_data.py``).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Callable, Mapping, Sequence

from megatron_rl.checkpoint.directory import newest_first
from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.checkpoint.manifest import read_manifest
from megatron_rl.checkpoint.restore import load_weights
from megatron_rl.config.algorithm import keeps_trace, updates_per_step
from megatron_rl.config.data import data_text
from megatron_rl.config.reward import reward_text
from megatron_rl.config.rollout import truncation_text
from megatron_rl.config.schema import Config
from megatron_rl.data.run_data import RunData
from megatron_rl.device.launch import read_launch
from megatron_rl.errors import UserError
from megatron_rl.files import written_for_the_user
from megatron_rl.models.build import build_chunks, transformer_config
from megatron_rl.observe.run_files import METRICS_FILE
from megatron_rl.policy.initial_weights import load_initial_weights
from megatron_rl.policy.policy import Policy, build_policy
from megatron_rl.records import Prompt
from megatron_rl.report.run_page import summary, write_report
from megatron_rl.rollout.engine import Engine, sampling_settings
from megatron_rl.run.checkpoints import load_newest
from megatron_rl.run.continuation import check_continuation, run_identity
from megatron_rl.run.loop import run_loop
from megatron_rl.run.run_summary import (
    decoding_facts,
    exchange_facts,
    run_facts,
    sft_facts,
    train_facts,
)
from megatron_rl.run.session import Session, open_session
from megatron_rl.run.trace_memory import check_trace_fits, longest_sequence
from megatron_rl.tasks.answers import answer, check_output
from megatron_rl.tasks.build import build_engine
from megatron_rl.tasks.evaluate import evaluate as evaluate_problems
from megatron_rl.tasks.reinforce import Reinforce
from megatron_rl.tasks.supervised import Supervised
from megatron_rl.tasks.task import Task

#: Builds a verb's task from session, policy and engine.
MakeTask = Callable[[Session, Policy, Engine], Task]


def train(config: Config, data: RunData) -> None:
    """Reinforcement learning on ``data.train``, evaluated on ``data.eval`` if given."""
    assert data.train is not None, "what the verb reads"
    problems, parts, held_out = data.train.items, data.train.parts, _held_out(data)
    identity = run_identity(config, "train", problems, held_out, parts)
    check_continuation(config, identity)

    def make_task(session: Session, policy: Policy, engine: Engine) -> Task:
        if keeps_trace(config.algorithm):
            check_trace_fits(session, longest_sequence(config, problems))
        biased = None if config.rollout.keep_sampling_mask else truncation_text(config.rollout)
        if biased is not None:
            session.console.warn(biased)
        return Reinforce(session, policy, engine, problems, held_out, identity, parts)

    updates = config.train.steps * updates_per_step(config.algorithm)
    facts = train_facts(config, data, read_launch().world_size)
    _run(config, "train", data, facts, updates, make_task)


def sft(config: Config, data: RunData) -> None:
    """Supervised fine-tuning on the prompts and answers of ``data.train``."""
    assert data.train is not None, "what the verb reads"
    samples, parts, held_out = data.train.items, data.train.parts, _held_out(data)
    identity = run_identity(config, "sft", samples, held_out, parts)
    check_continuation(config, identity)

    def make_task(session: Session, policy: Policy, engine: Engine) -> Task:
        return Supervised(session, policy, engine, samples, held_out, identity, parts)

    facts = sft_facts(config, data)
    _run(config, "sft", data, facts, config.train.steps, make_task)


def _run(
    config: Config,
    verb: str,
    data: RunData,
    facts: Mapping[str, str],
    optimizer_steps: int,
    make_task: MakeTask,
) -> None:
    with open_session(config, verb, config.train.steps, data.tokenizer) as session:
        session.console.run_summary({**run_facts(session, data.machine), **facts})
        policy = build_policy(
            config,
            session.device,
            session.groups,
            optimizer_steps,
            with_reference=verb == "train" and config.algorithm.reference == "initial",
        )
        engine = build_engine(session, policy.chunks, policy.capture)
        session.console.run_summary({**decoding_facts(engine), **exchange_facts(policy)})
        with contextlib.closing(engine):
            complete = run_loop(session, policy, lambda: make_task(session, policy, engine))
        if session.is_main:
            _report(session, complete)


def _report(session: Session, complete: bool) -> None:
    """Write the run's report. If that fails, warn: the run itself has succeeded."""
    run_dir = session.run_dir
    if not complete and not (run_dir / METRICS_FILE).stat().st_size:
        return  # the run stopped before its first metrics
    try:
        with written_for_the_user("the report", f"make room and run: megatron-rl report {run_dir}"):
            report = write_report(run_dir)
    except UserError as error:
        session.console.warn(f"no report: {error}")
        return
    if complete:
        session.console.note(summary(run_dir))
    session.console.note(f"report: {report}")


def evaluate(config: Config, data: RunData, *, base: bool = False) -> None:
    """Evaluate the run's newest weights on ``data.eval``; ``base``: the weights a new run starts
    from.
    """
    _check_weights(config, base)
    problems = _held_out(data)
    with open_session(config, "evaluate", None, data.tokenizer) as session:
        engine, weights, step = _load_engine(session, base)
        what = (
            f"{len(problems):,} problems ({data_text(config.data.eval)}), "
            f"reward {reward_text(config.reward)}"
        )
        facts = {"weights": weights, "data": what, **data.facts()}
        session.console.run_summary(
            {**run_facts(session, data.machine), **decoding_facts(engine), **facts}
        )
        sums = session.new_sums()
        with contextlib.closing(engine):
            evaluate_problems(session, engine, problems, sums)
        session.console.eval(step, session.reduce(sums))
        session.console.confirm()


def generate(
    config: Config,
    data: RunData,
    problems: Sequence[Prompt],
    *,
    greedy: bool = False,
    base: bool = False,
    samples: int = 1,
    output: Path | None = None,
) -> None:
    """Answer each problem with the weights that `evaluate` uses; print the answers or write them to
    ``output`` as JSON lines.
    """
    _check_weights(config, base)
    if output is not None:
        check_output(output)
    with open_session(config, "generate", None, data.tokenizer) as session:
        engine, _, _ = _load_engine(session, base)
        settings = sampling_settings(
            config.rollout, samples=samples, greedy=greedy, seed=config.seed
        )
        with contextlib.closing(engine):
            answer(session, engine, problems, settings, output)
        session.console.confirm()


def _held_out(data: RunData) -> list[Prompt]:
    return [] if data.eval is None else data.eval.items


def _check_weights(config: Config, base: bool) -> None:
    """Refuse if the weights asked for are not named: a verb never uses other weights than the run's
    unless told to.
    """
    if base and config.checkpoint.init_from is None and config.model.hf_path is None:
        raise UserError(
            "--base asks for the weights a run starts from, and neither checkpoint.init_from nor "
            "model.hf_path is given; expected one of them; set it, or leave --base out"
        )
    if not base and not newest_first(config.run_dir / "checkpoints"):
        state = "holds no complete checkpoint" if config.run_dir.exists() else "does not exist"
        raise UserError(
            f"{config.run_dir} {state}; expected a run directory; correct run_dir, train "
            "first, or give --base for the weights of checkpoint.init_from or model.hf_path"
        )


def _load_engine(session: Session, base: bool) -> tuple[Engine, str, int]:
    """The model without an optimizer, the checkpoint of its weights, and the checkpoint's step."""
    config, groups = session.config, session.groups
    transformer = transformer_config(config.model, config.parallel, session.device)
    chunks = build_chunks(config.model, transformer, groups, session.device, config.seed)

    def load(path: Path) -> Path:
        architecture = architecture_of(config.model)
        return load_weights(path, chunks=chunks, architecture=architecture, groups=groups)

    if base:
        found = load_initial_weights(config, chunks, groups)
    else:
        # Read the checkpoint even if the configuration makes its runs start anew.
        resume = "newest" if config.checkpoint.resume == "newest" else "auto"
        loaded = load_newest(session, load, resume)
        found = None if loaded is None else loaded[0]
    assert found is not None, "checked before the ranks joined"
    step = read_manifest(found).step if found != config.model.hf_path else 0
    return build_engine(session, chunks), str(found), step
