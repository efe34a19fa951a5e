import pytest
import torch

from megatron_rl.router.trace import LayerTrace, id_dtype, on_device


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (2, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_the_smallest_type_that_holds_the_ids(experts, dtype):
    assert id_dtype(experts) == dtype
    assert torch.iinfo(dtype).max >= experts - 1


def test_on_a_cpu_storing_and_fetching_copy_nothing():
    layer = LayerTrace(torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[-1.0, -2.0]]))
    stored = layer.pinned()
    assert stored.expert_ids is layer.expert_ids and stored.logprobs is layer.logprobs
    back = on_device({5: stored}, torch.device("cpu"))
    assert back[5].expert_ids is layer.expert_ids and back[5].logprobs is layer.logprobs
