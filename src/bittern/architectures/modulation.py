"""How large a modulated input's channels are, from the weights alone.

adaLN gives a layer LayerNorm(h) · (1 + scale) + shift. LayerNorm leaves every token with mean square 1, spread about
evenly over its channels, so that channel j has the mean square (1 + scale_j)^2 + shift_j^2; scale and shift are linear
in the conditioning vector, which the model computes from time and text. Its text half is left out, and time is
sampled: no prompt and no picture is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bittern.architectures.base import Modulated, Parameters
from bittern.architectures.plan import Plan


@torch.no_grad()
def modulated_magnitudes(plan: Plan, model: nn.Module, parameters: Parameters) -> dict[str, Float[Tensor, " k"]]:
    """The root mean square of every channel of the inputs that are to be smoothed by it.

    Args:
        plan: What is to be done.
        model: The model; it may be on meta.
        parameters: Gives a parameter's values by its name.

    Returns:
        By the first path of each job that asks for it.
    """
    wanted = {job.paths[0]: job.modulated for job in plan.jobs if job.modulated is not None}
    if not wanted:
        return {}
    driven = F.silu(plan.architecture.conditionings(model, parameters))
    outputs: dict[str, Tensor] = {}
    return {path: _magnitude(modulated, driven, parameters, outputs) for path, modulated in wanted.items()}


def _magnitude(modulated: Modulated, driven: Tensor, parameters: Parameters, outputs: dict[str, Tensor]) -> Tensor:
    if modulated.linear not in outputs:
        weight, bias = (parameters(f"{modulated.linear}.{leaf}").float() for leaf in ("weight", "bias"))
        outputs.clear()  # jobs come in the order of blocks, so the last linear is enough to remember
        outputs[modulated.linear] = F.linear(driven.to(weight.device), weight, bias)
    chunks = outputs[modulated.linear].chunk(modulated.chunks, dim=-1)
    return ((1 + chunks[modulated.scale]).square() + chunks[modulated.shift].square()).mean(dim=0).sqrt()
