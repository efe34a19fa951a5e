"""What a rollout engine is: prompts in, groups of completions with log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Collection, Protocol, Sequence

from megatron_rl.config.schema import Config
from megatron_rl.config.schema_rollout import RolloutConfig
from megatron_rl.records import Prompt, RolloutGroup

if TYPE_CHECKING:
    import torch

    from megatron_rl.parallel.groups import Groups
    from megatron_rl.router.capture import RouterCapture


@dataclass(frozen=True)
class SamplingSettings:
    """How answers are drawn."""

    samples: int  #: answers G to each prompt, >= 1
    max_new_tokens: int  #: longest answer, tokens, >= 1
    temperature: float = (
        1.0  #: > 0; log-probabilities are those at this temperature, under greedy too
    )
    top_p: float = 1.0  #: nucleus, in (0, 1]; 1: off
    top_k: int = 0  #: sample among the k likeliest tokens; 0: off
    greedy: bool = False  #: take the likeliest token; top_p and top_k have no effect
    seed: int = (
        0  #: with the prompt's index and the answer's number it determines an answer's randomness
    )
    routes: bool = False  #: completions carry the experts of their tokens


def sampling_settings(
    rollout: RolloutConfig, *, samples: int, greedy: bool, seed: int, routes: bool = False
) -> SamplingSettings:
    """As the configuration says, for these many answers."""
    return SamplingSettings(
        samples=samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        greedy=greedy,
        seed=seed,
        routes=routes,
    )


class Engine(Protocol):
    """Samples answers from the current policy."""

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """One group for each prompt, in the order given.

        Every rank calls it with its own prompts, possibly none, and with the same settings; ranks
        of one tensor-, pipeline- or context-parallel group with the same prompts. Where experts or
        the context are split over ranks the call is collective.

        Raises:
            Stopped: a signal asked the run to stop; on all ranks.
        """
        ...

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """`generate`, begun: what is returned waits for the answers and gives them. Both are called
        as `generate` is. They are by the weights of now, whatever happens to those in between.
        """
        ...

    @property
    def version(self) -> int:
        """How often `weights_changed` was called; completions carry theirs."""
        ...

    def weights_changed(self) -> None:
        """The policy's weights are others than at the last call: answer with those from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """This rank's numbers since the last call, under names of observe/README.md."""
        ...

    def close(self) -> None:
        """Let go of everything the engine has started. It is not used afterwards."""
        ...


@dataclass(frozen=True)
class EngineParts:
    """What a run gives to the engine that it makes, on every rank."""

    config: Config
    chunks: Sequence[torch.nn.Module]  #: this rank's bare chunks, whose weights are the policy's
    groups: Groups
    stop_ids: Collection[int]  #: the tokens that end an answer
    decode: Callable[[Sequence[int]], str]  #: token ids to text, without special tokens
    #: of the chunks' routers; None: the run needs no routes
    capture: RouterCapture | None = None
    say: Callable[[str], None] = lambda text: None  #: tells a person what has gone wrong
    #: told how many of this rank's prompts are answered, of how many
    progress: Callable[[int, int], None] = lambda done, total: None
    #: the address of rank 0's machine at which ranks on others reach it; None: all are on one
    meeting: str | None = None
    #: whether this rank has heard that the run is to stop; an engine that looks raises `Stopped`
    stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.chunks[0].parameters()).device


class WholeAnswers:
    """`Engine` whose answers are there when `generate` returns. A class that derives from it
    writes `generate`, and what else it needs.
    """

    _version = 0

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`."""
        raise NotImplementedError

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """See `Engine`: the answers are made before it returns."""
        groups = self.generate(prompts, settings)
        return lambda: groups

    @property
    def version(self) -> int:
        """See `Engine`."""
        return self._version

    def weights_changed(self) -> None:
        """See `Engine`."""
        self._version += 1

    def metrics(self) -> dict[str, float]:
        """See `Engine`: none."""
        return {}

    def close(self) -> None:
        """See `Engine`: nothing has been started."""
