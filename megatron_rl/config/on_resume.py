"""Compares two configurations key by key: what may change when a run resumes, and what has
changed.
"""

from __future__ import annotations

import json
import os
from typing import Any, Literal, Mapping, NamedTuple

from megatron_rl.config.fields import is_path, leaf_fields, leaf_values
from megatron_rl.config.schema import Config

#: silent: affects where and how the run is shown, stored and computed; said: affects what is
#: trained or measured, allowed with a note; refused: the checkpoint cannot continue with another
#: value.
Kind = Literal["silent", "said", "refused"]

NOT_SET = "(not set)"

_ARCHITECTURE = """
num_layers hidden_size num_attention_heads num_query_groups head_dim ffn_hidden_size num_experts
moe_top_k moe_ffn_hidden_size moe_layer_freq shared_expert_ffn_hidden_size shared_expert_gate
router_score router_pre_softmax router_expert_bias router_num_groups router_group_top_k
router_scaling_factor vocab_size rope_base yarn qk_norm qk_norm_scope kv_lora_rank q_lora_rank
qk_nope_head_dim qk_rope_head_dim v_head_dim qkv_bias norm_epsilon tie_embeddings dtype
""".split()
_TRAINING_OF_THE_MODEL = """
preset hf_path hf_config family aux_loss_coeff z_loss_coeff expert_bias_update_rate freeze_router
max_sequence_length init_std transformer_engine fp32_head
""".split()
_DATA = """
tokenizer.kind tokenizer.path tokenizer.trust_remote_code train eval prompt_key completion_key
pack_tokens pack_multiple share_prompts chat last_turn overlong template system answer_key
chat_template_kwargs tools_key
""".split()
_CHECKPOINT = "every asynchronous keep keep_best best_metric resume changed_data".split()

#: Every key of the schema, by its own name or its section's: the longest match counts. Each key of
#: model, data and checkpoint, and each section, needs an entry.
ON_RESUME: dict[str, Kind] = {
    "run_dir": "silent",
    "seed": "refused",  # it orders the problems
    **{f"model.{name}": "refused" for name in _ARCHITECTURE},
    **{f"model.{name}": "said" for name in _TRAINING_OF_THE_MODEL},
    "parallel": "said",
    "parallel.expert_exchange": "silent",
    "device": "silent",
    # Another file, tokenizer or key does no harm if it gives the same problems: the checkpoint
    # identifies them by content (data/identity.py).
    **{f"data.{name}": "said" for name in _DATA},
    "data.shuffle": "refused",
    "reward": "said",
    "rollout": "said",
    "rollout.servers": "silent",
    "rollout.servers.probe_tolerance": "said",
    "rollout.max_batch": "silent",
    "algorithm": "said",
    "algorithm.trace_store": "silent",
    "optimizer": "said",
    "optimizer.name": "refused",  # another optimizer has another state
    "train": "said",
    "evaluate": "said",
    **{f"checkpoint.{name}": "silent" for name in _CHECKPOINT},
    "checkpoint.init_from": "said",
    "observe": "silent",
}


class Change(NamedTuple):
    """A key with its values before and after, as YAML and JSON hold them."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.before)} -> {shown(self.after)}"


def kind_of(key: str) -> Kind:
    """The kind of a key, or of an entry of a dict field; "said" for a key that the schema no longer
    has.
    """
    name = key
    while name and name not in ON_RESUME:
        name = name.rpartition(".")[0]
    return ON_RESUME.get(name, "said")


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The differences between two resolved configurations that are not silent, in the order of
    ``after``.

    A key that only one of them has (of another version) differs if its value is not the default.
    """
    old, new = dict(leaf_values(before)), dict(leaf_values(after))
    defaults = dict(leaf_values(Config().model_dump(mode="json")))
    found = []
    for key in dict.fromkeys([*new, *old]):
        if (key in old) != (key in new) and key in defaults:
            if old.get(key, new.get(key)) == defaults[key]:
                continue
        change = Change(key, old.get(key, NOT_SET), new.get(key, NOT_SET))
        if not _same(change) and kind_of(key) != "silent":
            found.append(change)
    return found


def shown(value: Any) -> str:
    """A value as text."""
    return value if isinstance(value, str) else json.dumps(value)


def _same(change: Change) -> bool:
    """Whether two values are equal, or spell the same path."""
    before, after = change.before, change.after
    if before == after:
        return type(before) is type(after) or {type(before), type(after)} <= {int, float}
    field = leaf_fields().get(change.key)
    if field is None or not is_path(change.key, field):
        return False
    if not (isinstance(before, str) and isinstance(after, str)):
        return False
    return os.path.realpath(before) == os.path.realpath(after)
