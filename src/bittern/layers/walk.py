"""All the few-bit layers of a model at once."""

from __future__ import annotations

from collections import Counter

from torch import nn

from bittern.layers.linear import QuantLinear


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The few-bit layers by target: the path they have without peft's wrappers."""
    return {
        ".".join(part for part in path.split(".") if part != "base_layer"): module
        for path, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def set_path(model: nn.Module, path: str) -> None:
    """Forces an arithmetic on all few-bit layers, or gives the choice back with "auto".

    Raises:
        UserError: if there is no such path.
    """
    for layer in quant_layers(model).values():
        layer.path = path


def paths(model: nn.Module) -> dict[str, int]:
    """How many few-bit layers run each arithmetic where they are now, most layers first."""
    return dict(Counter(layer.choice().path for layer in quant_layers(model).values()).most_common())
