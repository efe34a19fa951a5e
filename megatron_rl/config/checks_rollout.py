"""Rules of the rollout engine."""

from __future__ import annotations

import re
from typing import Callable
from urllib.parse import urlsplit

from megatron_rl.config.algorithm import anchored_on_the_sampler
from megatron_rl.config.rollout import (
    engine_of,
    engine_settings,
    engines_with,
    environment_settings,
    truncates,
)
from megatron_rl.config.schema import Config
from megatron_rl.config.schema_rollout import ServersConfig
from megatron_rl.config.scores import why_scored
from megatron_rl.errors import UserError


def engine_is_known(config: Config) -> None:
    """``rollout.engine`` is an engine, and ``rollout.settings`` are settings of it."""
    engine_settings(config.rollout)


def servers_are_named_or_started(config: Config) -> None:
    """A server engine has urls or starts servers; other engines do neither."""
    engine, servers = config.rollout.engine, config.rollout.servers
    if not engine_of(config.rollout).servers:
        if servers != ServersConfig():
            raise UserError(
                f"rollout.servers is set with rollout.engine {engine}; expected it left out; set "
                f"rollout.engine to {engines_with('servers')}"
            )
        return
    if bool(servers.urls) == bool(servers.start):
        raise UserError(
            f"rollout.servers.urls names {len(servers.urls)} servers and start is {servers.start}; "
            "expected one of the two; give the urls, or how many to start"
        )
    if servers.start and servers.python is None:
        raise UserError(
            "rollout.servers.start without rollout.servers.python; expected the interpreter of an "
            f"environment that has {engine} installed, beside this one"
        )


def broadcasts_reach_servers_of_others(config: Config) -> None:
    """Broadcast needs running servers: servers that a run starts read their weights from a
    directory.
    """
    rollout = config.rollout
    takes = engine_of(rollout).broadcast and not rollout.servers.start
    if rollout.servers.sync == "broadcast" and not takes:
        raise UserError(
            f"rollout.servers.sync is broadcast with rollout.engine {rollout.engine} and "
            f"rollout.servers.start {rollout.servers.start}; expected vllm servers given by "
            "rollout.servers.urls; set sync to disk"
        )


def urls_are_urls(config: Config) -> None:
    """``rollout.servers.urls`` are http addresses, each once."""
    urls = config.rollout.servers.urls
    for url in urls:
        if "@" in url:
            raise UserError(
                "rollout.servers.urls holds a user or a password; expected an address such as "
                "http://host:8000: config.yaml keeps no secrets, MEGATRON_RL_SERVER_KEY does"
            )
        if not _is_address(url):
            raise UserError(
                f"rollout.servers.urls holds {url!r}; expected an address such as http://host:8000"
            )
    if len({url.rstrip("/") for url in urls}) < len(urls):
        raise UserError("rollout.servers.urls names a server twice; expected each once")


def _is_address(url: str) -> bool:
    """Whether a text is a server's address, perhaps with a path, without characters that would
    break a request.
    """
    if not re.fullmatch(r"(?i:https?)://[!-~]+", url) or re.search(r"[?#\\]", url):
        return False
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # unclosed brackets, an invalid port
        return False
    labels = (host or "").split(".")
    return bool(host) and port != 0 and all(len(label) <= 63 for label in labels)


def servers_give_exact_logprobs(config: Config) -> None:
    """vLLM gives log-probabilities at temperature 1, or after all of its sampling settings. With
    top-p or top-k at another temperature neither is what the loss needs.
    """
    rollout = config.rollout
    if rollout.keep_sampling_mask or engine_of(rollout).tempered_cuts:
        return  # with masks they are those after all settings, as the trainer's are
    if truncates(rollout) and rollout.temperature != 1.0:
        raise UserError(
            f"rollout.temperature {rollout.temperature:g} with top_p {rollout.top_p:g} and top_k "
            f"{rollout.top_k} and rollout.engine {rollout.engine}; expected top_p 1 and top_k 0, "
            "or temperature 1: a server gives no log-probabilities for both; change one"
        )


def kept_tokens_are_returned(config: Config) -> None:
    """``rollout.keep_sampling_mask`` needs truncated sampling and an engine that says what it kept.
    Servers bound the sets by ``top_k``.
    """
    rollout = config.rollout
    if not rollout.keep_sampling_mask:
        return
    if not truncates(rollout):
        raise UserError(
            "rollout.keep_sampling_mask is true with top_p 1 and top_k 0, which keep every token; "
            "expected truncated sampling; set rollout.top_p or top_k, or keep_sampling_mask false"
        )
    engine = engine_of(rollout)
    if not engine.kept_tokens:
        raise UserError(
            f"rollout.keep_sampling_mask is true with rollout.engine {rollout.engine}, which does "
            f"not return the tokens it kept; expected {engines_with('kept_tokens')}; set "
            "rollout.engine, or keep_sampling_mask false"
        )
    if engine.servers and not rollout.top_k:
        raise UserError(
            f"rollout.keep_sampling_mask is true with rollout.engine {rollout.engine} and top_k 0; "
            "expected a top_k, without which the server returns no sets; set rollout.top_k, "
            "such as 512"
        )


def lag_is_corrected(config: Config) -> None:
    """Stale answers need an engine that works beside the trainer, and a sampler correction."""
    rollout = config.rollout
    if not rollout.lag:
        return
    if not engine_of(rollout).beside_training:
        raise UserError(
            f"rollout.lag is {rollout.lag} with rollout.engine {rollout.engine}, which does not "
            f"answer while the model trains; expected {engines_with('beside_training')}; set "
            "rollout.engine, or lag 0"
        )
    if rollout.dynamic_sampling:
        raise UserError(
            f"rollout.lag is {rollout.lag} with rollout.dynamic_sampling, which waits for rewards "
            "before it draws more; expected one of them; change one"
        )
    if config.algorithm.mismatch == "none" and not anchored_on_the_sampler(config.algorithm):
        raise UserError(
            f"rollout.lag is {rollout.lag} with algorithm.mismatch none: the answers are by older "
            "weights; expected a correction, such as tis; set algorithm.mismatch"
        )


def environment_is_known(config: Config) -> None:
    """``rollout.environment`` is an environment, with settings of it, and answers are not sampled
    ahead.
    """
    rollout = config.rollout
    environment_settings(rollout)
    if rollout.environment is not None and rollout.lag:
        raise UserError(
            f"rollout.lag is {rollout.lag} with rollout.environment, which replies when answers "
            "are taken: later turns would not be sampled ahead; expected one of them; set lag 0"
        )


def sampler_computes_what_the_trainer_computes(config: Config) -> None:
    """``rollout.scores`` sampler needs the trainer's own numbers."""
    reason = why_scored(config) if config.rollout.scores == "sampler" else None
    if reason is not None:
        raise UserError(
            f"rollout.scores is sampler with {reason}; expected the engine builtin, an fp32 model, "
            "round_weights none, no environment and not routing_replay r3; set scores to auto or "
            "pass"
        )


def rounding_is_the_built_in_engines(config: Config) -> None:
    """``rollout.round_weights`` needs weights of the engine's own, of a higher precision."""
    rounding, engine = config.rollout.round_weights, config.rollout.engine
    if rounding == "none":
        return
    if engine_of(config.rollout).name != "builtin":
        raise UserError(
            f"rollout.round_weights is {rounding} with rollout.engine {engine}; expected engine "
            "builtin; set it to none, and the precision of servers in rollout.servers.options"
        )
    if rounding == config.model.dtype:
        raise UserError(
            f"rollout.round_weights is {rounding} with model.dtype {config.model.dtype}, whose "
            "weights are rounded already; expected a lower precision; set it to fp8 or none"
        )


ROLLOUT_RULES: tuple[Callable[[Config], None], ...] = (
    engine_is_known,
    servers_are_named_or_started,
    broadcasts_reach_servers_of_others,
    urls_are_urls,
    servers_give_exact_logprobs,
    kept_tokens_are_returned,
    lag_is_corrected,
    environment_is_known,
    sampler_computes_what_the_trainer_computes,
    rounding_is_the_built_in_engines,
)
