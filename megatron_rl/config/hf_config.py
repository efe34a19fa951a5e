"""Maps a Hugging Face config.json to ``ModelConfig`` fields and refuses what is not implemented.

The family (``families/``) decides which keys it reads. It reads the spellings of transformers 4
(``rope_theta``, ``num_experts``, ``torch_dtype``) and 5 (``rope_parameters``,
``num_local_experts``, ``dtype``). A wrong architecture would still load and save every weight bit
for bit, so a key that is neither mapped nor known to be harmless is an error. The family's keys
define types and bounds, which are checked before any value is used.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, ContextManager, Mapping

from pydantic import ValidationError

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.families import FamilyEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import FAMILIES
from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.config.architecture import DESCRIBED
from megatron_rl.config.json_text import read_json_object
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import printable, shown
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.file import HuggingFaceFile, given
from megatron_rl.families.common.keys import Keys, spellings_of
from megatron_rl.families.common.meaningless import is_meaningless

_PLAIN = (
    f"a plain config.json of {', '.join(FAMILIES.names)}, or one of a family of your own "
    "(model.family)"
)


def read_hf_config(path: Path, family: str | None = None) -> dict[str, Any]:
    """The ``ModelConfig`` fields that a config.json (or the directory that holds it) determines.

    ``max_sequence_length`` is set to ``max_position_embeddings``; balancing losses are not read.
    ``family``: as in ``model.family``; None: the family of the file's model_type.

    Raises UserError for a file that cannot be read, an unknown model_type, a missing key, a value
    of another type or out of bounds, and any key whose meaning is not implemented (rope scaling,
    sliding windows, clip_qkv, quantization, biases other than Qwen2's).
    """
    file = _open(path)
    return read_fields(file, row_of(file, family))


def fields_of_values(values: Mapping[str, Any], family: str | None = None) -> dict[str, Any]:
    """As ``read_hf_config``, from the content of a config.json."""
    file = HuggingFaceFile(Path("config.json"), given(values), _PLAIN)
    return read_fields(file, row_of(file, family))


def family_of(path: Path, family: str | None = None) -> Family:
    """The family of a config.json (or of the directory that holds it). Raises as
    ``read_hf_config``.
    """
    return row_of(_open(path), family).load()


def model_type_of(path: Path) -> str | None:
    """The model_type of a config.json."""
    found = _open(path).values.get("model_type")
    return found if isinstance(found, str) else None


def row_of(file: HuggingFaceFile, named: str | None) -> FamilyEntry:
    """The named family, else the family of the file's model_type. UserError: there is none, or the
    file belongs to another shipped family.
    """
    model_type = file.values.get("model_type")
    known = isinstance(model_type, str) and model_type in FAMILIES.names
    if named is None:
        if not isinstance(model_type, str) or not known:
            text = model_type if isinstance(model_type, str) else ""
            hint = did_you_mean(text, FAMILIES.names)
            raise file.refuse(f"model_type {shown(model_type)} is not supported{hint}")
        return find(FAMILIES, model_type)
    row = find(FAMILIES, named)
    if known and model_type != row.load().model_type:
        raise file.refuse(
            f"model_type is {model_type}, and model.family {named} is of "
            f"{shown(row.load().model_type)}"
        )
    return row


def read_fields(file: HuggingFaceFile, row: FamilyEntry) -> dict[str, Any]:
    """The fields that the family reads from a file. Raises as ``read_hf_config``."""
    family = row.load()
    keys = _typed(file, family.keys)
    with blamed(row, f"reading {file.path}"):
        fields = {**family.read_common(file, keys), **family.read(file, keys)}
    _refuse_the_rest(file, keys, family)
    if row.own is not None:
        _check_fields(file, fields, row)
    return fields


def blamed(row: FamilyEntry, doing: str) -> ContextManager[None]:
    """A context for calling a family's functions: an error of a user's own becomes one line."""
    if row.own is None:
        return contextlib.nullcontext()
    return blame(f"model.family {printable(row.name)}: {doing}", "correct the family")


def _open(path: Path) -> HuggingFaceFile:
    file = path / "config.json" if os.path.isdir(path) else path
    values = given(read_json_object(file, "a Hugging Face config.json"))
    return HuggingFaceFile(file, values, _PLAIN)


def _typed(file: HuggingFaceFile, kind: type[Keys]) -> Keys:
    """The values as the family's key class; refuses the first with a wrong type or out of
    bounds.
    """
    values, spelled = dict(file.values), spellings_of(kind)
    for name, spellings in spelled.items():
        found = {key: values.pop(key) for key in spellings if key in values}
        first = next(iter(found.values()), None)
        if any(value != first for value in found.values()):
            said = " and ".join(f"{key}={shown(value)}" for key, value in found.items())
            raise file.refuse(f"{said} contradict")
        values |= {} if first is None else {name: first}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(values.get(name), dict):
            values[name] = given(values[name])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        if wrong["type"] == "missing":
            raise file.refuse(f"{' or '.join(spelled.get(name, (name,)))} is missing") from error
        raise file.refuse(
            f"{name} is {shown(wrong['input'])} ({wrong['msg'].replace('Input', 'it', 1)})"
        ) from error


def _refuse_the_rest(file: HuggingFaceFile, keys: Keys, family: Family) -> None:
    """Every key must have been mapped, be harmless, or have a value that means nothing."""
    for key, value in (keys.model_extra or {}).items():
        neutral = is_meaningless(key, value, family.meaningless)
        if neutral is None:
            raise file.refuse(f"key {shown(key)} is not understood")
        if not neutral:
            raise file.refuse(f"{key} {shown(value)} is not supported")


def _check_fields(file: HuggingFaceFile, fields: Mapping[str, Any], row: FamilyEntry) -> None:
    """Check that a user's own family reads only fields and values that models here can have."""
    unknown = sorted(set(fields) - DESCRIBED)
    if unknown:
        raise file.refuse(
            f"model.family {row.name} reads {shown(unknown[0])}, which models here do not "
            f"have{did_you_mean(str(unknown[0]), DESCRIBED)}"
        )
    try:
        ModelConfig.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        said = " ".join(wrong["msg"].split())
        raise file.refuse(
            f"model.family {row.name} reads model.{name} as {shown(wrong['input'])} ({said})"
        ) from error
