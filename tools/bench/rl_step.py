"""Measures whole steps of reinforcement learning: megatron_rl and TRL's GRPOTrainer, the same case.

    tools/setup_trl_venv.sh .venv-trl
    python tools/bench/rl_step.py [--trl-python .venv-trl/bin/python] [--rounds 7] [--json FILE]

Both train the same Hugging Face weights (qwen3_moe of 4 layers, hidden 128, 8 experts top-2, fp32)
on the same prompts and reward, with GRPO: 64 prompts x 8 answers of 24 tokens, 8 mini-batches, an
AdamW step each. The runs of both are alive at the same time, in several settings each, and take
turns: one has all cores, the others sleep. First all settings take some rounds; then the best of
each side take those that count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.device.cores import usable_cores  # noqa: E402
from tools.bench.common import (  # noqa: E402
    Spread,
    Turn,
    Worker,
    end_on_sigterm,
    peak_gflops,
    table,
    take_turns,
)
from tools.bench.rl_step_case import Case, make_files  # noqa: E402
from tools.bench.rl_step_ours import write_config  # noqa: E402

OURS, TRL = "megatron_rl", "TRL"
STAGES = ("rollout", "score", "update")
#: Products whose speed is the peak: the experts' of this case, and one that fits no cache.
PEAKS = {"2300x128 by 128x256": (2300, 128, 256), "2048x2048 by 2048x2048": (2048, 2048, 2048)}
#: Steps a run may take at most; it is ended long before.
STEPS = 100_000
VERSIONS = (
    "import sys, importlib.metadata as m; "
    "print(sys.version.split()[0], *(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
)


@dataclass(frozen=True)
class Setting:
    """One way to run one of the programs."""

    side: str  #: OURS or TRL
    ranks: int
    threads: int  #: of a rank
    options: tuple[str, ...] = ()  #: ours: words of the command line
    batch: int = 0  #: TRL: answers of a rank in a forward pass
    experts: str = "grouped_mm"  #: TRL: transformers' implementation of the experts
    label: str = ""  #: ours: what tables call it; empty: by its layout
    code: Path = ROOT  #: ours: the checkout whose code runs

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.label:
            return self.label
        size = f"{self.ranks} x {self.threads} threads"
        if self.side == TRL:
            return f"TRL {size}, batch {self.batch}, {self.experts}"
        layout = "".join(word.partition("=")[2] for word in self.options if "expert=" in word)
        return f"megatron_rl {size}" + (f", EP{layout}" if layout else "")


def settings_of(cores: int, case: Case, words: Sequence[str] = ()) -> list[Setting]:
    """All settings that are tried. ``words``: added to our command line."""
    mini_batch = case.samples // case.mini_batches
    words = tuple(words)
    found = [Setting(OURS, 1, cores, words)]
    if cores > 1:
        found.append(Setting(OURS, cores, 1, words))
        found.append(Setting(OURS, cores, 1, (*words, f"--parallel.expert={cores}")))
    for part in (1, 2, 4):
        if mini_batch % part == 0:
            found.append(Setting(TRL, 1, cores, batch=mini_batch // part))
    found.append(Setting(TRL, 1, cores, batch=mini_batch, experts="eager"))
    if cores > 1 and mini_batch % cores == 0:
        found.append(Setting(TRL, cores, 1, batch=mini_batch // cores))
    return found


def main() -> int:
    """Search, measure, print."""
    arguments = _arguments()
    case = CASES[arguments.size]
    end_on_sigterm()
    settings = settings_of(arguments.cores, case, arguments.set)
    before = _peaks(arguments)
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder), case)
        turns, best = measure(settings, case, Path(folder), arguments)
    peaks = {name: max(speed, before[name]) for name, speed in _peaks(arguments).items()}
    result = {
        "case": dataclasses.asdict(case),
        "machine": {
            "cores": arguments.cores,
            "peak_gflops": peaks,
            "load_average": os.getloadavg()[0],
        },
        "versions": {
            OURS: _versions(sys.executable, "torch", "megatron-core", "numpy"),
            TRL: _versions(arguments.trl_python, "torch", "trl", "transformers", "accelerate"),
        },
        "flop": case.flop(),
        "settings": [
            summary(setting, phase, taken, case, max(peaks.values()))
            for phase, of in turns.items()
            for setting in settings
            if (taken := of.get(setting.name))
        ],
        "best": best,
        "ratio": dataclasses.asdict(ratio(turns["measured"], best)),
    }
    _print(result)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _peaks(arguments: argparse.Namespace) -> dict[str, float]:
    return {
        name: peak_gflops(*sizes, threads=arguments.cores, trials=arguments.peak_trials)
        for name, sizes in PEAKS.items()
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-trl" / "bin" / "python"))
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=7, help="of the best settings")
    parser.add_argument("--search-rounds", type=int, default=2, help="of all settings")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--set", action="append", default=[], help="--section.key=value of ours")
    parser.add_argument("--size", choices=sorted(CASES), default="full")
    parser.add_argument("--peak-trials", type=int, default=30)
    parser.add_argument("--json", help="file to write everything to")
    arguments = parser.parse_args()
    arguments.trl_python = str(Path(arguments.trl_python).absolute())
    if not Path(arguments.trl_python).exists():
        parser.error(
            f"there is no {arguments.trl_python}; expected the interpreter of an environment with "
            "TRL; make one with tools/setup_trl_venv.sh, or name another with --trl-python"
        )
    return arguments


#: The case, and one for tests of this file.
CASES = {
    "full": Case(),
    "smallest": Case(
        shape=dataclasses.replace(Case().shape, layers=1, vocabulary=64),
        prompts=4,
        answers=2,
        answer_tokens=4,
        mini_batches=2,
        problems=8,
    ),
}


def measure(
    settings: Sequence[Setting], case: Case, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, list[Turn]]], dict[str, str]]:
    """Turns by phase and setting, and the name of each side's best setting."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for number, setting in enumerate(settings):
            turns = folder / f"worker_{number}"
            worker = start(setting, case, folder, turns, arguments)
            workers[setting.name] = stack.enter_context(worker)
            worker.wait()  # it starts and warms up alone
            print(f"{setting.name} has warmed up", file=sys.stderr, flush=True)
        searched = take_turns(workers, arguments.search_rounds, arguments.steps)
        best = best_of(settings, searched)
        for name, worker in workers.items():
            if name not in best.values():
                worker.end()
        finalists = {name: workers[name] for name in best.values()}
        measured = take_turns(finalists, arguments.rounds, arguments.steps)
    for turns in (searched, measured):
        _check_lengths(turns, case)
    return {"searched": searched, "measured": measured}, best


def start(
    setting: Setting, case: Case, folder: Path, turns: Path, arguments: argparse.Namespace
) -> Worker:
    """Start a program; it takes its first turn at once."""
    interpreter = sys.executable if setting.side == OURS else arguments.trl_python
    command = [interpreter]
    if setting.ranks > 1:
        ranks = f"--nproc-per-node={setting.ranks}"
        command += ["-m", "torch.distributed.run", "--standalone", ranks]
    turns.mkdir()
    file = turns / "settings.json"
    if setting.side == OURS:
        command += ["-m", "megatron_rl", "train", str(file), *setting.options]
        command.append(f"--device.threads={setting.threads}")
        write_config(file, folder, case, turns, STEPS)
    else:
        command += [str(ROOT / "tools" / "bench" / "rl_step_trl.py"), str(file)]
        words: dict[str, Any] = {
            "folder": str(folder),
            "turns": str(turns),
            "case": dataclasses.asdict(case),
            "batch": setting.batch,
            "experts": setting.experts,
            "steps": STEPS,
        }
        file.write_text(json.dumps(words))
    environment = {"OMP_NUM_THREADS": str(setting.threads), "PYTHONPATH": str(setting.code)}
    return Worker(setting.name, command, turns, arguments.steps, environment)


def best_of(settings: Sequence[Setting], turns: Mapping[str, Sequence[Turn]]) -> dict[str, str]:
    """For each side the setting with the smallest median time."""
    best = {}
    for side in (OURS, TRL):
        names = [setting.name for setting in settings if setting.side == side]
        best[side] = min(names, key=lambda n: Spread.of(t.seconds for t in turns[n]).median)
    return best


def ratio(turns: Mapping[str, Sequence[Turn]], best: Mapping[str, str]) -> Spread:
    """TRL's time over ours, round by round: above 1 we are the faster."""
    pairs = zip(turns[best[TRL]], turns[best[OURS]])
    return Spread.of(trl.seconds / ours.seconds for trl, ours in pairs)


def summary(
    setting: Setting, phase: str, turns: Sequence[Turn], case: Case, peak: float
) -> dict[str, Any]:
    """A row of the result: seconds of a step and of its stages, medians and quartiles."""
    seconds = Spread.of(turn.seconds for turn in turns)
    steps = [step for turn in turns for step in turn.steps]
    gflop = sum(case.flop().values()) / 1e9
    return {
        "side": setting.side,
        "name": setting.name,
        "phase": phase,
        "turns_s": [turn.seconds for turn in turns],
        "seconds": dataclasses.asdict(seconds),
        "stages": {
            stage: dataclasses.asdict(Spread.of(step["stages"][stage] for step in steps))
            for stage in STAGES
        },
        "samples_per_s": case.samples / seconds.median,
        "gflops": gflop / seconds.median,
        "share_of_peak": gflop / seconds.median / peak,
        "cpu_s": dataclasses.asdict(Spread.of(turn.cpu_s for turn in turns)),
        "idle_cpu_s": dataclasses.asdict(Spread.of(turn.idle_cpu_s for turn in turns)),
        "reward": Spread.of(step["reward"] for step in steps).median,
        "entropy": Spread.of(step["entropy"] for step in steps).median,
    }


def _check_lengths(turns: Mapping[str, Sequence[Turn]], case: Case) -> None:
    """RuntimeError: some answers were shorter, so the work was not the same."""
    for name, of in turns.items():
        lengths = {step["answer_tokens"] for turn in of for step in turn.steps}
        if lengths != {case.answer_tokens}:
            raise RuntimeError(
                f"{name}: answers of {lengths} tokens; expected {case.answer_tokens}"
            )


def _versions(python: str, *packages: str) -> str:
    done = subprocess.run(
        [python, "-c", VERSIONS, *packages], check=True, capture_output=True, text=True
    )
    return f"Python {done.stdout.strip()}"


def _rows(result: Mapping[str, Any], phase: str) -> Iterator[list[str]]:
    for row in result["settings"]:
        if row["phase"] == phase:
            stages = [f"{row['stages'][stage]['median']:.2f}" for stage in STAGES]
            yield [
                row["name"],
                f"{row['samples_per_s']:.1f}",
                str(Spread(**row["seconds"])),
                *stages,
                f"{row['gflops']:.0f}",
                f"{row['share_of_peak']:.1%}",
                f"{row['cpu_s']['median']:.2f}",
                f"{row['idle_cpu_s']['median']:.3f}",
            ]


def _print(result: Mapping[str, Any]) -> None:
    head = [
        "",
        "samples/s",
        "s a step (quartiles)",
        *STAGES,
        "GFLOP/s",
        "of peak",
        "CPU s",
        "others",
    ]
    for phase in ("searched", "measured"):
        print(f"\n{phase}:\n{table(head, _rows(result, phase))}")
    flop = {stage: value / 1e9 for stage, value in result["flop"].items()}
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in flop.items())
    print(f"\na step needs {sum(flop.values()):.1f} GFLOP: {parts}")
    for name, value in result["machine"]["peak_gflops"].items():
        print(f"{name}: {value:.0f} GFLOP/s on {result['machine']['cores']} cores")
    for side, text in result["versions"].items():
        print(f"{side}: {text}")
    print(f"TRL's time / ours, round by round: {Spread(**result['ratio'])}")


if __name__ == "__main__":
    sys.exit(main())
