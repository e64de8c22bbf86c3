"""The layer put together from the kernels: what the registry runs for a path.

    a8    per segment: prologue -> codes, scales, low;  per segment: unpack -> 8-bit weight;  one GEMM
    a16   few tokens: per segment one pass over the packed weight;  more: a 16-bit weight, and the vendor's GEMM

The 8-bit operands live in torch's caching allocator for the length of a call, so that layers share the memory;
the largest of FLUX needs 71 MB for activations and 66 MB for weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bittern.formats import KLayout
from bittern.ops import reference
from bittern.ops.triton import config
from bittern.ops.triton.dequantize import dequantize_segment
from bittern.ops.triton.gemm import gemm
from bittern.ops.triton.prologue import quantize_rows
from bittern.ops.triton.skinny import skinny_segment
from bittern.ops.triton.unpack import unpack_segment

FEW_TOKENS = 64
"""Up to here the 16-bit path reads packed weights in the product itself."""

CODES = {"a8-int8": torch.int8, "a8-fp8": torch.float8_e4m3fn, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def scratch_bounds(layout: KLayout) -> list[tuple[int, int]]:
    """Where each segment lies in 8-bit operands, whose segments are filled up to whole tiles."""
    bounds: list[tuple[int, int]] = []
    start = 0
    for length in layout.segments:
        stop = start + -(-length // config.SCRATCH_MULTIPLE) * config.SCRATCH_MULTIPLE
        bounds.append((start, stop))
        start = stop
    return bounds


def eight_bit_linear(
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
) -> Tensor:
    """The layer on path "a8-int8" or "a8-fp8". Arguments as in `bittern.ops.few_bit_linear`."""
    first, n = inputs[0], codes.shape[0]
    m, device = first.shape[:-1].numel(), first.device
    here = config.device_of(device)
    layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
    bounds = scratch_bounds(layout)
    width, count = bounds[-1][1], len(bounds)
    a = torch.empty(m, width, dtype=CODES[path], device=device)
    b = torch.empty(n, width, dtype=CODES[path], device=device)
    row_scales = torch.empty(count, m, dtype=torch.float32, device=device)
    column_scales = torch.empty(count, n, dtype=torch.float32, device=device)
    low = None if down is None else torch.empty(m, down.shape[0], dtype=torch.float32, device=device)
    out = torch.empty(m, n, dtype=first.dtype, device=device)
    for i, (x, segment, (start, stop)) in enumerate(zip(inputs, layout, bounds, strict=True)):
        quantize_rows(
            x.reshape(m, x.shape[-1]),
            None if smooth is None else smooth[segment.logical],
            None if down is None else down[:, segment.logical],
            a[:, start:stop],
            row_scales[i],
            low,
            config.prologue_for(here, m),
            accumulate=i > 0,
        )
        unpack_segment(
            codes,
            scales,
            weight,
            segment,
            b[:, start:stop],
            column_scales[i],
            config.unpack_for(x.shape[-1], group_size is not None),
        )
    gemm(
        a,
        b,
        row_scales,
        column_scales,
        low,
        up,
        bias,
        out,
        bounds[0][1],
        config.gemm_for(here, m, count, path == "a8-int8", 0 if up is None else up.shape[1]),
    )
    return out.reshape(*first.shape[:-1], n)


def sixteen_bit_linear(
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
) -> Tensor:
    """The layer on path "a16". Arguments as in `bittern.ops.few_bit_linear`."""
    first, n = inputs[0], codes.shape[0]
    m = first.shape[:-1].numel()
    layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
    flat = [x.reshape(m, x.shape[-1]) for x in inputs]
    if m > FEW_TOKENS:
        whole = torch.empty(n, layout.k, dtype=first.dtype, device=first.device)
        y = None if bias is None else bias.to(first.dtype)
        for x, segment in zip(flat, layout, strict=True):
            part = whole[:, segment.logical]
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
        return y.reshape(*first.shape[:-1], n)
    low: Tensor | None = None
    if down is not None:
        low = torch.cat(flat, dim=-1).float() @ down.float().T
    partial: Tensor | None = None
    last = len(flat) - 1
    for i, (x, segment) in enumerate(zip(flat, layout, strict=True)):
        out = torch.empty(m, n, dtype=first.dtype if i == last else torch.float32, device=first.device)
        skinny_segment(
            x,
            codes,
            scales,
            None if smooth is None else smooth[segment.logical],
            weight,
            segment,
            partial,
            low if i == last else None,
            up if i == last else None,
            bias if i == last else None,
            out,
            config.skinny_for(m, group_size is not None),
        )
        partial = out
    assert partial is not None
    return partial.reshape(*first.shape[:-1], n)


def quantize_activations(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, format: str, shift: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's prologue on one segment, in 8 bits. Arguments as in `bittern.ops.quantize_activations`."""
    *batch, k = x.shape
    flat = x.reshape(-1, k)
    codes = torch.empty(*flat.shape, dtype=CODES[format], device=x.device)
    scales = torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
    low = torch.empty(len(flat), 0 if down is None else down.shape[0], dtype=torch.float32, device=x.device)
    if len(flat):
        quantize_rows(
            flat, smooth, down, codes, scales[:, 0], low, config.prologue_for(config.device_of(x.device), len(flat))
        )
    return codes.reshape(x.shape), scales.reshape(*batch, 1), low.reshape(*batch, low.shape[1])
