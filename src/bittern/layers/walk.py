"""All the few-bit layers of a model at once."""

from __future__ import annotations

from collections import Counter

from torch import nn

from bittern import ops
from bittern.errors import UserError, did_you_mean
from bittern.layers.few_bit import FewBitLayer


def quant_layers(model: nn.Module) -> dict[str, FewBitLayer]:
    """The few-bit layers by target: the path they have without peft's wrappers."""
    return {
        ".".join(part for part in path.split(".") if part != "base_layer"): module
        for path, module in model.named_modules()
        if isinstance(module, FewBitLayer)
    }


def set_path(model: nn.Module, path: str) -> None:
    """Forces an arithmetic on a model, or gives the choice back with "auto".

    It reaches the layers that were solved for the model's least precise activations. Those solved for more (the
    adaLN linears under most recipes) keep their own choice: forcing shows what a checkpoint is worth on hardware
    of that width, not a checkpoint nobody made. `layer.path` forces a single layer regardless.

    Raises:
        UserError: if there is no such path.
    """
    if path not in (*ops.PATHS, "auto"):
        raise UserError(f"unknown path {path!r}: {did_you_mean(path, (*ops.PATHS, 'auto'))}")
    layers = quant_layers(model).values()
    least = min((layer.scheme.activations for layer in layers), default=16)
    for layer in layers:
        layer.path = path if layer.scheme.activations == least else "auto"


def paths(model: nn.Module) -> dict[str, int]:
    """How many few-bit layers run each arithmetic where they are now, most layers first."""
    return dict(Counter(layer.choice().path for layer in quant_layers(model).values()).most_common())


def swap(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Puts `layer` where the module at `path` is."""
    parent, _, name = path.rpartition(".")
    layer.train(model.get_submodule(path).training)
    setattr(model.get_submodule(parent), name, layer)
