"""Groups that run as one inside diffusers' own attention processors, with no code of theirs copied.

A processor asks its attention for `to_q(x)`, `to_k(x)` and `to_v(x)`, one by one. Ours are subclasses that hand it the
attention behind a face which lives for one call: the first member of a group to be asked for a tensor runs the whole
group, and the others, asked for the same tensor, get what is ready. Whatever a processor does to its input in between
is honoured, since only the same tensor counts as the same. Members that wear adapters are asked themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from bittern.architectures.stand_ins import enlist
from bittern.layers import QuantLinear, group_linear

PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

KINDS = {
    "attention_processor": ("AttnProcessor2_0", "JointAttnProcessor2_0", "SanaLinearAttnProcessor2_0"),
    "transformers.sana_transformer": ("SanaAttnProcessor2_0",),
    "transformers.transformer_flux2": ("Flux2AttnProcessor", "Flux2KVAttnProcessor"),
    "transformers.transformer_ltx": ("LTXVideoAttnProcessor",),
    "transformers.transformer_qwenimage": ("QwenDoubleStreamAttnProcessor2_0",),
    "transformers.transformer_wan": ("WanAttnProcessor",),
    "transformers.transformer_z_image": ("ZSingleStreamAttnProcessor",),
}
"""Processors that are known to ask as described, by their modules under `diffusers.models`."""


class Face:
    """An attention as its processor sees it during one call."""

    def __init__(self, attn: nn.Module) -> None:
        self._attn = attn
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in PROJECTIONS and _group(self._attn, name):
            return functools.partial(self._project, name)
        return getattr(self._attn, name)

    def _project(self, name: str, x: Tensor) -> Tensor:
        if name not in self._ready or self._ready[name][0] is not x:
            mates = _group(self._attn, name)
            outputs = group_linear([getattr(self._attn, mate) for mate in mates], x)
            self._ready.update({mate: (x, y) for mate, y in zip(mates, outputs, strict=True)})
        return self._ready.pop(name)[1]


def _group(attn: nn.Module, name: str) -> list[str]:
    """The projections of an attention that share a group with one of them, in the order of their rows."""
    layer = getattr(attn, name)
    if not isinstance(layer, QuantLinear) or layer.group is None:
        return []
    members = [(mate, getattr(attn, mate, None)) for mate in PROJECTIONS]
    rows = {mate: m.rows for mate, m in members if isinstance(m, QuantLinear) and m.group is layer.group}
    return sorted(rows, key=rows.__getitem__)


def _faced(call: Callable[..., Any]) -> Callable[..., Any]:
    """A processor's call with the attention behind its face; its signature stays, for diffusers reads it."""

    @functools.wraps(call)
    def faced(self: Any, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, Face(attn), *args, **kwargs)

    return faced


def _grouped() -> dict[type, type]:
    """A subclass of each kind, as a name of this module, by which pickles find it."""
    classes: dict[type, type] = {}
    for module, names in KINDS.items():
        source = import_module(f"diffusers.models.{module}")
        for base in (getattr(source, name) for name in names if hasattr(source, name)):
            name = f"Grouped{base.__name__}"
            classes[base] = type(name, (base,), {"__call__": _faced(base.__call__), "__module__": __name__})
            globals()[name] = classes[base]
            enlist(classes[base], base)
    return classes


GROUPED = _grouped()


def install(model: nn.Module) -> None:
    """Gives every processor of a known kind its grouped class; those that are others stay as they are."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if type(processor) in GROUPED:
            # Another class, not another object: what has been set on it, such as a backend, stays.
            processor.__class__ = GROUPED[type(processor)]
