"""Rules of the rollout engine: one line each."""

import pytest

from megatron_rl.config.checks import check_config
from megatron_rl.config.rollout import truncation_text
from megatron_rl.config.schema import Config
from megatron_rl.config.scores import takes_sampler_scores, takes_sampler_traces
from megatron_rl.errors import UserError
from tests.support.runs import ROOT

TOOL = f"{ROOT / 'examples' / 'extend' / 'my_environment.py'}:ask_again"
OWN = f"{__file__}:own_engine"
URLS = ["http://one:8000", "https://two"]


def own_engine(parts):
    """Makes an engine that declares no traits."""


def make(engine="vllm", temperature=1.0, top_p=1.0, top_k=0, **servers):
    rollout = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    return Config(rollout={"engine": engine, "servers": servers, **rollout})


def keeping(engine="builtin", **rollout):
    servers = {"servers": {"urls": URLS}} if engine in ("vllm", "sglang") else {}
    return Config(rollout={"engine": engine, "keep_sampling_mask": True, **servers, **rollout})


def lagging(engine="vllm", mismatch="tis", loss="rspo", **rollout):
    servers = {"urls": URLS} if engine == "vllm" else {}
    return Config(
        rollout={"engine": engine, "servers": servers, **{"lag": 1, **rollout}},
        algorithm={"mismatch": mismatch, "name": loss},
    )


def scored_by(scores, model=None, algorithm=None, **rollout):
    if rollout.get("engine") == "vllm":
        rollout["servers"] = {"urls": URLS}
    return Config(
        model={"dtype": "fp32", **(model or {})},
        rollout={"scores": scores, **rollout},
        algorithm={"mini_batches": 2, **(algorithm or {})},
    )


@pytest.mark.parametrize(
    "config",
    [
        lagging(),
        scored_by("sampler"),
        scored_by("auto", model={"dtype": "bf16"}),
        scored_by("pass", engine="vllm"),
        make("builtin"),
        make(urls=URLS),
        make(urls=["HTTP://one", "http://[::1]:80", "http://10.0.0.1:8000/below/", "http://a_b:1"]),
        make(start=2, python="venv/bin/python"),
        make(urls=URLS, temperature=0.7),
        make(urls=URLS, top_p=0.9, top_k=8),
        make("builtin", temperature=0.7, top_p=0.9),
        make("sglang", urls=URLS, temperature=0.7, top_p=0.9),
        keeping(top_p=0.9),
        keeping("vllm", top_k=512, temperature=0.7),
        keeping("sglang", top_k=512, top_p=0.9),
        scored_by("auto", round_weights="bf16"),
        scored_by("pass", round_weights="fp8", model={"dtype": "bf16"}),
        make(urls=URLS, sync="broadcast"),
        lagging(lag=3),
        lagging(mismatch="none", loss="dppo_tv"),
        Config(rollout={"environment": TOOL, "environment_settings": {"word": "no, "}}),
    ],
)
def test_good_ones_pass(config):
    check_config(config, 1, "evaluate", files=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (make("builtin", urls=URLS), "rollout.servers is set with rollout.engine builtin; "),
        (make(), "rollout.servers.urls names 0 servers and start is 0; expected one of the two"),
        (
            make(urls=URLS, start=1, python="p"),
            "rollout.servers.urls names 2 servers and start is 1; expected one of the two",
        ),
        (make(start=1), "rollout.servers.start without rollout.servers.python; expected the int"),
        (make(urls=["one:8000"]), "rollout.servers.urls holds 'one:8000'; expected an address"),
        (make(urls=["ftp://one"]), "rollout.servers.urls holds 'ftp://one'; expected an address"),
        *(
            (make(urls=[url]), f"rollout.servers.urls holds {url!r}; expected an address")
            for url in (
                *("http://[::1", "http://one:99999", "http://one:-1", "http://one:0", "http://:80"),
                *("http://one:x", "http://o ne", "http://one\n", "http://ön", "http://one?a=b"),
                *(
                    "http://one#x",
                    "http://" + "a" * 64,
                    "http:\\\\one",
                    "http://one\0",
                ),
            )
        ),
        (make(urls=["http://me:secret@one"]), "rollout.servers.urls holds a user or a password;"),
        (make(urls=[URLS[0], URLS[0] + "/"]), "rollout.servers.urls names a server twice"),
        (
            make(start=1, python="p", sync="broadcast"),
            "rollout.servers.sync is broadcast with rollout.engine vllm and rollout.servers.start",
        ),
        (make("sglang", urls=URLS, sync="broadcast"), "rollout.servers.sync is broadcast with rol"),
        (lagging("builtin"), "rollout.lag is 1 with rollout.engine builtin, which does not answer"),
        (make("vlm", urls=URLS), "rollout.engine is 'vlm' (did you mean vllm?); expected one of b"),
        (
            Config(rollout={"settings": {"speed": 1}}),
            "rollout.settings.speed is no setting of the rollout engine builtin; expected n",
        ),
        (lagging(environment=TOOL), "rollout.lag is 1 with rollout.environment, which replies wh"),
        (
            Config(rollout={"environment": "no_tool"}),
            "rollout.environment is 'no_tool'; expected one of your own: my_module:thing",
        ),
        (
            Config(rollout={"environment": TOOL, "environment_settings": {"wrd": "a"}}),
            "rollout.environment_settings.wrd is no setting of the environment",
        ),
        (
            Config(rollout={"environment": TOOL.replace("ask_again", "AgainSettings")}),
            f"rollout.environment is {TOOL.replace('ask_again', 'AgainSettings')!r}, a class "
            "without __call__; expected an environment, with __call__(record, turns)",
        ),
        (lagging(mismatch="none"), "rollout.lag is 1 with algorithm.mismatch none: the answers a"),
        (scored_by("sampler", model={"dtype": "bf16"}), "rollout.scores is sampler with model.dty"),
        (scored_by("sampler", engine="vllm"), "rollout.scores is sampler with rollout.engine vllm"),
        (
            scored_by("sampler", algorithm={"routing_replay": "r3"}),
            "rollout.scores is sampler with algorithm.routing_replay r3; expected the engine built",
        ),
        (
            scored_by("sampler", environment=TOOL),
            "rollout.scores is sampler with rollout.environment; expected the engine builtin, an",
        ),
        (
            keeping(),
            "rollout.keep_sampling_mask is true with top_p 1 and top_k 0, which keep every",
        ),
        (
            keeping("vllm", top_p=0.9),
            "rollout.keep_sampling_mask is true with rollout.engine vllm and top_k 0; expected a",
        ),
        (
            keeping(OWN, top_p=0.9),
            f"rollout.keep_sampling_mask is true with rollout.engine {OWN}, which does not return "
            "the tokens it kept; expected builtin or vllm or sglang; set rollout.engine, or",
        ),
        (
            scored_by("sampler", round_weights="fp8"),
            "rollout.scores is sampler with rollout.round_weights fp8; expected the engine builtin",
        ),
        (
            scored_by("pass", engine="vllm", round_weights="fp8"),
            "rollout.round_weights is fp8 with rollout.engine vllm; expected engine builtin; set",
        ),
        (
            scored_by("pass", model={"dtype": "bf16"}, round_weights="bf16"),
            "rollout.round_weights is bf16 with model.dtype bf16, whose weights are rounded",
        ),
        (lagging(dynamic_sampling=True), "rollout.lag is 1 with rollout.dynamic_sampling, which"),
        (
            make(urls=URLS, temperature=0.7, top_p=0.9),
            "rollout.temperature 0.7 with top_p 0.9 and top_k 0 and rollout.engine vllm; expected",
        ),
        (
            make(urls=URLS, temperature=0.7, top_k=4),
            "rollout.temperature 0.7 with top_p 1 and top_k 4 and rollout.engine vllm; expected",
        ),
    ],
)
def test_bad_ones_are_refused(config, message):
    with pytest.raises(UserError) as error:
        check_config(config, 1, "evaluate", files=False)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("config", "takes", "with_traces"),
    [
        (scored_by("auto"), True, True),
        (scored_by("sampler"), True, True),
        (scored_by("pass"), False, False),
        (scored_by("auto", round_weights="bf16"), False, False),
        (scored_by("auto", algorithm={"name": "grpo"}), True, False),
        (scored_by("auto", algorithm={"name": "grpo", "routing_replay": "r2"}), True, True),
        (scored_by("auto", algorithm={"mini_batches": 1}), False, False),  # its update scores it
        (scored_by("auto", algorithm={"routing_replay": "r3"}), False, False),
        (scored_by("auto", model={"dtype": "bf16"}), False, False),
        (scored_by("auto", engine="vllm"), False, False),
        (scored_by("auto", environment=TOOL), False, False),
        (scored_by("auto", top_p=0.9, dynamic_sampling=True), True, True),
    ],
)
def test_the_sampler_scores_where_it_computes_what_the_trainer_does(config, takes, with_traces):
    assert takes_sampler_scores(config) == takes
    assert takes_sampler_traces(config) == with_traces


def test_truncated_sampling_is_explained():
    assert truncation_text(Config().rollout) is None
    biased = truncation_text(make("builtin", top_p=0.9).rollout)
    assert "what rollout.top_p 0.9 keeps, log-" in biased and biased.endswith(
        "set rollout.keep_sampling_mask"
    )
    kept = truncation_text(keeping(top_k=50).rollout)
    assert kept == (
        "log-probabilities are over the tokens that top_k 50 keeps: 4 bytes each, about 50 at most"
    )
    assert "that top_p 0.9 and top_k 50 keep: 4" in truncation_text(
        keeping(top_k=50, top_p=0.9).rollout
    )
