"""A data source: made-up problems; yours could come from a database."""

import random
from typing import Any, Iterator

from pydantic import Field

from megatron_rl.extend import Settings, source


class SumsSettings(Settings):
    """Number and seed of the problems."""

    count: int = Field(200, ge=1)
    """Problems."""
    largest: int = Field(20, ge=1)
    """Largest number in a problem."""
    seed: int = 1
    """Seed of the problems; every rank and every run must get the same ones."""


@source(settings=SumsSettings)
def sums(settings: SumsSettings) -> Iterator[dict[str, Any]]:
    """Countdown problems of two numbers, whose target is their sum."""
    draw = random.Random(settings.seed)
    for _ in range(settings.count):
        numbers = [draw.randint(1, settings.largest) for _ in range(2)]
        yield {
            "first": numbers[0],
            "second": numbers[1],
            "numbers": numbers,
            "target": sum(numbers),
        }
