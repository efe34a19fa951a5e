"""A task's session on one rank: configuration, device, groups, tokenizer, console, timers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from megatron_rl.config.schema import Config
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.device.launch import Launch
from megatron_rl.device.select import Device
from megatron_rl.errors import Stopped
from megatron_rl.observe.console import SilentConsole
from megatron_rl.observe.timers import Timers
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.stop_request import StopRequest


@dataclass(frozen=True)
class TaskSession:
    """One rank of a run, without the run's directory (see `run.session.Session`). Rank 0 alone has
    a console that shows anything.
    """

    config: Config
    launch: Launch
    device: Device
    groups: Groups
    tokenizer: Tokenizer
    stop_tokens: Mapping[int, str]  #: ids that end an answer, with what names each
    console: SilentConsole
    timers: Timers
    stop: StopRequest

    @property
    def is_main(self) -> bool:
        """True on the rank that writes the run's files."""
        return self.launch.rank == 0

    @property
    def counts_once(self) -> bool:
        """True on one of the ranks that hold the same data: it adds to sums over data."""
        groups = self.groups
        return groups.model.rank() == 0 and groups.context.rank() == 0

    def check_stop(self) -> None:
        """Stop here if a signal asked for it: the step has not changed the weights yet. A
        collective.

        Raises:
            Stopped: a signal asked the run to stop; on all ranks.
        """
        if self.stop.agreed(self.groups.world, self.device.torch_device):
            raise Stopped
