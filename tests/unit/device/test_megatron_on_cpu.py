import torch

from megatron_rl.device import megatron_on_cpu
from tests.support.tiny import cpu_device


def test_cuda_calls_of_megatron_stay_on_the_cpu():
    cpu_device()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2, device="cuda:0").device.type == "cpu"
    assert torch.tensor([1.0], device="cuda").device.type == "cpu"
    tensor = torch.arange(3.0)
    assert tensor.cuda() is tensor
    assert torch.cuda.current_device() == torch.device("cpu")
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.type(torch.int64).tolist() == [0, 1, 2]
    with torch.cuda.stream(torch.cuda.Stream()):
        event = torch.cuda.current_stream().record_event()
    assert event.query()


def test_a_device_context_still_reaches_the_factories():
    """transformers builds models inside ``torch.device("meta")`` and fills what is on it later."""
    cpu_device()
    with torch.device("meta"):
        made = [torch.zeros(2), torch.ones(2), torch.tensor([1.0]), torch.empty(2)]
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_random_states_are_those_of_the_cpu_generator():
    cpu_device()
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_second_installation_changes_nothing():
    cpu_device()
    before = torch.zeros, torch.Tensor.type
    megatron_on_cpu.install()
    assert (torch.zeros, torch.Tensor.type) == before


def test_megatrons_small_functions_are_left_uncompiled_and_torch_compile_as_it_was():
    cpu_device()
    from megatron.core.fusions.fused_bias_swiglu import swiglu

    assert not hasattr(swiglu, "_torchdynamo_orig_callable")
    assert hasattr(torch.compile(lambda x: x, backend="eager"), "_torchdynamo_orig_callable")
