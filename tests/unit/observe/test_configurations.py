"""The configurations of a run: which was in force at a step, and what stays of them."""

import pytest

from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.observe.configurations import (
    changes_since,
    configuration_at,
    keep_configuration,
    read_configurations,
)


def config(lr=1.0, **sections):
    return Config(optimizer={"lr": lr}, **sections)


def kept(run_dir):
    return {c.first_step: c.values["optimizer"]["lr"] for c in read_configurations(run_dir)}


def lr_at(run_dir, step):
    return configuration_at(run_dir, step).values["optimizer"]["lr"]


def test_each_change_is_kept_with_its_first_step(tmp_path):
    assert keep_configuration(tmp_path, config(0.1), None) == 0
    assert keep_configuration(tmp_path, config(0.1), 10) == 0  # nothing has changed
    assert keep_configuration(tmp_path, config(0.2), 20) == 21
    assert keep_configuration(tmp_path, config(0.3), 25) == 26
    assert kept(tmp_path) == {0: 0.1, 21: 0.2, 26: 0.3}
    assert [lr_at(tmp_path, step) for step in (0, 20, 21, 25, 26, 99)] == [
        *(0.1, 0.1, 0.2, 0.2, 0.3, 0.3)
    ]
    assert load_config(tmp_path / "config.yaml") == config(0.3)
    assert load_config(tmp_path / "configs" / "step_21.yaml") == config(0.2)
    assert [str(change) for change in changes_since(tmp_path, 25, config(0.4))] == [
        "optimizer.lr 0.2 -> 0.4"
    ]


def test_steps_done_again_are_under_the_configuration_they_are_done_again_with(tmp_path):
    """Killed after step 24 without a checkpoint behind 20; gone on from there with another one."""
    keep_configuration(tmp_path, config(0.1), None)
    keep_configuration(tmp_path, config(0.2), 20)
    assert keep_configuration(tmp_path, config(0.3), 20) == 21
    assert kept(tmp_path) == {0: 0.1, 21: 0.3}
    assert keep_configuration(tmp_path, config(0.1), 20) == 0  # as it was at first
    assert kept(tmp_path) == {0: 0.1}


def test_silent_keys_change_config_yaml_alone(tmp_path):
    keep_configuration(tmp_path, config(0.1), None)
    other = config(0.1, observe={"console": "plain"}, device={"threads": 3})
    assert keep_configuration(tmp_path, other, 5) == 0
    assert kept(tmp_path) == {0: 0.1}
    assert load_config(tmp_path / "config.yaml") == other


def test_a_run_of_an_older_version_has_its_config_yaml_kept(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(config(0.1)))
    assert kept(tmp_path) == {0: 0.1}
    assert keep_configuration(tmp_path, config(0.2), 7) == 8
    assert kept(tmp_path) == {0: 0.1, 8: 0.2}


def test_a_new_run_moves_the_configurations_of_an_old_one_aside(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(config(0.1)))
    keep_configuration(tmp_path, config(0.2), None)
    keep_configuration(tmp_path, config(0.3), None)
    assert load_config(tmp_path / "config.yaml.old-1") == config(0.1)
    assert load_config(tmp_path / "configs.old-1" / "step_0.yaml") == config(0.2)
    assert kept(tmp_path) == {0: 0.3}


@pytest.mark.parametrize("left", [None, ""])
def test_without_a_configuration_nothing_is_known(tmp_path, left):
    if left is not None:
        (tmp_path / "config.yaml").write_text(left)  # a disk was full
    assert changes_since(tmp_path, 3, config()) is None
    assert keep_configuration(tmp_path, config(0.2), 3) == 4
    assert kept(tmp_path) == {4: 0.2}


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config.yaml:1: invalid YAML"):
        changes_since(tmp_path, 3, config())


@pytest.mark.parametrize("path", ["cost$5/train.jsonl", "~x/train.jsonl"])
def test_a_path_that_is_written_otherwise_than_it_is_has_not_changed(tmp_path, path):
    same = config(data={"train": path})
    keep_configuration(tmp_path, same, None)
    assert load_config(tmp_path / "config.yaml") == same
    assert changes_since(tmp_path, 0, same) == []
    assert keep_configuration(tmp_path, same, 5) == 0
