"""Measures time and peak memory of the head: whole logits against tiles, taking turns.

    python tools/bench/head.py [--tokens 1024 8192] [--words 151936] [--hidden 256]
                               [--dtypes fp32 bf16 bf16-fp32-head] [--rounds 3] [--device cpu]

Each turn is a process of its own: it makes hidden states and weight, runs forward and backward
pass once, and reports the seconds and the peak of its memory above what it had before. The forms
are `whole_logits.py` and `parallel/vocab_head.py`; both give log-probabilities and entropies.
A last process compares both forms' gradients with those of fp64 on the same inputs, on few tokens.
Exit code 1 if, at the most tokens, the tiles take more than 1.2 times the time or 1/8 of the memory
of whole logits of the same type.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parent))

from whole_logits import WholeLogits, whole_logits  # noqa: E402

from megatron_rl.parallel.vocab_head import VocabHead, head_gradients, head_values  # noqa: E402
from megatron_rl.parallel.vocab_tiles import Slope, Tiles  # noqa: E402

MIB = 2**20
TEMPERATURE = 0.8
#: Tokens of the comparison with fp64.
COMPARED = 256
AT_MOST_TIME, AT_MOST_MEMORY = 1.2, 1 / 8
ROW = "{:>7} {:16} {:>9} {:>9} {:>6} {:>11} {:>11} {:>7}"


class OneRank:
    """Stands in for a process group of one rank."""

    def rank(self) -> int:
        """0."""
        return 0

    def size(self) -> int:
        """1."""
        return 1


def main() -> int:
    """Run the turns, print the tables; 1 if a bound is broken."""
    arguments = _parse()
    if arguments.turn:
        print(json.dumps(_turn(json.loads(arguments.turn))))
        return 0
    case = {name: getattr(arguments, name) for name in ("words", "hidden", "device", "threads")}
    print(
        ROW.format(
            "tokens", "type", "whole s", "tiles s", "ratio", "whole MiB", "tiles MiB", "part"
        )
    )
    broken = False
    for tokens in arguments.tokens:
        for dtype in arguments.dtypes:
            times, peaks = _in_turns({**case, "tokens": tokens, "dtype": dtype}, arguments.rounds)
            ratio = times["tiles"] / times["whole"]
            part = peaks["tiles"] / peaks["whole"]
            row = [f"{times['whole']:.2f}", f"{times['tiles']:.2f}", f"{ratio:.2f}"]
            row += [f"{peaks[form] / MIB:,.0f}" for form in ("whole", "tiles")]
            print(ROW.format(tokens, dtype, *row, f"1/{1 / part:.0f}"), flush=True)
            same_products = dtype != "bf16-fp32-head"
            if tokens == max(arguments.tokens) and same_products:
                broken |= ratio > AT_MOST_TIME or part > AT_MOST_MEMORY
    print(f"\nnorm(difference) / norm of gradients, {COMPARED} tokens")
    titles = ("whole - fp64", "tiles - fp64", "tiles - whole", "unrounded")
    print(f"{'type':16} {'of':8} " + " ".join(f"{title:>14}" for title in titles))
    for dtype in arguments.dtypes:
        found = _child({**case, "tokens": COMPARED, "dtype": dtype, "form": "compare"})
        for name, numbers in found.items():
            print(f"{dtype:16} {name:8} " + " ".join(f"{n:14.1e}" for n in numbers))
    return int(broken)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--words", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument(
        "--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "bf16-fp32-head"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=None, help="of a CPU; null: all cores")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_turns(case: dict[str, Any], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and largest peak in bytes of each form; the order alternates."""
    found: dict[str, list[dict[str, float]]] = {"whole": [], "tiles": []}
    for number in range(rounds):
        for form in list(found)[:: -1 if number % 2 else 1]:
            found[form].append(_child({**case, "form": form}))
    times = {form: statistics.median(t["seconds"] for t in turns) for form, turns in found.items()}
    return times, {form: max(turn["peak"] for turn in turns) for form, turns in found.items()}


def _child(case: dict[str, Any]) -> Any:
    command = [sys.executable, __file__, "--turn", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def _turn(case: dict[str, Any]) -> dict[str, Any]:
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    if case["form"] == "compare":
        return _compare(case)
    _gradients({**case, "tokens": 64, "words": 512}, case["form"])  # what a first call loads
    hidden, weight, targets, grad = _inputs(case)
    peak = _Peak(case["device"])
    start = time.perf_counter()
    _run(case["form"], case["dtype"], hidden, weight, targets, grad)
    return {"seconds": peak.synchronised() - start, "peak": peak.bytes()}


def _inputs(case: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets, and gradients in the log-probabilities as of a mean."""
    generator = torch.Generator().manual_seed(5)
    dtype = torch.float32 if case["dtype"] == "fp32" else torch.bfloat16
    shape = case["tokens"], case["words"], case["hidden"]
    hidden = torch.randn(shape[0], shape[2], generator=generator)
    weight = torch.randn(shape[1], shape[2], generator=generator) * (2.0 / shape[2] ** 0.5)
    targets = torch.randint(shape[1], (shape[0],), generator=generator)
    grad = torch.randn(shape[0], generator=generator) / shape[0]
    device = case["device"]
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return (*leaves, targets.to(device), grad.to(device))


def _run(
    form: str,
    dtype: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Forward and backward pass."""
    if form == "whole":
        if dtype == "bf16-fp32-head":
            logprobs, _ = whole_logits(hidden.float(), weight.float(), targets, TEMPERATURE)
        else:
            logprobs, _ = whole_logits(hidden, weight, targets, TEMPERATURE)
    else:
        group: Any = OneRank()
        head = VocabHead(weight, len(weight), group, fp32=dtype == "bf16-fp32-head")
        found = head_values(hidden, head, targets, TEMPERATURE, entropy="detached")
        logprobs = found.logprobs
    logprobs.backward(grad)


def _gradients(case: dict[str, Any], form: str) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, grad = _inputs(case)
    _run(form, case["dtype"], hidden, weight, targets, grad)
    return hidden.grad, weight.grad


def _compare(case: dict[str, Any]) -> dict[str, list[float]]:
    """Of both gradients: whole - fp64, tiles - fp64, tiles - whole; and the last of the hidden
    states' before it is rounded to the type of the model.
    """
    hidden, weight, targets, grad = _inputs(case)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprobs = (wide[0] @ wide[1].t() / TEMPERATURE).log_softmax(-1)
    logprobs.gather(1, targets[:, None]).squeeze(1).backward(grad.double())
    whole, tiles = _gradients(case, "whole"), _gradients(case, "tiles")
    found = {}
    for name, exact, a, b in zip(("hidden", "weight"), (x.grad for x in wide), whole, tiles):
        pairs = (a, exact), (b, exact), (b, a)
        found[name] = [_distance(x, y) for x, y in pairs]
    found["hidden"].append(_unrounded(case["dtype"], hidden, weight, targets, grad))
    return found


@torch.no_grad()
def _unrounded(dtype: str, *inputs: torch.Tensor) -> float:
    """Difference of the fp32 gradients in hidden states, each the product of what was rounded."""
    hidden, weight, targets, grad = (x.detach() for x in inputs)
    fp32 = dtype == "bf16-fp32-head"
    rows, words = (hidden.float(), weight.float()) if fp32 else (hidden, weight)
    with torch.enable_grad():
        logits = (rows @ words.t()).requires_grad_()
        logprobs, _ = WholeLogits.apply(logits, targets, 1.0 / TEMPERATURE)
    logprobs.backward(grad)
    normaliser = (logits.float() / TEMPERATURE).logsumexp(-1)
    tiles = Tiles(hidden, weight, targets, fp32=fp32)
    found, _ = head_gradients(tiles, Slope(1.0 / TEMPERATURE, normaliser, grad), None)
    return _distance(found, logits.grad.double() @ words.double())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


class _Peak:
    """Peak memory above that at the start: of a CPU sampled every 2 ms."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        self._before = self._most = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def synchronised(self) -> float:
        """The time when the device has finished."""
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def bytes(self) -> int:
        """The peak so far."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._before
        self._done.set()
        self._thread.join()
        return max(self._most, self._resident()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, self._resident())

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
