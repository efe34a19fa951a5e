"""Hides warnings of Megatron-Core and torch that a user cannot act on.

Each entry names the version that warns. All other warnings still reach the user.
"""

from __future__ import annotations

import logging
import warnings

#: Beginnings of warnings, as regular expressions.
WARNINGS = (
    # Megatron 0.16 and 0.19 call the all-gather and reduce-scatter that torch 2.13 has renamed.
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",
    # Megatron 0.16 calls its own default for CUDA graphs deprecated.
    "full scope is deprecated",
    # Megatron 0.19 imports its multimodal models with every optimizer.
    "MimoModelConfig is experimental",
    # Megatron 0.19 reads the common part of a checkpoint on each rank by itself, which is what it
    # asks torch for, and passes the arguments of torch's load in their old order.
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load",
    "The argument order of load has been changed",
    # Megatron 0.16 and 0.19, about a norm that no layer here uses.
    r"Apex is not installed\. Falling back to",
    # Transformer Engine 2.20, about its part for another framework.
    "Detected a Jax installation but could not find the shared object file",
    # torch 2.11: barriers use the device that `select_device` has set.
    r"barrier\(\): using the device under current context",
)
#: The same, on a CPU only: missing CUDA libraries (six modules of Megatron 0.16 and 0.19 on
#: import), and a setting of CUDA.
CPU_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    ".* environment variable CUDA_DEVICE_MAX_CONNECTIONS",
)
#: Logger -> beginning of the message to hide.
LOG_RECORDS = {
    # 0.19 advises to build every model from its HybridModel, whose stock layers need CUDA.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # A CUDA build of torch on a machine without CUDA, once 0.19 imports the extension compiler.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


def silence(kind: str) -> None:
    """Hide these warnings from now on; the device is "cpu" or "cuda"."""
    for message in WARNINGS + (CPU_WARNINGS if kind == "cpu" else ()):
        warnings.filterwarnings("ignore", message=message)
    for name, beginning in LOG_RECORDS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))


class _Without(logging.Filter):
    """A filter that drops records that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)
