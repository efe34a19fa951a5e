"""A step's sums on one rank, which one pair of all-reduces turns into the step's metrics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_rl.observe.metric_table import (
    METRICS,
    Metric,
    fixed_metric,
    layer_name,
    metric,
    reduced_names,
)

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    Number = float | int | torch.Tensor

__all__ = ["METRICS", "Metric", "MetricSums", "layer_name", "metric", "reduced_names"]


class MetricSums:
    """The running sums of one step on one rank.

    Values may be 0-d tensors: nothing is read back to the host before ``reduce``. The vectors
    that travel have a slot for every name of the table and every part of the reward that any rank
    has. So ranks need not add the same names (pipeline stages add their own layers).
    """

    def __init__(self, num_layers: int = 0, device: torch.device | str = "cpu") -> None:
        """num_layers: transformer layers over all stages, the same on every rank; device: where the
        values are and the all-reduce runs (CUDA for NCCL)."""
        self._names = reduced_names(num_layers)
        self._allowed = frozenset(self._names)
        self._device = device
        self._sums: dict[str, Number] = {}
        self._counts: dict[str, Number] = {}
        self._parts: set[str] = set()  # of this rank: names that a verifier or a loss has given
        self._tops: dict[str, Number] = {}  # running maximum; of the negated value for "min"

    def add(self, name: str, value: Number, count: Number = 1.0) -> None:
        """Add to a metric: ``value`` is the sum over ``count`` things for mean and sum, the
        extreme among them for max and min (left out when count is 0). ValueError: a name that is
        not in the table or is not added but given."""
        row = fixed_metric(name)
        if name not in self._allowed:
            raise ValueError(
                f"metric {name!r} cannot be added; {self._why_not(row)} "
                "(table METRICS in megatron_rl/observe/metric_table.py)"
            )
        self._add(row, name, value, count)

    def add_parts(self, base: str, parts: Mapping[str, tuple[Number, Number]]) -> None:
        """Add parts of the reward, name -> (sum, count), to ``base``/name; base: reward or eval.
        Ranks need not have the same ones."""
        for part, (value, count) in parts.items():
            name = f"{base}/{part}"
            if name not in self._allowed:
                self._parts.add(name)
            self._add(metric(name), name, value, count)

    def _add(self, row: Metric, name: str, value: Number, count: Number) -> None:
        value, count = self._as_number(name, value), self._as_number(name, count)
        self._counts[name] = self._counts.get(name, 0.0) + count
        if row.reduction in ("mean", "sum"):
            self._sums[name] = self._sums.get(name, 0.0) + value
        else:
            self._add_extreme(name, value if row.reduction == "max" else -value, count)

    def add_all(self, metrics: Mapping[str, tuple[Number, Number]]) -> None:
        """``add`` for every name -> (value, count)."""
        for name, (value, count) in metrics.items():
            self.add(name, value, count)

    def add_each(self, metrics: Mapping[str, Number]) -> None:
        """``add`` for every name -> value, each of one thing."""
        for name, value in metrics.items():
            self.add(name, value)

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """The metrics over all ranks of ``group``: two all-reduces MAX, one SUM; an exchange of the
        names of reward parts where ranks have others.

        None, or torch.distributed not initialised: this process alone. Names no rank added are
        absent; a mean (or extreme) over a count of 0 is NaN. Ranks that hold the same tokens
        (tensor parallel) may all add means, max and min, but a sum must be added by one of them.
        Reads only: the sums stay as they are.
        """
        import torch
        import torch.distributed as dist

        among = group if dist.is_available() and dist.is_initialized() else None
        names = self._names + self._parts_of_all(among)
        present: list[Number] = [float(name in self._counts) for name in names]
        columns = [self._sums.get(name, 0.0) for name in names]
        columns += [self._counts.get(name, 0.0) for name in names]
        sums = self._pack(columns + present)
        tops = self._pack([self._tops.get(name, -math.inf) for name in names])
        # A maximum loses NaN on some backends; a sum carries it.
        sums[: len(names)] += torch.where(tops.isnan(), tops, torch.zeros_like(tops))
        if among is not None:
            dist.all_reduce(tops, op=dist.ReduceOp.MAX, group=among)
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=among)
        return self._unpack(names, torch.cat([sums, tops]).tolist())

    def _parts_of_all(self, group: dist.ProcessGroup | None) -> tuple[str, ...]:
        """Parts that any rank has, in the same order on all."""
        mine = tuple(sorted(self._parts))
        if group is None or group.size() == 1:
            return mine
        import torch
        import torch.distributed as dist

        from megatron_rl.parallel.collectives import all_reduce, gather_objects

        # Nearly always all ranks have the same ones: a number tells, and is sent faster than names.
        mark = int.from_bytes(hashlib.sha256("\n".join(mine).encode()).digest()[:7], "big")
        ends = torch.tensor([mark, -mark], device=self._device)
        largest, negated = all_reduce(ends, group, dist.ReduceOp.MAX).tolist()
        if largest == -negated:
            return mine
        return tuple(sorted(set().union(*gather_objects(self._parts, group))))

    def _add_extreme(self, name: str, value: Number, count: Number) -> None:
        import torch

        current = self._tops.get(name, -math.inf)
        if all(isinstance(number, float) for number in (value, count, current)):
            if count > 0:
                nan = math.isnan(value) or math.isnan(current)
                self._tops[name] = math.nan if nan else max(value, current)
            return
        value, count, current = (
            number
            if isinstance(number, torch.Tensor)
            # filled on the device: a copy from the host would wait for it
            else torch.full((), number, dtype=torch.float64, device=self._device)
            for number in (value, count, current)
        )
        self._tops[name] = torch.where(count > 0, torch.maximum(value, current), current)

    def _pack(self, numbers: Sequence[Number]) -> torch.Tensor:
        """float64 vector on the device; floats cross in one copy, tensors are stacked without a
        host read."""
        import torch

        tensors = {i: n for i, n in enumerate(numbers) if isinstance(n, torch.Tensor)}
        floats = [0.0 if i in tensors else n for i, n in enumerate(numbers)]
        packed = torch.tensor(floats, dtype=torch.float64, device=self._device)
        if tensors:
            index = torch.tensor(list(tensors), device=self._device)
            packed[index] = torch.stack(list(tensors.values()))
        return packed

    @staticmethod
    def _unpack(names: Sequence[str], numbers: list[float]) -> dict[str, float]:
        size = len(names)
        sums, counts, present, tops = (numbers[i * size : (i + 1) * size] for i in range(4))
        result = {}
        for i, name in enumerate(names):
            if not present[i]:
                continue
            reduction = metric(name).reduction
            if reduction == "sum":
                result[name] = sums[i]
            elif counts[i] == 0 or math.isnan(sums[i]):
                result[name] = math.nan
            elif reduction == "mean":
                result[name] = sums[i] / counts[i]
            else:
                result[name] = tops[i] if reduction == "max" else -tops[i]
        return result

    @staticmethod
    def _why_not(row: Metric) -> str:
        if row.reduction == "given":
            return "it is set once, after the reduction"
        return "its layer is not below the num_layers given to MetricSums"

    def _as_number(self, name: str, value: Number) -> Number:
        """A float, or a detached 0-d float64 tensor on the device. ValueError: not 0-d."""
        import torch

        if not isinstance(value, torch.Tensor):
            return float(value)
        if value.dim() != 0:
            raise ValueError(
                f"metric {name!r} got shape {tuple(value.shape)}; expected a 0-d tensor or a float"
            )
        return value.detach().to(device=self._device, dtype=torch.float64)
