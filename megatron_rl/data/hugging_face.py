"""Hugging Face datasets, saved on disk or from the hub: rows -> records."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.catalogue.sources import ColumnsSettings, HubSettings
from megatron_rl.data.arrow import ROWS, chosen_columns, records_of, understood
from megatron_rl.data.unpack import need
from megatron_rl.errors import UserError, printable

_NAME = re.compile(
    r"(?:hf:)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@\s]+))?"
    r"(?:/(?P<split>[\w.-]+(?:\[[^\]\s]*\])?))?"
)


def read_saved(path: Path, settings: ColumnsSettings) -> Iterator[dict[str, Any]]:
    """The rows of a dataset that ``save_to_disk`` wrote to a directory.

    Raises ``UserError`` with the directory and the row (from 1): it holds no readable dataset; a
    requested column is missing; a value is not a JSON value, such as an image; datasets is not
    installed.
    """
    datasets = need("datasets", str(path))
    with understood(str(path), "a dataset that save_to_disk has written"):
        dataset = datasets.load_from_disk(str(path))
    yield from _rows(str(path), dataset, settings)


def read_hub(path: Path, settings: HubSettings) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of the Hugging Face hub; the library keeps it in its cache.

    ``path`` is hf:ORGANISATION/NAME, with @REVISION (a branch, a tag or a commit) and /SPLIT if
    there are several; a split may be cut, train[:1000]. Raises ``UserError`` as `read_saved` does,
    and for a name of another form, an unknown dataset, and a hub that cannot be reached.
    """
    found = _NAME.fullmatch(str(path))
    if found is None:
        raise UserError(
            f"{printable(str(path))} is no name of a dataset; expected "
            "hf:ORGANISATION/NAME@REVISION/SPLIT, of which revision and split may be left out; "
            "correct it"
        )
    datasets = need("datasets", str(path))
    with understood(str(path), "a dataset in reach (offline: one in the cache)"):
        dataset = datasets.load_dataset(
            found["name"],
            settings.subset,
            revision=found["revision"],
            split=found["split"],
            trust_remote_code=False,  # a version with script support would ask
        )
    if found["split"] is None and len(dataset) == 1:
        (dataset,) = dataset.values()
    yield from _rows(str(path), dataset, settings)


def _rows(name: str, dataset: Any, settings: ColumnsSettings) -> Iterator[dict[str, Any]]:
    if isinstance(dataset, dict):
        raise UserError(
            f"{name} has the splits {printable(', '.join(map(str, dataset)))}; expected one; name "
            f"it: {name}/{next(iter(dataset), 'train')}"
        )
    columns = chosen_columns(name, list(dataset.column_names), settings)
    with understood(name, "a readable dataset"):
        # raw: no image is decoded
        batches = dataset.select_columns(columns).with_format("arrow").iter(ROWS)
    yield from records_of(name, batches, None)
