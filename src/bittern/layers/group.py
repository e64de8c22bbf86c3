"""Groups: layers that read one tensor hold one weight, and run as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bittern.errors import UserError
from bittern.layers.few_bit import LEAVES, SHARED_LEAVES
from bittern.layers.hooks import is_unhooked
from bittern.layers.linear import QuantLinear


class Group:
    """Few-bit layers that read one tensor.

    The first member's buffers `group_codes`, `group_scales` and `group_up` hold the rows of all, in order, and
    `group_smooth` and `group_down` what they share; the others reach theirs through this object. So moving,
    copying or pickling a model that contains them moves, copies or pickles each tensor once, and the group
    survives. A member copied on its own takes its group with it; one moved on its own moves its bias only.
    """

    def __init__(self, members: Sequence[QuantLinear]) -> None:
        self.members = list(members)


def join_group(members: Sequence[QuantLinear]) -> Group:
    """Makes layers that read one tensor a group. On meta they may be joined first and loaded later.

    A state dict has each member's own codes, scales, up and bias, and `smooth` and `down` under the first.

    Args:
        members: At least two layers of one scheme and one device; their smooth and down are equal.

    Raises:
        UserError: if they do not fit together.
    """
    if len(set(members)) < max(2, len(members)) or any(member.group is not None for member in members):
        raise UserError("a group needs two or more different layers that are in no group yet")
    for field in ("in_features", "segments", "scheme", "compute_dtype"):
        values = {getattr(member, field) for member in members}
        if len(values) > 1:
            raise UserError(f"the members of a group differ in {field}: {values}; expected one value")
    first = members[0]
    for leaf in SHARED_LEAVES:
        if not all(_same(first._buffers[leaf], member._buffers[leaf]) for member in members[1:]):
            raise UserError(f"the members of a group have different {leaf}: solve them together")
    for leaf in LEAVES:
        stacked = first._buffers[leaf]
        if stacked is not None and leaf not in SHARED_LEAVES:
            stacked = torch.cat([cast(Tensor, member._buffers[leaf]) for member in members])
        # Accelerate moves every buffer that is registered as not persistent, and falls over one that is None.
        first.register_buffer(f"group_{leaf}", stacked, persistent=stacked is None)
        for member in members:
            member._buffers[leaf] = None
    group, start = Group(members), 0
    for member in members:
        member.group = group
        member.rows = (start, start + member.out_features)
        start += member.out_features
    return group


def group_linear(members: Sequence[nn.Module], x: Tensor | Sequence[Tensor], *, gelus: int = 0) -> list[Tensor]:
    """The outputs of several layers for one input, together where possible.

    Layers that follow one another in a group run as one operation, and their outputs are views of its result. Those
    that wear plain LoRAs of peft do so as well, and the LoRAs' products are added to their outputs. Others are called
    one by one: layers without a group, in other wrappers, or with hooks of their own.

    Args:
        members: The layers.
        x: Their input, or one input per K-segment.
        gelus: How many of the last are followed by a GELU, in its tanh form.
    """
    outputs: list[Tensor] = []
    for run in _runs([_beneath(member) if isinstance(x, Tensor) else member for member in members]):
        worn = members[len(outputs) : len(outputs) + len(run)]
        # Of what is left, `gelus` layers at the end have one.
        plain = min(len(run), max(0, len(members) - len(outputs) - gelus))
        if len(run) == 1:
            outputs.append(_by_itself(worn[0], x, gelu=not plain))
        elif all(layer is member for layer, member in zip(run, worn, strict=True)):
            outputs += _as_one(run, x, plain)
        else:
            assert isinstance(x, Tensor)
            found = [_adapted(*each, x) for each in zip(worn, run, _as_one(run, x, len(run)), strict=True)]
            outputs += found[:plain] + [nn.functional.gelu(y, approximate="tanh") for y in found[plain:]]
    return outputs


def _beneath(member: Any) -> nn.Module:
    """The few-bit layer that wears plain LoRAs of peft and nothing else; any other layer itself."""
    layer = getattr(member, "base_layer", None)
    if not isinstance(layer, QuantLinear) or not isinstance(getattr(member, "lora_A", None), nn.ModuleDict):
        return member
    # What is no plain product, such as a DoRA, wants to call the layer itself.
    other = any(name in getattr(member, "lora_variant", {}) for name in member.active_adapters)
    return member if other or member.merged or not is_unhooked(member) else layer


def _adapted(member: Any, layer: nn.Module, y: Tensor, x: Tensor) -> Tensor:
    """A few-bit layer's output with the products of the LoRAs that it wears: y + scaling · x · A^T · B^T each."""
    if member is layer or member.disable_adapters:
        return y
    total = y
    for name in member.active_adapters:
        if name in member.lora_A:
            down, up = member.lora_A[name], member.lora_B[name]
            low = down(member.lora_dropout[name](x.to(down.weight.dtype)))
            total = total + up(low) * member.scaling[name]
    return total.to(y.dtype)


def _as_one(run: Sequence[nn.Module], x: Tensor | Sequence[Tensor], plain: int) -> list[Tensor]:
    layers = cast("Sequence[QuantLinear]", run)
    start = layers[0].rows[0]
    gelu_from = layers[plain].rows[0] - start if plain < len(layers) else None
    y = layers[0].linear_rows(x, start, layers[-1].rows[1], _biases(layers), gelu_from)
    return list(y.split([layer.out_features for layer in layers], dim=-1))


def _by_itself(member: nn.Module, x: Tensor | Sequence[Tensor], *, gelu: bool) -> Tensor:
    if not gelu:
        return member(x)
    if isinstance(member, QuantLinear):
        return member.with_gelu(x)
    return nn.functional.gelu(member(x), approximate="tanh")


def _runs(members: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The layers in order, those together that may run as one."""
    runs: list[list[nn.Module]] = []
    for member in members:
        if runs and _follows(runs[-1][-1], member):
            runs[-1].append(member)
        else:
            runs.append([member])
    return runs


def _follows(previous: nn.Module, member: nn.Module) -> bool:
    """Whether a layer's rows lie behind those of another in one buffer, and both compute the same way."""
    return (
        isinstance(previous, QuantLinear)
        and isinstance(member, QuantLinear)
        and member.group is not None
        and member.group is previous.group
        and member.rows[0] == previous.rows[1]
        and member.path == previous.path
        and member.is_plain
        and previous.is_plain
    )


def _biases(layers: Sequence[QuantLinear]) -> Tensor | None:
    """The biases behind one another, zeros for those without."""
    given = [layer.bias for layer in layers if layer.bias is not None]
    if not given:
        return None
    biases = [given[0].new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat(biases)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return a.device == b.device and (a.is_meta or torch.equal(a, b))
