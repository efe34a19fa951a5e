"""An option, a weight, a module or a hook that the plain functions do not know sends the engine
through Megatron's modules.
"""

import dataclasses

import pytest
import torch

from megatron_rl.config.schema import ModelConfig
from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import CASES
from tests.support.tiny import build_tiny, cpu_device, random_prompts, tiny_config, tiny_engine


@pytest.fixture
def plan():
    cpu_device()
    from megatron_rl.rollout.builtin.plain import plan

    return plan


def test_every_option_of_a_model_was_looked_at(plan):
    """A new option: compute it in rollout/builtin/plain, or refuse it in plan.py; then name it."""
    assert set(ModelConfig.model_fields) == plan.MODEL_OPTIONS


def test_an_option_is_computed_or_without_effect_or_needs_a_value(plan):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    named = [*plan.COMPUTED, *plan.WITHOUT_EFFECT, *plan.NEEDED]
    assert len(named) == len(set(named))
    megatrons = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    other_versions = {
        "cuda_graph_modules", "inference_cuda_graph_scope", "inference_grouped_gemm_backend",
        "moe_flex_dispatcher_num_sms", "moe_flex_dispatcher_backend", "cuda_graph_scope",
    }  # fmt: skip
    assert set(named) - megatrons <= other_versions


def test_every_layout_and_model_of_the_tests_has_known_options(plan):
    from megatron_rl.models.build import transformer_config
    from tests.support.layouts import layout_config

    for case in CASES:
        config = layout_config(case)
        megatrons = transformer_config(
            config.model, config.parallel, cpu_device(), routing_replay=True
        )
        assert plan.unknown_option(megatrons) is None, case.name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window_size", (4, 0)),
        ("moe_expert_capacity_factor", 1.0),
        ("rotary_interleaved", True),
        ("layernorm_zero_centered_gamma", True),
        ("softmax_scale", 0.5),
        ("qk_l2_norm", True),
        ("moe_input_jitter_eps", 0.1),
        ("glu_linear_offset", 1.0),
        ("moe_router_dtype", "fp64"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("activation_func", torch.nn.functional.gelu),
    ],
)
def test_another_value_of_an_unknown_option(plan, option, value):
    config = tiny_config()
    groups, megatrons, _ = build_tiny(config)
    changed = dataclasses.replace(megatrons)
    setattr(changed, option, value)
    found = plan.plan_of(changed, groups, torch.device("cpu"), 0.0)
    assert not found.is_plain and f"{option} {value!r}" in found.text()
    assert plan.plan_of(megatrons, groups, torch.device("cpu"), 0.0) == plan.Plan(None)


def test_an_option_of_a_version_to_come(plan):
    @dataclasses.dataclass
    class Later:
        normalization: str = "RMSNorm"
        scales_of_every_head: list = dataclasses.field(default_factory=lambda: [1.0])

    assert plan.unknown_option(Later()) is None
    assert plan.unknown_option(Later(scales_of_every_head=[2.0])) == (
        "they alone know scales_of_every_head [2.0]"
    )


class _Doubled(torch.nn.Module):
    """A user's or a later part of the model, that is ours by the name of its module."""

    def forward(self, x):
        return 2 * x


_Doubled.__module__ = "megatron_rl.models.later"


def add_module(chunk):
    chunk.decoder.layers[1].later = _Doubled()


def add_weight(chunk):
    chunk.decoder.layers[1].mlp.extra = torch.nn.Parameter(torch.ones(3))


def add_hook(chunk):
    chunk.decoder.layers[0].mlp.register_forward_hook(lambda module, inputs, output: None)


def add_buffer(chunk):
    chunk.decoder.layers[0].register_buffer("temperature", torch.ones(1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_module, "they alone know a _Doubled"),
        (add_weight, "it does not know the weight mlp.extra of layer 2"),
        (add_hook, "a hook watches decoder.layers.0.mlp"),
        (add_buffer, "it does not know the weight temperature of layer 1"),
    ],
)
def test_a_part_that_is_not_known(plan, change, reason):
    config = tiny_config()
    groups, megatrons, chunks = build_tiny(config)
    settings = SamplingSettings(samples=2, max_new_tokens=5, seed=1)
    plain = tiny_engine(config, groups, megatrons, chunks)
    expected = plain.generate(random_prompts([3, 5]), settings)
    change(chunks[0])
    engine = tiny_engine(config, groups, megatrons, chunks)
    assert plain.plan == plan.Plan(None) and engine.plan == plan.Plan(reason)
    for group, same in zip(engine.generate(random_prompts([3, 5]), settings), expected):
        for answer, other in zip(group.completions, same.completions):
            assert answer.tokens.tolist() == other.tokens.tolist()


def test_the_hook_of_shared_prompts_is_known(plan):
    """All models of ours have it on their MoE layers."""
    _, _, chunks = build_tiny(tiny_config())
    watched = [m for m in chunks[0].modules() if m._forward_pre_hooks]
    assert {type(module).__name__ for module in watched} == {"PackMoELayer"}
    assert plan.unknown_module(chunks) is None
    watched[0].register_forward_pre_hook(lambda module, inputs: None)
    assert plan.unknown_module(chunks) == "a hook watches decoder.layers.0.mlp"
