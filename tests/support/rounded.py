"""Rounds the parameters of a model in place, by their names: a reference for
``rollout.round_weights``.
"""

from typing import Any

import torch

#: Ends of the names of linear layers and experts in Megatron's modules.
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "_down_proj", "_up_proj")
_LINEAR += ("linear_q_proj",)


def round_in_place(chunk: Any, how: str) -> None:
    """bf16: all parameters; fp8: linear layers and experts by rows to e4m3, the others to bf16."""
    for name, parameter in chunk.named_parameters():
        owner, _, kind = name.rpartition(".")
        linear = owner.endswith(_LINEAR) and kind.startswith("weight")
        if how == "fp8" and linear:
            rows = parameter.data.reshape(-1, parameter.shape[-1])
            for row in rows:  # views of the parameter
                largest = float(row.abs().max())
                if largest > 0:
                    scale = torch.tensor(largest) / 448
                    row.copy_((row / scale).to(torch.float8_e4m3fn).float() * scale)
        else:
            parameter.data.copy_(parameter.data.bfloat16().float())
