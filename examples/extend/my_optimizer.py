"""An optimizer: Lion (arXiv 2302.06675), which acts on each element separately."""

import torch
from pydantic import Field

from megatron_rl.extend import Settings, optimizer


class LionSettings(Settings):
    """Lion's two decays."""

    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Share of the momentum in a step's direction."""
    beta2: float = Field(0.99, ge=0.0, lt=1.0)
    """Decay of the momentum, per step."""


@optimizer(settings=LionSettings, split_weights=True, paper="arXiv 2302.06675")
class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, params, settings: LionSettings) -> None:
        super().__init__(params, {"lr": 1e-4, "weight_decay": 0.0})
        self.betas = settings.beta1, settings.beta2

    @torch.no_grad()
    def step(self) -> None:
        """One step. The run has set lr and weight_decay of each group; gradients are fp32."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, (beta1, beta2) = state["momentum"], self.betas
                direction = momentum.lerp(parameter.grad, 1 - beta1).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - beta2)
