"""Cases as parameters of a test, of which most are slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.support.layout_cases import Case


def parameters(cases: Iterable[Case], quick: Collection[str]) -> list[Any]:
    """The cases by name; those not named in ``quick`` are marked slow."""
    return [
        pytest.param(case, id=case.name, marks=() if case.name in quick else pytest.mark.slow)
        for case in cases
    ]
