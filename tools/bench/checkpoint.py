"""Measures how long training waits for a checkpoint, written in the foreground and in the
background.

    python tools/bench/checkpoint.py [--layers 8] [--experts 16] [--repeat 3] [--directory DIR]
                                      [--device cpu|cuda]

One process, a model with its Adam state. Each repetition saves in the foreground, then in the
background while the process is idle, then in the background while it trains. Waited: until training
can continue. Written: until the checkpoint is published, with checksums and synced to the disk.
Exit code 1 if the median wait is 10% of the write beside it or more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.tiny import tiny_config  # noqa: E402
from tests.support.tiny_training import TinyTraining, build_training  # noqa: E402

ROW = "{:38} {:>9} {:>9} {:>7}"


def main() -> int:
    """Measure, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--directory", help="where to write; default: a temporary directory")
    arguments = parser.parse_args()
    training = build_training(
        tiny_config(
            model={
                "num_layers": arguments.layers,
                "num_experts": arguments.experts,
                "hidden_size": 512,
                "moe_ffn_hidden_size": 512,
            },
            device={"kind": arguments.device},
        )
    )
    training.step(0)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        return measure(training, Path(folder), arguments.repeat)


def measure(training: TinyTraining, folder: Path, repeat: int) -> int:
    """0 if training waits less than a tenth of the time that writing takes."""
    from megatron_rl.checkpoint.background import BackgroundWriter

    background, rows = (
        BackgroundWriter(),
        {"at once": [], "in background": [], "while training": []},
    )
    step_s = timed(lambda: training.step(1))
    slowed = []
    for _ in range(repeat):
        waited = timed(lambda: save(training, folder))
        rows["at once"].append((waited, waited))
        for name in ("in background", "while training"):
            began = time.perf_counter()
            waited = timed(lambda: save(training, folder, background=background))
            while name == "while training" and background.busy:
                slowed.append(timed(lambda: training.step(2)))
            background.wait()
            rows[name].append((waited, time.perf_counter() - began))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(
        f"{size / 2**20:,.0f} MiB; medians of {repeat}; a training step takes {step_s:.2f} s "
        f"alone, {statistics.median(slowed):.2f} s beside the writer"
    )
    print(ROW.format("", "waited s", "written s", "ratio"))
    ratios = {}
    for name, pairs in rows.items():
        waited, written = (statistics.median(values) for values in zip(*pairs))
        ratios[name] = statistics.median(w / t for w, t in pairs)
        print(ROW.format(name, f"{waited:.2f}", f"{written:.2f}", f"{ratios[name]:.3f}"))
    return 1 if max(ratios["in background"], ratios["while training"]) >= 0.1 else 0


def save(training: TinyTraining, folder: Path, **options: Any) -> None:
    """Write step 1 over the previous one."""
    from megatron_rl.checkpoint.save import save_checkpoint

    arguments = {**training.for_checkpoint(), "state": {}, "keep": 1, **options}
    save_checkpoint(folder / "checkpoints", 1, **arguments)


def timed(action: Any) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
