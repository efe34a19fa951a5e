"""The command line's arguments: verbs, their flags, and overrides of the configuration."""

from __future__ import annotations

import argparse
import math
import re
from functools import partial
from pathlib import Path
from typing import Callable, NoReturn, Sequence

from megatron_rl import __version__
from megatron_rl.catalogue.kinds import KINDS
from megatron_rl.errors import UserError, shown
from megatron_rl.paths import local_path

#: Verb -> its description in the help.
VERBS = {
    "train": "reinforcement learning on data.train",
    "sft": "supervised fine-tuning on data.train",
    "study": "run arms x seeds side by side from one file; a table, results.csv and a page of them",
    "evaluate": "measure the model on data.eval",
    "generate": "answer the prompts given with --prompt, or of a file",
    "convert": "convert a Hugging Face model to a Megatron checkpoint, or a run back to one",
    "report": "write report.html of a finished or running run; compare several; show one live",
    "check": "check a config and its data, show layout, parameters and memory; starts nothing",
    "data": "show the first examples of the data as the model will see them, and lengths",
    "list": f"show what a config can name: {', '.join(KINDS)}",
    "preflight": "compare the nodes of a run before it starts: one process a node",
}

#: Flags that are not fields of the config: with a value, and without.
OWN_FLAGS = {"--prompt", "--world-size", "--for", "--like", "--shard-gib", "--nodes", "--node"}
OWN_FLAGS |= {"--ranks-per-node", "--meet", "--within", "--examples"}
OWN_FLAGS |= {"--prompts", "--samples", "--output", "--port"}
OWN_SWITCHES = {"--help", "--version", "--verify", "--base", "--greedy", "--chat", "--watch"}
# Of studies:
OWN_FLAGS |= {"--only", "--launch", "--at-once"}
OWN_SWITCHES |= {"--quick", "--status", "--report"}

_CONFIG_HELP = (
    "Any field of the config can be overridden with --section.key VALUE, for example --seed 3 "
    "--rollout.temperature 0.8 --algorithm.settings.clip_low 0.3. "
    "Paths are relative to the current directory; ~ and ${VAR} in them are filled in."
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} -h")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; raises `UserError` where argparse would exit."""
    parser = _Parser(
        prog="megatron-rl",
        description="Reinforcement learning of Mixture-of-Experts models on Megatron-Core.",
        epilog="Several ranks: torchrun --nproc-per-node N -m megatron_rl VERB CONFIG ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-rl {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for verb, text in VERBS.items():
        sub = verbs.add_parser(
            verb,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=None if verb in ("report", "list", "study") else _CONFIG_HELP,
            allow_abbrev=False,
        )
        if verb in _WITHOUT_CONFIG:
            _WITHOUT_CONFIG[verb](sub)
        else:
            _add_config_arguments(verb, sub)
    return parser


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dirs",
        metavar="RUN_DIR",
        type=partial(_path, "RUN_DIR"),
        nargs="+",
        help="a run's directory; several: compare them on one page",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the page of one run to this machine while the run goes on, until Ctrl-C",
    )
    parser.add_argument(
        "--port",
        type=partial(_whole, "--port"),
        metavar="N",
        help="of --watch; default: a free one",
    )


def _add_config_arguments(verb: str, parser: argparse.ArgumentParser) -> None:
    """Arguments of a verb that reads a configuration."""
    parser.add_argument(
        "config", metavar="CONFIG", type=partial(_path, "CONFIG"), help="a YAML file"
    )
    if verb == "generate":
        _add_generate_arguments(parser)
    if verb == "data":
        parser.add_argument(
            "--examples",
            type=partial(_whole, "--examples"),
            default=3,
            metavar="N",
            help="of each file; default: 3",
        )
    if verb in ("evaluate", "generate", "preflight"):  # preflight gets evaluate's flags too
        parser.add_argument(
            "--base",
            action="store_true",
            help="of the weights a run starts from (checkpoint.init_from, else model.hf_path), "
            "not of the run",
        )
    if verb == "check":
        parser.add_argument(
            "--world-size",
            type=partial(_whole, "--world-size"),
            metavar="N",
            help="ranks; default: as the config says",
        )
    if verb == "preflight":
        _add_preflight_arguments(parser)
    if verb in ("check", "preflight", "data"):
        parser.add_argument(
            "--for", dest="purpose", choices=_RUNS, default="train", help="default: train"
        )


def _path(name: str, text: str) -> Path:
    return Path(local_path(name, text))


def _whole(name: str, text: str) -> int:
    """A whole number of at most nine digits: enough to count ranks or examples."""
    if not re.fullmatch("[+-]?[0-9]{1,9}", text):
        raise UserError(f"{name} is {shown(text)}; expected a whole number below 1,000,000,000")
    return int(text)


def _number(name: str, text: str) -> float:
    """A finite number below a thousand million."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < 1e9:
        raise UserError(f"{name} is {shown(text)}; expected a number below 1,000,000,000")
    return value


#: Verbs that run on ranks.
_RUNS = ("train", "sft", "evaluate", "generate")


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "study", metavar="STUDY", type=partial(_path, "STUDY"), help="a YAML file, see the README"
    )
    for switch, text in (
        ("--quick", "fewer seeds and steps, in STUDY_DIR/quick: to see that everything works"),
        ("--status", "show how far each run is, also while the study goes on"),
        ("--report", "write the results so far and show the table, also while it goes on"),
    ):
        parser.add_argument(switch, action="store_true", help=text)
    parser.add_argument(
        "--only",
        type=partial(_whole, "--only"),
        metavar="INDEX",
        help="one run, by its index from 0 (runs.csv): a task of a job array",
    )
    parser.add_argument(
        "--launch", choices=("local", "slurm"), help="default: as the file says (local)"
    )
    parser.add_argument(
        "--at-once",
        type=partial(_whole, "--at-once"),
        metavar="N",
        help="runs side by side; default: as the file says (as many as there are cores for)",
    )


def _add_list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", choices=tuple(KINDS), help=", ".join(KINDS))
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help="these alone; one of your own as a config names it: ./my_file.py:thing",
    )


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt, or a list of chat messages in JSON; may be given again",
    )
    parser.add_argument(
        "--prompts",
        type=partial(_path, "--prompts"),
        metavar="FILE",
        help="prompts of a data set in place of --prompt: named, and its columns chosen, as those "
        "of data.train",
    )
    parser.add_argument(
        "--samples",
        type=partial(_whole, "--samples"),
        default=1,
        metavar="N",
        help="answers to each prompt; default: 1",
    )
    parser.add_argument(
        "--output",
        type=partial(_path, "--output"),
        metavar="FILE",
        help="a new file for the answers, a JSON object each; default: they are printed",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a message of the user, for the tokenizer's chat template",
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest tokens")


def _add_preflight_arguments(parser: argparse.ArgumentParser) -> None:
    for name, letter, text in (
        ("--nodes", "N", "of the run"),
        ("--node", "R", "this one, from 0"),
        ("--ranks-per-node", "K", "processes of each node"),
    ):
        parser.add_argument(
            name, type=partial(_whole, name), required=True, metavar=letter, help=text
        )
    parser.add_argument(
        "--meet", required=True, metavar="HOST:PORT", help="address of node 0, and a free port"
    )
    parser.add_argument(
        "--within",
        type=partial(_number, "--within"),
        default=30.0,
        metavar="S",
        help="seconds it may take; default: 30",
    )


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=partial(_path, "SOURCE"),
        help="a Hugging Face model, a run, or a checkpoint; of a family of your own: "
        "--model.family ./my_family.py:FAMILY",
    )
    parser.add_argument(
        "target", metavar="TARGET", type=partial(_path, "TARGET"), help="a new directory"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every tensor, and the logits with those of transformers",
    )
    parser.add_argument(
        "--like",
        metavar="DIR",
        type=partial(_path, "--like"),
        help="to Hugging Face: the model whose config.json and tokenizer the result gets; "
        "default: the one the run started from",
    )
    parser.add_argument(
        "--shard-gib",
        type=partial(_number, "--shard-gib"),
        default=1.0,
        metavar="GIB",
        help="to Hugging Face: most tensors in a file; default: 1",
    )


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line arguments -> (for argparse, overrides of config fields), each in its order.

    Every ``--name`` but the few flags of the command line itself is an override and takes the next
    argument as its value, unless that is a flag again (``load_config`` reports the missing value).
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if name in OWN_FLAGS:
            own += [word] if "=" in word or not rest else [f"{word}={rest.pop(0)}"]
        elif not word.startswith("--") or name in OWN_SWITCHES:
            own.append(word)
        else:
            overrides.append(word)
            if "=" not in word and rest and not rest[0].startswith("--"):
                overrides.append(rest.pop(0))
    return own, overrides


_WITHOUT_CONFIG: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "report": _add_report_arguments,
    "study": _add_study_arguments,
    "list": _add_list_arguments,
    "convert": _add_convert_arguments,
}
