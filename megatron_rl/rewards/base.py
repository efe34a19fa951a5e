"""The interface of a verifier: a function from a prompt's record and a completion to a reward."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping, Protocol

from megatron_rl.config.reward import PART, TAKEN
from megatron_rl.errors import RunFailed, UserError, printable
from megatron_rl.files import reason as reason_of


@dataclass(frozen=True)
class Reward:
    """The verdict on one completion.

    Every verifier of this package fills two parts, each 0.0 or 1.0: ``solved`` (the answer is
    right) and ``well_formed`` (an answer could be read at all). Other verifiers may omit them and
    fill their own parts. ValueError: a number is not finite, or a part has an invalid name.
    """

    value: float  #: what the policy is trained on
    #: named components, averaged in the metrics reward/NAME and eval/NAME; a name is of lower-case
    #: letters, digits and underscores
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""  #: a short explanation, at most a few hundred characters

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"reward {self.value}; expected a finite number")
        for name, value in self.parts.items():
            if not PART.fullmatch(name) or name in TAKEN:
                raise ValueError(
                    f"part {name!r} of a reward; expected lower-case letters, digits and "
                    f"underscores, and none of {', '.join(sorted(TAKEN))}"
                )
            if not math.isfinite(value):
                raise ValueError(f"part {name!r} of a reward is {value}; expected a finite number")


class Verifier(Protocol):
    """Judges a completion; safe to call from several threads, and never raises on a completion.

    It bounds its own time, preferably processor time: a busy machine must not change a reward.
    A call computes in its thread or in one process at a time. It raises ``UserError`` only if the
    record or the machine lacks what it needs.
    """

    def __call__(self, record: Mapping[str, Any], completion: str) -> Reward: ...


def make_reward(
    solved: bool, well_formed: bool, reason: str, well_formed_value: float = 0.0
) -> Reward:
    """1 if solved, else ``well_formed_value`` if well formed, else 0; with both parts filled."""
    value = 1.0 if solved else well_formed_value if well_formed else 0.0
    return Reward(value, {"solved": float(solved), "well_formed": float(well_formed)}, reason)


def require(record: Mapping[str, Any], key: str, verifier: str) -> Any:
    """``record[key]``; if it is missing, a ``UserError`` with the keys found."""
    if key not in record:
        found = ", ".join(sorted(map(str, record))) or "no keys"
        raise UserError(
            f"record with {printable(found)}; the verifier {verifier!r} expects {key!r}; "
            f"add {key!r} to every line of the data set or set reward.name to another verifier"
        )
    return record[key]


def prompt_texts(value: Any) -> list[str]:
    """The texts of a prompt: text, or chat messages."""
    if isinstance(value, str):
        return [value]
    messages = value if isinstance(value, list) else []
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return [text for text in contents if isinstance(text, str)]


@contextlib.contextmanager
def started(what: str) -> Iterator[None]:
    """A context in which an OSError (a full disk, too many files or processes) becomes `RunFailed`:
    it is the machine's fault, not the answer's or the verifier's.
    """
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{what} could not be started ({reason_of(error)}); expected room for temporary files, "
            "and processes and open files left; mend it and run the same command to continue"
        ) from error
