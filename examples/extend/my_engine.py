"""A rollout engine: transformers samples the answers, with a copy of the weights that it gets
through a directory. It samples like the built-in engine, so a run has the same answers with both.
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megatron_rl.records import Completion, RolloutGroup
from megatron_rl.rollout.builtin.sampler import sample, uniforms
from megatron_rl.rollout.engine import EngineParts, WholeAnswers
from megatron_rl.weights.export import export_model


class TransformersEngine(WholeAnswers):
    """All ranks must see the run directory."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts, self._model = parts, None

    def weights_changed(self):
        super().weights_changed()
        self._model = None

    @torch.no_grad()
    def generate(self, prompts, settings):
        if self._model is None:
            parts, directory = self._parts, self._parts.config.run_dir / "my_engine"
            export_model(parts.chunks, parts.groups, parts.config.model, directory, replace=True)
            model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
            self._model = model.to(parts.device).eval()
        return [RolloutGroup(prompt, self._answers(prompt, settings)) for prompt in prompts]

    def _answers(self, prompt, settings):
        count, first = settings.samples, prompt.first_sample(settings.samples)
        length = self._parts.config.model.max_sequence_length - len(prompt.tokens)
        length = min(settings.max_new_tokens, length)
        numbers = [(prompt.index, first + number) for number in range(count)]
        uniform = torch.from_numpy(uniforms(settings.seed, numbers, length))
        uniform = None if settings.greedy else uniform.to(self._parts.device)
        fed = torch.from_numpy(prompt.tokens).to(self._parts.device).repeat(count, 1)
        cache, drawn = None, []
        for step in range(length):
            output = self._model(fed, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1]
            drawn.append(sample(logits, None if uniform is None else uniform[:, step], settings))
            fed = drawn[-1][0][:, None]
        tokens, logprobs = (torch.stack(part, dim=1).cpu().numpy() for part in zip(*drawn))
        return tuple(self._completion(*answer) for answer in zip(tokens, logprobs))

    def _completion(self, tokens, logprobs):
        stops = np.flatnonzero(np.isin(tokens, self._parts.stop_ids))
        finished = len(stops) > 0
        end = stops[0] + 1 if finished else len(tokens)
        text = self._parts.decode(tokens[: end - finished].tolist())
        return Completion(tokens[:end], logprobs[:end].astype(np.float32), finished, text)
