"""Everything that a run reads before its ranks join: the configured data sets and tokenizer. A
mistake in them shows before torch, Megatron or a GPU is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from megatron_rl.config.data import Split, chosen_sources
from megatron_rl.config.schema import Config
from megatron_rl.data.problems import ProblemFile, parse_prompt, read_sources
from megatron_rl.data.prompts import DataSet, load_prompts, load_samples
from megatron_rl.data.rendering import Rendering
from megatron_rl.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt
from megatron_rl.rewards.chosen import check_machine, record_check

#: Splits that a verb reads, if they are given.
SPLITS: dict[str, tuple[Split, ...]] = {
    "train": ("train", "eval"),
    "sft": ("train", "eval"),
    "evaluate": ("eval",),
    "generate": (),
}


@dataclass(frozen=True)
class RunData:
    """The data and the tokenizer of a run."""

    rendering: Rendering
    train: DataSet[Any] | None  #: samples for ``sft``, prompts for ``train``
    eval: DataSet[Prompt] | None
    #: what the verifiers found on this machine, for the run summary
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        return self.rendering.tokenizer

    def facts(self) -> dict[str, str]:
        """Facts for the run summary: how prompts reach the model, skipped lines, notes on lines."""
        sets = {"": self.train, "held-out: ": self.eval}
        given = {name: data for name, data in sets.items() if data is not None}
        kinds = sum((data.kinds for data in given.values()), Counter())
        skips = [name + data.skips() for name, data in given.items() if data.skipped]
        notes = [
            f"{name}{count:,} {note}"
            for name, data in given.items()
            for note, count in data.notes.items()
        ]
        facts = {"prompts": self.rendering.facts(kinds)}
        mixed = [name + _mixture(data) for name, data in given.items() if len(data.parts) > 1]
        facts |= {"mixture": "; ".join(mixed)} if mixed else {}
        facts |= {"left out": "; ".join(skips)} if skips else {}
        return facts | ({"of the data": "; ".join(notes)} if notes else {})


def _mixture(data: DataSet[Any]) -> str:
    """``0.7 math (7,000), 0.3 code (12,000)``: share of the draws, and number of problems."""
    shares = data.shares()
    return ", ".join(f"{shares[p.label]:.3g} {p.label} ({p.size:,})" for p in data.parts)


def read_files(config: Config, verb: str, missing: bool = False) -> dict[str, ProblemFile]:
    """The verb's data sets by split, every line checked, without the tokenizer.

    ``missing``: skip missing data sets instead of refusing them. ``UserError``: as in
    ``read_sources``.
    """
    files: dict[str, ProblemFile] = {}
    for split in SPLITS[verb]:
        sources = chosen_sources(config.data, split)
        if not sources or (missing and any(not source.is_there for source in sources)):
            continue
        tuning = verb == "sft" and split == "train"
        check = None if tuning else record_check(config.reward)
        files[split] = read_sources(sources, check, completions=tuning)
    return files


def load_run_data(config: Config, verb: str) -> RunData:
    """Data sets and tokenizer of train, sft, evaluate or generate.

    Raises:
        UserError: a mistake in a file of the data or the tokenizer, with its name; or this
            process's limits are too low for the verifier.
    """
    machine = check_machine(config.reward) if SPLITS[verb] else {}
    return replace(encode_files(config, verb, read_files(config, verb)), machine=machine)


def encode_files(config: Config, verb: str, files: dict[str, ProblemFile]) -> RunData:
    """The data sets as the model will see them."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    weights = config.checkpoint.init_from or config.model.hf_path
    check_vocabulary(tokenizer, config.model.vocab_size, weights)
    overlong = config.data.overlong
    rendering = Rendering(tokenizer, config.data.chat, config.data.chat_template_kwargs)
    train: DataSet[Any] | None = None
    held_out: DataSet[Prompt] | None = None
    if "train" in files and verb == "sft":
        longest = config.model.max_sequence_length
        train = load_samples(files["train"], rendering, longest, overlong)
    elif "train" in files:
        train = load_prompts(files["train"], rendering, prompt_room(config), overlong)
    if "eval" in files:
        held_out = load_prompts(files["eval"], rendering, prompt_room(config), overlong)
        held_out = held_out.cut(config.evaluate.problems)
    return RunData(rendering, train, held_out)


def prompt_room(config: Config) -> int:
    """Longest prompt, tokens."""
    return config.model.max_sequence_length - config.rollout.max_new_tokens


def prompts_in(config: Config, rendering: Rendering, path: Path) -> DataSet[Prompt]:
    """The prompts of a data set on the command line, named and read as data.train, with the
    configured columns. ``UserError``: as for data sets.
    """
    sources = chosen_sources(config.data.model_copy(update={"train": path}), "train")
    return load_prompts(read_sources(sources), rendering, prompt_room(config), config.data.overlong)


def given_prompts(config: Config, rendering: Rendering, texts: Sequence[str]) -> list[Prompt]:
    """Prompts of the command line, rendered like those of a data set; the JSON text of a chat is a
    chat.

    ``UserError``: one that is no prompt, or too long.
    """
    prompts = []
    for index, text in enumerate(texts):
        try:
            ids, shown = rendering.prompt(parse_prompt(text, "prompt", Counter()), Counter())
        except UserError as error:
            raise UserError(f"--prompt {text[:60]!r}: {error}") from error
        if not 0 < len(ids) <= prompt_room(config):
            raise UserError(
                f"--prompt {text[:60]!r} has {len(ids)} tokens; expected 1 to "
                f"{prompt_room(config)}; change it, raise model.max_sequence_length or lower "
                "rollout.max_new_tokens"
            )
        prompts.append(Prompt(index, np.array(ids, dtype=np.int64), shown, {}))
    return prompts
