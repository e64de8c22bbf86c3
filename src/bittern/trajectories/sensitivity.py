"""How much the model's output feels an error in a layer's output."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bittern.errors import UserError
from bittern.precision import exact_products
from bittern.trajectories.sampler import State

DIFFERENTIABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Attention kernels whose gradients can be trusted: of cuDNN's and the memory-efficient ones those of narrow heads are
NaN or crash (torch 2.11 on Hopper)."""

Square = Float[Tensor, "n n"]


@exact_products()
def sensitivities(
    model: nn.Module,
    paths: Sequence[str],
    states: Sequence[State],
    *,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> dict[str, Square]:
    """Gram matrices of the gradients that reach the outputs of some modules.

    For a model output v and Gaussian noise z of its shape, g = d(v · z) / dy has E[g^T g] = J^T J, summed over the
    tokens of y, with J = dv / dy: the Gauss-Newton matrix of the squared error of v, in the Kronecker form of K-FAC
    (Martens and Grosse 2015, arXiv:1503.05671). An error D [m, n] of the layer's output then costs about
    tr(D G D^T) / tokens. One backward pass a state; the weights get no gradients.

    Holds 4 n^2 bytes a module, and what one forward pass keeps for its backward pass. For a model too large for that,
    give a block as `model` and its inputs as states.

    Args:
        model: The denoiser, or a block.
        paths: Linears or convolutions.
        states: What `sample` gave.
        seed: Of the noise.
        progress: Called with states done and their number.

    Raises:
        UserError: if a gradient is not finite.
    """
    found: dict[str, Square] = {}
    leaves: list[tuple[str, Tensor]] = []
    convolutions = {path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d)}

    def open_path(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
            leaf = torch.zeros_like(y, requires_grad=True)
            leaves.append((path, leaf))
            return y + leaf

        return hook

    handles = [model.get_submodule(path).register_forward_hook(open_path(path)) for path in paths]
    try:
        for index, state in enumerate(states):
            leaves.clear()
            with torch.enable_grad(), sdpa_kernel(DIFFERENTIABLE):
                output = model(*state.args, **state.kwargs)
                output = output if isinstance(output, Tensor) else output[0]
                own_seed = random.Random(f"sensitivity:{seed}:{index}").getrandbits(63)
                noise = torch.randn(output.shape, generator=torch.Generator("cpu").manual_seed(own_seed))
                product = (output.float() * noise.to(output.device)).sum()
                gradients = torch.autograd.grad(product, [leaf for _, leaf in leaves], allow_unused=True)
            for (path, _), gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    outputs_last = gradient.movedim(1, -1) if path in convolutions else gradient
                    g = outputs_last.flatten(0, -2).float()
                    found[path] = found[path].addmm_(g.T, g) if path in found else g.T @ g
            if progress:
                progress(index + 1, len(states))
    finally:
        for handle in handles:
            handle.remove()
    for path, matrix in found.items():
        if not torch.isfinite(matrix).all():
            raise UserError(f"the gradient at {path} is NaN or infinite: the model overflows; try another dtype")
    return found
