"""A tiny countdown recipe: data, a supervised run and a run of reinforcement learning.

Learning is real, if small: 60 supervised steps teach the model to solve some of the problems.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.runs import ROOT, TIMEOUT_S

SFT = """\
run_dir: runs/sft
seed: 1
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 2
  ffn_hidden_size: 64
  num_experts: 4
  moe_ffn_hidden_size: 32
  vocab_size: 32
  max_sequence_length: 64
parallel: {expert: 2, world_size: 2}
device: {kind: cpu, threads: 1}  # the same sums on any machine
data:
  tokenizer: {path: data/tokenizer.model}
  train: data/sft.jsonl
  eval: data/eval.jsonl
rollout: {max_new_tokens: 12}
train: {steps: 60, batch_size: 32}
optimizer: {lr: 1.0e-2}
evaluate: {samples: 2}
observe: {tensorboard: false}
"""

RL = (
    SFT.replace("run_dir: runs/sft", "run_dir: runs/rl")
    .replace("data/sft.jsonl", "data/train.jsonl")
    .replace("{max_new_tokens", "{prompts_per_step: 8, samples_per_prompt: 4, max_new_tokens")
    .replace("{steps: 60, batch_size: 32}", "{steps: 8}")
    .replace("{lr: 1.0e-2}", "{lr: 1.0e-3}")
    .replace("{samples: 2}", "{samples: 2, every: 3}")
    + "algorithm: {name: rspo, mini_batches: 2}\n"
    + "checkpoint: {init_from: runs/sft, every: 4}\n"
)


def make_recipe(folder: Path) -> Path:
    """Fill a directory with the data, sft.yaml and rl.yaml; all paths in them start there."""
    sizes = ["--sft", "41", "--train", "24", "--eval", "16"]
    rules = ["--numbers", "2", "--max-number", "9", "--ops=+-"]
    run_tool("make_countdown.py", "--out", "data", *sizes, *rules, cwd=folder)
    files = [f"data/{name}.jsonl" for name in ("sft", "train", "eval")]
    kind = ["--kind", "char", "--vocab-size", "64"]
    run_tool("train_tokenizer.py", *files, *kind, "--out", "data/tokenizer.model", cwd=folder)
    (folder / "sft.yaml").write_text(SFT)
    (folder / "rl.yaml").write_text(RL)
    return folder


def run_tool(name: str, *words: str, cwd: Path) -> None:
    """``tools/data/NAME WORDS``."""
    command = [sys.executable, str(ROOT / "tools" / "data" / name), *words]
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=TIMEOUT_S)
