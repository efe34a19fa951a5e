"""The classes of a family: data, and two functions between config.json and the model's fields."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Callable, Literal, Mapping

from megatron_rl.families.common.config_json import read_common, write_common
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import Keys
from megatron_rl.families.common.names import EMBEDDING, FINAL_NORM, OUTPUT

#: How a weight is joined from its parts (by ``weights/rules.py``): copy: the one part. gate_up:
#: [gate; up], each [F, D]. qkv: for each query group its query heads, its key head, its value head.
Join = Literal["copy", "gate_up", "qkv"]
PARTS: Mapping[Join, int] = {"copy": 1, "gate_up": 2, "qkv": 3}


@dataclass(frozen=True)
class Rule:
    """Makes one weight from Hugging Face tensors."""

    join: Join
    parts: tuple[str, ...]  #: names of the tensors, in order
    #: names of one tensor that a directory may hold instead: for an expert's weight, the tensor of
    #: all experts of the layer, [E, rows of all parts, columns]; for other weights, the same tensor
    #: under another name. Only read, never written.
    stored_as: tuple[str, ...] = ()


#: Fields of ``ModelConfig`` by name, with defaults filled in: ``num_query_groups`` and ``head_dim``
#: are numbers, ``moe_layer_freq`` is a list with 0 or 1 for each layer.
Model = Mapping[str, Any]
Reader = Callable[[HuggingFaceFile, Any], dict[str, Any]]
Writer = Callable[[Model], dict[str, Any]]

#: Weights outside of the layers.
TOP: Mapping[str, Rule] = {
    EMBEDDING: Rule("copy", ("model.embed_tokens.weight",)),
    FINAL_NORM: Rule("copy", ("model.norm.weight",)),
    OUTPUT: Rule("copy", ("lm_head.weight",)),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A Hugging Face family. Readers and writers are inverse: an export is written only if reading
    it again gives the same model.

    A reader gets the file, whose ``refuse`` makes the error for an unsupported value, and the typed
    keys. A writer gets the model's fields and must accept any model, also one that the family
    cannot describe.
    """

    model_type: str  #: as in config.json
    architecture: str  #: the class of transformers that loads it
    summary: str  #: one line
    source: str = ""  #: where the family is published
    keys: type[Keys]  #: class of the config.json keys that its models are built from
    read: Reader  #: (file, keys) -> fields of ``ModelConfig`` beyond those of ``read_common``
    write: Writer  #: (model) -> keys of config.json beyond those of ``write_common``
    #: our name of a weight within a layer, with ``{expert}`` for an expert's number -> its rule,
    #: with names relative to ``layer_name``
    layer_weights: Mapping[str, Rule]
    layer_name: str = "model.layers.{layer}."  #: prefix of the names of a layer's tensors
    weights: Mapping[str, Rule] = field(
        default_factory=lambda: TOP
    )  #: rules of the weights outside of the layers
    #: further keys, with the values that change nothing; any other value is refused
    meaningless: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read_common: Reader = read_common  #: of keys that families spell alike
    write_common: Writer = write_common

    def mistake(self) -> str | None:
        """The family's mistake, with what is expected; None: no mistake."""
        for name in ("model_type", "architecture", "summary", "source", "layer_name"):
            if not isinstance(getattr(self, name), str):
                return f"its {name} is {getattr(self, name)!r}; expected a string"
        if not (isinstance(self.keys, type) and issubclass(self.keys, Keys)):
            return f"its keys is {self.keys!r}; expected a class that derives from Keys"
        if _places(self.layer_name) != ["layer"]:
            return f"its layer_name is {self.layer_name!r}; expected one with {{layer}} in it"
        for name in ("layer_weights", "weights", "meaningless"):
            if not isinstance(getattr(self, name), Mapping):
                return f"its {name} is {getattr(self, name)!r}; expected a mapping"
        if set(self.weights) != set(TOP):
            return f"its weights are {', '.join(self.weights) or 'none'}; expected {', '.join(TOP)}"
        return _wrong_call(self) or _wrong_rule({**self.weights, **self.layer_weights})


def _wrong_call(family: Family) -> str | None:
    calls = {"read": 2, "read_common": 2, "write": 1, "write_common": 1}
    for name, count in calls.items():
        arguments = ("file", "keys") if count == 2 else ("model",)
        expected = f"its {name} has to be a function ({', '.join(arguments)})"
        try:
            inspect.signature(getattr(family, name)).bind(*arguments)
        except (TypeError, ValueError):
            return f"{expected}; correct it"
    return None


def _wrong_rule(rules: Mapping[str, Any]) -> str | None:
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            return f"its rule of {name} is {rule!r}; expected a Rule"
        mistake = _wrong_names(rule, numbered="{expert}" in name)
        if mistake is not None:
            return f"its rule of {name} has {mistake}"
    return None


def _wrong_names(rule: Rule, numbered: bool) -> str | None:
    if rule.join not in PARTS:
        return f"the join {rule.join!r}; expected one of {', '.join(PARTS)}"
    for field_name, names in (("parts", rule.parts), ("stored_as", rule.stored_as)):
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            return f"{field_name} {names!r}; expected a tuple of names, such as ('one', 'two')"
    if len(rule.parts) != PARTS[rule.join]:
        return f"{len(rule.parts)} parts; expected {PARTS[rule.join]} with the join {rule.join}"
    if any(_places(part) != ["expert"] * numbered for part in rule.parts):
        return (
            f"parts {rule.parts}; expected {{expert}} {'once in each' if numbered else 'in none'}"
        )
    if any(_places(name) for name in rule.stored_as):
        return f"stored_as {rule.stored_as}; expected no {{}} in them"
    return None


def _places(text: str) -> list[str | None] | None:
    """The names in braces; None: a brace is not closed."""
    try:
        return [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError:
        return None
