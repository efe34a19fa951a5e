"""An exchange with a server ends in time and in bounded memory, whatever the server sends."""

import gzip
import itertools
import json
import threading
import tracemalloc

import numpy as np
import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers import pool as pool_module
from megatron_rl.rollout.servers import process
from megatron_rl.rollout.servers.answer_checks import check_answers
from megatron_rl.rollout.servers.api import BadAnswer, Call, NoAnswer
from megatron_rl.rollout.servers.exchange import ask_once, parse_json
from megatron_rl.rollout.servers.pool import Request, ServerPool
from megatron_rl.rollout.servers.vllm import VllmApi
from tests.support.fake_server import FakeServer, toy_model, wait_for
from tests.support.raw_server import RawServer, response, sending, silence

GOOD = b'{"results": ["ok"]}'
MIB = 1 << 20


def ask(behaviour, seconds=60.0, key=None):
    """The body of a response, and the server."""
    with RawServer(behaviour) as server:
        call = Call("/collective_rpc", {"method": "load", "args": []})
        return ask_once(server.url, call, key=key, seconds=seconds), server


def refusal(behaviour, seconds=60.0):
    """The message of a `BadAnswer`, and the server."""
    with RawServer(behaviour) as server:
        with pytest.raises(BadAnswer) as error:
            ask_once(server.url, Call("/collective_rpc", {}), key=None, seconds=seconds)
        return str(error.value), server


def byte_by_byte(data, from_byte):
    """Sends the beginning at once, and then a byte every 0.2 s."""
    return sending([data[:from_byte], *(bytes([b]) for b in data[from_byte:])], pause=0.2)


def chunked(parts):
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for part in parts:
        yield b"%x\r\n%s\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


def test_a_response_comes_back_and_only_its_key_is_sent():
    body, server = ask(sending([response(GOOD)]))
    assert body == GOOD and parse_json(body) == {"results": ["ok"]}
    (request,) = server.asked
    head = request.lower()
    assert head.startswith(b"post /collective_rpc http/1.1\r\n")
    assert b"accept-encoding: identity\r\n" in head and b"authorization" not in head
    assert request.endswith(b'{"method":"load","args":[]}')
    body, server = ask(sending(chunked([GOOD[:5], GOOD[5:]])), key="Secret-1")
    assert body == GOOD and b"authorization: bearer secret-1\r\n" in server.asked[0].lower()


WHOLE = response(GOOD, "Content-Type: application/json")


@pytest.mark.parametrize(
    "behaviour",
    [
        silence,
        byte_by_byte(WHOLE, 0),
        byte_by_byte(WHOLE, 20),
        byte_by_byte(WHOLE, WHOLE.index(b"\r\n\r\n") + 4),
        sending(itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), pause=0.05),
        sending([b"HTTP/1.1 500 No\r\nContent-Length: 100\r\n\r\n", *[b"x"] * 100], pause=0.2),
    ],
    ids=["silent", "status line", "headers", "body", "interim responses", "refusal"],
)
def test_the_deadline_is_of_the_whole_exchange(behaviour):
    """Each byte comes soon enough for a timeout of a single read."""
    said, _ = refusal(behaviour, seconds=0.7)
    assert said == "/collective_rpc was not answered in full within 0.7 s"


def test_a_server_that_drips_is_not_waited_for(monkeypatch):
    """The other server answers every request, some at the second try."""
    monkeypatch.setattr(pool_module, "LONGEST_BACKOFF_S", 0.1)
    prompts = [Prompt(i, np.array([i, 2]), "", {}) for i in range(4)]
    settings, api, told = SamplingSettings(2, 5), VllmApi("load"), []

    def request(prompt):
        def read(payload):
            check_answers(api.read_answers(payload), prompt, settings, (1,), 16, ["default"])
            return prompt.index

        return Request(api.generate_call(prompt, settings, prompt.index, (1,)), read)

    with RawServer(byte_by_byte(WHOLE, 0)) as slow, FakeServer(toy_model()) as good:
        urls = [slow.url, good.url]
        pool = ServerPool(urls, in_flight=2, deadline_s=1.0, retries=1000, warn=told.append)
        assert pool.ask([request(prompt) for prompt in prompts]) == [0, 1, 2, 3]
        assert len(slow.asked) >= 1 and pool.take_failures() >= 1
        with pytest.raises(NoAnswer, match="/inference/v1/generate was not answered in full wit"):
            pool.ask_one(slow.url, request(prompts[0]))  # as weights are sent, and probed
    late = [line for line in told if line.startswith(f"rollout server {slow.url}")]
    assert late and all("not answered in full within 1 s; asking again" in line for line in late)


def test_a_health_check_has_a_deadline_too(tmp_path, monkeypatch):
    server = process.ServerProcess("127.0.0.1", tmp_path / "log")
    monkeypatch.setattr(process.ServerProcess, "is_running", True)
    with RawServer(byte_by_byte(WHOLE, 0)) as dripping:
        server.url = dripping.url
        with monkeypatch.context() as impatient:
            impatient.setattr(process, "HEALTH_S", 0.5)
            assert not server.is_ready
    with RawServer(sending([response(b"")])) as well:
        server.url = well.url
        assert server.is_ready
        assert f"authorization: bearer {server.key}".encode().lower() in well.asked[0].lower()


@pytest.mark.parametrize("on", ["ask", "ask_one"])
def test_a_pool_that_is_closed_does_not_wait_for_its_servers(on):
    ended = []
    with RawServer(silence) as server:
        pool = ServerPool([server.url], in_flight=1, deadline_s=600.0, retries=0, warn=print)
        request = Request(Call("/pause", {}), lambda payload: None)

        def wait():
            with pytest.raises(RunFailed, match="the rollout servers are not asked any more"):
                pool.ask([request]) if on == "ask" else pool.ask_one(server.url, request)
            ended.append(True)

        asking = threading.Thread(target=wait, daemon=True)
        asking.start()
        wait_for(lambda: server.asked)
        pool.close()
        asking.join(30.0)
        assert ended == [True]
        with pytest.raises(RunFailed, match="not asked any more"):
            pool.ask_one(server.url, request)


def peak_of(function):
    """What the function returns, and by how many bytes Python's memory grew at most."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        return function(), tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_gigabyte_is_not_read():
    part = bytes(MIB)
    sent = []

    def parts():
        for data in chunked(itertools.repeat(part, 1024)):
            sent.append(len(data))
            yield data

    (said, server), peak = peak_of(lambda: refusal(sending(parts())))
    assert said == (
        "/collective_rpc answered more than 1,048,576 bytes, which is more than it can be"
    )
    wait_for(lambda: server.hung_up == 1)
    assert sum(sent) < 64 * MIB and peak < 24 * MIB


def test_a_length_that_is_too_large_is_refused_before_a_byte_is_read():
    for length in (2 * MIB, 10**17, 10**19):
        said, _ = refusal(sending([response(b"", f"Content-Length: {length}")]))
        assert "answered more than 1,048,576 bytes" in said


def test_nothing_is_unpacked():
    bomb = gzip.compress(bytes(64 * MIB))
    assert len(bomb) < MIB
    answers = [
        response(bomb, "Content-Encoding: gzip"),
        response(GOOD, "Content-Encoding: br"),
        response(bomb, "Content-Encoding: identity, gzip"),
    ]
    for answer, name in zip(answers, ("gzip", "br", "identity, gzip"), strict=True):
        (said, _), peak = peak_of(lambda answer=answer: refusal(sending([answer])))
        assert said == f"/collective_rpc answered packed as '{name}'; expected it plain"
        assert peak < 24 * MIB
    body, _ = ask(sending([response(GOOD, "Content-Encoding: identity")]))
    assert body == GOOD
    with pytest.raises(BadAnswer, match="no JSON"):  # gzip is not detected from the bytes
        parse_json(ask(sending([response(bomb[:1000])]))[0])


def test_a_redirection_is_no_success_and_is_not_followed():
    """Else a server that redirects a change of weights would seem to have made it."""
    with RawServer(sending([response(GOOD)])) as other:
        for status in ("301 Moved", "302 Found", "307 Temporary", "308 Permanent", "304 Same"):
            answer = response(b"", f"Location: {other.url}/collective_rpc", status=status)
            said, _ = refusal(sending([answer]))
            assert said.startswith(f"/collective_rpc answered {status[:3]}: ")
        assert other.asked == []


def test_what_a_server_says_cannot_command_a_terminal():
    text = "\x1b[2J\x07\u202eno\r\nmegatron-rl: all is well " + "x" * 5000
    said, _ = refusal(sending([response(text.encode(), status="500 No")]))
    assert said.startswith("/collective_rpc answered 500: ?[2J??no megatron-rl: all is well xxx")
    assert said.isprintable() and len(said) < 400


BIG = b"X-A: " + b"a" * (1 << 20) + b"\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"junk\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"HTTP/1.1 99999 OK\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n{}",
        b"HTTP/1.1 200 \xff\xfe\0\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
        OK + b"Content-Length: -1\r\n\r\n{}",
        OK + b"Content-Length: \xb2\r\n\r\n{}",
        OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        OK + b"Content-Length: 50\r\n\r\n{}",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 5000 + b"\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2;" + b"a" * (1 << 20) + b"\r\n{}\r\n0\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + BIG + b"\r\n",
        OK + BIG + b"Content-Length: 2\r\n\r\n{}",
        OK + b"X-A: a\r\n" * 200_000 + b"Content-Length: 2\r\n\r\n{}",
        OK + b"no colon\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"X\0A: b\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_what_is_no_response_is_no_answer(data):
    said, _ = refusal(sending([data]))
    assert said.startswith("/collective_rpc") and said.isprintable() and len(said) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 300 + b"]" * 300,
        b"9" * 5000,
        b'{"choices": ' + b"9" * 100_000 + b"}",
        b"NaN",
        b"[Infinity]",
        b'{"a": -Infinity}',
        b"\xff\xfe\x00",
        b'"\xed\xa0\x80"',
        b'"\\ud800"',
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"{'a': 1}",
        b"[1,]",
        b"nul",
        b"\x1f\x8b\x08",
        b" ",
    ],
)
def test_what_is_no_json_is_no_answer(data):
    with pytest.raises(BadAnswer, match="^no JSON ") as error:
        parse_json(data)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("one", [b"[],", b'{"a":1},', b"[[[]]],"])
def test_a_text_does_not_become_twenty_times_as_large(one):
    text = b"[" + one * (MIB // len(one)) + b"0]"

    def read():
        with pytest.raises(BadAnswer, match="no JSON of an answer: over 16,384 lists, objects"):
            parse_json(text)

    assert peak_of(read)[1] < MIB
    entries = [[-1.5, 3, None]] * 16_000  # as many as allowed are read
    assert len(parse_json(json.dumps(entries).encode())) == 16_000


def test_json_is_read():
    assert parse_json(b'{"a": [1, -2.5, null, true, "\\u00e4\xc3\xa4"]}') == {
        "a": [1, -2.5, None, True, "ää"]
    }
    assert parse_json(b"") is None  # some calls have an empty response


def test_a_server_that_is_not_there_is_no_answer():
    with RawServer(silence) as gone:
        url = gone.url
    with pytest.raises(NoAnswer, match="/health: ConnectError"):
        ask_once(url, Call("/health", None), key=None, seconds=30.0)
