"""What libraries say of ranks that are gone, as they have said it; and what is no such thing."""

import pytest

from megatron_rl.device.lost_ranks import lost_ranks


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
            "[10.77.0.2]:34201. This is typically caused by a remote worker crashing.",
            "Connection closed by peer [10.77.0.2]:34201",
        ),
        (
            "[gloo/transport/tcp/pair.cc:534] Read error [10.0.0.2]:51: Connection reset by peer",
            "Connection reset by peer",
        ),
        (
            "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv",
            "Timed out waiting",
        ),
        (
            "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
            "key-value store by key '0', but store->get('0') got error: Socket Timeout",
            "Socket Timeout",
        ),
        (
            "NCCL error, remote process exited or there was a network error",
            "remote process exited",
        ),
    ],
)
def test_lost_ranks_are_recognised(said, heard):
    assert lost_ranks(RuntimeError(said)) == heard


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[0, 2, -1]' is invalid for input of size 3"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ValueError("Connection closed by peer"),
    ],
)
def test_other_errors_are_not(error):
    assert lost_ranks(error) is None
