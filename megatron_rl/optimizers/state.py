"""An optimizer's state as a checkpoint holds it. It works for any torch optimizer whose state is
tensors of the parameter's shape and a count of steps.
"""

from __future__ import annotations

import torch

STEP = "step"
#: Name of the fp32 main weight in a checkpoint, beside the state.
MAIN_WEIGHT = "param"
#: Key of a parameter group: the matrices in each of its parameters.
MATRICES = "matrices"


def state_tensors(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The tensors of a parameter's state by name, sorted, without the count."""
    state = optimizer.state[parameter]
    return {name: state[name] for name in sorted(state, key=str) if name != STEP}


def strange_state(optimizer: torch.optim.Optimizer) -> str | None:
    """Describe the state that a checkpoint cannot hold; None: it can hold all."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state[parameter].items():
                if name == STEP:
                    fits = not isinstance(value, torch.Tensor) or value.dim() == 0
                else:
                    fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                    fits = fits and isinstance(name, str) and name != MAIN_WEIGHT
                if not fits:
                    found = list(value.shape) if isinstance(value, torch.Tensor) else value
                    return f"{name!r} {found} for a parameter {list(parameter.shape)}"
    return None


def was_replaced(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has replaced Megatron's Adam (`optimizers.replace`)."""
    return any(MATRICES in group for group in optimizer.param_groups)


def step_of(optimizer: torch.optim.Optimizer) -> int:
    """Updates made so far; 0 if the optimizer does not count."""
    groups = optimizer.param_groups
    states = [optimizer.state.get(parameter, {}) for g in groups for parameter in g["params"]]
    return max((int(holder[STEP]) for holder in (*groups, *states) if STEP in holder), default=0)


@torch.no_grad()
def prime(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer creates in its first step, by one step with gradients of 0
    at learning rate 0, which leaves the weights alone. A collective if a step is one.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if any(optimizer.state.get(parameter) for parameter in parameters):
        return
    step = step_of(optimizer)
    rates = [group["lr"] for group in groups]
    gradients = [parameter.grad for parameter in parameters]
    for group in groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    set_step(optimizer, step)


@torch.no_grad()
def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates made so far, in each place where the optimizer keeps it."""
    for group in optimizer.param_groups:
        for holder in (group, *(optimizer.state[parameter] for parameter in group["params"])):
            if isinstance(holder.get(STEP), torch.Tensor):
                holder[STEP].fill_(step)
            elif STEP in holder:
                holder[STEP] = type(holder[STEP])(step)
