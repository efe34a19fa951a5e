"""The first error of several calls."""

from concurrent.futures import Future

import pytest

from megatron_rl.errors import RunFailed, UserError
from megatron_rl.rollout.first_error import raise_first


def call(outcome=None):
    """A call that has returned a text, raised an error, or, with None, is not done."""
    future = Future()
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    elif outcome is not None:
        future.set_result(outcome)
    return future


def describe(number, error):
    return f"call {number} raised {error}"


def test_the_first_in_order_is_raised_with_its_number():
    error = KeyError("a")
    calls = [call("fine"), call(), call(error), call(ValueError("b"))]
    with pytest.raises(RunFailed, match="^call 2 raised KeyError 'a'$") as failure:
        raise_first(calls, describe)
    assert failure.value.__cause__ is error


@pytest.mark.parametrize("error", [UserError("no answer; expected one"), RunFailed("no sandbox")])
def test_our_own_errors_are_raised_as_they_are(error):
    with pytest.raises(type(error)) as failure:
        raise_first([call(error), call(ValueError("b"))], describe)
    assert failure.value is error


def test_without_an_error_nothing_is_raised():
    assert raise_first([call("fine"), call()], describe) is None
