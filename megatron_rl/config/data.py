"""The data sets that the section ``data`` names, with readers and columns."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Mapping

from megatron_rl.catalogue.entry import SourceEntry
from megatron_rl.catalogue.find import find, label_of
from megatron_rl.catalogue.kinds import SOURCES
from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings
from megatron_rl.catalogue.sources import PACKED
from megatron_rl.config.schema_data import DataConfig, DataPart
from megatron_rl.errors import UserError, printable
from megatron_rl.paths import as_written

Split = Literal["train", "eval"]

#: Prefix of a dataset of the Hugging Face hub.
HUB = "hf:"
#: ``my_source.py:thing`` and ``my_package.my_module:thing``.
_OWN = re.compile(r"(?:.+\.py|[A-Za-z_][\w.]*):[A-Za-z_][\w.]*")
#: Files that identify a directory written by a Hugging Face dataset's save_to_disk.
_SAVED, _SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
#: The column keys of a part that may differ from ``data``.
_COLUMNS = ("prompt_key", "template", "system", "answer_key", "completion_key", "tools_key")


@dataclass(frozen=True)
class Piece:
    """One thing to read: a file, a dataset, or a user's own source."""

    row: SourceEntry
    path: Path
    settings: Settings | None


@dataclass(frozen=True)
class ChosenSource:
    """One data set of a split."""

    field: str  #: data.train, data.train.0
    path: Path
    pieces: tuple[Piece, ...]  #: in the order in which they are read
    label: str  #: its name in metrics
    weight: float
    columns: DataConfig  #: ``data``, with the part's own columns

    @property
    def is_there(self) -> bool:
        """Whether the data set exists; True for hub datasets and a user's own source."""
        return _is_name(self.path) or self.path.exists()


def parts_of(data: DataConfig, split: Split) -> dict[str, DataPart]:
    """The parts of a split by configuration field; {}: the split is not given."""
    given: Path | tuple[DataPart, ...] | None = getattr(data, split)
    if given is None:
        return {}
    if isinstance(given, Path):
        return {f"data.{split}": DataPart(path=given)}
    if not given:
        raise UserError(f"data.{split} is an empty list; expected one data set or more; fill it")
    return {f"data.{split}.{number}": part for number, part in enumerate(given)}


def files_of(data: DataConfig) -> dict[str, Path]:
    """Every file or directory that the splits name, by field; without hub datasets and a user's own
    sources.
    """
    parts = {**parts_of(data, "train"), **parts_of(data, "eval")}
    return {field: part.path for field, part in parts.items() if not _is_name(part.path)}


def chosen_sources(data: DataConfig, split: Split) -> tuple[ChosenSource, ...]:
    """The data sets of a split; (): the split is not given.

    Raises:
        UserError: an unknown format, a mistake in settings, a user's own source that is missing or
            has a wrong signature, a directory without data, two parts with one label, columns that
            exclude each other.
    """
    parts = parts_of(data, split)
    labels: list[str] = []
    found = []
    for field, part in parts.items():
        label = part.label or _label(part.path)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", label) or (part.label and label in labels):
            raise UserError(
                f"{field}.label is {printable(repr(label))}{' as another is' * (label in labels)}; "
                "expected a name of its own, of lower-case letters, digits and underscores, for "
                f"its metrics; set {field}.label"
            )
        number, plain = 2, label
        while label in labels:
            label, number = f"{plain}_{number}", number + 1
        labels.append(label)
        pieces = _pieces(field, part)
        found.append(
            ChosenSource(field, part.path, pieces, label, part.weight, _columns(field, part, data))
        )
    return tuple(found)


def own_sources(data: DataConfig) -> list[SourceEntry]:
    """The rows of a user's own sources in both splits. Reads no directory."""
    parts = {**parts_of(data, "train"), **parts_of(data, "eval")}
    own = [part for part in parts.values() if part.format is None and _is_own(part.path)]
    return [find(SOURCES, as_written(str(part.path))) for part in own]


def data_text(given: Path | tuple[DataPart, ...] | None) -> str:
    """The data sets as text: ``data/train.jsonl``, or ``0.7 a.jsonl + 0.3 b.csv`` with shares."""
    if given is None or isinstance(given, Path):
        return str(given)
    whole = sum(part.weight for part in given)
    return " + ".join(f"{part.weight / whole:.3g} {part.path}" for part in given)


def row_of_file(path: Path) -> SourceEntry | None:
    """The row whose endings match a file's name; None: no row."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((row for row in SOURCES.rows if name.endswith(row.endings or ("\0",))), None)


def _is_name(path: Path) -> bool:
    """Whether a path names a hub dataset or a user's own source, and no file."""
    text = str(path)
    return not os.path.lexists(path) and (text.startswith(HUB) or _OWN.fullmatch(text) is not None)


def _is_own(path: Path) -> bool:
    """Whether a path names a user's own source."""
    return _is_name(path) and not str(path).startswith(HUB)


def _pieces(field: str, part: DataPart) -> tuple[Piece, ...]:
    path, text = part.path, str(part.path)
    if part.format is not None and part.format not in SOURCES.names:
        raise UserError(
            f"{field}.format is {printable(repr(part.format))}"
            f"{did_you_mean(part.format, SOURCES.names)}; expected one of "
            f"{', '.join(SOURCES.names)}"
        )
    row: SourceEntry | None
    if part.format is not None:
        row = find(SOURCES, part.format)
    elif _is_own(path):
        place = field if field.count(".") == 1 else f"{field}.path"
        source = find(SOURCES, as_written(text), place)  # since it will be filled in again
        return (Piece(source, path, _settings(field, part, source)),)
    elif _is_name(path):
        row = find(SOURCES, "hub")
    elif os.path.isdir(path):
        row = _row_of_directory(field, path)
    else:
        row = row_of_file(path) or find(SOURCES, "jsonl")
    if row is not None and not (os.path.isdir(path) and row.endings):
        return (Piece(row, path, _settings(field, part, row)),)
    return _files_in(field, part, row)


def _row_of_directory(field: str, path: Path) -> SourceEntry | None:
    """The row of a directory that holds one dataset; None: it holds files."""
    splits = path / _SAVED_SPLITS
    if os.path.exists(splits):
        names = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise UserError(
            f"{field}: {path} holds the splits {printable(', '.join(names))} of a saved dataset; "
            f"expected one; name it: {path / (names or ['train'])[0]}"
        )
    if all(os.path.exists(path / name) for name in _SAVED):
        return find(SOURCES, "saved")
    return None


def _files_in(field: str, part: DataPart, row: SourceEntry | None) -> tuple[Piece, ...]:
    """The data files of a directory by name; without subdirectories and other files."""
    try:
        files = sorted(child for child in part.path.iterdir() if not child.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"{field}: {part.path} cannot be read ({error.strerror}); expected a directory of "
            "data files; correct its rights"
        ) from error
    known = [(file, row_of_file(file)) for file in files if file.is_file()]
    rows = [(file, of) for file, of in known if of is not None and row in (None, of)]
    if not rows:
        endings = [end for of in SOURCES.rows if row in (None, of) for end in of.endings]
        raise UserError(
            f"{field}: {part.path} is a directory without data files; expected files called "
            f"*{', *'.join(endings)} in it; correct the path, or name the files one by one"
        )
    if part.settings and len({of.name for _, of in rows}) > 1:
        raise UserError(
            f"{field}.settings is given for {part.path}, which holds files of several formats; "
            f"expected {field}.format beside it: set it"
        )
    return tuple(Piece(of, file, _settings(field, part, of)) for file, of in rows)


def _settings(field: str, part: DataPart, row: SourceEntry) -> Settings | None:
    of = f"the data source {row.name}"
    return read_settings(f"{field}.settings", of, row.settings, part.settings)


def _columns(field: str, part: DataPart, data: DataConfig) -> DataConfig:
    """``data`` with the part's own columns; its prompt_key overrides the template of ``data``."""
    if part.template is not None and part.prompt_key is not None:
        raise UserError(
            f"{field} has a template and a prompt_key; expected one of them: where the prompt is, "
            "or how it is made; leave one out"
        )
    own: Mapping[str, Any] = {
        name: value for name in _COLUMNS if (value := getattr(part, name)) is not None
    }
    if part.prompt_key is not None:
        own = {**own, "template": None}
    return data.model_copy(update=own) if own else data


def _label(path: Path) -> str:
    """A name for metrics, made from a path."""
    text = str(path)
    if _is_name(path):
        name = text.removeprefix(HUB).partition("@")[0] if text.startswith(HUB) else label_of(text)
    else:
        name = path.name
    name = name.rpartition("/")[2].partition(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "_", name).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")
