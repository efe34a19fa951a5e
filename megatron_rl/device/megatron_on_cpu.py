"""The only monkey patches of the project: what Megatron-Core needs to run on a machine without
CUDA.

Megatron-Core asks ``torch.cuda`` for devices, streams and random states, and creates a few tensors
with ``device="cuda"``. Each patch below states its reason, the versions that need it and when it
can go. `install` replaces the few functions Megatron calls, not every call of torch (a global
TorchFunctionMode costs a third to a half of the decoding speed). It is never called when the run
uses CUDA.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import sys
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")


class _Event:
    """Stands in for ``torch.cuda.Event``: on a CPU everything queued before is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """Stands in for ``torch.cuda.Stream``. A class, because annotations elsewhere say ``Stream |
    None``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Apply all patches; a second call changes nothing. Call before Megatron-Core is imported."""
    if getattr(torch.cuda, "_megatron_rl_on_cpu", False):
        return
    cuda: Any = torch.cuda
    cuda._megatron_rl_on_cpu = True
    _hide_cuda_libraries()
    _patch_torch_cuda()
    _patch_factories()
    _patch_tensor_methods()
    _disable_jit_fuser()
    _patch_many_tensors()
    _patch_megatron_random()
    _patch_router_gating()
    _patch_dispatcher()
    _patch_unequal_parts()
    _patch_latent_attention()
    _share_gloo_device()


def _hide_cuda_libraries() -> None:
    """If Transformer Engine or Apex is installed, Megatron takes its optimizer, gradient norms and
    router products from it on any device (0.16, 0.19).
    """
    modules: dict[str, Any] = sys.modules
    for name in ("transformer_engine", "apex"):
        modules[name] = None  # makes its import fail


def _patch_torch_cuda() -> None:
    """Megatron 0.16 to 0.19 calls these functions unconditionally. Can go when it takes the device
    from its configuration.
    """
    cuda: Any = torch.cuda  # the stand-ins have types of their own
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda *args: None
    cuda.Event = _Event
    cuda.Stream = _Stream
    cuda.current_stream = lambda *args: _Stream()
    cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.is_current_stream_capturing = lambda: False


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, str) and device.startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _patch_factories() -> None:
    """``device="cuda"`` is spelled out in schedules, optimizers, clip_grads and the auxiliary-loss
    tracker (0.16, 0.19). `torch.device` as a context (transformers loads models inside one) looks
    functions up in a set that it fills once: it has to be filled with torch's own.
    """
    _device_constructors()
    for name in ("tensor", "zeros", "ones"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _patch_tensor_methods() -> None:
    """``.cuda()`` moves embeddings and optimizer state; optimizers compare ``.type()`` with
    'torch.cuda.*' (0.16, 0.19).
    """
    tensor: Any = torch.Tensor
    original_type = tensor.type

    def type_as_if_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.", 1)
        return original_type(self, dtype, *args, **kwargs)

    tensor.type = type_as_if_on_cuda
    tensor.cuda = lambda self, *args, **kwargs: self


def _disable_jit_fuser() -> None:
    """Megatron decorates small functions with torch.compile while it is imported; on a CPU that
    wants a C++ compiler at run time, and the compiler's Python part costs over a second of every
    start (0.16). Can go when the switch of `megatron.core.jit` can be set before the import.
    """
    library: Any = torch
    original, library.compile = library.compile, _leave_as_it_is
    try:
        from megatron.core import jit
    finally:
        library.compile = original
    jit.disable_jit_fuser()


def _leave_as_it_is(
    function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """A decorator, with or without options, that returns the function unchanged."""
    return _leave_as_it_is if function is None else function


def _patch_many_tensors() -> None:
    """Without Apex the norm and the clipping of gradients go over the tensors in Python, and
    clipping makes a copy of each (0.16, 0.19); torch has functions for many tensors.
    """
    from megatron.core.optimizer import clip_grads

    def norm(chunk: int, flag: torch.Tensor, lists: Any, each: bool, *args: Any) -> Any:
        norms = torch.stack(torch._foreach_norm(list(lists[0])))
        return torch.linalg.vector_norm(norms).float().view(1), None

    def scale(chunk: int, flag: torch.Tensor, lists: Any, factor: float) -> None:
        source, target = lists
        if source is not target:
            torch._foreach_copy_(target, source)
        torch._foreach_mul_(target, factor)

    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale


def _patch_megatron_random() -> None:
    """The random-state tracker reads and writes the CUDA generator (0.16, 0.19); here the CPU
    generator serves.
    """
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()


def _patch_router_gating() -> None:
    """0.16.1 defines ``te_general_gemm`` only if Transformer Engine is there, yet reads it always.
    Fixed later.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _patch_dispatcher() -> None:
    """The all-to-all dispatcher turns split sizes into numbers only if they sit on CUDA (0.16,
    0.19).
    """
    from megatron.core.transformer.moe import token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _patch_unequal_parts() -> None:
    """With expert and expert-tensor parallelism the all-to-all dispatcher gathers and
    reduce-scatters unequal numbers of rows (0.16, 0.19); gloo refuses them. Can go when gloo
    accepts them.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = (
        mappings._gather_along_first_dim,
        mappings._reduce_scatter_along_first_dim,
    )

    def gather_parts(
        rows: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(rows, group, sizes, use_global_buffer)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def reduce_scatter_parts(
        rows: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(rows, group, sizes, use_global_buffer)
        total = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(list(sizes))[group.rank()].clone()

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts


def _patch_latent_attention() -> None:
    """0.16.1 believes Transformer Engine to be there, and compares with a class that is none. Fixed
    later.
    """
    from megatron.core.transformer import multi_latent_attention

    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def _share_gloo_device() -> None:
    """Every gloo group makes a device of its own, whose thread wakes a hundred times a second, and
    Megatron makes some twenty groups (torch 2.9-2.13; 14% of a rank's processor time, seen on a
    tiny model). Can go when torch's groups share one.
    """
    library: Any = c10d
    made = library.ProcessGroupGloo

    class ProcessGroupGloo(made):  # type: ignore[misc, valid-type]  # mypy takes no class from Any
        def __init__(
            self,
            store: dist.Store,
            rank: int,
            size: int,
            timeout: datetime.timedelta = c10d.default_pg_timeout,
        ) -> None:
            options = made._Options()
            options._devices = [_gloo_device()]
            options._threads = 2  # as many as a group has otherwise
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    library.ProcessGroupGloo = ProcessGroupGloo


@functools.cache
def _gloo_device() -> Any:
    return dist.ProcessGroupGloo.create_default_device()
