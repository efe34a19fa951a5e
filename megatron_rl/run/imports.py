"""Imports all that a run needs, for a process that is copied (fork) for each run.

A process of its own takes seconds for them (torch, Megatron-Core, transformers), on which nothing
of a run depends.
"""

from __future__ import annotations

import importlib
import os
import sys

from megatron_rl.device import megatron_on_cpu
from megatron_rl.device.quiet import silence

_MODULES = (
    "numpy.random",
    "rich.console",
    "sentencepiece",
    "torch._dynamo",  # the first optimizer imports it
    "transformers",
    "megatron_rl.cli",
    "megatron_rl.rollout.builtin.generate",
    "megatron_rl.run.verbs",
    "megatron_rl.tasks.supervised",
)


def import_for_cpu() -> bool:
    """Import what the verbs need on a CPU, and start nothing: no thread, no device.

    Returns:
        Whether torch sees a GPU, on which a run with device.kind auto is no run of a CPU.
    """
    silence("cpu")
    megatron_on_cpu.install()
    for name in _MODULES:
        importlib.import_module(name)
    # transformers imports what a name needs when it is first asked for.
    getattr(sys.modules["transformers"], "AutoTokenizer")  # noqa: B009
    import torch

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts the devices and opens none
    return torch.cuda.is_available()
