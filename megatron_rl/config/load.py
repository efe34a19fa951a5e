"""Loads a config: YAML, overrides, model preset -> ``Config``. Errors name the place of a mistake.

Precedence: schema defaults < ``model.preset``, ``model.hf_path`` or ``model.hf_config`` < YAML <
command line. A field written in the YAML therefore wins over a preset named on the command line.
Paths (data, tokenizer, run_dir, init_from, hf_path) are relative to the current working directory,
not to the YAML file; ``~`` and ``${VAR}`` in them are filled in.
"""

from __future__ import annotations

import json
import os
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_rl.catalogue.describe import choices, expectation
from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.config.fields import is_dict, is_path, is_text, leaf_fields, takes_parts
from megatron_rl.config.hf_config import read_hf_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config
from megatron_rl.config.yaml_text import dump_yaml, is_name, parse_value, read_yaml
from megatron_rl.errors import UserError, shown
from megatron_rl.paths import as_written, local_path


class _Value(NamedTuple):
    """A value and its origin: ``run.yaml:3``, ``--seed``, ``preset tiny_moe``."""

    value: Any
    origin: str


class _Keys(NamedTuple):
    """The names the schema has."""

    leaves: dict[str, FieldInfo]
    sections: frozenset[str]


#: Default optimizer.lr of a run that starts from trained weights: the schema's default is for
#: random weights and would destroy trained ones.
LEARNING_RATES = {"train": 1e-6, "sft": 1e-5}


def load_config(path: Path | None, overrides: Sequence[str] = (), purpose: str = "train") -> Config:
    """The resolved configuration: preset values filled in, overrides applied, every type checked.

    ``overrides`` are command-line arguments, ``--section.key value`` or ``--section.key=value``,
    with the value in YAML: ``--seed 3``, ``--algorithm.settings.clip 0.3``,
    ``--model.moe_layer_freq [0,1]``. If a key is given twice the last one wins. ``path`` None:
    overrides alone. ``purpose``: the verb, which decides the default learning rate. Rules that span
    fields are in ``checks.py``.

    Raises UserError: unknown key (with the nearest valid one), wrong type or bound, invalid YAML,
    missing file, duplicate key, unknown preset, a Hugging Face config that is not understood, a
    path that is an address or names a variable that is not set.
    """
    keys = _schema_keys()
    tree, lines = ({}, {}) if path is None else read_yaml(Path(path))
    values = _flatten(tree, keys, lines, str(path))
    for flag, text in _split_flags(overrides):
        name = flag[2:]
        field = _field_of(name, keys, flag)
        value = _parse_flag(flag, text, field)
        if field is None:  # an entry of a dict: added to the others
            name, _, entry = name.rpartition(".")
            value = {**_entries(name, values, keys), entry: value}
        values[name] = _Value(value, flag)
    values = {name: _with_path(name, entry, keys) for name, entry in values.items()}
    return _validate({**_architecture(values), **_learning_rate(values, purpose), **values}, keys)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML, every field written out; ``load_config`` reads it back."""
    return dump_yaml(written_values(config))


def written_values(config: Config) -> dict[str, Any]:
    """The values that `dump_config` writes, in their sections."""
    data = config.model_dump(mode="json")
    for name, field in leaf_fields().items():
        *sections, last = name.split(".")
        section = reduce(dict.__getitem__, sections, data)
        if not is_path(name, field) or section[last] is None:
            continue
        if isinstance(section[last], list):
            for part in section[last]:
                part["path"] = as_written(part["path"])
        else:
            section[last] = as_written(section[last])
    return data


def _with_path(name: str, entry: _Value, keys: _Keys) -> _Value:
    """The value; ``~`` and ``${VAR}`` are filled in if the field takes a path, or a list of
    sections with one.
    """
    if not is_path(name, keys.leaves[name]):
        return entry
    value, place = entry.value, _place(name, entry.origin)
    if isinstance(value, str):
        value = local_path(place, value)
    elif isinstance(value, list):
        value = [
            {**part, "path": local_path(f"{place}.{number}.path", part["path"])}
            if isinstance(part, dict) and isinstance(part.get("path"), str)
            else part
            for number, part in enumerate(value)
        ]
    return entry._replace(value=value)


def _place(name: str, origin: str) -> str:
    """The place of a value: ``--seed``, ``run.yaml:3: seed``."""
    return origin if origin == f"--{name}" else f"{origin}: {name}"


def _schema_keys() -> _Keys:
    leaves = leaf_fields()
    parts = [name.split(".")[:-1] for name in leaves]
    sections = frozenset(".".join(p[: i + 1]) for p in parts for i in range(len(p)))
    return _Keys(leaves, sections)


def _flatten(
    tree: Any, keys: _Keys, lines: dict[str, str], file: str, prefix: str = ""
) -> dict[str, _Value]:
    """Nested YAML -> dotted leaves; refuses unknown keys, and a value in place of a section."""
    found: dict[str, _Value] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        origin = lines.get(name, file)
        if name in keys.sections:
            if value is None:  # `observe:` with every line below it commented out
                continue
            if not isinstance(value, dict):
                raise UserError(
                    f"{origin}: {name} is {shown(value)}; expected a section, `{name}:` with keys "
                    "below"
                )
            found.update(_flatten(value, keys, lines, file, name + "."))
        else:
            _field_of(name, keys, origin)
            found[name] = _Value(value, origin)
    return found


def _field_of(name: str, keys: _Keys, origin: str) -> FieldInfo | None:
    """The field of a dotted name; None for an entry of a dict (``algorithm.settings.clip``)."""
    if name in keys.leaves:
        return keys.leaves[name]
    above, _, entry = name.rpartition(".")
    if above in keys.leaves and is_dict(keys.leaves[above]) and entry:
        return None
    if name in keys.sections:
        inside = [leaf for leaf in keys.leaves if leaf.startswith(name + ".")]
        raise UserError(f"{origin}: {name} is a section; expected a key in it, such as {inside[0]}")
    where = "" if origin == f"--{name}" else f"{origin}: "
    key = f"--{name}" if origin == f"--{name}" else name
    hint = did_you_mean(name, keys.leaves) or "; expected a field of megatron_rl/config/schema.py"
    raise UserError(f"{where}unknown key {key}{hint}")


def _split_flags(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Command-line arguments -> (``--name``, text) pairs."""
    pairs: list[tuple[str, str]] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, text = word.partition("=")
        if not flag.startswith("--") or len(flag) == 2 or not is_name(flag):
            raise UserError(
                f"found {shown(word)} on the command line; expected --section.key value"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag} has no value; expected {flag} VALUE")
            text = rest.pop(0)
        pairs.append((flag, text))
    return pairs


def _parse_flag(flag: str, text: str, field: FieldInfo | None) -> Any:
    """A flag's text as YAML; if the field takes a string or path, all but null stays text."""
    text_only = field is not None and is_text(field)
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        if text_only:
            return text
        raise UserError(
            f"{flag}: {shown(text)} is not a YAML value; expected e.g. 3, 0.7, [0, 1]"
        ) from error
    if field is not None and text_only and isinstance(value, list) and takes_parts(field):
        return value
    return text if text_only and value is not None and not isinstance(value, str) else value


def _architecture(values: dict[str, _Value]) -> dict[str, _Value]:
    """The fields that a named preset or Hugging Face model determines."""
    named = {
        name: entry
        for name in ("model.preset", "model.hf_path", "model.hf_config")
        if (entry := values.get(name, _Value(None, ""))).value is not None
    }
    if len(named) > 1:
        (first, _), (second, entry), *_ = named.items()
        raise UserError(
            f"{entry.origin}: found {second} and also {first} ({named[first].origin}); expected "
            "one; set the other to null"
        )
    if not named or not isinstance((entry := next(iter(named.values()))).value, str):
        return {}  # none named, or a wrong type, which validation reports
    if "model.preset" in named:
        if entry.value not in MODEL_PRESETS:
            hint = did_you_mean(entry.value, MODEL_PRESETS)
            raise UserError(
                f"{entry.origin}: unknown model.preset {shown(entry.value)}{hint}; expected one of "
                f"{', '.join(MODEL_PRESETS)}"
            )
        fields, origin = MODEL_PRESETS[entry.value], f"preset {entry.value}"
    else:
        (name,) = named
        family = values.get("model.family", _Value(None, "")).value
        fields, origin = _read_hugging_face(name, entry, family), entry.value
    found = {f"model.{name}": _Value(value, origin) for name, value in fields.items()}
    if "model.hf_path" in named and "data.tokenizer.path" not in values:
        found["data.tokenizer.kind"] = _Value("huggingface", origin)
        found["data.tokenizer.path"] = _Value(entry.value, origin)
    return found


def _learning_rate(values: dict[str, _Value], purpose: str) -> dict[str, _Value]:
    """The default learning rate of a run that starts from trained weights."""
    trained = ("model.hf_path", "checkpoint.init_from")
    if purpose not in LEARNING_RATES or all(
        values.get(name, _Value(None, "")).value is None for name in trained
    ):
        return {}
    return {"optimizer.lr": _Value(LEARNING_RATES[purpose], f"the default of {purpose}")}


def _read_hugging_face(name: str, entry: _Value, family: Any) -> dict[str, Any]:
    """The fields that ``model.hf_path`` or ``model.hf_config`` determines."""
    path, place = Path(entry.value), _place(name, entry.origin)
    if name == "model.hf_path" and not os.path.isdir(path):
        raise UserError(
            f"{place} is {entry.value}, which is no directory; expected a Hugging Face model "
            "directory on this machine, with config.json and safetensors files; download the "
            "model, or correct the path"
        )
    file = path / "config.json" if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise UserError(
            f"{place}: {file} does not exist; expected a Hugging Face config.json"
            f"{'' if name == 'model.hf_path' else ' or its directory'}; correct the path"
        )
    return read_hf_config(path, family if isinstance(family, str) else None)


def _entries(name: str, values: dict[str, _Value], keys: _Keys) -> dict[str, Any]:
    """The entries of a dict field so far."""
    found = values.get(name, _Value({}, ""))
    if found.value is not None and not isinstance(found.value, dict):
        raise _wrong_value(name, found, keys)
    return found.value or {}


def _validate(values: dict[str, _Value], keys: _Keys) -> Config:
    """Dotted leaves -> ``Config``; the first mistake of type or bound becomes a UserError."""
    nested: dict[str, Any] = {}
    for name, entry in values.items():
        *above, last = name.split(".")
        branch = nested
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = entry.value
    try:
        # through JSON: pydantic's strict mode accepts strings as paths only from JSON
        return Config.model_validate_json(json.dumps(nested, default=str), strict=True)
    except ValidationError as error:
        raise _type_error(error, values, keys) from error


def _type_error(error: ValidationError, values: dict[str, _Value], keys: _Keys) -> UserError:
    """Name the first wrong value, its place, and what its field expects."""
    # For a list in a field that takes a path or a list: the mistake in the list.
    first = next((one for one in error.errors() if "tuple" in str(one["loc"])), error.errors()[0])
    location = [str(part) for part in first["loc"] if not str(part).startswith("tuple[")]
    # pydantic appends the branch of a union and the index in a list to the field's name
    names = [".".join(location[:n]) for n in range(len(location), 0, -1)]
    name = next((n for n in names if n in keys.leaves), None)
    if name is None:  # the string is no Unicode text
        raise UserError(f"the config is not valid: {first['msg']}") from error
    inside = location[name.count(".") + 1 :]
    if len(inside) > 1 and inside[0].isdigit():  # a key of a section in a list: reward.parts
        place = f"{_place(name, values[name].origin)}.{'.'.join(inside)}"
        found = json.dumps(first["input"], default=str)[:200]
        return UserError(f"{place} is {found}; {first['msg']}; correct it")
    return _wrong_value(name, values[name], keys)


def _wrong_value(name: str, found: _Value, keys: _Keys) -> UserError:
    hint = did_you_mean(str(found.value), choices(keys.leaves[name]))
    text = json.dumps(found.value, default=str)
    text = text if len(text) <= 200 else f"{text[:197]}..."
    place = _place(name, found.origin)
    return UserError(f"{place} is {text}{hint}; expected {expectation(keys.leaves[name])}")
