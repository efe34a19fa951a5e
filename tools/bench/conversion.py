"""Time and peak memory of converting a model from Hugging Face to Megatron and back.

    python tools/bench/conversion.py [--layers 24] [--experts 64] [--directory DIR] [--shard-gib 1]

Writes a qwen3_moe of random weights (2.4 GB in bf16 by default), runs `megatron-rl convert` on it
in both directions in processes of their own, and compares the result with the source tensor by
tensor. Memory is sampled from the process: what it has allocated (anonymous memory; the pages of a
file it reads through a map can be dropped at any time) above what it has once everything is
imported. Needs three times the model's size on disk. Exit code 1 if a tensor differs, or if the
way back takes more than one shard and two of the largest tensors.
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
HIDDEN, FFN, VOCABULARY = 512, 512, 32768
ROW = "{:24} {:>8} {:>16} {:>16}"


@dataclass(frozen=True)
class Spent:
    """What a child process took."""

    seconds: float
    peak: int  #: bytes allocated at most


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
    source, megatron, back = folder / "source", folder / "megatron", folder / "back"
    size, largest = make_model(source, arguments.layers, arguments.experts)
    shard = int(arguments.shard_gib * 2**30)
    print(
        f"{arguments.layers} layers, {arguments.experts} experts: {size / MIB:,.0f} MiB in bf16, "
        f"largest tensor {largest / MIB:,.0f} MiB, shards of {shard / MIB:,.0f} MiB"
    )
    print(ROW.format("", "seconds", "peak MiB", "above start MiB"))
    start = spend([sys.executable, "-c", "import megatron_rl.weights.convert"])
    print(ROW.format("imports alone", f"{start.seconds:.1f}", f"{start.peak / MIB:,.0f}", ""))
    convert = [sys.executable, "-m", "megatron_rl", "convert"]
    above = {}
    for name, words in (
        ("Hugging Face -> Megatron", [str(source), str(megatron)]),
        (
            "Megatron -> Hugging Face",
            [str(megatron), str(back), "--shard-gib", str(arguments.shard_gib)],
        ),
    ):
        spent = spend([*convert, *words])
        above[name] = spent.peak - start.peak
        row = (f"{spent.seconds:.1f}", f"{spent.peak / MIB:,.0f}", f"{above[name] / MIB:,.0f}")
        print(ROW.format(name, *row))
    differing = compare(source, back)
    bound = shard + 2 * largest
    print(f"tensors that differ after the round trip: {differing}")
    print(f"one shard and two of the largest tensors: {bound / MIB:,.0f} MiB")
    return 1 if differing or above["Megatron -> Hugging Face"] > bound else 0


def make_model(directory: Path, layers: int, experts: int) -> tuple[int, int]:
    """Write the model, a shard a layer; the bytes of all tensors, and of the largest."""
    directory.mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1536,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": FFN,
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
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    shards = [ends, *(_layer_shapes(layer, experts) for layer in range(layers))]
    weight_map, size, largest = {}, 0, 0
    for number, shapes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        size, largest = size + sum(sizes), max(largest, *sizes)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size, largest


def _layer_shapes(layer: int, experts: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "self_attn.q_proj.weight": (512, HIDDEN),
        "self_attn.k_proj.weight": (128, HIDDEN),
        "self_attn.v_proj.weight": (128, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, 512),
        "self_attn.q_norm.weight": (64,),
        "self_attn.k_norm.weight": (64,),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate.weight": (experts, HIDDEN),
    }
    for expert in range(experts):
        shapes[f"mlp.experts.{expert}.gate_proj.weight"] = (FFN, HIDDEN)
        shapes[f"mlp.experts.{expert}.up_proj.weight"] = (FFN, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj.weight"] = (HIDDEN, FFN)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def spend(command: list[str]) -> Spent:
    """Run a command to its end, looking at its memory a hundred times a second."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
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
    """The number of tensors that are not the same bits in both directories, or in one only."""
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
