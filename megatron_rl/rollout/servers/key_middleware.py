"""Runs inside vLLM: middleware that asks for the key on every route. It imports nothing of this
package.

``--middleware megatron_rl.rollout.servers.key_middleware.KeyMiddleware`` puts it before all routes.
vLLM's own ``--api-key`` guards only the routes under /v1, /v2, /inference and /cohere (0.32). It
does not guard the routes of VLLM_SERVER_DEV_MODE, which change weights, call methods of the workers
and abort answers.
"""

from __future__ import annotations

import hmac
import os
from typing import Any, Awaitable, Callable

#: The same as in `keys.py`.
KEY_VARIABLE = "MEGATRON_RL_SERVER_KEY"


class KeyMiddleware:
    """ASGI middleware. A server without a key in its environment does not start."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set; expected the key of this server")
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        """Answer 401 to a request without the key, and close a web socket without it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(given) == 1 and hmac.compare_digest(given[0], self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b'{"error": "the key of this server is missing or another"}'
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})
