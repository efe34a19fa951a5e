import pytest
import torch
import torch.distributed as dist

from megatron_rl.parallel.collectives import all_max, all_reduce, broadcast, gather_first_dim
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device


def _collect():
    """On a rank: what each collective makes of numbers that name the rank."""
    rank, world = dist.get_rank(), dist.group.WORLD
    mine = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    total = all_reduce(mine, world)
    part = torch.full((2, 3), float(rank), requires_grad=True)
    whole = gather_first_dim(part, world)
    (whole * torch.arange(12.0).view(4, 3)).sum().backward()
    return {
        "mine": mine,
        "total": total,
        "top": all_max(7 - rank, world, torch.device("cpu")),
        "sent": broadcast(torch.tensor([float(rank)]), world, source=1),
        "whole": whole.detach(),
        "gradient": part.grad,
    }


@pytest.fixture(scope="module")
def collected():
    return run_on_ranks(2, _collect)


def test_all_reduce_adds_and_leaves_its_argument_alone(collected):
    for rank, result in enumerate(collected):
        assert result["total"].tolist() == [[3.0, 6.0]]
        assert result["mine"].tolist() == [[rank + 1.0, 2 * (rank + 1.0)]]


def test_all_max_and_broadcast(collected):
    for result in collected:
        assert result["top"] == 7
        assert result["sent"].tolist() == [1.0]


def test_gather_is_in_rank_order_and_its_gradient_is_the_own_slice(collected):
    for rank, result in enumerate(collected):
        assert result["whole"][:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
        expected = torch.arange(12.0).view(2, 2, 3)[rank]
        assert result["gradient"].tolist() == expected.tolist()


def test_over_one_rank_each_is_the_identity():
    cpu_device()
    value = torch.ones(3)
    world = dist.group.WORLD
    assert all_reduce(value, world) is value
    assert broadcast(value, world) is value
    assert gather_first_dim(value, world) is value
    assert all_max(4, world, torch.device("cpu")) == 4
