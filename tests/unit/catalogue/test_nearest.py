"""The nearest valid name to a misspelt one."""

from megatron_rl.catalogue.nearest import nearest


def test_nearest_looks_at_whole_names_and_last_parts():
    names = ["model.hidden_size", "rollout.temperature", "rollout.top_k", "train.steps"]
    assert nearest("model.hiden_size", names) == "model.hidden_size"
    assert nearest("temperature", names) == "rollout.temperature"
    assert nearest("model.temperature", names) == "rollout.temperature"
    assert nearest("zzzz", names) is None
    assert nearest("anything", []) is None
