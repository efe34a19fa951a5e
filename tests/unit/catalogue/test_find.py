"""Things by name and by reference, and what is said of those that cannot be had."""

import math

import pytest

from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.find import code_digest, find, is_reference
from megatron_rl.catalogue.read import read_settings
from megatron_rl.errors import UserError

MINE = """
from pydantic import Field
from megatron_rl.extend import Reward, Settings, loss, verifier

class Mine(Settings):
    width: float = Field(0.5, gt=0.0)
    '''How wide, metres.'''
    names: list[str] = []
    '''Some names.'''

@verifier(settings=Mine, needs=("answer",))
def wide(record, completion, settings):
    '''As wide as it is.'''
    return Reward(settings.width * len(completion))

@verifier()
def narrow(record, completion, more):
    return Reward(0.0)

def plain(record, completion):
    return Reward(float(record["n"]))

class Empty:
    pass

@loss(denominator="tokens")
def a_loss(inputs):
    '''Nothing.'''

def bare_loss(inputs, settings):
    pass

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import math\n\nx = math.sqrt('a')\n")
    (tmp_path / "unreadable.py").write_text("def f(:\n")
    (tmp_path / "asks.py").write_text("import no_such_library\n")
    return tmp_path


def refusal(kind, name):
    with pytest.raises(UserError) as error:
        find(kind, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_of_ones_own(folder):
    row = find(kinds.VERIFIERS, "./mine.py:wide")
    assert (row.name, row.summary, row.needs) == (
        "./mine.py:wide",
        "As wide as it is.",
        ("answer",),
    )
    settings = read_settings("reward.settings", "it", row.settings, {"width": 2})
    assert row.bind(settings)({}, "abc").value == 6.0
    plain = find(kinds.VERIFIERS, f"{folder}/mine.py:plain")
    assert plain.settings is None and plain.bind(None)({"n": 7}, "").value == 7.0
    assert plain.load().__globals__ is row.load().__globals__  # the file is imported once


def test_variables_and_modules(folder, monkeypatch):
    monkeypatch.setenv("MY_FOLDER", str(folder))
    assert find(kinds.VERIFIERS, "${MY_FOLDER}/mine.py:wide").file == folder / "mine.py"
    (folder / "my_package_of_rewards").mkdir()
    (folder / "my_package_of_rewards" / "few.py").write_text(MINE)
    row = find(kinds.LOSSES, "my_package_of_rewards.few:a_loss")
    assert row.denominator == "tokens" and row.summary == "Nothing."


def test_the_code_is_known_by_its_content(folder):
    import hashlib

    row = find(kinds.VERIFIERS, "./mine.py:plain")
    assert code_digest(row) == hashlib.sha256(MINE.encode()).hexdigest()
    assert code_digest(find(kinds.VERIFIERS, "math")) is None


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (kinds.LOSSES, "rspoo", ["algorithm.name is 'rspoo' (did you mean rspo?)", "./my_file.py"]),
        (kinds.LOSSES, "./absent.py:x", ["absent.py is no file", "correct the path"]),
        (kinds.LOSSES, "./mine.py", ["expected the thing's name at the end: ./mine.py:thing"]),
        (kinds.LOSSES, "no_such_pkg.mod:x", ["no module 'no_such_pkg'", "./no_such_pkg/mod.py"]),
        (kinds.LOSSES, "./mine.py:a_los", ["mine.py has no a_los (did you mean a_loss?)"]),
        (kinds.LOSSES, "./mine.py:bare_loss", ["expected @loss(denominator='tokens')"]),
        (kinds.LOSSES, "./mine.py:wide", ["declared as another kind; expected a loss"]),
        (kinds.LOSSES, "./mine.py:NUMBER", ["of type int; expected a function: a loss"]),
        (kinds.VERIFIERS, "./mine.py:narrow", ["narrow(record, completion, more)", "expected nar"]),
        (kinds.VERIFIERS, "./mine.py:Empty", ["a class without __call__"]),
        (kinds.VERIFIERS, "./broken.py:x", ["raised TypeError", "broken.py:3)"]),
        (kinds.VERIFIERS, "./unreadable.py:x", ["raised SyntaxError", "unreadable.py:1)"]),
        (kinds.VERIFIERS, "./asks.py:x", ["ModuleNotFoundError", "no_such_library", "asks.py:1)"]),
        (kinds.VERIFIERS, "${NO_SUCH}/a.py:x", ["no variable 'NO_SUCH'"]),
    ],
)
def test_what_cannot_be_had_is_named_on_one_line(folder, kind, name, words):
    message = refusal(kind, name)
    assert message.startswith(kind.field)
    for word in words:
        assert word in message


def test_a_file_that_failed_is_tried_again_when_it_is_corrected(folder):
    assert "raised TypeError" in refusal(kinds.VERIFIERS, "./broken.py:f")
    (folder / "broken.py").write_text("def f(record, completion):\n    return 1\n")
    assert find(kinds.VERIFIERS, "./broken.py:f").bind(None)({}, "") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widht": 1}, "s.widht is no setting of it (did you mean width?); expected one of width,"),
        ({"width": -1}, "s.width is -1; expected a number, above 0 (How wide, metres)"),
        (
            {"width": "3e-4"},
            "s.width is '3e-4'; expected a number, above 0 (How wide, metres); ",
        ),
        ({"width": math.inf}, "s.width is inf; expected a finite number"),
        ({"names": ["a", 1]}, "s.names.1 is 1; it says: Input should be a valid string"),
        ({"names": "a"}, "s.names is a; expected a list of strings (Some names)"),
    ],
)
def test_settings_are_checked(folder, given, message):
    with pytest.raises(UserError) as error:
        read_settings("s", "it", find(kinds.VERIFIERS, "./mine.py:wide").settings, given)
    assert str(error.value).startswith(message)


def test_what_has_no_settings_takes_none():
    with pytest.raises(UserError, match="s.a is no setting of it; expected none: it has no"):
        read_settings("s", "it", None, {"a": 1})
    assert read_settings("s", "it", None, {}) is None


def test_references_are_told_by_their_form():
    assert [is_reference(name) for name in ("rspo", "a.b:c", "./a", "a.py")] == [False] + [True] * 3


def test_what_ones_own_raises_in_a_run_is_one_line(folder):
    (folder / "late.py").write_text("def late(rewards):\n    return rewards / 0\n")
    row = find(kinds.ADVANTAGES, "./late.py:late")
    with pytest.raises(UserError) as error:
        kinds.ADVANTAGES.bind(row, None)(1)
    assert str(error.value) == (
        "the advantage estimator './late.py:late' raised ZeroDivisionError division by zero "
        f"({folder / 'late.py'}:2); correct the advantage estimator"
    )
