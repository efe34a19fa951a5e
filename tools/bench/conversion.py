"""Measures time and peak memory of converting a model from Hugging Face to Megatron and back.

    python tools/bench/conversion.py [--layers 24] [--experts 64] [--directory DIR] [--shard-gib 1]

Writes a qwen3_moe of random weights (2.4 GB in bf16 by default), runs `megatron-rl convert` on it
in both directions in separate processes, and compares the result with the source tensor by tensor.
Memory is sampled from the process: what it has allocated (anonymous memory; the pages of a file it
reads through a map can be dropped at any time) above what the same command takes on a tiny model.
Needs three times the model's size on disk. Exit code 1 if a tensor differs, or if the way back
takes more than one shard and two of the largest stored tensors (a Megatron checkpoint holds the
experts of a layer stacked in one).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
_CONVERT = [sys.executable, "-m", "megatron_rl", "convert"]
ROW = "{:24} {:>8} {:>10} {:>20}"


@dataclass(frozen=True)
class Model:
    """Sizes of a qwen3_moe."""

    layers: int
    experts: int
    hidden: int = 512  #: and of each expert
    vocabulary: int = 32768


@dataclass(frozen=True)
class Spent:
    """Resources of a child process."""

    seconds: float
    peak: int  #: peak of allocated bytes


def main() -> int:
    """Make the model, convert it both ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--shard-gib", type=float, default=1.0)
    parser.add_argument("--directory", help="where to work; default: a temporary directory")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        return _measure(folder, arguments)
    finally:
        shutil.rmtree(folder)


def _measure(folder: Path, arguments: argparse.Namespace) -> int:
    size, largest = make_model(folder / "model", Model(arguments.layers, arguments.experts))
    make_model(folder / "tiny", Model(layers=1, experts=8, hidden=64, vocabulary=256))
    shard = int(arguments.shard_gib * 2**30)
    print(
        f"{arguments.layers} layers, {arguments.experts} experts: {size / MIB:,.0f} MiB in bf16, "
        f"largest stored tensor {largest / MIB:,.0f} MiB, shards of {shard / MIB:,.0f} MiB"
    )
    print(ROW.format("", "seconds", "peak MiB", "above tiny model MiB"))
    above = {}
    for name, source, target in (
        ("Hugging Face -> Megatron", "", ".megatron"),
        ("Megatron -> Hugging Face", ".megatron", ".back"),
    ):
        tiny, spent = (
            spend([*_CONVERT, f"{folder / model}{source}", f"{folder / model}{target}", *extra])
            for model in ("tiny", "model")
            for extra in (["--shard-gib", str(arguments.shard_gib)] if source else [],)
        )
        above[name] = spent.peak - tiny.peak
        row = (f"{spent.seconds:.1f}", f"{spent.peak / MIB:,.0f}", f"{above[name] / MIB:,.0f}")
        print(ROW.format(name, *row))
    differing = compare(folder / "model", folder / "model.back")
    bound = shard + 2 * largest
    print(f"tensors that differ after the round trip: {differing}")
    print(f"one shard and two of the largest stored tensors: {bound / MIB:,.0f} MiB")
    return 1 if differing or above["Megatron -> Hugging Face"] > bound else 0


def make_model(directory: Path, model: Model) -> tuple[int, int]:
    """Write the model, a shard a layer; the bytes of all tensors, and of the largest that Megatron
    stores: gate and up projections of all experts of a layer, or the embedding.
    """
    directory.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1536,
        "num_experts": model.experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": model.hidden,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generator = torch.Generator().manual_seed(0)
    ends = {
        "model.embed_tokens.weight": (model.vocabulary, model.hidden),
        "lm_head.weight": (model.vocabulary, model.hidden),
        "model.norm.weight": (model.hidden,),
    }
    shards = [ends, *(_layer_shapes(layer, model) for layer in range(model.layers))]
    weight_map, size = {}, 0
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    bf16 = torch.bfloat16.itemsize
    stacked = model.experts * 2 * model.hidden * model.hidden * bf16
    return size, max(stacked, model.vocabulary * model.hidden * bf16)


def _layer_shapes(layer: int, model: Model) -> dict[str, tuple[int, ...]]:
    hidden = model.hidden
    shapes = {
        "self_attn.q_proj.weight": (512, hidden),
        "self_attn.k_proj.weight": (128, hidden),
        "self_attn.v_proj.weight": (128, hidden),
        "self_attn.o_proj.weight": (hidden, 512),
        "self_attn.q_norm.weight": (64,),
        "self_attn.k_norm.weight": (64,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate.weight": (model.experts, hidden),
    }
    for expert in range(model.experts):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (hidden, hidden)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (hidden, hidden)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (hidden, hidden)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def spend(command: list[str]) -> Spent:
    """Run a command to its end and sample its memory a hundred times a second."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began, peak, quiet = time.perf_counter(), 0, subprocess.DEVNULL
    with subprocess.Popen(
        command, env=environment, stdout=quiet, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, _allocated(process.pid))
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read()}")
    return Spent(time.perf_counter() - began, peak)


def _allocated(pid: int) -> int:
    """Anonymous memory of a process, bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    sizes = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(sizes[0]) if sizes else 0


def compare(source: Path, back: Path) -> int:
    """The number of tensors that differ between the directories, or are in only one."""
    maps = [
        json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        for directory in (source, back)
    ]
    differing = len(maps[0].keys() ^ maps[1].keys())
    for file in sorted(set(maps[0].values())):
        with safe_open(source / file, "pt") as shard:
            for name in shard.keys() & maps[1].keys():
                with safe_open(back / maps[1][name], "pt") as other:
                    same = torch.equal(shard.get_tensor(name), other.get_tensor(name))
                    differing += not same
    return differing


if __name__ == "__main__":
    sys.exit(main())
