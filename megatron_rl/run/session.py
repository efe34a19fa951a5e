"""A run on one rank: a task's session with the run directory, and how to open it."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch

from megatron_rl.checkpoint.directory import newest_first
from megatron_rl.config.loggers import chosen_loggers
from megatron_rl.config.schema import Config
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.device.instructions import slow_type
from megatron_rl.device.launch import read_launch
from megatron_rl.device.select import joined, select_device
from megatron_rl.errors import UserError
from megatron_rl.files import move_aside, written_for_the_user
from megatron_rl.observe.configurations import keep_configuration
from megatron_rl.observe.console import Console, SilentConsole
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.observe.run_files import METRICS_FILE, SAMPLES_FILE
from megatron_rl.observe.timers import Timers, peak_memory_gib
from megatron_rl.observe.writers import RunWriter
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.groups import build_groups, destroy_groups
from megatron_rl.parallel.stop_request import StopRequest
from megatron_rl.rollout.servers.keys import check_key
from megatron_rl.run.model_stop_tokens import model_directories, stop_tokens_of
from megatron_rl.run.run_lock import RunLock
from megatron_rl.tasks.task_session import TaskSession
from megatron_rl.weights.side_files import FOLDER as SIDE_FILES
from megatron_rl.weights.side_files import keep_side_files, kept_side_files

#: Verbs that add steps to a run.
TRAINING = ("train", "sft")


@dataclass(frozen=True)
class Session(TaskSession):
    """One run on one rank. Rank 0 alone has a writer."""

    lock: RunLock | None = None  #: on rank 0, for verbs that write in the run directory

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.config.run_dir

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    def open_writer(self, resume_step: int | None) -> RunWriter | None:
        """The writer of metrics and samples on rank 0; None elsewhere. A collective.

        Raises:
            UserError: a file of the run cannot be read or written; on all ranks.
        """
        opened = []

        def open_files() -> None:
            if not self.is_main:
                return
            with written_for_the_user(f"run_dir {self.run_dir}", "make room, or set run_dir"):
                writer = RunWriter(
                    self.run_dir,
                    loggers=chosen_loggers(self.config.observe),
                    config=self.config.model_dump(mode="json"),
                    resume_step=resume_step,
                    warn=self.console.warn,
                )
                opened.append(writer)
                writer.configuration = keep_configuration(self.run_dir, self.config, resume_step)
                if resume_step is None:
                    self._clear_for_a_new_run()
                origin = next(iter(model_directories(self.config)), None)
                kept = kept_side_files(self.run_dir)
                if kept is not None and (kept / "config.json").is_file():
                    origin = kept  # those the run has started from, whatever hf_path is now
                keep_side_files(origin, self.run_dir, tuple(self.stop_tokens))

        collective_try(self.groups.world, open_files)
        return opened[0] if opened else None

    def _clear_for_a_new_run(self) -> None:
        """Move an old run's files out of the way of a new run, which would resume from its
        checkpoints and export its tokenizer.
        """
        side_files = self.run_dir / SIDE_FILES
        if newest_first(self.checkpoints):
            for path in (self.checkpoints, side_files):
                move_aside(path)
            self.console.note(f"moved the checkpoints in {self.run_dir} aside: a new run")
        elif side_files.is_dir():
            shutil.rmtree(side_files)

    def confirm_lock(self) -> None:
        """Call before writing what only the owner of the run directory may write. A collective.

        Raises:
            RunFailed: another run has taken over the directory; on all ranks.
        """
        collective_try(self.groups.world, lambda: self.lock.confirm() if self.lock else None)

    def new_sums(self) -> MetricSums:
        """Empty sums for the metrics of a step."""
        return MetricSums(self.config.model.num_layers, self.device.torch_device)

    def reduce(self, sums: MetricSums) -> dict[str, float]:
        """The step's metrics over all ranks, with the times since the last call and the peak
        memory. A collective.
        """
        for name, seconds in self.timers.seconds().items():
            sums.add(name, seconds)
        self.timers.reset()
        sums.add("memory/peak_gib", peak_memory_gib(self.device.kind))
        metrics = sums.reduce(self.groups.world)
        if "tokens/step" in metrics:
            metrics["tokens_per_second"] = metrics["tokens/step"] / metrics["time/step_s"]
        return metrics


@contextlib.contextmanager
def open_session(
    config: Config, verb: str, total_steps: int | None, tokenizer: Tokenizer
) -> Iterator[Session]:
    """Choose the device, join the other ranks, build the groups; undo it at the end."""
    stops = stop_tokens_of(config, tokenizer)
    launch = read_launch()
    device = select_device(config.device, launch)
    main = launch.rank == 0
    with contextlib.ExitStack() as undo:
        undo.enter_context(joined(device, launch, config.device))
        groups = build_groups(config.parallel)
        undo.callback(destroy_groups)
        console = Console(config.observe.console, verb, total_steps) if main else SilentConsole()
        undo.enter_context(console)
        slow = slow_type(config.model.dtype) if device.kind == "cpu" else None
        if slow is not None:
            console.warn(slow)
        timers = Timers(_synchronise if device.kind == "cuda" else None)
        lock = RunLock(config.run_dir, console.note) if main and _writes(config, verb) else None
        collective_try(groups.world, lambda: check_key(config) if main and verb != "sft" else None)
        collective_try(groups.world, lambda: lock.acquire() if lock else None)
        collective_try(
            groups.world, lambda: _check_writable(config) if main and verb in TRAINING else None
        )
        if lock is not None:
            undo.callback(lock.release)
        yield Session(
            config,
            launch,
            device,
            groups,
            tokenizer,
            stops,
            console,
            timers,
            StopRequest(),
            lock,
        )


def _writes(config: Config, verb: str) -> bool:
    """Whether a verb writes in the run directory: training verbs do, and so do engines other than
    the built-in one, which put weights for servers there.
    """
    return verb in TRAINING or config.rollout.engine != "builtin"


def _check_writable(config: Config) -> None:
    """Refuse now, not at the first checkpoint, to resume a run whose files cannot be written."""
    for name in ("checkpoints", METRICS_FILE, SAMPLES_FILE):
        path = config.run_dir / name
        if config.checkpoint.resume != "never" and path.exists() and not os.access(path, os.W_OK):
            raise UserError(
                f"{path} is read-only; expected to add to it; give the right to write there, or "
                "set run_dir"
            )


def _synchronise() -> None:
    torch.cuda.synchronize()
