"""Tiny Hugging Face models of every family, with weights that make a mistake in any tensor show."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from megatron_rl.records import Completion, Prompt

VOCABULARY = 125  # no multiple of 2: tensor parallelism pads it
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
)


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_QWEN3 = dict(
    **_COMMON,
    **_rope(1e6),
    head_dim=32,  # other than hidden / heads
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    intermediate_size=96,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
)
_DEEPSEEK = dict(
    **{**_COMMON, "num_key_value_heads": 4},
    **_rope(1e4),
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    moe_intermediate_size=32,
    intermediate_size=96,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
)
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    }
}
_NO_GROUPS = dict(n_group=1, topk_group=1)
_SMALL = dict(num_experts_per_tok=2, intermediate_size=32)

#: variant -> (family of transformers' classes, options of its configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", _QWEN3),
    "qwen3_moe, tied": ("Qwen3Moe", {**_QWEN3, "tie_word_embeddings": True}),
    "qwen3_moe, not normalised": ("Qwen3Moe", {**_QWEN3, "norm_topk_prob": False}),
    "qwen3_moe, dense layers": ("Qwen3Moe", {**_QWEN3, "mlp_only_layers": [0, 2]}),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            **_COMMON,
            **_rope(1e6),
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            intermediate_size=96,
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            use_sliding_window=False,
        ),
    ),
    "mixtral": (
        "Mixtral",
        dict(
            **_COMMON,
            **_rope(1e6),
            **_SMALL,
            num_local_experts=8,
            sliding_window=None,
            head_dim=16,
        ),
    ),
    "olmoe": (
        "Olmoe",
        dict(**_COMMON, **_rope(1e4), **_SMALL, num_experts=8, norm_topk_prob=False),
    ),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "deepseek_v3, whole queries": ("DeepseekV3", {**_DEEPSEEK, "q_lora_rank": None, **_NO_GROUPS}),
    "deepseek_v3, stretched": ("DeepseekV3", {**_DEEPSEEK, **_YARN}),
    "qwen3": (
        "Qwen3",
        dict(**_COMMON, **_rope(1e6), head_dim=32, intermediate_size=96),
    ),
}


def build(variant: str) -> torch.nn.Module:
    """The model of a variant, fp32, in evaluation mode."""
    import transformers

    family, options = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(2)
    biases = [item for item in model.named_buffers() if "e_score" in item[0]]
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *biases]:
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_((0.1 if name.endswith("bias") else 0.15) * noise)
    return model


def save(variant: str, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Write a variant's model directory; options of ``save_pretrained``, such as max_shard_size."""
    build(variant).to(dtype).save_pretrained(directory, **options)
    return directory


def tokens(count: int = 24) -> torch.Tensor:
    """Fixed token ids int64 [count]."""
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(3))


#: Loading switches off, for the whole process, that weights are tied; of two threads that load, the
#: second takes that for what it has to restore.
_loading = threading.Lock()


def load(directory: Path) -> torch.nn.Module:
    """The model of a model directory, fp32, in evaluation mode."""
    import transformers

    with _loading:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False
        )
    return model.eval()


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    """What transformers computes from a model directory in fp32, [24, V]."""
    return load(directory)(tokens()[None], use_cache=False).logits[0]


@torch.no_grad()
def drawn_by(
    models: Sequence[torch.nn.Module], prompt: Prompt, answer: Completion, within: float
) -> np.ndarray:
    """Whether each token's log-probability is what each of the models gives it: bool [M, T]."""
    ids = torch.tensor([*prompt.tokens.tolist(), *answer.tokens.tolist()])
    places = torch.arange(len(prompt.tokens), len(ids))
    logits = torch.stack([model(ids[None], use_cache=False).logits[0] for model in models])
    logprobs = logits.double().log_softmax(-1)[:, places - 1, ids[places]]
    return np.abs(logprobs.numpy() - answer.logprobs) < within


#: What the tokenizer below knows beside its end token, a character a token.
CHARACTERS = "0123456789+-*=: abcdefghijklmnopqrstuvwxyz"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}: {% endif %}"
)


def save_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single characters, with a chat template, into a model directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, **{c: i for i, c in enumerate(CHARACTERS, start=2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def spelled(ids: list[int]) -> str:
    """Ids as that tokenizer spells them; a replacement character for those it does not have."""
    characters = ["", "", *CHARACTERS]
    return "".join(characters[i] if i < len(characters) else "\ufffd" for i in ids)


@torch.no_grad()
def greedy(directory: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers answers: at most ``count`` tokens, up to the first end token, fp32."""
    model = load(directory)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + count and ids[-1] not in ends:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        answers.append(ids[len(prompt) :])
    return answers
