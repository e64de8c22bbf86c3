"""A layer with few tokens, whose packed weights are read in the product itself.

    a16   per segment with smoothing x / s, rounded to bf16;  then one pass over the packed weight
    a8    per segment codes of x and their scales;  then one pass, which folds weights to 8 bits on the way

The pass is `skinny`, or `fused_unpack` where that was measured to be faster. In 8 bits codes are those of many tokens,
to the bit; sums are float32. A pass with a branch or a GELU, of several segments, or with more of K than a program
should walk, gives parts, which are combined. How many there are follows from the device's multiprocessors, so that
other devices round other sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bittern import formats
from bittern.ops.triton import config
from bittern.ops.triton.activations import CODES, quantize, scratch_bounds
from bittern.ops.triton.combine import combine
from bittern.ops.triton.config import FusedUnpackConfig
from bittern.ops.triton.fused_unpack import fused_unpack_segment
from bittern.ops.triton.launch import Recorder, multiprocessors
from bittern.ops.triton.layer_plan import Call, LayerPlan
from bittern.ops.triton.projection import parts_of
from bittern.ops.triton.skinny import skinny_segment
from bittern.ops.triton.smoothing import divide


def fused_tiles(
    inputs: Sequence[Tensor], codes: Tensor, weight: str, group: int | None, path: str
) -> list[FusedUnpackConfig | None]:
    """For each input how weights are unpacked in its product; None where they are not."""
    device, m = config.device_of(codes.device), inputs[0].shape[:-1].numel()
    about = group, formats.get(weight).codes_per_byte, 1 if path in CODES else 2
    return [config.fused_unpack_for(device, m, len(codes), x.shape[-1], *about) for x in inputs]


class FewTokens(LayerPlan):
    """All paths but "a4"."""

    def _record(self, recorder: Recorder, call: Call) -> None:
        (m, n), device, group = call.out.shape, call.out.device, call.layout.group_size
        here, widths = config.device_of(device), [x.shape[1] for x in call.inputs]
        per_byte = formats.get(call.weight).codes_per_byte
        eight = call.path in CODES
        fused = fused_tiles(call.inputs, call.codes, call.weight, group, call.path)
        tiles = [f or config.skinny_for(here, m, k, group, per_byte) for f, k in zip(fused, widths, strict=True)]
        rank = 0 if call.up is None else call.up.shape[1]
        processors = multiprocessors(device)
        parts = [
            t.parts(m, n, k, processors)
            if isinstance(t, FusedUnpackConfig)
            else t.parts(m, n, k, group, per_byte, processors)
            for t, k in zip(tiles, widths, strict=True)
        ]
        whole = sum(parts) == 1 and not rank and call.gelu_from is None
        lows = [parts_of(k) if rank else 0 for k in widths]
        bounds = scratch_bounds(call.layout)
        # A smoothed x is rounded to bf16, whatever it was.
        kind = CODES[call.path] if eight else torch.bfloat16
        wanted = eight or any(s is not None for s in call.smooth)
        operands, row_scales, sums, low = recorder.scratch(
            device,
            ((m, bounds[-1][1] if wanted else 0), kind),
            ((len(widths) if eight else 0, m), torch.float32),
            ((0 if whole else sum(parts), m, n), torch.float32),
            ((sum(lows), m, rank), torch.float32),
        )
        targets = [call.out] if whole else recorder.slices(sums, parts)
        projections = recorder.slices(low, lows)
        for i, (x, segment, (start, _)) in enumerate(zip(call.inputs, call.layout, bounds, strict=True)):
            smooth, operand, scales = call.smooth[i], x, None
            if eight or smooth is not None:
                operand = recorder.part(operands, operands[:, start : start + x.shape[1]])
            if eight:
                scales = recorder.part(row_scales, row_scales[i])
                quantize(x, None, None, operand, scales, None, 0, smooth=smooth, launch=recorder.launch)
            elif smooth is not None:
                divide(x, smooth, operand, launch=recorder.launch)
            multiply: Any = fused_unpack_segment if isinstance(tiles[i], FusedUnpackConfig) else skinny_segment
            multiply(
                operand,
                scales,
                call.codes,
                call.scales,
                call.weight,
                segment,
                call.bias if whole else None,
                targets[i],
                tiles[i],
                x if rank else None,
                call.down[i],
                projections[i] if rank else None,
                launch=recorder.launch,
            )
        if not whole:
            combine(sums, low if rank else None, call.up, call.bias, call.out, call.gelu_from, launch=recorder.launch)
