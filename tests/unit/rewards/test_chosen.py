"""The verifiers of a configuration: their settings, several of them, and what is refused."""

import pytest

from megatron_rl.config.reward import reward_text
from megatron_rl.config.schema_reward import RewardConfig
from megatron_rl.errors import UserError
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge, check_machine, combine, judges, record_check
from tests.support.runs import ROOT

EXTEND = ROOT / "examples" / "extend"
RECORD = {"numbers": [1, 2], "target": 3}


def of(**reward):
    return judges(RewardConfig.model_validate(reward))


def test_settings_of_a_verifier():
    (plain,), (changed,) = of(), of(settings={"well_formed": 0.4})
    assert plain.verifier(RECORD, "2-1").value == 0.1
    assert changed.verifier(RECORD, "2-1").value == 0.4
    assert changed.verifier(RECORD, "1+2").value == 1.0


def test_one_verdict_stays_as_it_is():
    verdict = Reward(0.25, {"solved": 1.0, "other": 2.0}, "why")
    assert combine([Judge("a", "a", 1.0, None)], [verdict]) is verdict


def test_several_are_a_weighted_sum_and_shown_apart():
    found = of(
        parts=[
            {"name": "countdown", "label": "right", "weight": 2.0},
            {"name": f"{EXTEND}/my_reward.py:brevity", "weight": -0.5, "settings": {"longest": 10}},
        ]
    )
    verdicts = [judge.verifier(RECORD, "1+2") for judge in found]
    reward = combine(found, verdicts)
    assert reward.value == pytest.approx(2.0 * 1.0 - 0.5 * 0.7)
    assert reward.parts == {
        "right": 1.0,
        "solved": 1.0,
        "right_well_formed": 1.0,
        "brevity": pytest.approx(0.7),
    }
    assert reward.reason == "right: solved; brevity: 3 characters"


def test_lateness_of_several_is_their_share():
    pair = [Judge("a", "a", 1.0, None), Judge("b", "b", 1.0, None)]
    verdicts = [Reward(0.0, {"late": 1.0}), Reward(1.0, {"late": 0.0, "x": 3.0})]
    assert combine(pair, verdicts).parts == {"a": 0.0, "b": 1.0, "b_x": 3.0, "late": 0.5}


def test_an_async_def_has_a_deadline():
    (judge,) = of(name=f"{EXTEND}/my_reward.py:judge", at_once=3)
    assert judge.is_async and (judge.at_once, judge.deadline_s) == (3, 60.0)
    (judge,) = of(name=f"{EXTEND}/my_reward.py:judge", deadline_s=2)
    assert judge.deadline_s == 2.0
    (judge,) = of()
    assert not judge.is_async and judge.deadline_s is None


CLASSES = """
from megatron_rl.extend import Reward, Settings, UserError, verifier

class Url(Settings):
    url: str
    '''Where the judge is.'''

def has_three(record):
    if record["n"] != 3:
        raise UserError("n is not 3")

@verifier(settings=Url, needs=("n",), check=has_three)
class Remote:
    made = 0

    def __init__(self, settings):
        self.url = settings.url
        Remote.made += 1

    async def __call__(self, record, completion):
        return Reward(0.0)

@verifier(machine_check=lambda: 1 / 0)
def here(record, completion):
    return Reward(0.0)
"""


def test_a_class_is_made_once_and_its_records_are_checked(tmp_path):
    (tmp_path / "remote.py").write_text(CLASSES)
    reward = {"name": f"{tmp_path}/remote.py:Remote", "settings": {"url": "http://a"}}
    (one,), (two,) = of(**reward), of(**reward)
    assert one.verifier is two.verifier and one.verifier.url == "http://a" and one.is_async
    assert type(one.verifier).made == 1
    check = record_check(RewardConfig(**reward))
    check({"n": 3})
    with pytest.raises(UserError, match="n is not 3"):
        check({"n": 4})
    with pytest.raises(UserError, match="expects 'n'"):
        check({})
    with pytest.raises(UserError, match="settings.url is not given; .* expects a string .Where"):
        of(name=reward["name"])
    with pytest.raises(UserError, match=r"machine check .* raised ZeroDivisionError .*py:23"):
        check_machine(RewardConfig(name=f"{tmp_path}/remote.py:here"))


def test_what_a_verifier_says_of_the_machine_is_a_fact(monkeypatch):
    fact = {"sandbox": "seccomp"}
    monkeypatch.setattr("megatron_rl.rewards.check_sandbox", lambda: fact)
    assert check_machine(RewardConfig()) == {}
    assert check_machine(RewardConfig(name="code")) == fact
    assert check_machine(RewardConfig(parts=[{"name": "countdown"}, {"name": "code"}])) == fact


def test_records_of_several_are_checked_by_each():
    check = record_check(RewardConfig(parts=[{"name": "countdown"}, {"name": "math"}]))
    check({**RECORD, "answer": "3"})
    with pytest.raises(UserError, match="the verifier 'math' expects 'answer'"):
        check(RECORD)
    with pytest.raises(UserError, match="the verifier 'countdown' expects 'numbers'"):
        check({"answer": "3"})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"settings": {"wel": 1}}, "reward.settings.wel is no setting of the verifier countdown"),
        ({"settings": {"well_formed": 2}}, "reward.settings.well_formed is 2; expected a number,"),
        ({"name": "math", "settings": {"a": 1}}, "reward.settings.a is no setting of the verifier"),
        ({"name": "math", "parts": [{"name": "code"}]}, "reward.name is math beside reward.parts"),
        ({"parts": [{"name": "maths"}]}, "reward.parts.0.name is 'maths' (did you mean math?)"),
        (
            {"parts": [{"name": "math"}, {"name": "math"}]},
            "reward.parts.1 is called 'math' as another is; expected a name of its own",
        ),
        ({"parts": [{"name": "math", "label": "mean"}]}, "reward.parts.0 is called 'mean'; exp"),
    ],
)
def test_mistakes_are_named(reward, message):
    with pytest.raises(UserError) as error:
        of(**reward)
    assert str(error.value).startswith(message)


def test_for_people():
    assert reward_text(RewardConfig()) == "countdown"
    parts = [{"name": "math"}, {"name": "code", "label": "c", "weight": 0.5}]
    assert reward_text(RewardConfig(parts=parts)) == "1 x math + 0.5 x c"
