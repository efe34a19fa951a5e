"""Every request is answered once, whatever the servers do."""

import threading
import time

import numpy as np
import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.answer_checks import check_answers
from megatron_rl.rollout.servers.api import NoAnswer
from megatron_rl.rollout.servers.pool import Request, ServerPool
from megatron_rl.rollout.servers.vllm import VllmApi
from tests.support import raw_server
from tests.support.fake_server import FakeServer, toy_model, wait_for

API, SETTINGS, STOPS, VOCABULARY = VllmApi("load"), SamplingSettings(2, 5), (1,), 16
COUNT = 40


@pytest.fixture
def servers():
    with FakeServer(toy_model()) as one, FakeServer(toy_model()) as other:
        yield one, other


@pytest.fixture
def told():
    return []


def make_pool(servers, told, **settings):
    settings = {"in_flight": 4, "deadline_s": 60.0, "retries": 3, **settings}
    return ServerPool([server.url for server in servers], warn=told.append, **settings)


def requests(count=COUNT, version="default"):
    """A request for each prompt [i, 2]; its result names i."""

    def read(prompt):
        def answers(payload):
            found = API.read_answers(payload)
            check_answers(found, prompt, SETTINGS, STOPS, VOCABULARY, [version])
            return prompt.index, [answer.tokens.tolist() for answer in found]

        return answers

    prompts = [Prompt(i, np.array([i, 2]), "", {}) for i in range(count)]
    return [Request(API.generate_call(p, SETTINGS, p.index, STOPS), read(p)) for p in prompts]


@pytest.fixture(scope="module")
def expected():
    """The answers of a server without faults."""
    with FakeServer(toy_model()) as server:
        return make_pool([server], []).ask(requests())


def test_all_answers_come_back_in_order_and_both_servers_work(servers, told, expected):
    counts = []
    assert make_pool(servers, told).ask(requests(), counts.append) == expected
    assert [index for index, _ in expected] == list(range(COUNT))
    assert counts == list(range(1, COUNT + 1))
    assert sum(server.answered for server in servers) == COUNT
    # each server gets all the requests that may be open before any answer comes
    assert min(server.answered for server in servers) >= 4
    assert told == []


@pytest.mark.parametrize("fault", ["garbage", "vocabulary", "error", "stale"])
def test_what_one_server_answers_wrongly_the_other_answers(servers, told, expected, fault):
    servers[0].fault = fault
    version = "3" if fault == "stale" else "default"
    servers[0].version = servers[1].version = version
    pool = make_pool(servers, told)
    assert pool.ask(requests(version=version)) == expected
    failures = len(servers[0].asked)
    assert pool.take_failures() == len(told) == failures > 0
    assert pool.take_failures() == 0
    assert all(line.startswith(f"rollout server {servers[0].url}: BadAnswer") for line in told)
    assert len(servers[1].asked) == COUNT


def whole(**changes):
    return lambda choice: {**choice, **changes}


def with_token(token):
    return lambda choice: {**choice, "token_ids": [token, *choice["token_ids"][1:]]}


def with_logprob(logprob):
    def spoil(choice):
        first, *rest = choice["logprobs"]["content"]
        return {**choice, "logprobs": {"content": [{**first, "logprob": logprob}, *rest]}}

    return spoil


def runs_on(choice):
    """Further tokens behind the stop token 1."""
    tokens = [1, *choice["token_ids"][1:], 2][:5]
    content = [{"token_id": token, "logprob": -1.0} for token in tokens]
    spans = [{"version": "default", "start": 0, "end": len(tokens)}]
    return {**choice, "token_ids": tokens, "logprobs": {"content": content}} | {
        "weight_versions": spans
    }


def cut_short(choice):
    """One token, which is not a stop token."""
    logprobs = {"content": [{"token_id": 2, "logprob": -1.0}]}
    spans = [{"version": "default", "start": 0, "end": 1}]
    return {**choice, "token_ids": [2], "logprobs": logprobs, "weight_versions": spans} | {
        "finish_reason": "length"
    }


@pytest.mark.parametrize(
    "spoil",
    [
        with_token(1.7),
        with_token(True),
        with_token("2"),
        with_token(-1),
        with_logprob(-1e30),
        with_logprob(-9999.0),
        with_logprob(0.5),
        with_logprob(True),
        whole(weight_versions=None),
        whole(weight_versions=[]),
        whole(finish_reason=None),
        whole(finish_reason="error"),
        whole(logprobs=None),
        runs_on,
        cut_short,
        lambda choice: cut_short(choice) | {"finish_reason": "stop"},
        lambda choice: {**choice, "index": 0},
        lambda choice: [choice],
    ],
)
def test_what_could_not_have_been_sampled_is_asked_again(servers, told, expected, spoil):
    servers[0].spoil = spoil
    pool = make_pool(servers, told)
    assert pool.ask(requests()) == expected
    assert pool.take_failures() == len(servers[0].asked) == len(told) > 0
    assert len(servers[1].asked) == COUNT


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"choices": [' * 2000 + b"]}" * 2000,
        b'{"choices": ' + b"9" * 5000 + b"}",
        b'{"choices": [{"index": Infinity}]}',
        b'{"choices": [{"index": 1e999, "token_ids": [NaN]}]}',
        b'{"choices": "\xff\xfe"}',
        b"\0" * 100_000,
        b"null",
        b"",
        b"[]",
        b'{"choices": {"index": 0}}',
    ],
    ids=range(11),
)
def test_no_body_ends_the_run(servers, told, expected, body):
    hostile = raw_server.response(body, "Content-Type: application/json; charset=punycode")
    with raw_server.RawServer(raw_server.sending([hostile])) as other:
        pool = make_pool([other, servers[1]], told)
        assert pool.ask(requests()) == expected
        assert pool.take_failures() == len(other.asked) > 0
        assert all("BadAnswer" in line and line.isprintable() for line in told)


def test_a_server_that_dies_in_the_middle_loses_nothing(servers, told, expected):
    servers[0].dies_after = 3
    pool = make_pool(servers, told)
    assert pool.ask(requests()) == expected
    assert (servers[0].answered, servers[1].answered) == (3, COUNT - 3)
    assert pool.take_failures() > 0


def test_a_server_that_hangs_is_waited_for_until_the_deadline_only(servers, told, expected):
    servers[0].fault = "hang"
    pool = make_pool(servers, told, deadline_s=2.0, retries=1000)
    assert pool.ask(requests()) == expected
    late = "/inference/v1/generate was not answered in full within 2 s"
    assert any(servers[0].url in line and late in line for line in told)


def test_no_request_is_sent_on_a_connection_that_its_server_is_closing(servers, told, expected):
    for server in servers:
        server.fault = "impatient"
    assert make_pool(servers, told).ask(requests()) == expected
    assert told == []


def test_a_slow_server_gets_fewer_requests(servers, told, expected):
    """The first server answers only when the second has answered all other requests."""
    servers[0].before_answer = lambda: wait_for(lambda: servers[1].answered == COUNT - 2)
    assert make_pool(servers, told, in_flight=2, deadline_s=200.0).ask(requests()) == expected
    assert (len(servers[0].asked), len(servers[1].asked)) == (2, COUNT - 2)
    assert told == []


def test_no_more_requests_are_open_than_allowed(servers, told):
    may_answer = threading.Event()
    for server in servers:
        server.before_answer = lambda: may_answer.wait(100.0)
    pool = make_pool(servers, told, in_flight=3, deadline_s=200.0)
    asking = threading.Thread(target=lambda: pool.ask(requests(12)))
    asking.start()
    wait_for(lambda: len(servers[0].asked) == len(servers[1].asked) == 3)
    time.sleep(0.2)  # time for further requests to arrive
    assert len(servers[0].asked) == len(servers[1].asked) == 3
    may_answer.set()
    asking.join()
    assert servers[0].answered + servers[1].answered == 12 and told == []


def test_a_server_that_comes_back_is_asked_again(servers, told, expected):
    gone = servers[0]
    gone.close()
    pool = make_pool([gone], told, deadline_s=90.0, retries=50)
    came_back = []

    def return_later():
        wait_for(lambda: any("can be asked" in line for line in told))
        came_back.append(FakeServer(toy_model(), port=gone.port))

    thread = threading.Thread(target=return_later)
    thread.start()
    try:
        assert pool.ask(requests()) == expected
    finally:
        thread.join()
        came_back[0].close()
    assert "no rollout server can be asked; waiting up to 90 s" in told


def test_the_owner_may_bring_a_server_back(servers, told, expected):
    gone, back = servers[0], []
    gone.close()

    def revive():
        if not back:
            back.append(FakeServer(toy_model(), port=gone.port))

    pool = make_pool([gone], told, retries=50, revive=revive)
    assert pool.ask(requests()) == expected
    back[0].close()


def test_when_no_server_comes_back_the_run_ends_with_one_line(servers, told):
    for server in servers:
        server.close()
    with pytest.raises(RunFailed, match="no rollout server could be asked for 1 s; expected one"):
        make_pool(servers, told, deadline_s=1.0, retries=1000).ask(requests())


def test_a_request_nobody_answers_well_ends_the_run_at_once(servers, told):
    for server in servers:
        server.fault = "garbage"
    with pytest.raises(RunFailed, match="gave a good answer in 2 tries; last http://127.0.0.1:"):
        make_pool(servers, told, retries=1).ask(requests())
    # it does not wait for a server that hangs
    servers[1].fault = "hang"
    told.clear()
    with pytest.raises(RunFailed):
        make_pool(servers, told, retries=0, deadline_s=50.0).ask(requests())
    assert told and not any("not answered" in line for line in told)


def test_a_closed_pool_stops_asking(servers, told):
    for server in servers:
        server.fault = "error"
    pool = make_pool(servers, told, retries=10**6, deadline_s=100.0)
    ended = []

    def ask():
        with pytest.raises(RunFailed, match="not asked any more"):
            pool.ask(requests())
        ended.append(True)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(lambda: len(told) > 3)
    pool.close()
    asking.join(60.0)
    assert ended == [True]


def test_excluded_servers_are_not_asked_until_they_are_admitted(servers, told, expected):
    pool = make_pool(servers, told)
    pool.exclude(servers[0].url, "wrong weights")
    assert pool.admitted == [servers[1].url] and len(pool.urls) == 2
    assert pool.ask(requests()) == expected
    assert servers[0].asked == []
    pool.admit(servers[0].url)
    pool.exclude(servers[1].url, "wrong weights")
    assert pool.ask(requests()) == expected
    assert len(servers[0].asked) == COUNT


def test_answers_that_are_held_count_once_it_is_known_that_they_may(servers, told, expected):
    """The first server is excluded meanwhile, so its requests go to the other."""
    pool, found = make_pool(servers, told), []
    pool.hold()
    asking = threading.Thread(target=lambda: found.append(pool.ask(requests())))
    asking.start()
    wait_for(lambda: all(server.answered for server in servers))
    assert found == []
    pool.exclude(servers[0].url, "wrong weights")
    pool.release()
    asking.join(30.0)
    assert found == [expected]
    assert any("BadAnswer wrong weights; asking again" in text for text in told)


def test_who_is_first_is_asked_for_first(servers, told):
    """One request at a time: the second thread's wait for all of the first's."""
    pool = make_pool(servers[:1], told, in_flight=1, deadline_s=200.0)
    both_wait = threading.Event()
    servers[0].before_answer = lambda: both_wait.wait(100.0)
    threads = [
        threading.Thread(target=pool.ask, args=(requests(12),), kwargs={"batch": batch})
        for batch in (1, 2)
    ]
    threads[0].start()
    wait_for(lambda: servers[0].asked)
    threads[1].start()
    wait_for(lambda: len(pool._waiting) == 2)
    both_wait.set()
    for thread in threads:
        thread.join(60.0)
    seeds = [body["sampling_params"]["seed"] for body in servers[0].asked]
    assert sorted(seeds[:12]) == sorted(seeds[12:]) == list(range(12)) and told == []


def test_one_server_is_asked_once(servers, told):
    pool = make_pool(servers, told)
    (request,) = requests(1)
    assert pool.ask_one(servers[1].url, request)[0] == 0
    servers[1].close()
    with pytest.raises(NoAnswer, match="/inference/v1/generate: ConnectError"):
        pool.ask_one(servers[1].url, request)
    assert servers[0].asked == []
