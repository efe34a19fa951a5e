"""One exchange with a server: send a call and read its response, within one deadline and in bounded
memory.

Whatever a server does, the only exception is `BadAnswer`. The response is read below httpx's
client. So redirects are not followed, cookies are not kept and bodies are not unpacked.
"""

from __future__ import annotations

import asyncio
import functools
import json
import ssl
from typing import Any

import httpx
from pydantic_core import from_json

from megatron_rl.errors import one_line
from megatron_rl.rollout.servers.api import CONTROL_BYTES, BadAnswer, Call, NoAnswer

#: Seconds to connect. This side may be the slow one: while it trains, its threads can be seconds
#: late.
CONNECT_S = 15.0
#: A response may have one list or object for this many of the bytes that it may have. A token may
#: take 512 bytes and has one to three of them.
_BYTES_OF_ONE = 64
#: Bytes read of a response that is an error, and characters shown of it.
REFUSAL_BYTES, SHOWN_CHARACTERS = 4096, 300


def open_transport() -> httpx.AsyncHTTPTransport:
    """A transport that connects to servers without a proxy. The caller closes it."""
    return httpx.AsyncHTTPTransport(
        verify=_certificates(),
        # A new connection for each request. Servers close one that is idle for 5 s, and a request
        # sent at that moment is lost.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


async def exchange(
    transport: httpx.AsyncHTTPTransport,
    url: str,
    call: Call,
    *,
    key: str | None,
    seconds: float,
    most_bytes: int = CONTROL_BYTES,
) -> bytes:
    """The body of the response.

    Args:
        transport: of this event loop.
        url: of the server.
        call: what is asked.
        key: sent as a bearer token; None: no token is sent.
        seconds: deadline, from the first attempt to connect to the last byte.
        most_bytes: largest body.

    Raises:
        NoAnswer: the response is late or incomplete. BadAnswer: it is an error, packed or too
            large.
    """
    try:
        return await asyncio.wait_for(_exchange(transport, url, call, key, most_bytes), seconds)
    except asyncio.TimeoutError:
        raise NoAnswer(f"{call.path} was not answered in full within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
        raise NoAnswer(f"{call.path}: {short_line(one_line(error))}") from error


def ask_once(url: str, call: Call, *, key: str | None, seconds: float) -> bytes:
    """`exchange` in a thread without an event loop."""

    async def ask() -> bytes:
        async with open_transport() as transport:
            return await exchange(transport, url, call, key=key, seconds=seconds)

    return asyncio.run(ask())


def parse_json(data: bytes, most_bytes: int = CONTROL_BYTES) -> Any:
    """The value of a JSON text; None for an empty text.

    Three bytes of JSON can become a list or an object of 60 to 240 bytes. So their number is
    limited to what a response of ``most_bytes`` can need. JSON is nested at most 200 deep.

    pydantic's reader takes a fifth of the time of `config.json_text`. Answers are most of what a
    run reads.

    Raises:
        BadAnswer: the text is not JSON, holds NaN or an infinity, or exceeds a limit.
    """
    if data.count(b"[") + data.count(b"{") > most_bytes // _BYTES_OF_ONE:
        raise BadAnswer(
            f"no JSON of an answer: over {most_bytes // _BYTES_OF_ONE:,} lists, objects"
        )
    try:
        return from_json(data, allow_inf_nan=False) if data else None
    except ValueError as error:
        raise BadAnswer(f"no JSON ({error}): {short_line(_text(data[:80]))!r}") from error


def short_line(text: str) -> str:
    """A server's text for a message: one short line of printable characters, since a terminal would
    obey others.
    """
    line = " ".join(text[: 4 * SHOWN_CHARACTERS].split())[:SHOWN_CHARACTERS]
    return "".join(c if c.isprintable() else "?" for c in line)


async def _exchange(
    transport: httpx.AsyncHTTPTransport, url: str, call: Call, key: str | None, most_bytes: int
) -> bytes:
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    content = None
    if call.body is not None:
        headers["Content-Type"] = "application/json"
        content = json.dumps(call.body, separators=(",", ":")).encode()
    request = httpx.Request(
        "POST" if content is not None else "GET",
        url + call.path,
        headers=headers,
        content=content,
        extensions={"timeout": {"connect": CONNECT_S}},
    )
    response = await transport.handle_async_request(request)
    try:
        if response.status_code not in range(200, 300):
            text = short_line(_text(await _read(response, REFUSAL_BYTES, cut=True)))
            raise BadAnswer(f"{call.path} answered {response.status_code}: {text}")
        packed = response.headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            raise BadAnswer(
                f"{call.path} answered packed as {short_line(packed)!r}; expected it plain"
            )
        return await _read(response, most_bytes)
    except _TooLarge:
        raise BadAnswer(
            f"{call.path} answered more than {most_bytes:,} bytes, which is more than it can be"
        ) from None
    finally:
        await response.aclose()


class _TooLarge(Exception):
    """A body is larger than allowed."""


async def _read(response: httpx.Response, most_bytes: int, cut: bool = False) -> bytes:
    """The body. If it is too large: its beginning with ``cut``, else `_TooLarge`."""
    length = response.headers.get("Content-Length", "")
    if not cut and length.isdecimal() and (len(length) > 18 or int(length) > most_bytes):
        raise _TooLarge
    body = bytearray()
    assert isinstance(response.stream, httpx.AsyncByteStream), "the transport is asynchronous"
    async for part in response.stream:
        body += part
        if len(body) > most_bytes:
            if cut:
                break
            raise _TooLarge
    return bytes(body[:most_bytes])


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The certificates that https servers are checked with. Cached: to read them takes longer than
    most exchanges.
    """
    return httpx.create_ssl_context(trust_env=False)
