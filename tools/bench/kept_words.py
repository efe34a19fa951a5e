"""Measures processor time of the head over kept words, in turns with the head over all words.

    python tools/bench/kept_words.py [--tokens 1024] [--words 32768] [--hidden 256] [--rounds 4]

Each token may take the same number of words, drawn with Zipf's frequencies 1, 1/2, 1/3... or alike.
Forward and backward pass, fp32, one thread, one process; the least of the rounds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parent))

from head import OneRank  # noqa: E402

from megatron_rl.parallel.kept_words import KeptWords  # noqa: E402
from megatron_rl.parallel.vocab_head import VocabHead, head_values  # noqa: E402
from megatron_rl.records import KeptTokens  # noqa: E402

#: Words that a token may take, and whether they are drawn with Zipf's frequencies.
CASES = ((20, True), (100, True), (20, False), (2000, True))
ROW = "{:>10} {:>8} {:>14} {:>9} {:>9} {:>9} {:>6}"


def main() -> None:
    """Print a row for each case."""
    arguments = _parse()
    torch.set_num_threads(1)
    print(ROW.format("of a token", "drawn", "words in all", "sets s", "all s", "kept s", "ratio"))
    for count, zipf in CASES:
        kept, targets = _sets(arguments.tokens, arguments.words, count, zipf)
        start = time.process_time()
        words = KeptWords.of(kept, torch.device("cpu"))
        made = time.process_time() - start
        times: dict[bool, float] = {}
        for _ in range(arguments.rounds):
            for over in (False, True):
                spent = _pass(arguments, targets, words if over else None)
                times[over] = min(spent, times.get(over, spent))
        numbers = [f"{seconds:.2f}" for seconds in (made, times[False], times[True])]
        drawn, in_all = "zipf" if zipf else "alike", f"{len(np.unique(kept.ids)):,}"
        ratio = f"{times[True] / times[False]:.2f}"
        print(ROW.format(count, drawn, in_all, *numbers, ratio), flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 1024), ("words", 32768), ("hidden", 256), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def _sets(tokens: int, words: int, count: int, zipf: bool) -> tuple[KeptTokens, torch.Tensor]:
    rng = np.random.default_rng(0)
    frequencies = 1.0 / np.arange(1, words + 1)
    weights = frequencies / frequencies.sum() if zipf else None
    sets = [rng.choice(words, count, replace=False, p=weights) for _ in range(tokens)]
    targets = torch.tensor([int(ids[0]) for ids in sets])
    return KeptTokens.of_sizes(np.concatenate(sets), np.full(tokens, count)), targets


def _pass(case: argparse.Namespace, targets: torch.Tensor, kept: KeptWords | None) -> float:
    """Seconds of processor time of a forward and a backward pass."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(case.tokens, case.hidden, generator=generator, requires_grad=True)
    weight = torch.randn(case.words, case.hidden, generator=generator, requires_grad=True)
    one: Any = OneRank()
    head = VocabHead(weight, case.words, one)
    start = time.process_time()
    found = head_values(rows, head, targets, 1.0, entropy="detached", kept=kept)
    found.logprobs.sum().backward()
    return time.process_time() - start


if __name__ == "__main__":
    main()
