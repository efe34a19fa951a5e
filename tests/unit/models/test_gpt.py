"""What is taken from Megatron's own specs is there, whichever version they are of."""

from tests.support.tiny import cpu_device


def test_the_router_of_megatrons_own_specs_can_be_replaced():
    cpu_device()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_rl.models.experts import moe_submodules
    from megatron_rl.models.router import PackRouter

    spec = get_gpt_layer_local_spec(num_experts=4)
    moe = moe_submodules(spec.submodules.mlp)
    assert moe.experts is not None
    moe.router = PackRouter
    assert moe_submodules(spec.submodules.mlp).router is PackRouter
    assert moe_submodules(get_gpt_layer_local_spec().submodules.mlp) is None
