"""vLLM's own weight transfer: its calls in order, and every weight bit for bit."""

import pytest
import torch

from megatron_rl.rollout.daemon_thread import in_daemon_thread
from megatron_rl.rollout.servers import broadcast
from megatron_rl.rollout.servers.api import BadAnswer, NoAnswer
from megatron_rl.rollout.servers.broadcast import WeightBroadcast
from megatron_rl.rollout.servers.channel import FAILURES
from megatron_rl.rollout.servers.pool import Request, ServerPool
from megatron_rl.rollout.servers.transfer import PACKED_BYTES, TransferChannel, offers_transfer
from megatron_rl.rollout.servers.vllm import VllmApi
from tests.support.fake_server import FakeServer, toy_model
from tests.support.weight_transfer import GlooLink, Receiver

API = VllmApi("load")
START, UPDATE, FINISH = "/start_weight_update", "/update_weights", "/finish_weight_update"


@pytest.fixture
def servers():
    with FakeServer(toy_model()) as one, FakeServer(toy_model()) as other:
        one.transfer, other.transfer = Receiver(), Receiver()
        yield one, other


def asking(server):
    pool = ServerPool([server.url], in_flight=1, deadline_s=60.0, retries=0, warn=print)
    return lambda call, read: pool.ask_one(server.url, Request(call, read))


def joined(*servers):
    sender = WeightBroadcast(API, torch.device("cpu"), 60.0, GlooLink)
    for server in servers:
        sender.join(server.url, asking(server))
    return sender


def weights(count=7):
    generator = torch.Generator().manual_seed(2)
    kinds = [torch.float32, torch.bfloat16]
    return [
        (f"w.{i}", torch.randn(3, i + 1, generator=generator).to(kinds[i % 2]))
        for i in range(count)
    ]


def same(found, wanted):
    assert list(found) == [name for name, _ in wanted]
    for name, tensor in wanted:
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_all_weights_arrive_in_batches_and_again_with_the_next_update(servers, monkeypatch):
    monkeypatch.setattr(broadcast, "BATCH_BYTES", 60)
    sender = joined(*servers)
    for count in (7, 4):
        assert sender.send(iter(weights(count)), [server.url for server in servers]) == {}
        for server in servers:
            same(server.transfer.weights, weights(count))
    asked = servers[0].transfer.asked
    # the first call has a malformed id: it asks whether there is a transfer
    assert asked[:3] == ["/init_weight_transfer_engine", "/get_world_size", asked[0]]
    first = asked[3 : asked.index(FINISH) + 1]
    assert first == [START, *[UPDATE] * (len(first) - 2), FINISH] and len(first) > 4
    assert asked.count("/get_world_size") == 1


@pytest.mark.parametrize("route", [START, FINISH])
def test_a_server_that_refuses_is_named_and_joins_anew(servers, route):
    sender = joined(*servers)
    urls = [server.url for server in servers]
    servers[0].transfer.refuses = route
    failures = sender.send(iter(weights()), urls)
    assert list(failures) == urls[:1] and "BadAnswer /" in failures[urls[0]]
    assert "_weight_update answered 500" in failures[urls[0]]
    same(servers[1].transfer.weights, weights())
    servers[0].transfer.refuses = ""
    for server in servers:
        sender.join(server.url, asking(server))
    assert sender.send(iter(weights()), urls) == {}
    same(servers[0].transfer.weights, weights())


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("NCCL error"), "^NCCL error$"),
        (AttributeError("no nccl"), "^AttributeError: no nccl$"),
        (ImportError("libnccl"), "^ImportError: libnccl$"),
    ],
)
def test_what_this_end_raises_concerns_one_server(error, shown):
    """Raised as it is, an error that no server is left out for would end the rank that sends, and
    the others would wait for it.
    """

    def fails():
        raise error

    channel = object.__new__(TransferChannel)
    channel._seconds = 60.0
    with pytest.raises(FAILURES, match=shown):
        channel._finish(in_daemon_thread(fails, name="weights"))
    channel._finish(in_daemon_thread(lambda: None, name="weights"))


def test_a_server_says_whether_it_has_a_transfer(servers):
    assert offers_transfer(API, asking(servers[0]))
    assert servers[0].transfer.asked == ["/init_weight_transfer_engine"]
    servers[0].transfer = None  # started without --weight-transfer-config
    assert not offers_transfer(API, asking(servers[0]))
    servers[0].close()
    with pytest.raises(NoAnswer, match="ConnectError"):
        offers_transfer(API, asking(servers[0]))


def test_a_batch_is_what_the_workers_take_for_one_broadcast():
    assert broadcast.BATCH_BYTES == PACKED_BYTES


def test_a_count_that_is_none_is_refused():
    assert API.read_world_size({"world_size": 4}) == 4
    for payload in (None, {}, {"world_size": "many"}):
        with pytest.raises(BadAnswer, match="not a response of /get_world_size"):
            API.read_world_size(payload)
