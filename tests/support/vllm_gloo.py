"""Runs inside vLLM's workers: its weight transfer over gloo, for a machine without a GPU.

    --worker-extension-cls tests.support.vllm_gloo.Extension
    --weight-transfer-config '{"backend": "gloo"}'

Only the group is ours. The routes, the worker's code, the messages and the loading are vLLM's.
"""

from types import SimpleNamespace
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from megatron_rl.rollout.servers.reload import Reload
from tests.support.weight_transfer import join, receive


class GlooEngine(NCCLWeightTransferEngine):
    """On a CPU."""

    def init_transfer_engine(self, init_info: Any) -> None:
        """Join the trainer's group."""
        assert init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group = join(init_info.nccl_unique_id_bytes, rank, init_info.world_size)

    def start_weight_update(self) -> None:
        """Forget the kernels first, as `Reload` does on a CPU."""
        runner = SimpleNamespace(get_model=lambda: self.model)
        Reload._forget_kernels(SimpleNamespace(model_runner=runner))
        super().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load the weights; there is no accelerator to wait for."""
        self.parse_update_info(update_info)
        weights = receive(self.group, self.packed_buffer_size_bytes, **update_info)
        self.model.load_weights(weights.items())


WeightTransferEngineFactory.register_engine("gloo", GlooEngine)


class Extension:
    """An extension of the worker class. It exists only so that vLLM imports this module."""
