"""The numbers of rows and the lengths of the cache that a step is run with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Finished rows leave when at most this share of the rows still generates (not captured).
COMPACT_BELOW = 0.9

#: From so many positions on, a cache without gaps costs more copying than gaps would.
LONG = 256

#: Rows of similar length that read the cache together (not captured), at least.
PART_ROWS = 64


@dataclass(frozen=True)
class Buckets:
    """Rows and lengths are rounded up. With few buckets there are few CUDA graphs to capture; where
    a step is not captured, fine ones cost nothing.
    """

    captured: bool  #: steps are captured
    tight: bool = False  #: a cache has room for little more than a step reads
    room: int = 256  #: else, at first, for this many positions behind the prompts

    def rows(self, count: int, most: int) -> int:
        """The rows of a step in which ``count`` >= 1 still generate: captured, a power of two of at
        most ``most``.
        """
        if not self.captured or count == 0:
            return count
        return min(1 << (count - 1).bit_length(), most)

    def length(self, count: int, most: int) -> int:
        """The positions that are read where ``count`` are in use. CUDA kernels want multiples of 8;
        captured, there are at most four lengths between two powers of two, from 64 on.
        """
        unit = max(64, 1 << max(count.bit_length() - 3, 0)) if self.captured else 8
        return min(_up(count, unit), _up(most, 8))

    def parts(self, counts: np.ndarray, most: int) -> list[tuple[slice, int]]:
        """Consecutive rows, each part of which reads the cache up to its own longest row.

        Args:
            counts: int64 [R], positions in use.
            most: of them in the end, see `length`.

        Returns:
            Rows, and the positions that are read of them. They change with the rows only, not from
            one step to the next: neighbours are one part if their longest rows are equally long.
        """
        rows = len(counts)
        number = 1 if self.captured else min(max(rows // PART_ROWS, 1), 4)
        parts: list[tuple[slice, int]] = []
        for part in range(number):
            first, end = rows * part // number, rows * (part + 1) // number
            longest = int(counts[first:end].max())
            if parts and parts[-1][1] == longest:
                first = parts.pop()[0].start
            parts.append((slice(first, end), longest))
        return [(place, self.length(longest, most)) for place, longest in parts]

    def capacity(self, count: int, most: int) -> int:
        """The positions that a part of the cache should have where ``count`` are in use, but no
        more than ``most`` will be: half as many again or ``room`` more. Tight: as many as are read,
        from `LONG` on an eighth more at most.
        """
        if self.tight:
            unit = 8 if count < LONG else 1 << (count.bit_length() - 4)
            return min(_up(count, unit), _up(most, 8))
        return min(_up(count + max(self.room, count // 2), 64), _up(most, 8))

    def worth_moving(self, rows: int, unfinished: int) -> bool:
        """Whether rows should leave: captured, when a smaller bucket would do."""
        if self.captured:
            return self.rows(unfinished, rows) < self.rows(rows, rows)
        return unfinished <= COMPACT_BELOW * rows


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
