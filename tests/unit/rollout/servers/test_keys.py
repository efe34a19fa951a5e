"""Keys of servers, and the addresses they listen on."""

import asyncio
import dataclasses
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.device.launch import Launch
from megatron_rl.errors import UserError
from megatron_rl.rollout.servers import addresses, extension, guard, key_middleware, sglang_launcher
from megatron_rl.rollout.servers.addresses import as_url, listening, own_address
from megatron_rl.rollout.servers.api import BadAnswer, Call
from megatron_rl.rollout.servers.exchange import ask_once
from megatron_rl.rollout.servers.keys import (
    KEY_VARIABLE,
    check_key,
    given_key,
    new_key,
)
from megatron_rl.rollout.servers.pool import Request, ServerPool
from megatron_rl.tasks.build import _meeting
from tests.support.fake_server import FakeServer, toy_model


def asking(*urls, engine="vllm"):
    return Config(rollout={"engine": engine, "servers": {"urls": urls}})


def test_keys_are_long_and_of_one_run_alone():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and min(map(len, keys)) >= 43
    assert all(given_key({KEY_VARIABLE: key}) == key for key in keys)
    assert given_key({}) is None and given_key({KEY_VARIABLE: ""}) is None


@pytest.mark.parametrize("key", ["k1 k2", "k1\nHost: other", "kä", "k\x7f", " k1"])
def test_a_key_that_no_request_could_carry_is_refused_and_not_shown(key):
    with pytest.raises(UserError, match=f"^{KEY_VARIABLE} holds a space, a line break") as error:
        given_key({KEY_VARIABLE: key})
    assert key not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["http://host1:8000", "https://10.1.2.3", "http://[fe80::1]:80", "http://0.0.0.0:8000"]
    + ["http://127.0.0.1.example.org", "http://localhost.example.org"],
)
def test_servers_elsewhere_are_not_asked_without_a_key(url):
    with pytest.raises(UserError) as error:
        check_key(asking("http://localhost:1", url), {})
    said = str(error.value)
    assert said.startswith(f"rollout.servers.urls names {url}, and {KEY_VARIABLE} is not set; ")
    check_key(asking(url), {KEY_VARIABLE: "k"})


def test_servers_on_this_machine_may_have_none():
    local = ("http://127.0.0.1:1", "http://localhost:2", "http://[::1]:3", "http://127.9.9.9")
    check_key(asking(*local), {})
    check_key(Config(), {})
    with pytest.raises(UserError, match="holds a space"):
        check_key(asking(*local), {KEY_VARIABLE: "a b"})


def test_every_call_carries_the_key():
    """A server with a key answers 401 to any other."""
    with FakeServer(toy_model()) as server:
        server.key = new_key()
        call = Request(Call("/reset_prefix_cache", {}), lambda payload: payload)
        for key, allowed in ((server.key, True), (None, False), (server.key[:-1], False)):
            pool = ServerPool(
                [server.url], in_flight=1, deadline_s=60.0, retries=0, warn=print, key=key
            )
            if allowed:
                assert pool.ask([call]) == [pool.ask_one(server.url, call)]
                continue
            with pytest.raises(BadAnswer, match="/reset_prefix_cache answered 401"):
                pool.ask_one(server.url, call)


# -- the middleware of vLLM -----------------------------------------------------------------------


def guarded(monkeypatch, kind, *headers, key="Key-1"):
    """How many requests reach the application behind the middleware, and what the middleware
    sends itself."""
    monkeypatch.setenv(KEY_VARIABLE, key)
    asked, sent = [], []

    async def application(scope, receive, send):
        asked.append(scope)

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": "/collective_rpc", "method": "OPTIONS"}
    if kind != "lifespan":
        scope["headers"] = list(headers)
    asyncio.run(key_middleware.KeyMiddleware(application)(scope, None, send))
    return len(asked), sent


RIGHT = (b"authorization", b"Bearer Key-1")


def test_the_middleware_lets_those_in_who_have_the_key(monkeypatch):
    assert guarded(monkeypatch, "http", (b"host", b"x"), RIGHT) == (1, [])
    assert guarded(monkeypatch, "websocket", RIGHT) == (1, [])
    assert guarded(monkeypatch, "lifespan") == (1, [])  # the server's own start


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"Bearer Key-2")],
        [(b"authorization", b"Bearer Key-1 ")],
        [(b"authorization", b"Bearer Key-11")],
        [(b"authorization", b"bearer Key-1")],
        [(b"authorization", b"Key-1")],
        [(b"authorization", b"Bearer \xff")],
        [(b"authorization", b"Bearer Key-2"), RIGHT],
        [(b"x-authorization", b"Bearer Key-1")],
    ],
)
def test_the_middleware_keeps_all_others_out_of_every_route(monkeypatch, headers):
    asked, (start, body) = guarded(monkeypatch, "http", *headers)
    assert asked == 0 and start["status"] == 401
    assert json.loads(body["body"]) == {"error": "the key of this server is missing or another"}
    assert guarded(monkeypatch, "websocket", *headers) == (
        0,
        [{"type": "websocket.close", "code": 1008}],
    )


def test_without_a_key_a_guarded_server_does_not_start(monkeypatch):
    for key in ("", None):
        monkeypatch.setenv(KEY_VARIABLE, "") if key == "" else monkeypatch.delenv(KEY_VARIABLE)
        with pytest.raises(RuntimeError, match=f"{KEY_VARIABLE} is not set"):
            key_middleware.KeyMiddleware(None)
    assert key_middleware.KEY_VARIABLE == KEY_VARIABLE


def test_the_former_name_of_the_middleware_still_works():
    assert guard.Guard is key_middleware.KeyMiddleware


# -- SGLang ---------------------------------------------------------------------------------------


def test_a_key_is_given_inside_the_process_alone(tmp_path):
    """The file sglang.py beside `sglang_launcher.py` does not hide the package sglang."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "launch_server.py").write_text(
        "import json, sys\n"
        "words = open('/proc/self/cmdline').read().split('\\0')\n"
        "print(json.dumps([__name__, sys.argv[1:], words]))\n"
    )
    argv = [sys.executable, sglang_launcher.__file__, "sglang.launch_server", "--port", "1"]
    environment = {**os.environ, KEY_VARIABLE: "Key-1"}
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, check=True)
    name, arguments, seen = json.loads(done.stdout)
    assert name == "__main__" and arguments == ["--port", "1", "--api-key", "Key-1"]
    assert "--port" in seen and "Key-1" not in " ".join(seen)


# -- where servers listen -------------------------------------------------------------------------


def named(monkeypatch, *addresses):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)


def test_the_address_is_one_that_others_reach(monkeypatch):
    monkeypatch.setattr(addresses, "_is_ours", lambda a: a != "10.0.0.9")
    named(monkeypatch, "127.0.1.1", "10.0.0.9", "10.0.0.1")
    assert own_address("node0") == "10.0.0.1"
    named(monkeypatch, "127.0.0.1")
    assert own_address("localhost") == own_address("127.0.0.1") == "127.0.0.1"
    named(monkeypatch, "127.0.1.1", "127.0.1.1")  # as /etc/hosts has it on Debian
    with pytest.raises(UserError, match="^the address node0 where the ranks meet means 127.0.1.1"):
        own_address("node0")
    named(monkeypatch, "10.0.0.9")
    with pytest.raises(UserError, match="means 10.0.0.9 here; expected one of this machine"):
        own_address("node1")


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="^the address nobody.invalid where the ranks meet is not"):
        own_address("nobody.invalid")


def test_ranks_on_other_machines_reach_rank_0_where_they_have_met():
    launch = Launch(0, 4, 0, 4, True, ("node0", 29500))
    assert _meeting(launch) is None
    assert _meeting(dataclasses.replace(launch, local_world_size=2)) == "node0"
    assert _meeting(Launch(0, 1, 0, 1, False)) is None


def test_urls_of_addresses():
    assert as_url("10.0.0.1", 80) == "http://10.0.0.1:80"
    assert as_url("fd00::1", 80) == "http://[fd00::1]:80"


def listeners(port):
    """The addresses that this machine listens on at a port, from the kernel."""
    found = []
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(file).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, in_hex = local.split(":")
            if int(in_hex, 16) == port and state == "0A":
                found.append(address)
    return found


def test_what_listens_does_so_on_one_address():
    with listening("127.0.0.1") as server:
        assert listeners(server.getsockname()[1]) == ["0100007F"]


def test_the_store_of_a_broadcast_listens_on_one_address():
    store = extension.open_store("127.0.0.1", timedelta(seconds=30))
    assert listeners(store.port) == ["0100007F"]
    store.set("key", "value")
    other = extension.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    assert other.get("key") == b"value"


def test_health_is_asked_with_the_key():
    with FakeServer(toy_model()) as server:
        server.key = "Key-1"
        with pytest.raises(BadAnswer, match="/health answered 401"):
            ask_once(server.url, Call("/health", None), key=None, seconds=60.0)
        ask_once(server.url, Call("/health", None), key="Key-1", seconds=60.0)
