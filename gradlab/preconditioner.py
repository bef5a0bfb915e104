"""What an optimiser makes of a gradient before it takes a step along it."""

import torch
from torch import Tensor, nn

from gradlab.checks import check


def adam_preconditioner(optimiser: torch.optim.Adam, module: nn.Module) -> dict[str, Tensor]:
    r"""What Adam multiplies a module's gradients by, as it stands.

    .. math:: P = \frac{\alpha}{\sqrt{\hat v} + \epsilon}, \qquad
              \hat v = \frac{v}{1 - \beta_2^t}

    (Kingma & Ba, "Adam", 2015, algorithm 1) with the learning rate :math:`\alpha` of the
    parameter's group; with AMSGrad the largest v so far. Adam's momentum, which no single gradient
    makes, and its weight decay stay out.

    Args:
        optimiser: The optimiser, `torch.optim.Adam` or `AdamW`; left untouched.
        module: What it trains.

    Returns:
        Tensors by name of the module's parameters that require a gradient; 0 where the optimiser
        has moved nothing.

    Raises:
        UsageError: If it has moved none of them.
    """
    found: dict[str, Tensor] = {}
    groups = {parameter: group for group in optimiser.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimiser.state.get(parameter, {})  # indexing would leave an empty entry behind
        if "exp_avg_sq" not in state:
            found[name] = torch.zeros_like(parameter, requires_grad=False)
            continue
        group = groups[parameter]
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        steps = float(state["step"])  # kept in float32, which a power would inherit
        unbiased = second / (1 - group["betas"][1] ** steps)
        found[name] = group["lr"] / (unbiased.sqrt() + group["eps"])
    moved = any(bool(weight.any()) for weight in found.values())
    rule = (
        "be Adam or AdamW and have taken a step of the module's own parameters, not of a copy's, "
        "at a learning rate above 0"
    )
    check(moved, "optimiser", rule, type(optimiser).__name__)
    return found
