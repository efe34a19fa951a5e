"""vLLM's weight transfer without NCCL: both ends of a gloo group, whose id is a store's address."""

from __future__ import annotations

import base64
import binascii
import math
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, TCPStore

WAIT = timedelta(seconds=60)


def _group(store: TCPStore, rank: int, size: int) -> ProcessGroupGloo:
    group = ProcessGroupGloo(store, rank, size, WAIT)
    group.allreduce([torch.zeros(1)]).wait()
    return group


def refusal(text: str) -> dict[str, Any]:
    """The response of vLLM 0.32 when a worker raised an error."""
    text = f"Call to collective_rpc method failed: Worker failed with error '{text}', please check"
    return {"error": {"message": f"{text} the stack trace above for the root cause", "code": 500}}


def join(group: bytes, rank: int, size: int) -> ProcessGroupGloo:
    """A worker's end of the group with this id."""
    port = int(group.rstrip(b"\0"))
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    return _group(store, rank, size)


def receive(
    group: ProcessGroupGloo,
    buffer_bytes: int,
    names: list[str],
    dtype_names: list[str],
    shapes: list[list[int]],
) -> dict[str, torch.Tensor]:
    """Receive as vLLM's workers do. A broadcast ends with the weight that exceeds the buffer,
    or with the last one.
    """
    received, waiting = {}, []
    for number, (name, dtype, shape) in enumerate(zip(names, dtype_names, shapes), start=1):
        kind = getattr(torch, dtype)
        waiting.append((name, kind, shape, math.prod(shape) * kind.itemsize))
        sizes = [size for *_, size in waiting]
        if sum(sizes) > buffer_bytes or number == len(names):
            packed = torch.empty(sum(sizes), dtype=torch.uint8)
            group.broadcast([packed], BroadcastOptions()).wait()
            for (name, kind, shape, _), part in zip(waiting, packed.split(sizes)):
                received[name] = part.clone().view(kind).view(shape)
            waiting = []
    return received


class GlooLink:
    """The trainer's end, in place of `transfer.NcclLink`."""

    def __init__(self, device: torch.device) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def id(self) -> bytes:
        """The port of the group's store, as long as NCCL's."""
        return str(self._store.port).encode().ljust(128, b"\0")

    def join(self, size: int) -> None:
        """See `Link`."""
        self._group = _group(self._store, 0, size)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """See `Link`."""
        self._group.broadcast([tensor], BroadcastOptions()).wait()


class Receiver:
    """A server's end: its routes as vLLM 0.32 answers them, for one worker.

    Attributes: ``asked``, the routes in order; ``weights`` of the last update that was finished;
    ``refuses``, a route that answers 500.
    """

    routes = (
        "/get_world_size",
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/finish_weight_update",
    )

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuses = ""
        self.weights: dict[str, torch.Tensor] = {}
        self._coming: dict[str, torch.Tensor] | None = None

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        self.asked.append(path)
        if path == self.refuses:
            return 500, {"error": {"message": "no"}}
        if path == "/get_world_size":
            return 200, {"world_size": 1}
        if path == "/init_weight_transfer_engine":
            return self._join(body["init_info"])
        if path == "/start_weight_update":
            if self._coming is not None:
                return 500, {"error": {"message": "a weight update is already active"}}
            self._coming = {}
        elif self._coming is None:
            return 500, {"error": {"message": "start_weight_update must be called before"}}
        elif path == "/update_weights":
            self._coming |= receive(self._group, self._packed, **body["update_info"])
        else:
            self.weights, self._coming = self._coming, None
        return 200, {"message": "done"}

    def _join(self, information: dict[str, Any]) -> tuple[int, Any]:
        try:
            group = base64.b64decode(information["nccl_unique_id_b64"], validate=True)
        except binascii.Error:
            return 500, refusal(
                "NCCLWeightTransferInitInfo: nccl_unique_id_b64 is not valid standard base64 "
                "(URL-safe base64 is not accepted)"
            )
        assert information["packed"] is True
        self._packed = information["packed_buffer_size_bytes"]
        self._group = join(group, information["rank_offset"], information["world_size"])
        return 200, {"message": "joined"}
