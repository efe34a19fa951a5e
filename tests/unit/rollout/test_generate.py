"""Generation on one rank, against transformers, scoring, and other batch sizes."""

import numpy as np
import pytest
import torch

from megatron_rl.errors import UserError
from megatron_rl.rollout.engine import SamplingSettings
from tests.support.tiny import (
    EOS,
    build_tiny,
    random_prompts,
    spell,
    tiny_config,
    tiny_engine,
    uneven_norms,
)

LENGTHS = [5, 1, 12, 7, 3, 9]


@pytest.fixture(scope="module")
def tiny():
    config = tiny_config()
    groups, megatron_config, chunks = build_tiny(config)
    uneven_norms(chunks[0])
    return config, groups, megatron_config, chunks


def answers(groups):
    return [[answer.tokens.tolist() for answer in group.completions] for group in groups]


def to_transformers(chunk, model):
    """transformers' Qwen3-MoE model with the chunk's weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    source = chunk.state_dict()
    heads, groups, width = model.num_attention_heads, model.num_query_groups, model.head_dim
    weights = {
        "model.embed_tokens.weight": source["embedding.word_embeddings.weight"],
        "model.norm.weight": source["decoder.final_layernorm.weight"],
        "lm_head.weight": source["output_layer.weight"],
    }
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = source[ours + "self_attention.linear_qkv.weight"]
        parts = qkv.view(groups, -1, width, model.hidden_size).split([heads // groups, 1, 1], dim=1)
        for name, part in zip("qkv", parts):
            weights[f"{theirs}self_attn.{name}_proj.weight"] = part.reshape(-1, model.hidden_size)
        for theirs_name, ours_name in {
            "self_attn.o_proj": "self_attention.linear_proj",
            "self_attn.q_norm": "self_attention.q_layernorm",
            "self_attn.k_norm": "self_attention.k_layernorm",
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "pre_mlp_layernorm",
            "mlp.gate": "mlp.router",
        }.items():
            weights[f"{theirs}{theirs_name}.weight"] = source[f"{ours}{ours_name}.weight"]
        # transformers 5 stacks the experts in memory.
        weights[f"{theirs}mlp.experts.gate_up_proj"] = source[
            ours + "mlp.experts.linear_fc1.weight"
        ]
        weights[f"{theirs}mlp.experts.down_proj"] = source[ours + "mlp.experts.linear_fc2.weight"]
    config = Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        num_experts=model.num_experts,
        num_experts_per_tok=model.moe_top_k,
        norm_topk_prob=True,
        rope_theta=model.rope_base,
        rms_norm_eps=model.norm_epsilon,
        max_position_embeddings=model.max_sequence_length,
        tie_word_embeddings=False,
    )
    reference = Qwen3MoeForCausalLM(config).float().eval()
    if "model.layers.0.mlp.experts.gate_up_proj" not in reference.state_dict():
        weights = one_tensor_an_expert(weights)
    reference.load_state_dict(weights)
    return reference


def one_tensor_an_expert(weights):
    """The names of transformers 4."""
    single = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            single[name] = weight
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(weight):
            names = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
            for part_name, part in zip(names, matrix.chunk(len(names))):
                single[f"{prefix}.{expert}.{part_name}.weight"] = part
    return single


def test_greedy_equals_transformers(tiny):
    config, groups, megatron_config, chunks = tiny
    reference = to_transformers(chunks[0], config.model)
    prompts = random_prompts(LENGTHS)
    settings = SamplingSettings(samples=1, max_new_tokens=20, greedy=True, temperature=0.7)
    engine = tiny_engine(config, groups, megatron_config, chunks, stop_ids=())
    for prompt, group in zip(prompts, engine.generate(prompts, settings)):
        tokens = torch.tensor(prompt.tokens)[None]
        for token, logprob in zip(group.completions[0].tokens, group.completions[0].logprobs):
            with torch.no_grad():
                logits = reference(tokens, use_cache=False).logits[0, -1]
            assert token == logits.argmax()
            expected = torch.log_softmax(logits / 0.7, 0)[token].item()
            assert logprob == pytest.approx(expected, abs=2e-5)
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)


def test_an_answer_does_not_depend_on_its_batch(tiny, monkeypatch):
    from megatron_rl.rollout.builtin import decoder
    from megatron_rl.rollout.builtin.plain import buckets

    prompts = random_prompts(LENGTHS)
    settings = SamplingSettings(samples=4, max_new_tokens=24, seed=11)
    engine = tiny_engine(*tiny)
    together = engine.generate(prompts, settings)
    lengths = [len(answer) for group in answers(together) for answer in group]
    assert len(set(lengths)) > 4 and max(lengths) == 24  # rows leave at different steps
    alone = [engine.generate([prompt], settings)[0] for prompt in prompts]
    small = tiny_engine(*tiny, max_batch=5).generate(prompts, settings)
    single = tiny_engine(*tiny, max_batch=1).generate(prompts[:2], settings)
    backwards = engine.generate(prompts[::-1], settings)[::-1]
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 10)
    monkeypatch.setattr(buckets, "COMPACT_BELOW", 0.0)  # finished rows stay until the end
    otherwise = engine.generate(prompts, settings)
    for other in (alone, small, backwards, otherwise):
        assert answers(other) == answers(together)
        for group, reference in zip(other, together):
            assert group.prompt is reference.prompt
            for answer, expected in zip(group.completions, reference.completions):
                np.testing.assert_allclose(answer.logprobs, expected.logprobs, atol=1e-5)
    assert answers(single) == answers(together)[:2]


def test_the_seed_and_the_sample_number_change_the_answer(tiny):
    prompts = random_prompts([6])
    engine = tiny_engine(*tiny, stop_ids=())
    first = answers(engine.generate(prompts, SamplingSettings(3, 12, seed=1)))[0]
    again = answers(engine.generate(prompts, SamplingSettings(5, 12, seed=1)))[0]
    other = answers(engine.generate(prompts, SamplingSettings(3, 12, seed=2)))[0]
    assert again[:3] == first
    assert len({tuple(a) for a in [*first, *other]}) == 6


def test_stops_behind_the_end_token(tiny):
    prompts = random_prompts(LENGTHS)
    settings = SamplingSettings(samples=4, max_new_tokens=24, seed=11)
    endless = tiny_engine(*tiny, stop_ids=()).generate(prompts, settings)
    stopping = tiny_engine(*tiny).generate(prompts, settings)
    finished = 0
    for group, reference in zip(stopping, endless):
        for answer, whole in zip(group.completions, reference.completions):
            tokens = whole.tokens.tolist()
            assert len(tokens) == 24 and not whole.finished and whole.text == spell(tokens)
            end = tokens.index(EOS) + 1 if EOS in tokens else 24
            assert answer.tokens.tolist() == tokens[:end]
            np.testing.assert_allclose(answer.logprobs, whole.logprobs[:end], atol=1e-5)
            assert answer.finished == (EOS in tokens)
            assert answer.text == spell(tokens[: end - answer.finished])
            finished += answer.finished
    assert 0 < finished < 24


def test_the_first_of_several_stop_tokens_ends_an_answer(tiny):
    prompts, stops = random_prompts(LENGTHS), (EOS, 7, 50)
    settings = SamplingSettings(samples=4, max_new_tokens=24, seed=11)
    endless = tiny_engine(*tiny, stop_ids=()).generate(prompts, settings)
    stopping = tiny_engine(*tiny, stop_ids=stops).generate(prompts, settings)
    ended_by = []
    for group, reference in zip(stopping, endless):
        for answer, whole in zip(group.completions, reference.completions):
            tokens = whole.tokens.tolist()
            end = next((i for i, token in enumerate(tokens) if token in stops), None)
            assert answer.finished == (end is not None)
            kept = tokens if end is None else tokens[: end + 1]
            assert answer.tokens.tolist() == kept
            assert answer.text == spell(kept[: len(kept) - answer.finished])
            ended_by += kept[-1:] if answer.finished else []
    assert set(ended_by) == set(stops)


def test_cut_at_the_longest_sequence(tiny):
    prompts = random_prompts(LENGTHS)
    settings = SamplingSettings(samples=2, max_new_tokens=10, seed=3)
    whole = tiny_engine(*tiny, stop_ids=()).generate(prompts, settings)
    cut = tiny_engine(*tiny, stop_ids=(), max_sequence_length=14).generate(prompts, settings)
    for group, reference in zip(answers(cut), answers(whole)):
        for answer, expected in zip(group, reference):
            assert answer == expected[: len(answer)]
    lengths = [len(group[0]) for group in answers(cut)]
    assert lengths == [9, 10, 2, 7, 10, 5]


def test_the_model_is_as_before(tiny):
    config, groups, megatron_config, chunks = tiny
    engine = tiny_engine(*tiny)
    before = {
        name: value.clone() for name, value in chunks[0].state_dict().items() if value is not None
    }
    for mode in (True, False):
        chunks[0].train(mode)
        engine.generate(random_prompts([4]), SamplingSettings(2, 3))
        assert all(module.training == mode for module in chunks[0].modules())
    for name, value in before.items():
        assert torch.equal(chunks[0].state_dict()[name], value), name
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_routes_are_those_of_a_forward_pass_over_the_whole_answer(tiny):
    """Prefill, decoding, rows that leave and a prompt of one token agree with one causal pass."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.router.capture import RouterCapture

    chunk = tiny[3][0]
    capture = RouterCapture(routers_of([chunk]), [[1, 2]])
    try:
        engine = tiny_engine(*tiny, max_batch=7, capture=capture)
        settings = SamplingSettings(samples=4, max_new_tokens=24, seed=11, routes=True)
        groups = engine.generate(random_prompts(LENGTHS), settings)
        plain = engine.generate(random_prompts(LENGTHS), SamplingSettings(4, 24, seed=11))
        assert answers(groups) == answers(plain)
        assert {len(a) for group in answers(groups) for a in group} != {24}
        for group, same in zip(groups, plain):
            for answer, without in zip(group.completions, same.completions):
                assert without.routed_experts is None
                row = np.concatenate([group.prompt.tokens, answer.tokens])[:-1]
                placement = packed_placement([len(row)], len(row), torch.device("cpu"))
                with torch.no_grad(), capture.record(0) as trace:
                    forward_row(chunk, torch.from_numpy(row), placement)
                assert answer.routed_experts.layers == (1, 2)
                for column, number in enumerate((1, 2)):
                    found = answer.routed_experts.ids[:, column]
                    assert found.tolist() == trace[number].expert_ids.tolist()
    finally:
        capture.close()


def test_routes_need_a_capture(tiny):
    with pytest.raises(ValueError, match="settings.routes needs an engine with a RouterCapture"):
        tiny_engine(*tiny).generate([], SamplingSettings(1, 1, routes=True))


def test_no_prompts_no_groups(tiny):
    assert tiny_engine(*tiny).generate([], SamplingSettings(2, 3)) == []


@pytest.mark.parametrize("length", [0, 14])
def test_a_prompt_without_room_for_an_answer_is_refused(tiny, length):
    engine = tiny_engine(*tiny, max_sequence_length=14)
    with pytest.raises(UserError, match=f"prompt 0 has {length} tokens"):
        engine.generate(random_prompts([length]), SamplingSettings(1, 1))
