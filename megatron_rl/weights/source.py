"""Reading the tensors of a Hugging Face model directory: safetensors files, mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_rl.config.json_text import read_json_object
from megatron_rl.errors import UserError, printable, shown
from megatron_rl.families.common.family import Family
from megatron_rl.weights.fused import Place, places

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_INDEX_BYTES = 256 << 20
_LONGEST_NAME = 255
#: Of a tensor without values (a shared expert of width 0 is stored as such): a shape that costs no
#: bytes can claim anything, such as a billion experts.
_MOST_OF_NOTHING = 1 << 20
#: What weights may be stored in; quantised types need scales this package does not know.
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HuggingFaceTensors:
    """The tensors of a directory by name. Files are mapped: only what is used is read."""

    def __init__(self, directory: Path, family: Family | None = None) -> None:
        """Open the index, or the single file, and every file it names.

        Args:
            directory: of the model.
            family: of the model: what is stored in another form has the names of its rules then.

        Raises:
            UserError: no safetensors; a file missing, truncated or outside the directory; an index
                that does not agree with its files; a tensor of a type that is not supported;
                experts that are stored twice.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(
                f"{directory} is not a directory; expected a Hugging Face model directory with "
                "config.json and safetensors files; correct the path"
            )
        named = _read_index(self.directory)
        self._files = {}
        self._file_of: dict[str, str] = {}
        for file in sorted(named):
            opened = _open(self.directory / file)
            self._files[file] = opened
            found = set(opened.keys())
            absent = sorted(named[file] - found) if named[file] else []
            if absent:
                raise UserError(
                    f"{self.directory / INDEX} says that {file} holds {shown(absent[0])}, which it "
                    "does not; expected index and files of one model; restore the directory"
                )
            self._file_of.update(dict.fromkeys(named[file] or found, file))
        shapes = {name: self._check(name) for name in self._file_of}
        self._places = places(shapes, family, self.directory)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    @property
    def num_bytes(self) -> int:
        """What the files take on the disk."""
        return sum((self.directory / file).stat().st_size for file in self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._place(name).shape

    def get(self, name: str) -> torch.Tensor:
        """A tensor, mapped from its file. UserError: there is none of that name."""
        place = self._place(name)
        file = self._files[self._file_of[place.stored]]
        if place.expert is None:
            return file.get_tensor(place.stored)
        return file.get_slice(place.stored)[place.expert, place.begin : place.end]

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise UserError(
                f"{self.directory} holds no tensor {name}; expected one, as its config.json "
                "describes; restore the file that held it, or correct config.json"
            )
        return self._places[name]

    def _check(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor; refuses its type, and what no weight is."""
        file = self.directory / self._file_of[name]
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise UserError(
                f"{file} holds a tensor named {shown(name)}; expected the name of a weight; "
                "restore the file"
            )
        tensor = self._files[self._file_of[name]].get_slice(name)
        if 0 in tensor.get_shape() and max(tensor.get_shape()) > _MOST_OF_NOTHING:
            raise UserError(
                f"{file} holds {name} without values, of shape {shown(tensor.get_shape())}; "
                "expected a weight; restore the file"
            )
        if tensor.get_dtype() not in _DTYPES:
            raise UserError(
                f"{file} holds {name} as {tensor.get_dtype()}; "
                f"expected one of {', '.join(_DTYPES)}; convert the model to bfloat16 first"
            )
        return tuple(tensor.get_shape())


def _read_index(directory: Path) -> dict[str, set[str]]:
    """File name -> the tensors it is said to hold; none named: whatever it holds."""
    index = directory / INDEX
    if not index.is_file():
        if (directory / SINGLE).is_file():
            return {SINGLE: set()}
        raise UserError(
            f"{directory} holds neither {INDEX} nor {SINGLE}; expected a model in safetensors "
            "format; convert pickled weights (pytorch_model.bin) to safetensors first"
        )
    content = read_json_object(index, "the index of a model's safetensors files", _INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index} has no 'weight_map'; expected a JSON object that gives each tensor its file; "
            "restore the file"
        )
    named: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # Its name alone: an index may not make us read files elsewhere.
        if not isinstance(file, str) or not _is_name(file):
            raise UserError(
                f"{index} names the file {shown(file)}; expected the name of a file in "
                f"{directory}; restore the index"
            )
        named.setdefault(file, set()).add(name)
    return named


def _is_name(file: str) -> bool:
    plain = Path(file).name == file and file not in ("", ".", "..") and file.isprintable()
    return plain and len(file.encode()) <= _LONGEST_NAME


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the file the index names; restore the file")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        said = printable(" ".join(str(error).split()))
        raise UserError(
            f"{path} cannot be read ({said}); expected a complete "
            f"safetensors file, it has {path.stat().st_size:,} bytes; restore the file"
        ) from error
