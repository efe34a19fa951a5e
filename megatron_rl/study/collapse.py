"""Says whether a finished run has collapsed, by the rules of the study file."""

from __future__ import annotations

from megatron_rl.study.results import Curves
from megatron_rl.study.schema import Collapse
from megatron_rl.study.state import State
from megatron_rl.study.statistics import spikes, summary

#: Metrics whose missing number means that it was not finite.
_FINITE = ("loss", "grad_norm")


def collapse_of(curves: Curves, state: State, rules: Collapse, window: int) -> list[str]:
    """The reasons why a run counts as collapsed; none: it does not.

    Args:
        curves: of the run.
        state: how it ended.
        rules: of the study file.
        window: steps of a final and of a best value.
    """
    found = []
    if rules.not_finite and state.kind == "not finite":
        found.append(f"a number was not finite after step {state.step}")
    if rules.not_finite:
        for name in _FINITE:
            bad = curves.not_finite.get(name, ())
            if bad:
                found.append(f"{name} was not finite at step {bad[0]}")
    numbers = summary(*curves.series(rules.metric), window)
    if numbers is not None and numbers.final < rules.final_share * numbers.best:
        found.append(
            f"final {rules.metric} {numbers.final:.3g} is below {rules.final_share:g} x its best "
            f"{numbers.best:.3g}"
        )
    for name, limit, sign, word in (
        ("entropy", rules.entropy_below, -1, "below"),
        ("grad_norm", rules.grad_norm_above, 1, "above"),
    ):
        beyond = [
            (step, value)
            for step, value in zip(*curves.series(name))
            if limit is not None and sign * value > sign * limit
        ]
        if beyond:
            step, value = beyond[0]
            found.append(f"{name} {value:.3g} at step {step} is {word} {limit:g}")
    steps, norms = curves.series("grad_norm")
    places, most = spikes(norms), rules.grad_norm_spikes
    if most is not None and len(places) > most:
        found.append(
            f"grad_norm has {len(places)} spikes, more than {most}, the first at step "
            f"{steps[places[0]]}"
        )
    return found
