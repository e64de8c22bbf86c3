"""The layer put together from the kernels: what the registry runs for a path.

    a8    per segment: unpack -> 8-bit weight, 1 / s;  prologue -> codes, scales, low;  then one GEMM
          with a branch up to 1,024 tokens, on Hopper: projection -> low in parts;  whole rows -> codes, scales, low
          a8-fp8-folded with many tokens: whole rows -> codes, scales, bounds;  fold -> 8-bit weight and branch
    a4    the same with codes in groups of 64, weight codes as they are, and scales in the GEMM's loop
    a16   a 16-bit weight, and the vendor's GEMM

and on all paths but a4 `few_tokens`: with up to 64 tokens, and from 65 to 256 where that was measured to be faster.

The 8-bit operands live in torch's caching allocator for the length of a call, so that layers share the memory;
the largest of FLUX needs 71 MB for activations and 66 MB for weights.

A layer's first call with a signature records its launches, and the next ones repeat them (see `launch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bittern.formats import Segment
from bittern.ops import reference
from bittern.ops.triton import config
from bittern.ops.triton.activations import CODES, quantize, scratch_bounds
from bittern.ops.triton.few_tokens import FewTokens, fused_tiles
from bittern.ops.triton.fold_branch import Weight, bounds_of, fold_branch
from bittern.ops.triton.four_bits import correct_bias, quantize_groups
from bittern.ops.triton.gemm import gemm
from bittern.ops.triton.grouped_gemm import grouped_gemm
from bittern.ops.triton.launch import Recorder, describable, multiprocessors
from bittern.ops.triton.layer_plan import Call, LayerPlan
from bittern.ops.triton.projection import parts_of, project
from bittern.ops.triton.unpack import unpack_segment
from bittern.ops.triton.vendor import has_room_for_float32, is_apart, many_tokens, projected
from bittern.scheme import ACTIVATION_GROUP

FEW_TOKENS = 64
"""Up to here packed weights are read in the product itself, on all paths but a4."""

MIDDLE_TOKENS = 256
"""Up to here they are where `fused_unpack` has a configuration for the device and the layer."""

IN_PARTS = 1024
"""Up to here the 8-bit paths have the branch projected in parts of K, where rows are kept in registers: on Hopper."""


class EightBits(LayerPlan):
    """The paths of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self._projector: Literal["prologue", "parts", "vendor", "folded"] | None = None

    def _low(
        self,
        inputs: Sequence[Tensor],
        down: Tensor | None,
        up: Tensor | None,
        weight: str,
        group_size: int | None,
        path: str,
    ) -> Tensor | None:
        if down is None:
            return None
        if self._projector is None:
            first = inputs[0]
            rows, here = first.shape[:-1].numel(), config.device_of(first.device)
            whole = [config.whole_rows_for(here, rows, x.shape[-1], len(down)) for x in inputs]
            layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
            if reference.folds_branch(rows, down, up, weight, layout, path):
                self._projector = "folded"
            elif rows <= IN_PARTS and None not in whole:
                self._projector = "parts"
            elif config.whole_rows_for(here, rows, max(x.shape[-1] for x in inputs), len(down)) is None:
                self._projector = "prologue"
            else:
                self._projector = "vendor" if first.dtype == down.dtype else "prologue"
        return projected(inputs, down) if self._projector == "vendor" else None

    def _is_apart(self, down: Tensor) -> bool:
        return is_apart(down) or (down.element_size() > 2 and not has_room_for_float32(down))

    def _record(self, recorder: Recorder, call: Call) -> None:
        (m, n), device, grouped = call.out.shape, call.out.device, call.layout.group_size is not None
        here = config.device_of(device)
        bounds = scratch_bounds(call.layout)
        width, count = bounds[-1][1], len(bounds)
        folded = call.up is not None and self._projector == "folded"
        up = None if folded else call.up
        rank = 0 if up is None else up.shape[1]
        in_parts = self._projector == "parts"
        counts = [parts_of(x.shape[1]) if in_parts else 0 for x in call.inputs]
        a, b, row_scales, column_scales, low, parts, reciprocals, found = recorder.scratch(
            device,
            ((m, width), CODES[call.path]),
            ((n, width), CODES[call.path]),
            ((count, m), torch.float32),
            ((count, n), torch.float32),
            ((m, rank if call.low is None else 0), torch.float32),
            ((sum(counts), m, rank), torch.float32),
            ((width,), torch.float32),
            ((count, bounds_of(n, call.up.shape[1]) if folded and call.up is not None else 0), torch.float32),
        )
        low = low if call.low is None else call.low
        for x, down, part in zip(call.inputs, call.down, recorder.slices(parts, counts), strict=True):
            if in_parts and down is not None:
                project(x, down, part, launch=recorder.launch)
        for i, (x, segment, (start, stop)) in enumerate(zip(call.inputs, call.layout, bounds, strict=True)):
            if folded:
                _fold(
                    recorder,
                    x,
                    _weight(recorder, call, i, segment, column_scales, found),
                    recorder.part(a, a[:, start:stop]),
                    recorder.part(row_scales, row_scales[i]),
                    recorder.part(b, b[:, start:stop]),
                )
                continue
            smooth = call.smooth[i]
            inverse = None if smooth is None else recorder.part(reciprocals, reciprocals[start : start + len(smooth)])
            unpack_segment(
                call.codes,
                call.scales,
                call.weight,
                segment,
                recorder.part(b, b[:, start:stop]),
                recorder.part(column_scales, column_scales[i]),
                config.unpack_for(here, x.shape[-1], grouped),
                smooth=smooth,
                reciprocals=inverse,
                launch=recorder.launch,
            )
            quantize(
                x,
                inverse,
                call.down[i] if self._projector == "prologue" else None,
                recorder.part(a, a[:, start:stop]),
                recorder.part(row_scales, row_scales[i]),
                low if rank else None,
                rank,
                parts if in_parts and i == count - 1 else None,
                accumulate=i > 0,
                launch=recorder.launch,
            )
        first = bounds[0][1]
        columns = None
        if call.path != "a8-int8" and reachable(call.out, up, call.bias):
            columns = config.specialized_parts(here, m, n, call.layout.k, count, rank, multiprocessors(device))
        if columns is None:
            tiles = config.gemm_for(here, m, count, call.path == "a8-int8", rank)
            gemm(
                a, b, row_scales, column_scales, low if rank else None, up, call.bias, call.out, first,
                call.gelu_from, tiles, launch=recorder.launch,
            )  # fmt: skip
            return
        from bittern.ops.triton.specialized_gemm import specialized_gemm

        for start, stop, chosen in columns:
            gelu_from = None if call.gelu_from is None or call.gelu_from >= stop else max(0, call.gelu_from - start)
            specialized_gemm(
                a,
                recorder.part(b, b[start:stop]),
                row_scales,
                recorder.part(column_scales, column_scales[:, start:stop]),
                low if rank else None,
                None if up is None else recorder.part(up, up[start:stop]),
                None if call.bias is None else recorder.part(call.bias, call.bias[start:stop].view(1, -1)),
                recorder.part(call.out, call.out[:, start:stop]),
                first,
                gelu_from,
                chosen,
                launch=recorder.launch,
            )


def _weight(recorder: Recorder, call: Call, i: int, segment: Segment, column_scales: Tensor, bounds: Tensor) -> Weight:
    """The weight of segment `i` with its branch."""
    down, up = call.down[i], call.up
    assert down is not None and up is not None
    places = slice(segment.padded.start // 2, segment.padded.stop // 2)
    return Weight(
        recorder.part(call.codes, call.codes[:, places]),
        recorder.part(call.scales, call.scales[:, segment.groups]),
        segment.size,
        call.smooth[i],
        down,
        up,
        recorder.part(column_scales, column_scales[i]),
        recorder.part(bounds, bounds[i]),
    )


def _fold(recorder: Recorder, x: Tensor, weight: Weight, codes: Tensor, row_scales: Tensor, out: Tensor) -> None:
    """Both 8-bit operands of a segment, with the branch in the weight."""
    quantize(x, None, None, codes, row_scales, None, 0, smooth=weight.smooth, weight=weight, launch=recorder.launch)
    if config.has_gluon(config.device_of(out.device)):
        from bittern.ops.triton.specialized_fold import specialized_fold, words_of

        words = words_of(weight.codes, out)
        if words is not None:
            specialized_fold(weight, recorder.part(weight.codes, words), out, launch=recorder.launch)
            return
    fold_branch(weight, out, launch=recorder.launch)


def reachable(out: Tensor, up: Tensor | None, bias: Tensor | None) -> bool:
    """Whether tensor descriptors can stand for the result and for what its end reads, in 16 bits."""
    rows = [out, *([] if up is None else [up]), *([] if bias is None else [bias.view(1, -1)])]
    return all(x.element_size() == 2 and describable(x) for x in rows)


class FourBits(LayerPlan):
    """Path "a4"."""

    def _record(self, recorder: Recorder, call: Call) -> None:
        (m, n), device = call.out.shape, call.out.device
        here = config.device_of(device)
        bounds = scratch_bounds(call.layout)
        width, rank = bounds[-1][1], 0 if call.up is None else call.up.shape[1]
        a, b, row_scales, unused, corrected, low = recorder.scratch(
            device,
            ((m, width), torch.int8),
            ((n, width), torch.int8),
            ((width // ACTIVATION_GROUP, m), torch.float32),
            ((n,), torch.float32),
            ((n,), torch.float32),
            ((m, rank), torch.float32),
        )
        bias = call.bias
        shifts = call.shift or (0.0,) * len(bounds)
        for i, (x, segment, (start, stop)) in enumerate(zip(call.inputs, call.layout, bounds, strict=True)):
            groups = slice(start // ACTIVATION_GROUP, stop // ACTIVATION_GROUP)
            quantize_groups(
                x,
                call.smooth[i],
                call.down[i],
                recorder.part(a, a[:, start:stop]),
                recorder.part(row_scales, row_scales[groups]),
                low if rank else None,
                shifts[i],
                accumulate=i > 0,
                launch=recorder.launch,
            )
            unpack_segment(
                call.codes,
                call.scales,
                call.weight,
                segment,
                recorder.part(b, b[:, start:stop]),
                unused,
                config.unpack_for(here, x.shape[-1], False),
                fold=False,
                launch=recorder.launch,
            )
            if shifts[i]:
                correct_bias(
                    call.codes,
                    call.scales,
                    call.smooth[i],
                    bias,
                    corrected,
                    call.weight,
                    segment,
                    shifts[i],
                    launch=recorder.launch,
                )
                bias = corrected
        grouped_gemm(
            a,
            b,
            row_scales,
            call.scales,
            low if rank else None,
            call.up,
            bias,
            call.out,
            call.layout,
            bounds[0][1],
            call.gelu_from,
            config.grouped_gemm_for(here, m),
            launch=recorder.launch,
        )


def plan(path: str, rows: int) -> Callable[..., Tensor]:
    """What runs calls of one signature on a path, with so many tokens."""
    if path == "a4":
        return FourBits()
    if rows <= FEW_TOKENS:
        return FewTokens()
    many = many_tokens if path == "a16" else EightBits()
    return _Middle(many) if rows <= MIDDLE_TOKENS else many


class _Middle:
    """Few tokens or many: what is measured to be faster, once the layer and its device are known.

    Args:
        many: The plan for many.
    """

    def __init__(self, many: Callable[..., Tensor]) -> None:
        self._many = many
        self._chosen: Callable[..., Tensor] | None = None

    def __call__(
        self,
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
        *rest: Any,
    ) -> Tensor:
        """The layer's output. Arguments as in `bittern.ops.few_bit_linear`."""
        if self._chosen is None:
            # Few tokens round a smoothed x to bf16.
            exact = path == "a16" and inputs[0].dtype == torch.float16
            fused = not exact and None not in fused_tiles(inputs, codes, weight, group_size, path)
            self._chosen = FewTokens() if fused else self._many
        return self._chosen(inputs, codes, scales, smooth, down, up, bias, weight, group_size, path, *rest)


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
        reciprocals = None if smooth is None else smooth.float().reciprocal()
        quantize(flat, reciprocals, down, codes, scales[:, 0], low, low.shape[1])
    return codes.reshape(x.shape), scales.reshape(*batch, 1), low.reshape(*batch, low.shape[1])
