"""Every key has a kind, and two configurations are compared key by key."""

from pathlib import Path

import pytest

from megatron_rl.config.architecture import NOT_ARCHITECTURE
from megatron_rl.config.fields import leaf_fields
from megatron_rl.config.on_resume import ON_RESUME, changes, kind_of
from megatron_rl.config.schema import Config, ModelConfig

#: New keys of these sections are said unless they are entered otherwise; never silent by accident.
SAID_AS_A_WHOLE = {"parallel", "reward", "rollout", "algorithm", "optimizer", "train", "evaluate"}
SILENT_AS_A_WHOLE = {"device", "observe", "rollout.servers"}


def entered(key):
    """The name under which a key is entered: its own or a section's; None: it is forgotten."""
    while key and key not in ON_RESUME:
        key = key.rpartition(".")[0]
    return key or None


def test_every_key_of_the_schema_is_entered():
    forgotten = [key for key in leaf_fields() if entered(key) is None]
    assert forgotten == [], "enter it in config/on_resume.py: may it change when a run goes on?"


def test_a_new_key_where_a_mistake_would_be_dear_is_not_entered_by_its_section():
    for key in ("model.new", "data.new", "data.tokenizer.new", "checkpoint.new", "new", "new.new"):
        assert entered(key) is None, key
    sections = {name for name in ON_RESUME if name not in leaf_fields()}
    assert sections == SAID_AS_A_WHOLE | SILENT_AS_A_WHOLE
    assert {name for name in sections if ON_RESUME[name] == "silent"} == SILENT_AS_A_WHOLE


def test_every_name_entered_is_one_of_the_schema():
    leaves = leaf_fields()
    for name in ON_RESUME:
        assert name in leaves or any(leaf.startswith(f"{name}.") for leaf in leaves), name


def test_what_is_refused_of_the_model_is_its_architecture():
    refused = {key for key in leaf_fields() if kind_of(key) == "refused"}
    architecture = {f"model.{name}" for name in ModelConfig.model_fields} - {
        f"model.{name}" for name in NOT_ARCHITECTURE
    }
    assert refused == architecture | {"seed", "data.shuffle", "optimizer.name"}


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("observe.console", "silent"),
        ("device.threads", "silent"),
        ("checkpoint.keep", "silent"),
        ("rollout.servers.urls", "silent"),
        ("rollout.temperature", "said"),
        ("algorithm.settings.clip_low", "said"),
        ("optimizer.lr", "said"),
        ("checkpoint.init_from", "said"),
        ("seed", "refused"),
        ("model.hidden_size", "refused"),
        ("a.key.of.another.version", "said"),
    ],
)
def test_kinds(key, kind):
    assert kind_of(key) == kind


def dumped(**sections):
    return Config(**sections).model_dump(mode="json")


def lines(before, after):
    return [str(change) for change in changes(before, after)]


def test_equal_configurations_differ_in_nothing():
    assert lines(dumped(), dumped()) == []


def test_changes_are_named_with_both_values_in_the_order_of_the_schema():
    before = dumped(
        algorithm={"name": "rspo", "settings": {"clip_low": 0.2, "clip_high": 0.3}},
        model={"yarn": None},
    )
    after = dumped(
        train={"steps": 4},
        algorithm={"name": "grpo", "settings": {"clip_low": 0.1}},
        rollout={"temperature": 0.5},
        observe={"console": "plain"},
        model={"yarn": {"factor": 2.0, "original_max_position_embeddings": 8}},
    )
    found = lines(before, after)
    assert found[0].startswith('model.yarn null -> {"factor": 2.0, "original_max_position_')
    assert found[1:] == [
        "rollout.temperature 1.0 -> 0.5",
        "algorithm.name rspo -> grpo",
        "algorithm.settings.clip_low 0.2 -> 0.1",
        "train.steps 100 -> 4",
        "algorithm.settings.clip_high 0.3 -> (not set)",
    ]


def test_a_key_of_one_version_only_counts_where_it_is_not_the_default():
    old = dumped()
    del old["rollout"]["temperature"]
    old["rollout"]["gone"] = 3
    assert lines(old, dumped()) == ["rollout.gone 3 -> (not set)"]
    assert lines(old, dumped(rollout={"temperature": 0.7})) == [
        "rollout.temperature (not set) -> 0.7",
        "rollout.gone 3 -> (not set)",
    ]


def test_two_spellings_of_a_path_are_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = dumped(data={"train": "a/../b"}), dumped(data={"train": tmp_path / "b"})
    assert lines(before, after) == []
    other = dumped(data={"train": Path("c")})
    assert lines(before, other) == ["data.train a/../b -> c"]


def test_true_is_not_one_but_two_is_two():
    assert lines({"optimizer": {"lr": 1}}, {"optimizer": {"lr": 1.0}}) == []
    assert lines({"algorithm": {"settings": {"a": True}}}, {"algorithm": {"settings": {"a": 1}}})
