"""The random state of a rank: torch's generators and Megatron's named states."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

RANDOM = "random"


def random_file(directory: Path, rank: int) -> Path:
    """Where a rank's random state is, within a checkpoint."""
    return directory / RANDOM / f"rank_{rank}.pt"


def save_random_state(path: Path) -> None:
    """Write this rank's random state: tensors only, readable with ``weights_only``."""
    state = {"cpu": torch.get_rng_state(), "megatron": dict(get_cuda_rng_tracker().get_states())}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    content = io.BytesIO()
    torch.save(state, content)  # which would raise RuntimeErrors for a full disk
    # A copy: on a full disk the error's frames keep what is written, and Python 3.12.1's collector
    # ends in a segmentation fault over a view of a BytesIO.
    path.write_bytes(content.getvalue())


def load_random_state(path: Path) -> None:
    """Set this rank's random state to the stored one.

    What a device of another kind has left (Megatron's states are CUDA's on CUDA, the CPU's on a
    CPU; they differ in size) is left alone.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and _of_one_kind(state.get("cuda"), torch.cuda.get_rng_state()):
        torch.cuda.set_rng_state(state["cuda"])
    tracker = get_cuda_rng_tracker()
    known = tracker.get_states()
    if all(_of_one_kind(s, known.get(name)) for name, s in state["megatron"].items()):
        tracker.set_states(state["megatron"])


def _of_one_kind(state: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return state is not None and other is not None and state.shape == other.shape
