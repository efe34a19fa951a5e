"""Loading: precedence, overrides, and one-line messages that name place, key and remedy."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.checks import check_config
from megatron_rl.config.fields import is_dict, leaf_fields, leaf_values
from megatron_rl.config.hf_export import hf_config_of
from megatron_rl.config.load import dump_config, load_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.errors import UserError


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load YAML text from run.yaml in the current directory, with overrides."""
    monkeypatch.chdir(tmp_path)

    def load_text(text="", *overrides):
        Path("run.yaml").write_text(text, encoding="utf-8")
        return load_config(Path("run.yaml"), overrides)

    return load_text


@pytest.fixture
def refusal(load):
    """The message with which a config is refused."""

    def message(text="", *overrides):
        with pytest.raises(UserError) as error:
            load(text, *overrides)
        assert "\n" not in str(error.value)
        return str(error.value)

    return message


def test_an_empty_file_gives_the_defaults(load):
    assert load("") == Config()


def test_yaml_values_reach_their_fields(load):
    config = load("seed: 7\noptimizer:\n  lr: 3e-4\ndata: {train: a/b.jsonl, shuffle: false}\n")
    assert config.seed == 7
    assert config.optimizer.lr == 3e-4
    assert config.data.train == Path("a/b.jsonl")
    assert config.data.shuffle is False
    assert config.model == Config().model


def test_a_section_with_nothing_in_it_keeps_its_defaults(load):
    assert load("observe:\n  # console: plain\n") == Config()


def test_flags_win_over_yaml_in_both_spellings(load):
    text = "seed: 1\nrun_dir: a\nrollout: {temperature: 0.5}"
    config = load(text, "--seed", "3", "--run_dir=runs/x", "--rollout.temperature", "0.9")
    assert (config.seed, config.run_dir, config.rollout.temperature) == (3, Path("runs/x"), 0.9)


def test_flags_reach_deep_fields_lists_and_null(load):
    config = load(
        "model: {head_dim: 8, num_layers: 4}",
        *("--algorithm.router_shift.floor", "0.7"),
        *("--model.moe_layer_freq", "[0, 1, 1, 0]"),
        *("--model.head_dim", "null"),
    )
    assert config.algorithm.router_shift.floor == 0.7
    assert config.model.moe_layer_freq == [0, 1, 1, 0]
    assert config.model.head_dim is None


def test_the_last_of_two_flags_wins(load):
    assert load("", "--seed", "3", "--seed=4").seed == 4


def test_a_dict_entry_joins_the_entries_of_the_yaml(load):
    text = "algorithm: {settings: {clip: 0.2, low: 1}}"
    entry = ("--algorithm.settings.clip", "0.3")
    assert load(text, *entry).algorithm.settings == {"clip": 0.3, "low": 1}
    assert load("algorithm: {settings: null}", *entry).algorithm.settings == {"clip": 0.3}
    whole = load(text, *entry, "--algorithm.settings", "{x: 1}")
    assert whole.algorithm.settings == {"x": 1}


def test_text_fields_take_their_flag_as_typed(load):
    config = load("", "--run_dir", "2024", "--data.prompt_key=1e3", "--reward.name", "a: b")
    assert (config.run_dir, config.data.prompt_key) == (Path("2024"), "1e3")
    assert config.reward.name == "a: b"
    assert load("data: {train: x}", "--data.train", "null").data.train is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--algorithm.nam", "x"],
            "unknown key --algorithm.nam (did you mean algorithm.name?)",
        ),
        (["--temperature=1"], "unknown key --temperature (did you mean rollout.temperature?)"),
        (["--qqqq", "1"], "unknown key --qqqq; expected a field of megatron_rl/config/schema.py"),
        (["--seed"], "--seed has no value; expected --seed VALUE"),
        (["--seed", "--run_dir=x"], "--seed has no value; expected --seed VALUE"),
        (["seed"], "found 'seed' on the command line; expected --section.key value"),
        (
            ["--parallel", "2"],
            "--parallel: parallel is a section; expected a key in it, such as parallel.tensor",
        ),
        (
            ["--train.steps", "ten"],
            '--train.steps is "ten"; expected an integer, at least 1 '
            "(train: rollout batches; sft: optimizer steps)",
        ),
        (["--seed", "[1"], "--seed: '[1' is not a YAML value; expected e.g. 3, 0.7, [0, 1]"),
        (
            ["--algorithm.settings.a.b", "1"],
            "unknown key --algorithm.settings.a.b (did you mean algorithm.settings?)",
        ),
    ],
)
def test_a_wrong_flag_is_refused(refusal, words, message):
    assert refusal("", *words) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "seed: 1\nmodel:\n  hiden_size: 3\n",
            "run.yaml:3: unknown key model.hiden_size (did you mean model.hidden_size?)",
        ),
        ("modle: {}\n", "run.yaml:1: unknown key modle (did you mean "),
        (
            "rollout:\n  max_new_tokens: many\n",
            'run.yaml:2: rollout.max_new_tokens is "many"; expected an integer, at least 1 '
            "(Longest answer, tokens)",
        ),
        (
            "seed: 3.0",
            "run.yaml:1: seed is 3.0; expected an integer, at least 0, below 4294967296 (",
        ),
        (
            "seed: true",
            "run.yaml:1: seed is true; expected an integer, at least 0, below 4294967296 (",
        ),
        (
            "seed: '3'",
            'run.yaml:1: seed is "3"; expected an integer, at least 0, below 4294967296 (',
        ),
        ("seed: -1", "run.yaml:1: seed is -1; expected an integer, at least 0, below 4294967296 ("),
        ("seed: 4294967296", "run.yaml:1: seed is 4294967296; expected an integer, at least 0, "),
        (
            "rollout: {servers: {urls: http://one:1}}",
            'run.yaml:1: rollout.servers.urls is "http://one:1"; expected a list of strings (',
        ),
        (
            "rollout: {stop_token_ids: [3, -1]}",
            "run.yaml:1: rollout.stop_token_ids is [3, -1]; expected a list of integers (",
        ),
        ("data: {shuffle: no}", 'run.yaml:1: data.shuffle is "no"; expected true or false ('),
        ("run_dir: 5", "run.yaml:1: run_dir is 5; expected a path ("),
        ("optimizer: {lr: .nan}", "run.yaml:1: optimizer.lr is NaN; expected a number, above 0 ("),
        (
            "rollout: {top_p: 1.5}",
            "run.yaml:1: rollout.top_p is 1.5; expected a number, above 0, at most 1 (",
        ),
        (
            "parallel: {world_size: none}",
            'run.yaml:1: parallel.world_size is "none"; expected an integer or null, at least 1 (',
        ),
        (
            "model: {dtype: fp23}",
            'run.yaml:1: model.dtype is "fp23" (did you mean fp32?); expected one of fp32, bf16 (',
        ),
        (
            "model:\n  moe_layer_freq: [1, 2]",
            "run.yaml:2: model.moe_layer_freq is [1, 2]; "
            "expected an integer or a list of integers (",
        ),
        ("model: 3", "run.yaml:1: model is 3; expected a section, `model:` with keys below"),
        (
            "model:\n  preset: tiny_mo",
            "run.yaml:2: unknown model.preset 'tiny_mo' (did you mean tiny_moe?); expected one of "
            "tiny_moe, ",
        ),
        (
            "model: {preset: tiny_moe, hf_config: x}",
            "run.yaml:1: found model.hf_config and also model.preset (run.yaml:1); "
            "expected one; set the other to null",
        ),
        ("algorithm: {settings: 3}", "run.yaml:1: algorithm.settings is 3; expected a mapping ("),
    ],
)
def test_a_wrong_file_is_refused(refusal, text, message):
    assert refusal(text).startswith(message)


def test_an_entry_cannot_join_what_is_no_dict(refusal):
    message = refusal("algorithm: {settings: 3}", "--algorithm.settings.clip", "1")
    assert message.startswith("run.yaml:1: algorithm.settings is 3; expected a mapping")


def test_a_wrong_value_of_the_file_does_not_matter_once_a_flag_replaces_it(load):
    assert load("seed: many", "--seed", "2").seed == 2


def test_preset_values_are_below_yaml_and_flags(load):
    text = "model: {preset: mixtral_8x7b, num_layers: 2, moe_top_k: 4}"
    model = load(text, "--model.moe_top_k", "1").model
    assert (model.hidden_size, model.num_layers, model.moe_top_k) == (4096, 2, 1)
    assert model.preset == "mixtral_8x7b"
    assert model.qk_norm is False


def test_a_preset_named_by_a_flag_fills_what_the_yaml_leaves_open(load):
    model = load("model: {num_layers: 2}", "--model.preset", "olmoe_1b_7b").model
    assert (model.num_layers, model.num_experts, model.qk_norm_scope) == (2, 64, "layer")


def test_a_preset_of_a_wrong_type_is_a_type_error(refusal):
    assert refusal("model: {preset: 3}").startswith(
        "run.yaml:1: model.preset is 3; expected a string or null"
    )


def test_the_dumped_config_is_complete_and_loads_as_the_same(load):
    config = load(
        "model: {preset: tiny_deepseek_moe}\noptimizer: {lr: 1e-6}",
        *("--algorithm.settings.clip", ".inf", "--algorithm.settings.name", "1e-4x"),
    )
    text = dump_config(config)
    assert load(text) == config
    assert config.algorithm.settings["clip"] == float("inf")
    for name in leaf_fields():
        assert f"{name.rpartition('.')[2]}:" in text
    assert "  num_experts: 16\n" in text and "  preset: tiny_deepseek_moe\n" in text


@given(st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_any_string_survives_dump_and_load(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    config = Config().model_copy(
        update={"data": Config().data.model_copy(update={"prompt_key": text})}
    )
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_every_field_says_what_it_is():
    undocumented = [name for name, field in leaf_fields().items() if not field.description]
    assert undocumented == []


@pytest.mark.parametrize(
    ("words", "purpose", "rate"),
    [
        ([], "train", 3e-4),
        ([], "sft", 3e-4),
        (["--model.preset=qwen3_30b_a3b"], "train", 3e-4),
        (["--model.hf_path=hf"], "train", 1e-6),
        (["--model.hf_path=hf"], "sft", 1e-5),
        (["--checkpoint.init_from=runs/a"], "train", 1e-6),
        (["--checkpoint.init_from=runs/a"], "sft", 1e-5),
        (["--model.hf_path=hf", "--optimizer.lr=3e-4"], "train", 3e-4),
        (["--model.hf_path=hf", "--model.hf_path=null"], "train", 3e-4),
        (["--model.hf_config=hf"], "train", 3e-4),  # random weights
    ],
)
def test_the_learning_rate_where_none_is_given(load, words, purpose, rate):
    Path("hf").mkdir()
    config = hf_config_of(ModelConfig(**MODEL_PRESETS["qwen3_4b"]))
    Path("hf/config.json").write_text(json.dumps(config))
    given = [] if purpose == "train" else [purpose]
    assert load_config(None, words, *given).optimizer.lr == rate
    resolved = dump_config(load_config(None, words, purpose))
    assert load(resolved).optimizer.lr == rate  # whatever the verb, once written


def test_a_learning_rate_of_the_file_is_kept(load):
    assert load("optimizer: {lr: 1e-3}\ncheckpoint: {init_from: runs/a}").optimizer.lr == 1e-3


@pytest.mark.parametrize("text", ["{a: 1}", "[[1]]", "&a [*a]", "9" * 5000])
def test_a_hostile_value_of_any_field_is_one_line(text):
    taken = set()
    for name in leaf_fields():
        try:
            load_config(None, [f"--{name}={text}"])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 5500, name
        else:
            taken.add(name)
    # what takes any text, or any mapping
    texts = {"data.prompt_key", "data.completion_key", "observe.wandb", "reward.name"}
    assert taken & texts == texts
    taken -= {"device.heartbeat_file", "optimizer.name", "optimizer.settings"}
    assert not {n for n in taken if n.startswith(("parallel.", "optimizer.", "train.", "device."))}


def test_sections_and_lists_say_what_they_take(refusal):
    assert refusal("", "--model.yarn=3").startswith(
        "--model.yarn is 3; expected a mapping of factor, original_max_position_embeddings, "
    )
    assert refusal("", "--rollout.servers.urls=3").startswith(
        "--rollout.servers.urls is 3; expected a list of strings ("
    )


def test_every_field_has_its_value_under_its_dotted_name():
    config = load_config(None, ["--model.num_layers", "3", "--run_dir", "runs/x"])
    values = dict(leaf_values(config.model_dump(mode="json")))
    assert set(values) == {  # a mapping has its entries, or none
        name for name, field in leaf_fields().items() if not is_dict(field)
    }
    assert (values["model.num_layers"], values["run_dir"]) == (3, "runs/x")
    assert values["model.yarn"] is None


@pytest.mark.parametrize(
    "words",
    [
        ["--" + "x" * 150, "1"],
        ["--" + "x" * 100_000, "1"],
        ["--model.preset", "x" * 100_000],
        ["--data.tokenizer.kind", "x" * 100_000],
        ["--algorithm.name", "x" * 100_000],
        ["--a\nb", "1"],
        ["--model.num_layers", "[" + "1, " * 50_000 + "1]"],
    ],
)
def test_a_long_word_is_no_misspelt_one(words):
    """It is not compared with every name, which would take minutes, and not shown whole."""
    start = time.process_time()
    with pytest.raises(UserError) as error:
        config = load_config(None, words)
        check_config(config, 1, "train", files=False)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
    assert "did you mean" not in str(error.value) and time.process_time() - start < 20.0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("{name: math, weight: a}", 'reward.parts.0.weight is "a"; Input should be a valid number'),
        ("{name: math, wieght: 1}", "reward.parts.0.wieght is 1; Extra inputs are not permitted"),
        ("{weight: 1}", 'reward.parts.0.name is {"weight": 1}; Field required'),
    ],
)
def test_a_mistake_in_a_part_of_the_reward_is_named(tmp_path, part, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"reward:\n  parts: [{part}]\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}:2: {message}")
