import logging
import warnings

import pytest

from megatron_rl.device.quiet import silence

OF_MEGATRON = (
    "MimoModelConfig is experimental and still under active development. The API may change",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load "
    "in a single process.",
)


def heard(kind, messages):
    """Which of these warnings a user would see."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence(kind)
        for message in messages:
            warnings.warn(message, UserWarning, stacklevel=1)
    return [str(warning.message) for warning in seen]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_nobody_can_help_is_hidden_and_all_else_is_shown(kind):
    others = ["the learning rate is 0", "torch.distributed is gone"]
    assert heard(kind, [*OF_MEGATRON, *others]) == others


def test_missing_fused_layers_are_no_news_on_a_cpu_only():
    message = "Transformer Engine and Apex are not installed. Falling back to Torch Norm"
    assert heard("cpu", [message]) == []
    assert heard("cuda", [message]) == [message]


def test_log_records_too_and_a_second_call_changes_nothing(caplog):
    silence("cpu")
    silence("cpu")
    logger = logging.getLogger("torch.utils.cpp_extension")
    assert len(logger.filters) == 1
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
    logger.warning("the compiler is broken")
    assert [record.message for record in caplog.records] == ["the compiler is broken"]


DEPRECATION = "GPTModel IS DEPRECATED. Please reference the migration guide"


def deprecations_heard(caplog, *filters):
    """What three models built under these filters of warnings say, as warnings and in the log."""
    silence("cpu")
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    (converter,) = logger.filters
    converter._shown.clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        for arguments in filters:
            warnings.filterwarnings(**arguments)
        for _ in range(3):
            logger.warning(DEPRECATION)
        logger.warning("the model has no layers")
    assert [record.message for record in caplog.records] == ["the model has no layers"]
    return [(warning.category, str(warning.message)) for warning in seen]


def test_developers_are_told_once_that_gptmodel_is_deprecated(caplog):
    of_megatron = {"action": "ignore", "module": r"megatron\.core\."}
    assert deprecations_heard(caplog, {"action": "default"}, of_megatron) == [
        (DeprecationWarning, DEPRECATION)
    ]


def test_users_are_not_told_under_the_filters_that_python_starts_with(caplog):
    ignored = {"action": "ignore", "category": DeprecationWarning}
    of_main = {"action": "default", "category": DeprecationWarning, "module": "__main__"}
    assert deprecations_heard(caplog, ignored, of_main) == []
