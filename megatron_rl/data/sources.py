"""Configured data sets -> records, each with its place (file and line)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Iterator

from megatron_rl.catalogue.blame import blame
from megatron_rl.config.data import ChosenSource, Piece
from megatron_rl.data.values import plain_record
from megatron_rl.errors import UserError


@dataclass
class Places:
    """The places of the records of one or more data sets, by record number over all of them."""

    #: number of the first record of each piece, and the piece, in order
    starts: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    def begin(self, piece: Piece, first: int) -> None:
        """Records from number ``first`` on belong to this piece."""
        self.starts.append(first)
        self.pieces.append(piece)

    def __call__(self, index: int) -> str:
        """``data/train.jsonl, line 7`` of the record with this number (from 0)."""
        # of pieces with the same start all but the last are empty
        at = bisect_right(self.starts, index) - 1
        piece = self.pieces[at]
        return f"{piece.path}, {piece.row.unit} {index - self.starts[at] + 1}"


def records_of_source(source: ChosenSource, places: Places, first: int) -> Iterator[dict[str, Any]]:
    """The records of a data set, in order; adds their places to ``places``.

    Args:
        source: the data set.
        places: holds those of earlier data sets.
        first: number of the first record.

    Raises:
        UserError: a reader refuses a record; a user's own source raises, or gives something else
            than records; there is no record; memory runs out. The message names the place.
    """
    number = first
    for piece in source.pieces:
        places.begin(piece, number)
        try:
            for record in _records(piece):
                yield record
                number += 1
        except MemoryError as error:
            raise UserError(
                f"{places(number)}: out of memory; expected room for the whole data set in every "
                "process; raise `ulimit -v` or the memory of the job, or split the file"
            ) from error
    if number == first:
        raise UserError(
            f"{source.path}: empty data set; expected a record or more; fill it or name another"
        )


def _records(piece: Piece) -> Iterator[dict[str, Any]]:
    row = piece.row
    if row.own is None:
        yield from row.bind(piece.settings)(piece.path)
        return
    who, number = f"the data source {row.name!r}", 0
    with blame(who, "correct it"):
        thing = row.own
        if isinstance(thing, type):  # made with its settings, then called
            thing = thing() if piece.settings is None else thing(piece.settings)
            records = iter(thing())
        else:
            records = iter(thing() if piece.settings is None else thing(piece.settings))
    while True:
        number += 1
        with blame(f"{who}, record {number},", "correct it"):
            try:
                record = next(records)
            except StopIteration:
                return
        try:
            record = plain_record(record)
        except UserError as error:
            raise UserError(f"{who}, record {number}: {error}") from error
        yield record
