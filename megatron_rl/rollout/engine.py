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
    temperature: float = 1.0  #: > 0; log-probabilities are those at it, also with greedy
    top_p: float = 1.0  #: nucleus, in (0, 1]; 1: off
    top_k: int = 0  #: sample from the k likeliest tokens; 0: off
    greedy: bool = False  #: take the likeliest token; top_p and top_k have no effect
    #: an answer's random numbers follow from it, the prompt's index and the answer's number
    seed: int = 0
    routes: bool = False  #: completions carry the experts of their tokens
    router_logprobs: bool = False  #: with the routers' log-probabilities, where an engine has them
    #: completions carry the tokens that top-p and top-k kept, and log-probabilities over these
    kept: bool = False

    @property
    def keeps(self) -> bool:
        """Whether answers have kept tokens: greedy ones have none."""
        return self.kept and not self.greedy


def sampling_settings(
    rollout: RolloutConfig,
    *,
    samples: int,
    greedy: bool,
    seed: int,
    routes: bool = False,
    router_logprobs: bool = False,
    kept: bool = False,
) -> SamplingSettings:
    """The configuration's settings.

    Args:
        rollout: section ``rollout`` of the configuration.
        samples: answers to each prompt.
        greedy, seed, routes, router_logprobs, kept: see `SamplingSettings`.
    """
    return SamplingSettings(
        samples=samples,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        greedy=greedy,
        seed=seed,
        routes=routes,
        router_logprobs=router_logprobs,
        kept=kept,
    )


class Engine(Protocol):
    """Samples answers from the current policy."""

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """Sample answers; one group for each prompt, in the order given.

        All ranks call it with the same settings. Each passes its own prompts, possibly none. Ranks
        of one tensor-, pipeline- or context-parallel group pass the same prompts. The call is a
        collective if ranks split the experts or the context.

        Raises:
            Stopped: a signal asked the run to stop; on all ranks.
        """
        ...

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """Begin to sample answers with the present weights, also if the weights change meanwhile.

        Returns:
            A function that waits for the answers and returns them, as `generate` does. All ranks
            call it as they call `generate`.
        """
        ...

    @property
    def version(self) -> int:
        """How often `weights_changed` was called. Completions carry the version that sampled
        them.
        """
        ...

    def weights_changed(self) -> None:
        """Sample with the policy's new weights from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """This rank's metrics since the last call; observe/README.md lists their names."""
        ...

    def close(self) -> None:
        """Release what the engine has started. It is not used afterwards."""
        ...


@dataclass(frozen=True)
class EngineParts:
    """What a run gives to its engine, on every rank."""

    config: Config
    chunks: Sequence[torch.nn.Module]  #: this rank's chunks of the policy's model
    groups: Groups
    stop_ids: Collection[int]  #: the tokens that end an answer
    decode: Callable[[Sequence[int]], str]  #: token ids to text, without special tokens
    capture: RouterCapture | None = None  #: of the chunks' routers; None: no routes are needed
    warn: Callable[[str], None] = lambda text: None  #: shows the user a line
    #: gets how many of this rank's prompts are answered, and how many there are
    progress: Callable[[int, int], None] = lambda done, total: None
    #: rank 0's address, at which ranks on other machines reach it; None: all are on one machine
    meeting: str | None = None
    #: whether this rank has heard that the run is to stop; the engine then raises `Stopped`
    stop: Callable[[], bool] = lambda: False

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.chunks[0].parameters()).device

    @property
    def say(self) -> Callable[[str], None]:
        """The former name of ``warn``, for engines of users that still read it."""
        return self.warn


class WholeAnswers:
    """Base of engines that sample nothing in the background. A derived class writes `generate`."""

    _version = 0

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`."""
        raise NotImplementedError

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """See `Engine`. The answers are complete when it returns."""
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
        """See `Engine`. No metrics."""
        return {}

    def close(self) -> None:
        """See `Engine`. There is nothing to release."""
