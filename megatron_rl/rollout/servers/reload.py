"""Runs inside vLLM's workers: reading new weights in place. Imports nothing of this package.

``--worker-extension-cls megatron_rl.rollout.servers.reload.Reload`` gives a worker these methods.
"""

from __future__ import annotations


class Reload:
    """An extension of vLLM's worker class."""

    def reload_checkpoint(self, directory: str) -> str:
        """Take the weights of a Hugging Face directory.

        vLLM 0.32 on a CPU packs the experts' weights for its kernels only while a layer has no
        kernel, which is at the first load: a second one leaves them unpacked, answers success, and
        computes nonsense. So the kernels are forgotten first. On CUDA they must stay: graphs have
        captured their addresses. Can go when vLLM packs at every load.
        """
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            for module in self.model_runner.get_model().modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        self.model_runner.reload_weights(weights_path=directory)
        return directory
