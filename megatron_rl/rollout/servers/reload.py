"""Runs inside vLLM's workers: replaces the weights in place, from a disk or from a process group.
Imports nothing of this package.

``--worker-extension-cls megatron_rl.rollout.servers.reload.Reload`` adds these methods to a worker.
`broadcast.py` is the trainer's end.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Iterator

import torch


class Reload:
    """An extension of vLLM's worker class."""

    # Attributes of that class. They have no values here: vLLM refuses a name that both define.
    rank: int
    device: torch.device
    model_runner: Any

    def reload_checkpoint(self, directory: str) -> str:
        """Load the weights of a Hugging Face directory; the directory."""
        self._forget_kernels()
        self.model_runner.reload_weights(weights_path=directory)
        return directory

    def count(self) -> int:
        """This worker's rank. The caller counts the results: one for each worker."""
        return self.rank

    def join_weights(self, host: str, port: int, backend: str, size: int, seconds: float) -> int:
        """Join the trainer's group; its size.

        Args:
            host: where rank 0 of the trainer has the group's store.
            port: of the store.
            backend: nccl or gloo.
            size: number of ranks, the trainer's included, which is rank 0.
            seconds: timeout of the group.
        """
        import torch.distributed as dist

        timeout = timedelta(seconds=seconds)
        store = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        prefixed = dist.PrefixStore("weights", store)
        group: Any  # torch's stubs lack its broadcast
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
        """Load the weights that the trainer broadcasts; the number of tensors.

        Args:
            number: of the broadcast. The store then tells the trainer that this worker reads.
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
                    # a slice of bytes may be unaligned; its copy is aligned
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
        """Make vLLM pack the experts' weights for its kernels again, on a CPU.

        vLLM 0.32 packs them there only while a layer has no kernel, so only at the first load.
        A second load leaves them unpacked, reports success, and the model computes nonsense. On
        CUDA the kernels must stay, because graphs have captured their addresses. This can go when
        vLLM packs at every load.
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
