"""Two rewards: one with settings, and an async one, like a judge in another process."""

import asyncio

from pydantic import Field

from megatron_rl.extend import Reward, Settings, verifier


class BrevitySettings(Settings):
    """Settings of the reward."""

    longest: int = Field(24, ge=1)
    """Length at which the reward is 0, characters."""


@verifier(settings=BrevitySettings)
def brevity(record: dict, completion: str, settings: BrevitySettings) -> Reward:
    """1 for an empty answer, falling to 0 at the longest."""
    value = max(0.0, 1.0 - len(completion) / settings.longest)
    return Reward(value, reason=f"{len(completion)} characters")


async def judge(record: dict, completion: str) -> Reward:
    """1 for an answer with a digit. In place of the sleep, call your server (httpx.AsyncClient)."""
    await asyncio.sleep(0.01)
    return Reward(float(any(letter.isdigit() for letter in completion)))
