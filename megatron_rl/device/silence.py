"""Finds who has given no sign of life for too long, from signs and times alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping

#: A rank posts this when it has ended well: no more signs are expected.
ENDED = "ended"
#: Not a rank: the store that passes on the signs, on the machine of rank 0.
STORE = -1


@dataclass
class _Party:
    sign: str | None  #: the last sign; None: there was none
    awake_s: float = 0.0  #: seconds since then that the watcher was awake
    named: bool = False  #: it was named as silent


class Silences:
    """Counts for how long each party's sign has stayed the same.

    A watcher that was itself stopped or starved heard nobody. So if the time since the last look is
    far longer than the usual pause, only the usual pause counts.
    """

    def __init__(self, parties: Iterable[int], limit_s: float, pause_s: float, now: float) -> None:
        """
        Args:
            parties: ranks and STORE.
            limit_s: silence after which a party is named, seconds.
            pause_s: usual time between two looks, seconds.
            now: monotonic clock, seconds.
        """
        self._parties = {party: _Party(None) for party in parties}
        self._limit_s, self._most_s, self._last = limit_s, 2.0 * pause_s, now

    def look(self, now: float, signs: Mapping[int, str | None]) -> tuple[list[int], list[int]]:
        """Record the present signs.

        Args:
            signs: of the parties that could be asked; None: no sign yet. The silence of others does
                not grow.

        Returns:
            Parties that newly reached limit_s, and named parties that are heard again.
        """
        passed, self._last = min(now - self._last, self._most_s), now
        silent, again = [], []
        for number, party in self._parties.items():
            if number not in signs:
                continue
            if signs[number] != party.sign or party.sign == ENDED:
                if party.named:
                    again.append(number)
                self._parties[number] = _Party(signs[number])
                continue
            party.awake_s += passed
            if party.awake_s >= self._limit_s and not party.named:
                party.named = True
                silent.append(number)
        return silent, again

    def any_silent(self, parties: Iterable[int]) -> bool:
        """Whether a party was named and has not been heard since."""
        return any(self._parties[p].named for p in parties if p in self._parties)

    def sign(self, party: int) -> str | None:
        """The last sign of a party."""
        return self._parties[party].sign
