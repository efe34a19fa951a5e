"""From a Hugging Face model to a trained one and back, and each mistake on the way: by commands."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support import hugging_face
from tests.support.runs import ROOT, run, started, succeed

RL = """\
run_dir: runs/from_hf
seed: 1
model: {hf_path: model, max_sequence_length: 48}
parallel: {expert: 2, world_size: 2}
device: {kind: cpu}
data: {train: problems.jsonl, eval: problems.jsonl}
reward: {name: countdown}
rollout: {prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 6, stop_token_ids: [91]}
algorithm: {name: rspo, mini_batches: 2, entropy_coef: 0.1}
train: {steps: 2}
optimizer: {lr: 1.0e-3}
evaluate: {samples: 0}
observe: {tensorboard: false}
"""
#: End tokens of the model, many that some are drawn early, and one more of the run.
OF_MODEL, MORE = [1, *range(46, 125, 2)], 91
CHAT = [{"role": "user", "content": "3 4 12"}]


def make_folder(folder, variant):
    """A model with several end tokens and a tokenizer in ``model``, problems as chat messages,
    rl.yaml.
    """
    hugging_face.save(variant, folder / "model", max_shard_size="80KB")
    generation = json.dumps({"eos_token_id": OF_MODEL, "pad_token_id": 0})
    (folder / "model" / "generation_config.json").write_text(generation)
    hugging_face.save_tokenizer(folder / "model")
    lines = [json.dumps({"prompt": CHAT, "numbers": [3, 4], "target": 12 + i}) for i in range(4)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rl.yaml").write_text(RL)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("convert"), "qwen3_moe, dense layers")


@pytest.fixture(scope="module")
def trained(folder):
    """Two steps of RSPO on two ranks from the model's weights, converted back to ``trained``."""
    done = succeed("train", "rl.yaml", cwd=folder, ranks=2)
    converted = succeed("convert", "runs/from_hf", "trained", "--verify", cwd=folder)
    return done, converted


def test_training_starts_from_the_weights_and_tokenizer(folder, trained):
    done, _ = trained
    assert "starting from the weights of model" in done.out
    config = (folder / "runs" / "from_hf" / "config.yaml").read_text()
    assert "kind: huggingface" in config and "hf_path: model" in config
    first = json.loads((folder / "runs" / "from_hf" / "samples.jsonl").read_text().split("\n")[0])
    tokenizer = hugging_face_tokenizer(folder / "model")
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == "3 4 12: "
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    (answer,) = hugging_face.greedy(folder / "model", [ids], 6)
    assert first["completion"] == spoken(answer)
    assert first["finished"] and first["tokens"] == len(answer) == 4 and answer[-1] == 118
    files = ", ".join(map(str, OF_MODEL[1:]))
    ends = f"with token 1 (tokenizer), {files} (generation_config.json), 91 (rollout.stop_token"
    assert re.search(f"^answers end +{re.escape(ends)}", done.out, re.MULTILINE)


def spoken(answer):
    """An answer as our engine decodes it: without the token that ends it."""
    return hugging_face.spelled(answer[:-1] if answer[-1] in [*OF_MODEL, MORE] else answer)


def hugging_face_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def test_the_trained_model_answers_in_transformers_as_in_ours(folder, trained):
    _, converted = trained
    answers = answers_alike(folder, converted)
    ended = [answer for answer in answers if len(answer) < 16]
    assert ended and all(answer[-1] in [*OF_MODEL, MORE] for answer in ended)


@pytest.mark.conversion
@pytest.mark.parametrize("variant", ["deepseek_v3, stretched", "olmoe", "mixtral", "qwen3"])
def test_models_of_other_families_are_trained_and_answer_alike(tmp_path, variant):
    make_folder(tmp_path, variant)
    dense = "--parallel.expert=1 --algorithm.name=gmpo".split() if variant == "qwen3" else []
    succeed("train", "rl.yaml", *dense, cwd=tmp_path, ranks=2)
    converted = succeed("convert", "runs/from_hf", "trained", "--verify", cwd=tmp_path)
    answers_alike(tmp_path, converted, "--algorithm.name=gmpo")


def answers_alike(folder, converted, *more):
    """The converted model answers greedily in transformers as our engine does; its answers."""
    assert converted.out == "trained (verified)\n"
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / "trained" / name).read_bytes() == (folder / "model" / name).read_bytes()
    generation = json.loads((folder / "trained" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [*OF_MODEL, MORE], "pad_token_id": 0}
    prompts = ["3+4=", "12 7 5: ", "ab"]
    words = [word for text in prompts for word in ("--prompt", text)]
    one = ["--parallel.expert=1", "--parallel.world_size=null", "--greedy"]
    one += ["--rollout.max_new_tokens=16", *more]
    done = succeed("generate", "rl.yaml", *one, *words, cwd=folder)
    tokenizer = hugging_face_tokenizer(folder / "trained")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    answers = hugging_face.greedy(folder / "trained", ids, 16)
    assert done.out.splitlines() == [
        text + spoken(answer) for text, answer in zip(prompts, answers, strict=True)
    ]
    changed = hugging_face.logits(folder / "trained") - hugging_face.logits(folder / "model")
    assert 1e-4 < changed.abs().max() < 5.0  # it has been trained
    return answers


def one_line(done, message):
    assert done.code == 2, done.err
    assert len(done.errors) == 1 and message in done.errors[0], done.err


def test_a_target_that_exists_is_kept(folder, trained):
    before = sorted(path.name for path in (folder / "trained").iterdir())
    done = run("convert", "runs/from_hf", "trained", cwd=folder, warm=True)
    one_line(done, "trained exists already; expected a new directory")
    assert sorted(path.name for path in (folder / "trained").iterdir()) == before


def broken(folder, change):
    """A copy of the model directory with one change."""
    copy = folder / "broken"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / "model", copy)
    change(copy)
    return copy


def set_config(**values):
    def change(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **values}))

    return change


def cut_a_shard(copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def drop_a_shard(copy):
    sorted(copy.glob("*.safetensors"))[1].unlink()


def point_outside(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


def quantise(copy):
    from safetensors.torch import load_file, save_file

    shard = sorted(copy.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = min(tensors)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, shard)


def add_a_tensor(copy):
    from safetensors.torch import load_file, save_file

    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = sorted(set(content["weight_map"].values()))[0]
    save_file({**load_file(copy / shard), "model.extra.weight": torch.ones(2)}, copy / shard)
    content["weight_map"]["model.extra.weight"] = shard
    index.write_text(json.dumps(content))


MISTAKES = {
    "missing shard": (drop_a_shard, "model-00002-of-"),
    "truncated shard": (cut_a_shard, "expected a complete safetensors file"),
    "wrong type": (quantise, "as F8_E4M3; expected one of F32, BF16, F16"),
    "outside": (point_outside, "names the file '../model-00002-of-"),
    "unknown architecture": (set_config(model_type="llama"), "model_type 'llama' is not supported"),
    "rope scaling": (
        set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "rope_type 'yarn'",
    ),
    "window": (set_config(use_sliding_window=True, sliding_window=8), "sliding_window 8 is not"),
    "quantised": (set_config(quantization_config={"bits": 4}), "quantization_config"),
    "other shape": (set_config(moe_intermediate_size=16), "expected parts of a weight (32, 64)"),
    "more layers": (set_config(num_hidden_layers=5, mlp_only_layers=[0]), "holds no tensor"),
    "fewer layers": (set_config(num_hidden_layers=3), "which no weight of the model is made of"),
    "unconsumed": (add_a_tensor, "holds the tensor model.extra.weight, which no weight"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "unconsumed" else pytest.mark.conversion)
        for name in MISTAKES
    ],
)
def test_a_broken_source_is_named_and_nothing_is_written(folder, name):
    change, message = MISTAKES[name]
    broken(folder, change)
    done = run("convert", "broken", "from_broken", cwd=folder, warm=True)
    one_line(done, message)
    assert not [path.name for path in folder.iterdir() if "from_broken" in path.name]


@pytest.fixture
def mounted(folder):
    """Mounts a small file system at ``disk``; skips where mounting is not allowed."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no right to mount a file system: {done.stderr.strip()}")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


@pytest.mark.conversion
@pytest.mark.parametrize("source", ["model", "runs/from_hf"])
@pytest.mark.parametrize(
    "options, message", [("size=64k", "bytes free; expected"), ("ro", "is read-only; expected")]
)
def test_a_target_without_room_or_permission(folder, trained, mounted, source, options, message):
    disk = mounted(options)
    one_line(run("convert", source, "disk/out", cwd=folder, warm=True), message)
    assert list(disk.iterdir()) == []


@pytest.mark.conversion
@pytest.mark.parametrize("source", ["model", "runs/from_hf"])
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(folder, trained, source):
    """At any moment: killed as soon as it has begun to write."""
    with started("convert", source, "killed", cwd=folder) as process:
        process.wait_until(lambda: (folder / ".killed.partial").exists())
    assert not (folder / "killed").exists()
    succeed("convert", source, "killed", cwd=folder)
    assert not (folder / ".killed.partial").exists()
    shutil.rmtree(folder / "killed")


def test_the_tool_is_the_verb():
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "nowhere", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-rl: error: nowhere is not a directory; expected a Hu")
