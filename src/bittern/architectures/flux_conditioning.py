"""What drives FLUX's modulation: the embedding of time, guidance and pooled text, sampled without any data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from bittern.architectures.base import Parameters

_TIMES = 16
_GUIDANCE = 3.5
_THOUSAND = 1000.0  # FLUX embeds a thousand times the time and the guidance


def conditionings(model: nn.Module, parameters: Parameters) -> Float[Tensor, "samples dim"]:
    """The vector at times spread evenly over the trajectory, for a pooled text of zeros.

    Args:
        model: A FLUX transformer; it may be on meta.
        parameters: Gives a parameter's values by its name.
    """
    embed = model.get_submodule("time_text_embed")
    values = {name: parameters(f"time_text_embed.{name}").float() for name, _ in embed.named_parameters()}
    device = next(iter(values.values())).device
    times = torch.linspace(1 / _TIMES, 1, _TIMES, device=device) * _THOUSAND
    pooled = torch.zeros(_TIMES, model.config.pooled_projection_dim, device=device)
    guidance = (torch.full_like(times, _GUIDANCE * _THOUSAND),) if model.config.guidance_embeds else ()
    return functional_call(embed, values, (times, *guidance, pooled))
