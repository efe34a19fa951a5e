"""Runs that are kept: a set for each machine that the study has run on.

A set is a folder of ``results/`` with ``runs.csv``: a line a run with all that the tables are made
of but seconds. Numbers are written in full, so the same code on such a machine gives the same line.
Another processor rounds differently, so that runs sample other answers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  #: study, arm, seed, and a run's numbers by their columns' names
SECONDS = "seconds"
Known = tuple[str, str, str]  #: study, arm, seed


def as_csv(rows: Sequence[Row]) -> str:
    """A line a run, without seconds; an empty cell: the run has no such number."""
    text = io.StringIO()
    table = csv.DictWriter(
        text,
        [name for row in rows[:1] for name in row if name != SECONDS],
        lineterminator="\n",
        extrasaction="ignore",
    )
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def read_sets(folder: Path) -> dict[str, list[Row]]:
    """The runs of each set of a folder, with numbers as such; of a folder that is absent none."""
    return {
        file.parent.name: [_numbers(line) for line in _lines(file.read_text(encoding="utf-8"))]
        for file in sorted(folder.glob("*/runs.csv"))
    }


def compare(rows: Sequence[Row], sets: Mapping[str, Sequence[Row]]) -> int:
    """Say how many runs equal those of each set in every digit, and how the others differ from the
    set that most of them equal; 0 if all of them equal those of one set.
    """
    own = _texts(rows)
    equal, unlike = {}, {}
    for name, kept_rows in sets.items():
        kept = _texts(kept_rows)
        columns = {known: _unlike(kept.get(known, {}), line) for known, line in own.items()}
        unlike[name] = {known: names for known, names in columns.items() if names}
        equal[name] = len(own) - len(unlike[name])
        print(f"{name}: {equal[name]} of {len(own)} runs are equal, {len(kept)} are kept")
    nearest = max(equal, key=lambda name: equal[name], default=None)
    if nearest is None or not equal[nearest]:
        print("no run equals a kept one; another processor rounds differently")
        return 1
    for known, names in sorted(unlike[nearest].items()):
        print(f"{' '.join(known)}: {', '.join(names)} differ from {nearest}")
    return int(bool(unlike[nearest]))


def _lines(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _texts(rows: Sequence[Row]) -> dict[Known, dict[str, str]]:
    """The cells of each run's line."""
    return {(row["study"], row["arm"], row["seed"]): row for row in _lines(as_csv(rows))}


def _unlike(kept: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """The columns in which a run differs from a kept one; all of them where none is kept."""
    return [name for name, value in own.items() if kept.get(name) != value]


def _numbers(line: Mapping[str, str]) -> Row:
    """A run as it was before it was written."""
    whole = {"seed", "spikes", "collapsed"}
    row: Row = {}
    for name, text in line.items():
        if name in ("study", "arm"):
            row[name] = text
        elif not text:
            row[name] = None
        else:
            row[name] = int(text) if name in whole else float(text)
    return row
