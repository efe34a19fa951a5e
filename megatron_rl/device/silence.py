"""Who has given no sign of life for too long, worked out from signs and times alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Mapping

#: What a rank posts when it has ended as it should: nothing more is expected of it.
ENDED = "ended"
#: Not a rank: the store through which the signs go, which is on the machine of rank 0.
STORE = -1


@dataclass
class _Party:
    sign: str | None  #: the last one; None: there has been none
    awake_s: float = 0.0  #: time that the watcher was awake since then
    named: bool = False  #: it has been said that it is silent


class Silences:
    """Counts for how long each party's sign has stayed the same.

    A watcher that was itself stopped or starved has heard nobody: of a pause that is far longer
    than the one between two looks, no more than that is counted.
    """

    def __init__(self, parties: Iterable[int], limit_s: float, pause_s: float, now: float) -> None:
        """
        Args:
            parties: ranks, or STORE.
            limit_s: silence from which on a party is named, seconds.
            pause_s: usual time between two looks, seconds.
            now: monotonic clock, seconds.
        """
        self._parties = {party: _Party(None) for party in parties}
        self._limit_s, self._most_s, self._last = limit_s, 2.0 * pause_s, now

    def look(self, now: float, signs: Mapping[int, str | None]) -> tuple[list[int], list[int]]:
        """Note the signs as they are now.

        Args:
            signs: of the parties that could be asked; None: it has given none yet. The silence of
                others is not counted.

        Returns:
            Parties that have been silent for limit_s since the last look, and parties that had been
            named and are heard again.
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
        """Whether one of them has been named and not been heard since."""
        return any(self._parties[p].named for p in parties if p in self._parties)

    def sign(self, party: int) -> str | None:
        """The last sign of a party."""
        return self._parties[party].sign
