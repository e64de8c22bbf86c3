"""What the vendor's GEMM computes: 16 bits with many tokens, and branches beside the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bittern.ops import reference
from bittern.ops.triton import config
from bittern.ops.triton.dequantize import dequantize_segment
from bittern.ops.triton.launch import contiguous_rows


def many_tokens(
    inputs: Sequence[Tensor],
    codes: Tensor,
    scales: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    weight: str,
    group_size: int | None,
    path: str,
    shift: Sequence[float],
    gelu_from: int | None = None,
) -> Tensor:
    """The layer on path "a16" by the vendor's GEMM. Arguments as in `bittern.ops.few_bit_linear`."""
    if down is not None and up is not None and is_apart(down):
        y = many_tokens(inputs, codes, scales, smooth, None, None, bias, weight, group_size, path, shift)
        return reference.activated(with_branch(y, inputs, down, up), gelu_from)
    codes, scales = contiguous_rows(codes), contiguous_rows(scales)
    smooth, down, up = (None if t is None else contiguous_rows(t) for t in (smooth, down, up))
    first, n = inputs[0], codes.shape[0]
    layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
    whole = torch.empty(n, layout.k, dtype=first.dtype, device=first.device)
    y = None if bias is None else bias.to(first.dtype)
    for x, segment in zip(inputs, layout, strict=True):
        x, part = x.reshape(-1, x.shape[-1]), whole[:, segment.logical]
        dequantize_segment(
            codes,
            scales,
            None if smooth is None else smooth[segment.logical],
            None if down is None else down[:, segment.logical],
            up,
            weight,
            segment,
            part,
        )
        y = x @ part.T if y is None else torch.addmm(y, x, part.T)
    assert y is not None
    return reference.activated(y.reshape(*first.shape[:-1], n), gelu_from)


def is_apart(down: Tensor) -> bool:
    """Whether a branch has more rank than the kernels take, as of several fused LoRAs."""
    return config.padded_rank(down.shape[0]) > config.LARGEST_RANK


def has_room_for_float32(down: Tensor) -> bool:
    """Whether the epilogue of the 8-bit GEMM takes a branch in float32.

    More than 32 of the rank exceed Hopper's shared memory, and of less Triton 3.6 makes no code for 10.0.
    """
    here = config.device_of(down.device)
    return config.padded_rank(down.shape[0]) <= 32 and here.capability[0] != 10


def projected(inputs: Sequence[Tensor], down: Tensor) -> Tensor:
    """The down-projected inputs [M, R], summed in float32."""
    low: Tensor | None = None
    start = 0
    for x in inputs:
        stop = start + x.shape[-1]
        part, d = x.reshape(-1, x.shape[-1]), down[:, start:stop]
        if x.is_cuda and x.dtype == d.dtype and x.dtype.itemsize == 2:
            found = torch.mm(part, d.T, out_dtype=torch.float32)
        else:
            found = part.float() @ d.float().T
        low = found if low is None else low.add_(found)
        start = stop
    assert low is not None
    return low


def with_branch(y: Tensor, inputs: Sequence[Tensor], down: Tensor, up: Tensor) -> Tensor:
    """Adds (x · D^T) · U^T to y in place, by the vendor's GEMM, in the dtype of x; in float32 beside float16.

    float16 ends at 65,504, where x · D^T may not.
    """
    if y.dtype == torch.float16:
        flat = y.view(-1, y.shape[-1])
        flat.copy_(flat.float().addmm_(projected(inputs, down), up.float().T))
        return y
    low: Tensor | None = None
    start = 0
    for x in inputs:
        stop = start + x.shape[-1]
        part, d = x.reshape(-1, x.shape[-1]), down[:, start:stop].to(x.dtype)
        low = part @ d.T if low is None else torch.addmm(low, part, d.T)
        start = stop
    assert low is not None
    y.view(-1, y.shape[-1]).addmm_(low, up.to(y.dtype).T)
    return y
