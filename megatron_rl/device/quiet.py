"""Warnings of Megatron-Core and torch about their own code. Users cannot act on them: not shown.

Each entry names the version that says it. Everything else they say still reaches the user. A
deprecation that this package has to follow is for its developers: it becomes a
`DeprecationWarning`, which Python shows under pytest, ``-X dev`` or ``-W default``, not to users.
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
    # A CUDA build of torch on a machine without CUDA, once 0.19 imports the extension compiler.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # Megatron 0.16, about every class that is not its own; ours take what it then leaves out.
    "megatron.core.transformer.transformer_layer": "Unknown MLP type",
}
#: The same, of records that become a `DeprecationWarning`.
DEPRECATIONS = {
    # Megatron 0.19, with every GPTModel; what a move takes is in models/README.md.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
}


def silence(kind: str) -> None:
    """Hide these warnings from now on; the device is "cpu" or "cuda"."""
    for message in WARNINGS + (CPU_WARNINGS if kind == "cpu" else ()):
        warnings.filterwarnings("ignore", message=message)
    for kind_of_filter, records in ((_Without, LOG_RECORDS), (_AsWarning, DEPRECATIONS)):
        for name, beginning in records.items():
            logger = logging.getLogger(name)
            if not any(isinstance(known, _Without) for known in logger.filters):
                logger.addFilter(kind_of_filter(beginning))


class _Without(logging.Filter):
    """A filter that drops records that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


class _AsWarning(_Without):
    """The same, and a `DeprecationWarning` in the place of each of these records."""

    def __init__(self, beginning: str) -> None:
        super().__init__(beginning)
        self._shown: dict[str | tuple[str, type[Warning], int], int] = {}  # once in a process

    def filter(self, record: logging.LogRecord) -> bool:
        passes = super().filter(record)
        if not passes:
            warnings.warn_explicit(
                record.getMessage(),
                DeprecationWarning,
                filename=record.pathname,
                lineno=record.lineno,
                module=__name__,  # no filter for Megatron's modules hides it
                registry=self._shown,
            )
        return passes
