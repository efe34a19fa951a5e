"""Every row says of its thing what is so, and can be listed."""

import json

import pytest

from megatron_rl.algorithms.trial import check_advantages, check_correction, check_loss, traits_of
from megatron_rl.catalogue import kinds
from megatron_rl.catalogue.entry import load_check
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.listing import listed
from megatron_rl.config.checks import check_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from tests.support.runs import ROOT

MY_LOSS = ROOT / "examples" / "extend" / "my_loss.py"


@pytest.mark.parametrize("row", kinds.LOSSES.rows, ids=lambda row: row.name)
def test_traits_of_the_losses(row):
    declared = {
        "denominator": row.denominator,
        "router_shift": row.router_shift,
        "geometric": row.geometric,
        "sampler_weights": row.sampler_weights,
    }
    assert traits_of(row.bind(row.settings()), row.name) == declared
    check_loss(row, row.settings())


@pytest.mark.parametrize("kind", kinds.KINDS.values(), ids=list(kinds.KINDS))
def test_every_row_has_its_code_and_is_listed(kind):
    lines = listed(kind)
    for row in kind.rows:
        thing = row.load()
        assert callable(thing) if kind.instance is None else isinstance(thing, kind.instance)
        assert row.name in lines and f"    {row.summary}" in lines
        for name, field in ({} if row.settings is None else row.settings.model_fields).items():
            assert field.description, f"{row.name}: {name} is not documented"
            (line,) = [
                one for one in listed(kind, [row.name]) if one.strip().startswith(f"{name}:")
            ]
            default = "(to be given)" if field.is_required() else json.dumps(field.default)
            assert f"{name}: {default}" in line
    for row in kind.rows:
        for check in ("check", "machine_check"):
            assert getattr(row, check, None) is None or callable(load_check(getattr(row, check)))


def test_other_rows_do_what_is_asked():
    for row in kinds.ADVANTAGES.rows:
        check_advantages(row, None)
    for row in kinds.CORRECTIONS.rows:
        check_correction(row, row.settings())


def test_ones_own_is_listed():
    lines = listed(kinds.LOSSES, [f"{MY_LOSS}:my_loss"])
    assert "    over sequences, router shift ignored, sampler weights ignored" in lines
    assert "clip: 0.2" in lines[-1] and "Half width of the range" in lines[-1]


LOSSES = """
from megatron_rl.extend import loss
from megatron_rl.algorithms import LossOutputs
from megatron_rl.algorithms.aggregate import make_segments, over_tokens

def total(inputs):
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences)
    return over_tokens(-inputs.logprobs * inputs.advantages, segments)

@loss(denominator="tokens")
def right(inputs):
    return LossOutputs(*total(inputs), {})

@loss(denominator="sequences")
def counted(inputs):
    return LossOutputs(*total(inputs), {})

@loss(denominator="tokens", router_shift="optional")
def shifted(inputs):
    return LossOutputs(*total(inputs), {})

@loss(denominator="tokens")
def constant(inputs):
    return LossOutputs(*[one.detach() for one in total(inputs)], {})

@loss(denominator="tokens")
def raises(inputs):
    return inputs.nothing

@loss(denominator="tokens")
def wrong(inputs):
    return 3

def pairs(rewards):
    return rewards[:, :2]

def weights(inputs):
    return inputs.old_logprobs
"""


def checked(tmp_path, **algorithm):
    (tmp_path / "tried.py").write_text(LOSSES)
    algorithm = {
        key: value.replace("./", f"{tmp_path}/") if isinstance(value, str) else value
        for key, value in algorithm.items()
    }
    config = Config.model_validate({"model": MODEL_PRESETS["tiny_moe"], "algorithm": algorithm})
    check_config(config, None, "train", files=False)


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"name": "./tried.py:counted"}, "has denominator 'tokens' and declares 'sequences'"),
        ({"name": "./tried.py:shifted"}, "has router_shift 'ignored' and declares 'optional'"),
        ({"name": "./tried.py:constant"}, "has a loss_sum without gradient"),
        ({"name": "./tried.py:raises"}, "raised AttributeError"),
        ({"name": "./tried.py:wrong"}, "gives int; expected LossOutputs"),
        ({"advantages": "./tried.py:pairs"}, "gives [2, 2]; expected a tensor [2, 3]"),
        ({"mismatch": "./tried.py:weights"}, "gives Tensor; expected SamplerWeights"),
        (
            {"name": "./tried.py:right", "router_shift": {"enabled": True}},
            "algorithm.router_shift.enabled is true with the loss",
        ),
        ({"name": "./tried.py:right", "mismatch": "tis"}, "declared with sampler_weights=True"),
        (
            {"mismatch_settings": {"high": 1}},
            "mismatch_settings is given with algorithm.mism",
        ),
        (
            {"mismatch": "tis", "mismatch_high": 3.0, "mismatch_settings": {"high": 2.0}},
            "algorithm.mismatch_high is 3 and algorithm.mismatch_settings.high is 2.0",
        ),
        ({"advantages_settings": {"a": 1}}, "algorithm.advantages_settings.a is no setting of the"),
    ],
)
def test_what_does_other_than_it_says_is_refused(tmp_path, algorithm, words):
    with pytest.raises(UserError) as error:
        checked(tmp_path, **algorithm)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_does_as_it_says_is_accepted(tmp_path):
    checked(tmp_path, name="./tried.py:right")
    assert find(kinds.LOSSES, f"{tmp_path}/tried.py:right").denominator == "tokens"
