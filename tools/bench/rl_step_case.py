"""The case of `rl_step.py`: model, prompts and reward that both programs get. Its import needs
nothing but Python.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from tools.bench.common import PASSES, SHAPE, Shape, forward_flop

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"
SPECIAL = (END, PAD, UNKNOWN)


@dataclass(frozen=True)
class Case:
    """Sizes of the model and of a step."""

    shape: Shape = SHAPE
    prompts: int = 64  #: of a step
    answers: int = 8  #: to each
    shortest_prompt: int = 8  #: tokens
    longest_prompt: int = 16
    answer_tokens: int = 24  #: of every answer
    mini_batches: int = 8  #: of a step, one optimizer step each
    problems: int = 512  #: of the data set
    learning_rate: float = 1e-6
    clip: float = 0.2  #: of the ratio

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Case:
        """From `dataclasses.asdict` of one."""
        return cls(**{**fields, "shape": Shape(**fields["shape"])})

    @property
    def samples(self) -> int:
        """Answers of a step."""
        return self.prompts * self.answers

    def flop(self) -> dict[str, float]:
        """Floating-point operations of each stage of a step, of whatever program: each answer
        is passed over with its prompt, once to sample, once to score, and forward and backward to
        update. Prompts are of their mean length. A program that needs less, because it passes over
        a prompt once for all answers or does not score, has a higher share of the peak.
        """
        prompt = (self.shortest_prompt + self.longest_prompt) // 2
        once = self.samples * forward_flop(self.shape, prompt, self.answer_tokens)
        return {stage: float(count * once) for stage, count in PASSES.items()}


def odd_share(text: str) -> float:
    """The reward: the share of an answer's words that end with an odd digit."""
    words = text.split()
    return sum(word[-1] in "13579" for word in words) / max(len(words), 1)


def make_files(folder: Path, case: Case) -> None:
    """Write ``model/``, a Hugging Face model with its tokenizer, and ``problems.jsonl``."""
    make_model(folder / "model", case)
    make_tokenizer(folder / "model", case.shape.vocabulary)
    words, draw = case.shape.vocabulary - len(SPECIAL), random.Random(2)
    with (folder / "problems.jsonl").open("w") as file:
        for _ in range(case.problems):
            length = draw.randint(case.shortest_prompt, case.longest_prompt)
            prompt = " ".join(f"w{draw.randrange(words)}" for _ in range(length))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def make_model(directory: Path, case: Case) -> None:
    """A qwen3_moe of random weights that never samples the end of an answer.

    Channel 0 of the residual stream is a constant that no layer writes to and only the end's row of
    the head reads, with a large negative weight. So both programs sample answers of full length by
    their ordinary settings.
    """
    import torch
    import transformers

    shape = case.shape
    config = transformers.Qwen3MoeConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        moe_intermediate_size=shape.expert_width,
        vocab_size=shape.vocabulary,
        intermediate_size=2 * shape.hidden,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=case.longest_prompt + case.answer_tokens,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
    )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.select(-2, 0).zero_()  # [.., D out, in]
        model.get_input_embeddings().weight[:, 0] = 0.5
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[SPECIAL.index(END)] = 0.0
        head[SPECIAL.index(END), 0] = -1000.0
    model.save_pretrained(directory)


def make_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer of words w0, w1, ... and the special tokens."""
    import tokenizers
    import transformers

    words = [*SPECIAL, *(f"w{number}" for number in range(vocabulary - len(SPECIAL)))]
    model = tokenizers.models.WordLevel(
        {word: token for token, word in enumerate(words)}, unk_token=UNKNOWN
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    ).save_pretrained(directory)
