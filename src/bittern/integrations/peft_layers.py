"""The layers that peft puts in the place of others: which adapters they wear, how strongly, and as which products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers import flat_weight, swap
from bittern.layers.branch import Product


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft has put in the place of others, by path."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def adapters_of(wrapper: Any) -> set[str]:
    """The names of all adapters that a layer wears."""
    return {name for layers in wrapper.adapter_layer_names for name in getattr(wrapper, layers)}


def active_adapters(wrapper: Any) -> list[str]:
    """The names of those that count."""
    if wrapper.disable_adapters:
        return []
    return [name for name in wrapper.active_adapters if name in adapters_of(wrapper)]


def check_plain(path: str, wrapper: Any, name: str) -> None:
    """Refuses an adapter that is no product of two matrices, added to a weight.

    Raises:
        UserError: saying what it is.
    """
    from peft.tuners.lora import Conv2d, Linear

    if wrapper.merged:
        raise UserError(f"{path} has adapters in its weight: expected pipe.unfuse_lora() before")
    kind = None
    if not isinstance(wrapper, Linear | Conv2d):
        kind = f"a {type(wrapper).__module__.split('.')[-2]} layer"
    elif wrapper.use_dora.get(name) or getattr(wrapper, "lora_variant", {}).get(name) is not None:
        kind = "a DoRA"
    elif wrapper.lora_bias.get(name):
        kind = "a LoRA with biases"
    if kind:
        raise UserError(
            f"adapter {name!r} is {kind} at {path}, which is no low-rank product: leave it loaded, not fused"
        )


def unit_of(wrapper: Any, name: str) -> float:
    """What peft multiplies an adapter of strength 1 by."""
    rank = wrapper.r[name]
    # Diffusers leaves the alphas of a file in peft's names as tensors.
    return float(wrapper.lora_alpha[name]) / (math.sqrt(rank) if wrapper.use_rslora.get(name) else rank)


def strength_of(wrapper: Any, name: str) -> float:
    """What the user has set; 1 for an adapter that adds nothing at any strength."""
    unit, scaling = unit_of(wrapper, name), wrapper.scaling[name]
    if not unit:
        return 1.0
    strength = float(scaling) / unit
    # Times alpha / r and back leaves a rounding error, of the alpha's type: the shortest number within it was set.
    error = abs(strength) * (torch.finfo(scaling.dtype).eps if isinstance(scaling, Tensor) else 1e-12)
    rounded = (round(strength, digits) for digits in range(15))
    return next((value for value in rounded if abs(value - strength) <= error), strength)


def product_of(wrapper: Any, base: Any, name: str) -> Product:
    """What an adapter adds to the few-bit layer below."""
    return Product(
        name=name,
        rows=getattr(base, "rows", (0, base.weight.shape[0])),
        down=flat_weight(wrapper.lora_A[name]).detach(),
        up=flat_weight(wrapper.lora_B[name]).detach(),
        unit=unit_of(wrapper, name),
        strength=strength_of(wrapper, name),
    )


def common_strengths(wrappers: Mapping[str, Any], active: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Each adapter's strength, or None if it is not one."""
    found: dict[str, set[float]] = {}
    for path, names in active.items():
        for name in names:
            found.setdefault(name, set()).add(strength_of(wrappers[path], name))
    return {name: values.pop() if len(values) == 1 else None for name, values in found.items()}


@contextmanager
def rolled_back(models: Sequence[nn.Module]) -> Iterator[ExitStack]:
    """What to do if the block fails; whatever it is, the adapters of the models count as they did before."""
    before = [
        (layer, list(layer.active_adapters), layer.disable_adapters, dict(layer.scaling))
        for model in models
        for _, layer in peft_layers(model)
        if hasattr(layer, "scaling")
    ]

    def restore() -> None:
        for layer, names, disabled, scaling in before:
            layer.set_adapter(names)
            layer.enable_adapters(not disabled)
            layer.scaling.update(scaling)

    with ExitStack() as undo:
        undo.callback(restore)
        yield undo
        undo.pop_all()


def delete_adapters(model: Any, names: Sequence[str]) -> None:
    """Takes adapters off a model, even half loaded ones that it does not know of."""
    for path, layer in list(peft_layers(model)):
        for name in adapters_of(layer).intersection(names):
            layer.delete_adapter(name)
        if not adapters_of(layer):
            swap(model, path, layer.get_base_layer())
    configs = getattr(model, "peft_config", {})
    for name in names:
        configs.pop(name, None)
    if hasattr(model, "peft_config") and not configs:
        del model.peft_config
        model._hf_peft_config_loaded = False
