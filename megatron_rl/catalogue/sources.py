"""The data sources, with their settings. To ship one: a row here, and its reader in ``data/``."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.catalogue.entry import SourceEntry
from megatron_rl.catalogue.settings import Settings

#: Endings that a file's name may have after its kind.
PACKED = (".gz", ".zst")


class CsvSettings(Settings):
    """Settings of a table in text."""

    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between the columns; null: a comma, in files called .tsv a tab."""
    json_columns: tuple[str, ...] = ()
    """Columns whose cells are JSON values, such as numbers and lists; the others are text."""


class ColumnsSettings(Settings):
    """Settings of a table with typed columns."""

    columns: tuple[str, ...] | None = None
    """The columns that are read; null: all."""


class HubSettings(ColumnsSettings):
    """Settings of a dataset of the hub."""

    subset: str | None = None
    """The subset (configuration) of the dataset; null: its only one."""


SOURCES: tuple[SourceEntry, ...] = (
    SourceEntry(
        name="jsonl",
        summary="one JSON object a line; a file of any name that no other row claims",
        code="megatron_rl.data.jsonl:read_records",
        endings=(".jsonl", ".ndjson"),
        unit="line",
    ),
    SourceEntry(
        name="csv",
        summary="a table in text whose first line names the columns",
        code="megatron_rl.data.csv_file:read_rows",
        settings=CsvSettings,
        endings=(".csv", ".tsv"),
        unit="row",
    ),
    SourceEntry(
        name="parquet",
        summary="an Apache Parquet file",
        code="megatron_rl.data.arrow:read_parquet",
        settings=ColumnsSettings,
        endings=(".parquet",),
        unit="row",
        needs="pyarrow",
    ),
    SourceEntry(
        name="saved",
        summary="a directory written by save_to_disk of a Hugging Face dataset",
        code="megatron_rl.data.hugging_face:read_saved",
        settings=ColumnsSettings,
        unit="row",
        needs="datasets",
    ),
    SourceEntry(
        name="hub",
        summary="a Hugging Face dataset by name: hf:ORGANISATION/NAME@REVISION/SPLIT",
        code="megatron_rl.data.hugging_face:read_hub",
        settings=HubSettings,
        unit="row",
        needs="datasets",
    ),
)
