"""What a conversion asks of the configuration beside a checkpoint."""

import pytest

from megatron_rl.errors import UserError
from megatron_rl.weights.convert import _longest_and_family


def test_the_longest_and_family_is_that_of_the_configuration(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1\nmodel: {max_sequence_length: 96}\n")
    assert _longest_and_family(file) == (96, None)
    file.write_text("model: {max_sequence_length: 96, family: ./mine.py:FAMILY}\n")
    assert _longest_and_family(file) == (96, "./mine.py:FAMILY")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "does not exist"),
        ("seed: 1\n", "'model'"),
        ("model: 3\n", "not subscriptable"),
        ("model: {max_sequence_length: x}\n", "it is 'x'"),
        ("model: {max_sequence_length: 1}\n", "it is 1"),
        ("model: [\n", "config.yaml:2: invalid YAML"),
        ("[" * 2000, "nested more than 64 deep"),
        (f"seed: {'9' * 5000}\n", "config.yaml:1: invalid YAML"),
    ],
)
def test_a_configuration_that_is_none_is_one_line(tmp_path, text, why):
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(
        UserError, match=r"config\.yaml says no model\.max_sequence_length"
    ) as caught:
        _longest_and_family(file)
    assert why in str(caught.value) and "\n" not in str(caught.value)
