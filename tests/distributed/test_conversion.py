"""Hugging Face models through every layout: same logits, same bits back, re-laid bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.hf_config import read_hf_config
from megatron_rl.config.schema import Config
from tests.support import hugging_face
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny

LAYOUTS = {
    "one process": (1, {}),
    "EP2": (2, {"expert": 2}),
    "EP4": (4, {"expert": 4}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2 EP2": (2, {"tensor": 2, "expert": 2}),
    "TP2 ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "TP2 PP2 EP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2}),
}
#: For a model that has no experts to spread.
DENSE_LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "PP2": (2, {"pipeline": 2}),
    "PP4": (4, {"pipeline": 4}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2": (2, {"tensor": 2}),
    "TP2 CP2": (4, {"tensor": 2, "context": 2}),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}),
}
ALL_LAYOUTS = {**LAYOUTS, **DENSE_LAYOUTS}
#: Small shards: several files a rank.
SHARD_BYTES = 100_000


@dataclasses.dataclass(frozen=True)
class Job:
    """What one layout does with a model directory."""

    source: Path
    work: Path
    layout: str

    @property
    def config(self) -> Config:
        parallel = ALL_LAYOUTS[self.layout][1]
        return Config(model=read_hf_config(self.source), parallel=parallel)

    @property
    def checkpoint(self) -> Path:
        return self.work / self.layout.replace(" ", "_")

    @property
    def exported(self) -> Path:
        return self.work / f"exported_{self.layout.replace(' ', '_')}"


def import_and_export(job: Job):
    """On a rank: logits of the imported model; writes an export and a checkpoint."""
    from megatron_rl.checkpoint.identity import architecture_of, layout_of
    from megatron_rl.checkpoint.save import save_checkpoint
    from megatron_rl.weights.export import export_model
    from megatron_rl.weights.from_hugging_face import load_hf_weights

    config = job.config
    groups, _, chunks = build_tiny(config)
    load_hf_weights(chunks, groups, config.model, job.source)
    found = model_logits(chunks, groups)
    export_model(chunks, groups, config.model, job.exported, shard_bytes=SHARD_BYTES)
    save_checkpoint(
        job.checkpoint,
        0,
        chunks=chunks,
        optimizer=None,
        state={},
        architecture=architecture_of(config.model),
        layout=layout_of(config.parallel, groups.world.size()),
        groups=groups,
        keep=1,
    )
    return found


def load_checkpoint_of(job: Job, checkpoint: Path):
    """On a rank: names of weights that a checkpoint of another layout gives other values."""
    from megatron_rl.checkpoint.identity import architecture_of
    from megatron_rl.checkpoint.restore import load_weights
    from megatron_rl.models.parameters import weight_views
    from megatron_rl.weights.from_hugging_face import load_hf_weights

    config = job.config
    groups, _, chunks = build_tiny(config)
    load_hf_weights(chunks, groups, config.model, job.source)
    views = list(weight_views(chunks, groups))
    wanted = [view.of(view.parameter.data).clone() for view in views]
    for view in views:
        view.parameter.data.fill_(float("nan"))
    architecture = architecture_of(config.model)
    load_weights(checkpoint, chunks=chunks, architecture=architecture, groups=groups)
    pairs = zip(views, wanted, strict=True)
    return [view.name for view, want in pairs if not torch.equal(view.of(view.parameter), want)]


def model_logits(chunks, groups):
    """Logits of this rank's columns, padding left out; None but on the last stage."""
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_stages

    tokens = hugging_face.tokens()
    placement = packed_placement([len(tokens)], len(tokens), torch.device("cpu"))
    found = forward_stages(chunks, tokens, placement, groups)
    return None if found is None else (groups.tensor.rank(), found)


def whole_logits(ranks):
    """[T, V] from what the ranks return."""
    columns = {entry[0]: entry[1] for entry in ranks if entry is not None}
    return torch.cat([columns[rank] for rank in sorted(columns)], 1)[:, : hugging_face.VOCABULARY]


def stored(directory):
    """All tensors of a model directory."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def check(variant, layouts, folder, fused=False):
    """``fused``: in the source the experts of a layer lie in one tensor; never in the result."""
    single = hugging_face.save(variant, folder / "single", max_shard_size="80KB")
    original, source = stored(single), single
    if fused:
        source = folder / "fused"
        hugging_face.save(variant, source, max_shard_size="80KB", save_original_format=False)
        assert not any("experts.gate_up_proj" in name for name in original)
        assert any("experts.gate_up_proj" in name for name in stored(source))
    expected = hugging_face.logits(source)
    assert expected.std() > 0.5
    jobs = {name: Job(source, folder, name) for name in layouts}
    for name, job in jobs.items():
        found = whole_logits(run_on_ranks(ALL_LAYOUTS[name][0], import_and_export, job))
        where = f"{variant}, {name}"
        close(found, expected, where)
        same_bits(stored(job.exported), original, where)
    first = jobs[layouts[0]].exported
    assert torch.equal(hugging_face.logits(first), expected)  # and its config.json says the same
    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(original)
    assert len(set(index["weight_map"].values())) > 2
    for before, name in zip(layouts, [*layouts[1:], layouts[0]], strict=True):
        ranks = ALL_LAYOUTS[name][0]
        wrong = run_on_ranks(ranks, load_checkpoint_of, jobs[name], jobs[before].checkpoint)
        assert wrong == [[]] * ranks, f"{variant}, {before} -> {name}"


def close(found, expected, where):
    torch.testing.assert_close(
        found, expected, atol=1e-4, rtol=0, msg=lambda text: f"{where}: {text}"
    )


def same_bits(found, original, where):
    assert set(found) == set(original), where
    for name, tensor in original.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), (where, name)


@pytest.mark.conversion
@pytest.mark.parametrize("variant", hugging_face.VARIANTS)
def test_every_family_under_every_layout(variant, tmp_path):
    check(variant, list(DENSE_LAYOUTS if variant == "qwen3" else LAYOUTS), tmp_path)


@pytest.mark.conversion
@pytest.mark.parametrize("variant", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_fused_experts_under_layouts(variant, tmp_path):
    check(variant, ["EP4", "TP2 ETP2", "PP2 VPP2"], tmp_path, fused=True)


@pytest.mark.parametrize("variant", ["qwen2_moe", "qwen3_moe, tied", "deepseek_v3", "olmoe"])
def test_a_sample_of_families_and_layouts(variant, tmp_path):
    check(variant, ["TP2 ETP2", "PP2 VPP2"], tmp_path)
