"""What surrounds the training of a run on one rank: device, groups, files, console, checkpoints."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

import torch
import torch.distributed as dist

from megatron_rl.checkpoint.together import together
from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import Config
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.device.launch import Launch, read_launch
from megatron_rl.device.select import Device, connect, select_device
from megatron_rl.observe.console import Console, SilentConsole
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.observe.run_files import CONFIG_FILE
from megatron_rl.observe.timers import Timers, peak_memory_gib
from megatron_rl.observe.writers import RunWriter
from megatron_rl.parallel.groups import Groups, build_groups, destroy_groups
from megatron_rl.training.stop_tokens import model_directories, stop_tokens_of
from megatron_rl.weights.companions import keep_companions


@dataclass(frozen=True)
class Session:
    """One run on one rank. Rank 0 alone has a writer and a console that shows anything."""

    config: Config
    launch: Launch
    device: Device
    groups: Groups
    tokenizer: Tokenizer
    stop_tokens: Mapping[int, str]  #: that end an answer, each with what names it
    console: SilentConsole
    timers: Timers

    @property
    def is_main(self) -> bool:
        """True on the rank that writes the run's files."""
        return self.launch.rank == 0

    @property
    def counts_once(self) -> bool:
        """True on one of the ranks that hold the same data: it adds to sums over data."""
        groups = self.groups
        return groups.model.rank() == 0 and groups.context.rank() == 0

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.config.run_dir

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.run_dir / "checkpoints"

    def open_writer(self, resume_step: int | None) -> RunWriter | None:
        """The writer of metrics and samples on rank 0; None elsewhere. A collective.

        Raises:
            UserError, OSError: a file of the run cannot be read or written; on all ranks.
        """
        opened = []

        def open_files() -> None:
            if self.is_main:
                observe = self.config.observe
                writer = RunWriter(
                    self.run_dir,
                    tensorboard=observe.tensorboard,
                    wandb=observe.wandb,
                    resume_step=resume_step,
                )
                opened.append(writer)
                text = dump_config(self.config)
                (self.run_dir / CONFIG_FILE).write_text(text, encoding="utf-8")
                origin = next(iter(model_directories(self.config)), None)
                keep_companions(origin, self.run_dir, tuple(self.stop_tokens))

        together(self.groups.world, open_files)
        return opened[0] if opened else None

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
    stops = stop_tokens_of(config, tokenizer.eos_id)
    launch = read_launch()
    device = select_device(config.device, launch)
    connect(device, launch, config.device.timeout_s)
    groups = build_groups(config.parallel)
    main = launch.rank == 0
    console = Console(config.observe.console, verb, total_steps) if main else SilentConsole()
    timers = Timers(_synchronise if device.kind == "cuda" else None)
    try:
        with console:
            yield Session(config, launch, device, groups, tokenizer, stops, console, timers)
    finally:
        destroy_groups()
        dist.destroy_process_group()


def _synchronise() -> None:
    torch.cuda.synchronize()
