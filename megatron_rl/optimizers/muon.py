"""Muon for the matrices of the layers, Adam for everything else, in one optimizer.

Muon: Keller Jordan, 2024 (kellerjordan.github.io/posts/muon); the scale that makes its steps as
large as Adam's, and the weight decay, of Moonlight (arXiv 2502.16982, eq. 4).
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch.optim.adamw import adamw

from megatron_rl.catalogue.optimizers import MuonSettings
from megatron_rl.optimizers.matrices import Matrix
from megatron_rl.optimizers.newton_schulz import orthogonalise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Muon(torch.optim.Optimizer):
    """For a matrix W [m, n] with gradient G, at rate lr and weight decay wd:

        M <- beta M + (1 - beta) G
        D  = beta M + (1 - beta) G (Nesterov), or M
        W <- (1 - lr wd) W - lr scale orthogonalise(D)

    The scale is 0.2 sqrt(max(m, n)) ("rms": a step's elements have the root mean square 0.2 that
    Adam's have, so that both take the same lr), or sqrt(max(1, m / n)) ("spectral").

    Whole matrices are orthogonalised in every layout: tensor-parallel ranks gather them, and each
    rank does all of the work.
    """

    def __init__(self, params: Sequence[dict[str, Any]], settings: MuonSettings) -> None:
        """params: groups with ``lr``, ``weight_decay`` and ``matrices`` (`optimizers.replace`)."""
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0})
        self._settings = settings

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch gives a float with a closure; here there is none
        self, closure: Callable[[], float] | None = None
    ) -> None:
        """One update. A collective over the tensor-parallel ranks."""
        assert closure is None, "gradients are there"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            rest = []
            for parameter, matrices in zip(group["params"], group["matrices"], strict=True):
                if parameter.grad is None:
                    continue
                if matrices and (self._settings.routers or not matrices[0].is_gate):
                    self._step_matrices(parameter, matrices, group)
                else:
                    rest.append(parameter)
            self._step_rest(rest, group)

    def _step_matrices(
        self, parameter: torch.Tensor, matrices: Sequence[Matrix], group: dict[str, Any]
    ) -> None:
        """Step one parameter: a matrix, or a stack of matrices of one shape."""
        settings, state, gradient = self._settings, self.state[parameter], parameter.grad
        assert gradient is not None, "step leaves the others out"
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - settings.momentum)
        direction = momentum
        if settings.nesterov:
            direction = gradient.lerp(momentum, settings.momentum)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parts = [torch.stack(same) for same in zip(*(one.split(direction) for one in matrices))]
        dtype = DTYPES[settings.precision]
        updates = [
            self.scale(*part.shape[-2:]) * orthogonalise(part, settings.newton_schulz_steps, dtype)
            for part in parts
        ]
        for matrix, update in zip(matrices, zip(*updates)):
            matrix.of(parameter).sub_(matrix.join(update), alpha=group["lr"])

    def scale(self, rows: int, columns: int) -> float:
        """The factor of an orthogonalised direction."""
        settings = self._settings
        if settings.scale == "spectral":
            return settings.scale_factor * max(1.0, rows / columns) ** 0.5
        return settings.scale_factor * 0.2 * max(rows, columns) ** 0.5

    def _step_rest(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Step the other parameters with torch's AdamW."""
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states):
            if not state:
                state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            # torch counts the steps itself.
            [torch.tensor(float(group["step"] - 1)) for _ in parameters],
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._settings.epsilon,
            maximize=False,
            # One pass over memory instead of a dozen; elsewhere torch chooses.
            fused=True if all(p.device.type == "cpu" for p in parameters) else None,
        )
