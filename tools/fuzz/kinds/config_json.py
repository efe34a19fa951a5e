"""config.json of Hugging Face models: an accepted one is a model, and the same model when written
again.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.cli import check_rows
from megatron_rl.config.checks import check_config
from megatron_rl.config.hf_config import fields_of_values, read_hf_config
from megatron_rl.config.hf_export import hf_config_of
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.config.stop_tokens import read_stop_ids
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import as_text, changed, encoded

_PRESETS = (
    *("qwen3_30b_a3b", "qwen1_5_moe_a2_7b", "mixtral_8x7b", "olmoe_1b_7b", "deepseek_v3"),
    "qwen3_4b",
)
_PLAIN = [hf_config_of(ModelConfig(**MODEL_PRESETS[name])) for name in _PRESETS]


def make(rng: random.Random) -> tuple[bool, bytes]:
    """(whether nothing was changed, the file)."""
    value = rng.choice(_PLAIN)
    times = rng.randrange(4)
    if not times:
        return True, json.dumps(value).encode()
    return False, encoded(rng, as_text(rng, changed(rng, value, times)))


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """The file in a directory of its own."""
    file = folder / "config.json"

    def judge(case: tuple[bool, bytes]) -> Verdict:
        plain, data = case
        file.write_bytes(data)
        try:
            model = _read(folder)
        except Exception:
            if plain:
                raise Wrong(f"refused: {data[:300]!r}") from None
            raise
        again = architecture_of(ModelConfig(**fields_of_values(hf_config_of(model))))
        taken = architecture_of(model)
        differing = [name for name in taken if taken[name] != again[name]]
        if differing:
            raise Wrong(f"{differing[0]} is another one when written again: {data[:300]!r}")
        return Verdict.TAKEN

    def _read(folder: Path) -> ModelConfig:
        read_stop_ids(folder)
        model = ModelConfig(**read_hf_config(folder))
        config: Any = Config(model=model, data={"pack_tokens": max(8, model.max_sequence_length)})
        check_config(config, None, "generate", files=False)
        check_rows(config)
        return model

    yield judge


KIND = Kind("config_json", make, judging)
