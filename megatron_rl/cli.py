"""The command line: ``megatron-rl VERB CONFIG [--section.key value ...]``.

Arguments and config are read and checked before torch or Megatron is imported, so a mistake costs
no time and no GPU. Exit codes: 0 success, 2 a user's mistake (one line on stderr), 130 interrupted,
1 otherwise: one line if a number was not finite, the run failed or the machine did (a disk, lost
ranks), a traceback for any other error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Sequence

from megatron_rl.arguments import VERBS, make_parser, split_overrides
from megatron_rl.catalogue.kinds import KINDS
from megatron_rl.catalogue.listing import listed
from megatron_rl.config.algorithm import keeps_trace
from megatron_rl.config.checks import (
    answers_leave_room_for_prompts,
    check_config,
    input_files,
    verifiers_are_known,
)
from megatron_rl.config.checks_data import PROMPT_RULES
from megatron_rl.config.checks_model import family_is_known
from megatron_rl.config.estimate import (
    GIB,
    count_parameters,
    memory_rows,
    trace_bytes_per_token,
    trace_text,
)
from megatron_rl.config.layout import layout_text, ranks_wanted
from megatron_rl.config.load import load_config
from megatron_rl.config.rollout import truncation_text
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.device.descriptors import allow_descriptors
from megatron_rl.device.launch import read_launch
from megatron_rl.device.lost_ranks import lost_ranks
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.files import reason
from megatron_rl.paths import as_written

#: What the verbs take that have no configuration to override.
_TAKES = {"report": "RUN_DIR", "list": "KIND and names", "study": "STUDY and its own flags"}
#: Time that a machine's first rank has to reach an error after the others, seconds.
PATIENCE_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected errors propagate.

    As usual with argparse, ``-h`` and ``--version`` end in SystemExit(0).
    """
    try:
        return _exit_code(sys.argv[1:] if argv is None else argv)
    finally:
        _leave_output()


def _exit_code(argv: Sequence[str]) -> int:
    """Run one command; print an error that a user should see as one line. Returns the exit code."""
    try:
        own, overrides = split_overrides(argv)
        _run(make_parser().parse_args(own), overrides)
    except UserError as error:
        _print_error(error)
        return 2
    except (FloatingPointError, RunFailed) as error:
        _print_error(error)
        return 1
    except OSError as error:  # an error of the machine: a disk, a descriptor, an address
        _print_error(RunFailed(f"the machine reports: {reason(error)}; correct it and start again"))
        return 1
    except RuntimeError as error:
        heard = lost_ranks(error) if read_launch().world_size > 1 else None
        if heard is None:
            raise
        _print_error(
            RunFailed(
                f"lost the other ranks ({heard}); expected all to answer; look for the first error "
                "among the ranks' logs, and run the same command to continue from the last "
                "checkpoint"
            )
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _leave_output() -> None:
    """Drop output that cannot be written any more (a full disk, a closed pipe), so that it does not
    decide the exit code: Python would try again at its end, and fail.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Check the arguments, then import and call what the verb needs."""
    if args.verb is None:
        raise UserError(f"no verb given; expected one of {', '.join(VERBS)}; see megatron-rl -h")
    if args.verb in _TAKES and overrides:
        raise UserError(f"{args.verb}: found {overrides[0]}; expected only {_TAKES[args.verb]}")
    if args.verb == "report":
        _report(args)
        return
    if args.verb == "study":
        _study(args)
        return
    if args.verb == "list":
        print("\n".join(listed(KINDS[args.kind], args.names)))
        return
    if args.verb == "convert":
        _convert(args, overrides)
        return
    if args.verb == "preflight":
        _preflight(args, overrides)
        return
    if args.verb == "generate" and args.chat:
        overrides = [*overrides, "--data.chat", "template"]
    purpose = args.purpose if args.verb in ("check", "data") else args.verb
    config = load_config(args.config, overrides, purpose)
    if args.verb == "data":
        _show_data(config, args.purpose, args.examples)
        return
    if args.verb == "check":
        _show_check(config, args.world_size, args.purpose)
        return
    if args.verb == "generate":
        _check_generate(args)
    check_config(config, read_launch().world_size, args.verb)
    _start(args, config)


def _report(args: argparse.Namespace) -> None:
    """Write pages, or serve one."""
    from megatron_rl.report.verb import report, watch

    if args.watch:
        watch(args.run_dirs, args.port or 0, lambda line: print(line, flush=True))
    elif args.port is not None:
        raise UserError("found --port without --watch; expected both; add --watch")
    else:
        report(args.run_dirs, print)


def _study(args: argparse.Namespace) -> None:
    from megatron_rl.study.command import run_study

    flags = ("quick", "status", "report", "only", "launch", "at_once")
    run_study(args.study, **{name: getattr(args, name) for name in flags})


def _preflight(args: argparse.Namespace, overrides: list[str]) -> None:
    """Compare the nodes; print one line for each difference, and an error with their number."""
    from megatron_rl.device.node_facts import described, facts_of_this_node
    from megatron_rl.device.node_report import read_meeting

    meeting = read_meeting(args.node, args.nodes, args.meet, args.within)
    if args.ranks_per_node < 1:
        raise UserError(f"--ranks-per-node is {args.ranks_per_node}; expected at least 1")
    # The store logs stack traces; the report explains them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from megatron_rl.device.preflight import compare

    nodes, ranks = args.nodes, args.ranks_per_node
    describe = partial(described, args.config, overrides, nodes * ranks, args.purpose)
    compare(meeting, facts_of_this_node(describe, nodes, ranks))


def _convert(args: argparse.Namespace, overrides: list[str]) -> None:
    """Convert in the source's direction; uses a GPU only if asked for."""
    launch, source = read_launch(), args.source
    if not source.is_dir():
        raise UserError(
            f"{source} is not a directory; expected a Hugging Face model, a run or a checkpoint"
        )
    if not args.shard_gib > 0:
        raise UserError(f"--shard-gib is {args.shard_gib:g}; expected a number above 0")
    overrides = ["--device.kind", "cpu", *overrides]
    from_hf = (source / "config.json").is_file()
    if from_hf:
        overrides = ["--model.hf_path", as_written(str(source)), *overrides]
        if args.like is not None:
            raise UserError(
                "--like applies only to conversion to Hugging Face; expected it left out"
            )
    config = load_config(None, overrides)
    family_is_known(config)
    model = config.model if from_hf else ModelConfig()  # that of a run is with its checkpoint
    checked = config.model_copy(update={"model": model})
    check_config(checked, launch.world_size, "convert")
    allow_descriptors(launch.world_size)
    from megatron_rl.device.select import select_device

    select_device(config.device, launch)
    from megatron_rl.observe.console import progress
    from megatron_rl.weights import convert

    show = progress(launch.rank == 0)
    if from_hf:
        convert.to_megatron(config, args.target, launch, show, args.verify)
    else:
        convert.to_hugging_face(
            source,
            args.target,
            config,
            launch,
            show,
            like=args.like,
            shard_bytes=int(args.shard_gib * GIB),
            verified=args.verify,
        )
    if launch.rank == 0:
        print(f"{args.target}{' (verified)' if args.verify else ''}")


def _start(args: argparse.Namespace, config: Config) -> None:
    """Read the data, prepare the device, import the training code and run the verb."""
    from megatron_rl.data.run_data import given_prompts, load_run_data, prompts_in

    allow_descriptors(read_launch().world_size)
    data = load_run_data(config, args.verb)
    if args.verb == "generate":
        if args.prompt:
            problems = given_prompts(config, data.rendering, args.prompt)
        else:
            found = prompts_in(config, data.rendering, args.prompts)
            problems = found.items
            if found.skipped and read_launch().rank == 0:
                print(f"megatron-rl: {found.skips()}", file=sys.stderr)
    from megatron_rl.device.select import select_device

    # First, because Megatron-Core adapts to torch while it is imported.
    select_device(config.device, read_launch())
    from megatron_rl.run import verbs

    if args.verb == "train":
        verbs.train(config, data)
    elif args.verb == "sft":
        verbs.sft(config, data)
    elif args.verb == "evaluate":
        verbs.evaluate(config, data, base=args.base)
    else:
        verbs.generate(
            config,
            data,
            problems,
            greedy=args.greedy,
            base=args.base,
            samples=args.samples,
            output=args.output,
        )


def _check_generate(args: argparse.Namespace) -> None:
    if bool(args.prompt) == bool(args.prompts):
        found = "both --prompt and --prompts" if args.prompt else "no prompt"
        raise UserError(
            f"generate: {found} given; expected at least one --prompt TEXT, or --prompts FILE"
        )
    if args.samples < 1:
        raise UserError(f"--samples is {args.samples}; expected at least 1")
    if args.greedy and args.samples > 1:
        raise UserError(
            f"--samples {args.samples} with --greedy, by which all answers to a prompt are the "
            "same; expected one of them; leave one out"
        )


def _show_data(config: Config, purpose: str, examples: int) -> None:
    """Print the data sets as the model will see them under the verb ``purpose``."""
    verifiers_are_known(config)
    for rule in PROMPT_RULES:
        rule(config)
    answers_leave_room_for_prompts(config)
    if examples < 0:
        raise UserError(f"--examples is {examples}; expected at least 0")
    if config.data.train is None and config.data.eval is None:
        raise UserError("neither data.train nor data.eval is given; expected one; set it")
    from megatron_rl.data.preview import preview
    from megatron_rl.data.run_data import encode_files, read_files
    from megatron_rl.run.model_stop_tokens import stop_tokens_of

    data = encode_files(config, purpose, read_files(config, purpose))
    stops = stop_tokens_of(config, data.tokenizer)
    longest = config.rollout.max_new_tokens
    for line in preview(data, stops, longest, examples):
        print(line)


def _show_check(config: Config, world_size: int | None, purpose: str) -> None:
    """Check the config for the verb ``purpose`` and print its size; lists files, requires none."""
    if world_size is not None:
        if world_size < 1:
            raise UserError(f"--world-size is {world_size}; expected at least 1")
        parallel = config.parallel.model_copy(update={"world_size": world_size})
        config = config.model_copy(update={"parallel": parallel})
    check_config(config, None, purpose, files=False)
    rows = check_rows(config) + data_rows(config, purpose) + machine_rows(config, purpose)
    sampling = truncation_text(config.rollout) if purpose == "train" else None
    rows += [] if sampling is None else [("truncated sampling", sampling)]

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, title=f"valid for {purpose}")
    for name, text in rows:
        table.add_row(name, Text(text))  # plain text: rich must not interpret it
    Console().print(table)


def check_rows(config: Config) -> list[tuple[str, str]]:
    """The rows of ``check``: (name, value) of ranks, layout, sizes and input files."""
    ranks = ranks_wanted(config.parallel)
    total, active = count_parameters(config.model)
    distance = config.algorithm.router_shift.distance
    trace, kept = trace_bytes_per_token(config.model, distance), keeps_trace(config.algorithm)
    longest = config.model.max_sequence_length
    return [
        ("ranks", str(ranks)),
        ("layout", layout_text(config.parallel, ranks)),
        ("parameters", f"{total:,} ({active:,} active for a token)"),
        *memory_rows(config, ranks),
        ("router trace", f"{trace:,} bytes a token over all pipeline stages"),
        ("  of a batch", trace_text(config, ranks, longest) if kept else "none is kept"),
        *((name, _file_state(path)) for name, path in input_files(config).items()),
    ]


def data_rows(config: Config, purpose: str) -> list[tuple[str, str]]:
    """The rows of ``check`` for existing data sets; raises for their mistakes as a run does."""
    from megatron_rl.data.preview import lengths_text
    from megatron_rl.data.run_data import encode_files, read_files

    files = read_files(config, purpose, missing=True)
    tokenizer = config.data.tokenizer.path
    if tokenizer is None or not tokenizer.exists():
        return [(f"  {name}", f"{len(file.problems):,} lines") for name, file in files.items()]
    data = encode_files(config, purpose, files)
    sets = {"train": data.train, "eval": data.eval}
    return [
        *((f"  {name}", lengths_text(found)) for name, found in sets.items() if found is not None),
        *((f"  {name}", text) for name, text in data.facts().items() if files),
    ]


def machine_rows(config: Config, purpose: str) -> list[tuple[str, str]]:
    """What is slow on this machine, and the verifiers' facts; the run's may be another."""
    from megatron_rl.data.run_data import SPLITS
    from megatron_rl.device.instructions import slow_type
    from megatron_rl.rewards.chosen import check_machine

    slow = None if config.device.kind == "cuda" else slow_type(config.model.dtype)
    rows = [] if slow is None else [("slow without a GPU", slow)]
    try:
        return [*rows, *(check_machine(config.reward) if SPLITS[purpose] else {}).items()]
    except UserError as error:
        return [*rows, ("this machine", f"would be refused: {error}")]


def _file_state(path: Path | None) -> str:
    if path is None:
        return "not given"
    return str(path) if os.path.exists(path) else f"{path} (missing)"


def _print_error(error: Exception) -> None:
    """Print one line on stderr, once on each machine, whose other ranks meet the same error.

    They wait, because torchrun ends all ranks as soon as one fails, and the rank that prints may
    come last. A rank that is still alive after the wait is alone with its error and prints it.
    """
    message, place = " ".join(str(error).split("\n")), ""
    try:
        launch = read_launch()
    except UserError:  # it is the mistake being reported
        launch = None
    if launch is not None and launch.local_rank > 0:
        time.sleep(PATIENCE_S)
        place = f"rank {launch.rank}: "
    print(f"megatron-rl: error: {place}{message}", file=sys.stderr)
