"""Model directories: headers of safetensors and their index. An accepted tensor lies wholly in its
file, by a separate reader of headers.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import struct
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.families.qwen3_moe import FAMILY
from megatron_rl.weights.source import INDEX, HuggingFaceTensors
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import as_text, changed, encoded, flipped

_DATA = struct.pack("<10f", *range(10))
_FUSED = "model.layers.0.mlp.experts.gate_up_proj"
_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    _FUSED: {"dtype": "F32", "shape": [2, 2, 2], "data_offsets": [8, 40]},
}
_MAP = {
    "metadata": {"total_size": 40},
    "weight_map": {"a": "one.safetensors", _FUSED: "one.safetensors"},
}
_WIDTH = {"F32": 4, "BF16": 2, "F16": 2}


def make(rng: random.Random) -> tuple[bytes, bytes | None]:
    """(a safetensors file, its index or none)."""
    text = json.dumps(_HEADER).encode()
    if rng.random() < 0.6:
        text = encoded(rng, as_text(rng, changed(rng, _HEADER, rng.randint(1, 3))))
    length = (
        len(text) if rng.random() < 0.9 else rng.choice([0, 1, 7, 10**6, 2**40, 2**63, 2**64 - 1])
    )
    file = struct.pack("<Q", length) + text + _DATA
    if rng.random() < 0.2:
        file = flipped(rng, file)
    if rng.random() < 0.3:
        return file, None
    if rng.random() < 0.5:
        return file, json.dumps(_MAP).encode()
    return file, encoded(rng, as_text(rng, changed(rng, _MAP, rng.randint(1, 2))))


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A directory with or without an index."""
    single, shard, index_file = (
        folder / n for n in ("model.safetensors", "one.safetensors", INDEX)
    )

    def judge(case: tuple[bytes, bytes | None]) -> Verdict:
        file, index = case
        for path in (single, shard, index_file):
            path.unlink(missing_ok=True)
        (single if index is None else shard).write_bytes(file)
        if index is not None:
            index_file.write_bytes(index)
        source = HuggingFaceTensors(folder, FAMILY)
        header = _header(file)
        for name in source.names:
            tensor = source.get(name)
            if tuple(tensor.shape) != source.shape(name) or not tensor.numel():
                raise Wrong(f"{name} has another shape")
            if name in header and tensor.numel() != math.prod(header[name]["shape"]):
                raise Wrong(f"{name} has another size")
        return Verdict.TAKEN

    yield judge


def _header(file: bytes) -> dict[str, Any]:
    """The entries of a file; Wrong: one of them is not whole, or two overlap."""
    (length,) = struct.unpack("<Q", file[:8])
    if length > len(file) - 8:
        raise Wrong("a header beyond the file")
    entries = {k: e for k, e in json.loads(file[8 : 8 + length]).items() if k != "__metadata__"}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        size = math.prod(entry["shape"]) * _WIDTH[entry["dtype"]]
        if begin != end or stop - begin != size:
            raise Wrong(f"{name} is not where its size says")
        end = stop
    if end != len(file) - 8 - length:
        raise Wrong("bytes of no tensor")
    return entries


KIND = Kind("weights", make, judging)
