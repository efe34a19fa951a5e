"""A tiny countdown recipe, and its runs: each is made once and looked at by several tests.

Learning is real, if small: 60 supervised steps teach the model to solve some of the problems.
"""

import subprocess
import sys

import pytest

from tests.support.runs import ROOT, TIMEOUT_S, started, succeed

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
device: {kind: cpu}
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The current directory of every command: data, sft.yaml and rl.yaml."""
    folder = tmp_path_factory.mktemp("countdown")
    sizes = ["--sft", "41", "--train", "24", "--eval", "16"]
    rules = ["--numbers", "2", "--max-number", "9", "--ops=+-"]
    _tool("make_countdown.py", "--out", "data", *sizes, *rules, cwd=folder)
    files = [f"data/{name}.jsonl" for name in ("sft", "train", "eval")]
    kind = ["--kind", "char", "--vocab-size", "64"]
    _tool("train_tokenizer.py", *files, *kind, "--out", "data/tokenizer.model", cwd=folder)
    (folder / "sft.yaml").write_text(SFT)
    (folder / "rl.yaml").write_text(RL)
    return folder


def _tool(name, *words, cwd):
    command = [sys.executable, str(ROOT / "tools" / "data" / name), *words]
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="session")
def sft_run(folder):
    """The supervised warm-up: 2 ranks, two experts each. Its directory is runs/sft."""
    return succeed("sft", "sft.yaml", "--observe.tensorboard", "true", cwd=folder, ranks=2)


@pytest.fixture(scope="session")
def rl_run(folder, sft_run):
    """Reinforcement learning, uninterrupted. Its directory is runs/rl."""
    return succeed("train", "rl.yaml", cwd=folder, ranks=2)


class Interrupted:
    """The same run in runs/broken: killed, continued and stopped, continued to the end, rerun.

    Attributes: metrics and samples (text) as the killed run left them, and the four commands'
    results.
    """

    def __init__(self, folder):
        self.run_dir = folder / "runs" / "broken"
        command = ["train", "rl.yaml", "--run_dir", "runs/broken"]
        with started(*command, cwd=folder, ranks=2) as process:
            process.wait_for("step 5/8")
            process.kill_ranks()
            self.killed = process.wait()
        self.metrics = (self.run_dir / "metrics.jsonl").read_text()
        self.samples = (self.run_dir / "samples.jsonl").read_text()
        self.checkpoints_of_killed = self.checkpoints()
        with started(*command, cwd=folder, ranks=2) as process:
            process.wait_for("step 5/8")
            process.terminate()
            self.stopped = process.wait()
        self.checkpoints_of_stopped = self.checkpoints()
        self.finished = succeed(*command, cwd=folder, ranks=2)
        self.files_of_finished = self.files()
        self.rerun = succeed(*command, cwd=folder, ranks=2)

    def checkpoints(self):
        """Names of the complete checkpoints."""
        found = self.run_dir.glob("checkpoints/step_*/manifest.json")
        return {path.parent.name for path in found}

    def files(self):
        """Content of every file but the report's."""
        return {
            str(path.relative_to(self.run_dir)): path.read_bytes()
            for path in self.run_dir.rglob("*")
            if path.is_file() and path.name != "report.html" and path.parent.name != "plots"
        }


@pytest.fixture(scope="session")
def interrupted(folder, sft_run):
    return Interrupted(folder)
