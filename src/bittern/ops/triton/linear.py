"""The layer put together from the kernels: what the registry runs for a path.

    a8    per segment: unpack -> 8-bit weight, 1 / s;  prologue -> codes, scales, low;  then one GEMM
    a4    the same with codes in groups of 64, weight codes as they are, and scales in the GEMM's loop
    a16   few tokens: per segment low in parts, then one pass over the packed weight
          more: a 16-bit weight, and the vendor's GEMM

The 8-bit operands live in torch's caching allocator for the length of a call, so that layers share the memory;
the largest of FLUX needs 71 MB for activations and 66 MB for weights.

A layer's first call with a signature records its launches, and the next ones repeat them (see `launch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bittern import formats
from bittern.formats import KLayout
from bittern.ops import reference
from bittern.ops.triton import config
from bittern.ops.triton.four_bits import correct_bias, quantize_groups
from bittern.ops.triton.gemm import gemm
from bittern.ops.triton.grouped_gemm import grouped_gemm
from bittern.ops.triton.launch import (
    Launch,
    Launches,
    Recorder,
    contiguous_rows,
    describable,
    launch,
    multiprocessors,
    on_device_of,
)
from bittern.ops.triton.projection import parts_of, project
from bittern.ops.triton.prologue import quantize_rows
from bittern.ops.triton.skinny import skinny_segment
from bittern.ops.triton.unpack import unpack_segment
from bittern.ops.triton.vendor import (
    has_room_for_float32,
    is_apart,
    many_tokens,
    projected,
    with_branch,
)
from bittern.ops.triton.whole_rows import quantize_whole_rows
from bittern.scheme import ACTIVATION_GROUP

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


class _Call(NamedTuple):
    """The tensors of one call, matrices all, and what its signature says; parts are known to the recorder."""

    inputs: list[Tensor]
    codes: Tensor
    scales: Tensor
    smooth: list[Tensor | None]
    """By segment, as `down`."""
    down: list[Tensor | None]
    up: Tensor | None
    bias: Tensor | None
    low: Tensor | None
    out: Tensor
    weight: str
    layout: KLayout
    path: str
    shift: Sequence[float]
    gelu_from: int | None


class LayerPlan:
    """A layer's launches for calls of one signature, found by the first of them.

    Attributes:
        launches: What later calls repeat; None before the first, and where launches cannot be repeated.
    """

    _record: Callable[[Recorder, _Call], None]

    def __init__(self) -> None:
        self.launches: Launches | None = None
        self._turns: bool | None = None

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
        shift: Sequence[float],
        gelu_from: int | None = None,
    ) -> Tensor:
        """The layer's output. Arguments as in `bittern.ops.few_bit_linear`."""
        if down is not None and up is not None and self._is_apart(down):
            y = self(inputs, codes, scales, smooth, None, None, bias, weight, group_size, path, shift)
            return reference.activated(with_branch(y, inputs, down, up), gelu_from)
        first = inputs[0]
        if self._turns is not False:
            given = (codes, scales, smooth, down, up, bias)
            codes, scales = contiguous_rows(codes), contiguous_rows(scales)
            smooth, down, up, bias = (None if t is None else contiguous_rows(t) for t in (smooth, down, up, bias))
            # Calls of one signature have strides in common: all of them want copies, which are recorded, or none does.
            self._turns = any(a is not b for a, b in zip(given, (codes, scales, smooth, down, up, bias), strict=True))
        out = first.new_empty((*first.shape[:-1], codes.shape[0]))
        tensors = (*inputs, codes, scales, smooth, down, up, bias, self._low(inputs, down), out)
        if self.launches is not None:
            with on_device_of(first):
                if self.launches.repeat(tensors, first.device):
                    return out
        recorder = Recorder(tensors)
        layout = reference.layout_of(tuple(x.shape[-1] for x in inputs), group_size)
        columns = [segment.logical for segment in layout]
        call = _Call(
            [recorder.part(x, x.reshape(-1, x.shape[-1])) for x in inputs],
            codes,
            scales,
            [None if smooth is None else recorder.part(smooth, smooth[part]) for part in columns],
            [None if down is None else recorder.part(down, down[:, part]) for part in columns],
            up,
            bias,
            tensors[-2],
            recorder.part(out, out.view(-1, codes.shape[0])),
            weight,
            layout,
            path,
            shift,
            gelu_from,
        )
        self._record(recorder, call)
        self.launches = recorder.launches() or self.launches
        return out

    def _is_apart(self, down: Tensor) -> bool:
        """Whether the branch is computed beside the kernels."""
        return is_apart(down)

    def _low(self, inputs: Sequence[Tensor], down: Tensor | None) -> Tensor | None:
        """The down-projected inputs [M, R] in float32, where no kernel projects them."""
        return None


class EightBits(LayerPlan):
    """Path "a8-int8" or "a8-fp8"."""

    def __init__(self) -> None:
        super().__init__()
        self._projects: bool | None = None

    def _low(self, inputs: Sequence[Tensor], down: Tensor | None) -> Tensor | None:
        if down is None:
            return None
        first = inputs[0]
        if self._projects is None:
            rows, widest = first.shape[:-1].numel(), max(x.shape[-1] for x in inputs)
            whole = config.whole_rows_for(config.device_of(first.device), rows, widest, len(down))
            self._projects = whole is None or first.dtype != down.dtype
        return None if self._projects else projected(inputs, down)

    def _is_apart(self, down: Tensor) -> bool:
        return is_apart(down) or (down.element_size() > 2 and not has_room_for_float32(down))

    def _record(self, recorder: Recorder, call: _Call) -> None:
        (m, n), device, grouped = call.out.shape, call.out.device, call.layout.group_size is not None
        here = config.device_of(device)
        bounds = scratch_bounds(call.layout)
        width, count = bounds[-1][1], len(bounds)
        rank = 0 if call.up is None else call.up.shape[1]
        # What the prologue projects.
        inside = rank if call.low is None else 0
        a, b, row_scales, column_scales, low, reciprocals = recorder.scratch(
            device,
            ((m, width), CODES[call.path]),
            ((n, width), CODES[call.path]),
            ((count, m), torch.float32),
            ((count, n), torch.float32),
            ((m, inside), torch.float32),
            ((width,), torch.float32),
        )
        low = low if call.low is None else call.low
        for i, (x, segment, (start, stop)) in enumerate(zip(call.inputs, call.layout, bounds, strict=True)):
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
            _quantize(
                x,
                inverse,
                call.down[i] if inside else None,
                recorder.part(a, a[:, start:stop]),
                recorder.part(row_scales, row_scales[i]),
                low if inside else None,
                rank,
                accumulate=i > 0,
                launch=recorder.launch,
            )
        first = bounds[0][1]
        parts = None
        if call.path == "a8-fp8" and reachable(call.out, call.up, call.bias):
            parts = config.specialized_parts(here, m, n, count, rank, multiprocessors(device))
        if parts is None:
            tiles = config.gemm_for(here, m, count, call.path == "a8-int8", rank)
            gemm(
                a, b, row_scales, column_scales, low if rank else None, call.up, call.bias, call.out, first,
                call.gelu_from, tiles, launch=recorder.launch,
            )  # fmt: skip
            return
        from bittern.ops.triton.specialized_gemm import specialized_gemm

        for start, stop, chosen in parts:
            gelu_from = None if call.gelu_from is None or call.gelu_from >= stop else max(0, call.gelu_from - start)
            specialized_gemm(
                a,
                recorder.part(b, b[start:stop]),
                row_scales,
                recorder.part(column_scales, column_scales[:, start:stop]),
                low if rank else None,
                None if call.up is None else recorder.part(call.up, call.up[start:stop]),
                None if call.bias is None else recorder.part(call.bias, call.bias[start:stop].view(1, -1)),
                recorder.part(call.out, call.out[:, start:stop]),
                first,
                gelu_from,
                chosen,
                launch=recorder.launch,
            )


def _bytes_of_factors(down: Tensor | None) -> int:
    return 2 if down is None else down.element_size()


def reachable(out: Tensor, up: Tensor | None, bias: Tensor | None) -> bool:
    """Whether tensor descriptors can stand for the result and for what its end reads, in 16 bits."""
    rows = [out, *([] if up is None else [up]), *([] if bias is None else [bias.view(1, -1)])]
    return all(x.element_size() == 2 and describable(x) for x in rows)


class FourBits(LayerPlan):
    """Path "a4"."""

    def _record(self, recorder: Recorder, call: _Call) -> None:
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


class SixteenBits(LayerPlan):
    """Path "a16" for few tokens."""

    def __call__(self, inputs: Sequence[Tensor], *args: Any) -> Tensor:
        """As every plan's."""
        *others, gelu_from = args if len(args) > 10 else (*args, None)
        return reference.activated(super().__call__(inputs, *others), gelu_from)

    def _record(self, recorder: Recorder, call: _Call) -> None:
        m, last, here = call.out.shape[0], len(call.inputs) - 1, config.device_of(call.out.device)
        rank = 0 if call.up is None else call.up.shape[1]
        parts = [parts_of(x.shape[1]) if rank else 0 for x in call.inputs]
        low, *sums = recorder.scratch(
            call.out.device,
            ((sum(parts), m, rank), torch.float32),
            *[(tuple(call.out.shape), torch.float32)] * last,
        )
        start = 0
        for x, down, count in zip(call.inputs, call.down, parts, strict=True):
            if down is not None and rank:
                project(x, down, recorder.part(low, low[start : start + count]), launch=recorder.launch)
            start += count
        for i, (x, segment) in enumerate(zip(call.inputs, call.layout, strict=True)):
            skinny_segment(
                x,
                call.codes,
                call.scales,
                call.smooth[i],
                call.weight,
                segment,
                sums[i - 1] if i else None,
                low if rank and i == last else None,
                call.up if i == last else None,
                call.bias if i == last else None,
                call.out if i == last else sums[i],
                config.skinny_for(here, m, call.layout.group_size, formats.get(call.weight).codes_per_byte),
                launch=recorder.launch,
            )


def plan(path: str, rows: int) -> Callable[..., Tensor]:
    """What runs calls of one signature on a path, with so many tokens."""
    if path != "a16":
        return FourBits() if path == "a4" else EightBits()
    return SixteenBits() if rows <= FEW_TOKENS else many_tokens


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
        _quantize(flat, reciprocals, down, codes, scales[:, 0], low, low.shape[1])
    return codes.reshape(x.shape), scales.reshape(*batch, 1), low.reshape(*batch, low.shape[1])


def _quantize(
    x: Tensor,
    reciprocals: Tensor | None,
    down: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    low: Tensor | None,
    rank: int,
    accumulate: bool = False,
    launch: Launch = launch,
) -> None:
    """Fills codes, scales and, with `down`, low by the kernel that suits; the rank is the layer's, whoever projects."""
    here, (m, k) = config.device_of(x.device), x.shape
    whole = None if down is not None else config.whole_rows_for(here, m, k, rank)
    if whole is not None:
        quantize_whole_rows(x, reciprocals, codes, scales, whole, launch)
        return
    tiles = config.prologue_for(here, m, 0 if down is None else rank, _bytes_of_factors(down))
    quantize_rows(x, reciprocals, down, codes, scales, low, tiles, accumulate, launch)
