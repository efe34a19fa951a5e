"""What a run of megatron_rl has of its own in `rl_step.py`: the reward, and a logger that sleeps
between turns.

Only rank 0 has loggers. The others wait for it at the end of the step, in the collective that
agrees on signals, so they sleep too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.extend import Reward, Settings, logger

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the code that is measured may be another checkout's

from tools.bench.common import Turns  # noqa: E402
from tools.bench.rl_step_case import Case, odd_share  # noqa: E402


def odd(record: Mapping[str, Any], completion: str) -> Reward:
    """The share of words that end with an odd digit."""
    return Reward(odd_share(completion))


class TurnsSettings(Settings):
    """The turns."""

    folder: Path
    """Where the pipes are."""


@logger(settings=TurnsSettings)
class TurnsLogger:
    """Hands the times of each step over, and waits for the next turn."""

    def __init__(self, run: Any, settings: TurnsSettings) -> None:
        self._turns = Turns(settings.folder)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """At the end of each step."""
        stages = {
            name: metrics.get(f"time/{name}_s", 0.0) for name in ("rollout", "score", "update")
        }
        self._turns.after_step(
            {
                "stages": stages,
                "answer_tokens": metrics["response/length_mean"],
                "reward": metrics["reward/mean"],
                "entropy": metrics["entropy"],
            }
        )

    def close(self) -> None:
        """Nothing is open."""


def write_config(file: Path, folder: Path, case: Case, turns: Path, steps: int) -> None:
    """The run's configuration: the case of ``folder``; the layout is given on the command line."""
    config = {
        "run_dir": str(turns / "run"),
        "model": {"hf_path": str(folder / "model")},
        "device": {"kind": "cpu", "timeout_s": 3600.0, "silence_s": 3600.0},  # it sleeps for long
        "data": {"train": str(folder / "problems.jsonl")},
        "reward": {"name": f"{__file__}:odd"},
        "rollout": {
            "prompts_per_step": case.prompts,
            "samples_per_prompt": case.answers,
            "max_new_tokens": case.answer_tokens,
        },
        "algorithm": {
            "name": "grpo",
            "settings": {"clip_low": case.clip, "clip_high": case.clip},
            "mini_batches": case.mini_batches,
        },
        "optimizer": {"lr": case.learning_rate, "beta2": 0.999, "clip_grad": 1.0},
        "train": {"steps": steps},
        "checkpoint": {"every": 0},
        "observe": {
            "samples": 0,
            "tensorboard": False,
            "console": "plain",
            "loggers": [{"name": f"{__file__}:TurnsLogger", "settings": {"folder": str(turns)}}],
        },
    }
    file.write_text(json.dumps(config, indent=1))  # JSON is YAML
