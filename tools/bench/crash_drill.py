"""Checks that a run that is killed again and again ends like an undisturbed one.

    python tools/bench/crash_drill.py [--kills 20] [--steps 160] [--seed 0] [--asynchronous]

Trains a tiny recipe (tests/support/recipe.py: two ranks, expert parallelism 2, a checkpoint after
every step) once undisturbed. Then it trains the same recipe with SIGKILL to all ranks at random
moments, and restarts it each time with the same command. At the end all weights, the optimizer's
state and all metrics except times must be equal bit for bit; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.recipe import make_recipe  # noqa: E402
from tests.support.runs import Started, reproducible, started, succeed  # noqa: E402

#: A run is killed within this many seconds after it has loaded its checkpoint: about ten steps and
#: saves.
WINDOW_S = 4.0


def main() -> int:
    """Run the drill; print the outcome of each kill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=160, help="of the run, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--asynchronous", action="store_true", help="save in the background")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return drill(make_recipe(Path(folder)), arguments)


def drill(folder: Path, arguments: argparse.Namespace) -> int:
    """0 if the killed run ends as the undisturbed one does."""
    kills, steps = arguments.kills, arguments.steps
    in_background = arguments.asynchronous
    succeed("sft", "sft.yaml", cwd=folder, ranks=2)
    began = time.monotonic()
    succeed(*words("undisturbed", steps), cwd=folder, ranks=2)
    print(f"undisturbed: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
    moments = random.Random(arguments.seed)
    done = while_saving = 0
    killed = folder / "runs" / "killed"
    while done < kills:
        with started(*words("killed", steps, in_background), cwd=folder, ranks=2) as process:
            if not _killed_at(process, moments.uniform(0.0, WINDOW_S)):
                print(f"the run ended after {done} kills; take more --steps", file=sys.stderr)
                return 1
        done += 1
        saving = bool(list(killed.glob("checkpoints/.step_*")))
        while_saving += saving
        latest = killed / "checkpoints" / "latest"
        newest = latest.read_text().strip() if latest.exists() else "none yet"
        place = ", in the middle of a save" if saving else ""
        print(f"kill {done}: newest checkpoint {newest}{place}", flush=True)
    succeed(*words("killed", steps, in_background), cwd=folder, ranks=2)
    differing = compare(folder / "runs" / "undisturbed", killed, steps)
    print(f"{done} kills, {while_saving} of them in the middle of a save")
    print(f"differences from the undisturbed run: {', '.join(differing) or 'none'}")
    return 1 if differing else 0


def words(name: str, steps: int, in_background: bool = False) -> list[str]:
    """The command, the same for every start."""
    run = ["--run_dir", f"runs/{name}", "--train.steps", str(steps), "--evaluate.every", "10"]
    saving = ["--checkpoint.asynchronous", str(in_background).lower()]
    return ["train", "rl.yaml", *run, "--checkpoint.every", "1", *saving]


def _killed_at(process: Started, moment: float) -> bool:
    """Kill the ranks this many seconds after their start; False if they ended before."""
    try:
        process.wait_for("step ")
    except AssertionError:
        return False
    time.sleep(moment)
    process.kill_ranks()
    return process.wait().code != 0


def compare(one: Path, other: Path, steps: int) -> list[str]:
    """The differences between two runs: names of weights, of optimizer state, or "metrics"."""
    from megatron_rl.config.schema import DeviceConfig
    from megatron_rl.device.launch import Launch
    from megatron_rl.device.select import select_device

    select_device(DeviceConfig(kind="cpu"), Launch(0, 1, 0, 1, launched=False))
    from megatron_rl.checkpoint.torch_dist import StoredTensors

    stored = [
        StoredTensors(run / "checkpoints" / f"step_{steps}" / "shards") for run in (one, other)
    ]
    keys = stored[0].shapes.keys() | stored[1].shapes.keys()
    differing = [
        key
        for key in sorted(keys)
        if not all(key in tensors.shapes for tensors in stored)
        or not torch.equal(*(tensors.get(key) for tensors in stored))
    ]
    if reproducible(one) != reproducible(other):
        differing.append("metrics")
    return differing


if __name__ == "__main__":
    sys.exit(main())
