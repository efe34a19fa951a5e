"""A family that is a file outside the package: what is loaded, trained and written by it has the
values of Qwen3-MoE, which it is under other names.
"""

import json

import pytest
import torch

from megatron_rl.config.checks import check_config
from megatron_rl.config.hf_config import read_hf_config
from megatron_rl.config.hf_export import hf_config_of
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError
from tests.support import hugging_face
from tests.support.own_family import FILE, renamed, save_renamed, tensors
from tests.support.tiny import tiny_config
from tests.support.tiny_training import build_training

FAMILY = f"{FILE}:FAMILY"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a directory of Qwen3-MoE, the same of the family)."""
    folder = tmp_path_factory.mktemp("models")
    theirs = hugging_face.save("qwen3_moe, dense layers", folder / "theirs")
    return theirs, save_renamed(theirs, folder / "mine")


def trained(directory, family, target):
    """The tensors and config.json of an export after one step; the loss before it."""
    from megatron_rl.weights.export import export_model
    from megatron_rl.weights.from_hugging_face import load_hf_weights

    model = {**read_hf_config(directory, family), "family": family, "init_std": 0.02}
    training = build_training(tiny_config(model=model))
    load_hf_weights(training.chunks, training.groups, training.config.model, directory)
    training.optimizer.reload_model_params()
    loss = training.step(1)
    export_model(training.chunks, training.groups, training.config.model, target)
    return tensors(target), json.loads((target / "config.json").read_text()), loss


def test_a_step_of_it_is_one_of_qwen3_moe(models, tmp_path):
    theirs, mine = models
    assert read_hf_config(mine, FAMILY) == read_hf_config(theirs)
    expected, config, loss = trained(theirs, None, tmp_path / "theirs")
    found, written, same = trained(mine, FAMILY, tmp_path / "mine")
    assert same == loss and set(found) == set(map(renamed, expected)) != set(expected)
    assert all(torch.equal(found[renamed(name)], expected[name]) for name in expected)
    before = tensors(theirs)
    router = "model.layers.1.mlp.gate.weight"
    assert not torch.equal(before[router], expected[router])  # it has learnt
    assert written.pop("n_experts") == config.pop("num_experts") == config.pop("num_local_experts")
    assert written.pop("model_type") == "my_moe" != config.pop("model_type")
    assert written.pop("architectures") == ["MyMoeForCausalLM"] != config.pop("architectures")
    assert written == config


def test_a_run_takes_it_from_the_configuration(models):
    _, mine = models
    config = load_config(
        None,
        ["--model.hf_path", str(mine), "--model.family", FAMILY, "--rollout.max_new_tokens=8"],
    )
    assert config.model.num_experts == 8 and config.model.family == FAMILY
    check_config(config, None, "generate", files=False)
    assert hf_config_of(config.model)["n_experts"] == 8
    with pytest.raises(
        UserError, match="model_type 'my_moe' is not supported; expected .* of your"
    ):
        load_config(None, ["--model.hf_path", str(mine)])


def test_fused_experts_of_it_are_read(models, tmp_path):
    from megatron_rl.config.hf_config import family_of
    from megatron_rl.weights.source import HuggingFaceTensors

    theirs, mine = models
    fused = hugging_face.save(
        "qwen3_moe, dense layers", tmp_path / "fused", save_original_format=False
    )
    fused = save_renamed(fused, tmp_path / "renamed")
    assert any(name.endswith("experts.gate_up_proj") for name in tensors(fused))
    source = HuggingFaceTensors(fused, family_of(fused, FAMILY))
    expected = tensors(mine)
    assert source.names == set(expected)
    assert all(torch.equal(source.get(name), expected[name]) for name in expected)


def test_a_shipped_family_reads_a_model_type_that_is_unknown(models, tmp_path):
    theirs, _ = models
    values = json.loads((theirs / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "other_moe"}))
    fields = read_hf_config(theirs)
    assert read_hf_config(tmp_path, "qwen3_moe") == fields
    assert hf_config_of(ModelConfig(**fields, family="qwen3_moe"))["model_type"] == "qwen3_moe"
    with pytest.raises(UserError, match="is qwen3_moe, and model.family olmoe is of 'olmoe'; exp"):
        read_hf_config(theirs, "olmoe")
    with pytest.raises(UserError, match="is 'qwen3_mo' .did you mean qwen3_moe.*; expected one of"):
        read_hf_config(theirs, "qwen3_mo")
