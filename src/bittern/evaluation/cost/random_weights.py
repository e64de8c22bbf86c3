"""Models at full size without a checkpoint: random weights, and random codes where a recipe puts few-bit layers.

They tell speed and memory, and nothing of quality. No solver runs: building FLUX.1 takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bittern import recipes
from bittern.architectures import plan
from bittern.evaluation.cost.models import Subject
from bittern.layers import swap
from bittern.quantization import checkpoint_config, empty_layers, fill_meta, model_on_meta

_BIASES = ("bias", "scale_shift_table")


def skeleton(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, as it would be loaded."""
    config = {key: value for key, value in subject.config.items() if key != "quantization_config"}
    return model_on_meta(subject.class_name, config, dtype, subject.name).requires_grad_(False)


def dense(subject: Subject, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """The model in 16 bits."""
    model = skeleton(subject, dtype)
    fill(model, device)
    return model


def few_bit(
    subject: Subject, recipe: str | recipes.Recipe, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """The model as a recipe makes it, each layer filled as it is made.

    Raises:
        UserError: for a recipe that is unknown or does not fit the model.
    """
    recipe = recipe if isinstance(recipe, recipes.Recipe) else recipes.load(recipe)
    model = skeleton(subject, dtype)
    made = plan(model, recipe)
    config = checkpoint_config(made, recipe, seed=0)
    draw = _source(device)
    for path, layer in empty_layers(model, config, config.targets).items():
        for leaf, like in layer.tensors().items():
            layer.load(leaf, _few_bit_tensor(leaf, like, layer.scheme.weight, draw))
        swap(model, path, layer)
    made.architecture.install(model)
    fill(model, device)
    return model.requires_grad_(False)


def fill(model: nn.Module, device: torch.device | str) -> None:
    """Random numbers for every parameter and buffer that is still on the meta device; the rest goes to the device."""
    draw, shapes = _source(device), {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def read(name: str) -> Tensor:
        like = shapes[name]
        value = draw(like, 0.02)
        # Norms scale by about one.
        one = like.ndim == 1 and not name.endswith(_BIASES)
        return value + 1 if one else value

    fill_meta(model, read)
    model.to(device)


Draw = Callable[[Tensor, float], Tensor]


def _source(device: torch.device | str) -> Draw:
    generator = torch.Generator(device).manual_seed(0)

    def draw(like: Tensor, deviation: float) -> Tensor:
        if like.is_floating_point():
            value = torch.empty(like.shape, dtype=like.dtype, device=device)
            return value.normal_(0, deviation, generator=generator)
        return torch.randint(0, 256, like.shape, dtype=like.dtype, device=device, generator=generator)

    return draw


def _few_bit_tensor(leaf: str, like: Tensor, weight: str, draw: Draw) -> Tensor:
    """Random numbers that a solver might have given."""
    if leaf == "codes":
        codes = draw(like, 0)
        # Two bits 11 are no ternary code.
        return codes & ~((codes & (codes >> 1) & 0x55) * 2) if weight == "ternary" else codes
    if leaf in ("scales", "row_scales"):
        if like.dtype == torch.float8_e4m3fn:
            return draw(like.float(), 10).abs_().add_(20).to(like.dtype)
        return draw(like, 0.001).abs_().add_(0.002)
    return draw(like, 0.1).abs_().add_(1) if leaf == "smooth" else draw(like, 0.02)
