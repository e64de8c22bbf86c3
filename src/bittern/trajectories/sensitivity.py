"""How much the model's output feels an error in a layer's output."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bittern.errors import UserError
from bittern.precision import exact_products
from bittern.threads import is_small, one_thread
from bittern.trajectories.states import State, device_of

DIFFERENTIABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""Attention kernels whose gradients can be trusted: of cuDNN's and the memory-efficient ones those of narrow heads are
NaN or crash (torch 2.11 on Hopper)."""

ENOUGH = 2**23
"""Numbers of the model's output after which more states teach little: 32 states of FLUX.1 at 1024 x 1024."""

Square = Float[Tensor, "n n"]


def enough(states: int, numbers: int) -> int:
    """How many of some states sensitivities are taken from, if each has so many numbers of output."""
    return min(states, -(-ENOUGH // numbers))


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
    tr(D G D^T) / tokens. One backward pass a state; the weights get no gradients. The result is on the host.

    The device holds 4 n^2 bytes a path, and what a forward pass keeps for its backward pass: of a model that diffusers
    can checkpoint, unless it is small, the inputs of all its blocks and all that one block computes. Every path's
    matrix depends on nothing but the model, the states and the seed: paths taken together or one after another give
    the same numbers. Of many large states `enough` are taken, evenly: a backward pass costs three replays.

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
    leaves: list[Tensor] = []
    convolutions = {path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d)}

    def add(path: str, gradient: Tensor) -> None:
        outputs_last = gradient.movedim(1, -1) if path in convolutions else gradient
        g = outputs_last.flatten(0, -2).float()
        found[path] = found[path].addmm_(g.T, g) if path in found else g.T @ g

    def open_path(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
            leaf = y.new_zeros((), requires_grad=True)
            leaves.append(leaf)
            felt = y + leaf
            # At once, and not when the backward pass is over: the gradients of all paths would not fit.
            felt.register_hook(partial(add, path))
            return felt

        return hook

    handles = [model.get_submodule(path).register_forward_hook(open_path(path)) for path in paths]
    chosen = list(range(len(states)))
    if progress:
        progress(0, len(chosen))
    try:
        with one_thread(is_small(model)), _without_weight_gradients(model), _checkpointed(model), _deterministic(model):
            done = 0
            while done < len(chosen):
                index = chosen[done]
                leaves.clear()
                with torch.enable_grad(), sdpa_kernel(DIFFERENTIABLE):
                    output = states[index].replay(model)
                    output = output if isinstance(output, Tensor) else output[0]
                    own_seed = random.Random(f"sensitivity:{seed}:{index}").getrandbits(63)
                    noise = torch.randn(output.shape, generator=torch.Generator("cpu").manual_seed(own_seed))
                    product = (output.float() * noise.to(output.device)).sum()
                    # Blocks that are run again in the backward pass open their paths again, to no effect.
                    torch.autograd.grad(product, tuple(leaves), allow_unused=True)
                if done == 0:
                    count = enough(len(states), output.numel())
                    chosen = [turn * len(states) // count for turn in range(count)]
                done += 1
                if progress:
                    progress(done, len(chosen))
    finally:
        for handle in handles:
            handle.remove()
    for path, matrix in found.items():
        if not torch.isfinite(matrix).all():
            raise UserError(f"the gradient at {path} is NaN or infinite: the model overflows; try another dtype")
    return {path: found.pop(path).cpu() for path in list(found)}


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Generator[None]:
    """Weights that want gradients would have their inputs kept."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()


@contextmanager
def _checkpointed(model: Any) -> Generator[None]:
    """Blocks are run again in the backward pass in place of keeping what they compute, if the model can do that."""
    if is_small(model) or not getattr(model, "_supports_gradient_checkpointing", False):
        yield
        return
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


@contextmanager
def _deterministic(model: nn.Module) -> Generator[None]:
    """The backward pass of attention on a GPU adds in any order unless it is told not to."""
    if device_of(model).type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fills
