"""A model of a user's own family, that of ``examples/extend/my_family.py``: Qwen3-MoE renamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.support.runs import ROOT

FILE = ROOT / "examples" / "extend" / "my_family.py"


def renamed(name: str) -> str:
    """A tensor of Qwen3-MoE as the family calls it."""
    return name.replace(".mlp.gate.", ".mlp.router.proj.")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All of a model directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def save_renamed(model: Path, target: Path) -> Path:
    """Write a directory of Qwen3-MoE as one of the family."""
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    values = json.loads((model / "config.json").read_text())
    values |= {"model_type": "my_moe", "architectures": ["MyMoeForCausalLM"]}
    values["n_experts"] = [
        values.pop(key) for key in ("num_experts", "num_local_experts") if key in values
    ][0]
    (target / "config.json").write_text(json.dumps(values))
    stored = {renamed(name): tensor for name, tensor in tensors(model).items()}
    save_file(stored, target / "model.safetensors")
    return target
