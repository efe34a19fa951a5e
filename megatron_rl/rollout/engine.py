"""What a rollout engine is: prompts in, groups of completions with log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.records import Prompt, RolloutGroup


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
