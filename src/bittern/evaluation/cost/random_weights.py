"""Models at full size without a checkpoint: random weights, and random codes where a recipe puts few-bit layers.

They tell speed and memory, and nothing of quality. No solver runs: building FLUX.1 takes seconds. But codes are as
often what they are as if Gaussian weights had been rounded: a GPU that is short of power multiplies small numbers
faster than large ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bittern import formats, recipes
from bittern.architectures import plan
from bittern.evaluation.cost.models import Subject
from bittern.formats import int4, nvfp4, ternary
from bittern.layers import swap
from bittern.quantization import checkpoint_config, empty_layers, fill_meta, model_on_meta

_BIASES = ("bias", "scale_shift_table")
_GRIDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "int4": (int4.on_grid, 7 / 2.5),
    "nvfp4": (nvfp4.on_grid, 12 / 2.0),
    "ternary": (ternary.on_grid, 0.82),
}
"""How each format rounds, and the deviation of Gaussian weights in codes. The largest of 64 lies at 2.5 deviations, of
16 at 2.0, and becomes the largest code; least squared error makes 0 of ternary weights below .61 deviations."""
_LEVELS = 2**16


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
        return torch.randint(0, _LEVELS, like.shape, dtype=torch.int32, device=device, generator=generator)

    return draw


@functools.cache
def _bytes(weight: str, device: torch.device | str) -> Tensor:
    """Packed codes of Gaussian weights, each as often as it comes up, [_LEVELS]."""
    fmt = formats.get(weight)
    count = round(_LEVELS ** (1 / fmt.codes_per_byte))
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    on_grid, deviation = _GRIDS[weight]
    codes = on_grid(torch.special.ndtri(places) * deviation).to(torch.int8)
    return fmt.pack(torch.cartesian_prod(*[codes] * fmt.codes_per_byte)).flatten().to(device)


def _few_bit_tensor(leaf: str, like: Tensor, weight: str, draw: Draw) -> Tensor:
    """Random numbers that a solver might have given."""
    if leaf == "codes":
        chosen = draw(like, 0)
        return _bytes(weight, chosen.device)[chosen]
    if leaf in ("scales", "row_scales"):
        if like.dtype == torch.float8_e4m3fn:
            return draw(like.float(), 10).abs_().add_(20).to(like.dtype)
        return draw(like, 0.001).abs_().add_(0.002)
    return draw(like, 0.1).abs_().add_(1) if leaf == "smooth" else draw(like, 0.02)
