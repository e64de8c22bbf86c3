"""The fallback for models that no family lists: their repeated blocks, found by looking.

A block is an element of a list whose elements are all of one class, at least two of them, with linears or
convolutions inside; of lists in lists the outermost counts. A U-Net's levels differ in class, and so its lists lie
inside them. Lists of one element count if another place repeats their class (a U-Net's middle). What lies outside
is kept: embedders, first and last layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from bittern.architectures.base import Architecture, Block
from bittern.architectures.recording import Reading, record
from bittern.errors import UserError

FORWARD = "bittern.architectures.grouped_attention"
"""Lets the attention processors it knows run their groups as one, in whatever model they are."""

LEAST_SHARE = 0.5
"""Part of the weights of all linears and convolutions that blocks must hold."""

EMBEDDERS = ("embed", "guidance")
"""Parts of the names of what makes the conditioning, whose lists are no blocks."""

_MODULATION = re.compile(r"(norm\w*\.(\w+\.)*linear|(\w*_)?ada\w*(\.\w+)*|(\w*_)?mod(ulation)?(\.\w+)*|time_emb_proj)")


def discover(model: nn.Module) -> Architecture:
    """Describes a model by the blocks that repeat in it, and the linears in them that read one tensor.

    Reads shapes only: the model may be on the meta device. Inputs are compared in one pass on fake tensors, see
    `recording`; if there can be none, no groups are declared, and the modulation is known by its names.

    Raises:
        UserError: if no blocks repeat, or they hold less than half of the weights.
    """
    name = type(model).__name__
    places = _places(model)
    total, held = _weights(model), sum(_weights(model.get_submodule(path)) for path in places)
    if not places or held < LEAST_SHARE * total:
        found = f"those that repeat hold {held / total:.0%} of its weights" if places and total else "none repeats"
        raise UserError(
            f"the blocks of model class {name!r} cannot be found: {found}; expected a list of equal blocks that holds "
            "most of them, or one of the known families"
        )
    prefixes: dict[str, list[str]] = {}
    for path in places:
        prefixes.setdefault(_starred(path), []).append(path)
    reading = record(model)
    blocks = tuple(_block(prefix, paths, model, reading) for prefix, paths in prefixes.items())
    counts = ", ".join(f"{len(paths)} x {prefix}" for prefix, paths in prefixes.items())
    groups = "shared inputs were found by one pass on fake tensors"
    if isinstance(reading, str):
        groups = f"no shared inputs are declared, since {reading}"
    notes = (
        f"{name} is no known family: its blocks were found by looking ({counts}); {groups}",
        "inputs that are concatenations or come out of a GELU are not known; such layers are quantized as any other",
    )
    return Architecture(f"generic ({name})", class_names=(name,), blocks=blocks, forward=FORWARD, notes=notes)


def _places(model: nn.Module) -> list[str]:
    """Paths of the blocks, outermost ones only, in the order of the modules."""
    repeated: set[type] = set()
    found: list[str] = []

    def descend(module: nn.Module, path: str, *, alone: bool) -> None:
        elements = list(_elements(module))
        classes = {type(element) for _, element in elements}
        equal = len(classes) == 1 and (len(elements) > 1 or alone) and all(_weights(e) for _, e in elements)
        if equal and (not alone or classes <= repeated) and not any(word in path for word in EMBEDDERS):
            found.extend(f"{path}.{key}" for key, _ in elements)
            repeated.update(classes, *(_repeated_inside(element) for _, element in elements))
            return
        for key, child in module.named_children():
            descend(child, f"{path}.{key}" if path else key, alone=alone)

    descend(model, "", alone=False)
    # Once more, now that the repeated classes are known, for lists that hold a single one of them.
    descend(model, "", alone=True)
    outer = tuple(f"{path}." for path in found)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    return sorted({path for path in found if not path.startswith(outer)}, key=order.__getitem__)


def _elements(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The elements of a list that are no single layers; nothing if this is no list, or holds a single layer."""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        children = list(module.named_children())
        if all(any(child.children()) for _, child in children):
            yield from children


def _repeated_inside(block: nn.Module) -> set[type]:
    """Classes of the elements of lists inside a block that have one class."""
    classes: set[type] = set()
    for module in block.modules():
        inside = {type(element) for _, element in _elements(module)}
        classes |= inside if len(inside) == 1 else set()
    return classes


def _weights(module: nn.Module) -> int:
    layers = (m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return sum(layer.weight.numel() for layer in layers)


def _starred(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _block(prefix: str, paths: list[str], model: nn.Module, reading: Reading | str) -> Block:
    """The declaration of one kind of block: what holds for all of its copies."""
    names: dict[str, list[str]] = {}
    for path in paths:
        for name, module in model.get_submodule(path).named_modules():
            if isinstance(module, nn.Linear):
                names.setdefault(name, []).append(f"{path}.{name}")
    if isinstance(reading, str):
        return Block(prefix, modulation=tuple(name for name in names if _MODULATION.fullmatch(name)))
    return Block(
        prefix,
        modulation=tuple(name for name, places in names.items() if reading.per_image.issuperset(places)),
        groups=_groups(paths, names, model, reading),
    )


def _groups(
    paths: list[str], names: dict[str, list[str]], model: nn.Module, reading: Reading
) -> tuple[tuple[str, ...], ...]:
    """Names of linears that read one tensor in every copy of a block that has them."""
    counts: Counter[tuple[str, ...]] = Counter()
    for path in paths:
        readers: dict[Any, list[str]] = {}
        for name in names:
            place = f"{path}.{name}"
            if place in reading.inputs:
                k = model.get_submodule(place).in_features
                readers.setdefault((reading.inputs[place], k), []).append(name)
        counts.update(tuple(group) for group in readers.values() if len(group) > 1)
    return tuple(group for group, count in counts.items() if count == min(len(names[name]) for name in group))
