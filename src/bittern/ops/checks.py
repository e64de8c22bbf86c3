"""What arguments of the operations must be: kernels read memory by these shapes without looking again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bittern import formats
from bittern.errors import UserError
from bittern.ops import reference


def check(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    shift: Sequence[float],
    gelu_from: int | None,
) -> None:
    """Refuses what does not fit together. Arguments as in `bittern.ops.few_bit_linear`.

    Raises:
        UserError: naming the argument, and what was expected.
    """
    numbers: list[tuple[str, Any]] = [("group_size", group_size), ("gelu_from", gelu_from)]
    for name, value in numbers:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise UserError(f"{name} is {value!r}: expected a whole number, or None")
    if not all(math.isfinite(value) for value in shift):
        raise UserError(f"shift is {list(shift)}: expected finite numbers")
    if codes.ndim != 2:
        raise UserError(f"codes has shape {list(codes.shape)}: expected a matrix")
    n = codes.shape[0]
    check_axis(inputs)
    layout = reference.layout_of(tuple(int(x.shape[-1]) for x in inputs), group_size)
    expected = {
        "codes": (codes, (n, formats.get(weight).packing.bytes_per_row(layout.padded_k))),
        "scales": (scales, (n, layout.num_groups)),
        "smooth": (smooth, (layout.k,)),
        "down": (down, (up.shape[-1] if up is not None else 0, layout.k)),
        "up": (up, (n, down.shape[0] if down is not None else 0)),
        "bias": (bias, (n,)),
    }
    first = inputs[0]
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise UserError(f"{name} is on {tensor.device}: expected {first.device}, where the input is")
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{name} has shape {list(tensor.shape)}: expected {list(shape)} for inputs of "
                f"{' + '.join(str(length) for length in layout.segments)} columns and {n} rows of codes"
            )
        if (tensor.dtype != torch.uint8) if name == "codes" else not tensor.is_floating_point():
            wanted = "torch.uint8" if name == "codes" else "a float type"
            raise UserError(f"{name} has dtype {tensor.dtype}: expected {wanted}")
    if not first.is_floating_point():
        raise UserError(f"the input has dtype {first.dtype}: expected a float type")
    if any(x.dtype != first.dtype or x.shape[:-1] != first.shape[:-1] for x in inputs[1:]):
        raise UserError("the inputs of the K-segments differ in dtype or batch shape: expected equal ones")
    if shift and len(shift) != len(inputs):
        raise UserError(f"shift has {len(shift)} values: expected {len(inputs)}, one per input, or none")
    if gelu_from is not None and not 0 <= gelu_from <= n:
        raise UserError(f"gelu_from {gelu_from}: expected one of the {n} outputs, or none")


def check_axis(inputs: Sequence[Tensor]) -> None:
    """Refuses inputs of no dimension."""
    if any(x.ndim == 0 for x in inputs):
        raise UserError("the input is a single number without an axis: expected a vector of inputs, or rows of them")
