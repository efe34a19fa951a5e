import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import DeviceConfig
from megatron_rl.device.launch import Launch
from megatron_rl.device.select import Device, connect, select_device
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


def test_ranks_without_a_place_to_meet_are_refused():
    device = Device("cpu", torch.device("cpu"), "gloo")
    with pytest.raises(UserError, match="RANK is set and MASTER_ADDR and MASTER_PORT are not"):
        connect(device, Launch(0, 2, 0, 2, launched=True), 60.0)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK is 4 on a machine where torch sees 4 GPUs"):
        select_device(DeviceConfig(), Launch(4, 8, 4, 8, launched=True))
