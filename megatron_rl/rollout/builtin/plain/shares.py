"""Rows of a batch shared out to the threads of a CPU. Each decodes its own rows, so that threads
meet once a step; where all share every operation of a step, they meet hundreds of times.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, Sequence, TypeVar

import numpy as np
import torch

from megatron_rl.records import RoutedExperts
from megatron_rl.rollout.builtin.decoder import Decoder

#: Rows of a share, at least: of fewer, threads gain more by sharing the operations.
SHARE_ROWS = 64

T = TypeVar("T")


def shares_of(prompt_of: Sequence[int], lengths: np.ndarray, threads: int) -> list[np.ndarray]:
    """The rows of each share, int64; shares have nearly as many rows, and prompts as long.

    Args:
        prompt_of: of each row its prompt. Rows of a prompt stay together, but those of the prompts
            where the shares are cut.
        lengths: int64 [R], of the rows' prompts.
        threads: that compute; their number is a multiple of that of the shares.
    """
    fit = max(len(prompt_of) // SHARE_ROWS, 1)
    count = max(n for n in range(1, threads + 1) if threads % n == 0 and n <= fit)
    prompts = np.asarray(prompt_of, dtype=np.int64)
    by_length = np.lexsort((prompts, -lengths))
    prompts = prompts[by_length]
    place = np.cumsum(np.diff(prompts, prepend=prompts[:1]) != 0)  # of each row's prompt
    dealt = by_length[np.argsort(place % count, kind="stable")]
    return np.array_split(dealt, count)


class Shares:
    """`Decoder` of several, each with some of the rows and a thread of its own."""

    def __init__(self, decoders: Sequence[Decoder], rows: Sequence[np.ndarray]) -> None:
        """
        Args:
            decoders: of the shares, on a CPU.
            rows: int64, the rows of each in the batch.
        """
        self._decoders, self._rows = decoders, [torch.from_numpy(each) for each in rows]
        # Threads end with their executors.
        self._threads = [ThreadPoolExecutor(1, "rows") for _ in decoders]
        whole = torch.get_num_threads()
        # What a thread computes first gives it the number of all; to ask for it does, too.
        self._each(lambda _: torch.get_num_threads())
        self._each(lambda _: torch.set_num_threads(whole // len(decoders)))
        torch.set_num_threads(whole)  # of this thread, and of those that are begun later

    @property
    def tokens_out(self) -> torch.Tensor:  # noqa: D102
        return self._joined([decoder.tokens_out for decoder in self._decoders])

    @property
    def logprobs_out(self) -> torch.Tensor:  # noqa: D102
        return self._joined([decoder.logprobs_out for decoder in self._decoders])

    def begin(self) -> None:  # noqa: D102
        self._each(lambda decoder: decoder.begin())

    def advance(self) -> None:  # noqa: D102
        self._each(lambda decoder: decoder.advance())

    def unfinished(self) -> tuple[int, int]:  # noqa: D102
        count = sum(decoder.unfinished()[0] for decoder in self._decoders)
        return count, count

    def compact(self, unfinished: int) -> None:  # noqa: D102
        for decoder in self._decoders:
            decoder.compact(decoder.unfinished()[0])

    def routes(self, lengths: list[int]) -> list[RoutedExperts]:  # noqa: D102
        found: dict[int, RoutedExperts] = {}
        for decoder, rows in zip(self._decoders, self._rows):
            own = rows.tolist()
            found.update(zip(own, decoder.routes([lengths[row] for row in own]), strict=True))
        return [found[row] for row in range(len(lengths))]

    def _each(self, call: Callable[[Decoder], T]) -> list[T]:
        """Call it for every share, each in its thread, and wait for all."""
        pairs = zip(self._threads, self._decoders)
        calls = [thread.submit(call, decoder) for thread, decoder in pairs]
        wait(calls)
        return [each.result() for each in calls]

    def _joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(list(parts))
        return torch.empty_like(joined).index_copy_(0, torch.cat(self._rows), joined)
