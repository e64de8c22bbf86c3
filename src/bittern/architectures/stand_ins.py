"""Classes of ours that stand in for diffusers' own: known to the caches of diffusers by what those know of its own.

FirstBlockCache, MagCache, SeaCache and the skipping of layers ask registries, by the very class and not by its bases,
which output of a block is the image and what an attention returns that is left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from bittern.layers import is_unhooked


def enlist(ours: type, theirs: type) -> None:
    """Gives a class the entries that the class for which it stands in has in diffusers' registries.

    Both classes are loaded by whoever calls this, and with them all that the registries load. What diffusers refuses
    for its own class it refuses for ours.
    """
    from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry

    registries: tuple[Any, ...] = TransformerBlockRegistry, AttentionProcessorRegistry
    for registry in registries:
        try:
            entry = registry.get(theirs)
        except ValueError:
            continue
        # An entry notes the class whose signature it has read.
        registry.register(ours, dataclasses.replace(entry))


def replace_class(module: nn.Module, ours: type[nn.Module]) -> None:
    """Makes a module one of another class, with the `forward` of that class.

    Another class, not another `forward`: copies and pickles of the module keep it.
    """
    if is_unhooked(module):
        # What hooks that were removed have left there is the `forward` of the class that was.
        module.__dict__.pop("forward", None)
    module.__class__ = ours
