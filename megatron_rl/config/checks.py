"""Rules that span several fields: one function each, named after it. They refuse, never repair.

Each raises UserError("found; expected; remedy"). ``check_config`` runs the rules a verb needs.
Types and bounds of single fields are in ``schema.py``, rules of the architecture in
``checks_model.py``, of the parallel layout in ``checks_layout.py``, of the loss in
``checks_algorithm.py``, of data in ``checks_data.py``, of training and files here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

from megatron_rl.config.checks_algorithm import ALGORITHM_RULES
from megatron_rl.config.checks_data import PROMPT_RULES, data_is_found
from megatron_rl.config.checks_layout import (
    LAYOUT_RULES,
    layout_fits_world,
    ranks_are_as_configured,
)
from megatron_rl.config.checks_model import MODEL_RULES
from megatron_rl.config.checks_rollout import ROLLOUT_RULES
from megatron_rl.config.data import files_of, parts_of
from megatron_rl.config.layout import data_parallel_size, ranks_wanted
from megatron_rl.config.loggers import chosen_loggers
from megatron_rl.config.optimizer import OPTIMIZER_RULES
from megatron_rl.config.reward import chosen_verifiers
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError


def answers_leave_room_for_prompts(config: Config) -> None:
    """A prompt has at least one token."""
    new, longest = config.rollout.max_new_tokens, config.model.max_sequence_length
    if new >= longest:
        raise UserError(
            f"rollout.max_new_tokens {new} leaves no room for the prompt in "
            f"model.max_sequence_length {longest}; expected less; lower rollout.max_new_tokens"
        )


def verifiers_are_known(config: Config) -> None:
    """``reward.name``, or each of ``reward.parts``, is a verifier, with settings of it."""
    chosen_verifiers(config.reward)


def loggers_are_known(config: Config) -> None:
    """The loggers of ``observe`` exist, each once, with settings of theirs."""
    chosen_loggers(config.observe)


def groups_have_several_answers(config: Config) -> None:
    """An advantage compares an answer with the other answers to its prompt."""
    if config.rollout.samples_per_prompt < 2:
        raise UserError(
            "rollout.samples_per_prompt is 1: its advantage is always 0; expected at least 2 "
            "answers a prompt"
        )


def prompts_split_over_ranks(config: Config, world_size: int) -> None:
    """Every data-parallel rank gets equally many whole prompts, cut evenly into mini-batches."""
    prompts, parts = config.rollout.prompts_per_step, config.algorithm.mini_batches
    replicas = data_parallel_size(config.parallel, world_size)
    if prompts % replicas:
        raise UserError(
            f"rollout.prompts_per_step {prompts} is no multiple of the data-parallel size "
            f"{replicas}; expected a multiple; change rollout.prompts_per_step"
        )
    if (prompts // replicas) % parts:
        raise UserError(
            f"{prompts // replicas} prompts a data-parallel rank are no multiple of "
            f"algorithm.mini_batches {parts}; expected a multiple, since a group is never split; "
            "change rollout.prompts_per_step or algorithm.mini_batches"
        )


def batch_splits_over_ranks(config: Config, world_size: int) -> None:
    """Every data-parallel rank gets equally many sequences of a fine-tuning batch."""
    replicas = data_parallel_size(config.parallel, world_size)
    if config.train.batch_size % replicas:
        raise UserError(
            f"train.batch_size {config.train.batch_size} is no multiple of the data-parallel size "
            f"{replicas}; expected a multiple; change train.batch_size"
        )


def learning_rate_decays(config: Config) -> None:
    """The learning rate ends at or below its peak."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise UserError(
            f"optimizer.min_lr {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}; "
            "expected at most that; lower optimizer.min_lr"
        )


#: Fields that a verb needs.
NEEDED_FILES: dict[str, tuple[str, ...]] = {
    "train": ("data.tokenizer.path", "data.train"),
    "sft": ("data.tokenizer.path", "data.train"),
    "evaluate": ("data.tokenizer.path", "data.eval"),
    "generate": ("data.tokenizer.path",),
    "convert": (),
}


def input_files(config: Config) -> dict[str, Path | None]:
    """Every file or directory a run reads, by the name of its field."""
    return {
        "data.tokenizer.path": config.data.tokenizer.path,
        **{
            f"data.{split}": None for split in ("train", "eval") if not parts_of(config.data, split)
        },
        **files_of(config.data),
        "checkpoint.init_from": config.checkpoint.init_from,
    }


def files_exist(config: Config, verb: str) -> None:
    """The files a verb reads are named and there; run_dir, if there, is a directory."""
    files = input_files(config)
    for name in NEEDED_FILES[verb]:
        if name in files and files[name] is None:
            raise UserError(
                f"{name} is not given; expected a path, which {verb} needs; set --{name}"
            )
    evaluates = ("data.eval",) if verb in ("train", "sft") else ()
    read = (*NEEDED_FILES[verb], *evaluates, "checkpoint.init_from")
    for name, path in files.items():
        if not any(name == of or name.startswith(f"{of}.") for of in read):
            continue
        if path is not None and not os.path.exists(path):
            raise UserError(
                f"{name}: {path} does not exist; expected a path from the current directory "
                f"({Path.cwd()})"
            )
    if os.path.exists(config.run_dir) and not config.run_dir.is_dir():
        raise UserError(f"run_dir {config.run_dir} is a file; expected a directory or a new name")


def best_checkpoints_are_evaluated(config: Config) -> None:
    """``checkpoint.keep_best`` compares evaluations of steps that are saved."""
    settings, evaluate = config.checkpoint, config.evaluate
    if not settings.keep_best:
        return
    if config.data.eval is None:
        raise UserError(
            f"checkpoint.keep_best is {settings.keep_best} and data.eval is not given; expected "
            "held-out problems, whose evaluations tell which is best; set data.eval"
        )
    if not (settings.every and evaluate.every):
        raise UserError(
            f"checkpoint.keep_best is {settings.keep_best} with checkpoint.every {settings.every} "
            f"and evaluate.every {evaluate.every}; expected both above 0; steps that are saved and "
            "evaluated can be compared"
        )
    if settings.best_metric == "eval/mean@k" and not evaluate.samples:
        raise UserError(
            "checkpoint.best_metric is eval/mean@k with evaluate.samples 0; expected samples above "
            "0, or eval/pass@1"
        )


VERB_RULES: dict[str, tuple[Callable[[Config], None], ...]] = {
    "train": (
        *ALGORITHM_RULES,
        *OPTIMIZER_RULES,
        loggers_are_known,
        verifiers_are_known,
        data_is_found,
        *PROMPT_RULES,
        groups_have_several_answers,
        answers_leave_room_for_prompts,
        best_checkpoints_are_evaluated,
    ),
    "sft": (
        *OPTIMIZER_RULES,
        loggers_are_known,
        verifiers_are_known,
        data_is_found,
        *PROMPT_RULES,
        answers_leave_room_for_prompts,
        best_checkpoints_are_evaluated,
    ),
    "evaluate": (
        verifiers_are_known,
        data_is_found,
        *PROMPT_RULES,
        answers_leave_room_for_prompts,
    ),
    "generate": (
        *PROMPT_RULES,
        answers_leave_room_for_prompts,
    ),
    "convert": (),
}

RANK_RULES: dict[str, tuple[Callable[[Config, int], None], ...]] = {
    "train": (prompts_split_over_ranks,),
    "sft": (batch_splits_over_ranks,),
    "evaluate": (),
    "generate": (),
    "convert": (),
}


def check_config(config: Config, world_size: int | None, verb: str, files: bool = True) -> None:
    """Refuse a config that ``verb`` (train, sft, evaluate, generate, convert) cannot run.

    ``world_size``: number of ranks; None: unknown, take the config's. ``files``: also check that
    the named files exist.
    """
    rules = (*MODEL_RULES, *LAYOUT_RULES, *ROLLOUT_RULES, learning_rate_decays, *VERB_RULES[verb])
    for rule in rules:
        rule(config)
    if world_size is None:
        world_size = ranks_wanted(config.parallel)
    else:
        ranks_are_as_configured(config, world_size, verb)
    layout_fits_world(config, world_size)
    for rank_rule in RANK_RULES[verb]:
        rank_rule(config, world_size)
    if files:
        files_exist(config, verb)
