"""The former name of `key_middleware.py`, for commands of servers that still name it."""

from megatron_rl.rollout.servers.key_middleware import KeyMiddleware as Guard

__all__ = ["Guard"]
