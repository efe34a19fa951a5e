"""The configured verifiers, ready to call, and the weighted sum of their verdicts."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, Awaitable, Callable, Mapping, Sequence

from megatron_rl.catalogue.blame import blame, made
from megatron_rl.catalogue.entry import load_check
from megatron_rl.config.reward import ChosenVerifier, chosen_verifiers
from megatron_rl.config.schema_reward import RewardConfig
from megatron_rl.rewards.base import Reward, require

#: Default longest wait for a verdict of an ``async def``, seconds.
ASYNC_DEADLINE_S = 60.0


@dataclass(frozen=True, eq=False)
class Judge:
    """A verifier of a run, with its settings bound."""

    name: str  #: as configured, for messages
    label: str  #: for metrics
    weight: float
    verifier: Callable[[Mapping[str, Any], str], Reward | Awaitable[Reward]]
    at_once: int = 16  #: for an ``async def``: most answers at a time on a rank
    deadline_s: float | None = None  #: longest wait for a verdict, seconds; None: no limit

    @property
    def is_async(self) -> bool:
        """Whether a call gives an awaitable."""
        function = self.verifier
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            inspect.getattr_static(function, "__call__", None)  # for an object of a class
        )


def judges(reward: RewardConfig) -> tuple[Judge, ...]:
    """The judges of a configuration, each a row's function or a user's own.

    Raises:
        UserError: as `chosen_verifiers`; a user's class raises in its constructor.
    """
    return tuple(map(_judge, chosen_verifiers(reward)))


def record_check(reward: RewardConfig) -> Callable[[Mapping[str, Any]], None]:
    """A check that raises UserError for a record that lacks what a verifier needs; cheap, starts no
    process.
    """
    chosen = chosen_verifiers(reward)
    checks = [(one, load_check(one.row.check)) for one in chosen]

    def check(record: Mapping[str, Any]) -> None:
        for one, own_check in checks:
            for key in one.row.needs:
                require(record, key, one.row.name)
            if own_check is None:
                continue
            if one.row.own is None:
                own_check(record)
                continue
            with blame(f"the check of records of the verifier {one.row.name!r}", "correct it"):
                own_check(record)

    return check


def check_machine(reward: RewardConfig) -> dict[str, str]:
    """The verifiers' facts on this machine, for the run summary. Raises UserError if it lacks what
    a verifier needs.
    """
    facts: dict[str, str] = {}
    for one in chosen_verifiers(reward):
        check = load_check(one.row.machine_check)
        if check is not None:
            with blame(f"the machine check of the verifier {one.row.name!r}", "correct it"):
                found = check()
            if one.row.own is None:
                facts |= found
    return facts


def combine(judges: Sequence[Judge], verdicts: Sequence[Reward]) -> Reward:
    """The reward of one answer. One judge of weight 1: its verdict, unchanged.

    Several judges: the weighted sum of the values; the part LABEL is the value of each, LABEL_PART
    are its own parts. ``solved`` comes from the first judge that reports it; ``late`` is the share
    of late judges, if any has a deadline.
    """
    if len(judges) == 1 and judges[0].weight == 1.0:
        return verdicts[0]
    value, parts, reasons = 0.0, {}, []
    late = [verdict.parts["late"] for verdict in verdicts if "late" in verdict.parts]
    for judge, verdict in zip(judges, verdicts, strict=True):
        value += judge.weight * verdict.value
        parts[judge.label] = verdict.value
        if "solved" in verdict.parts:
            parts.setdefault("solved", verdict.parts["solved"])
        own = {name: part for name, part in verdict.parts.items() if name not in ("solved", "late")}
        parts |= {f"{judge.label}_{name}": part for name, part in own.items()}
        if verdict.reason:
            reasons.append(f"{judge.label}: {verdict.reason}")
    if late:
        parts["late"] = sum(late) / len(late)
    return Reward(value, parts, "; ".join(reasons)[:300])


def _judge(one: ChosenVerifier) -> Judge:
    row = one.row
    if inspect.isclass(row.own):
        own: Any = row.own
        verifier = _made(own, one.settings, row.name)
    elif one.settings is None:
        verifier = row.load()
    else:
        call = _call_async if inspect.iscoroutinefunction(row.load()) else _call
        verifier = functools.partial(call, row.load(), one.settings)
    judge = Judge(row.name, one.label, one.weight, verifier, one.at_once, one.deadline_s)
    if judge.is_async and judge.deadline_s is None:
        return replace(judge, deadline_s=ASYNC_DEADLINE_S)
    return judge


@functools.lru_cache(maxsize=64)
def _made(kind: type, settings: Any, name: str) -> Any:
    """One instance for training and evaluations, since it may hold a connection."""
    return made(f"the verifier {name!r}", kind, settings)


def _call(function: Callable[..., Reward], settings: Any, record: Any, completion: str) -> Reward:
    return function(record, completion, settings)


async def _call_async(
    function: Callable[..., Awaitable[Reward]], settings: Any, record: Any, completion: str
) -> Reward:
    return await function(record, completion, settings)
