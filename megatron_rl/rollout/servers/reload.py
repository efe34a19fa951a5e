"""Runs inside vLLM's workers: new weights in place, from a disk or through a process group. Imports
nothing of this package.

``--worker-extension-cls megatron_rl.rollout.servers.reload.Reload`` gives a worker these methods.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Iterator

import torch


class Reload:
    """An extension of vLLM's worker class."""

    # What that class has; without values, for a name of both would be refused.
    rank: int
    device: torch.device
    model_runner: Any

    def reload_checkpoint(self, directory: str) -> str:
        """Take the weights of a Hugging Face directory."""
        self._forget_kernels()
        self.model_runner.reload_weights(weights_path=directory)
        return directory

    def count(self) -> int:
        """One of each worker: so many they are."""
        return self.rank

    def join_weights(self, host: str, port: int, backend: str, size: int, seconds: float) -> int:
        """Form the group with the trainer, whose rank 0 keeps the store; see `broadcast.py`."""
        import torch.distributed as dist

        timeout = timedelta(seconds=seconds)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore("weights", store)
        group: Any  # torch's stubs know no broadcast of it
        if backend == "gloo":
            group = dist.ProcessGroupGloo(prefixed, 1 + self.rank, size, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = dist.ProcessGroupNCCL(prefixed, 1 + self.rank, size, options)
        self._trainer = (group, store)
        self._receive(1, torch.int64)
        return size

    def receive_weights(self, number: int) -> int:
        """Take the weights that the trainer sends to the group; how many tensors they were.

        Args:
            number: of the sending, under which the trainer is told that this worker reads.
        """
        received = 0

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal received
            self._trainer[1].set(f"reads/{number}/{1 + self.rank}", "")
            while length := int(self._receive(1, torch.int64)):
                header = bytes(self._receive(length, torch.uint8).cpu().numpy())
                entries = [
                    (name, getattr(torch, dtype), shape)
                    for name, dtype, shape in json.loads(header)
                ]
                sizes = [dtype.itemsize * _product(shape) for _, dtype, shape in entries]
                payload = self._receive(sum(sizes), torch.uint8)
                for (name, dtype, shape), part in zip(entries, payload.split(sizes)):
                    received += 1
                    # a copy is aligned, which a slice of bytes need not be
                    yield name, part.clone().view(dtype).view(shape)

        self._forget_kernels()
        self.model_runner.reload_weights(weights_iterator=weights())
        return received

    def _receive(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        import torch.distributed as dist

        tensor = torch.empty(count, dtype=dtype, device=self.device)
        self._trainer[0].broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def _forget_kernels(self) -> None:
        """vLLM 0.32 on a CPU packs the experts' weights for its kernels only while a layer has no
        kernel, which is at the first load: a second one leaves them unpacked, answers success, and
        computes nonsense. So the kernels are forgotten first. On CUDA they must stay: graphs have
        captured their addresses. Can go when vLLM packs at every load.
        """
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            for module in self.model_runner.get_model().modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
