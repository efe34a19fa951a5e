"""A user's own rollout engine: found by reference, checked, and named in errors."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import ENGINES
from megatron_rl.config.load import load_config
from megatron_rl.config.rollout import engine_of, engine_settings
from megatron_rl.config.schema_rollout import RolloutConfig
from megatron_rl.errors import Stopped, UserError
from megatron_rl.extend import Settings, engine
from megatron_rl.records import Completion, KeptTokens, Prompt, RolloutGroup
from megatron_rl.rollout.engine import EngineParts, SamplingSettings, WholeAnswers
from megatron_rl.rollout.own_engine import own_engine

PROMPTS = [Prompt(number, np.arange(2, 2 + number, dtype=np.int64), "", {}) for number in (3, 1)]
SETTINGS = SamplingSettings(samples=2, max_new_tokens=3)
GOOD = Completion(np.array([5, 6, 1]), np.array([-0.5, -1.0, -2.0], dtype=np.float32), True, "5 6")


class Fixed(WholeAnswers):
    """An engine with one answer to everything."""

    answer = GOOD

    def __init__(self, parts):
        self.parts = parts

    def generate(self, prompts, settings):
        answers = (self.answer,) * settings.samples
        return [RolloutGroup(prompt, answers) for prompt in prompts]


class SpeedSettings(Settings):
    """Settings of `tuned`."""

    speed: int = 3
    """Answers a second."""


@engine(settings=SpeedSettings, beside_training=True, routes=True)
def tuned(parts, settings):
    """An engine with a setting."""
    made = Fixed(parts)
    made.metrics = lambda: {"rollout/speed": float(settings.speed)}
    return made


def no_engine(parts):
    """Not an engine."""
    return "engine"


class Half:
    """An engine that cannot begin."""

    def __init__(self, parts):
        pass

    def generate(self, prompts, settings):
        """See `Engine`."""


#: The groups of one rank.
GROUPS = SimpleNamespace(world=SimpleNamespace(size=lambda: 1, rank=lambda: 0))


def built(name, monkeypatch, **attributes):
    """The engine of a run."""
    for key, value in attributes.items():
        monkeypatch.setattr(Fixed, key, value)
    argv = [f"--rollout.engine={__name__}:{name}", "--model.preset=tiny_moe"]
    argv += ["--model.vocab_size=64", "--model.max_sequence_length=64"]
    config = load_config(None, argv)
    row, settings = engine_of(config.rollout), engine_settings(config.rollout)
    return own_engine(row, row.bind(settings), EngineParts(config, (), GROUPS, (1,), str))


def test_it_is_asked_as_any_other(monkeypatch):
    made = built("Fixed", monkeypatch)
    groups = made.begin(PROMPTS, SETTINGS)()
    assert [group.prompt for group in groups] == PROMPTS
    assert all(group.completions == (GOOD, GOOD) for group in groups)
    assert made.version == 0 and made.metrics() == {}
    made.weights_changed()
    assert made.version == 1
    made.close()


def test_its_settings_and_traits_count(monkeypatch):
    made = built("tuned", monkeypatch)
    assert made.metrics() == {"rollout/speed": 3.0}
    row = find(ENGINES, f"{__name__}:tuned")
    assert row.beside_training and row.routes and not row.servers and not row.broadcast
    with pytest.raises(UserError, match="rollout.settings.sped is no setting of the rollout engi"):
        engine_settings(RolloutConfig(engine=f"{__name__}:tuned", settings={"sped": 1}))


def test_parts_have_the_former_name_of_warn_too():
    told = []
    parts = EngineParts(load_config(None, []), (), GROUPS, (1,), str, warn=told.append)
    parts.say("a server is gone")
    parts.warn("another")
    assert told == ["a server is gone", "another"]


def raising(self, prompts, settings):
    raise ZeroDivisionError("no tokens")


def told_to_stop(self, prompts, settings):
    raise Stopped


def swapped(self, prompts, settings):
    return [RolloutGroup(prompt, (GOOD, GOOD)) for prompt in reversed(prompts)]


def one_answer(self, prompts, settings):
    return [RolloutGroup(prompt, (GOOD,)) for prompt in prompts]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"generate": raising}, "raised ZeroDivisionError no tokens (" + __file__),
        ({"generate": swapped}, "gives 2 groups for 2 prompts, or others than these; expected a"),
        ({"generate": one_answer}, "gives for problem 3 (from 0) 1 answers; expected 2; correct"),
        (
            {"answer": replace(GOOD, tokens=[5, 6, 1])},
            "gives for problem 3 (from 0) tokens of list; expected one dimension of int64",
        ),
        (
            {"answer": replace(GOOD, logprobs=GOOD.logprobs.astype(np.float64))},
            "logprobs of float64; expected one dimension of float32",
        ),
        ({"answer": replace(GOOD, tokens=np.array([5, 64, 1]))}, "token 64; expected ids below 64"),
        ({"answer": replace(GOOD, logprobs=GOOD.logprobs[:2])}, "2 log-probabilities for 3 tokens"),
        (
            {"answer": replace(GOOD, logprobs=-GOOD.logprobs)},
            "log-probability 0.5; expected finite",
        ),
        ({"answer": replace(GOOD, finished=False, tokens=np.array([5, 1, 6]))}, "runs on behind"),
        (
            {
                "answer": Completion(
                    np.array([5, 6]), np.array([-1, -1], dtype=np.float32), False, ""
                )
            },
            "ends after 2 tokens without a stop token; expected 3, or one of 1",
        ),
    ],
)
def test_what_is_wrong_with_it_is_one_line(monkeypatch, attributes, words):
    made = built("Fixed", monkeypatch, **attributes)
    with pytest.raises(UserError) as error:
        made.generate(PROMPTS, SETTINGS)
    text = str(error.value)
    assert text.startswith(f"the rollout engine '{__name__}:Fixed' ") and words in text
    assert "\n" not in text


def test_experts_that_are_asked_for_have_to_be_there(monkeypatch):
    made = built("Fixed", monkeypatch)
    with pytest.raises(UserError, match="no experts of its tokens, which algorithm.routing_replay"):
        made.generate(PROMPTS, replace(SETTINGS, routes=True))


def test_kept_tokens_that_are_asked_for_have_to_be_there(monkeypatch):
    wanted = replace(SETTINGS, top_k=4, kept=True)
    sets = KeptTokens.of_sizes(np.array([5, 9, 6, 1]), np.array([2, 1, 1]))
    made = built("Fixed", monkeypatch, answer=replace(GOOD, kept=sets))
    assert made.generate(PROMPTS, wanted)[0].completions[0].kept is sets
    for kept, words in ((None, "no sets of kept tokens"), ([[5]], "kept of list; expected Kept")):
        made = built("Fixed", monkeypatch, answer=replace(GOOD, kept=kept))
        with pytest.raises(UserError, match=words):
            made.generate(PROMPTS, wanted)


def test_a_run_that_is_to_stop_is_no_mistake_of_the_engine(monkeypatch):
    made = built("Fixed", monkeypatch, generate=told_to_stop)
    with pytest.raises(Stopped):
        made.generate(PROMPTS, SETTINGS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_engine", "makes a str without generate; expected generate, begin, weights_changed"),
        ("Half", ":Half', a class without begin; expected a rollout engine, with generate, begin"),
        ("GOOD", "which is of type Completion; expected a function: a rollout engine"),
    ],
)
def test_what_is_no_engine_is_refused(monkeypatch, name, words):
    with pytest.raises(UserError) as error:
        built(name, monkeypatch)
    assert words in str(error.value)
