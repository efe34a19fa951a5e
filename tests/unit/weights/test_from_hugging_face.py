"""From a model directory into the model: both forms of experts, tied heads, what is left over."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl import families
from megatron_rl.errors import UserError
from megatron_rl.weights.source import HuggingFaceTensors
from megatron_rl.weights.unused import unused_tensors
from tests.support import hugging_face
from tests.support.tiny import build_tiny, tiny_config

ROWS = {row.model_type: row for row in families.FAMILIES}
QWEN3 = ROWS["qwen3_moe"]
FAMILIES = {
    "qwen3_moe, dense layers": "qwen3_moe",
    "qwen2_moe": "qwen2_moe",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "deepseek_v3": "deepseek_v3",
}


@pytest.mark.parametrize("variant", FAMILIES)
def test_fused_experts_are_those_of_the_files_with_one_tensor_each(variant, tmp_path):
    """As transformers 5 itself writes the two forms of one model."""
    fused = hugging_face.save(variant, tmp_path / "fused", save_original_format=False)
    single = load_file(hugging_face.save(variant, tmp_path / "single") / "model.safetensors")
    stored = load_file(fused / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 64, 64)
    source = HuggingFaceTensors(fused, ROWS[FAMILIES[variant]])
    assert source.names == set(single)
    for name, tensor in single.items():
        assert source.shape(name) == tensor.shape and torch.equal(source.get(name), tensor), name


def test_rows_of_a_fused_tensor_by_hand(tmp_path):
    gate_up = torch.arange(2 * 4 * 3, dtype=torch.bfloat16).view(2, 4, 3)
    down = torch.arange(2 * 3 * 2, dtype=torch.bfloat16).view(2, 3, 2)
    layer = "model.layers.3"
    names = {f"{layer}.mlp.experts.gate_up_proj": gate_up, f"{layer}.mlp.experts.down_proj": down}
    save_file(names, tmp_path / "model.safetensors")
    source = HuggingFaceTensors(tmp_path, ROWS["mixtral"])
    expert = f"{layer}.block_sparse_moe.experts.1"
    assert source.get(f"{expert}.w1.weight").tolist() == [[12, 13, 14], [15, 16, 17]]
    assert source.get(f"{expert}.w3.weight").tolist() == [[18, 19, 20], [21, 22, 23]]
    assert source.get(f"{expert}.w2.weight").tolist() == [[6, 7], [8, 9], [10, 11]]
    assert len(source.names) == 6
    # a family without experts, or none named: as stored
    assert HuggingFaceTensors(tmp_path, ROWS["qwen3"]).names == set(names)
    assert HuggingFaceTensors(tmp_path).names == set(names)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate_up_proj": torch.zeros(2, 4)}, r"gate_up_proj of shape \(2, 4\); expected \[exper"),
        ({"gate_up_proj": torch.zeros(2, 3, 4)}, r"shape \(2, 3, 4\); .* columns\] of gate and up"),
        (
            {"down_proj": torch.zeros(2, 3, 4), "1.down_proj.weight": torch.zeros(3, 4)},
            "experts.1.down_proj.weight twice, as .*1.down_proj.weight and as .*experts.down_proj;",
        ),
    ],
)
def test_fused_tensors_that_are_none(tensors, message, tmp_path):
    block = "model.layers.0.mlp.experts"
    save_file({f"{block}.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        HuggingFaceTensors(tmp_path, QWEN3)
    assert "\n" not in str(caught.value)


def loaded(directory, **changes):
    """(model, groups, chunks) of a directory's weights in a process of its own world."""
    from megatron_rl.config.hf_config import read_hf_config

    config = tiny_config(model={"init_std": 0.02, **read_hf_config(directory), **changes})
    groups, _, chunks = build_tiny(config)
    from megatron_rl.weights.from_hugging_face import load_hf_weights

    load_hf_weights(chunks, groups, config.model, directory)
    return config.model, groups, chunks


def logits_of(chunks, groups):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_stages

    tokens = hugging_face.tokens()
    placement = packed_placement([len(tokens)], len(tokens), torch.device("cpu"))
    with torch.no_grad():
        return forward_stages(chunks, tokens, placement, groups)[:, : hugging_face.VOCABULARY]


@pytest.mark.parametrize("variant", ["mixtral", "deepseek_v3"])
def test_fused_experts_give_the_logits_and_go_out_one_by_one(variant, tmp_path):
    fused = hugging_face.save(variant, tmp_path / "fused", save_original_format=False)
    single = load_file(hugging_face.save(variant, tmp_path / "single") / "model.safetensors")
    model, groups, chunks = loaded(fused)
    expected = hugging_face.logits(fused)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits_of(chunks, groups), expected, atol=1e-4, rtol=0)
    from megatron_rl.weights.export import export_model

    export_model(chunks, groups, model, tmp_path / "out", like=fused)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == single.keys()
    assert all(torch.equal(found[name], single[name]) for name in single)
    # Nearly: a product depends on where its weights lie in memory, on some CPUs.
    again = hugging_face.logits(tmp_path / "out")
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return hugging_face.save("qwen3_moe, tied", tmp_path_factory.mktemp("tied"))


def with_tensors(directory, target, **more):
    """A copy of a directory with tensors added to its only file."""
    shutil.copytree(directory, target)
    tensors = {**load_file(target / "model.safetensors"), **more}
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_head_that_repeats_the_tied_embedding_is_taken(tied, tmp_path):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    again = with_tensors(tied, tmp_path / "again", **{"lm_head.weight": embedding.clone()})
    _, groups, chunks = loaded(again)
    expected = hugging_face.logits(tied)
    torch.testing.assert_close(logits_of(chunks, groups), expected, atol=1e-4, rtol=0)


def test_a_head_of_its_own_beside_the_tied_flag_is_refused_or_used(tied, tmp_path):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    head = embedding.clone()
    head[-1, -1] += 0.5  # one number, in the last row
    other = with_tensors(tied, tmp_path / "other", **{"lm_head.weight": head})
    with pytest.raises(UserError) as caught:
        loaded(other)
    assert str(caught.value).startswith(
        f"{other} holds lm_head.weight, which is not model.embed_tokens.weight, while the "
        "embeddings are tied"
    )
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    _, groups, chunks = loaded(other)
    expected = hugging_face.logits(other)
    assert (expected - hugging_face.logits(tied)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(chunks, groups), expected, atol=1e-4, rtol=0)


def test_a_head_of_another_height_beside_the_tied_flag_is_refused(tied, tmp_path):
    other = with_tensors(tied, tmp_path / "other", **{"lm_head.weight": torch.zeros(3, 64)})
    with pytest.raises(UserError, match="holds lm_head.weight, which is not model.embed_tokens"):
        loaded(other)


NAME = "model.layers.0.self_attn.rotary_emb.inv_freq"


def frequencies(base):
    """Of heads of 32 channels, one after the other."""
    return torch.tensor([base ** (-2 * i / 32) for i in range(16)])


def test_stored_frequencies_are_compared(tied, tmp_path):
    right = frequencies(1e6).to(torch.bfloat16)
    model, _, _ = loaded(with_tensors(tied, tmp_path / "right", **{NAME: right}))
    source = HuggingFaceTensors(tmp_path / "right", QWEN3)
    assert NAME in source.names
    assert (
        unused_tensors(source, source.names - {NAME}, model, QWEN3) == []
    )  # nor does --verify miss it
    for number, wrong in enumerate([frequencies(1e4), frequencies(1e6)[:8]]):
        other = with_tensors(tied, tmp_path / f"wrong{number}", **{NAME: wrong})
        with pytest.raises(UserError, match="inv_freq, which are not the frequencies of base 1e"):
            loaded(other)


def test_a_tensor_of_another_architecture_is_refused(tied, tmp_path):
    other = with_tensors(tied, tmp_path / "other", **{"model.extra.weight": torch.ones(2)})
    with pytest.raises(UserError, match="holds the tensor model.extra.weight, which no weight"):
        loaded(other)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_shared_expert_without_width_is_left_out(tmp_path, monkeypatch):
    """transformers stores its empty matrices, and the gate that multiplies nothing."""
    family, options = hugging_face.VARIANTS["qwen2_moe"]
    options = {**options, "shared_expert_intermediate_size": 0}
    monkeypatch.setitem(hugging_face.VARIANTS, "none shared", (family, options))
    directory = hugging_face.save("none shared", tmp_path / "model")
    assert "model.layers.0.mlp.shared_expert_gate.weight" in HuggingFaceTensors(directory).names
    _, groups, chunks = loaded(directory)
    expected = hugging_face.logits(directory)
    torch.testing.assert_close(logits_of(chunks, groups), expected, atol=1e-4, rtol=0)
