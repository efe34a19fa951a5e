"""What the loss sees of each token of a few samples, for people who read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.parallel.groups import Groups
from megatron_rl.policy.batch import PackTensors
from megatron_rl.records import Sample


@dataclass(frozen=True)
class _Place:
    key: int  #: of the sample
    start: int  #: position in the pack of the first token's prediction
    length: int


class TokenValues:
    """Ratio and gamma~ of the first tokens of a few samples, in the last update they were in.

    The ratio is exp(new - old log-probability), without gamma~. Values stay on the device until
    `gather`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._places: dict[int, list[_Place]] = {}  # by the identity of the pack
        self._lengths: dict[int, int] = {}  # by sample
        self._kept: dict[int, torch.Tensor] = {}

    def watch(
        self,
        samples: Sequence[Sample],
        packs: Sequence[PackTensors],
        wanted: Mapping[int, tuple[int, int]],
    ) -> None:
        """Keep values of these samples.

        Args:
            samples: of a mini-batch, whose ``packs`` these are.
            packs: as `pack_mini_batches` makes them.
            wanted: key of a sample -> its place among ``samples``, and the first of its tokens to
                keep a value of, from 1. Keys are unique over all calls.
        """
        found = {
            index: (pack, number) for pack in packs for number, index in enumerate(pack.members)
        }
        for key, (index, first) in wanted.items():
            pack, number = found[index]
            start = int((pack.sequence_ids == number).int().argmax())
            length = len(samples[index].tokens) - first
            self._lengths[key] = length
            # The position before a token predicts it.
            place = _Place(key, start + first - 1, length)
            self._places.setdefault(id(pack), []).append(place)

    def add(
        self,
        pack: PackTensors,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        gamma: torch.Tensor | None,
    ) -> None:
        """Keep what is wanted of a pack; all tensors [T]. gamma: None: the loss has none."""
        for place in self._places.get(id(pack), ()):
            here = slice(place.start, place.start + place.length)
            ratio = (logprobs[here].detach() - old_logprobs[here]).exp().float()
            nothing = torch.full_like(ratio, torch.nan)
            shift = nothing if gamma is None else gamma[here].detach().float()
            self._kept[place.key] = torch.stack([ratio, shift])

    def gather(self, groups: Groups) -> dict[int, np.ndarray]:
        """Values by sample, float32 [2, N]: ratio and gamma~, NaN where there is none. A collective
        over the pipeline's stages, of which the last has them.
        """
        if not self._lengths:
            return {}
        empty = {key: torch.zeros(2, n, device=self._device) for key, n in self._lengths.items()}
        mine = torch.cat([self._kept.get(key, zeros) for key, zeros in empty.items()], 1)
        values = all_reduce(mine, groups.pipeline).cpu().numpy()
        ends = np.cumsum(list(self._lengths.values()))
        return dict(zip(self._lengths, np.split(values, ends[:-1], axis=1), strict=True))
