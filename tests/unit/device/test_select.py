import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device.launch import Launch
from megatron_rl.device.select import select_device
from megatron_rl.errors import UserError
from tests.support.tiny import cpu_device

ALONE = Launch(0, 1, 0, 1, launched=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device.kind is cuda, but torch sees no CUDA device"):
        select_device(DeviceConfig(kind="cuda"), ALONE)


def test_the_cpu_speaks_gloo_with_the_threads_asked_for():
    before = torch.get_num_threads()
    try:
        device = select_device(DeviceConfig(kind="cpu", threads=2), ALONE)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert (device.kind, device.backend) == ("cpu", "gloo")
    assert device.torch_device == torch.device("cpu")


def test_ranks_of_a_machine_share_its_cores():
    before = torch.get_num_threads()
    try:
        select_device(DeviceConfig(kind="cpu"), Launch(0, 64, 0, 64, launched=True))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_process_started_by_hand_is_a_world_of_one():
    cpu_device()
    assert dist.get_world_size() == 1 and dist.get_backend() == "gloo"
    total = torch.tensor([3.0])
    dist.all_reduce(total)
    assert total.item() == 3.0
