"""An environment: repeats the problem after a wrong answer."""

from pydantic import Field

from megatron_rl.extend import Settings, environment
from megatron_rl.rewards.countdown import verify_countdown


class AgainSettings(Settings):
    """Settings of the environment."""

    word: str = Field("", max_length=20)
    """Text before the problem."""


@environment(settings=AgainSettings)
def ask_again(record: dict, turns: tuple[str, ...], settings: AgainSettings) -> str | None:
    """Repeat the problem until the last answer is right."""
    if verify_countdown(record, turns[-1]).parts["solved"]:
        return None
    numbers = " ".join(str(number) for number in record["numbers"])
    return f"{settings.word}{numbers}={record['target']}:"
