"""The worker of `rl_step.py` that runs TRL's GRPOTrainer, by an interpreter that has TRL (1.16).

    python tools/bench/rl_step_trl.py SETTINGS.json        also under torchrun, with several ranks

Settings: "folder" of the case, "turns" of the pipes, "case", "batch" of a device, "experts"
(transformers' implementation), "steps" of reinforcement learning.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from tools.bench.common import Turns  # noqa: E402
from tools.bench.rl_step_case import Case, odd_share  # noqa: E402


def main() -> int:
    """Train until the process is ended."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    case = Case.read(settings["case"])
    ranks, rank = (int(os.environ.get(name, of)) for name, of in (("WORLD_SIZE", 1), ("RANK", 0)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    turns = Turns(settings["turns"]) if rank == 0 else None
    model_directory = Path(settings["folder"]) / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_directory,
        dtype=torch.float32,
        experts_implementation=settings["experts"],
        trust_remote_code=False,
    )
    times = StageTimes()
    trainer = TimedTrainer(
        model=model,
        reward_funcs=odd,
        args=training_arguments(settings, case, ranks),
        train_dataset=datasets.Dataset.from_json(str(Path(settings["folder"]) / "problems.jsonl")),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            model_directory, trust_remote_code=False
        ),
        callbacks=[TurnsCallback(turns, times, case.mini_batches)],
    )
    trainer.times = times
    trainer.train()
    return 0


def odd(completions: list[str], **_: Any) -> list[float]:
    """The reward, as megatron_rl has it."""
    return [odd_share(completion) for completion in completions]


def training_arguments(settings: dict[str, Any], case: Case, ranks: int) -> trl.GRPOConfig:
    """The case in TRL's words.

    An optimizer step takes ``batch`` answers of each rank at a time, so often that they are a
    mini-batch; answers to all of a step's prompts are sampled at once.
    """
    at_a_time = settings["batch"] * ranks
    accumulate = case.samples // case.mini_batches // at_a_time
    return trl.GRPOConfig(
        output_dir=str(Path(settings["turns"]) / "run"),
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=accumulate,
        steps_per_generation=accumulate * case.mini_batches,
        max_steps=settings["steps"] * case.mini_batches,
        num_generations=case.answers,
        max_completion_length=case.answer_tokens,
        temperature=1.0,
        loss_type="grpo",
        epsilon=case.clip,
        beta=0.0,
        scale_rewards="group",
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        ddp_timeout=36000,
        logging_steps=case.mini_batches,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )


class StageTimes:
    """Seconds of each stage of the step under way."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "score", "update", "sampling"), 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's seconds."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The stages' seconds; they begin anew. ``sampling``, the whole of sampling, rewarding and
        scoring, happens inside of the first optimizer step: it is no part of the update.
        """
        seconds = dict(self.seconds)
        self.seconds = dict.fromkeys(seconds, 0.0)
        seconds["update"] -= seconds.pop("sampling")
        return seconds


class TimedTrainer(trl.GRPOTrainer):
    """GRPOTrainer, with a clock at its stages."""

    times: StageTimes

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.times("rollout"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.times("rollout"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # of the update
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.times("score"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self.times("sampling"):
            return super()._generate_and_score_completions(*args, **kwargs)


class TurnsCallback(transformers.TrainerCallback):
    """Hands the times of each step over, and waits for the next turn, on all ranks."""

    def __init__(self, turns: Turns | None, times: StageTimes, mini_batches: int) -> None:
        self._turns, self._times, self._mini_batches = turns, times, mini_batches
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the forward pass of an optimizer step."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer has stepped."""
        self._times.seconds["update"] += time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """After the last optimizer step of a step."""
        if "completions/mean_length" not in logs:  # of the whole run
            return
        if self._turns is not None:
            self._turns.after_step(
                {
                    "stages": self._times.take(),
                    "answer_tokens": logs["completions/mean_length"],
                    "reward": logs["reward"],
                    "entropy": logs["entropy"],
                }
            )
        if dist.is_initialized():
            dist.barrier()


if __name__ == "__main__":
    sys.exit(main())
